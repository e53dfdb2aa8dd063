"""Checks of the fields of a `tokenizer.json`, and the totals over all of its components, with their limits."""

from collections.abc import Callable, Mapping
from typing import Any

from slm.core.tokenizer_regex import Slow, linear_regex

# Bytes of the file. Gemma's has 33 MB.
MAX_BYTES = 64 << 20
# How many bytes normalizers and pre-tokenizers can make of one byte of text, and decoders of one byte of a token. Gemma: 3,
# Llama 2: 12, T5: 33, ALBERT: 182. A chain of rules that each double the text would exceed any limit.
MAX_GROWTH = 256
MAX_DECODED_GROWTH = 16
# The limit for pre-tokenizers, whose parts take a kilobyte each. A space before each part counts as 2, Metaspace as 4.
MAX_PRE_TOKENIZED_GROWTH = 16
MAX_COMPONENTS = 128
MAX_NESTING = 8
# The most steps of all regular expressions at one position of a text.
MAX_REGEX_WORK = 4096
# The longest token, and the longest text that a component adds, in characters.
MAX_TOKEN = 1024
MAX_INSERT = 256

Check = Callable[[Any, str], Any]


class Unsupported(ValueError):
    """The reason why a file is rejected, as the end of a sentence."""


class Budget:
    """The totals over all components of a file, with their limits."""

    def __init__(self) -> None:
        self.components = self.work = self.template_tokens = 0
        self.growth = self.growth_later = self.pre_tokenized_growth = self.decoded_growth = 1.0

    def component(self, depth: int) -> None:
        """Counts a component at a depth of nesting."""
        self.components += 1
        if self.components > MAX_COMPONENTS or depth > MAX_NESTING:
            raise Unsupported(f"more than {MAX_COMPONENTS} components, or nested more than {MAX_NESTING} deep")

    def grow(self, factor: float, later: bool = False) -> None:
        """Multiplies the growth of a text; `later` if the factor applies after normalization of the whole text."""
        self.growth *= factor
        self.growth_later *= factor if later else 1.0
        if self.growth > MAX_GROWTH:
            raise Unsupported(f"its rules can make a text more than {MAX_GROWTH} times as long")

    def grow_pre_tokenized(self, factor: float) -> None:
        """Multiplies the growth that pre-tokenizers cause."""
        self.grow(factor, later=True)
        self.pre_tokenized_growth *= factor
        if self.pre_tokenized_growth > MAX_PRE_TOKENIZED_GROWTH:
            raise Unsupported(f"its pre-tokenizers can make a text more than {MAX_PRE_TOKENIZED_GROWTH} times as long")

    def grow_decoded(self, factor: float) -> None:
        """Multiplies the growth that decoders cause."""
        self.decoded_growth *= factor
        if self.decoded_growth > MAX_DECODED_GROWTH:
            raise Unsupported(f"its decoders can make a text more than {MAX_DECODED_GROWTH} times as long")

    def regex(self, expression: Any, where: str) -> tuple[str, int]:
        """Returns the expression to run, and the smallest number of bytes that it matches."""
        try:
            linear = linear_regex(as_text(expression, f"{where}: pattern", 1 << 16))
        except Slow as error:
            raise Unsupported(
                f"{where}: the regular expression {str(expression)[:80]!r} is rejected: {error}"
            ) from None
        self.work += linear.work
        if self.work > MAX_REGEX_WORK:
            raise Unsupported("its regular expressions together take too long")
        return linear.expression, linear.shortest


def as_object(value: Any, what: str) -> Mapping[str, Any]:
    """Returns a JSON object; `what` names it in the error."""
    if not isinstance(value, dict):
        raise Unsupported(f"{what} is not an object")
    return value


def as_list(value: Any, what: str, longest: int) -> list[Any]:
    """Returns a list of at most `longest` entries."""
    if not isinstance(value, list) or len(value) > longest:
        raise Unsupported(f"{what} is not a list of at most {longest:,} entries")
    return value


def as_text(value: Any, what: str, longest: int = MAX_INSERT) -> str:
    """Returns a string of at most `longest` characters."""
    if not isinstance(value, str) or len(value) > longest:
        raise Unsupported(f"{what} is not a string of at most {longest:,} characters")
    return value


def as_number(value: Any, what: str, most: int) -> int:
    """Returns a whole number from 0 to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise Unsupported(f"{what} is not a number from 0 to {most:,}")
    return value


def as_character(value: Any, what: str) -> str:
    """Returns a string of one character."""
    if len(as_text(value, what, 1)) != 1:
        raise Unsupported(f"{what} is not one character")
    return str(value)


def one_of(options: tuple[str, ...]) -> Callable[[Any, str], str]:
    """Returns a check for a choice among options."""

    def check(value: Any, what: str) -> str:
        # The library also accepts "merged_with_previous" for MergedWithPrevious.
        if not isinstance(value, str) or value.replace("_", "").lower() not in [each.lower() for each in options]:
            raise Unsupported(f"{what} must be one of {', '.join(options)}")
        return value

    return check


def as_flag(value: Any, what: str) -> bool | None:
    """Returns true, false or None."""
    if value is not None and not isinstance(value, bool):
        raise Unsupported(f"{what} is not true or false")
    return value


def fields_of(kind: str, value: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """Returns a component with its listed fields, each validated."""
    kept = {name: check(value[name], f"{kind}: {name}") for name, check in checks.items() if name in value}
    return {"type": kind, **kept}


def kind_of(value: Any, what: str, known: Mapping[str, Any]) -> str:
    """Returns the type of a component, which must be a known one."""
    kind = as_object(value, what).get("type")
    if not isinstance(kind, str) or kind not in known:
        raise Unsupported(f"the {what} type {kind!r} is not supported")
    return kind


def members_of(kind: str, value: Mapping[str, Any], name: str, make: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns a sequence of components, each validated by `make`."""
    return {"type": kind, name: [make(each) for each in as_list(value.get(name), f"{kind}: {name}", MAX_COMPONENTS)]}


def pattern_of(value: Any, where: str, budget: Budget) -> tuple[dict[str, str], int]:
    """Returns a pattern, and the smallest number of bytes that it matches."""
    value = as_object(value, f"{where}: pattern")
    if set(value) == {"String"}:
        text = as_text(value["String"], f"{where}: pattern")
        if not text:
            raise Unsupported(f"{where}: the pattern is empty")
        return {"String": text}, utf8_length(text)
    if set(value) == {"Regex"}:
        expression, shortest = budget.regex(value["Regex"], where)
        return {"Regex": expression}, shortest
    raise Unsupported(f"{where}: the pattern is neither String nor Regex")


def utf8_length(text: str) -> int:
    """Returns the number of bytes of a text in UTF-8; lone surrogates count as three."""
    return len(text.encode("utf-8", "surrogatepass"))


def replace_of(value: Mapping[str, Any], budget: Budget) -> tuple[dict[str, Any], float]:
    """Returns a Replace component, and the factor by which it can lengthen a text."""
    pattern, shortest = pattern_of(value.get("pattern"), "Replace", budget)
    content = as_text(value.get("content"), "Replace: content")
    # An empty match is replaced before every character.
    growth = 1.0 + utf8_length(content) if shortest == 0 else max(1.0, utf8_length(content) / shortest)
    return {"type": "Replace", "pattern": pattern, "content": content}, growth
