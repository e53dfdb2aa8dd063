"""Other people's chat templates, rendered so that a bad one costs no more than its own answer.

A template is a program in Jinja that comes with a model. It runs in Jinja's sandbox, which keeps it from Python's insides,
and under limits on its length, its time and every text it makes, which keep it from taking the machine.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from slm.core.errors import SlmError

MAX_TEMPLATE_CHARACTERS = 64 << 10
# Of any text that a template makes, its output included.
MAX_TEXT_CHARACTERS = 4 << 20
MAX_SECONDS = 2.0
MAX_INDENT = 64

# What chat templates use; others of Jinja's make long texts of short ones, or lead nowhere here.
_FILTERS = (
    *("batch", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select", "selectattr"),
    *("slice", "sort", "string", "sum", "title", "trim", "unique", "upper"),
)
# Methods of texts whose result may be longer than what goes in.
_GROWING = frozenset(("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"))


# Of which Jinja's sandbox makes functions of its own.
_WRAPPED = frozenset(("format", "format_map"))


class _TemplateRefused(Exception):
    """What a template may not do, or what it says of the conversation."""


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> str:
    """Renders a conversation and the beginning of the model's turn.

    Args:
        template: The template, as transformers understands it.
        messages: What was said: "role" and "content".
        tokens: Special tokens by the names that templates use, such as "bos_token".

    Raises:
        SlmError: When the template is wrong, refuses the conversation or passes a limit.
    """
    hint = "the chat template came with the model; without --instruct it is not used"
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise SlmError(f"the chat template has {len(template):,} characters, at most {MAX_TEMPLATE_CHARACTERS:,}", hint)
    try:
        compiled = _environment().from_string(template)
        # Nothing of the sandbox bounds how long loops run; a look at the clock at each line does.
        with _Deadline(MAX_SECONDS):
            pieces = compiled.generate(messages=list(messages), add_generation_prompt=True, tools=None, **tokens)
            return _joined("", pieces)
    except (_TemplateRefused, TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise SlmError(f"the chat template failed: {' '.join(str(error).split())}", hint) from None
    except (RecursionError, MemoryError) as error:
        raise SlmError(f"the chat template failed: {type(error).__name__}", hint) from None


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with texts that cannot grow without bound."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes left operator right unless the result would be large."""
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_length(len(left) + len(right))
        elif operator == "**":
            raise _TemplateRefused("powers are not for chat templates")
        elif operator != "+" and not all(isinstance(side, int | float) for side in (left, right)):
            raise _TemplateRefused(f"the operator {operator} is for numbers alone")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method unless it makes long texts of short ones."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return _joined(owner, *args)
        if name in _WRAPPED or (isinstance(owner, str) and name in _GROWING):
            raise _TemplateRefused(f"str.{name} is not for chat templates")
        if isinstance(owner, str) and name == "replace":
            return _replaced(owner, *args)
        return super().call(context, obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parses a template; a ~ b becomes a + b of texts, which is counted."""
        tree = super()._parse(source, name, filename)
        for concat in list(tree.find_all(nodes.Concat)):
            texts = [nodes.Filter(node, "string", [], [], None, None, lineno=concat.lineno) for node in concat.nodes]
            concat.nodes = [_sum(texts)]
        tree.set_environment(self)
        return tree


def _sum(texts: Sequence[nodes.Expr]) -> nodes.Expr:
    first, *rest = texts
    total: nodes.Expr = first
    for text in rest:
        total = nodes.Add(total, text, lineno=text.lineno)
    return total


def _environment() -> SandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters = {name: environment.filters[name] for name in _FILTERS} | {
        "tojson": _tojson,
        "join": lambda items, separator="": _joined(separator, items),
        "replace": _replaced,
        "indent": _indented,
    }
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": environment.globals["namespace"],
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _raise(message: str) -> NoReturn:
    raise _TemplateRefused(message)


def _check_length(length: int) -> None:
    if length > MAX_TEXT_CHARACTERS:
        raise _TemplateRefused(f"it makes a text of more than {MAX_TEXT_CHARACTERS:,} characters")


def _joined(separator: str, items: Iterable[Any]) -> str:
    texts, length = [], 0
    for item in items:
        texts.append(str(item))
        length += len(texts[-1]) + len(separator)
        _check_length(length)
    return separator.join(texts)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old)
    _check_length(len(text) + (found if count is None or count < 0 else min(found, count)) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indented(text: str, width: int = 4, first: bool = False) -> str:
    if not isinstance(width, int) or width > MAX_INDENT:
        raise _TemplateRefused(f"an indent of more than {MAX_INDENT}")
    _check_length(len(text) + width * (text.count("\n") + 1))
    return (" " * width if first else "") + text.replace("\n", "\n" + " " * width)


def _tojson(value: Any, indent: int | None = None) -> str:
    if indent is not None and (not isinstance(indent, int) or indent > MAX_INDENT):
        raise _TemplateRefused(f"an indent of more than {MAX_INDENT}")
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Deadline:
    """Ends what runs inside it when its time is over, at the next line of Python."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(partial(self._look, end=time.monotonic() + self._seconds))

    def __exit__(self, *failure: object) -> None:
        sys.settrace(self._before)

    def _look(self, frame: FrameType, event: str, argument: Any, end: float) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise _TemplateRefused(f"it takes longer than {self._seconds:g} s")
        return partial(self._look, end=end)
