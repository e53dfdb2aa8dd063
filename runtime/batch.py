"""Several texts at once on one bundle: each is read by itself, all take their steps together.

A step reads the weights once for all rows, and reading weights is what a step mostly does. Dimensions: B batch, T positions,
V vocabulary.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slm.core.errors import SlmError
from slm.runtime.cache import Array, Extent, KVBuffers
from slm.runtime.decoder import PREFILL_CHUNK, Decoder, OnnxDecoder, OnnxSnapshot
from slm.runtime.generate import generate
from slm.runtime.sampling import Sampler, Sampling

# Rows that `generate_batch` steps together by default.
SLOTS = 8


class Batch:
    """Slots that texts are read into, on one slab of buffers (slots, K, C, H) a layer.

    With past positions the graph takes several tokens of one row, or one token of several rows. So a prompt is read
    through a view of its row, and a step goes through a view of as many rows as there are texts to step, which are moved to
    the front when they are not there. A slot keeps its number wherever its row is.
    """

    def __init__(self, decoder: OnnxDecoder, slots: int) -> None:
        caches = decoder.caches(slots)
        if not isinstance(caches, KVBuffers):
            raise SlmError(
                f"{decoder.bundle.path} is a portable bundle, which reads one text at a time", "export a fused one"
            )
        self.decoder = decoder
        self.slots = slots
        self._slab = caches
        self._taken: list[int | None] = [None] * slots  # the slot that each row holds
        self._extents: dict[int, Extent] = {}
        self._view: tuple[int, int, KVBuffers] | None = None

    @property
    def free(self) -> int:
        """How many slots can be taken."""
        return self.slots - len(self._extents)

    @property
    def bytes(self) -> int:
        """Memory of all slots' buffers."""
        return self._slab.bytes

    def length(self, slot: int) -> int:
        """Returns the tokens that a slot's text has."""
        return self._extents[slot].length

    def take(self) -> int:
        """Returns a free slot, empty."""
        assert self.free, "no slot is free"
        slot = next(number for number in range(self.slots) if number not in self._extents)
        self._taken[self._taken.index(None)] = slot
        self._extents[slot] = Extent()
        return slot

    def release(self, slot: int) -> None:
        """Frees a slot; its row waits for the next text and costs a step nothing."""
        self._taken[self._taken.index(slot)] = None
        del self._extents[slot]

    def read(self, slot: int, ids: Sequence[int]) -> Array:
        """Reads tokens into a slot, in chunks, and returns the logits (V,) for the one that follows.

        Raises:
            SlmError: When they do not fit into the context.
        """
        length = self.length(slot)
        self._make_room(slot, length + len(ids))
        view = self._slab.row(self._taken.index(slot))
        new = np.asarray(ids, np.int64)[None]
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = new[:, start : start + PREFILL_CHUNK]
            length += chunk.shape[1]
            logits = self._run([slot], chunk, np.ones((1, length), np.int64), view)
        row: Array = logits[0]
        return row

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Reads one token into each of some slots, together, and returns the logits (V,) for those that follow.

        Args:
            tokens: The token by slot; slots that are not named wait.

        Raises:
            SlmError: When a slot's context is full.
        """
        lengths = {slot: self.length(slot) + 1 for slot in tokens}
        longest = max(lengths, key=lambda slot: lengths[slot])
        self._make_room(longest, lengths[longest])
        self._bring_to_front(list(tokens))
        order = [slot for slot in self._taken[: len(tokens)] if slot is not None]
        ids = np.array([[tokens[slot]] for slot in order], np.int64)  # (B, 1)
        ends = np.array([[lengths[slot]] for slot in order])
        mask = (np.arange(lengths[longest]) < ends).astype(np.int64)  # (B, T), padded on the right
        return dict(zip(order, self._run(order, ids, mask, self._front(len(order))), strict=True))

    def snapshot(self, slot: int) -> OnnxSnapshot:
        """Returns a copy of what a slot's text has read."""
        row = self._slab.copy_row(self._taken.index(slot), self._extents[slot])
        return OnnxSnapshot(self.decoder.identity, row)

    def restore(self, slot: int, snapshot: Any) -> None:
        """Makes a slot's text what it was, in any slot or decoder of this model; see `Decoder.restore`."""
        row = self.decoder.own(snapshot)
        self._make_room(slot, snapshot.length)
        self._extents[slot] = self._slab.put_row(self._taken.index(slot), row)

    def rewind(self, slot: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a slot's text; see `Decoder.rewind`."""
        self._extents[slot] = self._slab.rewind(self._taken.index(slot), self._extents[slot], length)

    def _make_room(self, slot: int, length: int) -> None:
        if length > self.decoder.context:
            raise SlmError(
                f"{length:,} tokens do not fit into the context of {self.decoder.context:,} (slot {slot})",
                "a shorter prompt, or slm export --onnx --context N",
            )
        used = max(row for row, taken in enumerate(self._taken) if taken is not None)
        if not self._slab.fits(length):
            self._view = None  # which keeps what is replaced in memory
            self.decoder.make_room(self._slab, length, used + 1)

    def _front(self, rows: int) -> KVBuffers:
        """Returns a view of the first rows, the last one again while it serves: then it is bound already."""
        if self._view is None or self._view[:2] != (rows, self._slab.growths):
            self._view = (rows, self._slab.growths, self._slab.rows(0, rows))
        return self._view[2]

    def _bring_to_front(self, slots: list[int]) -> None:
        """Moves the rows of some slots to the front, to free rows or in exchange with those of others."""
        places = [row for row in range(len(slots)) if self._taken[row] not in slots]
        for place in places:
            row = next(row for row in range(len(slots), self.slots) if self._taken[row] in slots)
            slot, other = self._taken[row], self._taken[place]
            assert slot is not None
            moved = self._slab.copy_row(row, self._extents[slot])
            if other is not None:
                self._extents[other] = self._slab.put_row(row, self._slab.copy_row(place, self._extents[other]))
            self._extents[slot] = self._slab.put_row(place, moved)
            self._taken[place], self._taken[row] = slot, other

    def _run(self, slots: Sequence[int], ids: Array, mask: Array, view: KVBuffers) -> Array:
        """Reads ids (B, T) into slots and returns the logits (B, V) for what follows."""
        try:
            logits: Array = self.decoder.run(ids, mask, view, keep=1)[:, 0]
            for slot in slots:
                self._extents[slot] = self._slab.extended(self._extents[slot], ids.shape[1])
        except BaseException:  # Ctrl-C too: nobody knows then what the rows hold
            for slot in slots:
                self._extents[slot] = Extent()
            raise
        return logits


@dataclass
class _Text:
    """A text under way."""

    index: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)


