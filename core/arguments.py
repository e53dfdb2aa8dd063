"""Checks of keyword arguments and their types; an unknown keyword suggests the closest valid one."""

import inspect
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Number
from typing import ParamSpec, TypeVar

from slm.core.errors import ArgumentError

_P = ParamSpec("_P")
_T = TypeVar("_T")

# The largest 32-bit integer: a limit for counts such as tokens and rows where no smaller limit holds for every model.
MAX_COUNT = 2**31 - 1

# The longest value that a message quotes, in characters.
_SHOWN = 40

# Names of the same arguments in other libraries. Their spelling is too different for a suggestion by similarity.
_ELSEWHERE = {
    **dict.fromkeys(("max_length", "max_completion_tokens", "n_predict", "num_predict", "n"), "max_new_tokens"),
    **dict.fromkeys(("until", "eos", "stop_strings", "stop_sequences"), "stop"),
    **dict.fromkeys(("random_state", "random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("do_sample", "greedy", "sample"), "temperature"),
    **dict.fromkeys(("repeat_penalty",), "repetition_penalty"),
    **dict.fromkeys(("num_threads", "n_threads", "intra_op_num_threads"), "threads"),
    **dict.fromkeys(("provider", "providers", "device_map"), "device"),
    **dict.fromkeys(("model", "model_path", "checkpoint", "bundle"), "path"),
    **dict.fromkeys(("lora", "peft"), "adapter"),
    **dict.fromkeys(("instructions", "system_prompt"), "system"),
    **dict.fromkeys(("history", "conversation"), "messages"),
}


def check_keywords(function: str, given: Collection[str], known: Collection[str]) -> None:
    """Checks that a function has every keyword argument of a call.

    Args:
        function: The function's name, for the message.
        given: The keywords of the call.
        known: The function's keywords.

    Raises:
        ArgumentError: If a keyword is unknown; the hint suggests the closest valid one.
    """
    for name in given:
        if name not in known:
            raise ArgumentError(f"{function}() has no argument {name!r}", _hint(name, known))


def keywords_checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a function so that unknown keyword arguments raise an error with a hint; see `check_keywords`."""
    takes = inspect.signature(function).parameters.values()
    known = [each.name for each in takes if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]

    @wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        check_keywords(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return checked


def _hint(name: str, known: Collection[str]) -> str:
    there = sorted(each for each in known if each != "self")
    meant = _ELSEWHERE.get(name.lower())
    if meant not in there:
        plain = {each.replace("_", ""): each for each in there}
        close = get_close_matches(name.lower().replace("_", ""), plain, 1)
        meant = plain[close[0]] if close else None
    if meant is None:
        return f"the arguments are {', '.join(there)}"
    return "temperature=0 is greedy" if meant == "temperature" and name in _ELSEWHERE else f"did you mean {meant}?"


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Checks the type of an argument; `bool` does not count as a number.

    Raises:
        ArgumentError: If the type is wrong; the message says what is wanted.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ArgumentError(f"{name} is {described(value)}; it must be {wanted}")


def is_whole(value: object, least: int, most: int) -> bool:
    """Returns whether a value is an integer (Python or NumPy) from `least` to `most`."""
    return isinstance(value, Integral) and least <= int(value) <= most


def described(value: object) -> str:
    """Returns a short description of a value for messages: its type and, for numbers and short strings, the value."""
    if value is None:
        return "None"
    kind = type(value).__name__
    shown = repr(value) if isinstance(value, str | bytes | Number) else ""
    return f"{kind} {shown}" if 0 < len(shown) <= _SHOWN else f"a {kind}"
