"""Where the graph's tensors come from and where they go: a checkpoint's safetensors, a bundle's graph, a new file.

Tensors are read one at a time, so that a conversion never holds a second copy of the model.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Scheme
from slm.core.weights import Weights
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, dequantize
from slm.export.graph.builder import Array

# The operating system maps files page by page; tensors that begin on a page are mapped without a copy.
PAGE_BYTES = 4096
# Smaller tensors stay inside the graph file.
EXTERNAL_FROM_BYTES = 1024


class LazyTensors(Mapping[str, Array]):
    """Arrays by name, each made when it is asked for."""

    def __init__(self, makers: dict[str, Callable[[], Array]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def checkpoint_tensors(weights: Weights, config: ModelConfig) -> LazyTensors:
    """Returns a checkpoint's tensors as the float32 graph wants them, under the graph's names.

    q, k, v and gate, up are joined along their outputs, norm weights get the 1 that Gemma leaves out.

    Args:
        weights: The checkpoint's tensors under Hugging Face's names.
        config: The model's shape.

    Raises:
        SlmError: When the configuration ties a head that the weights do not.
    """
    weights.untied(config)

    def read(name: str) -> Array:
        return weights.float32(f"{name}.weight")

    def join(*names: str) -> Callable[[], Array]:
        return lambda: np.concatenate([read(name) for name in names])

    def plain(name: str) -> Callable[[], Array]:
        return lambda: read(name)

    def norm(name: str) -> Callable[[], Array]:
        return lambda: np.float32(1) + read(name)

    makers = {"model.embed_tokens": plain("model.embed_tokens"), "model.norm": norm("model.norm")}
    if not config.tie_word_embeddings:
        makers["lm_head"] = plain("lm_head")
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        makers |= {
            f"{attention}.qkv_proj": join(*(f"{attention}.{p}_proj" for p in "qkv")),
            f"{attention}.o_proj": plain(f"{attention}.o_proj"),
            f"{mlp}.gate_up_proj": join(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            f"{mlp}.down_proj": plain(f"{mlp}.down_proj"),
        }
        norms = [f"{attention}.{p}_norm" for p in "qk"]
        norms += [
            f"model.layers.{i}.{p}_layernorm"
            for p in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        ]
        makers |= {name: norm(name) for name in norms}
    return LazyTensors({f"{name}.weight": maker for name, maker in makers.items()})


def graph_tensors(path: Path) -> LazyTensors:
    """Returns the tensors of a saved graph under their names, each mapped from its file for as long as it is used.

    Args:
        path: The `.onnx` file; its external data lies beside it.
    """
    model = ir.load(path)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return LazyTensors({name: partial(_mapped, tensor) for name, tensor in tensors.items() if tensor is not None})


def _mapped(tensor: ir.TensorProtocol) -> Array:
    """Returns a tensor's array; of one in a file from a mapping of its own, since the tensor would keep that open."""
    if isinstance(tensor, ir.ExternalTensor):
        place = tensor.location, tensor.offset, tensor.length, tensor.dtype
        tensor = ir.ExternalTensor(*place, shape=tensor.shape, name=tensor.name, base_dir=tensor.base_dir)
    try:
        array: Array = tensor.numpy()
    except ValueError as error:  # a file with several names, which onnx_ir does not follow
        raise SlmError(f"cannot read the weights: {str(error).splitlines()[0]}", "copy the bundle") from None
    return array


def float_tensors(path: Path, schemes: Mapping[str, Scheme]) -> LazyTensors:
    """Returns the weights of a saved graph in float32, under the names that they have in the float32 graph.

    Args:
        path: The `.onnx` file; its external data lies beside it.
        schemes: How integers are stored, by path of the product.
    """
    stored = graph_tensors(path)
    makers: dict[str, Callable[[], Array]] = {}
    for name in stored:
        product, _, part = name.rpartition(".")
        if part == QUANTIZED:
            makers[f"{product}.weight"] = partial(_dequantized, stored, product, schemes[product])
        elif part == "weight":
            makers[name] = partial(_float32, stored, name)
    return LazyTensors(makers)


def _dequantized(stored: LazyTensors, product: str, scheme: Scheme) -> Array:
    points = stored[f"{product}.{ZERO_POINTS}"] if scheme.zero_points else None
    return dequantize(stored[f"{product}.{QUANTIZED}"], stored[f"{product}.{SCALE}"], points, scheme)


def _float32(stored: LazyTensors, name: str) -> Array:
    array: Array = stored[name].astype(np.float32, copy=False)
    return array


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes `NAME.onnx` and, beside it, `NAME.onnx_data` with the weights.

    Args:
        model: The model; its lazy initializers are evaluated one by one.
        path: The `.onnx` file; its directory must exist.
    """
    ir.save(
        model,
        path,
        external_data=f"{path.name}_data",
        size_threshold_bytes=EXTERNAL_FROM_BYTES,
        alignment=PAGE_BYTES,
        align_threshold=PAGE_BYTES,
    )


@contextmanager
def released() -> Iterator[None]:
    """Frees at its end the graphs that were dropped within it: they hold each other, and the files they are mapped from."""
    yield
    gc.collect()
