"""The files of a run: `checkpoint/best`, `checkpoint/last`, numbered checkpoints, and the state for resuming."""

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slm.core import renames
from slm.core.checkpoint import CHECKPOINT_FILES, INFO_FILE, read_info, write_checkpoint
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, recover
from slm.core.nn import CausalLM
from slm.core.qat import RECORD
from slm.core.weights import WEIGHTS_FILE
from slm.train.build import tokens_seen
from slm.train.data.dataset import Dataset
from slm.train.metrics import Row, is_number
from slm.train.optimizer import Optimizers
from slm.train.parallel import Processes, by_first, collect
from slm.train.qat import Deployed
from slm.train.recipe import Recipe
from slm.train.state import Counters, keep_rewind_point, save_state
from slm.train.writer import AtOnce, Background, Writer
from slm.version import __version__

METRICS = ("loss", "perplexity", "bits_per_byte")
_NUMBERED = "update-"


def check_measured(info: dict[str, Any]) -> None:
    """Checks that a checkpoint's `slm.json` has the metrics that this module writes.

    Raises:
        ValueError: When it does not; the message names the field.
    """
    measured = info["metrics"]
    for name in ("micro_steps", *METRICS):
        if not isinstance(measured, dict) or not is_number(measured.get(name)):
            raise ValueError(f"metrics: no number as {name!r}")
    if not is_number(info.get("updates")):
        raise ValueError("no number as 'updates'")


