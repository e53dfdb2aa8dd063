"""Cases that schemathesis generates from the OpenAPI description: none causes a defect, and every response is described."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from slm.serve.service import Limits

NAME = "random"
ENVELOPE = {"message", "type", "param", "code"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def try_cases(running: Any, examples: int) -> Counter[tuple[str, int]]:
    """Asks as many cases of each operation with a body in each mode, a tenth of the others; returns the statuses by path."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    session = requests.Session()
    found: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        with_body = operation.method == "post"
        for mode in MODES if with_body else MODES[:1]:

            @seed(8)
            @settings(
                max_examples=examples if with_body else max(5, examples // 10),
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                # Otherwise there would hardly be an answer: no model is called what is made up.
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = NAME
                response = case.call(base_url=running.url, session=session, timeout=60)
                case.validate_response(response, checks=CHECKS)
                if response.status_code >= 400 and case.path.startswith("/v1/"):
                    assert response.json()["error"].keys() == ENVELOPE
                found[case.path, response.status_code] += 1

            ask()
    return found


def check(running: Any, examples: int) -> int:
    found = try_cases(running, examples)
    for path in ("/v1/completions", "/v1/chat/completions"):
        # Some of both, or nothing was tried.
        assert found[path, 200] > examples / 20 and found[path, 400] > examples / 20, found
    assert {status for _, status in found} <= {200, 400, 404, 413}, found
    assert running.service.engine.failed is None and running.service.engine.figures.running == 0
    return sum(found.values())


def test_what_is_refused_before_it_is_looked_at_is_described(serve: Callable[..., Any]) -> None:
    paths = requests.get(f"{serve().url}/openapi.json", timeout=60).json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert path.startswith("/v1/") == ({"401", "403", "421", "431"} <= set(operation["responses"])), path


@pytest.mark.examples(few=25, many=600)
def test_drawn_cases(serve: Callable[..., Any], examples: int) -> None:
    assert check(serve(Limits(new_tokens=4)), examples) > 3.3 * examples


def test_a_defect_would_be_found(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: request fields that fail, and a response field that is not described."""
    from slm.serve import completions

    sampling, usage = completions._sampling, completions.usage_of

    # Several fields, so that some case that is answered has one of them.
    fields = ("temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "seed")

    def breaks(request: Any, index: int) -> Any:
        if any(getattr(request, name) is not None for name in fields):
            raise RuntimeError("a defect")
        return sampling(request, index)

    running = serve(Limits(new_tokens=4))
    with monkeypatch.context() as patch, pytest.raises(FailureGroup, match="Server error"):
        patch.setattr(completions, "_sampling", breaks)
        try_cases(running, 60)
    with monkeypatch.context() as patch, pytest.raises(FailureGroup, match="violates schema"):
        patch.setattr(completions, "usage_of", lambda *given: usage(*given) | {"more": 1})
        try_cases(running, 60)
