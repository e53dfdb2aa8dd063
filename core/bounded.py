"""Child processes that answer requests within limits of time and memory.

Parent and child exchange messages through pipes; each has its length in front. The child limits itself as far as the system
enforces limits (`slm.core.process_limits`), and its first message says which ones. A thread of the parent watches the others
with psutil, and the wall-clock time, and ends a child that exceeds a limit, even during a call that cannot be interrupted.
"""

import json
import os
import struct
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from slm.core import child
from slm.core.process_limits import Limit

# How often to look at the memory and processor time of a child, in seconds. A process can fill 50 MiB in this time.
_LOOK_S = 0.01
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Limits:
    """What a child may use for one message.

    Attributes:
        wall_s: Wall-clock time, in seconds.
        cpu_s: Processor time, in seconds; None if it is not limited.
        memory: Memory in bytes; None if it is not limited.
        more: Whether `memory` counts from the child's size before the message.
    """

    wall_s: float
    cpu_s: float | None = None
    memory: int | None = None
    more: bool = False


class BoundedProcess:
    """A child process that sends one message when it has started, and then answers messages.

    Only one thread at a time may use it.

    Attributes:
        usable: Whether the process was not ended, by `end` or for a limit.
    """

    def __init__(self, code: str, longest: int, start_s: float) -> None:
        """Starts the process.

        Args:
            code: The code to run. It calls `hello` first.
            longest: The limit of a message from the child, in bytes.
            start_s: How long the start may take, in seconds.

        Raises:
            OSError: If the process does not start, or not in time.
        """
        self._longest = longest
        self._process = child.popen(
            code,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            apart=True,  # Ctrl-C reaches the parent only
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.usable = True
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._limits: Limits | None = None
        self._until = self._wakes = 0.0
        self._late = False
        self._enforced: list[Limit] = ["time", "memory"]  # nothing to look at before it has started
        self._figures: Any = None
        self._pid: int | None = None
        self._cpu_before = self._memory_before = 0.0
        try:
            about = json.loads(self.receive(Limits(start_s)))
            self._enforced, self._pid = about["enforced"], about["pid"]
        except (KeyError, TypeError, ValueError):
            self.end()
            raise OSError("the process does not answer") from None
        except BaseException:
            self.end()
            raise

    def send(self, message: bytes, limits: Limits) -> None:
        """Sends a message.

        Raises:
            TimeoutError: If the process does not read it in time.
            OSError: If the process has ended.
        """
        left = memoryview(_LENGTH.pack(len(message)) + message)
        self._watch(limits)
        try:
            while left:
                left = left[os.write(self._stdin.fileno(), left) :]
        except OSError as error:
            raise self._reason(error) from None
        finally:
            self._watch(None)

    def receive(self, limits: Limits) -> bytes:
        """Receives a message.

        Raises:
            TimeoutError: If the message does not arrive in time.
            OSError: If the process has ended, exceeded its memory or processor time, or its message is too long.
        """
        self._watch(limits)
        try:
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            if length > self._longest:
                raise OSError("the message is too long")
            return self._exactly(length)
        except OSError as error:
            raise self._reason(error) from None
        finally:
            self._watch(None)

    def alive(self) -> bool:
        """Returns whether the process is running and usable."""
        return self.usable and self._process.poll() is None

    def end(self) -> None:
        """Ends the process."""
        self.usable = False
        with self._changed:
            self._limits = None
            self._changed.notify_all()
        self._close()
        self._kill()
        self._process.wait()

    def forget(self) -> None:
        """Closes this process's pipes to a child that belongs to the parent process (after a fork)."""
        self.usable = False
        self._changed = threading.Condition()
        self._close()
        self._process.returncode = 0  # so that Popen does not wait for it or warn

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            part = os.read(self._stdout.fileno(), min(count - len(found), 1 << 20))
            if not part:
                raise OSError("the process has ended")
            found += part
        return bytes(found)

    def _reason(self, error: OSError) -> OSError:
        return TimeoutError("the process takes too long") if self._late else error

    def _close(self) -> None:
        for pipe in (self._stdin, self._stdout):
            with suppress(OSError):
                pipe.close()

    def _kill(self) -> None:
        with suppress(OSError):
            self._process.kill()
        # A virtual environment of Windows starts Python in another process.
        if self._pid not in (None, self._process.pid):
            import psutil

            with suppress(psutil.Error, OSError):
                psutil.Process(self._pid).kill()

    def _watch(self, limits: Limits | None) -> None:
        """Starts or stops to watch the process."""
        if limits is not None and self._is_watched(limits):
            self._cpu_before, self._memory_before = self._used() or (0.0, 0.0)
        with self._changed:
            self._limits = limits
            if limits is None:
                return  # the thread finds it when it wakes up
            self._until = time.monotonic() + limits.wall_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._watching, name="slm-watch", daemon=True)
                self._thread.start()
            elif min(self._until, time.monotonic() + self._pause()) < self._wakes:
                self._changed.notify_all()

    def _is_watched(self, limits: Limits) -> bool:
        """Returns whether a limit is set that the system does not enforce."""
        watched = {"time": limits.cpu_s, "memory": limits.memory}
        return any(watched[name] is not None for name in watched.keys() - set(self._enforced))

    def _pause(self) -> float:
        """Returns the longest time until the thread looks at the process."""
        limits = self._limits
        if limits is None:
            return float("inf")
        return min(max(0.0, self._until - time.monotonic()), _LOOK_S if self._is_watched(limits) else float("inf"))

    def _watching(self) -> None:
        with self._changed:
            while self.usable:
                pause = self._pause()
                self._wakes = time.monotonic() + pause
                self._changed.wait(None if pause == float("inf") else pause)
                if self.usable and self._limits is not None and self._exceeds(self._limits):
                    self.usable = False
                    self._kill()

    def _exceeds(self, limits: Limits) -> bool:
        if time.monotonic() >= self._until:
            self._late = True
            return True
        if not self._is_watched(limits):
            return False
        used = self._used()
        if used is None:
            return True
        cpu, memory = used
        if limits.cpu_s is not None and "time" not in self._enforced and cpu - self._cpu_before > limits.cpu_s:
            return True
        before = self._memory_before if limits.more else 0
        return limits.memory is not None and "memory" not in self._enforced and memory - before > limits.memory

    def _used(self) -> tuple[float, float] | None:
        """Returns the processor time of the process in seconds, and its memory in bytes; zeros if it has ended.

        Returns None if the system does not report them: a process that cannot be watched is not trusted.
        """
        import psutil

        try:
            self._figures = self._figures or psutil.Process(self._pid)
            times, memory = self._figures.cpu_times(), self._figures.memory_info()
        except psutil.NoSuchProcess:
            return 0.0, 0.0
        except (psutil.Error, OSError):
            return None
        return times.user + times.system, max(memory.rss, getattr(memory, "private", 0))


def hello(enforced: list[Limit]) -> None:
    """Sends the first message of a child: which limits the system enforces."""
    send(json.dumps({"pid": os.getpid(), "enforced": enforced}).encode())


def send(message: bytes) -> None:
    """Sends a message from a child to its parent."""
    left = memoryview(_LENGTH.pack(len(message)) + message)
    while left:
        left = left[os.write(1, left) :]


def receive() -> bytes | None:
    """Returns a message from the parent to this child; None if there will be no more."""
    head = _exactly(_LENGTH.size)
    return None if head is None else _exactly(_LENGTH.unpack(head)[0])


def _exactly(count: int) -> bytes | None:
    found = bytearray()
    while len(found) < count:
        part = os.read(0, min(count - len(found), 1 << 20))
        if not part:
            return None
        found += part
    return bytes(found)
