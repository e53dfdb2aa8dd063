"""Instrumented runs of a float bundle, which return the inputs of each product and accept replacements for weights.

Dimensions: T positions, D hidden, N output channels, K input channels, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
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

# The session option for the directory of the weights if the graph is passed as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_LAST_NORM = "model.norm.weight"


class InstrumentedModel:
    """Runs rows of tokens through the whole graph, optionally with other weights."""

    def __init__(self, bundle: Bundle, linears: Sequence[Linear]) -> None:
        self._caches, self._target = bundle.manifest.cache, bundle.manifest.target
        model = ir.load(bundle.model_path)
        # A lookup has no input channels.
        inputs = {linear.path: _product(model.graph, linear.path) for linear in linears if linear.role != "lookup"}
        self._names = {path: _named(value) for path, value in inputs.items()}
        _show(model.graph, list(inputs.values()))
        _exchangeable(model.graph, linears)
        self._session = _session(model, bundle)

    def predictions(self, row: Array, weights: Mapping[str, Array] | None = None) -> Array:
        """Returns the logits, float32 (T, V), of a row of tokens (T,).

        Args:
            row: The tokens.
            weights: Replacements for weights, float32 (N, K), by path.
        """
        logits: Array = self._run(row, [LOGITS], 0, weights)[0][0]
        return logits

    def products_inputs(self, row: Array, paths: Sequence[str]) -> dict[str, Array]:
        """Returns the input of each of these products, float32 (T, K), by path."""
        keep = 0 if {EMBEDDING, HEAD} & set(paths) else 1
        found = self._run(row, [self._names[path] for path in paths], keep, None)
        return {path: array.reshape(-1, array.shape[-1]) for path, array in zip(paths, found, strict=True)}

    def _run(self, row: Array, outputs: Sequence[str], keep: int, weights: Mapping[str, Array] | None) -> list[Array]:
        feeds = _tokens(row) | _empty(self._caches, self._target, len(row)) | _by_name(weights)
        feeds[LOGITS_TO_KEEP] = np.array(keep, np.int64)
        found: list[Array] = self._session.run(list(outputs), feeds)
        return found


@dataclass(frozen=True)
class ResidualStream:
    """The values between two layers, float32 (1, T, D): the residual stream, and the update not yet added to it.

    In the portable graph, the residual stream is (T, D) and includes the update.
    """

    x: Array
    update: Array | None = None

    def feeds(self, names: Sequence[str]) -> dict[str, Array]:
        """Returns the values by name of the graph's inputs."""
        values = [value for value in (self.x, self.update) if value is not None]
        return dict(zip(names, values, strict=True))


class InstrumentedLayer:
    """Runs a single layer of the graph, so that processing all layers in turn costs only two passes over the model.

    The inputs of the layer become inputs of the graph, and everything before them is removed.
    """

    def __init__(self, bundle: Bundle, linears: Sequence[Linear], layer: int) -> None:
        """Takes a bundle, the products of one layer, and the index of the layer."""
        self._target = bundle.manifest.target
        # The portable graph gets the length of all sliding caches from one of them, which can be in another layer.
        everything = self._target == "portable"
        self._caches = [cache for cache in bundle.manifest.cache if everything or cache.layer == layer]
        model = ir.load(bundle.model_path)
        graph = model.graph
        inputs = {linear.path: _product(graph, linear.path) for linear in linears}
        after = _stream(graph, f"model.layers.{layer + 1}.input_layernorm.weight")
        after = after or _stream(graph, _LAST_NORM)
        self._after = [_named(value) for value in after]
        self._names = {path: _named(value) for path, value in inputs.items()}
        # The portable graph's attention accepts a past only if its present outputs are used.
        present = [value for value in graph.outputs if value.name in {present_name(layer, side) for side in SIDES}]
        del graph.outputs[:]
        graph.outputs.extend(present)
        _show(graph, [*inputs.values(), *after])
        self._before = _fed(graph, f"model.layers.{layer}.input_layernorm.weight")
        _exchangeable(graph, linears)
        _trim(model)
        self._session = _session(model, bundle)
        self._wanted = {value.name for value in graph.inputs}

    def inputs(self, row: Array, stream: ResidualStream) -> dict[str, Array]:
        """Returns the input of each product, float32 (T, K), by path."""
        found = self._run(row, stream, list(self._names.values()), None)
        return {path: array.reshape(-1, array.shape[-1]) for path, array in zip(self._names, found, strict=True)}

    def after(self, row: Array, stream: ResidualStream, weights: Mapping[str, Array]) -> ResidualStream:
        """Returns the layer's output with other weights, float32 (N, K), by path."""
        return ResidualStream(*self._run(row, stream, self._after, weights))

    def _run(
        self, row: Array, stream: ResidualStream, outputs: Sequence[str], weights: Mapping[str, Array] | None
    ) -> list[Array]:
        feeds = _tokens(row) | _empty(self._caches, self._target, len(row)) | _by_name(weights)
        feeds |= stream.feeds(self._before)
        found: list[Array] = self._session.run(
            list(outputs), {name: value for name, value in feeds.items() if name in self._wanted}
        )
        return found


