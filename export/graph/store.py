"""Reading a graph's tensors from a checkpoint or a bundle, and saving a graph.

Tensors are read one at a time, so that a conversion never holds a second copy of the model in memory.
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
from slm.export.graph.blocks import QUANTIZED, UPPER, dequantized, parts_of
from slm.export.graph.builder import Array

# The operating system maps files by page. A tensor that starts on a page boundary is mapped without a copy.
PAGE_BYTES = 4096
# Smaller tensors stay inside the graph file.
EXTERNAL_FROM_BYTES = 1024


class LazyTensors(Mapping[str, Array]):
    """Arrays by name. Each access creates the array."""

    def __init__(self, makers: dict[str, Callable[[], Array]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def checkpoint_tensors(weights: Weights, config: ModelConfig) -> LazyTensors:
    """Converts a checkpoint's tensors to those of the float32 graph, under the graph's names.

    q, k, v and gate, up are joined along their outputs. Norm weights include the 1 that Gemma adds.

    Args:
        weights: The checkpoint's tensors under Hugging Face's names.
        config: The model's shape.

    Raises:
        SlmError: If the configuration ties the head but the weights contain a separate head.
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
    """Returns the tensors of a saved graph, by name. Each is mapped from its file while it is used.

    Args:
        path: The `.onnx` file; its external data is in the same directory.
    """
    model = ir.load(path)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return LazyTensors({name: partial(_mapped, tensor) for name, tensor in tensors.items() if tensor is not None})


def _mapped(tensor: ir.TensorProtocol) -> Array:
    """Returns a tensor's array. External data gets its own mapping, because the tensor would keep its mapping open."""
    if isinstance(tensor, ir.ExternalTensor):
        place = tensor.location, tensor.offset, tensor.length, tensor.dtype
        tensor = ir.ExternalTensor(*place, shape=tensor.shape, name=tensor.name, base_dir=tensor.base_dir)
    try:
        array: Array = tensor.numpy()
    except ValueError as error:  # onnx_ir does not follow hard links
        raise SlmError(f"cannot read the weights: {str(error).splitlines()[0]}", "copy the bundle") from None
    return array


def float_tensors(path: Path, schemes: Mapping[str, Scheme]) -> LazyTensors:
    """Returns the weights of a saved graph in float32, under the names of the float32 graph.

    Args:
        path: The `.onnx` file; its external data is in the same directory.
        schemes: The scheme of each quantized product, by path.
    """
    stored = graph_tensors(path)
    makers: dict[str, Callable[[], Array]] = {}
    for name in stored:
        product, _, part = name.rpartition(".")
        if part in (QUANTIZED, UPPER):
            makers[f"{product}.weight"] = partial(_dequantized, stored, product, schemes[product])
        elif part == "weight":
            makers[name] = partial(_float32, stored, name)
    return LazyTensors(makers)


def _dequantized(stored: LazyTensors, product: str, scheme: Scheme) -> Array:
    return dequantized({part: stored[f"{product}.{part}"] for part in parts_of(scheme)}, scheme)


def _float32(stored: LazyTensors, name: str) -> Array:
    array: Array = stored[name].astype(np.float32, copy=False)
    return array


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes `NAME.onnx`, and its weights to `NAME.onnx_data` in the same directory.

    Args:
        model: The model. Its lazy initializers are evaluated one at a time.
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
    """Runs the garbage collector on exit: graphs are reference cycles that keep their weight files mapped."""
    yield
    gc.collect()
