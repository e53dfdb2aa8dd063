"""Comparison of exported graphs with PyTorch, including bundles with one error, which must fail."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from slm.core.config import FULL, SLIDING, LayerType, ModelConfig, RopeParameters
from slm.core.contract import CacheType, Device, Target, TensorSpec, cache_layers, input_specs, output_specs, past_name
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, seal
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import Weights
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import FloatFormat, Fused, build_graph, checkpoint_tensors, save_graph
from slm.export.graph.builder import GraphUnderWay
from slm.export.graph.fused import FusedPositions
from slm.export.parity import TOLERANCE, check_parity
from slm.runtime.cache import KVBuffers
from slm.runtime.decoder import OnnxDecoder

MakeModel = Callable[..., CausalLM]
DEVICES: dict[Device, CacheType] = {"cpu": "float32", "cuda": "float16", "webgpu": "float16"}


def test_the_bundle_equals_pytorch(shared_bundle: Bundle) -> None:
    parity = shared_bundle.manifest.parity
    assert parity is not None
    assert parity.tokens == 3 * shared_bundle.config.sliding_window
    assert parity.logits.keys() == parity.caches.keys() == {"whole", "chunks", "steps", "batch"}
    assert 0 < parity.largest < TOLERANCE
    assert parity.greedy_tokens_equal == 32


VARIANTS: dict[str, dict[str, object]] = {
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
}


@pytest.mark.parametrize("target", ["fused", "portable"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(
    config: ModelConfig, make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, variant: str, target: Target
) -> None:
    changed = config.model_copy(update=VARIANTS[variant])
    save_checkpoint(tmp_path / "c", make_model(changed), tokenizer, {})
    bundle = export_bundle(tmp_path / "c", tmp_path / "onnx", ExportOptions(target=target))
    assert bundle.config == changed
    parity = bundle.manifest.parity
    assert parity is not None and parity.largest < TOLERANCE


def rebuilt(
    shared_checkpoint: Path, shared_bundle: Bundle, out: Path, change: dict[str, object], weight: str | None = None
) -> Bundle:
    """Returns a bundle with a changed configuration in its graph, or with one changed element of one weight."""
    config = shared_bundle.config.model_copy(update=change)
    tensors = dict(checkpoint_tensors(Weights(shared_checkpoint), config))
    if weight is not None:
        tensors[weight] = tensors[weight].copy()
        tensors[weight].flat[7] += 0.05
    (out / "onnx").mkdir(parents=True)
    save_graph(
        build_graph(config, Fused(FloatFormat()), tensors, shared_bundle.manifest.context), out / "onnx" / "model.onnx"
    )
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_bytes((shared_bundle.path / name).read_bytes())
    return seal(out, shared_bundle.manifest)


def rope_with(config: ModelConfig, kind: LayerType, **change: object) -> dict[str, object]:
    rope = config.rope_parameters
    return {"rope_parameters": {**rope, kind: rope[kind].model_copy(update=change)}}


def test_the_same_graph_rebuilt_passes(shared_checkpoint: Path, shared_bundle: Bundle, tmp_path: Path) -> None:
    bundle = rebuilt(shared_checkpoint, shared_bundle, tmp_path / "b", {})
    check_parity(bundle, load_checkpoint(shared_checkpoint), Silent())


@pytest.mark.parametrize(
    "knob",
    [
        "window", "local base", "global base", "rope factor", "scale", "epsilon", "activation",
        "projection", "norm", "embedding",
    ],
)  # fmt: skip
def test_a_bundle_wrong_in_one_place_fails(
    shared_checkpoint: Path, shared_bundle: Bundle, tmp_path: Path, knob: str
) -> None:
    config = shared_bundle.config
    weights = {
        "projection": "model.layers.3.mlp.down_proj.weight",
        "norm": "model.layers.2.self_attn.k_norm.weight",
        "embedding": "model.embed_tokens.weight",
    }
    change: dict[str, object] = {
        "window": {"sliding_window": config.sliding_window - 1},
        "local base": rope_with(config, SLIDING, rope_theta=101.0),
        "global base": rope_with(config, FULL, rope_theta=10_100.0),
        "rope factor": rope_with(config, FULL, rope_type="linear", factor=1.01),
        "scale": {"query_pre_attn_scalar": config.query_pre_attn_scalar + 1},
        "epsilon": {"rms_norm_eps": 1e-4},
        "activation": {"hidden_activation": "gelu"},
    }.get(knob, {})
    bundle = rebuilt(shared_checkpoint, shared_bundle, tmp_path / "b", change, weights.get(knob))
    with pytest.raises(SlmError, match="the bundle does not match the checkpoint"):
        check_parity(bundle, load_checkpoint(shared_checkpoint), Silent())


def test_a_failed_comparison_writes_nothing(
    shared_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm.export import bundle as module

    monkeypatch.setattr(
        module, "build_graph", lambda c, w, t, n: build_graph(c.model_copy(update={"rms_norm_eps": 1e-3}), w, t, n)
    )
    with pytest.raises(SlmError, match="does not match the checkpoint"):
        export_bundle(shared_checkpoint, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_contract(shared_bundle: Bundle) -> None:
    model = onnx.load(shared_bundle.model_path, load_external_data=False)
    config = shared_bundle.config

    def described(values: list[onnx.ValueInfoProto]) -> list[tuple[str, tuple[int | str, ...]]]:
        return [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]

    assert described(list(model.graph.input)) == [(s.name, s.shape) for s in input_specs(cache_layers(config))]
    assert described(list(model.graph.output)) == [
        (s.name, s.shape) for s in output_specs(config.vocab_size, cache_layers(config))
    ]
    first_cache = model.graph.input[2].name
    assert config.layer_types[int(first_cache.split(".")[1])] == FULL
    names = {initializer.name for initializer in model.graph.initializer}
    assert "model.layers.0.self_attn.o_proj.weight" in names
    assert "model.layers.0.input_layernorm.weight" in names
    assert "lm_head.weight" not in names  # tied: stored once
    assert all(shape[2].startswith("past_") for name, shape in described(list(model.graph.input)) if "past" in name)  # type: ignore[union-attr]


def test_weights_lie_beside_the_graph_once(shared_bundle: Bundle) -> None:
    data = shared_bundle.model_path.with_name("model.onnx_data")
    matrices = 4 * shared_bundle.config.parameter_count()
    assert matrices * 0.95 < data.stat().st_size < matrices * 1.05 + 4096 * 40  # each tensor starts on a page boundary
    assert shared_bundle.model_path.stat().st_size < 200_000


@pytest.mark.parametrize(("keep", "positions"), [(0, 5), (1, 1), (3, 3), (9, 5)])
def test_num_logits_to_keep(shared_bundle: Bundle, keep: int, positions: int) -> None:
    decoder = OnnxDecoder(shared_bundle)
    ids = np.array([[5, 9, 2, 7, 11]])
    everything = decoder.step(ids, keep=0)
    decoder.reset()
    kept = decoder.step(ids, keep=keep)
    assert kept.shape == (1, positions, shared_bundle.config.vocab_size)
    np.testing.assert_array_equal(kept, everything[:, -positions:])


def test_num_logits_to_keep_has_a_default(shared_bundle: Bundle) -> None:
    decoder = OnnxDecoder(shared_bundle)
    ids = np.array([[5, 9, 2]])
    buffers = KVBuffers(shared_bundle.manifest.cache, 64)
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 3), np.int64)}
    feeds |= {
        past_name(layer, side): buffer.read(slice(None), 0, buffer.shape[2])
        for (layer, side), buffer in buffers._buffers.items()
    }
    logits = decoder.session.run(["logits"], feeds)[0]
    np.testing.assert_array_equal(logits, decoder.step(ids, keep=0))


def test_rows_padded_on_the_right_keep_their_own_last_positions(
    config: ModelConfig, make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """With global layers only, a ragged prompt is read in one step. Each row's logits are those of its last valid token."""
    everywhere = config.model_copy(update={"layer_types": (FULL,) * config.num_hidden_layers})
    model = make_model(everywhere)
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    bundle = export_bundle(tmp_path / "c", tmp_path / "onnx")
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12))
    mask = np.ones((2, 12), np.int64)
    mask[1, 5:] = 0
    logits = OnnxDecoder(bundle).run(ids, mask, KVBuffers(bundle.manifest.cache, 64, batch=2), keep=2)
    with torch.inference_mode():
        for row, length in enumerate((12, 5)):
            wanted = model(torch.from_numpy(ids[row : row + 1, :length]), num_logits_to_keep=2)[0].numpy()
            np.testing.assert_allclose(logits[row], wanted, atol=TOLERANCE)


