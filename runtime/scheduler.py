"""Continuous batching: many texts on one bundle join and leave between steps, and step together.

A scheduler has no thread and no clock of its own: `slm.serve.engine.Engine` drives one from a thread, and `run_batch` drives
one until a list of texts is complete. Each text equals the text that its request gets alone; `slm.runtime.batch` states when
this holds bit for bit.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter
from slm.runtime.backend import Decoder
from slm.runtime.batch import Batch, Slot
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Generation, Piece, Result
from slm.runtime.head import read_whole
from slm.runtime.memory import Array
from slm.runtime.prefix import PrefixCache, PrefixDecoder
from slm.runtime.streaming import run

# The default number of texts that `run_batch` steps together.
SLOTS = 8
# Seconds that a step waits for the masks of constrained texts, and that an otherwise idle scheduler waits.
_MASK_S = 0.002
_IDLE_S = 0.005

# Texts and their new pieces. A text that is `done` has left the scheduler.
Events = list[tuple[Generation, list[Piece]]]


@dataclass
class Work:
    """Counters of a scheduler.

    Attributes:
        prompt_tokens: Tokens of prompts read.
        reused_tokens: Tokens of prompts that were reused from snapshots.
        new_tokens: Tokens generated.
        steps: Steps taken.
        rows: Total rows of all steps.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    rows: int = 0


@dataclass(eq=False)
class _Row:
    """A text in a slot, and how much of its prompt was read."""

    generation: Generation
    slot: Slot
    prefixes: PrefixCache
    read: int = 0
    read_at: float = 0.0
    reading: bool = True


class Scheduler:
    """Texts in the slots of a batch.

    Attributes:
        batch: The slots.
        work: Counters; read-only for callers.
        step_s: Smoothed seconds per step; 0 before the first.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        prefill_tokens: int | None = None,
        prefix_bytes: int = 0,
        prefixes: PrefixCache | None = None,
        threads: Executor | None = None,
    ) -> None:
        """Starts without texts.

        Args:
            batch: The batch, which only this scheduler may use.
            prefill_tokens: The most prompt tokens per call of `read`; None reads each prompt in one piece.
            prefix_bytes: Memory for snapshots of prompts, per adapter: common prefixes of prompts are not read again.
            prefixes: Snapshots for all texts, which then have the same adapter; replaces `prefix_bytes`.
            threads: Runs constraints; None runs them in the calling thread.
        """
        self.batch = batch
        self.work = Work()
        self.step_s = 0.0
        self._prefill = prefill_tokens or batch.decoder.context
        self._prefix_bytes = prefix_bytes
        self._shared = prefixes
        self._prefixes: dict[str, PrefixCache] = {}
        self._threads = threads
        self._rows: dict[Generation, _Row] = {}
        self._mask_until = 0.0

    @property
    def free(self) -> int:
        """The number of texts that can be admitted."""
        return self.batch.free

    @property
    def running(self) -> int:
        """The number of texts."""
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Memory of caches and snapshots, in bytes."""
        return self.batch.bytes + sum(cache.bytes for cache in list(self._prefixes.values()))

    def admit(self, generation: Generation, adapter: Adapter | None = None) -> None:
        """Puts a text into a free slot, and restores the longest known prefix of its prompt. Computes nothing.

        Texts in a batch end when the context is full.
        """
        assert generation.request.on_full == "stop"
        slot = self.batch.take(adapter)
        digest = "" if adapter is None else adapter.digest
        prefixes = self._shared or self._prefixes.setdefault(digest, PrefixCache(self._prefix_bytes))
        row = self._rows[generation] = _Row(generation, slot, prefixes)
        generation.begin(self._threads)
        row.read = generation.reused = prefixes.restore(slot, generation.unread)
        self.work.reused_tokens += row.read

    def release(self, generation: Generation) -> None:
        """Frees the slot of a text, if it has one."""
        row = self._rows.pop(generation, None)
        if row is not None:
            self.batch.release(row.slot)

    def turn(self) -> Iterator[Events]:
        """Reads some of the prompts, and then one token of every other text. Yields after each piece of work."""
        self._mask_until = time.perf_counter() + _MASK_S
        yield from self.read()
        yield [*self.resume(), *self.step()]

    def read(self) -> Iterator[Events]:
        """Reads pieces of prompts: at least one, and more while their sum is at most `prefill_tokens`.

        Prompts take turns, so that a short prompt does not wait for a whole long one. The cuts of a prompt do not depend on
        the other prompts, so that its sums are those of the prompt alone.
        """
        left = self._prefill
        while reading := [row for row in self._rows.values() if row.reading]:
            row = min(reading, key=lambda each: each.read_at)
            size = self._piece_end(row) - row.read
            if size > left and left < self._prefill:
                break
            yield self._read_on(row)
            left -= size

    def step(self) -> Events:
        """Takes one step with all texts whose prompts are read and that do not wait for their constraints."""
        stepping = [row for row in self._rows.values() if not row.reading and not row.generation.waiting]
        if not stepping:
            return []
        rows = {row.slot: row for row in stepping}
        began = time.perf_counter()
        read_whole(self.batch.decoder, any(row.generation.needs_whole for row in stepping))
        found = self.batch.step({slot: row.generation.tokens[-1] for slot, row in rows.items()})
        now = time.perf_counter()
        self.step_s = now - began if not self.step_s else 0.9 * self.step_s + 0.1 * (now - began)
        self.work.steps += 1
        self.work.rows += len(rows)
        self._mask_until = now + _MASK_S
        return [self._feed(rows[slot], logits, began) for slot, logits in found.items()]

    def resume(self) -> Events:
        """Continues texts that waited for their constraints."""
        held = [row for row in self._rows.values() if row.generation.waiting]
        patience = _IDLE_S / len(held) if held and len(held) == len(self._rows) else 0.0
        return [self._advance(row, partial(row.generation.resume, patience)) for row in held]

    def _piece_end(self, row: _Row) -> int:
        """Returns the end of the next piece of a prompt."""
        return min(row.read + self._prefill, row.prefixes.pause(len(row.generation.unread), row.read))

    def _read_on(self, row: _Row) -> Events:
        """Reads the next piece of a prompt; the last piece yields the first token."""
        ids, stop = row.generation.unread, self._piece_end(row)
        pause = row.prefixes.pause(len(ids), row.read)
        began = time.perf_counter()
        read_whole(self.batch.decoder, row.generation.needs_whole)
        logits = row.slot.read(list(ids[row.read : stop]))
        self.work.prompt_tokens += stop - row.read
        row.read, row.read_at = stop, time.perf_counter()
        if stop < len(ids):
            if stop == pause:
                row.prefixes.store(list(ids[:stop]), row.slot)
            return []
        row.reading = False
        return [self._feed(row, logits, began)]

    def _feed(self, row: _Row, logits: Array, began: float) -> tuple[Generation, list[Piece]]:
        patience = max(0.0, self._mask_until - time.perf_counter())
        return self._advance(row, partial(row.generation.feed, logits, began, patience))

    def _advance(self, row: _Row, take: Callable[[], list[Piece]]) -> tuple[Generation, list[Piece]]:
        """Advances a text, and frees its slot if the text ends."""
        generation, before = row.generation, len(row.generation.tokens)
        try:
            pieces = take()
        except SlmError as error:  # an error in the constraint or bias of this text only
            pieces = generation.end("error", error.message)
        self.work.new_tokens += len(generation.tokens) - before
        if generation.done:
            self.release(generation)
        return generation, pieces


