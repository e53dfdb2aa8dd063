"""The thread that owns the model: a queue, deadlines and delivery around a `Scheduler`.

Each turn reads a bounded piece of the prompts, and then one token of every running text, so that nobody waits longer for
another client's long prompt than that piece takes. `slm.runtime.scheduler` has the details.
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
from slm.serve.defects import named
from slm.serve.figures import Figures
from slm.serve.heartbeat import Heartbeat
from slm.serve.jobs import Deliver, Job, Jobs

# Lists of stop texts that are kept: all answers to a request have the same one, and reading it may take 20 ms.
_STOPS = 16
# How often the watchdog looks at the engine's thread, and how long one piece of work may take before the watchdog ends texts
# that are due in its place, in seconds.
_LOOK_S = 0.1
_LATE_S = 0.3
# How long closing waits for the engine's thread after the grace period, in seconds.
_JOIN_S = 1.0
# How long a step takes before the first one was timed, in seconds.
_STEP_S = 0.05


class Closed(SlmError):
    """No more requests are accepted."""


class Engine:
    """Requests to one bundle.

    Attributes:
        scheduler: Runs the texts; for the engine's thread alone.
        delivered: Called by the engine's thread when everything that there is now has been delivered, about once a step.
        ended: Called by the engine's thread with the result of each text.
        failed: What ended the engine, where something did.
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
        """Starts the thread, and another one that watches it.

        Args:
            decoder: The bundle; nothing else may use it from now on.
            tokenizer: Its tokenizer.
            slots: Texts that run at once; caches take room for so many.
            queue: Requests that may wait for a slot.
            prefill_tokens: The most tokens of prompts that are read between two steps.
            prefix_bytes: Memory for the beginnings of prompts, which are not read again; 0 keeps none.
            step_timeout_s: When one step, or one piece of a prompt, counts as stuck: every text ends with an error, and
                `stalled` gives the reason until the step returns.
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
    def figures(self) -> Figures:
        """What the engine has done, as of now."""
        jobs = self._jobs
        return Figures(
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
        """How long the present step has been running, in seconds; 0 where there is none."""
        return self._heartbeat.age_s

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended, stuck or not."""
        return self._thread.is_alive()

    @property
    def unavailable(self) -> str | None:
        """Why no request is accepted; None where one is as long as there is room."""
        return self.failed or self.stalled or ("the server is shutting down" if self._closing else None)

    def submit(
        self, request: Request, deliver: Deliver, *, adapter: Adapter | None = None, deadline: float | None = None
    ) -> Generation:
        """Accepts a request; pieces and then the result come to `deliver`.

        Args:
            request: What to generate.
            deliver: Called by the engine's thread; must not block.
            adapter: The adapter to answer with; None for the base.
            deadline: When the text ends at the latest, in seconds of `time.monotonic`.

        Raises:
            Full: When the queue is full.
            Closed: When the engine is closing, or has ended.
            SlmError: When the prompt or an option is out of range.
        """
        stops = self._stops(tuple(request.stop)).fresh()
        generation = Generation(request, self._context, self._vocab_size, self._tokenizer, stops=stops)
        with self._jobs.changed:
            reason = self.unavailable
            if reason is not None:
                raise Closed(reason, "ask another one")
            self._jobs.add(Job(generation, deliver, adapter, deadline))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a text before its next token, unless it has ended; its result says "cancelled"."""
        self._jobs.cancel(generation)

    def expected_wait_s(self) -> float:
        """Returns about how long a request would wait for a slot now, in whole seconds, at least 1."""
        return self._jobs.expected_wait_s(self.scheduler.step_s or _STEP_S)

    def stop(self, grace_s: float = 0.0) -> None:
        """Accepts no more requests; texts end after a grace period at the latest. Does not wait for them."""
        with self._jobs.changed:
            self._closing = True
            self._until = min(self._until, time.monotonic() + grace_s)
            self._jobs.changed.notify()

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
        except Exception as error:  # a defect: every client hears of it, and none waits for ever
            self.failed = f"the engine ended: {named(error)}"
        self._heartbeat.rest()
        self._masks.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs.unfinished():
            self._end(job, "error" if self.failed else "cancelled", self.failed)
        self.delivered()

    def _turn(self) -> bool:
        """Admits, ends and runs texts once; waits when there is nothing to do. Returns whether to go on."""
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
        """Delivers pieces, and the result where they are the last."""
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

    def _end_unfinished(self, reason: StopReason, error: str | None = None, due: float | None = None) -> None:
        """Ends texts from another thread than the engine's, which frees their slots when it comes back.

        Args:
            reason: Why.
            error: What went wrong.
            due: Only those whose deadline lies before this time; None for all.
        """
        jobs = self._jobs.unfinished(due)
        for job in jobs:
            self._finish(job, replace(job.generation.result, stopped=reason, error=error))
        if jobs:
            self.delivered()
