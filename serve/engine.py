"""The thread that owns the model: a queue, deadlines and delivery around a `Scheduler`.

Each turn reads a bounded piece of the prompts, and then one token of every running text, so that another client's long prompt
delays a text by at most that piece. `slm.runtime.scheduler` has the details.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.adapters import Adapter
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Generation, Piece, Request, Result, StopReason
from slm.runtime.scheduler import Scheduler
from slm.runtime.stopping import StopTexts
from slm.serve.counters import Counters
from slm.serve.heartbeat import Heartbeat
from slm.serve.queue import Deliver, Job, Jobs
from slm.serve.tracebacks import named

# Cached lists of stop texts: all completions of a request share one list, and parsing it may take 20 ms.
_STOPS = 16
# In seconds: how often the watchdog checks the engine's thread, and how long one piece of work may take before the watchdog
# itself ends texts whose deadline has passed.
_LOOK_S = 0.1
_LATE_S = 0.3
# How long `close` waits for the engine's thread after the grace period, in seconds.
_JOIN_S = 1.0
# The assumed duration of a step before the first one was timed, in seconds.
_STEP_S = 0.05


class Closed(SlmError):
    """Raised if the engine accepts no more requests."""


class Engine:
    """Runs requests on one bundle.

    Attributes:
        scheduler: Runs the texts; only the engine's thread may use it.
        delivered: The engine's thread calls it after it has delivered all events of a step.
        ended: The engine's thread calls it with the result of each text.
        failed: The error that ended the engine, if any.
    """

    def __init__(
        self,
        decoder: OnnxDecoder,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        queue: int = 64,
        prefill_tokens: int = 256,
        prefix_bytes: int = 256 << 20,
        step_timeout_s: float = 30.0,
    ) -> None:
        """Starts the engine's thread and its watchdog.

        Args:
            decoder: The bundle; nothing else may use it from now on.
            tokenizer: Its tokenizer.
            slots: Texts that run at once; the caches have so many rows.
            queue: The most requests that may wait for a slot.
            prefill_tokens: The most prompt tokens that are read between two steps.
            prefix_bytes: Memory for snapshots of prompts, whose tokens are then not read again; 0 stores none.
            step_timeout_s: How long one step, or one piece of a prompt, may take. After that every text ends with an error,
                and `stalled` has the reason until the step returns.
        """
        self._context, self._vocab_size, self._tokenizer = decoder.context, decoder.vocab_size, tokenizer
        self._stops = lru_cache(_STOPS)(partial(StopTexts, tokenizer=tokenizer))
        self._masks = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2)), "slm-masks")
        batch = Batch(decoder, slots)
        self.scheduler = Scheduler(batch, prefill_tokens=prefill_tokens, prefix_bytes=prefix_bytes, threads=self._masks)
        self.slots = slots
        self._jobs = Jobs(slots, queue)
        self._heartbeat = Heartbeat(step_timeout_s)
        self._closing = False
        self.failed: str | None = None
        self._until = float("inf")
        self.delivered: Callable[[], None] = lambda: None
        self.ended: Callable[[Result], None] = lambda result: None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def figures(self) -> Counters:
        """The current counters of the engine."""
        jobs = self._jobs
        return Counters(
            **vars(self.scheduler.work),
            asked=jobs.asked,
            refused=jobs.refused,
            done=dict(jobs.done),
            waiting=len(jobs.waiting),
            running=len(jobs.running),
            cache_bytes=self.scheduler.bytes,
        )

    @property
    def stalled(self) -> str | None:
        """Why the engine counts as stuck; None while its steps return in time."""
        return self._heartbeat.stalled

    @property
    def step_age_s(self) -> float:
        """Age of the current step in seconds; 0 if none is running."""
        return self._heartbeat.age_s

    @property
    def alive(self) -> bool:
        """Whether the thread is running, stuck or not."""
        return self._thread.is_alive()

    @property
    def unavailable(self) -> str | None:
        """Why the engine accepts no requests; None if it does, as long as the queue has room."""
        return self.failed or self.stalled or ("the server is shutting down" if self._closing else None)

    def submit(
        self, request: Request, deliver: Deliver, *, adapter: Adapter | None = None, deadline: float | None = None
    ) -> Generation:
        """Accepts a request. `deliver` receives its pieces, and then its result.

        Args:
            request: The request.
            deliver: The engine's thread calls it; it must not block.
            adapter: The adapter to use; None for the base model.
            deadline: The latest end of the text, in seconds of `time.monotonic`.

        Raises:
            Full: If the queue is full.
            Closed: If the engine is closing, or has ended.
            SlmError: If the prompt or an option is out of range.
        """
        stops = self._stops(tuple(request.stop)).fresh()
        generation = Generation(request, self._context, self._vocab_size, self._tokenizer, stops=stops)
        with self._jobs.changed:
            reason = self.unavailable
            if reason is not None:
                raise Closed(reason, "send the request to another server")
            self._jobs.add(Job(generation, deliver, adapter, deadline))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a text before its next token, unless it has ended; its result is "cancelled"."""
        self._jobs.cancel(generation)

    def expected_wait_s(self) -> float:
        """Returns the estimated wait for a slot in whole seconds, at least 1."""
        return self._jobs.expected_wait_s(self.scheduler.step_s or _STEP_S)

    def stop(self, grace_s: float = 0.0) -> None:
        """Stops accepting requests; texts end after the grace period at the latest. Does not wait for them."""
        with self._jobs.changed:
            self._closing = True
            self._until = min(self._until, time.monotonic() + grace_s)
            self._jobs.changed.notify()

    def close(self, grace_s: float = 0.0) -> bool:
        """Stops, and waits for the thread to end.

        Returns:
            Whether it has ended. A thread that is stuck in a step has not, but its texts have ended.
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
        except Exception as error:  # a defect: every client receives an error, and none waits forever
            self.failed = f"the engine ended: {named(error)}"
        self._heartbeat.rest()
        self._masks.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs.unfinished():
            self._end(job, "error" if self.failed else "cancelled", self.failed)
        self.delivered()

    def _turn(self) -> bool:
        """Admits, ends and runs texts once; waits if there is nothing to do. Returns whether to continue."""
        jobs = self._jobs
        with jobs.changed:
            self._heartbeat.rest()
            while not (jobs.waiting or jobs.running or self._closing):
                jobs.changed.wait()
            self._heartbeat.beat()
            now = time.monotonic()
            if self._closing and (now >= self._until or not (jobs.waiting or jobs.running)):
                return False
            gone, begun = jobs.turn(now)
        for job in gone:
            self._end(job, "cancelled" if job.cancelled else "deadline")
        for job in begun:
            self._heartbeat.beat()
            self.scheduler.admit(job.generation, job.adapter)
        running = {job.generation: job for job in jobs.running}
        self._heartbeat.beat()
        for events in self.scheduler.turn():
            for generation, pieces in events:
                self._advance(running[generation], pieces)
            self.delivered()
            self._heartbeat.beat()
        return True

    def _end(self, job: Job, reason: StopReason, error: str | None = None) -> None:
        """Ends a text and frees its slot."""
        pieces = job.generation.end(reason, error)
        self.scheduler.release(job.generation)
        self._advance(job, pieces)

    def _advance(self, job: Job, pieces: Sequence[Piece]) -> None:
        """Delivers pieces, and the result if the text has ended."""
        self._jobs.deliver(job, pieces)
        if job.generation.done:
            self._jobs.leave(job)
            self._finish(job, job.generation.result)

    def _finish(self, job: Job, result: Result) -> None:
        """Delivers the result of a text, once."""
        if self._jobs.finish(job, result):
            self.ended(result)
            self._jobs.deliver(job, [result])

    def _watch(self) -> None:
        """Ends texts whose deadline has passed while the engine's thread is blocked in a step."""
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

    def _end_unfinished(self, reason: StopReason, error: str | None = None, due: float | None = None) -> None:
        """Ends texts from another thread than the engine's, which frees their slots when its step returns.

        Args:
            reason: The stop reason of the results.
            error: The error message.
            due: Only texts whose deadline is before this time; None for all.
        """
        jobs = self._jobs.unfinished(due)
        for job in jobs:
            self._finish(job, replace(job.generation.result, stopped=reason, error=error))
        if jobs:
            self.delivered()
