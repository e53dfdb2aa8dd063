"""Warns about a run that becomes slow or hangs, with the likely causes; can end a process that hangs.

A restart by torchrun then continues the run from its last save.
"""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from slm.core.load import Load, causes
from slm.train.sections import WatchdogRecipe

# What is reported: its kind, a sentence, and numbers for the record.
Report = Callable[[Literal["slow", "hang"], str, Mapping[str, Any]], None]

# Parts of the time that counts as slow, the parts before it of which the median is taken, and the least of those.
_PARTS, _MEDIAN, _LEAST = 20, 1000, 10
# The first updates, which also pay for allocations and compilation.
_FIRST = 3
# The share of the median above which a slow run has recovered, over the share below which it is slow.
_RECOVERED = 1.2
# A share of the time for batches is a likely cause from here on, if it has doubled.
_DATA_SHARE = 0.2
# The thread looks this often within the time that counts as a hang, and at least so often.
_LOOKS, _LOOK_S = 4, 5.0
# If a look is later than this, the process was stopped, and not only its training.
_STOPPED_S = 30.0
# The end of a run waits this long for the thread: what it reports may hang itself.
_JOIN_S = 5.0
# The exit code of a process that hangs: sysexits.h's EX_TEMPFAIL, the user may try again.
HUNG = 75
_NOTHING = "no cause was found on this machine"


@dataclass
class _Part:
    """Some updates in a row.

    Attributes:
        load: The load of the machine when they began.
        tokens: Their tokens.
        seconds: How long they took.
        data_s: How long they waited for their batches.
    """

    load: Load
    tokens: float = 0.0
    seconds: float = 0.0
    data_s: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def data_share(self) -> float:
        """The share of the time for batches."""
        return self.data_s / self.seconds


