"""Keys and values of the portable target: the outputs of one step are the inputs of the next.

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
from slm.runtime.session import RuntimeDevice

Array = NDArray[Any]

# Longer than any context.
UNBOUNDED = 1 << 31


class GrowingCaches:
    """One pair (B, K, positions, H) per layer, empty at first. A sliding layer's pair stays shorter than its window.

    Attributes:
        growths: How often the pairs were replaced. A replacement invalidates earlier bindings.
    """

    def __init__(self, layers: Sequence[CacheLayer], batch: int = 1, device: RuntimeDevice = "cpu") -> None:
        """Starts with empty caches.

        Args:
            layers: The caches of the graph.
            batch: Rows.
            device: The device where onnxruntime allocates new pairs. The host reads copies.
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
        """Returns True: the caches always have room."""
        return True

    def reserve(self, length: int, rows: int | None = None) -> None:
        """Does nothing: the graph allocates its outputs."""

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds the cached pairs as past inputs, and lets onnxruntime allocate the present outputs."""
        for (layer, side), value in self._values.items():
            binding.bind_ortvalue_input(past_name(layer, side), value)
        for layer, side in self._values:
            binding.bind_output(present_name(layer, side), self._device)

    def written(self, outputs: Sequence[ort.OrtValue]) -> None:
        """Stores the present outputs of a step, in the order in which they were bound."""
        self._values = dict(zip(self._values, outputs, strict=True))
        self.growths += 1

    def resident(self, layer: CacheLayer, side: Side, length: int) -> Array:
        """Returns the cached positions, oldest first: (B, K, min(length, window - 1), H)."""
        array: Array = self._values[layer.layer, side].numpy()
        return array

    @property
    def bytes(self) -> int:
        """Memory of all caches, in bytes."""
        return sum(
            math.prod(self._values[layer.layer, side].shape()) * np.dtype(layer.dtype).itemsize
            for layer in self._layers
            for side in SIDES
        )

    def extended(self, extent: Extent, tokens: int) -> Extent:
        """Returns the extent of a row after `tokens` more tokens."""
        length = extent.length + tokens
        kept = [each.window - 1 for each in self._layers if each.window is not None]
        return Extent(length, max(extent.oldest, length - min([length, *kept])))

    def revocable(self, extent: Extent) -> int:
        """Returns how many tokens fit into the window. Positions that leave the window cannot be restored."""
        left = [each.window - 1 - extent.length for each in self._layers if each.window is not None]
        return max(0, min(left)) if left else UNBOUNDED

    def rewind(self, row: int, extent: Extent, length: int) -> Extent:
        """Forgets the positions from `length` on. Returns the row's new extent.

        Raises:
            SlmError: If sliding layers no longer hold the positions that the next token attends to.
        """
        for layer in self._layers:
            check_rewind(extent.length, length, layer.window, extent.oldest)
        dropped = extent.length - length
        oldest = min(extent.oldest, length)
        arrays = {key: value.numpy()[0] for key, value in self._values.items()}
        arrays = {key: array[:, : max(0, array.shape[1] - dropped)] for key, array in arrays.items()}
        return self.put_row(row, CachedRow(Extent(length, oldest), arrays))

    def copy_row(self, row: int, extent: Extent) -> CachedRow:
        """Returns the only row without copying: the next step replaces the cached pairs and never writes to them."""
        return CachedRow(extent, {key: value.numpy()[0] for key, value in self._values.items()})

    def put_row(self, row: int, cached: CachedRow) -> Extent:
        """Replaces the only row by a copied one. Returns the row's new extent."""
        self._values = {
            key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(cached.arrays[key][None]))
            for key in self._values
        }
        self.growths += 1
        return cached.extent
