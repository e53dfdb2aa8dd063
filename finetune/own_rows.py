"""The rows that a bundle's model was fine-tuned on, rendered again as tokens: text for its quantization.

The bundle records paths and hashes. Rows of a task that is measured are left out of the training rows. Needs no PyTorch.
"""

import os
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from slm.core.checkpoint import INFO_FILE
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.text.files import find_files
from slm.core.text.streams import size
from slm.core.tokenizer import Tokenizer
from slm.core.tuned_rows import RowsFile, TunedOn, recorded_rows
from slm.finetune.examples import Renderer
from slm.finetune.provenance import provenance
from slm.finetune.rows import PreferenceRow, Row, read_rows

# Rows that are rendered at a time, until there are enough tokens.
_AT_ONCE = 64
# The largest directory and file that are read, in entries and bytes.
_MOST_ENTRIES, _MOST_BYTES = 10_000, 8 << 30


@dataclass(frozen=True)
class OwnRows:
    """The rows of a model's last fine-tuning.

    Attributes:
        path: Path of the training rows.
        train: The training rows.
        held_out: The held-out rows.
        held_out_path: Path of the held-out rows.
        unanswered: Places of rows whose answers a teacher wrote; only their prompts are read.
    """

    path: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    held_out_path: str
    unanswered: frozenset[str]

    def tokens(
        self, rows: Sequence[Row], bundle: Bundle, tokens: int, asked: Collection[tuple[int, ...]] = ()
    ) -> list[list[int]]:
        """Returns rows in tokens without the tokenizer's prefix, in random but fixed order, until there are enough tokens.

        Args:
            rows: Training rows or held-out rows.
            bundle: The model, for its tokenizer and chat template.
            tokens: The number of tokens.
            asked: Prompts in tokens, whose rows are left out.
        """
        renderer = Renderer(Tokenizer.load(bundle.path), bundle)
        prefix, lengths = len(renderer.tokenizer.prefix_ids), {len(ids) for ids in asked}
        order = random.Random("calibration").sample(rows, len(rows))
        found: list[list[int]] = []
        count = 0
        for ids in self._rendered(order, renderer):
            if count >= tokens:
                break
            if any(ids[:length] in asked for length in lengths):
                continue
            found.append(list(ids[prefix:]))
            count += len(found[-1])
        return found

    def _rendered(self, rows: Sequence[Row], renderer: Renderer) -> Iterator[tuple[int, ...]]:
        chosen = [row.chosen if isinstance(row, PreferenceRow) else row for row in rows]
        for first in range(0, len(chosen), _AT_ONCE):
            some = chosen[first : first + _AT_ONCE]
            for row, example in zip(some, renderer.uncut(some), strict=True):
                if isinstance(example, SlmError):
                    continue
                end = example.spans[-1][0] if row.place in self.unanswered else len(example.ids)
                yield example.ids[:end]


def own_rows(bundle: Bundle) -> OwnRows | str | None:
    """Returns the rows that a bundle's model was fine-tuned on, if the files still exist and are unchanged.

    Returns:
        The rows; the reason why they cannot be used; or None if the bundle does not name any.
    """
    record = recorded_rows(bundle.manifest.provenance.get(INFO_FILE))
    if record is None:
        return None
    try:
        unanswered: set[str] = set()
        rows = _read(record.data, record, unanswered)
        drawn = {number - 1 for number in record.held_out_rows}
        held_out = [row for number, row in enumerate(rows) if number in drawn]
        train = [row for number, row in enumerate(rows) if number not in drawn]
        held_out_path = record.data.path
        if record.validation is not None:
            held_out, held_out_path = _read(record.validation, record, unanswered), record.validation.path
    except SlmError as reason:
        return reason.message
    return OwnRows(record.data.path, tuple(train), tuple(held_out), held_out_path, frozenset(unanswered))


def _read(file: RowsFile, record: TunedOn, unanswered: set[str]) -> list[Row]:
    path = Path(file.path)
    try:
        _check(path)
        if provenance(path)["sha256"] != file.sha256:
            raise SlmError(f"{path} has changed since the model was fine-tuned on it")
        numbers: list[int] | None = None if record.teacher is None else []
        rows = read_rows(path, [] if record.skip_bad else None, unanswered=numbers)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise SlmError(f"{path} cannot be read: {error}") from None
    unanswered.update(rows[number].place for number in numbers or ())
    return rows


def _check(path: Path) -> None:
    """Rejects paths whose reading could block or take long: a bundle from elsewhere may name any path."""
    if not path.exists():
        raise SlmError(f"{path} does not exist")
    if path.is_dir():
        entries = (entry for _, folders, files in os.walk(path) for entry in (*folders, *files))
        if sum(1 for _ in islice(entries, _MOST_ENTRIES + 1)) > _MOST_ENTRIES:
            raise SlmError(f"{path} has more than {_MOST_ENTRIES:,} files")
    elif find_files(path) and path.stat().st_size > _MOST_BYTES:
        raise SlmError(f"{path} is larger than {size(_MOST_BYTES)}")
