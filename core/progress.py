"""The interface for progress reports: functions that run for long report through it, and callers choose the display."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives the progress of a task. The command line draws it; the default, `Silent`, discards it."""

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Starts a task of `total` units; `total` is None if the length is not known."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Advances the current task by `amount` units; `fields` are shown beside it, such as loss="1.23"."""

    def finish(self) -> None:
        """Ends the current task."""

    def note(self, text: str) -> None:
        """Shows one line of text to the user."""


class Silent:
    """Discards all progress."""

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Does nothing."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""
