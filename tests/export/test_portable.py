"""The portable graph on ONNX's checker and reference evaluator, compared with PyTorch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.contract import cache_layers, input_specs, output_specs
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.core.weights import Weights
from slm.export.graph import GemmFormat, Portable, build_graph, checkpoint_tensors, save_graph

Array = NDArray[np.generic]
# float32 sums in another order. Measured: 9e-6, and at least 3e-4 with one wrong parameter.
TOLERANCE = 3e-5

VARIANTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "untied head": {"tie_word_embeddings": False},
    "gelu": {"hidden_activation": "gelu"},
    "silu": {"hidden_activation": "silu"},
    "relu": {"hidden_activation": "relu"},
    "stretched positions": {
        "rope_parameters": {
            SLIDING: RopeParameters(rope_theta=100.0),
            FULL: RopeParameters(rope_theta=10_000.0, rope_type="linear", factor=8.0),
        }
    },
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "sliding alone": {"layer_types": (SLIDING,) * 4},
    "global alone": {"layer_types": (FULL,) * 4},
    "a window of one": {"sliding_window": 1},
}


@pytest.fixture
def written(tokenizer: Tokenizer, tmp_path: Path) -> Callable[[CausalLM, ModelConfig], Path]:
    """Saves the portable graph of a configuration with a model's weights."""

    def write(model: CausalLM, config: ModelConfig) -> Path:
        save_checkpoint(tmp_path / "c", model, tokenizer, {})
        tensors = checkpoint_tensors(Weights(tmp_path / "c"), config)
        save_graph(build_graph(config, Portable(GemmFormat()), tensors, context=256), tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


class Reference:
    """Runs the graph on ONNX's reference evaluator and keeps its caches between steps."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self.evaluator = ReferenceEvaluator(model)
        self.outputs = [output.name for output in model.graph.output]
        shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        self._empty = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values")}
        self.caches: dict[str, Array] = {}

    def start(self, rows: int) -> None:
        self.caches = {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in self._empty.items()}

    def step(self, ids: Array, mask: Array) -> Array:
        values = self.evaluator.run(None, {"input_ids": ids, "attention_mask": mask, **self.caches})
        found = dict(zip(self.outputs, values, strict=True))
        self.caches = {name: found[name.replace("past_key_values", "present")] for name in self.caches}
        logits: Array = found["logits"]
        return logits


# Lengths around the window of 16, and beyond it.
CHUNKS = (15, 1, 1, 9, 20, 1, 1)


def differences(graph: Reference, model: CausalLM) -> dict[str, float]:
    """Returns the largest differences of logits from PyTorch: in one step, in chunks, and as a batch padded on the left."""
    length, padding = sum(CHUNKS), 9
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (2, length))
    mask = np.ones_like(ids)
    mask[1, :padding] = 0
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids)).numpy()
        padded = model(torch.from_numpy(ids[1:, padding:])).numpy()
    found = {}
    for name, sizes in (("whole", (length,)), ("chunks", CHUNKS)):
        for valid, second in ((np.ones_like(mask), wanted[1]), (mask, padded[0])):
            graph.start(rows=2)
            ends = np.cumsum(sizes)
            steps = [
                graph.step(ids[:, end - n : end], valid[:, :end]) for n, end in zip(sizes, ends.tolist(), strict=True)
            ]
            logits = np.concatenate(steps, axis=1)
            rows = ((logits[0], wanted[0]), (logits[1, -len(second) :], second))
            arrangement = name if valid is not mask else f"{name}, padded"
            found[arrangement] = max(float(np.abs(ours - theirs).max()) for ours, theirs in rows)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_the_reference_evaluator(
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    written: Callable[[CausalLM, ModelConfig], Path],
    variant: str,
) -> None:
    changed = config.model_copy(update=VARIANTS[variant])
    model = make_model(changed)
    path = written(model, changed)
    onnx.checker.check_model(path, full_check=True)
    graph = Reference(path)
    assert max(differences(graph, model).values()) < TOLERANCE
    for layer in cache_layers(changed):
        length = sum(CHUNKS) if layer.window is None else layer.window - 1
        assert graph.caches[f"past_key_values.{layer.layer}.key"].shape[2] == length


@pytest.mark.parametrize("knob", ["window", "base", "scale", "epsilon"])
def test_a_graph_of_another_model_is_noticed(
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    written: Callable[[CausalLM, ModelConfig], Path],
    knob: str,
) -> None:
    rope = config.rope_parameters
    change: dict[str, object] = {
        "window": {"sliding_window": 15},
        "base": {"rope_parameters": {**rope, SLIDING: RopeParameters(rope_theta=110.0)}},
        "scale": {"query_pre_attn_scalar": 25},
        "epsilon": {"rms_norm_eps": 1e-4},
    }[knob]
    model = make_model(config)
    found = differences(Reference(written(model, config.model_copy(update=change))), model)
    assert min(found.values()) > 3 * TOLERANCE


def test_the_contract(
    config: ModelConfig, make_model: Callable[..., CausalLM], written: Callable[[CausalLM, ModelConfig], Path]
) -> None:
    model = onnx.load(written(make_model(config), config))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    caches = cache_layers(config)
    for values, specs in (
        (model.graph.input, input_specs(caches)),
        (model.graph.output, output_specs(config.vocab_size, caches)),
    ):
        described = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
        assert described == [(spec.name, spec.shape) for spec in specs]
    # No tensor depends on the context, because each step computes its positions.
    assert max(initializer.dims[0] for initializer in model.graph.initializer if initializer.dims) == config.vocab_size
    # Graph viewers show every node under the path of its module.
    layers = [node.name for node in model.graph.node if node.name.startswith("model/layers.2/")]
    assert {name.split("/")[2] for name in layers} >= {"self_attn", "mlp", "input_layernorm"}
