"""Key and value buffers that the graph reads and writes in place.

Dimensions: B batch, K kv heads, C capacity, H head dim.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.contract import SIDES, CacheLayer, Side, past_name, present_name
from slm.core.rewind import check_rewind

# Global layers' buffers begin with this and grow in multiples of it, by a quarter at least: a short answer should not pay
# for the longest context. Up to 32,768 positions at the 270M shape all copies together take
# 0.7 s, of some minutes; doubling takes 0.3 s and up to 1.56 times the memory.
FIRST_CAPACITY = 256

Array = NDArray[Any]


@dataclass(frozen=True)
class Extent:
    """What the caches hold of one row.

    Attributes:
        length: Positions seen.
        oldest: The first of them that sliding layers still hold.
    """

    length: int = 0
    oldest: int = 0


@dataclass(frozen=True)
class CachedRow:
    """A copy of what one row's buffers hold: all positions of a global layer, the last of a sliding one; (K, positions, H)."""

    extent: Extent
    arrays: Mapping[tuple[int, Side], Array]

    @property
    def bytes(self) -> int:
        """Memory of the copy."""
        return sum(array.nbytes for array in self.arrays.values())


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

    def fits(self, length: int) -> bool:
        """Whether there is room for sequences of that length."""
        return length <= self._length

    def reserve(self, length: int, rows: int | None = None) -> None:
        """Makes room for sequences of that length; what is cached stays, of so many rows at the front if not of all."""
        if self.fits(length):
            return
        length = max(length, self._length + self._length // 4)
        self._length = min(self._context, -(-length // FIRST_CAPACITY) * FIRST_CAPACITY)
        self.growths += 1
        for layer in self._layers:
            for side in SIDES:
                self._grow(layer, side, rows)

    def _grow(self, layer: CacheLayer, side: Side, rows: int | None) -> None:
        shape = (self._batch, layer.kv_heads, layer.capacity(self._length), layer.head_dim)
        old = self._arrays.get((layer.layer, side))
        if old is not None and old.shape == shape:
            return
        array = np.zeros(shape, layer.dtype)  # memory that is taken page by page as it is written
        if old is not None:
            array[:rows, :, : old.shape[2]] = old[:rows]
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
        return self.rows(index, index + 1)

    def rows(self, start: int, stop: int) -> "KVBuffers":
        """Returns some rows as buffers of their own; see `row`."""
        view = copy(self)
        view._batch, view._arrays, view._values = stop - start, {}, {}
        for (layer, side), array in self._arrays.items():
            view._set(layer, side, array[start:stop])
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

    def extended(self, extent: Extent, tokens: int) -> Extent:
        """Returns what a row holds after so many more tokens."""
        length = extent.length + tokens
        return Extent(length, max(extent.oldest, *(length - resident_positions(each, length) for each in self._layers)))

    def revocable(self, extent: Extent) -> int:
        """Returns how many tokens fit until a sliding buffer moves up; read in one step, all can be forgotten again."""
        length = extent.length
        resident = ((each, resident_positions(each, length)) for each in self._layers if each.window is not None)
        return min((each.capacity(length) - count for each, count in resident), default=self._context - length)

    def rewind(self, row: int, extent: Extent, length: int) -> Extent:
        """Forgets the positions of a row from `length` on; returns what it holds then.

        The graph takes the rows of a sliding buffer to be where reading just these positions would have put them. Where
        it has moved up since, they are moved back down; what lies before them is outside of every window, and need only be
        finite.

        Raises:
            SlmError: When sliding layers no longer hold what the next token would look at.
        """
        for layer in self._layers:
            check_rewind(extent.length, length, layer.window, extent.oldest)
        oldest = min(extent.oldest, length)
        for layer in self._layers:
            if layer.window is None:
                continue
            end = resident_positions(layer, extent.length) - (extent.length - length)
            wanted = resident_positions(layer, length)
            count = min(length - oldest, wanted)
            if end == wanted or not count:
                continue
            for side in SIDES:
                array = self._arrays[layer.layer, side][row]  # (K, C, H)
                array[:, wanted - count : wanted] = array[:, end - count : end]
        return self.extended(Extent(length, oldest), 0)

    def copy_row(self, row: int, extent: Extent) -> CachedRow:
        """Returns a copy of a row."""
        arrays = {}
        for layer in self._layers:
            end = resident_positions(layer, extent.length)
            first = 0 if layer.window is None else end - (extent.length - extent.oldest)
            for side in SIDES:
                arrays[layer.layer, side] = self._arrays[layer.layer, side][row, :, first:end].copy()
        return CachedRow(extent, arrays)

    def put_row(self, row: int, cached: CachedRow) -> Extent:
        """Makes a row what was copied; there must be room. Returns what it holds then."""
        for layer in self._layers:
            end = resident_positions(layer, cached.extent.length)
            for side in SIDES:
                array = cached.arrays[layer.layer, side]
                self._arrays[layer.layer, side][row, :, end - array.shape[1] : end] = array
        return cached.extent


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
