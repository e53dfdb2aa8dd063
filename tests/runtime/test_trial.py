"""The tiny model of `slm doctor`: onnx's checker accepts it, and wrong numbers are found."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from slm.runtime import trial
from slm.runtime.session import CPU

KINDS = [np.dtype(np.float16), np.dtype(np.float32)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_file_is_a_model(kind: "np.dtype[Any]") -> None:
    model = onnx.load_from_string(trial.tiny_model(kind))
    assert [each.name for each in model.graph.output] == ["attended_64", "attended_256"]
    assert [node.op_type for node in model.graph.node] == ["MatMul"] * 3 + ["GroupQueryAttention"] + ["MatMul"] * 3 + [
        "GroupQueryAttention"
    ]
    kinds = {each.data_type for each in model.graph.initializer}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(kind)}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_right_numbers_are_those_of_onnxruntime(kind: "np.dtype[Any]") -> None:
    session = ort.InferenceSession(trial.tiny_model(kind), providers=[CPU])
    assert trial._difference(session, kind) < (1e-5 if kind == np.float32 else 0.01)


def test_the_cpu_runs_a_step() -> None:
    found = trial.try_provider(CPU)
    assert CPU in found.pop("available") and CPU in found.pop("loaded")
    assert found == {"ran": True, "error": None}


def test_a_provider_that_is_not_there_does_not_run() -> None:
    found = trial.try_provider("NoSuchExecutionProvider")
    assert not found["ran"] and "NoSuchExecutionProvider" not in found["loaded"]


@pytest.mark.parametrize("wrong", [0.04, float("nan"), float("inf")])
def test_wrong_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    attended = trial._attended
    monkeypatch.setattr(trial, "_attended", lambda hidden, size: attended(hidden, size) + np.float32(wrong))
    found = trial.try_provider(CPU)
    assert not found["ran"] and "differs from the reference by" in found["error"]


def test_a_causal_mask_that_is_missing_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.np, "tri", lambda count, dtype: np.ones((count, count), dtype))
    assert not trial.try_provider(CPU)["ran"]


def test_a_shipped_model_that_is_damaged_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(trial, "model_path", lambda: tmp_path)
    found = trial.try_provider(CPU)
    assert not found["ran"] and "not a bundle" in found["error"]
