"""Key and value buffers that the graph reads and writes in place.

Dimensions: B batch, K kv heads, C capacity, H head dim.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from slm.core.contract import SIDES, CacheLayer, Side, past_name, present_name
from slm.core.errors import SlmError
from slm.core.rewind import check_rewind
from slm.runtime.memory import Array, Buffer, HostBuffer, Located, Place

# Buffers of global layers start at this length and grow in multiples of it, by at least a quarter, so that a short
# completion does not pay for the longest context. Up to 32,768 positions at the 270M shape, all copies together take 0.7 s
# of several minutes; doubling would take 0.3 s and up to 1.56 times the memory.
FIRST_CAPACITY = 256


@dataclass(frozen=True)
class Extent:
    """The positions of one row that the caches hold.

    Attributes:
        length: The number of positions read.
        oldest: The first position that sliding layers still hold.
    """

    length: int = 0
    oldest: int = 0


@dataclass(frozen=True)
class CachedRow:
    """A copy of one row's buffers (K, positions, H): all positions of global layers, the last ones of sliding layers."""

    extent: Extent
    arrays: Mapping[tuple[int, Side], Array]

    @property
    def bytes(self) -> int:
        """Memory of the copy, in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


class KVBuffers:
    """One pair of buffers (B, K, C, H) per layer, bound as past and as present at the same time.

    The capacity of a sliding layer is its window plus some slack, whatever the context. The capacity of a global layer grows
    with the sequence. Positions after the resident ones hold arbitrary but finite values.

    Attributes:
        growths: How often the buffers were replaced by longer ones. A replacement invalidates earlier bindings.
    """

    def __init__(self, layers: Sequence[CacheLayer], context: int, batch: int = 1, place: Place = HostBuffer) -> None:
        """Allocates buffers for short sequences.

        Args:
            layers: The caches of the graph.
            context: The longest sequence, in tokens.
            batch: Rows.
            place: Creates the buffers, and thereby chooses their device.
        """
        self._layers = layers
        self._kinds = tuple({(layer.window, layer.slack): layer for layer in layers}.values())  # one layer of each kind
        self._context = context
        self._batch = batch
        self._place = place
        self._length = 0
        self._buffers: dict[tuple[int, Side], Buffer] = {}
        self.growths = 0
        self.reserve(min(FIRST_CAPACITY, context))

    def fits(self, length: int) -> bool:
        """Returns whether the buffers have room for sequences of this length."""
        return length <= self._length

    def reserve(self, length: int, rows: int | None = None) -> None:
        """Makes room for sequences of this length. Keeps the cached positions of the first `rows` rows, by default of all."""
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
        old = self._buffers.get((layer.layer, side))
        if old is not None and old.shape == shape:
            return
        try:
            array = np.zeros(shape, layer.dtype)  # the system allocates this memory page by page as it is written
        except (MemoryError, ValueError):  # np.zeros raises ValueError for sizes beyond the address space
            size = math.prod(shape) * np.dtype(layer.dtype).itemsize / 2**30
            raise SlmError(
                f"not enough memory for caches: the keys of one layer take {size:,.1f} GiB",
                "use fewer slots or a shorter context",
            ) from None
        if old is not None:
            array[:rows, :, : old.shape[2]] = old.read(slice(rows), 0, old.shape[2])
        self._buffers[layer.layer, side] = self._place(array)

    @property
    def room(self) -> int:
        """The longest sequence that fits before the buffers grow."""
        return self._length

    @property
    def located(self) -> tuple[Located, ...]:
        """The address and the shape of every buffer."""
        return tuple(buffer.located for buffer in self._buffers.values())

    def copy_sliding(self) -> dict[tuple[int, Side], Array]:
        """Returns a copy of the buffers of all sliding layers."""
        return {
            (layer.layer, side): self._buffers[layer.layer, side]
            .read(slice(None), 0, layer.capacity(self._length))
            .copy()
            for layer in self._layers
            if layer.window is not None
            for side in SIDES
        }

    def put_sliding(self, copied: Mapping[tuple[int, Side], Array]) -> None:
        """Restores the buffers of all sliding layers from a copy."""
        for key, array in copied.items():
            self._buffers[key].write(slice(None), 0, array)

    def row(self, index: int) -> "KVBuffers":
        """Returns one row as buffers of its own, on the same memory until one of the two grows.

        With past positions the graph takes several tokens of only one row at a time: a prompt is read through such a view,
        and all rows take single-token steps together.
        """
        return self.rows(index, index + 1)

    def rows(self, start: int, stop: int) -> "KVBuffers":
        """Returns some rows as buffers of their own; see `row`."""
        view = copy(self)
        view._batch = stop - start
        view._buffers = {key: buffer.rows(start, stop) for key, buffer in self._buffers.items()}
        return view

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds every buffer as past input and as present output."""
        for (layer, side), buffer in self._buffers.items():
            buffer.bind(binding, past_name(layer, side), present_name(layer, side))

    def written(self, outputs: Sequence[ort.OrtValue]) -> None:
        """Does nothing: a step writes in place."""

    def resident(self, layer: CacheLayer, side: Side, length: int) -> Array:
        """Returns the cached positions that attention can still use, oldest first: (B, K, min(length, window), H).

        Args:
            layer: The layer.
            side: Keys or values.
            length: Positions read so far, the same in every row.
        """
        return self._buffers[layer.layer, side].read(slice(None), *_needed(layer, length))

    def fill(self, length: int) -> None:
        """Writes ones at the resident positions of every row, as if it had read `length` tokens."""
        for layer in self._layers:
            start, stop = _needed(layer, length)
            ones = np.ones((self._batch, layer.kv_heads, stop - start, layer.head_dim), layer.dtype)
            for side in SIDES:
                self._buffers[layer.layer, side].write(slice(None), start, ones)

    @property
    def bytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def extended(self, extent: Extent, tokens: int) -> Extent:
        """Returns the extent of a row after `tokens` more tokens."""
        length = extent.length + tokens
        return Extent(length, max(extent.oldest, *(length - resident_positions(each, length) for each in self._kinds)))

    def revocable(self, extent: Extent) -> int:
        """Returns how many tokens fit before a sliding buffer moves up. One step of so many tokens can be rewound."""
        length = extent.length
        resident = ((each, resident_positions(each, length)) for each in self._kinds if each.window is not None)
        return min((each.capacity(length) - count for each, count in resident), default=self._context - length)

    def rewind(self, row: int, extent: Extent, length: int) -> Extent:
        """Forgets the positions of a row from `length` on. Returns the row's new extent.

        The graph expects the rows of a sliding buffer where reading exactly these positions would have put them. If the
        buffer has moved up since, its rows are moved back down. The positions before them are outside every window and only
        need to be finite.

        Raises:
            SlmError: If sliding layers no longer hold the positions that the next token attends to.
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
                buffer, only = self._buffers[layer.layer, side], slice(row, row + 1)
                buffer.write(only, wanted - count, buffer.read(only, end - count, end))
        return self.extended(Extent(length, oldest), 0)

    def copy_row(self, row: int, extent: Extent) -> CachedRow:
        """Returns a copy of a row."""
        arrays = {}
        for layer in self._layers:
            end = resident_positions(layer, extent.length)
            first = 0 if layer.window is None else end - (extent.length - extent.oldest)
            for side in SIDES:
                array = self._buffers[layer.layer, side].read(slice(row, row + 1), first, end)
                arrays[layer.layer, side] = array[0].copy()
        return CachedRow(extent, arrays)

    def put_row(self, row: int, cached: CachedRow) -> Extent:
        """Writes a copied row, for which there must be room. Returns the row's new extent."""
        for layer in self._layers:
            end = resident_positions(layer, cached.extent.length)
            for side in SIDES:
                array = cached.arrays[layer.layer, side]
                self._buffers[layer.layer, side].write(slice(row, row + 1), end - array.shape[1], array[None])
        return cached.extent


def resident_positions(layer: CacheLayer, length: int) -> int:
    """Returns how many positions a layer's buffer holds after `length` positions were read.

    A full sliding buffer drops capacity - window + 1 positions at once (operator specification of
    com.microsoft GroupQueryAttention, "Windowed KV Cache").
    """
    if layer.window is None:
        return length
    capacity = layer.capacity(length)
    if length <= capacity:
        return length
    dropped = capacity - layer.window + 1
    return length - dropped * -(-(length - capacity) // dropped)


def _needed(layer: CacheLayer, length: int) -> tuple[int, int]:
    """Returns the range of a layer's buffer that later tokens can attend to after `length` positions were read."""
    count = resident_positions(layer, length)
    return count - (length if layer.window is None else min(length, layer.window)), count