def batched(decoder: Decoder, generations: Sequence[Generation]) -> OnnxDecoder | None:
    """Returns the decoder that steps these texts together; None if each has to run alone.

    Only a fused bundle steps several texts. This includes a chat's decoder: a batch has its own caches and does not touch
    those of the chat. Texts that slide, and those with log-probabilities, run alone: in a batch, INT8 products may round
    differently.
    """
    if isinstance(decoder, PrefixDecoder):
        decoder = decoder.decoder
    if not isinstance(decoder, OnnxDecoder) or decoder.bundle.manifest.target == "portable":
        return None
    plain = all(each.request.on_full == "stop" and each.request.logprobs is None for each in generations)
    return decoder if plain else None


def run_batch(
    decoder: Decoder,
    generations: Sequence[Generation],
    slots: int = SLOTS,
    *,
    ended: Callable[[Generation], None] | None = None,
    prefixes: PrefixCache | None = None,
) -> list[Result]:
    """Runs several texts. Each has the result that it has alone; a slot is reused when its text ends.

    The texts step together if `batched` allows it, on caches of their own; otherwise they run one after the other.

    Args:
        decoder: The model.
        generations: The texts, none of them started.
        slots: How many run at once.
        ended: Receives each text when it ends.
        prefixes: Snapshots of prompts for texts that step together.

    Raises:
        SlmError: If no token can be chosen for one of them, or its constraint cannot continue.
    """
    together = batched(decoder, generations)
    if together is None:
        results = []
        for each in generations:
            results.append(run(decoder, each).finish())
            if ended is not None:
                ended(each)
        return results
    scheduler = Scheduler(Batch(together, max(1, min(slots, len(generations)))), prefixes=prefixes)
    waiting = deque(generations)
    while waiting or scheduler.running:
        while waiting and scheduler.free:  # a text may end with its first token and free its slot
            scheduler.admit(waiting.popleft(), together.adapter)
            for events in scheduler.read():
                _tell(events, ended)
        for events in scheduler.turn():
            _tell(events, ended)
    results = [generation.result for generation in generations]
    for result in results:
        if result.error is not None:
            raise SlmError(result.error)
    return results


def _tell(events: Events, ended: Callable[[Generation], None] | None) -> None:
    for generation, _ in events:
        if ended is not None and generation.done:
            ended(generation)
