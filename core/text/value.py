"""A row as it was read."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Value:
    """What stands in a row.

    Attributes:
        place: Where: "line 7" of a file of lines, "row 7" of an array or a table.
        content: What, as JSON has it; an `SlmError`, whose message names no place, where it could not be read.
    """

    place: str
    content: Any
