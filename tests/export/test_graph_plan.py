"""The check of a bundle's graph, node by node: every kind of graph that slm writes passes, and any other is rejected."""

import itertools
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import slm as package
from slm.core.config import FULL, ModelConfig
from slm.core.contract import product_sizes
from slm.core.errors import SlmError
from slm.core.graph_check import check_graph
from slm.core.graph_file import FileNode, _read_attribute
from slm.core.graph_plan.kind import Kind, Stored
from slm.core.manifest import Bundle, Scheme, seal
from slm.export.graph import (
    BlockFormat,
    DequantizedFormat,
    FloatFormat,
    Fused,
    GemmFormat,
    Portable,
    SlotFormat,
    build_graph,
    save_graph,
)
from slm.quantize.plan import with_half_scales
from tests.export.graph_attacks import ATTACKS, ATTACKS_OF, at_the_end, constant, shaped, tensor

CONTEXT = 64


def paths_of(config: ModelConfig) -> list[str]:
    return ["model.embed_tokens", *(path for path, _, _ in product_sizes(config)), "lm_head"]


def schemes_of(config: ModelConfig, bits: int, zero_points: bool, dynamic: bool = False) -> dict[str, Scheme]:
    """Returns schemes that alternate between two kinds. The embedding is never dynamic."""
    plain = Scheme(bits=8, block_size=16)
    special = Scheme(bits=bits, block_size=32, zero_points=zero_points)
    by_channel = Scheme(bits=8, block_size=32, dynamic=True)
    schemes = {path: special if number % 2 == 0 else plain for number, path in enumerate(paths_of(config))}
    return schemes | ({path: by_channel for path, _, _ in product_sizes(config)} if dynamic else {})


def stored_as(schemes: dict[str, Scheme]) -> Callable[[str], Stored]:
    fields = ("bits", "block_size", "zero_points", "dynamic", "half", "halves", "frequent")
    return lambda path: Stored(**{name: getattr(schemes[path], name) for name in fields})


def kind_of(**changes: Any) -> Kind:
    fields = {"target": "fused", "device": "cpu", "context": CONTEXT, "accuracy_level": 4, "stored": lambda path: Stored(),
              "slots": False, "quantized_cache": False}  # fmt: skip
    return Kind(**fields | changes)


def written(path: Path, config: ModelConfig, target: Any) -> dict[str, int]:
    """Writes a graph with zeros as weights, and returns the sizes of the other files in its directory."""
    model = build_graph(config, target, {}, CONTEXT)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.LazyTensor):
            assert value.shape is not None and value.dtype is not None
            array = np.zeros(tuple(value.shape), value.dtype.numpy())
            value.const_value = ir.tensor(array, dtype=value.dtype, name=name)
    path.parent.mkdir(exist_ok=True)
    save_graph(model, path)
    return {file.name: file.stat().st_size for file in path.parent.iterdir()}


KEPT = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.qkv_proj", "model.embed_tokens")
# Smoothing factors by weight. Not every slot has some.
COLUMNS = {
    f"model.layers.{path}_proj.weight": np.ones(size) for path, size in (("0.mlp.down", 96), ("1.mlp.gate_up", 64))
}
ROWS = {"model.layers.0.mlp.down_proj.weight": np.ones(64)}


