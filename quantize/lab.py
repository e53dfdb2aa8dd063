"""A float bundle taken apart: what goes into each product can be looked at, and each weight exchanged for another.

Dimensions: T positions, D hidden, N output channels, K input channels, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slm.core.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    SIDES,
    CacheLayer,
    Target,
    past_name,
    present_name,
)
from slm.core.manifest import Bundle
from slm.export.graph.builder import Array
from slm.quantize.linears import EMBEDDING, HEAD, Linear
from slm.runtime.session import session_options

# Where onnxruntime looks for the weights of a graph that it is given as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Lab:
    """Runs whole rows through the graph, with weights of its own where some are given."""

    def __init__(self, bundle: Bundle, linears: Sequence[Linear]) -> None:
        self._caches, self._target = bundle.manifest.cache, bundle.manifest.target
        model = ir.load(bundle.model_path)
        inputs = {linear.path: _product(model.graph, linear.path) for linear in linears}
        self._names = {path: _named(value) for path, value in inputs.items()}
        _show(model.graph, list(inputs.values()))
        _exchangeable(model.graph, linears)
        self._session = _session(model, bundle)

    def predictions(self, row: Array, weights: Mapping[str, Array] | None = None) -> Array:
        """Returns the logits float32 (T, V) for a row of tokens (T,), with these weights (N, K) in place of the model's."""
        logits: Array = self._run(row, [LOGITS], 0, weights)[0][0]
        return logits

    def products_inputs(self, row: Array, paths: Sequence[str]) -> dict[str, Array]:
        """Returns what goes into each of these products, float32 (T, K), by path."""
        keep = 0 if {EMBEDDING, HEAD} & set(paths) else 1
        found = self._run(row, [self._names[path] for path in paths], keep, None)
        return {path: array.reshape(-1, array.shape[-1]) for path, array in zip(paths, found, strict=True)}

    def _run(self, row: Array, outputs: Sequence[str], keep: int, weights: Mapping[str, Array] | None) -> list[Array]:
        feeds = _tokens(row) | _empty(self._caches, self._target, len(row)) | _by_name(weights)
        feeds[LOGITS_TO_KEEP] = np.array(keep, np.int64)
        found: list[Array] = self._session.run(list(outputs), feeds)
        return found


@dataclass(frozen=True)
class Stream:
    """What runs between two layers, float32 (1, T, D): the residual stream, and the update that is not yet added to it.

    In the portable graph (T, D), the update always added: an operator of its own does it.
    """

    x: Array
    update: Array | None = None


class LayerLab:
    """One layer of the graph alone: a walk through all layers costs two passes, not one for every layer.

    What goes into the layer is fed; where it came from is cut off.
    """

    def __init__(self, bundle: Bundle, linears: Sequence[Linear], layer: int) -> None:
        """Takes the products of the layer."""
        self._target = bundle.manifest.target
        # The portable graph sees by the length of some sliding layer's cache what of the past is left in all of them.
        everything = self._target == "portable"
        self._caches = [cache for cache in bundle.manifest.cache if everything or cache.layer == layer]
        model = ir.load(bundle.model_path)
        graph = model.graph
        inputs = {linear.path: _product(graph, linear.path) for linear in linears}
        after = _stream(graph, f"model.layers.{layer + 1}.input_layernorm.weight")
        after = after or _stream(graph, "model.norm.weight")
        self._after = [_named(value) for value in after]
        self._names = {path: _named(value) for path, value in inputs.items()}
        # The portable graph's attention takes no past where nobody wants what it becomes.
        present = [value for value in graph.outputs if value.name in {present_name(layer, side) for side in SIDES}]
        del graph.outputs[:]
        graph.outputs.extend(present)
        _show(graph, [*inputs.values(), *after])
        self._before: list[str] = []
        for value in _stream(graph, f"model.layers.{layer}.input_layernorm.weight"):
            self._before.append(_named(value))
            fed = ir.Value(name=f"{_named(value)}.fed", type=ir.TensorType(ir.DataType.FLOAT))
            ir.convenience.replace_all_uses_with(value, fed)
            graph.inputs.append(fed)
        _exchangeable(graph, linears)
        _trim(model)
        self._session = _session(model, bundle)
        self._wanted = {value.name for value in graph.inputs}

    def inputs(self, row: Array, stream: Stream) -> dict[str, Array]:
        """Returns what goes into each product, float32 (T, K), by path."""
        found = self._run(row, stream, list(self._names.values()), None)
        return {path: array.reshape(-1, array.shape[-1]) for path, array in zip(self._names, found, strict=True)}

    def after(self, row: Array, stream: Stream, weights: Mapping[str, Array]) -> Stream:
        """Returns what comes out of the layer with these weights (N, K), by path, in place of its own."""
        return Stream(*self._run(row, stream, self._after, weights))

    def _run(
        self, row: Array, stream: Stream, outputs: Sequence[str], weights: Mapping[str, Array] | None
    ) -> list[Array]:
        feeds = _tokens(row) | _empty(self._caches, self._target, len(row)) | _by_name(weights)
        values = [value for value in (stream.x, stream.update) if value is not None]
        feeds |= {f"{name}.fed": value for name, value in zip(self._before, values, strict=True)}
        found: list[Array] = self._session.run(
            list(outputs), {name: value for name, value in feeds.items() if name in self._wanted}
        )
        return found


