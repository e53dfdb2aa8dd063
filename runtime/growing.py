"""Keys and values of the portable target: what one step puts out, the next one takes in.

Dimensions: B batch, K kv heads, H head dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.contract import SIDES, CacheLayer, Side, past_name, present_name
from slm.core.rewind import check_rewind
from slm.runtime.cache import CachedRow, Extent
from slm.runtime.session import Device

Array = NDArray[Any]

# More tokens than any context has.
UNBOUNDED = 1 << 31


class GrowingCaches:
    """One pair (B, K, positions, H) a layer, empty at first; a sliding layer's stays shorter than its window.

    Attributes:
        growths: How often they were replaced; what was bound before no longer counts then.
    """

    def __init__(self, layers: Sequence[CacheLayer], batch: int = 1, device: Device = "cpu") -> None:
        """Begins with nothing.

        Args:
            layers: The caches of the graph.
            batch: Rows.
            device: In whose memory onnxruntime puts what a step adds to; what is read here is copied from there.
        """
        self._layers = layers
        self._device = device
        self.growths = 0
        self._values = {
            (layer.layer, side): ort.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, layer.kv_heads, 0, layer.head_dim), layer.dtype)
            )
            for layer in layers
            for side in SIDES
        }

    def fits(self, length: int) -> bool:
        """Whether there is room: there always is."""
        return True

    def reserve(self, length: int, rows: int | None = None) -> None:
        """Does nothing: the graph puts out what it needs."""

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds what is cached as past input, and has present outputs allocated by onnxruntime."""
        for (layer, side), value in self._values.items():
            binding.bind_ortvalue_input(past_name(layer, side), value)
        for layer, side in self._values:
            binding.bind_output(present_name(layer, side), self._device)

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
        return sum(
            math.prod(self._values[layer.layer, side].shape()) * np.dtype(layer.dtype).itemsize
            for layer in self._layers
            for side in SIDES
        )

    def extended(self, extent: Extent, tokens: int) -> Extent:
        """Returns what a row holds after so many more tokens."""
        length = extent.length + tokens
        kept = [each.window - 1 for each in self._layers if each.window is not None]
        return Extent(length, max(extent.oldest, length - min([length, *kept])))

    def revocable(self, extent: Extent) -> int:
        """Returns how many tokens fit into the window; what is pushed out of it cannot come back."""
        left = [each.window - 1 - extent.length for each in self._layers if each.window is not None]
        return max(0, min(left)) if left else UNBOUNDED

    def rewind(self, row: int, extent: Extent, length: int) -> Extent:
        """Forgets the positions from `length` on; returns what the only row holds then.

        Raises:
            SlmError: When sliding layers no longer hold what the next token would look at.
        """
        for layer in self._layers:
            check_rewind(extent.length, length, layer.window, extent.oldest)
        dropped = extent.length - length
        oldest = min(extent.oldest, length)
        arrays = {key: value.numpy()[0] for key, value in self._values.items()}
        arrays = {key: array[:, : max(0, array.shape[1] - dropped)] for key, array in arrays.items()}
        return self.put_row(row, CachedRow(Extent(length, oldest), arrays))

    def copy_row(self, row: int, extent: Extent) -> CachedRow:
        """Returns the only row as it is: what is cached is replaced by the next step, never written to."""
        return CachedRow(extent, {key: value.numpy()[0] for key, value in self._values.items()})

    def put_row(self, row: int, cached: CachedRow) -> Extent:
        """Makes the only row what was copied. Returns what it holds then."""
        self._values = {
            key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(cached.arrays[key][None]))
            for key in self._values
        }
        self.growths += 1
        return cached.extent
