"""Key and value buffers that the graph reads and writes in place.

Dimensions: B batch, K kv heads, C capacity, H head dim.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.contract import SIDES, CacheLayer, Side, past_name, present_name

# Global layers' buffers grow by doubling from here: a short answer should not pay for the longest context.
FIRST_CAPACITY = 256

Array = NDArray[Any]


class KVBuffers:
    """One pair of buffers (B, K, C, H) a layer, bound as past and as present at once.

    A sliding layer's capacity is its window and some slack, whatever the context. A global layer's grows as the
    sequence does. Rows past the resident ones hold nothing of meaning.

    Attributes:
        growths: How often the buffers were replaced by longer ones; what was bound before no longer counts then.
    """

    def __init__(self, layers: Sequence[CacheLayer], context: int, batch: int = 1) -> None:
        self._layers = layers
        self._context = context
        self._batch = batch
        self._length = 0
        self._arrays: dict[tuple[int, Side], Array] = {}
        self._values: dict[tuple[int, Side], ort.OrtValue] = {}
        self.growths = 0
        self.reserve(min(FIRST_CAPACITY, context))

    def reserve(self, length: int) -> None:
        """Makes room for sequences of that length; what is cached stays."""
        if length <= self._length:
            return
        self._length = min(self._context, max(length, 2 * self._length))
        self.growths += 1
        for layer in self._layers:
            for side in SIDES:
                self._grow(layer, side)

    def _grow(self, layer: CacheLayer, side: Side) -> None:
        shape = (self._batch, layer.kv_heads, layer.capacity(self._length), layer.head_dim)
        old = self._arrays.get((layer.layer, side))
        if old is not None and old.shape == shape:
            return
        array = np.zeros(shape, layer.dtype)
        if old is not None:
            array[:, :, : old.shape[2]] = old
        self._set(layer.layer, side, array)

    def _set(self, layer: int, side: Side, array: Array) -> None:
        self._arrays[layer, side] = array
        # On the CPU an OrtValue made from an array shares its memory: what the graph writes is seen in the array.
        self._values[layer, side] = ort.OrtValue.ortvalue_from_numpy(array)

    def row(self, index: int) -> "KVBuffers":
        """Returns one row as buffers of its own, on the same memory as long as neither grows.

        With past positions the graph takes several tokens of one row at a time: a row is read through such a view, and
        all rows take single steps together.
        """
        view = copy(self)
        view._batch, view._arrays, view._values = 1, {}, {}
        for (layer, side), array in self._arrays.items():
            view._set(layer, side, array[index : index + 1])
        return view

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds every buffer as past input and as present output."""
        for (layer, side), value in self._values.items():
            binding.bind_ortvalue_input(past_name(layer, side), value)
            binding.bind_ortvalue_output(present_name(layer, side), value)

    def written(self, outputs: Sequence[ort.OrtValue]) -> None:
        """Does nothing after a step: what it wrote is in place."""

    def resident(self, layer: CacheLayer, side: Side, length: int) -> Array:
        """Returns the cached positions that matter, oldest first: (B, K, min(length, window), H).

        Args:
            layer: The layer.
            side: Keys or values.
            length: Positions seen so far, the same in every row.
        """
        count = resident_positions(layer, length)
        needed = length if layer.window is None else min(length, layer.window)
        return self._arrays[layer.layer, side][:, :, count - needed : count]

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(array.nbytes for array in self._arrays.values())


def resident_positions(layer: CacheLayer, length: int) -> int:
    """Returns how many positions a layer's buffer holds after `length` were seen.

    A sliding buffer that is full drops capacity - window + 1 positions at once (operator specification of
    com.microsoft GroupQueryAttention, "Windowed KV Cache").
    """
    if layer.window is None:
        return length
    capacity = layer.capacity(length)
    if length <= capacity:
        return length
    dropped = capacity - layer.window + 1
    return length - dropped * -(-(length - capacity) // dropped)