def embedded(bundle: Bundle, rows: Array) -> list[Stream]:
    """Returns what comes into the first layer for each of some rows of tokens (rows, T)."""
    model = ir.load(bundle.model_path)
    (value,) = _stream(model.graph, "model.layers.0.input_layernorm.weight")
    del model.graph.outputs[:]
    _show(model.graph, [value])
    _trim(model)
    session = _session(model, bundle)
    return [Stream(*session.run(None, {INPUT_IDS: row[None].astype(np.int64)})) for row in rows]


def _product(graph: ir.Graph, path: str) -> ir.Value:
    """Returns what is multiplied with a weight."""
    products = [node for node, _ in graph.initializers[f"{path}.weight"].uses() if node.op_type != "Gather"]
    (product,) = products
    value = product.inputs[0]
    assert value is not None
    return value


def _stream(graph: ir.Graph, norm: str) -> list[ir.Value]:
    """Returns what goes into a norm before its weight: the residual stream, and the update if it adds one; [] without it."""
    if norm not in graph.initializers:
        return []
    weight = graph.initializers[norm]
    ((node, index),) = weight.uses()
    return [value for value in node.inputs[:index] if value is not None]


def _show(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    for value in values:
        value.dtype = ir.DataType.FLOAT
        if value not in graph.outputs:
            graph.outputs.append(value)


def _trim(model: ir.Model) -> None:
    """Removes what no output needs."""
    RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)


def _exchangeable(graph: ir.Graph, linears: Sequence[Linear]) -> None:
    """Makes weights inputs, whose initializers are their defaults from then on."""
    graph.inputs.extend(graph.initializers[f"{linear.path}.weight"] for linear in linears)


def _named(value: ir.Value) -> str:
    name = value.name
    assert isinstance(name, str)
    return name


def _session(model: ir.Model, bundle: Bundle) -> ort.InferenceSession:
    options = session_options()
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.model_path.parent))
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def _tokens(row: Array) -> dict[str, Array]:
    return {INPUT_IDS: row[None].astype(np.int64), ATTENTION_MASK: np.ones((1, len(row)), np.int64)}


def _empty(caches: Sequence[CacheLayer], target: Target, length: int) -> dict[str, Array]:
    """Returns caches with nothing in them: of the fused graph with room for a row, of the portable without."""
    feeds: dict[str, Array] = {}
    for layer in caches:
        capacity = layer.capacity(length) if target == "fused" else 0
        buffer = np.zeros((1, layer.kv_heads, capacity, layer.head_dim), layer.dtype)
        feeds |= {past_name(layer.layer, side): buffer for side in SIDES}
    return feeds


def _by_name(weights: Mapping[str, Array] | None) -> dict[str, Array]:
    return {f"{path}.weight": weight for path, weight in (weights or {}).items()}