def kinds(config: ModelConfig) -> dict[str, tuple[Any, Kind]]:
    half = {"stored": lambda path: Stored(half=path not in KEPT)}
    found: dict[str, tuple[Any, Kind]] = {
        "fused": (Fused(FloatFormat()), kind_of()),
        "slots": (Fused(SlotFormat(FloatFormat())), kind_of(slots=True)),
        "smoothed slots": (Fused(SlotFormat(FloatFormat(), COLUMNS, ROWS)), kind_of(slots=True)),
        "cuda": (Fused(FloatFormat(half=True, kept=KEPT), "cuda", "float16"), kind_of(device="cuda", **half)),
        "webgpu": (Fused(FloatFormat(half=True, kept=KEPT), "webgpu", "float16"), kind_of(device="webgpu", **half)),
        "portable": (Portable(GemmFormat()), kind_of(target="portable")),
    }  # fmt: skip
    for bits, points in itertools.product((4, 8), (False, True)):
        schemes = schemes_of(config, bits, points)
        stored = stored_as(schemes)
        name = f"int{bits}{', zero points' if points else ''}"
        found[name] = (Fused(BlockFormat(schemes, 4), cache="int8"), kind_of(stored=stored, quantized_cache=True))
        found[f"portable {name}"] = (
            Portable(DequantizedFormat(schemes)),
            kind_of(target="portable", stored=stored, accuracy_level=0),
        )
        schemes = with_half_scales(schemes, KEPT)
        found[f"cuda {name}"] = (
            Fused(BlockFormat(schemes, 0), "cuda", "float16"),
            kind_of(device="cuda", stored=stored_as(schemes), accuracy_level=0),
        )
    schemes = schemes_of(config, 8, False, dynamic=True)
    found["dynamic"] = (Fused(BlockFormat(schemes, 4)), kind_of(stored=stored_as(schemes)))
    found["dynamic slots"] = (
        Fused(SlotFormat(BlockFormat(schemes, 4))),
        kind_of(stored=stored_as(schemes), slots=True),
    )
    halves = schemes_of(config, 8, False) | {"model.embed_tokens": Scheme(bits=8, block_size=16, halves=True)}
    for name, weights, slots in (
        ("halves", BlockFormat(halves, 4), False),
        ("halves slots", SlotFormat(BlockFormat(halves, 4)), True),
    ):
        found[name] = (Fused(weights), kind_of(stored=stored_as(halves), slots=slots))
    table = Scheme(bits=4, block_size=32, zero_points=True, frequent=11)
    frequent = schemes_of(config, 4, True) | {"model.embed_tokens": table, "lm_head": table}
    for name, weights, slots in (
        ("frequent rows", BlockFormat(frequent, 4), False),
        ("frequent rows slots", SlotFormat(BlockFormat(frequent, 4)), True),
    ):
        found[name] = (Fused(weights), kind_of(stored=stored_as(frequent), slots=slots))
    frequent = with_half_scales(frequent, ("lm_head",))
    found["cuda frequent rows"] = (
        Fused(BlockFormat(frequent, 0), "cuda", "float16"),
        kind_of(device="cuda", stored=stored_as(frequent), accuracy_level=0),
    )
    return found


NAMES = ("fused", "slots", "smoothed slots", "cuda", "webgpu", "portable", "int4", "portable int4", "int4, zero points",
         "portable int4, zero points", "int8", "portable int8", "int8, zero points", "portable int8, zero points", "dynamic",
         "dynamic slots", "halves", "halves slots", "frequent rows",
         "frequent rows slots", "cuda frequent rows", "cuda int4", "cuda int4, zero points", "cuda int8")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_slm_writes_is_what_it_runs(tmp_path: Path, config: ModelConfig, name: str, tied: bool) -> None:
    if "halves" in name and not tied:
        pytest.skip("only a tied table is stored in halves")
    config = config.model_copy(update={"tie_word_embeddings": tied})
    target, kind = kinds(config)[name]
    sizes = written(tmp_path / "onnx" / "model.onnx", config, target)
    check_graph(tmp_path / "onnx" / "model.onnx", config, kind, sizes)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "silu", "relu"])
@pytest.mark.parametrize("name", ["fused", "portable"])
def test_with_every_activation_and_kind_of_layer(
    tmp_path: Path, config: ModelConfig, name: str, activation: str
) -> None:
    layers = {"layer_types": (FULL,) * 4, "hidden_activation": activation}
    config = config.model_copy(update=layers)
    target, kind = kinds(config)[name]
    sizes = written(tmp_path / "onnx" / "model.onnx", config, target)
    check_graph(tmp_path / "onnx" / "model.onnx", config, kind, sizes)


def test_the_model_that_ships_opens() -> None:
    """An earlier version exported its graph, with rotation tables."""
    from slm.runtime.shipped import model_path

    assert Bundle.open(model_path()).manifest.precision == "int8"


