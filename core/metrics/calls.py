"""The metric of tool calls: names and all arguments equal as JSON values, in any order of the calls."""

from collections import Counter
from collections.abc import Sequence

from slm.core.tools import Call, Style, canonical, parsed_calls


def calls_of(reply: str, style: Style) -> list[Call] | None:
    """Returns the calls of a reply; None if it begins a call that is not valid.

    Args:
        reply: The reply, with the marks of calls.
        style: How the reply spells calls.
    """
    text, calls = parsed_calls(reply, style)
    return None if style.opening in text else calls


def same_calls(expected: Sequence[Call], given: Sequence[Call]) -> bool:
    """Returns whether both have the same calls, each as often: the same names, and arguments of equal JSON values."""
    return Counter(map(canonical, expected)) == Counter(map(canonical, given))


def same_names(expected: Sequence[Call], given: Sequence[Call]) -> bool:
    """Returns whether both call the same tools, each as often."""
    return Counter(call.name for call in expected) == Counter(call.name for call in given)
