"""TensorBoard's files in the directory of a run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from slm.train.logs.log import About, Ending, Row, scalars

TENSORBOARD = "tensorboard"
# A thread writes the files, at least this often.
_FLUSH_S = 5


class Board:
    """TensorBoard's files. They are rebuilt when a run resumes, because they cannot be truncated to where it continues."""

    run_id = None

    def __init__(self, about: About, rows: Sequence[Row]) -> None:
        """Opens new files.

        Args:
            about: The run.
            rows: The rows so far.
        """
        from tensorboardX import SummaryWriter

        self._step = about.board_step
        directory = about.directory / TENSORBOARD
        shutil.rmtree(directory, ignore_errors=True)
        self._writer = SummaryWriter(str(directory), flush_secs=_FLUSH_S)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Takes a row."""
        step = self._step(row)
        for tag, value in scalars(row).items():
            self._writer.add_scalar(tag, value, step)
        if row["type"] == "sample":
            self._writer.add_text(f"sample/{row['prompt']}", row["text"], step)

    def close(self, ending: Ending) -> None:
        """Flushes the files."""
        self._writer.close()


def board_files(run: Path) -> frozenset[str]:
    """Returns the files of TensorBoard in a run's directory, relative to it."""
    return frozenset(f"{TENSORBOARD}/{file.name}" for file in (run / TENSORBOARD).glob("events.out.tfevents.*"))


def drop_board(run: Path) -> None:
    """Removes TensorBoard's files of a run, and the directory of the run if nothing else is in it."""
    shutil.rmtree(run / TENSORBOARD, ignore_errors=True)
    if run.is_dir() and not any(run.iterdir()):
        run.rmdir()
