"""Runs programs in forks of one process that has done the imports, which take longer than most commands."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

# The child leaves the loop and runs the program as the main module; Python then exits as it always does.
_SERVER = """
import json, os, sys
{imports}
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["environment"])
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    os.dup2(os.open(name, os.O_RDWR), number)
sys.argv = ["-c", *job["arguments"]]
exec(job["program"])
"""


class Started:
    """A program that runs; the next one starts when it has ended.

    Attributes:
        pid: The number of its process.
        ended: Whether `wait` has returned.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", program: str, arguments: tuple[str, ...], home: Path
    ) -> None:
        self.ended = False
        self._process, self._args = process, [program, *arguments]
        self._out, self._err = home / "out", home / "err"
        job = {"program": program, "arguments": arguments, "cwd": str(Path.cwd()), "environment": dict(os.environ)}
        for name, file in (("out", self._out), ("err", self._err)):
            file.write_text("")
            job[name] = str(file)
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = self._number()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not select.select([self._process.stdout], [], [], 0)[0]

    @property
    def err(self) -> str:
        """What it has printed to its standard error so far."""
        return self._err.read_text()

    def wait(self, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        """Waits for the end, and returns the exit code and the output.

        Raises:
            TimeoutError: If it runs longer than that. It is killed, so that others can be started.
        """
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"{self._args} runs longer than {seconds} s")
        self.ended = True
        return subprocess.CompletedProcess(self._args, self._number(), self._out.read_text(), self.err)

    def _number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


class Forks:
    """The process that forks. Each program has the directory and the environment of the test that runs it."""

    def __init__(self, process: "subprocess.Popen[bytes]", home: Path) -> None:
        self._process, self._home = process, home

    def start(self, program: str, *arguments: str) -> Started:
        """Starts a program with arguments, as `python -c` does."""
        return Started(self._process, program, arguments, self._home)

    def __call__(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end."""
        return self.start(program, *arguments).wait()


@contextmanager
def forks(imports: str, home: Path) -> Iterator[Forks]:
    """Starts the process that forks.

    Args:
        imports: Statements that the process executes once. They must not start threads.
        home: A directory for the output of the programs.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER.format(imports=imports)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # so that what is not read yet can be waited for
    ) as process:
        yield Forks(process, home)
