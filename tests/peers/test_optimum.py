"""optimum's ORTModelForCausalLM opens portable bundles as they are."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.peer

Ask = Callable[..., Any]
PORTABLE = ("portable", "portable int8", "portable int4")


@pytest.fixture(scope="module")
def answers(optimum: Ask, bundles: Any) -> dict[str, Any]:
    """Greedy tokens by bundle, one by one and last as a batch whose shorter rows are padded on the left."""
    batches = [*([prompt] for prompt in bundles.prompts), bundles.prompts]
    names = (*PORTABLE, "other portable", "float32")
    found = optimum(bundles.count, json.dumps({str(bundles.path(name)): batches for name in names}))
    assert found["versions"] == ["0.1.0", "2.1.0", "4.57.6"]
    return {name: found["answers"][str(bundles.path(name))] for name in names}


@pytest.mark.parametrize("name", PORTABLE)
def test_the_same_greedy_tokens(answers: dict[str, Any], bundles: Any, name: str) -> None:
    texts = [bundles.cut(answer) for answer in answers[name]]
    assert texts[-1] == bundles.greedy(name)
    assert [answer[0] for answer in texts[:-1]] == texts[-1]


def test_another_window_is_noticed(answers: dict[str, Any], bundles: Any) -> None:
    """The control: the same weights with a window of 12."""
    found = bundles.cut(answers["other portable"][-1])
    assert sum(ours != theirs for ours, theirs in zip(bundles.greedy("portable"), found, strict=True)) >= 4


def test_a_fused_bundle_is_refused(answers: dict[str, Any]) -> None:
    assert "KV cache capacity (0) must be at least local_window_size (16)" in answers["float32"]


def test_the_example(in_python: Callable[..., str], bundles: Any, example: Callable[[str, int], str]) -> None:
    printed = in_python(example("optimum", 0), "optimum", "transformers4")
    assert printed.strip() == bundles.text("portable", "Once upon a time", 50).strip()
