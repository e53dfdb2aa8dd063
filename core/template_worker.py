"""The process that renders chat templates for `slm.core.template`, within limits of time and memory.

A request has a template and conversations; each conversation gets its own response. The process exits when its input closes,
so it never outlives the parent.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from slm.core.bounded import hello, receive, send
from slm.core.process_limits import Limit, forbid_writing, limit_memory, prepare_timer, start_timer, stop_timer
from slm.core.processes import peak_rss_mib

# Address space of the process, of which Python and Jinja take a tenth.
MAX_BYTES = 512 << 20
# The limit of a rendered text, which is longer than any model's context.
MAX_TEXT_CHARACTERS = 4 << 20
# The limit of a template's error message, in characters.
_MAX_REASON = 200
# The number of compiled templates to keep. A process serves one model or a few.
_COMPILED = 8
# Resident memory that marks the process for replacement: Python does not return the memory of a large rendering.
_LARGE_MIB = 192


class _Refused(Exception):
    """A template's error for a conversation."""


def work() -> None:
    """Runs the process: renders conversations until its input closes."""
    enforced: list[Limit] = ["memory"] if limit_memory(MAX_BYTES) else []
    forbid_writing()
    enforced += ["time"] if prepare_timer() else []
    import jinja2.sandbox  # noqa: F401  # here, so that the first request does not spend its time on the import

    hello(enforced)
    while (message := receive()) is not None:
        request = json.loads(message)
        for messages, begins, tools in request["conversations"]:
            start_timer(request["seconds"], request["wall_seconds"])
            answer = _answer(request["template"], messages, begins, {"tools": tools, **request["tokens"]})
            answer |= {"large": peak_rss_mib() > _LARGE_MIB}
            send(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            stop_timer()
    os._exit(0)


def _answer(
    template: str, messages: Sequence[Mapping[str, Any]], begins: bool, variables: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return {"text": _rendered(_compiled(template), messages, begins, variables)}
    except Exception as error:  # templates can raise any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"reason": reason[:_MAX_REASON]}


def _rendered(template: Any, messages: Sequence[Mapping[str, Any]], begins: bool, variables: Mapping[str, Any]) -> str:
    text: str = template.render(messages=messages, add_generation_prompt=begins, documents=None, **variables)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise _Refused(f"the rendered text has more than {MAX_TEXT_CHARACTERS:,} characters")
    return text


@lru_cache(_COMPILED)
def _compiled(template: str) -> Any:
    """Compiles a template in the same environment as transformers."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Supports `{% generation %}`, which marks model turns for transformers' masks; renders its body unchanged."""

        tags = {"generation"}  # noqa: RUF012  # declared as in Jinja's own extensions

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            text: str = caller()
            return text

    class Names(Namespace):
        """Jinja's `namespace` without underscore attributes: Jinja's sandbox does not check assignments."""

        def __init__(*args: Any, **values: Any) -> None:  # a template may use the keyword in namespace(self=...)
            found = dict(*args[1:], **values)
            for name in found:
                _check_attribute(name)
            Namespace.__init__(args[0], found)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_attribute(name)
            super().__setitem__(name, value)

    def _check_attribute(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not have the attribute {name[:80]!r}")

    class Dict:
        """Jinja's `dict` as an object with two methods: the class itself would expose its attributes."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "dict": Dict(),
        "namespace": Names,
        "raise_exception": _refuse,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON as transformers' templates expect it; Jinja's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
