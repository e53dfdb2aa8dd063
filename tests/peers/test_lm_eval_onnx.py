"""lm-evaluation-harness's own backends for onnxruntime, against slm's answers to the same requests."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.peer

Ask = Callable[..., Any]
Answers = dict[tuple[str, str, str], Any]

# Sums of some hundred log-probabilities in float32, relative, 1e-7 seen; with INT8 weights activations are rounded, which
# goes up in one place and down in another where two kernels add in another order, 2e-5 seen.
SAME = {"float32": 2e-5, "int8": 5e-4, "portable": 2e-5}

# These backends put no token before a text, so it stands in the requests.
SHORT = [("<|endoftext|>The fox", " ran"), ("<|endoftext|>It", " is é")]
LONG = [("<|endoftext|>" + "It rained. " * 6, " The end"), ("<|endoftext|>" + "so long " * 100, " that it is cut")]
ROLLING = [["Once upon a time, a naïve fox ran. 🦊" * 4], [" The end." * 10]]
UNTIL = [("<|endoftext|>The fox", {"until": ["zz"], "max_gen_toks": 30})]
EVERYTHING = {"long": LONG, "short": SHORT, "rolling": ROLLING, "until": UNTIL}
KINDS = {"rolling": "loglikelihood_rolling", "until": "generate_until"}


@pytest.fixture(scope="module")
def answers(lm_eval_onnx: Ask, bundles: Any) -> Answers:
    """Answers by backend, bundle and kind of request; a message where there are none."""
    asked = [("onnxruntime", "portable"), ("onnxruntime", "other portable")]
    asked += [("onnxruntime-genai", name) for name in ("float32", "int8", "portable")]
    asked += [("slm", name) for name in ("float32", "int8", "portable")]
    each = [(*ask, what) for ask in asked for what in EVERYTHING]
    found = lm_eval_onnx(
        json.dumps(
            [
                (backend, str(bundles.path(name)), {KINDS.get(what, "loglikelihood"): EVERYTHING[what]})
                for backend, name, what in each
            ]
        )
    )
    return {ask: next(iter(answer.values())) for ask, answer in zip(each, found, strict=True)}


def same(answers: Answers, backend: str, name: str, *kinds: str) -> None:
    for what in kinds:
        found, wanted = answers[backend, name, what], answers["slm", name, what]
        if what == "until":
            assert found == wanted
        elif what == "rolling":
            assert found == pytest.approx(wanted, rel=SAME[name])
        else:
            assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
            assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=SAME[name])


def test_a_portable_bundle_through_onnxruntime(answers: Answers) -> None:
    same(answers, "onnxruntime", "portable", "long", "short", "rolling")
    assert "does not implement generative tasks" in answers["onnxruntime", "portable", "until"]


def test_another_window_is_noticed(answers: Answers) -> None:
    """The control: the same weights with a window of 12."""
    other, wanted = answers["onnxruntime", "other portable", "long"], answers["slm", "portable", "long"]
    assert other[0][0] != pytest.approx(wanted[0][0], rel=10 * SAME["portable"])


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_fused_bundle_through_genai(answers: Answers, name: str) -> None:
    """Rows of at least the window alone: it allocates caches as long as the row."""
    same(answers, "onnxruntime-genai", name, "long", "rolling", "until")
    assert "must be at least local_window_size (16)" in answers["onnxruntime-genai", name, "short"]


def test_a_portable_bundle_through_genai(answers: Answers) -> None:
    """Rows shorter than the window alone: past it, caches have another length than it expects."""
    same(answers, "onnxruntime-genai", "portable", "short")
    assert "the computed output shape" in answers["onnxruntime-genai", "portable", "long"]
