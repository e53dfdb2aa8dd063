"""Metrics of JSON: a strict parser, equality of JSON values, and F1 of their fields."""

import json
from collections import Counter
from collections.abc import Hashable, Iterator
from decimal import Decimal
from typing import Any

# The deepest nesting of a value that is compared.
_DEEPEST = 200


class NotJson(ValueError):
    """The text is not one JSON value."""


def parsed_json(text: str) -> Hashable:
    """Returns the canonical form of a JSON text; equal forms are equal JSON values.

    The whole text must be one value (RFC 8259). NaN, Infinity and objects with a repeated name are rejected.

    Raises:
        NotJson: If the text is not JSON, or is nested too deep to be compared.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_rejected, parse_float=Decimal)
        return canonical(value)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise NotJson("nested too deep" if isinstance(error, RecursionError) else str(error)) from None


def canonical(value: Any, depth: int = 0) -> Hashable:
    """Returns a hashable form of a JSON value: objects without order, 1 equal to 1.0, and true different from 1.

    Args:
        value: The value, as `json.loads` returns it.
        depth: The number of arrays and objects around it.

    Raises:
        ValueError: If the value is nested too deep.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    match value:
        case dict():
            return "object", frozenset((name, canonical(each, depth + 1)) for name, each in value.items())
        case list() | tuple():
            return "array", tuple(canonical(each, depth + 1) for each in value)
        case str():
            return "text", value
        case bool() | None:
            return "constant", value
    return "number", value


def fields_f1(expected: Hashable, given: Hashable) -> float:
    """Returns the F1 of the fields of two canonical values. A field is a path and the value there that has no parts.

    An empty object or array is one field.
    """
    ours, theirs = (Counter(_fields(value)) for value in (expected, given))
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _fields(value: Any, path: tuple[Hashable, ...] = ()) -> Iterator[Hashable]:
    kind, content = value
    if kind in ("object", "array") and content:
        for name, each in content if kind == "object" else enumerate(content):
            yield from _fields(each, (*path, name))
    else:
        yield path, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object repeats a name")
    return found


def _rejected(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