@pytest.mark.parametrize("name", ATTACKS)
def test_another_graph_is_rejected(tmp_path: Path, config: ModelConfig, name: str) -> None:
    path = tmp_path / "onnx" / "model.onnx"
    sizes = written(path, config, Fused(FloatFormat()))
    model = onnx.load(path, load_external_data=False)
    ATTACKS[name](model)
    path.write_bytes(model.SerializeToString())
    before = time.process_time()
    with pytest.raises(SlmError) as caught:
        check_graph(path, config, kind_of(), sizes)
    assert time.process_time() - before < 1
    assert caught.value.message.isprintable() and caught.value.hint


def test_an_attribute_with_two_graphs_is_rejected() -> None:
    """Protobuf merges the two, which the reader would not see. No library writes such a file."""
    graph = helper.make_graph([helper.make_node("Abs", ["v"], ["w"])], "branch", [], [])
    attribute = helper.make_attribute("then_branch", graph).SerializeToString()
    second = onnx.AttributeProto(g=graph).SerializeToString()
    node, found = FileNode(), []
    for data in (attribute, attribute + second):
        with mmap(-1, len(data)) as memory:
            memory[:] = data
            node = FileNode()
            _read_attribute(memory, 0, len(data), node, [100], inside=False)  # type: ignore[arg-type]
            found.append(node.extras)
    assert found == [[], ["a subgraph"]]


@pytest.mark.parametrize(
    ("name", "attack"), [(name, each) for name, attacks in ATTACKS_OF.items() for each in (None, *attacks)]
)
def test_subgraphs_are_compared(
    tmp_path: Path, config: ModelConfig, name: str, attack: Callable[[onnx.ModelProto], None] | None
) -> None:
    int8 = Fused(FloatFormat(), cache="int8"), kind_of(quantized_cache=True)
    target, kind = int8 if name == "int8 caches" else kinds(config)[name]
    path = tmp_path / "onnx" / "model.onnx"
    sizes = written(path, config, target)
    if attack is None:
        return check_graph(path, config, kind, sizes)
    model = onnx.load(path, load_external_data=False)
    before = model.SerializeToString()
    attack(model)
    assert model.SerializeToString() != before
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SlmError) as caught:
        check_graph(path, config, kind, sizes)
    assert caught.value.hint
    return None


def test_caches_of_earlier_versions(tmp_path: Path, config: ModelConfig) -> None:
    """Earlier versions attended to 8-bit caches in the same way for every number of tokens."""
    path = tmp_path / "onnx" / "model.onnx"
    sizes = written(path, config, Fused(FloatFormat(), cache="int8"))
    model = onnx.load(path, load_external_data=False)
    nodes, conditions = [], set()
    for node in model.graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        conditions.add(node.input[0])
        (branch,) = (each.g for each in node.attribute if each.name == "then_branch")
        names = dict(zip((value.name for value in branch.output), node.output, strict=True))
        for inner in branch.node:
            inner.output[:] = [names.get(name, name) for name in inner.output]
            nodes.append(inner)
    needed = conditions  # the nodes that compute only the condition go too
    for node in reversed(nodes):
        if set(node.output) & needed and not any(set(node.output) & set(other.input) for other in nodes):
            needed |= set(node.input)
            nodes.remove(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for unneeded in [each for each in model.graph.initializer if each.name not in used | {"num_logits_to_keep"}]:
        model.graph.initializer.remove(unneeded)
    path.write_bytes(model.SerializeToString())
    check_graph(path, config, kind_of(quantized_cache=True), sizes)
    with pytest.raises(SlmError):
        check_graph(path, config, kind_of(), sizes)


def test_an_empty_adapter_has_the_sizes_of_its_product(tmp_path: Path, config: ModelConfig) -> None:
    """With more rows, the adapter is still empty, but its product with the other matrix is not."""
    target, kind = kinds(config)["slots"]
    path = tmp_path / "onnx" / "model.onnx"
    sizes = written(path, config, target)
    written_bytes = path.read_bytes()
    name = "lora.model.layers.0.mlp.down_proj.A"
    for change in (
        shaped(1 << 30, 96, 0),
        shaped(1, 97, 0),
        lambda each: setattr(each, "data_type", TensorProto.INT64),
    ):
        model = onnx.ModelProto()
        model.ParseFromString(written_bytes)
        tensor(name, change)(model)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(SlmError, match="default of the input 'lora"):
            check_graph(path, config, kind, sizes)


def test_a_graph_of_another_configuration_is_rejected(tmp_path: Path, config: ModelConfig) -> None:
    """Negative control: the plan depends on the configuration and the manifest."""
    path = tmp_path / "onnx" / "model.onnx"
    sizes = written(path, config, Fused(FloatFormat()))
    changed = [
        {"query_pre_attn_scalar": 25}, {"sliding_window": 15}, {"rms_norm_eps": 1e-5}, {"hidden_activation": "gelu"},
        {"layer_types": config.layer_types[::-1]}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"head_dim": 16},
        {"vocab_size": 321}, {"intermediate_size": 95}, {"num_hidden_layers": 3, "layer_types": config.layer_types[:3]},
    ]  # fmt: skip
    for changes in changed:
        with pytest.raises(SlmError):
            check_graph(path, config.model_copy(update=changes), kind_of(), sizes)
    for kind in (
        kind_of(slots=True),
        kind_of(target="portable"),
        kind_of(device="cuda"),
        kind_of(quantized_cache=True),
    ):
        with pytest.raises(SlmError):
            check_graph(path, config, kind, sizes)


