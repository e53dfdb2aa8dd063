"""Matches an adapter's regular expressions with module names in bounded time.

PEFT uses Python's `re`, which takes exponential time for some expressions. Here the Rust engine that pydantic includes
matches in time linear in the name. It has no look-around: an expression with look-around uses Python's `re`, if it is simple
enough. Repetitions with a count are limited too, because each compiles to that many copies.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from pydantic_core import SchemaError, SchemaValidator, core_schema

from slm.core.errors import SlmError

# Higher than the number of modules in the largest model, and longer than expressions that people write.
MAX_PATTERNS, MAX_PATTERN_CHARACTERS, MAX_CHARACTERS = 2_000, 2_000, 200_000
# Patterns with a count ("{3}") take up to 50 ms to compile; patterns with look-around take 2 ms for each name.
_MOST_COUNTED, _MOST_IN_PYTHON = 20, 8
# Repetitions in an expression with look-around: matching time grows with the length of a name to this power.
_MOST_REPETITIONS = 3

_T = TypeVar("_T")


def by_pattern(patterns: Mapping[str, _T], names: Iterable[str], where: str) -> dict[str, _T]:
    """Returns the value of the first pattern that matches each name; leaves out names that no pattern matches.

    Follows PEFT's `get_pattern_key`: a pattern matches a whole name, or the part of it after any ".".

    Args:
        patterns: Values by regular expression.
        names: Module names.
        where: The field that contains the patterns, for messages.

    Raises:
        SlmError: If a pattern is not a regular expression or may take very long, or there are too many.
    """
    _check_amount(patterns, where)
    left, in_python = list(names), 0
    found: dict[str, _T] = {}
    for pattern, value in patterns.items():
        matches = _linear_matcher(pattern, where)
        if matches is None:
            in_python += 1
            if in_python > _MOST_IN_PYTHON:
                raise SlmError(f"{where} has more than {_MOST_IN_PYTHON} patterns with look-around", _SIMPLER)
            matches = _python_matcher(pattern, where)
        hits = {name for name in left if matches(name)}
        found |= dict.fromkeys(hits, value)
        left = [name for name in left if name not in hits]
    return found


def whole_matches(pattern: str, names: Iterable[str], where: str) -> set[str] | None:
    """Returns the names that a regular expression matches completely, as Python's `re.fullmatch` does.

    Args:
        pattern: The expression.
        names: Module names.
        where: The field that contains the expression, for messages.

    Returns:
        The names; None if the expression is too long, or the linear engine does not support it.

    Raises:
        SlmError: If the pattern is not a regular expression.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return None
    matches = _compiled(rf"(?:{pattern})", where, pattern)
    return None if matches is None else {name for name in names if matches(name)}


_SIMPLER = "name the modules, or leave look-around and back-references out"


def _check_amount(patterns: Iterable[str], where: str) -> None:
    lengths = [len(pattern) for pattern in patterns]
    longest = max(lengths, default=0)
    if longest > MAX_PATTERN_CHARACTERS:
        raise SlmError(f"{where}: a pattern has {longest:,} characters; the limit is {MAX_PATTERN_CHARACTERS:,}")
    if len(lengths) > MAX_PATTERNS or sum(lengths) > MAX_CHARACTERS:
        raise SlmError(
            f"{where} has {len(lengths):,} patterns of {sum(lengths):,} characters; the limit is {MAX_PATTERNS:,} patterns"
            f" of {MAX_CHARACTERS:,} characters"
        )
    counted = sum("{" in pattern for pattern in patterns)
    if counted > _MOST_COUNTED:
        raise SlmError(f"{where} has {counted:,} patterns with counts; the limit is {_MOST_COUNTED}")


def _linear_matcher(pattern: str, where: str) -> Callable[[str], bool] | None:
    """Returns a function that matches a name in linear time, or None if the engine does not support the pattern."""
    return _compiled(_whole(pattern), where, pattern)


def _compiled(expression: str, where: str, pattern: str) -> Callable[[str], bool] | None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise SlmError(f"{where}: {pattern!r} is not a regular expression ({error})") from None
    try:
        schema = core_schema.str_schema(pattern=rf"\A(?:{expression})\z", regex_engine="rust-regex")
        return SchemaValidator(schema).isinstance_python
    except SchemaError:
        return None


def _python_matcher(pattern: str, where: str) -> Callable[[str], bool]:
    repetitions = re.findall(r"[*+{]|(?<![*+}(])[?]", pattern)
    if len(repetitions) > _MOST_REPETITIONS or re.search(r"[)][*+{]", pattern):
        raise SlmError(f"{where}: the regular expression {pattern!r} may take very long", _SIMPLER)
    compiled = re.compile(_whole(pattern))
    return lambda name: compiled.match(name) is not None


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
