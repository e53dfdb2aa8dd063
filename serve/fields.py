"""The rules of request objects, and the types of their fields.

Each object has three lists. Understood fields are pydantic's. Fields that cannot change the completion are accepted, and
named in a debug line of the log. Fields that would change it are rejected with the reason, unless their value is neutral.
`null` always means that a field is absent.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# A stop text longer than most completions never matches.
LONGEST_STOP = 1024
MOST_BIASES = 1024
# The longest context of any Gemma 3.
MOST_IDS = 1 << 17
# The most characters of an unknown field's name that a message quotes.
_QUOTED = 100

log = logging.getLogger("slm.serve")


@dataclass(frozen=True)
class Unsupported:
    """A field that would change the completion.

    Attributes:
        why: The reason for rejection.
        neutral: Values without an effect, which are accepted.
    """

    why: str
    neutral: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Returns whether a value has no effect."""
        return any(type(value) is type(each) and value == each for each in self.neutral)


def wrong(why: str, field: str | None = None, kind: str = "unsupported") -> PydanticCustomError:
    """Returns the error for a field of the current object; `slm.serve.errors` adds the field's name to the path."""
    return PydanticCustomError(kind, "{why}", {"why": why, "field": field})


def _quoted(name: str) -> str:
    """Returns a field's name, truncated and printable for a message."""
    return name[:_QUOTED].encode(errors="replace").decode()


def _whole(text: str) -> str:
    """Rejects unpaired surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has an unpaired surrogate") from None
    return text


def _integral(value: Any) -> Any:
    """Accepts 16.0 as 16: JSON has one type of number, and some clients write all numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integral_ids(value: Any) -> Any:
    """Accepts token ids that are written as floats."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [_integral(each) for each in value]
    return value


def biases(value: Any) -> Any:
    """Checks a bias by token, up to the first invalid one; null means no bias."""
    if not isinstance(value, dict):
        return value
    value = {token: bias for token, bias in value.items() if bias is not None}
    if len(value) > MOST_BIASES:
        raise wrong(f"at most {MOST_BIASES:,} tokens can have a bias, not {len(value):,}")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 9):
            raise wrong("the name must be a token id", _quoted(token))
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("the bias must be a number from -100 to 100", token)
    return value


UnicodeText = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[UnicodeText, Field(min_length=1, max_length=LONGEST_STOP)]
# Separate from the bounds of each integer: a validator around the whole field would hide them in the description.
INTEGRAL = BeforeValidator(_integral)
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[
    list[TokenId], Field(min_length=1, max_length=MOST_IDS, fail_fast=True), BeforeValidator(_integral_ids)
]
Limit = Annotated[int, Field(ge=1), INTEGRAL]
Bias = Annotated[float, Field(ge=-100, le=100)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


def _listed(schema: dict[str, Any], kind: "type[ApiObject]") -> None:
    """Adds the fields of the other two lists, and null for absent fields, to an object's description."""
    properties = schema.setdefault("properties", {})
    schema["additionalProperties"] = {"type": "null"}
    if kind.forms:
        schema["anyOf"] = list(kind.forms)
    for name in sorted(kind.harmless):
        properties[name] = {"description": "Accepted and ignored: it does not change the answer."}
    for name, field in kind.unsupported.items():
        properties[name] = {"description": f"Not supported: {field.why}.", "enum": [*field.neutral, None]}


class ApiObject(BaseModel):
    """An object of a request, with its three lists of fields. Pydantic's fields are the first list.

    Attributes:
        harmless: The fields that are accepted and ignored, by name.
        unsupported: The fields that are rejected, by name, unless their value is neutral.
        forms: JSON schemas, at least one of which must match; used only in the description.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_listed)

    harmless: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    forms: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _sorted_out(cls, data: Any) -> Any:
        """Returns the understood fields. Rejects the first unknown or unsupported one."""
        if not isinstance(data, dict):
            return data
        understood, ignored = {}, []
        for name, value in data.items():
            if value is None:
                continue
            if name in _names(cls):
                understood[name] = value
            elif name in cls.harmless:
                ignored.append(name)
            elif name not in cls.unsupported:
                raise wrong(_unknown(name, cls), _quoted(name))
            elif not cls.unsupported[name].accepts(value):
                raise wrong(cls.unsupported[name].why, name)
        if ignored:
            log.debug(json.dumps({"object": cls.__name__, "ignored": ignored}))
        return understood


def _names(kind: type[BaseModel]) -> frozenset[str]:
    """Returns the names of the fields that an object understands, as spelled in JSON."""
    found = _NAMES.get(kind)
    if found is None:
        found = frozenset(field.alias or name for name, field in kind.model_fields.items())
        _NAMES[kind] = found
    return found


def _unknown(name: str, kind: "type[ApiObject]") -> str:
    meant = get_close_matches(name[:_QUOTED], [*_names(kind), *kind.harmless], 1, 0.8)
    return f"unknown field; did you mean {meant[0]}?" if meant else "unknown field"


_NAMES: dict[type[BaseModel], frozenset[str]] = {}