class Watchdog:
    """Watches a run. Its thread runs within a `with` block; `updated` and `beat` are called by the thread that trains."""

    def __init__(
        self,
        settings: WatchdogRecipe,
        report: Report,
        processes: int = 1,
        await_save: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Prepares the watch.

        Args:
            settings: What counts as slow and as a hang.
            report: Receives a warning; for a hang, in another thread.
            processes: The number of processes that train together.
            await_save: Waits for a save in the background, for at most so many seconds; called before a process is ended.
        """
        self._settings, self._report, self._processes = settings, report, processes
        self._await_save = await_save
        self._before: deque[_Part] = deque(maxlen=_MEDIAN)
        self._recent: deque[_Part] = deque()
        self._part: _Part | None = None
        self._slow, self._skipped = False, 0
        self._phase: Hashable = None
        self._beat_at = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._trains = threading.get_ident()

    def __enter__(self) -> Self:
        self._trains = threading.get_ident()
        self.beat()
        if self._settings.hang_minutes is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
            self._disarm()
        # A method of the run, which owns this watch: without the cycle, its memory and mapped files are freed at once.
        self._report = _ignore

    def beat(self) -> None:
        """Notes that the run goes on."""
        self._beat_at = time.monotonic()

    def updated(self, tokens: float, seconds: float, data_s: float, phase: Hashable = None) -> None:
        """Takes an update into account, and reports when the run has become slow.

        Args:
            tokens: Its tokens.
            seconds: How long it took.
            data_s: How long it waited for its batches.
            phase: What is trained in it: where that changes, the speed before is no measure of the one after.
        """
        minutes = self._settings.slow_minutes
        if minutes is None:
            return
        if phase != self._phase:
            self._before.clear()
            self._recent.clear()
            self._part, self._phase, self._slow, self._skipped = None, phase, False, 0
        if self._skipped < _FIRST:
            self._skipped += 1
            return
        part = self._part = self._part or _Part(Load.now())
        part.tokens, part.seconds, part.data_s = part.tokens + tokens, part.seconds + seconds, part.data_s + data_s
        if part.seconds >= 60 * minutes / _PARTS:
            self._part = None
            self._recent.append(part)
            self._judge(60 * minutes)

    def _judge(self, span: float) -> None:
        """Reports a run that was slow in the last `span` seconds of training, without evaluations and saves."""
        while (parts := _usual_parts([*self._recent][1:])) and sum(part.seconds for part in parts) >= span:
            oldest = self._recent.popleft()
            if not self._slow:  # the usual speed is that of the time before
                self._before.append(oldest)
        parts = _usual_parts(self._recent)
        if sum(part.seconds for part in parts) < span or len(self._before) < _LEAST:
            return
        speed = sum(part.tokens for part in parts) / sum(part.seconds for part in parts)
        usual = median(part.speed for part in self._before)
        if not self._slow and speed < self._settings.slow_share * usual:
            self._slow = True
            self._warn_of_speed(parts, speed, usual, span)
        elif self._slow and speed > min(1.0, _RECOVERED * self._settings.slow_share) * usual:
            self._slow = False

    def _warn_of_speed(self, parts: Sequence[_Part], speed: float, usual: float, span: float) -> None:
        data = sum(part.data_s for part in parts) / sum(part.seconds for part in parts)
        usually = median(part.data_share for part in self._before)
        found = causes(self._recent[0].load, Load.now())
        if data > _DATA_SHARE and data > 2 * usually:
            found.insert(
                0, f"reading data takes {data:.0%} of an update, usually {usually:.0%}: a slow disk or network"
            )
        if not found:
            found = [f"{_NOTHING}: the time is in computing" + ", or in waiting for a slower process" * self._several]
        self._report(
            "slow",
            f"{speed:,.0f} tokens/s for {_minutes(span)}, {speed / usual:.0%} of the usual {usual:,.0f}; likely: "
            + "; ".join(found),
            {
                "tokens_s": round(speed, 1),
                "usual_tokens_s": round(usual, 1),
                "seconds": round(span, 1),
                "data_share": round(data, 3),
                "usual_data_share": round(usually, 3),
                "causes": found,
            },
        )

    @property
    def _several(self) -> bool:
        return self._processes > 1

    def _watch(self) -> None:
        assert self._settings.hang_minutes is not None
        limit = 60 * self._settings.hang_minutes
        period = min(_LOOK_S, limit / _LOOKS)
        beat_at, stopped_s, reported = self._beat_at, 0.0, False
        load: Load | None = None
        looked_at = time.monotonic()
        while True:
            self._arm(2 * limit)
            if self._ended.wait(period):
                self._disarm()
                return
            now, last_beat_at = time.monotonic(), self._beat_at
            due_at, looked_at = looked_at + period, now
            if beat_at != last_beat_at:
                beat_at, stopped_s, reported, load = last_beat_at, 0.0, False, None
            if now - due_at > min(_STOPPED_S, limit / 2):  # Ctrl-Z, or the suspension of the machine
                stopped_s += max(0.0, now - max(due_at, beat_at))
            quiet_s = now - beat_at - stopped_s
            if load is None and quiet_s > limit / 2:
                load = Load.now()
            if load is not None and quiet_s > limit and not reported:
                reported = True
                self._hangs(beat_at, quiet_s, load)

    def _hangs(self, beat_at: float, seconds: float, load: Load) -> None:
        """Warns of a hang, and ends the process on request, unless the run goes on meanwhile.

        Args:
            beat_at: When the run went on for the last time.
            seconds: How long ago that was.
            load: The load of the machine since then.
        """

        def over() -> bool:
            return self._beat_at != beat_at or self._ended.is_set()

        told, numbers = self._description(seconds, load)
        if over():
            return
        with suppress(Exception):  # such as a full disk, which the thread that trains reports: this one has to go on
            self._report("hang", told, numbers)
        if self._settings.abort and not over():
            assert self._settings.hang_minutes is not None
            self._await_save(60 * self._settings.hang_minutes)
            if not over():
                self._abort()

    def _description(self, seconds: float, load: Load) -> tuple[str, dict[str, Any]]:
        """Returns a sentence about a hang, and numbers for the record."""
        frame = sys._current_frames().get(self._trains)
        where = "" if frame is None else f"; it is in {Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        found = causes(load, replace(Load.now(), clock=None))  # a processor that waits lowers its clock
        if _compiles(frame):
            found.insert(0, "torch.compile compiles the model")
        if self._several:
            found.append("another process is gone, or waits for something")
        told = f"no micro-step, evaluation batch or save has ended for {_minutes(seconds)}{where}; likely: " + (
            "; ".join(found)
            or f"{_NOTHING}; a file system or a driver does not answer, or the micro-step is very large"
        )
        return told, {"seconds": round(seconds, 1), "causes": found}

    def _arm(self, seconds: float) -> None:
        """Lets C end this process where a hang holds the interpreter's lock, so that this thread cannot run."""
        if self._settings.abort:
            with suppress(OSError, ValueError, AttributeError, RuntimeError):  # no standard error
                faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def _disarm(self) -> None:
        if self._settings.abort:
            faulthandler.cancel_dump_traceback_later()

    def _abort(self) -> None:
        with suppress(OSError, ValueError, AttributeError, RuntimeError):
            place = sys.__stderr__ or sys.stderr
            print("watchdog.abort: the stacks of this process, which ends now:", file=place, flush=True)
            faulthandler.dump_traceback(file=place, all_threads=True)
        os._exit(HUNG)


def _usual_parts(parts: Iterable[_Part]) -> list[_Part]:
    """Returns parts without the slowest one: a single update that took long, such as one in which the process was stopped."""
    return sorted(parts, key=lambda part: part.speed)[1:]


def _compiles(frame: FrameType | None) -> bool:
    """Returns whether torch.compile is at work in a thread, by its innermost frame."""
    while frame is not None:
        if frame.f_code.co_filename.endswith("convert_frame.py"):
            return True
        frame = frame.f_back
    return False


def _ignore(*_: object) -> None:
    pass


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:,.0f} seconds"