@pytest.mark.parametrize("context", [16, 257])
def test_a_context_that_does_not_fit_is_refused(shared_checkpoint: Path, tmp_path: Path, context: int) -> None:
    with pytest.raises(SlmError, match=f"{context} tokens"):
        export_bundle(shared_checkpoint, tmp_path / "onnx", ExportOptions(context))


def test_bfloat16_checkpoints_are_read(shared_checkpoint: Path, config: ModelConfig, tmp_path: Path) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(shared_checkpoint / "model.safetensors")
    safetensors.torch.save_file({n: t.bfloat16() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    read = checkpoint_tensors(Weights(tmp_path), config)["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(read, tensors["model.layers.0.mlp.down_proj.weight"].bfloat16().float().numpy())


def test_the_builder_leaves_no_dead_nodes(shared_bundle: Bundle) -> None:
    graph = ir.load(shared_bundle.model_path).graph
    outputs = set(graph.outputs)
    assert all(any(out.uses() or out in outputs for out in node.outputs) for node in graph)


@pytest.mark.parametrize("tables", [True, False], ids=["every position", "new tokens"])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_both_sides_turn_alike(factor: float, tables: bool) -> None:
    """Rotations agree at the head size of the 270M shape, at positions far beyond those of the small models."""
    from slm.core.nn.rope import rope_angles
    from slm.core.presets import preset

    config = preset("gemma3-270m")
    config = config.model_copy(update=rope_with(config, FULL, rope_type="linear", factor=factor))
    past, length = 3, 4096
    turned = rotations(config, length if tables else None, past, length)
    for kind, rope in config.rope_parameters.items():
        positions = torch.arange(0 if tables else past, length)[None]
        for name, theirs in zip(("cos", "sin"), rope_angles(positions, config.head_dim, rope), strict=True):
            # The angles are equal bit for bit. Cosines of different libraries can differ in the last bit.
            np.testing.assert_allclose(turned[f"{kind}.{name}"], theirs[0, 0].numpy(), atol=2e-7, rtol=0)
            later = rope_angles(positions + 1, config.head_dim, rope)[name == "sin"][0, 0].numpy()
            assert np.abs(turned[f"{kind}.{name}"] - later).max() > 0.1  # negative control: the next position


def rotations(config: ModelConfig, context: int | None, past: int, length: int) -> dict[str, np.ndarray]:
    """Returns the rotations (rows, H / 2) of `length - past` new tokens in the fused graph: "KIND.cos" and "KIND.sin"."""
    inputs = input_specs(cache_layers(config))[:2]
    under_way = GraphUnderWay("rotations", {"": 21}, inputs, {})
    positions = FusedPositions(config, context, ir.DataType.FLOAT)
    step = positions(under_way.op, under_way.inputs)
    for kind in config.rope_parameters:
        for name, values in (("cos", step.cos), ("sin", step.sin)):
            shape = ("rows", config.head_dim // 2)
            under_way.output(values[kind], TensorSpec(name=f"{kind}.{name}", dtype="float32", shape=shape))
    model = under_way.finish("")
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(positions.tensors[name.rpartition(".")[2]], name=name)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {"input_ids": np.zeros((1, length - past), np.int64), "attention_mask": np.ones((1, length), np.int64)}
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: array for name, array in fed.items() if name in wanted})
    return dict(zip(names, found, strict=True))


def test_nothing_is_as_long_as_the_context(shared_checkpoint: Path, shared_bundle: Bundle, tmp_path: Path) -> None:
    """A context of 200 instead of 256 changes no byte of the weights, and only numbers in the graph."""
    config, tensors = shared_bundle.config, checkpoint_tensors(Weights(shared_checkpoint), shared_bundle.config)
    for device, cache in DEVICES.items():
        files = []
        for context in (200, 256):
            path = tmp_path / f"{device}-{context}" / "model.onnx"
            path.parent.mkdir()
            weights = FloatFormat(half=device != "cpu")
            save_graph(build_graph(config, Fused(weights, device, cache), tensors, context), path)
            files.append([file.stat().st_size for file in sorted(path.parent.iterdir())])
        assert len(files[0]) == 2 and np.abs(np.subtract(*files)).max() <= 8, device


@pytest.mark.parametrize("device", ["cuda", "webgpu"])
def test_onnxruntime_computes_tables_once(shared_checkpoint: Path, tmp_path: Path, device: Device) -> None:
    """onnxruntime folds the rotation tables: the optimized graph has no cosine. Negative control: the unoptimized graph."""
    bundle = export_bundle(shared_checkpoint, tmp_path / device, ExportOptions(device=device))
    for level, wanted in (("ORT_ENABLE_ALL", 0), ("ORT_DISABLE_ALL", 4)):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(tmp_path / f"{level}.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])
        nodes = [node.op_type for node in ir.load(tmp_path / f"{level}.onnx").graph]
        assert nodes.count("Cos") + nodes.count("Sin") == wanted
