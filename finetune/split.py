"""The split of rows into training rows and held-out rows."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from slm.finetune.rows import ChatRow, CompletionRow, PreferenceRow, Row

# Share of the rows that is held out of many rows if there is no validation file. Of 60 answers none can be missed, and a loss
# on 6 rows says little, so none of few rows is held out.
HELD_OUT = 0.1
# With fewer held-out rows, the loss varies between epochs about as much by chance as by learning.
FEW_ROWS = 20


@dataclass(frozen=True)
class Split:
    """Training rows and held-out rows.

    Attributes:
        train: The training rows, in the order of the file.
        held_out: The held-out rows, in the order of the file.
        numbers: Numbers of the held-out rows in the file, from 1; empty if they come from another file.
    """

    train: list[Row]
    held_out: list[Row]
    numbers: tuple[int, ...] = ()

    @property
    def record(self) -> dict[str, object] | None:
        """Values that identify the split of a file; None if no rows were split off."""
        if not self.numbers:
            return None
        digest = hashlib.sha256(json.dumps(self.numbers).encode()).hexdigest()
        return {"rows": len(self.numbers), "sha256": digest}


def split_rows(rows: Sequence[Row], seed: int, share: float = HELD_OUT) -> Split:
    """Holds out a share of the rows, drawn with the seed.

    Rows with the same prompt go to the same side, so that the loss is not measured on prompts of training rows. If most rows
    share their prompts with many others, as in a file of stories with the same beginning, only equal rows stay together.

    Args:
        rows: The rows.
        seed: Seed of the draw.
        share: The share, from 0.
    """
    wanted = int(len(rows) * share)
    groups = _groups(rows, _prompt)
    if sum(len(group) for group in groups if len(group) > wanted) > len(rows) / 2:
        groups = _groups(rows, _whole)
    random.Random(f"{seed} held out").shuffle(groups)
    drawn: set[int] = set()
    for group in groups:
        if len(drawn) + len(group) <= wanted:
            drawn.update(group)
    return Split(
        [row for number, row in enumerate(rows) if number not in drawn],
        [row for number, row in enumerate(rows) if number in drawn],
        tuple(sorted(number + 1 for number in drawn)),
    )


def learned_before(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Returns the number of held-out rows that are also training rows."""
    known = Counter(map(_whole, train))
    return sum(_whole(row) in known for row in held_out)


def repeated(rows: Sequence[Row]) -> tuple[int, int]:
    """Returns how many rows equal an earlier row, and how many others have the prompt of an earlier row."""
    whole, prompts = Counter(map(_whole, rows)), Counter(map(_prompt, {_whole(row): row for row in rows}.values()))
    return len(rows) - len(whole), len(whole) - len(prompts)


def _groups(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(key(row), []).append(number)
    return list(groups.values())


def _prompt(row: Row) -> Hashable:
    """Returns the prompt of a row: everything before the first answer, or the whole row if nothing precedes it."""
    match row:
        case ChatRow():
            asked = list(takewhile(lambda message: message["role"] != "assistant", row.messages))
            return ("chat", json.dumps(asked, sort_keys=True, default=str)) if asked else _whole(row)
        case CompletionRow() if row.prompt.strip():
            return "prompt", row.prompt.strip()
        case PreferenceRow():
            return _prompt(row.chosen)
    return _whole(row)


def _whole(row: Row) -> Hashable:
    match row:
        case ChatRow():
            return "chat", json.dumps(row.messages, sort_keys=True, default=str)
        case CompletionRow():
            return "completion", row.prompt.strip(), row.completion.strip()
        case PreferenceRow():
            return "preference", _whole(row.chosen), _whole(row.rejected)
    return "text", row.text.strip()
