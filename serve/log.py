"""The log: one JSON object per line with a timestamp, without prompts and completions."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.types import Scope

from slm.runtime.generation import Generation, Result
from slm.serve.tracebacks import frames_of

log = logging.getLogger("slm.serve")

# Library messages are truncated to so many characters, and a repeated message is logged once per so many seconds.
_MESSAGE = 200
_AGAIN_S = 10.0

# Paths are truncated to so many characters.
_PATH = 200
# The key of a request's record in its ASGI scope.
_KEY = "slm.record"


@dataclass
class Record:
    """The completions of a request, for its log line.

    Attributes:
        model: The server's name of the model that the request uses.
        prompt_tokens: Tokens of all prompts.
        texts: The texts of the completions.
        ended: Their results by index, added as they end.
    """

    model: str | None = None
    prompt_tokens: int | None = None
    texts: Sequence[Generation] = ()
    ended: Mapping[int, Result] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Returns the fields of the log line: the tokens so far, and each finish reason once."""
        if self.model is None:
            return {}
        reasons = {str(result.stopped) for result in self.ended.values()}
        if len(self.ended) < len(self.texts):
            reasons.add("cancelled")
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(len(text.tokens) for text in self.texts),
            "finish_reason": ",".join(sorted(reasons)),
        }


class JsonLines(logging.Formatter):
    """Formats each record as one line. Omits tracebacks of libraries, which may quote a text."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        if record.name == log.name:
            return record.getMessage()
        fields: dict[str, Any] = {"logger": record.name, "message": _one_line(record.getMessage())}
        if record.exc_info and record.exc_info[1] is not None:
            fields |= {"error": type(record.exc_info[1]).__name__, "at": frames_of(record.exc_info[1])}
        return _line(fields)


class Seldom(logging.Filter):
    """Limits how often a library repeats one message: failures of accept() can occur thousands of times a second."""

    def __init__(self, every_s: float = _AGAIN_S) -> None:
        super().__init__()
        self._every_s = every_s
        self._last: dict[tuple[str, object, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is logged."""
        if record.name == log.name:
            return True
        key, now = (record.name, record.pathname, record.lineno), time.monotonic()
        if now - self._last.get(key, -self._every_s) < self._every_s:
            return False
        self._last[key] = now
        return True


def configure() -> None:
    """Sends every log line of this process to standard error as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(Seldom())
    logging.raiseExceptions = False  # a closed log must not stop the server
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def write(level: int = logging.INFO, **fields: Any) -> None:
    """Logs a line with the time in UTC in the format of RFC 3339. Omits fields that are None."""
    log.log(level, _line({name: value for name, value in fields.items() if value is not None}))


def open_record(scope: Scope) -> Record:
    """Returns a new record of a request; `record_answers` fills it in."""
    record = scope[_KEY] = Record()
    return record


def record_answers(
    scope: Scope, model: str, prompts: Sequence[Sequence[int]], texts: Sequence[Generation], ended: Mapping[int, Result]
) -> None:
    """Fills in the record of a request once its texts are submitted."""
    record = scope.get(_KEY)
    if isinstance(record, Record):
        record.model, record.texts, record.ended = model, texts, ended
        record.prompt_tokens = sum(map(len, prompts))


def path_of(scope: Scope) -> str:
    """Returns the path of a request, truncated if it is long."""
    path = str(scope["path"])
    return path if len(path) <= _PATH else f"{path[:_PATH]}…"


def _line(fields: Mapping[str, Any]) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": now, **fields})


def _one_line(message: str) -> str:
    line = (message.splitlines() or [""])[0]
    return line if len(line) <= _MESSAGE else f"{line[:_MESSAGE]}…"
