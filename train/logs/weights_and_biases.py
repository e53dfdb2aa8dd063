"""Weights & Biases: a run of the package `wandb`, online if there is a key and a network, else offline."""

import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slm.core.progress import Progress
from slm.train.logs.log import About, Ending, Row, scalars

PROJECT = "slm"
_HOST = "https://api.wandb.ai"
# Seconds to wait for the server at the start, and for the last rows at the end. What is not uploaded by then is on the disk.
_START_S, _FINISH_S = 20.0, 60.0
_COLUMNS = ("updates", "prompt", "text")


class WeightsAndBiases:
    """A run of Weights & Biases. Steps are updates; a row at a step that the server already has changes nothing."""

    def __init__(self, about: About, rows: Sequence[Row], run_id: str | None, progress: Progress) -> None:
        """Starts a run, or continues one.

        Args:
            about: The run.
            rows: The rows so far, which a continued run already has.
            run_id: The identifier of the run to continue; None starts a new one.
            progress: Receives a note about the place of the run.
        """
        import wandb

        self._wandb = wandb
        self.run_id = run_id or secrets.token_hex(4)
        self._run = self._started(about, progress)
        self._samples: list[Row] = []
        for row in rows if run_id is None else ():
            self.add(row)

    def _started(self, about: About, progress: Progress) -> Any:
        wandb = self._wandb
        chosen = os.environ.get("WANDB_MODE")
        modes = [chosen] if chosen else ["online", "offline"] if has_key(os.environ) else ["offline"]
        for number, mode in enumerate(modes, 1):
            try:
                run = wandb.init(
                    project=os.environ.get("WANDB_PROJECT") or PROJECT,
                    name=os.environ.get("WANDB_NAME") or about.name,
                    id=self.run_id,
                    # Offline there is no run to look for; the server joins runs of one id.
                    resume="allow" if mode == "online" else None,
                    mode=mode,
                    config=dict(about.recipe),
                    # Without the output of the terminal and the code: metrics, the recipe and samples were asked for.
                    settings=wandb.Settings(
                        console="off",
                        silent=True,
                        disable_git=True,
                        disable_code=True,
                        disable_job_creation=True,
                        init_timeout=_START_S,
                        finish_timeout=_FINISH_S,
                        finish_timeout_raises=False,
                    ),
                )
            except Exception as error:
                if number == len(modes):
                    raise
                progress.note(f"warning: W&B is not reachable, so the run is logged offline ({_first_line(error)})")
                wandb.teardown()  # ends its service, which otherwise says that the identifier is in use
                continue
            if mode == "offline":
                progress.note(f"W&B run {self.run_id}, offline: wandb sync {Path(run.dir).parent} uploads it")
            elif mode == "online":
                progress.note(f"W&B run {self.run_id}: {run.url}")
            return run
        raise AssertionError

    def add(self, row: Row) -> None:
        """Takes a row. The samples of an evaluation become one table."""
        if row["type"] == "sample":
            self._samples.append(row)
            return
        self._log_samples()
        where = {name: row[name] for name in ("tokens", "epoch") if name in row}
        self._run.log(scalars(row) | where, step=row["updates"])

    def _log_samples(self) -> None:
        if self._samples:
            table = [[row["updates"], row["prompt"], row["text"]] for row in self._samples]
            values = {"samples": self._wandb.Table(columns=list(_COLUMNS), data=table)}
            self._run.log(values, step=self._samples[-1]["updates"])
            self._samples = []

    def close(self, ending: Ending) -> None:
        """Ends the run."""
        self._log_samples()
        self._run.finish(exit_code=0 if ending == "finished" else 1)


def has_key(variables: Mapping[str, str]) -> bool:
    """Returns whether there is a key of Weights & Biases; without one, an online run would ask for it on the terminal."""
    if any(variables.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(variables.get("WANDB_BASE_URL") or _HOST).hostname or ""
    files = [variables["NETRC"]] if variables.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with suppress(OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: there is no home directory
            if netrc.netrc(Path(file).expanduser()).authenticators(host):
                return True
    return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
