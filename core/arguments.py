"""Wrong calls from Python: an unknown keyword names the one that was probably meant."""

import inspect
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Number
from typing import ParamSpec, TypeVar

from slm.core.errors import ArgumentError

_P = ParamSpec("_P")
_T = TypeVar("_T")

# What numbers of 32 bits hold: lengths in tokens, rows and the like have no smaller limit that is the same for every model.
MAX_COUNT = 2**31 - 1

# Characters of a value that a message quotes.
_SHOWN = 40

# What other libraries call the same things, too far from our names for spelling to find them.
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
    """Makes sure that a function knows its keyword arguments.

    Args:
        function: Its name, for the message.
        given: The keywords of the call.
        known: Those that the function takes.

    Raises:
        ArgumentError: When it does not know one; the hint names the one that was probably meant.
    """
    for name in given:
        if name not in known:
            raise ArgumentError(f"{function}() has no argument {name!r}", _hint(name, known))


def keywords_checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a function that is called with the keywords of its signature alone; see `check_keywords`."""
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
    """Makes sure that an argument has one of some types; a `bool` passes for no number.

    Raises:
        ArgumentError: When it does not; the message says what is wanted.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ArgumentError(f"{name} is {described(value)}; it must be {wanted}")


def is_whole(value: object, least: int, most: int) -> bool:
    """Says whether a value is a whole number, NumPy's too, within bounds."""
    return isinstance(value, Integral) and least <= int(value) <= most


def described(value: object) -> str:
    """Returns a value in a few words, for messages: its type, and of a number or a short text the value."""
    if value is None:
        return "None"
    kind = type(value).__name__
    shown = repr(value) if isinstance(value, str | bytes | Number) else ""
    return f"{kind} {shown}" if 0 < len(shown) <= _SHOWN else f"a {kind}"