class Keeper:
    """Writes the files of a run. Every process calls it, because each may hold a shard of the tensors; the first one writes."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        dataset: Dataset,
        model: CausalLM,
        deployed: Deployed,
        processes: Processes,
        about: dict[str, Any],
    ) -> None:
        """Prepares the writer.

        Args:
            run: The run's directory.
            recipe: The recipe.
            dataset: The tokenizer and the tokens.
            model: The model.
            deployed: The weights that checkpoints hold.
            processes: The processes that train together.
            about: Further fields of every checkpoint's `slm.json`.
        """
        checkpoints = run / "checkpoint"
        self.best, self.last = checkpoints / "best", checkpoints / "last"
        self._checkpoints, self._run = checkpoints, run
        self._recipe, self._config, self._dataset, self._about = recipe, model.model.config, dataset, about
        self._model, self._deployed, self._processes = model, deployed, processes
        self._first = processes.rank == 0
        self._saving = 0
        self._writer: Writer = AtOnce()
        if recipe.checkpoints.asynchronous:
            self._writer = Background(shared=next(model.parameters()).device.type == "cpu")

    def save_checkpoint(self, path: Path, micro_steps: int, measured: Row | None) -> None:
        """Writes the current weights, or those that are deployed while they are in place."""
        tensors = collect(self._model.named_parameters(), keep=self._first)
        if self._first:
            self._write_checkpoint(path, tensors, self._info(micro_steps, measured))

    def _write_checkpoint(self, path: Path, tensors: Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        write_checkpoint(path, self._config, arrays, self._dataset.tokenizer, info)

    def best_measured(self) -> Row | None:
        """Returns the metrics of the best checkpoint on the disk; None if there is none.

        The checkpoint may be newer than the saved state: a killed run resumes from before the evaluation that kept the
        checkpoint, and drops that evaluation's row. The checkpoint stays the best until an evaluation beats it, so that what
        the run reports about its best checkpoint is true of the file.
        """
        if self._first:
            recover(self.best)
        info = read_info(self.best)
        measured = info.get("metrics")
        if measured is None:
            return None
        try:
            check_measured(info)
        except ValueError as error:
            raise SlmError(
                f"{self.best / INFO_FILE} is damaged: {error}", "start a new run with another --out"
            ) from None
        return {"updates": info["updates"], **measured}

    def save(
        self,
        counters: Counters,
        optimizers: Optimizers,
        measured: Row | None,
        number: int | None = None,
        *,
        rewind_point: bool = False,
    ) -> None:
        """Writes the last checkpoint, a copy under a number if one is given, and the state for resuming.

        The state comes last: a run that is killed before it is written repeats the updates since the previous state. With
        `checkpoints.asynchronous` this returns when everything is copied; `finish` waits for the files.

        Args:
            counters: The position.
            optimizers: The optimizers.
            measured: The last evaluation.
            number: The number of the checkpoint to keep; None keeps none.
            rewind_point: Whether the state is also kept as the one to which a spike rewinds.

        Raises:
            SlmError: When the previous save failed in the background.
        """
        if self._recipe.checkpoints.asynchronous:
            by_first(self._processes, self.finish)
        writer, first = self._writer, self._first
        average = self._deployed.average
        info = self._info(counters.micro_steps, measured) if first else {}

        def checkpoint(name: str) -> Mapping[str, torch.Tensor]:
            tensors = writer.kept(name, collect(self._model.named_parameters(), keep=first))
            if first:
                writer.add(lambda: self._write_checkpoint(self.last, tensors, info))
            return tensors

        weights: Path | Mapping[str, torch.Tensor] = self.last / WEIGHTS_FILE
        averaged: Mapping[str, torch.Tensor] | None = None
        if self._deployed.same:
            checkpoint("weights")
        else:
            weights = writer.kept("weights", collect(self._model.named_parameters(), keep=first))
            averaged = None if average is None else writer.kept("average", average.tensors(keep=first))
            with self._deployed.in_place():
                checkpoint("deployed")
        state = writer.kept("optimizer", optimizers.state_tensors(self._model, keep=first))
        if first:
            if number is not None:
                writer.add(lambda: self._keep_numbered(number))
            writer.add(lambda: save_state(self._run, counters, state, weights, averaged))
            if rewind_point:
                writer.add(lambda: keep_rewind_point(self._run))
            self._saving = counters.micro_steps // self._recipe.batch.accumulation
            writer.begin()
        self._processes.from_first(None)  # no process continues or exits before it is written or copied

    def finish(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            SlmError: When it could not be written.
        """
        try:
            self._writer.finish()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no space left on the disk" if full else (error.strerror or str(error))
            raise SlmError(
                f"the save after update {self._saving:,} failed in the background: {reason} ({error.filename or self._run})",
                f"{'free some space, then ' if full else ''}slm train --resume --out {self._run} continues from the save "
                "before it, which is complete",
            ) from None

    def await_save(self, seconds: float) -> None:
        """Waits for a save in the background, for at most so many seconds; raises nothing."""
        self._writer.await_end(seconds)

    def _keep_numbered(self, updates: int) -> None:
        """Keeps the last checkpoint under the number of its update, linked if possible, and removes the oldest ones."""
        with atomic_directory(self._checkpoints / f"{_NUMBERED}{updates:07}", CHECKPOINT_FILES) as directory:
            for file in self.last.iterdir():
                try:
                    (directory / file.name).hardlink_to(file)
                except OSError:  # a file system without links
                    shutil.copyfile(file, directory / file.name)
        numbered = sorted(self._checkpoints.glob(f"{_NUMBERED}{'[0-9]' * 7}"))
        for old in numbered[: -self._recipe.checkpoints.keep]:
            renames.remove_tree(old)

    def _info(self, micro_steps: int, measured: Row | None) -> dict[str, Any]:
        recipe, grid = self._recipe, self._recipe.qat.grid
        return {
            "made_by": "slm train",
            "slm_version": __version__,
            "torch_version": torch.__version__,
            "parameters": self._config.parameter_count(),
            "micro_steps": micro_steps,
            "updates": micro_steps // recipe.batch.accumulation,
            "tokens": tokens_seen(recipe, self._dataset.train, micro_steps),
            "metrics": measured and {name: measured[name] for name in ("micro_steps", *METRICS)},
            "seed": recipe.seed,
            **self._about,
            **({} if grid is None else {RECORD: grid.model_dump(mode="json")}),
            "tokenizer_sha256": self._dataset.tokenizer.sha256,
            "licence_of_the_data": self._dataset.manifest.licence,
            "data": {
                name: tokens.header.model_dump()
                for name, tokens in (("train", self._dataset.train), ("validation", self._dataset.validation))
            },
            "recipe": recipe.model_dump(mode="json"),
        }
