"""The one exception that reaches a user: a line that says what is wrong and a hint that says what to do."""


class SlmError(Exception):
    """Something the user can act on. The command line prints it without a traceback and exits with 1.

    Args:
        message: One line, in lower case, that names the file or the value at fault.
        hint: What to do about it, in one line.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
