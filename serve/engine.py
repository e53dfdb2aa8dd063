"""Continuous batching: texts join and leave between steps, all steps are taken together.

One thread owns the model. Each turn it reads a bounded piece of a prompt, and then one token of every text under way, so that
nobody waits longer for a long prompt of somebody else than that piece takes. Answers are what each text would be alone; see
`slm.runtime.batch` for when that is so bit for bit.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

from slm.core.errors import SlmError
from slm.core.tokenizer import TextStream, Tokenizer
from slm.runtime.adapters import Adapter
from slm.runtime.batch import Batch, Slot
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generate import check_request
from slm.runtime.logprobs import logprobs_of
from slm.runtime.memory import Array
from slm.runtime.prefix import PrefixCache
from slm.runtime.sampling import Sampler, Sampling
from slm.runtime.stopping import StopTexts
from slm.runtime.streaming import Piece
from slm.runtime.token_bytes import token_bytes
from slm.serve.defects import named
from slm.serve.guide import Constraint, Guide
from slm.serve.heartbeat import Heartbeat

Reason = Literal["end", "stop", "length", "context", "cancelled", "deadline", "error", "stalled"]

# A prompt shorter than this is read again sooner than its caches are copied.
_WORTH_KEEPING = 64
# Lists of stop texts that are kept: all answers to a request have the same one, and reading it may take 20 ms.
_STOPS = 16
# How often the watchdog looks at the engine's thread, and how long one piece of work may take before the watchdog ends texts
# that are due in its place, in seconds.
_LOOK_S = 0.1
_LATE_S = 0.3
# How long closing waits for the engine's thread after the grace period, in seconds.
_JOIN_S = 1.0
# How long a step waits for the masks of constrained texts, and how long a thread that has nothing else to do does, in seconds.
_MASK_S = 0.002
_IDLE_S = 0.005


class Full(SlmError):
    """No room for another text now."""


class Closed(SlmError):
    """No more texts are taken."""


@dataclass(frozen=True)
class Ask:
    """What is asked for.

    Attributes:
        prompt: Token ids.
        sampling: How tokens are chosen.
        max_new_tokens: How many at most.
        stop: Texts that end the text.
        logprobs: How many of the likeliest tokens each piece names; None for none of it.
        adapter: The adapter to answer with.
        constraint: What the text must keep to.
        ignore_end: Whether tokens that end a text do not end this one.
        deadline: When it is to end at the latest, in `time.monotonic`'s seconds.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    logprobs: int | None = None
    adapter: Adapter | None = None
    constraint: Constraint | None = None
    ignore_end: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class Done:
    """The end of a text.

    Attributes:
        reason: Why.
        prompt_tokens: Tokens of the prompt.
        reused_tokens: Those of them that had been read before, for another text.
        new_tokens: New ones, an end token left out.
        waited_s: From asking until the prompt was begun.
        ttft_s: From asking to the first new token; None where there was none.
        took_s: From asking to the end.
        error: What went wrong, where something did: with this text alone, unless the engine has failed.
    """

    reason: Reason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    waited_s: float
    ttft_s: float | None
    took_s: float
    error: str | None = None


# Called by the engine's thread with each piece and then the end; must not block.
Deliver = Callable[[Piece | Done], None]


@dataclass(eq=False)
class Ticket:
    """A text that was asked for. `cancel` of the engine ends it."""

    ask: Ask
    deliver: Deliver
    asked: float
    sampler: Sampler
    text: TextStream
    stops: StopTexts
    cancelled: bool = False
    over: bool = False  # its end has been delivered
    begun: float | None = None
    first: float | None = None
    slot: Slot | None = None
    guide: Guide | None = None
    read: int = 0  # tokens of the prompt
    read_at: float = 0.0
    reused: int = 0
    tokens: list[int] = field(default_factory=list)


@dataclass
class Figures:
    """What an engine has done since it started, and what it is doing.

    Attributes:
        asked: Texts asked for and taken.
        refused: Texts refused because there was no room.
        done: Texts ended, by reason.
        prompt_tokens: Tokens of prompts read.
        reused_tokens: Tokens of prompts that did not have to be read.
        new_tokens: Tokens written.
        steps: Steps taken.
        rows: Rows of all steps together.
        waiting: Texts waiting now.
        running: Texts under way now.
        cache_bytes: Memory of caches, snapshots included.
    """

    asked: int = 0
    refused: int = 0
    done: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    rows: int = 0
    waiting: int = 0
    running: int = 0
    cache_bytes: int = 0


