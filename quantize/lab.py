"""A float bundle taken apart: what goes into each product can be looked at, and each weight exchanged for another.

Dimensions: T positions, N output channels, K input channels, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from slm.core.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, SIDES, past_name
from slm.core.manifest import Bundle
from slm.export.graph.builder import Array
from slm.quantize.linears import HEAD, Linear
from slm.runtime.session import session_options

# Where onnxruntime looks for the weights of a graph that it is given as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Lab:
    """Runs whole rows through the graph, with weights of its own where some are given."""

    def __init__(self, bundle: Bundle, linears: Sequence[Linear], threads: int | None = None) -> None:
        self._bundle = bundle
        model = ir.load(bundle.model_path)
        graph = model.graph
        self._inputs: dict[str, str] = {}
        for linear in linears:
            weight = graph.initializers[f"{linear.path}.weight"]
            products = [node for node, _ in weight.uses() if node.op_type != "Gather"]
            value = products[0].inputs[0]
            assert value is not None and value.name is not None and len(products) == 1, linear
            self._inputs[linear.path] = value.name
            value.dtype = ir.DataType.FLOAT
            if value not in graph.outputs:
                graph.outputs.append(value)
            graph.inputs.append(weight)  # its initializer is its default from now on
        options = session_options(threads)
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.model_path.parent))
        proto = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

    def predictions(self, row: Array, weights: Mapping[str, Array] | None = None) -> Array:
        """Returns the logits float32 (T, V) for a row of tokens (T,), with these weights (N, K) in place of the model's."""
        return self._run(row, [LOGITS], 0, weights)[0][0]

    def products_inputs(
        self, row: Array, paths: Sequence[str], weights: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Returns what goes into each of these products, float32 (T, K), by path."""
        found = self._run(row, [self._inputs[path] for path in paths], 0 if HEAD in paths else 1, weights)
        return {path: array.reshape(-1, array.shape[-1]) for path, array in zip(paths, found, strict=True)}

    def _run(self, row: Array, outputs: Sequence[str], keep: int, weights: Mapping[str, Array] | None) -> list[Array]:
        feeds = {
            INPUT_IDS: row[None].astype(np.int64),
            ATTENTION_MASK: np.ones((1, len(row)), np.int64),
            LOGITS_TO_KEEP: np.array(keep, np.int64),
        }
        for layer in self._bundle.manifest.cache:
            empty = np.zeros((1, layer.kv_heads, layer.capacity(len(row)), layer.head_dim), layer.dtype)
            feeds |= {past_name(layer.layer, side): empty for side in SIDES}
        feeds |= {f"{path}.weight": weight for path, weight in (weights or {}).items()}
        found: list[Array] = self._session.run(list(outputs), feeds)
        return found
