"""The one exception that reaches a user: a line that says what is wrong and a hint that says what to do."""

# Characters of a message; what is quoted in one may be a file's whole contents.
_LONGEST = 2000


class SlmError(Exception):
    """A failure that the user can act on. The command line prints it without a traceback and exits with 1.

    `str(error)` is the message with the hint behind it; where the two are printed apart, use `message` and `hint`.

    Attributes:
        message: One line, in lower case, that names the file or the value at fault.
        hint: What to do about it, in one line; None where there is nothing to say.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _one_line(message)
        self.hint = None if hint is None else _one_line(hint)
        super().__init__(self.message, self.hint)  # both, so that a copy and a pickle keep the hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"


class ArgumentError(SlmError, TypeError):
    """A call from Python with an unknown keyword or a value of the wrong type; a `TypeError` as well."""


def _one_line(text: str) -> str:
    """Returns text that a terminal shows as it stands: what messages quote comes from files that anybody may have written."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