class Engine:
    """Texts under way on one bundle.

    Attributes:
        figures: What it has done; read, never written, by others.
        delivered: Called by its thread when everything that there is now has been delivered, which is about once a step.
        ended: Called by its thread with the end of each text.
    """

    def __init__(
        self,
        decoder: OnnxDecoder,
        tokenizer: Tokenizer,
        stop_tokens: Sequence[int],
        *,
        slots: int = 8,
        queue: int = 64,
        prefill_tokens: int = 256,
        prefix_bytes: int = 256 << 20,
        step_timeout_s: float = 30.0,
    ) -> None:
        """Starts the thread, and another one that watches it.

        Args:
            decoder: The bundle; nobody else uses it from now on.
            tokenizer: Its tokenizer.
            stop_tokens: Tokens that end a text.
            slots: Texts under way at once; caches take room for so many.
            queue: Texts that may wait for a slot.
            prefill_tokens: The most of a prompt that is read between two steps.
            prefix_bytes: Memory for the beginnings of prompts, which are not read again; 0 keeps none.
            step_timeout_s: When one step, or one piece of a prompt, counts as stuck: every text ends with an error, and
                `stalled` gives the reason until the step returns.
        """
        self._decoder, self._tokenizer = decoder, tokenizer
        self._own_bytes = token_bytes(tokenizer)
        self._stops = lru_cache(_STOPS)(partial(StopTexts, tokenizer=tokenizer))
        self._stop_tokens = frozenset(stop_tokens)
        self._queue, self._prefill = queue, prefill_tokens
        self._batch = Batch(decoder, slots)
        self._prefixes: dict[str, PrefixCache] = {}
        self._prefix_bytes = prefix_bytes
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._unfinished: set[Ticket] = set()
        self._delivering = threading.Lock()
        self._changed = threading.Condition()
        self._heartbeat = Heartbeat(step_timeout_s)
        self._closing = False
        self._failed: str | None = None
        self._step_s = 0.0  # what a step takes, smoothed
        self._masks = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2)), "slm-masks")
        self._mask_until = 0.0
        self._until = float("inf")
        self.figures = Figures(cache_bytes=self._batch.bytes)
        self.delivered: Callable[[], None] = lambda: None
        self.ended: Callable[[Done], None] = lambda done: None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def slots(self) -> int:
        """Texts under way at once."""
        return self._batch.slots

    @property
    def failed(self) -> str | None:
        """What ended the engine, where something did."""
        return self._failed

    @property
    def stalled(self) -> str | None:
        """Why the engine counts as stuck; None while its steps return in time."""
        return self._heartbeat.stalled

    @property
    def step_age_s(self) -> float:
        """How long the present step has been running, in seconds; 0 where there is none."""
        return self._heartbeat.age_s

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended, stuck or not."""
        return self._thread.is_alive()

    @property
    def unavailable(self) -> str | None:
        """Why no text is accepted; None where one is, room being left."""
        return self._failed or self.stalled or ("the server is shutting down" if self._closing else None)

    def submit(self, ask: Ask, deliver: Deliver) -> Ticket:
        """Takes a text; pieces and the end come to `deliver`.

        Raises:
            Full: When as many wait as may.
            Closed: When the engine is closing, or has ended.
            SlmError: When the prompt or a value will not do.
        """
        check_request(self._decoder, ask.prompt, ask.max_new_tokens, ask.logprobs)
        sampler = Sampler(ask.sampling, ask.prompt, self._decoder.vocab_size)
        stops = self._stops(tuple(ask.stop)).fresh()
        ticket = Ticket(ask, deliver, time.monotonic(), sampler, TextStream(self._tokenizer), stops)
        with self._changed:
            reason = self.unavailable
            if reason is not None:
                raise Closed(reason, "ask another one")
            free = self._batch.slots - len(self._running)
            if len(self._waiting) >= self._queue + free:
                self.figures.refused += 1
                raise Full(f"{len(self._waiting)} texts wait already", "try again in a while")
            self._waiting.append(ticket)
            self._unfinished.add(ticket)
            self.figures.asked += 1
            self.figures.waiting = len(self._waiting)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a text before its next token; it is told so, unless it has ended already."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def expected_wait_s(self) -> float:
        """Returns about how long a text asked for now would wait for a slot, in whole seconds, at least 1."""
        with self._changed:
            ahead = len(self._waiting)
            lengths = [ticket.ask.max_new_tokens - len(ticket.tokens) for ticket in self._running]
        step = self._step_s if self._step_s else 0.05
        turns = 1 + ahead // self._batch.slots
        return float(max(1, round(turns * step * (sum(lengths) / len(lengths) if lengths else 1))))

    def stop(self, grace_s: float = 0.0) -> None:
        """Accepts no more texts; those under way end after a while at the latest. Does not wait for them."""
        with self._changed:
            self._closing = True
            self._until = min(self._until, time.monotonic() + grace_s)
            self._changed.notify()

    def close(self, grace_s: float = 0.0) -> bool:
        """Stops, and waits for the thread to end.

        Returns:
            Whether it has ended. A thread that is stuck in a step has not; its texts have, all the same.
        """
        self.stop(grace_s)
        self._thread.join(max(0.0, self._until - time.monotonic()) + _JOIN_S)
        if self._thread.is_alive():
            self._end_unfinished("cancelled")
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # a defect: everybody is told, and nobody waits for ever
            self._failed = f"the engine ended: {named(error)}"
        self._heartbeat.rest()
        with self._changed:
            self._waiting.clear()
            left = list(self._unfinished)
        self._masks.shutdown(wait=False, cancel_futures=True)
        for ticket in left:
            self._end(ticket, "error" if self._failed else "cancelled", self._failed)
        self.delivered()

    def _watch(self) -> None:
        """Ends texts that are due while the engine's thread is held up in a step."""
        while self._thread.is_alive():
            time.sleep(_LOOK_S)
            if self._heartbeat.age_s < _LATE_S:
                continue
            stalled, now = self.stalled, time.monotonic()
            if stalled is not None:
                self._end_unfinished("stalled", error=stalled)
            elif now >= self._until + _LATE_S:
                self._end_unfinished("cancelled")
            else:
                self._end_unfinished("deadline", due=now)

    def _end_unfinished(self, reason: Reason, error: str | None = None, due: float | None = None) -> None:
        """Ends texts from another thread than the engine's, which frees their slots when it comes back.

        Args:
            reason: Why.
            error: What went wrong.
            due: Only those whose deadline lies before this time; None for all.
        """
        with self._changed:
            tickets = {
                ticket
                for ticket in self._unfinished
                if due is None or (ticket.ask.deadline is not None and due >= ticket.ask.deadline)
            }
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in tickets)
            self.figures.waiting = len(self._waiting)
        for ticket in tickets:
            self._finish(ticket, reason, error)
        if tickets:
            self.delivered()

    def _turn(self) -> bool:
        """Admits, ends, reads and steps once; waits when there is nothing to do. Says whether to go on."""
        with self._changed:
            self._heartbeat.rest()
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            self._heartbeat.beat()
            if self._closing and (time.monotonic() >= self._until or not (self._waiting or self._running)):
                return False
            gone = [ticket for ticket in self._waiting if self._over(ticket)]
            self._waiting = deque(ticket for ticket in self._waiting if not self._over(ticket))
            begun: list[Ticket] = []
            while self._waiting and len(self._running) + len(begun) < self._batch.slots:
                begun.append(self._waiting.popleft())
            self.figures.waiting = len(self._waiting)
        gone += [ticket for ticket in self._running if self._over(ticket)]
        for ticket in gone:
            self._end(ticket, "cancelled" if ticket.cancelled else "deadline")
        for ticket in begun:
            self._begin(ticket)
        self._mask_until = time.monotonic() + _MASK_S
        self._read_some()
        self._take_up()
        self._step([ticket for ticket in self._running if ticket.tokens and not self._held(ticket)])
        self.figures.running = len(self._running)
        self.figures.cache_bytes = self._batch.bytes + sum(cache.bytes for cache in self._prefixes.values())
        self.delivered()
        return True

    def _over(self, ticket: Ticket) -> bool:
        late = ticket.ask.deadline is not None and time.monotonic() >= ticket.ask.deadline
        return ticket.cancelled or ticket.over or late

    def _unread(self, ticket: Ticket) -> bool:
        return ticket.read < len(ticket.ask.prompt)

    def _begin(self, ticket: Ticket) -> None:
        self._heartbeat.beat()
        ticket.begun = time.monotonic()
        ticket.slot = self._batch.take(ticket.ask.adapter)
        self._running.append(ticket)
        if ticket.ask.constraint is not None:
            ticket.guide = Guide(ticket.ask.constraint, self._masks)
        # At least one token is left to read: its logits are what a text begins with.
        known = self._prefix_of(ticket).longest(list(ticket.ask.prompt[:-1]))
        if known is not None:
            ticket.slot.restore(known)
            ticket.read = ticket.reused = known.length
            self.figures.reused_tokens += known.length

    def _prefix_of(self, ticket: Ticket) -> PrefixCache:
        key = "" if ticket.ask.adapter is None else ticket.ask.adapter.digest
        return self._prefixes.setdefault(key, PrefixCache(self._prefix_bytes))

    def _read_some(self) -> None:
        """Reads pieces of prompts: one, and others while all together are no more than one may be.

        Prompts take turns, so that none waits for all of a long one. Where a prompt is cut does not depend on the others: its
        sums are added up as if it were alone.
        """
        left = self._prefill
        while reading := [ticket for ticket in self._running if not ticket.tokens and self._unread(ticket)]:
            ticket = min(reading, key=lambda each: each.read_at)
            size = self._piece(ticket) - ticket.read
            if size > left and left < self._prefill:
                break
            self._read_on(ticket)
            self.delivered()
            left -= size

    def _piece(self, ticket: Ticket) -> int:
        """Returns where the next piece of a prompt ends."""
        last = len(ticket.ask.prompt) - 1
        # The last token is read by itself where what is before it is kept for others.
        return min(ticket.read + self._prefill, last if self._keeps(last) and ticket.read < last else last + 1)

    def _keeps(self, tokens: int) -> bool:
        return self._prefix_bytes > 0 and tokens >= _WORTH_KEEPING

    def _read_on(self, ticket: Ticket) -> None:
        """Reads the next piece of a prompt; with the last one comes the first token."""
        assert ticket.slot is not None
        self._heartbeat.beat()
        prompt, stop = ticket.ask.prompt, self._piece(ticket)
        last = len(prompt) - 1
        logits = ticket.slot.read(list(prompt[ticket.read : stop]))
        self.figures.prompt_tokens += stop - ticket.read
        ticket.read, ticket.read_at = stop, time.monotonic()
        if stop == last and self._keeps(last):
            self._prefix_of(ticket).add(list(prompt[:last]), ticket.slot.snapshot())
        if stop == len(prompt):
            self._choose(ticket, logits)

    def _step(self, tickets: Sequence[Ticket]) -> None:
        """Has texts read their last tokens together and choose the next."""
        full = [ticket for ticket in tickets if ticket.slot is not None and ticket.slot.length >= self._decoder.context]
        for ticket in full:
            self._end(ticket, "context")
        rows = {ticket.slot: ticket for ticket in tickets if ticket.slot is not None}
        if not rows:
            return
        self._heartbeat.beat()
        started = time.monotonic()
        found = self._batch.step({slot: ticket.tokens[-1] for slot, ticket in rows.items()})
        took = time.monotonic() - started
        self._step_s = took if not self._step_s else 0.9 * self._step_s + 0.1 * took
        self.figures.steps += 1
        self.figures.rows += len(rows)
        self._mask_until = time.monotonic() + _MASK_S
        for slot, logits in found.items():
            self._choose(rows[slot], logits)

    def _choose(self, ticket: Ticket, logits: Array) -> None:
        """Chooses a text's next token and delivers it; ends the text where that ends it, or where none can be chosen."""
        try:
            self._choose_of(ticket, logits)
        except SlmError as error:  # with a schema or a bias of its own, which is nobody else's affair
            self._end(ticket, "error", error.message)

    def _choose_of(self, ticket: Ticket, logits: Array) -> None:
        ask, guide, chosen_from = ticket.ask, ticket.guide, logits
        if guide is not None:
            if not guide.ready(max(0.0, self._mask_until - time.monotonic())):
                guide.logits = logits.copy()
                return
            if guide.complete:
                self._end(ticket, "end")
                return
            chosen_from = guide.masked(logits)
        token = ticket.sampler.choose(chosen_from)
        if ticket.first is None:
            ticket.first = time.monotonic()
        if token in self._stop_tokens and not ask.ignore_end:
            self._end(ticket, "end")
            return
        if guide is not None:
            guide.advance(token)
        ticket.tokens.append(token)
        self.figures.new_tokens += 1
        raw = self._own_bytes.at(token, first=not ticket.text.begun)
        text = ticket.stops.push(ticket.text.push(token), token)
        if ask.logprobs is None:
            piece = Piece(text, token, raw=raw)
        else:
            known = logprobs_of(logits, token, ask.logprobs)
            piece = Piece(text, token, known.chosen, known.top, raw)
        self._deliver(ticket, piece)
        if ticket.stops.found:
            self._end(ticket, "stop")
        elif guide is None and len(ticket.tokens) >= ask.max_new_tokens:
            self._end(ticket, "length")

    def _held(self, ticket: Ticket) -> bool:
        """Whether a text waits for its constraint: to choose its next token, or to see whether its last token completes it."""
        guide = ticket.guide
        return guide is not None and (guide.logits is not None or self._full_of(ticket) is not None)

    def _full_of(self, ticket: Ticket) -> Reason | None:
        """Returns why a text can have no further token, if so."""
        if len(ticket.tokens) >= ticket.ask.max_new_tokens:
            return "length"
        return "context" if ticket.slot is not None and ticket.slot.length >= self._decoder.context else None

    def _take_up(self) -> None:
        """Continues texts whose constraint was late, and ends those that can have no further token."""
        held = [(ticket, ticket.guide) for ticket in self._running if ticket.guide is not None and self._held(ticket)]
        patience = _IDLE_S / len(held) if held and len(held) == len(self._running) else 0.0
        for ticket, guide in held:
            if not guide.ready(patience):
                continue
            logits, guide.logits = guide.logits, None
            if logits is not None:
                self._choose(ticket, logits)
                continue
            try:
                self._end(ticket, "end" if guide.complete else self._full_of(ticket) or "length")
            except SlmError as error:
                self._end(ticket, "error", error.message)

    def _deliver(self, ticket: Ticket, event: Piece | Done) -> None:
        """Delivers an event; nothing comes after the end, which the watchdog may have delivered already."""
        with self._delivering:
            if ticket.over:
                return
            ticket.over = isinstance(event, Done)
            try:
                ticket.deliver(event)
            except Exception:  # whoever listened is gone; the others are not to suffer for it
                ticket.cancelled = True

    def _end(self, ticket: Ticket, reason: Reason, error: str | None = None) -> None:
        if ticket.slot is not None:
            self._batch.release(ticket.slot)
            ticket.slot = None
        if ticket in self._running:
            self._running.remove(ticket)
        rest = "" if ticket.stops.found else ticket.stops.push(ticket.text.finish()) + ticket.stops.finish()
        if rest:
            self._deliver(ticket, Piece(rest))
        self._finish(ticket, reason, error)

    def _finish(self, ticket: Ticket, reason: Reason, error: str | None) -> None:
        """Delivers the end of a text, once."""
        with self._changed:
            if ticket not in self._unfinished:
                return
            self._unfinished.remove(ticket)
            self.figures.done[reason] = self.figures.done.get(reason, 0) + 1
        done = Done(
            reason,
            len(ticket.ask.prompt),
            ticket.reused,
            len(ticket.tokens),
            (ticket.begun or time.monotonic()) - ticket.asked,
            None if ticket.first is None else ticket.first - ticket.asked,
            time.monotonic() - ticket.asked,
            error,
        )
        self.ended(done)
        self._deliver(ticket, done)
