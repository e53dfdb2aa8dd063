"""A row read from a file."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Value:
    """The content of a row.

    Attributes:
        place: The place: "line 7" in a file of lines, "row 7" in an array or a table.
        content: The JSON value; an `SlmError` without a place in its message if it could not be read.
    """

    place: str
    content: Any
