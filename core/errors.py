"""The one exception that reaches a user: a line that says what is wrong and a hint that says what to do."""

# Characters of a message; what is quoted in one may be a file's whole contents.
_LONGEST = 2000


class SlmError(Exception):
    """Something the user can act on. The command line prints it without a traceback and exits with 1.

    Args:
        message: One line, in lower case, that names the file or the value at fault.
        hint: What to do about it, in one line.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _one_line(message)
        self.hint = None if hint is None else _one_line(hint)
        super().__init__(self.message)


def _one_line(text: str) -> str:
    """Returns text that a terminal shows as it stands: what messages quote comes from files that anybody may have written."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
