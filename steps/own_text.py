"""The rows that a model was fine-tuned on, as the default texts of its quantization."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.manifest import Bundle
from slm.quantize.defaults import LEAST_HELD_OUT
from slm.steps.choosing import Note

if TYPE_CHECKING:
    from slm.finetune.own_rows import OwnRows
    from slm.quantize.task import TaskCheck
    from slm.quantize.texts import TokenRows


@dataclass(frozen=True)
class OwnText:
    """The rows that a model was fine-tuned on, as text for its quantization.

    Attributes:
        rows: The rows.
        asked: The prompts of a task that is measured, in tokens. Training rows with these are left out.
        note: Receives notes.
    """

    rows: "OwnRows"
    asked: frozenset[tuple[int, ...]]
    note: Note = field(repr=False)

    def training(self, source: Bundle, tokens: int, window: int | None) -> "TokenRows | None":
        """Returns the training rows without those of the task, filled up with the default text; None if none is left.

        Args:
            source: The bundle.
            tokens: The number of tokens.
            window: The length of a row; None for the default.
        """
        from slm.quantize.texts import filled_up

        rows = self.rows
        documents = rows.tokens(rows.train, source, tokens, self.asked)
        if not documents:
            self.note(f"No training row of {rows.path} is left for calibration: all are rows of the task.")
            return None
        return filled_up(source, f"the model's training rows, {rows.path}", documents, tokens, window)

    def held_out(self, source: Bundle, tokens: int, window: int | None) -> "TokenRows | None":
        """Returns the held-out rows; None if they are fewer tokens than the shortest text that is measured.

        Args:
            source: The bundle.
            tokens: The number of tokens.
            window: The length of a row; None for the default.
        """
        from slm.quantize.texts import row_tokens_of, rows_of_documents

        rows, least = self.rows, max(min(tokens, LEAST_HELD_OUT), row_tokens_of(source, window))
        documents = rows.tokens(rows.held_out, source, max(tokens, least)) if rows.held_out else []
        if sum(map(len, documents)) < least:
            return None
        return rows_of_documents(source, f"the model's held-out rows, {rows.held_out_path}", documents, tokens, window)


def own_text(source: Bundle, check: "TaskCheck | None", note: Note) -> OwnText | None:
    """Returns the rows that a bundle's model was fine-tuned on; None if it names none, or with a note if they changed.

    Args:
        source: The bundle.
        check: The check on a task, whose rows are not calibrated on.
        note: Receives notes.
    """
    from slm.finetune.own_rows import own_rows

    rows = own_rows(source)
    if isinstance(rows, str):
        note(f"The rows that the model was fine-tuned on are not used: {rows}.")
    if rows is None or isinstance(rows, str):
        return None
    return OwnText(rows, frozenset(() if check is None else (each.ids for each in check.questions)), note)


def check_apart(calibration: Path, task: Path) -> None:
    """Checks that the rows of a task are not the calibration text.

    Raises:
        SlmError: If they are.
    """
    same = calibration.samefile(task)
    if not same and calibration.is_file() and task.is_file():
        same = calibration.stat().st_size == task.stat().st_size and sha256_file(calibration) == sha256_file(task)
    if same:
        raise SlmError(
            f"--calibration and --task are the same rows: {calibration}",
            "calibrate on other text: settings that fit these rows would hide a loss on others",
        )
