"""Keys and values of the portable target: what one step puts out, the next one takes in.

Dimensions: B batch, K kv heads, H head dim.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.contract import SIDES, CacheLayer, Side, past_name, present_name

Array = NDArray[Any]


class GrowingCaches:
    """One pair (B, K, positions, H) a layer, empty at first; a sliding layer's stays shorter than its window.

    Attributes:
        growths: How often they were replaced; what was bound before no longer counts then.
    """

    def __init__(self, layers: Sequence[CacheLayer], batch: int = 1) -> None:
        self._layers = layers
        self.growths = 0
        self._values = {
            (layer.layer, side): ort.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, layer.kv_heads, 0, layer.head_dim), layer.dtype)
            )
            for layer in layers
            for side in SIDES
        }

    def reserve(self, length: int) -> None:
        """Does nothing: the graph puts out what it needs."""

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds what is cached as past input, and has present outputs allocated by onnxruntime."""
        for (layer, side), value in self._values.items():
            binding.bind_ortvalue_input(past_name(layer, side), value)
        for layer, side in self._values:
            binding.bind_output(present_name(layer, side))

    def written(self, outputs: Sequence[ort.OrtValue]) -> None:
        """Takes the present outputs of a step, in the order in which they were bound."""
        self._values = dict(zip(self._values, outputs, strict=True))
        self.growths += 1

    def resident(self, layer: CacheLayer, side: Side, length: int) -> Array:
        """Returns the cached positions, oldest first: (B, K, min(length, window - 1), H)."""
        array: Array = self._values[layer.layer, side].numpy()
        return array

    @property
    def bytes(self) -> int:
        """Memory of all caches."""
        return sum(value.numpy().nbytes for value in self._values.values())
