"""MLflow: a run in the store that MLFLOW_TRACKING_URI names, or in MLflow's default, files of the current directory.

A thread writes, so that training does not wait for a store on the network.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from slm.core.progress import Progress
from slm.train.logs.log import About, Ending, Row, flat, scalars

EXPERIMENT = "slm"
# MLflow's own limits of one request.
_METRICS_A_REQUEST, _PARAMETERS_A_REQUEST, _PARAMETER_CHARACTERS = 1000, 100, 500
# Seconds to wait for the store at the end.
_FINISH_S = 60.0
# Requests to a server: MLflow's defaults would hold the start of a run up for minutes.
_HTTP = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
_STATUS: dict[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRuns:
    """A run of MLflow. Steps are updates."""

    def __init__(self, about: About, rows: Sequence[Row], run_id: str | None, progress: Progress) -> None:
        """Starts a run, or continues one.

        Args:
            about: The run.
            rows: The rows so far, which a continued run already has.
            run_id: The identifier of the run to continue; None starts a new one.
            progress: Receives a note about the place of the run.
        """
        for name, value in _HTTP.items():
            os.environ.setdefault(name, value)
        # It reports the tables of a new database.
        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        self._last: dict[str, int] = {}  # the last step of each group of tags that the store has
        self.run_id: str | None = None
        if run_id is not None:
            try:
                self._continue(run_id)
            except MlflowException as error:
                progress.note(f"warning: MLflow has no run {run_id} to continue, so a new one begins ({error.message})")
        if self.run_id is None:
            self.run_id = self._begun(about)
        place = os.environ.get("MLFLOW_TRACKING_URI") or "the current directory"
        progress.note(f"MLflow run {self.run_id}, in {place}")
        self._queue: SimpleQueue[Row | Ending] = SimpleQueue()
        self._failure: Exception | None = None
        self._writer = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._writer.start()
        for row in rows:
            self.add(row)

    def _continue(self, run_id: str) -> None:
        run = self._client.get_run(run_id)
        if run.info.lifecycle_stage == "active":
            for tag in run.data.metrics:
                last = max(each.step for each in self._client.get_metric_history(run_id, tag))
                group = tag.partition("/")[0]
                self._last[group] = max(last, self._last.get(group, -1))
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id

    def _begun(self, about: About) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id: str = self._client.create_run(number, run_name=about.name).info.run_id
        values = [Param(key, str(value)[:_PARAMETER_CHARACTERS]) for key, value in flat(about.recipe).items()]
        for first in range(0, len(values), _PARAMETERS_A_REQUEST):
            self._client.log_batch(run_id, params=values[first : first + _PARAMETERS_A_REQUEST])
        self._client.log_dict(run_id, dict(about.recipe), "config.yaml")
        return run_id

    def add(self, row: Row) -> None:
        """Takes a row.

        Raises:
            Exception: What the store raised about an earlier row.
        """
        if self._failure is not None:
            raise self._failure
        self._queue.put(row)

    def close(self, ending: Ending) -> None:
        """Ends the run.

        Raises:
            TimeoutError: When the store does not take the last rows in time.
            Exception: What the store raised.
        """
        self._queue.put(ending)
        self._writer.join(_FINISH_S)
        if self._failure is not None:
            raise self._failure
        if self._writer.is_alive():
            raise TimeoutError(f"the store did not take the last rows within {_FINISH_S:.0f} seconds")

    def _write(self) -> None:
        """Writes what is in the queue until the end of the run; many rows at once if the store is slow."""
        try:
            while True:
                waiting = [self._queue.get()]
                try:
                    while len(waiting) < _METRICS_A_REQUEST // 20:
                        waiting.append(self._queue.get_nowait())
                except Empty:
                    pass
                self._write_rows([each for each in waiting if isinstance(each, Mapping)])
                endings = [each for each in waiting if isinstance(each, str)]
                if endings:
                    self._client.set_terminated(self.run_id, _STATUS[endings[0]])
                    return
        except Exception as error:
            self._failure = error

    def _write_rows(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(tag, value, now, row["updates"])
            for row in rows
            for tag, value in scalars(row).items()
            if row["updates"] > self._last.get(tag.partition("/")[0], -1)
        ]
        for first in range(0, len(metrics), _METRICS_A_REQUEST):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + _METRICS_A_REQUEST])
        texts: dict[int, list[str]] = {}
        for row in rows:
            if row["type"] == "sample":
                texts.setdefault(row["updates"], []).append(f"{row['prompt']}\n-> {row['text']}\n")
        for updates, lines in texts.items():
            self._client.log_text(self.run_id, "\n".join(lines), f"samples/{updates:08}.txt")
