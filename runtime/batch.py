"""Several texts at once on one bundle: each is read by itself, all take their steps together.

A step reads the weights once for all rows, and reading weights is what a step mostly does. Dimensions: B batch, T positions,
V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter, check_slots_of, stacked
from slm.runtime.cache import Extent, KVBuffers
from slm.runtime.decoder import PREFILL_CHUNK, Decoder, DecoderAround, OnnxDecoder, OnnxSnapshot
from slm.runtime.generate import Generated, generate
from slm.runtime.memory import Array
from slm.runtime.prefix import PrefixDecoder
from slm.runtime.sampling import Sampler, Sampling

# Rows that `generate_batch` steps together by default.
SLOTS = 8


class Slot(DecoderAround):
    """One text of a batch: a decoder like any other, whose tokens can be read together with those of others.

    Attributes:
        decoder: The one that computes.
        adapter: The adapter that this text is read and written with.
    """

    def __init__(self, batch: "Batch", adapter: Adapter | None) -> None:
        super().__init__(batch.decoder)
        self._batch = batch
        self.adapter = adapter
        self.extent = Extent()

    @property
    def length(self) -> int:
        """Tokens read since the start."""
        return self.extent.length

    @property
    def description(self) -> str:
        """What runs where, in a few words."""
        return f"{self.decoder.description}, {self._batch.slots} slots"

    def reset(self) -> None:
        """Forgets everything read."""
        self.extent = Extent()

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens, long prompts in chunks, and returns the logits (V,) for the one that follows.

        Raises:
            SlmError: When they do not fit into the context.
        """
        self._batch.make_room([self], len(ids))
        new = np.asarray(ids, np.int64)[None]
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self._batch.read(self, new[:, start : start + PREFILL_CHUNK], keep=1)
        row: Array = logits[-1]
        return row

    @property
    def revocable(self) -> int:
        """How many tokens `read_each` may read next so that any number of them can be forgotten again."""
        return min(self._batch.slab.revocable(self.extent), self.context - self.length)

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) for what follows each of them."""
        self._batch.make_room([self], len(ids))
        return self._batch.read(self, np.asarray(ids, np.int64)[None], keep=0)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens read; see `Decoder.rewind`."""
        self.extent = self._batch.slab.rewind(self._batch.row(self), self.extent, length)

    def snapshot(self) -> OnnxSnapshot:
        """Returns a copy of what was read, for any slot or decoder of this model."""
        row = self._batch.slab.copy_row(self._batch.row(self), self.extent)
        return OnnxSnapshot(self._batch.decoder.identified(self.adapter), row)

    def restore(self, snapshot: Any) -> None:
        """Goes back to a snapshot of any slot or decoder of this model; see `Decoder.restore`."""
        row = self._batch.decoder.own(snapshot, self.adapter)
        self.reset()
        self._batch.make_room([self], snapshot.length)
        self.extent = self._batch.slab.put_row(self._batch.row(self), row)


