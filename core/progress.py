"""How long work tells what it is doing, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Receives the state of long work. The command line draws it; the default says nothing."""

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Begins a task of `total` units; None when the length is not known."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Moves the current task on; `fields` are shown beside it, such as loss="1.23"."""

    def finish(self) -> None:
        """Ends the current task."""

    def note(self, text: str) -> None:
        """Says one line that a person should read."""


class Silent:
    """Listens to nothing."""

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Ignores it."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Ignores it."""

    def finish(self) -> None:
        """Ignores it."""

    def note(self, text: str) -> None:
        """Ignores it."""
