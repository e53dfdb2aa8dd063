"""Exceptions for users: one line that says what is wrong, and one line that says what to do."""

# The longest message, in characters; a message may quote the whole contents of a file.
_LONGEST = 2000


class SlmError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with 1.

    `str(error)` is the message followed by the hint. Use `message` and `hint` to print them separately.

    Attributes:
        message: One line, in lower case, that names the file or the value with the error.
        hint: One line that says how to fix it; None if there is no advice.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _one_line(message)
        self.hint = None if hint is None else _one_line(hint)
        super().__init__(self.message, self.hint)  # both arguments, so that copies and pickles keep the hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"


class ArgumentError(SlmError, TypeError):
    """A Python call with an unknown keyword argument or a value of the wrong type; also a `TypeError`."""


def _one_line(text: str) -> str:
    """Returns the text with control characters escaped and its length limited: messages quote untrusted files."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
