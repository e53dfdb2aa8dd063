"""The command line in this process: exit code, standard output, standard error."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from slm.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def slm(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Runs `slm ARGUMENTS` and returns what it did."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(done.value.code or 0), captured.out, captured.err)

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)
