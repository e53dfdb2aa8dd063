"""Runs programs in forks of one process that has done the imports, which take longer than most commands."""

import json
import os
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


@contextmanager
def forks(imports: str, home: Path) -> Iterator[Run]:
    """Starts the process; yields a function that takes a program and its arguments, as `python -c` does.

    Each program has the directory and the environment of the test that runs it.

    Args:
        imports: Statements that the process executes once. They must not start threads.
        home: A directory for the output of the programs.
    """
    out, err = home / "out", home / "err"
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER.format(imports=imports)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        sending, receiving = process.stdin, process.stdout
        assert sending is not None and receiving is not None

        def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            out.write_text("")
            err.write_text("")
            job = {"program": program, "arguments": arguments, "out": str(out), "err": str(err)}
            job |= {"cwd": str(Path.cwd()), "environment": dict(os.environ)}
            sending.write(json.dumps(job) + "\n")
            sending.flush()
            code = int(receiving.readline())
            return subprocess.CompletedProcess([program, *arguments], code, out.read_text(), err.read_text())

        yield run
