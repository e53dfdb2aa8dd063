"""Several texts at once on one bundle: prompts are read one at a time, decoding steps run together.

A step reads the weights once for all rows, and reading weights takes most of a step's time. A row's logits are bit-identical
to those of the row alone in float32, and with INT8 weights in blocks of at most 64 (on AVX-512 VNNI, with no more threads
than heads). In blocks of 128 the kernel sums a single row in another order, and the rounding of activations amplifies the
difference.

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter, check_slots_of, stacked
from slm.runtime.backend import DecoderAround
from slm.runtime.cache import Extent, KVBuffers
from slm.runtime.decoder import PREFILL_CHUNK, OnnxDecoder, OnnxSnapshot
from slm.runtime.memory import Array


class Slot(DecoderAround):
    """One text of a batch. A slot is a decoder, and can also take a step together with other slots.

    Attributes:
        decoder: The bundle's decoder.
        adapter: The adapter of this text; None for the base model.
    """

    def __init__(self, batch: "Batch", adapter: Adapter | None) -> None:
        super().__init__(batch.decoder)
        self._batch = batch
        self.adapter = adapter
        self.extent = Extent()

    @property
    def length(self) -> int:
        """The number of tokens read since the last reset."""
        return self.extent.length

    @property
    def description(self) -> str:
        """A short description of the backend and its device."""
        return f"{self.decoder.description}, {self._batch.slots} slots"

    def reset(self) -> None:
        """Forgets all tokens."""
        self.extent = Extent()

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens, long prompts in chunks, and returns the logits (V,) for the next token.

        Raises:
            SlmError: If the tokens do not fit into the context.
        """
        self._batch.make_room([self], len(ids))
        new = np.asarray(ids, np.int64)[None]
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self._batch.read(self, new[:, start : start + PREFILL_CHUNK], keep=1)
        self._batch.decoder.after_prompt(len(ids))
        row: Array = logits[-1]
        return row

    @property
    def revocable(self) -> int:
        """The most tokens that `read_each` may read next so that all of them can be rewound."""
        return min(self._batch.slab.revocable(self.extent), self.context - self.length)

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""
        self._batch.make_room([self], len(ids))
        return self._batch.read(self, np.asarray(ids, np.int64)[None], keep=0)

    def rewind(self, length: int) -> None:
        """Forgets all tokens after the first `length`; see `Decoder.rewind`."""
        self.extent = self._batch.slab.rewind(self._batch.row(self), self.extent, length)

    def snapshot(self) -> OnnxSnapshot:
        """Returns a copy of the state that any slot or decoder of this model can restore."""
        row = self._batch.slab.copy_row(self._batch.row(self), self.extent)
        return OnnxSnapshot(self._batch.decoder.identified(self.adapter), row)

    def restore(self, snapshot: Any) -> None:
        """Replaces the state by a snapshot of any slot or decoder of this model; see `Decoder.restore`."""
        row = self._batch.decoder.own(snapshot, self.adapter)
        self.reset()
        self._batch.make_room([self], snapshot.length)
        self.extent = self._batch.slab.put_row(self._batch.row(self), row)


