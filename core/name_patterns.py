"""Regular expressions from an adapter's file, matched with the names of modules in bounded time.

PEFT matches them with Python's `re`, which takes exponential time for some. Here the Rust engine that pydantic ships matches
them, in time linear in the name. It has no look-around: an expression that needs some goes to Python's `re`, if it is simple
enough to be quick.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from pydantic_core import SchemaError, SchemaValidator, core_schema

from slm.core.errors import SlmError

# More than an adapter of the largest model has modules, and longer than an expression that people write.
MAX_PATTERNS, MAX_PATTERN_CHARACTERS = 2_000, 2_000
# In an expression for Python's `re`: with so many and a name as long as modules have, a match takes a tenth of a second.
_MOST_REPETITIONS = 5

_T = TypeVar("_T")


def by_pattern(patterns: Mapping[str, _T], names: Iterable[str], where: str) -> dict[str, _T]:
    """Returns the value of the first pattern that matches each name, for the names that one matches.

    As PEFT's `get_pattern_key`: a pattern matches a whole name, or what follows some "." in it.

    Args:
        patterns: Values by regular expression.
        names: The names.
        where: The field that has the patterns, for messages.

    Raises:
        SlmError: When a pattern is no regular expression, may take very long, or there are too many.
    """
    if len(patterns) > MAX_PATTERNS:
        raise SlmError(f"{where} has {len(patterns):,} patterns, at most {MAX_PATTERNS:,}")
    matchers = [(_Matcher(pattern, where), value) for pattern, value in patterns.items()]
    found: dict[str, _T] = {}
    for name in names:
        for matcher, value in matchers:
            if matcher.matches(name):
                found[name] = value
                break
    return found


class _Matcher:
    def __init__(self, pattern: str, where: str) -> None:
        if len(pattern) > MAX_PATTERN_CHARACTERS:
            raise SlmError(
                f"{where}: a regular expression has {len(pattern):,} characters, at most {MAX_PATTERN_CHARACTERS:,}"
            )
        whole = rf"(.*\.)?({pattern})$"
        try:
            self._python = re.compile(whole)
        except (re.error, RecursionError, OverflowError) as error:
            raise SlmError(f"{where}: {pattern!r} is no regular expression ({error})") from None
        self._rust: SchemaValidator | None = None
        try:
            schema = core_schema.str_schema(pattern=rf"\A(?:{whole})", regex_engine="rust-regex")
            self._rust = SchemaValidator(schema)
        except SchemaError:
            repetitions = re.findall(r"[*+{]|(?<![*+}(])[?]", pattern)
            if len(repetitions) > _MOST_REPETITIONS or re.search(r"[)][*+{]", pattern):
                raise SlmError(
                    f"{where}: the regular expression {pattern!r} may take very long",
                    "name the modules, or leave look-around and back-references out",
                ) from None

    def matches(self, name: str) -> bool:
        if self._rust is not None:
            return self._rust.isinstance_python(name)
        return self._python.match(name) is not None