class Batch:
    """Slots that texts are read into, on one slab of buffers (slots, K, C, H) a layer.

    With past positions the graph takes several tokens of one row, or one token of several rows. So a prompt is read
    through a view of its row, and a step goes through a view of as many rows as there are texts to step, which are moved to
    the front when they are not there.

    Attributes:
        decoder: The bundle; what it has read by itself is another matter.
        slots: How many there are.
        slab: The buffers.
    """

    def __init__(self, decoder: OnnxDecoder, slots: int) -> None:
        caches = decoder.caches(slots)
        if not isinstance(caches, KVBuffers):
            raise SlmError(
                f"{decoder.bundle.path} is a portable bundle, which reads one text at a time", "export a fused one"
            )
        self.decoder = decoder
        self.slots = slots
        self.slab = caches
        self._rows: list[Slot | None] = [None] * slots  # whose text each row holds
        self._view: tuple[int, int, KVBuffers] | None = None
        self._stacked: tuple[tuple[Adapter | None, ...], Adapter | None] | None = None

    @property
    def free(self) -> int:
        """How many slots can be taken."""
        return self._rows.count(None)

    @property
    def bytes(self) -> int:
        """Memory of all slots' buffers."""
        return self.slab.bytes

    def take(self, adapter: Adapter | None = None) -> Slot:
        """Returns a free slot, empty, for a text with an adapter of its own; None is the base.

        Raises:
            SlmError: When there is an adapter and the bundle has no slots for any.
        """
        assert self.free, "no slot is free"
        if adapter is not None:
            check_slots_of(self.decoder.bundle)
        slot = Slot(self, adapter)
        self._rows[self._rows.index(None)] = slot
        return slot

    def release(self, slot: Slot) -> None:
        """Frees a slot, which is not to be used again; its row waits for the next text and costs a step nothing."""
        self._rows[self.row(slot)] = None

    def row(self, slot: Slot) -> int:
        """Returns where a slot's text is now."""
        return self._rows.index(slot)

    def step(self, tokens: Mapping[Slot, int]) -> dict[Slot, Array]:
        """Reads one token into each of some slots, together, and returns the logits (V,) for those that follow.

        Args:
            tokens: The token by slot, at least one; slots that are not named wait.

        Raises:
            SlmError: When a slot's context is full.
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
        """Makes room for so many more tokens in some slots.

        Raises:
            SlmError: When they do not fit into the context.
        """
        length = max(slot.length for slot in slots) + tokens
        if length > self.decoder.context:
            raise SlmError(
                f"{length:,} tokens do not fit into the context of {self.decoder.context:,}",
                "a shorter prompt, or slm export --onnx --context N",
            )
        if not self.slab.fits(length):
            self._view = None  # which keeps what is replaced in memory
            used = max(row for row, slot in enumerate(self._rows) if slot is not None)
            self.decoder.make_room(self.slab, length, used + 1)

    def _bring_to_front(self, slots: list[Slot]) -> None:
        """Moves the rows of some slots to the front, to free rows or in exchange with those of others."""
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
        except BaseException:  # Ctrl-C too: nobody knows then what the rows hold
            for slot in slots:
                slot.reset()
            raise
        return logits

    def _adapter_of(self, slots: Sequence[Slot]) -> Adapter | None:
        """Returns the adapters of some rows as one; the last one again while they are the same."""
        wanted = tuple(slot.adapter for slot in slots)
        if self._stacked is None or not _same(self._stacked[0], wanted):
            self._stacked = (wanted, stacked(wanted))
        return self._stacked[1]


def _same(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(one is other for one, other in zip(first, second, strict=True))


@dataclass
class _Text:
    """A text under way."""

    index: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)


def batched(decoder: Decoder) -> OnnxDecoder | None:
    """Returns what takes the steps of several texts together; None where a decoder reads one text at a time.

    A chat's decoder does as well: a batch has caches of its own and leaves what was read of the chat alone.
    """
    if isinstance(decoder, PrefixDecoder):
        decoder = decoder.decoder
    if not isinstance(decoder, OnnxDecoder) or decoder.bundle.manifest.target == "portable":
        return None
    return decoder


def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    max_new_tokens: int,
    stop: Sequence[int],
    slots: int = SLOTS,
    ended: Callable[[int, int], bool] | None = None,
) -> list[list[int]]:
    """Continues several prompts, each as it would be continued alone, a text's slot being free for the next as it ends.

    A row's logits are those it would have alone, bit for bit in float32 and with INT8 weights in blocks of at most 64 (on
    AVX-512 VNNI and with no more threads than heads); in blocks of 128 the kernel adds in another order for a row alone, which
    rounding makes more of.

    Args:
        decoder: The model. A fused bundle takes its steps together; anything else goes through the prompts one by one.
        prompts: Token ids of each, at least one.
        samplings: How tokens are chosen, for each.
        max_new_tokens: How many at most, for each.
        stop: Tokens that end a text.
        slots: How many texts are under way at once.
        ended: Is called with the number of a prompt and each of its new tokens, and says whether the text ends with it.

    Returns:
        The new tokens of each prompt, in the order of the prompts, the one that ended a text left out.

    Raises:
        SlmError: When a prompt is empty or fills the whole context, or a value will not do.
    """
    # Each alone is refused what it would be refused anyway, before anything is read.
    alone = [
        generate(decoder, prompt, sampling, max_new_tokens, stop)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    together = batched(decoder)
    if together is None:
        return [_taken(tokens, index, ended) for index, (_, tokens) in enumerate(alone)]
    batch = Batch(together, max(1, min(slots, len(prompts))))
    waiting = deque(enumerate(prompts))
    texts: dict[Slot, _Text] = {}
    made: list[list[int]] = [[] for _ in prompts]

    def goes_on(slot: Slot, logits: Array) -> bool:
        """Chooses a text's next token; says whether it is to be read."""
        text = texts[slot]
        token = text.sampler.choose(logits)
        if token in stop:
            return False
        text.tokens.append(token)
        if ended is not None and ended(text.index, token):
            return False
        return len(text.tokens) < max_new_tokens and slot.length < decoder.context

    while waiting or texts:
        found: dict[Slot, Array] = {}
        if texts:
            found = batch.step({slot: text.tokens[-1] for slot, text in texts.items()})
        while True:
            for slot, logits in found.items():
                if not goes_on(slot, logits):
                    text = texts.pop(slot)
                    made[text.index] = text.tokens
                    batch.release(slot)
            if not (waiting and batch.free):
                break
            index, prompt = waiting.popleft()
            slot = batch.take(together.adapter)
            texts[slot] = _Text(index, Sampler(samplings[index], prompt, decoder.vocab_size))
            found = {slot: slot.read(prompt)}
    return made


def _taken(tokens: Generated, index: int, ended: Callable[[int, int], bool] | None) -> list[int]:
    """Returns the tokens of a text that is generated alone, up to the one that ends it."""
    taken = []
    for token in tokens:
        taken.append(token)
        if ended is not None and ended(index, token):
            break
    return taken