class Batch:
    """Slots for texts, on one slab of buffers (slots, K, C, H) per layer.

    With past positions the graph takes several tokens of one row, or one token of several rows. A prompt is read through a
    view of its row. A step uses a view of the first rows, and the rows that step are moved there first.

    Attributes:
        decoder: The bundle's decoder. The batch does not touch the decoder's own caches.
        slots: The number of slots.
        slab: The buffers.
    """

    def __init__(self, decoder: OnnxDecoder, slots: int) -> None:
        caches = decoder.caches(slots)
        if not isinstance(caches, KVBuffers):
            raise SlmError(
                f"{decoder.bundle.path} is a portable bundle, which reads one text at a time", "export a fused bundle"
            )
        self.decoder = decoder
        self.slots = slots
        self.slab = caches
        self._rows: list[Slot | None] = [None] * slots  # the slot whose text each row holds
        self._view: tuple[int, int, KVBuffers] | None = None
        self._stacked: tuple[tuple[Adapter | None, ...], Adapter | None] | None = None

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self._rows.count(None)

    @property
    def bytes(self) -> int:
        """Memory of the buffers of all slots, in bytes."""
        return self.slab.bytes

    def take(self, adapter: Adapter | None = None) -> Slot:
        """Returns a free, empty slot for a text with this adapter; None is the base model.

        Raises:
            SlmError: If an adapter is given and the bundle has no adapter slots.
        """
        assert self.free, "no slot is free"
        if adapter is not None:
            check_slots_of(self.decoder.bundle)
        slot = Slot(self, adapter)
        self._rows[self._rows.index(None)] = slot
        return slot

    def release(self, slot: Slot) -> None:
        """Frees a slot, which must not be used afterwards. A free row costs no time in a step."""
        self._rows[self.row(slot)] = None

    def row(self, slot: Slot) -> int:
        """Returns the current row of a slot; steps move rows."""
        return self._rows.index(slot)

    def step(self, tokens: Mapping[Slot, int]) -> dict[Slot, Array]:
        """Reads one token into each of the given slots in one step, and returns the next logits (V,) of each.

        Args:
            tokens: The next token of each slot; at least one.

        Raises:
            SlmError: If a slot's context is full.
        """
        self.make_room(list(tokens), 1)
        self._bring_to_front(list(tokens))
        order = [slot for slot in self._rows[: len(tokens)] if slot is not None]
        ids = np.array([[tokens[slot]] for slot in order], np.int64)  # (B, 1)
        ends = np.array([[slot.length + 1] for slot in order])
        mask = (np.arange(ends.max()) < ends).astype(np.int64)  # (B, T), padded on the right
        if self._view is None or self._view[:2] != (len(order), self.slab.growths):
            self._view = (len(order), self.slab.growths, self.slab.rows(0, len(order)))
        logits = self._run(order, ids, mask, self._view[2], keep=1)  # (B, 1, V)
        return dict(zip(order, logits[:, 0], strict=True))

    def read(self, slot: Slot, ids: Array, keep: int) -> Array:
        """Reads tokens (1, T) into a slot that has room for them; returns the logits (keep or T, V)."""
        mask = np.ones((1, slot.length + ids.shape[1]), np.int64)
        row = self.row(slot)
        logits: Array = self._run([slot], ids, mask, self.slab.rows(row, row + 1), keep)[0]
        return logits

    def make_room(self, slots: Sequence[Slot], tokens: int) -> None:
        """Makes room for `tokens` more tokens in some slots.

        Raises:
            SlmError: If they do not fit into the context.
        """
        length = max(slot.length for slot in slots) + tokens
        if length > self.decoder.context:
            raise SlmError(
                f"{length:,} tokens do not fit into the context of {self.decoder.context:,}",
                "a shorter prompt, or slm export --onnx --context N",
            )
        if not self.slab.fits(length):
            self._view = None  # the binding would keep the replaced buffers in memory
            used = max(row for row, slot in enumerate(self._rows) if slot is not None)
            self.decoder.make_room(self.slab, length, used + 1)

    def _bring_to_front(self, slots: list[Slot]) -> None:
        """Moves the rows of some slots to the front, into free rows or in exchange with other rows."""
        for place in range(len(slots)):
            other = self._rows[place]
            if other in slots:
                continue
            row, slot = next((row, slot) for row, slot in enumerate(self._rows) if row > place and slot in slots)
            assert slot is not None
            moved = self.slab.copy_row(row, slot.extent)
            if other is not None:
                self.slab.put_row(row, self.slab.copy_row(place, other.extent))
            self.slab.put_row(place, moved)
            self._rows[place], self._rows[row] = slot, other

    def _run(self, slots: Sequence[Slot], ids: Array, mask: Array, view: KVBuffers, keep: int) -> Array:
        """Reads ids (B, T) into slots and returns the logits (B, keep or T, V)."""
        extents = [self.slab.extended(slot.extent, ids.shape[1]) for slot in slots]
        try:
            logits = self.decoder.run(ids, mask, view, keep, self._adapter_of(slots))
            for slot, extent in zip(slots, extents, strict=True):
                slot.extent = extent
        except BaseException:  # includes Ctrl-C: the content of the rows is unknown after an interrupted step
            for slot in slots:
                slot.reset()
            raise
        return logits

    def _adapter_of(self, slots: Sequence[Slot]) -> Adapter | None:
        """Returns the adapters of some rows as one. The result is cached until the rows change."""
        wanted = tuple(slot.adapter for slot in slots)
        if self._stacked is None or not _same(self._stacked[0], wanted):
            self._stacked = (wanted, stacked(wanted))
        return self._stacked[1]


def _same(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(one is other for one, other in zip(first, second, strict=True))
