"""Progress reports that tests give to a run: they keep its notes, or stop it."""

import os
import signal

from slm.core.progress import Silent


class Notes(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Stopper(Notes):
    """Keeps the notes, and sends this process a signal after a number of micro-steps, or of updates of fine-tuning."""

    def __init__(self, steps: int, signum: int = signal.SIGINT) -> None:
        super().__init__()
        self.left, self.signum = steps, signum

    def advance(self, amount: int = 1, **fields: str) -> None:
        # Other amounts are the documents of a text, and the losses of pretraining's updates.
        self.left -= amount == 1
        if amount == 1 and self.left == 0:
            os.kill(os.getpid(), self.signum)
