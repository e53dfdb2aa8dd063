"""One line of `slm doctor`'s report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        value: What was found.
        advice: What to do about it; None where there is nothing to do.
        level: "note" where something could be better, "problem" where something does not work.
    """

    name: str
    value: str
    advice: str | None = None
    level: Literal["ok", "note", "problem"] = "ok"
