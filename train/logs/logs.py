"""The logs of a run together: opens them, sends rows to each, and goes on without one that fails."""

import importlib.util
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, get_args

from slm.core.errors import SlmError
from slm.core.progress import Progress, Silent
from slm.train.choices import LogName
from slm.train.logs.board import Board
from slm.train.logs.log import About, Ending, Log, Row
from slm.train.logs.mlflow_runs import MlflowRuns
from slm.train.logs.weights_and_biases import WeightsAndBiases

NAMES: tuple[LogName, ...] = get_args(LogName)
_PACKAGES: dict[LogName, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "pip install tensorboardX"),
    "wandb": ("wandb", "pip install wandb"),
    "mlflow": ("mlflow", "pip install mlflow"),
}


def check_packages(names: Sequence[LogName]) -> None:
    """Checks that the packages of some logs are installed.

    Raises:
        SlmError: When one is missing; the hint has the command that installs it.
    """
    for name in names:
        package, command = _PACKAGES[name]
        found = importlib.util.find_spec(package)
        # A directory of that name, such as the ./wandb that wandb writes, has no origin.
        if found is None or found.origin is None:
            raise SlmError(f"--log {name} needs the package {package}, which is not installed", command)


class Logs:
    """The logs of a run. A log that raises an error is dropped with a warning: it must not end the training."""

    def __init__(
        self,
        names: Sequence[LogName] = (),
        about: About | None = None,
        run_ids: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Prepares the logs; `begin` opens them.

        Args:
            names: The logs.
            about: The run; required if there are names.
            run_ids: The identifiers of runs to continue, by the names of their logs.
            progress: Receives notes.

        Raises:
            SlmError: When a package is missing.
        """
        check_packages(names)
        self._names, self._about, self._progress = tuple(dict.fromkeys(names)), about, progress or Silent()
        self._run_ids = dict(run_ids or {})
        self._open: dict[LogName, Log] = {}

    @property
    def run_ids(self) -> dict[str, str]:
        """The identifiers under which a resumed run continues, by the names of their logs. Keeps those of dropped logs."""
        return {**self._run_ids, **{name: log.run_id for name, log in self._open.items() if log.run_id is not None}}

    def begin(self, rows: Sequence[Row]) -> None:
        """Opens the logs.

        Args:
            rows: The rows so far of a run that resumes.
        """
        for name in self._names:
            try:
                self._open[name] = self._opened(name, rows)
            except Exception as error:
                self._complain(name, error)

    def _opened(self, name: LogName, rows: Sequence[Row]) -> Log:
        assert self._about is not None
        match name:
            case "tensorboard":
                return Board(self._about, rows)
            case "wandb":
                return WeightsAndBiases(self._about, rows, self._run_ids.get(name), self._progress)
            case "mlflow":
                return MlflowRuns(self._about, rows, self._run_ids.get(name), self._progress)

    def add(self, row: Row) -> None:
        """Sends a row to every log."""
        for name, log in list(self._open.items()):
            try:
                log.add(row)
            except Exception as error:
                self._drop(name, error)

    def close(self, ending: Ending = "finished") -> None:
        """Closes every log."""
        for name, log in list(self._open.items()):
            try:
                log.close(ending)
            except Exception as error:
                self._complain(name, error)
            self._run_ids = self.run_ids
            del self._open[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes every log, with the ending that the exception says."""
        on_request = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "stopped" if on_request else "failed")

    def _drop(self, name: LogName, error: Exception) -> None:
        self._complain(name, error)
        self._run_ids = self.run_ids
        del self._open[name]

    def _complain(self, name: LogName, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        self._progress.note(
            f"warning: --log {name} failed, and training goes on without it: {lines[0] if lines else type(error).__name__}"
        )