def test_a_table_of_rotations_has_a_largest_size(tmp_path: Path, config: ModelConfig) -> None:
    target, kind = kinds(config)["cuda"]
    sizes = written(tmp_path / "onnx" / "model.onnx", config, target)
    with pytest.raises(SlmError, match="context of 2,147,483,647"):
        longest = {**kind.__dict__, "context": 2**31 - 1}
        check_graph(tmp_path / "onnx" / "model.onnx", config, Kind(**longest), sizes)


def test_a_foreign_graph_runs_when_it_is_trusted(
    tmp_path: Path, shared_bundle: Bundle, slm: Callable[..., Any]
) -> None:
    import shutil

    path = tmp_path / "foreign"
    shutil.copytree(shared_bundle.path, path)
    file = path / shared_bundle.manifest.model
    model = onnx.load(file, load_external_data=False)
    constant(model, "bomb", np.array(0, np.float32))
    at_the_end(model)
    model.graph.node[-1].name = "mine"
    file.write_bytes(model.SerializeToString())
    seal(path, shared_bundle.manifest)
    with pytest.raises(SlmError, match="'mine'"):
        package.load(path)
    refused = slm("generate", path, "-p", "One", "--greedy", "--max-new-tokens", 4)
    assert refused.code == 1 and "'mine'" in refused.err and "--trust" in refused.err
    trusted = slm("generate", path, "-p", "One", "--greedy", "--max-new-tokens", 4, "--trust")
    plain = slm("generate", shared_bundle.path, "-p", "One", "--greedy", "--max-new-tokens", 4)
    assert trusted.code == 0 and "warning: --trust" in trusted.err and trusted.out == plain.out
    assert package.load(path, trust=True).generate("One", max_new_tokens=4, temperature=0)
    assert slm("info", path).code == 0


def test_a_scale_of_another_type_is_foreign(tmp_path: Path, config: ModelConfig) -> None:
    """Float32 scales in a float16 bundle would change each product to float32."""
    target, kind = kinds(config)["cuda int8"]
    path = tmp_path / "onnx" / "model.onnx"
    check_graph(path, config, kind, written(path, config, target))
    other = Fused(BlockFormat(schemes_of(config, 8, False), 0), "cuda", "float16")
    with pytest.raises(SlmError, match=r"scale|Gather|GatherBlockQuantized|Cast"):
        check_graph(path, config, kind, written(path, config, other))