class InstrumentedNorm:
    """Runs the last norm, whose output is the input of the head."""

    def __init__(self, bundle: Bundle) -> None:
        model = ir.load(bundle.model_path)
        graph = model.graph
        self._before = _fed(graph, _LAST_NORM)
        ((norm, _),) = graph.initializers[_LAST_NORM].uses()
        del graph.outputs[:]
        _show(graph, [norm.outputs[0]])
        _trim(model)
        self._session = _session(model, bundle)

    def __call__(self, stream: ResidualStream) -> Array:
        """Returns the hidden states, float32 (T, D), after the last layer's output."""
        (found,) = self._session.run(None, stream.feeds(self._before))
        hidden: Array = found.reshape(-1, found.shape[-1])
        return hidden


def embedded(bundle: Bundle, rows: Array) -> list[ResidualStream]:
    """Returns the input of the first layer for each row of tokens (rows, T)."""
    model = ir.load(bundle.model_path)
    (value,) = _stream(model.graph, "model.layers.0.input_layernorm.weight")
    del model.graph.outputs[:]
    _show(model.graph, [value])
    _trim(model)
    session = _session(model, bundle)
    return [ResidualStream(*session.run(None, {INPUT_IDS: row[None].astype(np.int64)})) for row in rows]


def _product(graph: ir.Graph, path: str) -> ir.Value:
    """Returns the value that is multiplied with a weight."""
    products = [node for node, _ in graph.initializers[f"{path}.weight"].uses() if node.op_type != "Gather"]
    (product,) = products
    value = product.inputs[0]
    assert value is not None
    return value


def head_inputs(bundle: Bundle, rows: Array, head: str = EMBEDDING) -> Iterator[Array]:
    """Yields the inputs of the head of a fused bundle, float32 (T, D), for each row of tokens, without any logits.

    Args:
        bundle: The bundle.
        rows: The tokens (rows, T).
        head: The path of the head's weight.
    """
    model = ir.load(bundle.model_path)
    hidden = _product(model.graph, head)
    del model.graph.outputs[:]
    _show(model.graph, [hidden])
    _trim(model)
    session, name = _session(model, bundle), _named(hidden)
    for row in rows:
        found: list[Array] = session.run([name], _tokens(row) | _empty(bundle.manifest.cache, "fused", len(row)))
        yield found[0][0]


def _stream(graph: ir.Graph, norm: str) -> list[ir.Value]:
    """Returns the inputs of a norm: the residual stream, and the update if the norm adds one. Empty if there is no norm."""
    if norm not in graph.initializers:
        return []
    weight = graph.initializers[norm]
    ((node, index),) = weight.uses()
    return [value for value in node.inputs[:index] if value is not None]


def _fed(graph: ir.Graph, norm: str) -> list[str]:
    """Replaces the inputs of a norm, see `_stream`, by inputs of the graph. Returns their names."""
    names = []
    for value in _stream(graph, norm):
        fed = ir.Value(name=f"{_named(value)}.fed", type=ir.TensorType(ir.DataType.FLOAT))
        ir.convenience.replace_all_uses_with(value, fed)
        graph.inputs.append(fed)
        names.append(_named(fed))
    return names


def _show(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    for value in values:
        value.dtype = ir.DataType.FLOAT
        if value not in graph.outputs:
            graph.outputs.append(value)


def _trim(model: ir.Model) -> None:
    """Removes the nodes and inputs that no output needs."""
    RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)


def _exchangeable(graph: ir.Graph, linears: Sequence[Linear]) -> None:
    """Turns weights into inputs of the graph, with their initializers as defaults."""
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
    """Returns empty caches: with capacity for a row for a fused graph, of length 0 for a portable one."""
    feeds: dict[str, Array] = {}
    for layer in caches:
        capacity = layer.capacity(length) if target == "fused" else 0
        buffer = np.zeros((1, layer.kv_heads, capacity, layer.head_dim), layer.dtype)
        feeds |= {past_name(layer.layer, side): buffer for side in SIDES}
    return feeds


def _by_name(weights: Mapping[str, Array] | None) -> dict[str, Array]:
    return {f"{path}.weight": weight for path, weight in (weights or {}).items()}
