"""Warns about a run that becomes slow or hangs, with the likely causes; can end a process that hangs.

A restart by torchrun then continues the run from its last save.
"""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self

from slm.core.load import Load, causes
from slm.train.sections import WatchdogRecipe

# What is reported: its kind, a sentence, and numbers for the record.
Report = Callable[[Literal["slow", "hang"], str, Mapping[str, Any]], None]

# Updates of which the median is taken, and the first ones, which also pay for allocations.
_MEDIAN, _FIRST = 1000, 3
# The share of the median above which a slow run has recovered, over the share below which it is slow.
_RECOVERED = 1.2
# A share of the time for batches is a likely cause from here on, if it has doubled.
_DATA_SHARE = 0.2
# The thread looks this often within the time that counts as a hang, and at least so often.
_LOOKS, _LOOK_S = 4, 5.0
# The exit code of a process that hangs: sysexits.h's EX_TEMPFAIL, the user may try again.
HUNG = 75
_NOTHING = "no cause was found on this machine"


class Watchdog:
    """Watches a run. Its thread runs within a `with` block; `updated` and `beat` are called by the thread that trains."""

    def __init__(self, settings: WatchdogRecipe, report: Report, processes: int = 1) -> None:
        """Prepares the watch.

        Args:
            settings: What counts as slow and as a hang.
            report: Receives a warning; for a hang, in another thread.
            processes: The number of processes that train together.
        """
        self._settings, self._report, self._processes = settings, report, processes
        self._speeds: deque[float] = deque(maxlen=_MEDIAN)
        self._data_shares: deque[float] = deque(maxlen=_MEDIAN)
        self._recent: deque[tuple[float, float, float, float]] = deque()  # end, tokens, seconds, seconds for data
        self._slow, self._skipped = False, 0
        self._began: float | None = None
        self._load = Load.now()
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
            self._thread.join()
            if self._settings.abort:
                faulthandler.cancel_dump_traceback_later()
        # A method of the run, which owns this watch: without the cycle, its memory and mapped files are freed at once.
        self._report = _ignore

    def beat(self) -> None:
        """Notes that the run goes on."""
        self._beat_at = time.monotonic()

    def updated(self, tokens: float, seconds: float, data_s: float) -> None:
        """Takes an update into account, and reports when the run has become slow.

        Args:
            tokens: Its tokens.
            seconds: How long it took.
            data_s: How long it waited for its batches.
        """
        minutes = self._settings.slow_minutes
        if minutes is None:
            return
        if self._skipped < _FIRST:
            self._skipped += 1
            return
        now, span = time.monotonic(), 60 * minutes
        self._began = now - seconds if self._began is None else self._began
        self._recent.append((now, tokens, seconds, data_s))
        while now - self._recent[0][0] > span and len(self._recent) > 1:
            self._recent.popleft()
        speed = sum(each[1] for each in self._recent) / sum(each[2] for each in self._recent)
        if self._speeds and now - self._began >= span:
            usual = median(self._speeds)
            if not self._slow and speed < self._settings.slow_share * usual:
                self._slow = True
                self._warn_of_speed(speed, usual, span)
            elif self._slow and speed > min(1.0, _RECOVERED * self._settings.slow_share) * usual:
                self._slow = False
                self._load = Load.now()
        if not self._slow:  # the usual speed is that of the time before
            self._speeds.append(tokens / seconds)
            self._data_shares.append(data_s / seconds)

    def _warn_of_speed(self, speed: float, usual: float, span: float) -> None:
        shares = [sum(each[number] for each in self._recent) for number in (2, 3)]
        data, usually = shares[1] / shares[0], median(self._data_shares)
        found = causes(self._load, Load.now())
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
        reported: float | None = None
        before = time.monotonic()
        while True:
            self._arm(2 * limit)
            if self._ended.wait(period):
                return
            now = time.monotonic()
            if now - before > period + limit / 2:  # this process was stopped, and not only its training
                self._beat_at += now - before
            before = now
            beat_at = self._beat_at
            if now - beat_at > limit and reported != beat_at:
                reported = beat_at
                self._warn_of_hang(now - beat_at)
                if self._settings.abort:
                    self._abort()

    def _arm(self, seconds: float) -> None:
        """Lets C end this process where a hang holds the interpreter's lock, so that this thread cannot run."""
        if self._settings.abort:
            with suppress(OSError, ValueError, AttributeError, RuntimeError):  # no standard error
                faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def _warn_of_hang(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._trains)
        where = "" if frame is None else f"; it is in {Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        found = causes(self._load, Load.now())
        if self._several:
            found.append("another process is gone, or waits for something")
        self._report(
            "hang",
            f"no micro-step, evaluation batch or save has ended for {_minutes(seconds)}{where}; likely: "
            + (
                "; ".join(found)
                or f"{_NOTHING}; a file system or a driver does not answer, or the micro-step is very large"
            ),
            {"seconds": round(seconds, 1), "causes": found},
        )

    def _abort(self) -> None:
        with suppress(OSError, ValueError, AttributeError, RuntimeError):
            print("watchdog.abort: the stacks of this process, which ends now:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        os._exit(HUNG)


def _ignore(*_: object) -> None:
    pass


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:,.0f} seconds"