def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    max_new_tokens: int,
    stop: Sequence[int],
    slots: int = SLOTS,
) -> list[list[int]]:
    """Continues several prompts, each as it would be continued alone, a text's slot being free for the next as it ends.

    A row's logits are those it would have alone, bit for bit in float32 and with INT8 weights in blocks of at most 64 (on
    AVX-512 VNNI); in blocks of 128 the kernel adds in another order for a row alone, which rounding makes more of.

    Args:
        decoder: The model. A fused bundle takes its steps together; anything else goes through the prompts one by one.
        prompts: Token ids of each, at least one.
        samplings: How tokens are chosen, for each.
        max_new_tokens: How many at most, for each.
        stop: Tokens that end a text.
        slots: How many texts are under way at once.

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
    if not isinstance(decoder, OnnxDecoder) or decoder.bundle.manifest.target == "portable":
        return [list(tokens) for _, tokens in alone]
    batch = Batch(decoder, max(1, min(slots, len(prompts))))
    waiting = deque(enumerate(prompts))
    texts: dict[int, _Text] = {}
    made: list[list[int]] = [[] for _ in prompts]

    def goes_on(slot: int, logits: Array) -> bool:
        """Chooses a text's next token; says whether it is to be read."""
        text = texts[slot]
        token = text.sampler.choose(logits)
        if token in stop:
            return False
        text.tokens.append(token)
        return len(text.tokens) < max_new_tokens and batch.length(slot) < decoder.context

    while waiting or texts:
        found: dict[int, Array] = {}
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
            slot = batch.take()
            texts[slot] = _Text(index, Sampler(samplings[index], prompt, decoder.vocab_size))
            found = {slot: batch.read(slot, prompt)}
    return made
