"""Validates and rebuilds the components of a `tokenizer.json`: normalizers, pre-tokenizers, post-processors and decoders.

Each function takes a component of the file, adds its costs to the totals, and returns the component with known fields only.
"""

import base64
import binascii
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.tokenizer_fields import (
    MAX_BYTES,
    MAX_TOKEN,
    Budget,
    Check,
    Unsupported,
    as_character,
    as_flag,
    as_list,
    as_number,
    as_object,
    as_text,
    fields_of,
    kind_of,
    members_of,
    one_of,
    pattern_of,
    replace_of,
    utf8_length,
)

# The most tokens that a template adds to a text.
MAX_TEMPLATE_TOKENS = 64

_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_SCHEMES = ("first", "never", "always")

# Normalizers --------------------------------------------------------------------------------------------------------------

_NORMALIZERS: dict[str, tuple[float, Mapping[str, Check]]] = {
    # NFKC and NFKD turn the three bytes of U+FDFA into 33; NFC and NFD at most triple a character.
    "NFC": (3, {}),
    "NFD": (3, {}),
    "NFKC": (11, {}),
    "NFKD": (11, {}),
    "Lowercase": (1.5, {}),
    "StripAccents": (1, {}),
    "Nmt": (1, {}),
    "ByteLevel": (2, {}),
    "Strip": (1, {"strip_left": as_flag, "strip_right": as_flag}),
    "StripNormalizer": (1, {"strip_left": as_flag, "strip_right": as_flag}),
    "BertNormalizer": (
        6,
        {"clean_text": as_flag, "handle_chinese_chars": as_flag, "strip_accents": as_flag, "lowercase": as_flag},
    ),
    "Sequence": (1, {}),
    "Prepend": (1, {}),
    "Replace": (1, {}),
    "Precompiled": (1, {}),
}


def normalizer(value: Any, budget: Budget, depth: int = 0) -> dict[str, Any]:
    """Returns a validated normalizer and adds its costs to the totals."""
    budget.component(depth)
    kind = kind_of(value, "normalizer", _NORMALIZERS)
    match kind:
        case "Sequence":
            return members_of(kind, value, "normalizers", lambda each: normalizer(each, budget, depth + 1))
        case "Replace":
            made, growth = replace_of(value, budget)
            budget.grow(growth)
            return made
        case "Prepend":
            prefix = as_text(value.get("prepend"), "Prepend: prepend")
            # The prefix is put before each part between added tokens, which may be one byte long.
            budget.grow(1 + utf8_length(prefix), later=True)
            return {"type": kind, "prepend": prefix}
        case "Precompiled":
            packed = as_text(value.get("precompiled_charsmap"), "Precompiled: precompiled_charsmap", MAX_BYTES)
            budget.grow(charsmap_growth(packed))
            return {"type": kind, "precompiled_charsmap": packed}
    growth, checks = _NORMALIZERS[kind]
    budget.grow(growth)
    return fields_of(kind, value, checks)


def charsmap_growth(packed: str) -> float:
    """Returns how many bytes a SentencePiece character map can make of one byte.

    The map is a double array (https://github.com/s-yata/darts-clone) of the strings to replace, followed by the replacements,
    each of which ends with a zero byte.
    """
    try:
        data = base64.b64decode(packed, validate=True)
        (size,) = struct.unpack_from("<I", data)
        units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    except (binascii.Error, struct.error, ValueError):
        raise Unsupported("Precompiled: its character map is damaged") from None
    texts = data[4 + size :]
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise Unsupported("Precompiled: its texts are not UTF-8") from None
    if size % 4 or not len(units):
        raise Unsupported("Precompiled: its character map is damaged")
    return _growth_of(units, np.frombuffer(texts, np.uint8))


def _growth_of(units: NDArray[np.int64], texts: NDArray[np.uint8]) -> float:
    growth, depth, ends, length = 1.0, 0, np.flatnonzero(texts == 0), len(texts)
    seen = np.zeros(len(units), bool)
    nodes = np.array([0]) ^ _offsets(units[:1])
    while len(nodes):
        depth += 1
        if (nodes | 255).max() >= len(units):  # the library reads the child of any byte
            raise Unsupported("Precompiled: its character map is damaged")
        labels = np.arange(1, 256)
        children = (nodes[:, None] ^ labels).reshape(-1)
        labels = np.tile(labels, len(nodes))
        inside = children < len(units)
        children, labels = children[inside], labels[inside]
        there = (units[children] & (1 << 31 | 0xFF)) == labels
        found = np.unique(children[there])
        found = found[~seen[found]]
        seen[found] = True
        nodes = found ^ _offsets(units[found])
        leaves = nodes[(units[found] >> 8 & 1).astype(bool)]
        if leaves.size and leaves.max() >= len(units):
            raise Unsupported("Precompiled: its character map is damaged")
        values = units[leaves] & 0x7FFFFFFF
        if values.size and (values.max() >= length or (texts[values] >> 6 == 2).any()):  # 10xxxxxx: within a character
            raise Unsupported("Precompiled: its character map is damaged")
        stops = np.append(ends, length)[np.searchsorted(ends, values)]
        if values.size:
            growth = max(growth, float((stops - values).max()) / depth)
        nodes = np.unique(nodes)
    return growth


def _offsets(units: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = (units >> 10) << ((units & (1 << 9)) >> 6)
    return offsets


# Pre-tokenizers -----------------------------------------------------------------------------------------------------------

_METASPACE: Mapping[str, Check] = {
    "replacement": as_character,
    "str_rep": lambda value, what: as_text(value, what, 1),
    "prepend_scheme": one_of(_SCHEMES),
    "add_prefix_space": as_flag,
    "split": as_flag,
}
_BYTE_LEVEL: Mapping[str, Check] = {"add_prefix_space": as_flag, "trim_offsets": as_flag, "use_regex": as_flag}
_PRE_TOKENIZERS: dict[str, tuple[float, Mapping[str, Check]]] = {
    "BertPreTokenizer": (1, {}),
    "ByteLevel": (2, _BYTE_LEVEL),  # also covers a space before a part, which at most doubles it
    "CharDelimiterSplit": (1, {"delimiter": as_character}),
    "Metaspace": (4, _METASPACE),
    "Whitespace": (1, {}),
    "WhitespaceSplit": (1, {}),
    "Punctuation": (1, {"behavior": one_of(_BEHAVIORS)}),
    "Digits": (1, {"individual_digits": as_flag}),
    "UnicodeScripts": (1, {}),
    "FixedLength": (1, {"length": lambda value, what: max(1, as_number(value, what, 1 << 20))}),
    "Split": (1, {}),
    "Sequence": (1, {}),
}


def pre_tokenizer(value: Any, budget: Budget, depth: int = 0) -> dict[str, Any]:
    """Returns a validated pre-tokenizer and adds its costs to the totals."""
    budget.component(depth)
    kind = kind_of(value, "pre_tokenizer", _PRE_TOKENIZERS)
    if kind == "Sequence":
        return members_of(kind, value, "pretokenizers", lambda each: pre_tokenizer(each, budget, depth + 1))
    if kind == "Split":
        pattern, _ = pattern_of(value.get("pattern"), kind, budget)
        made = fields_of(kind, value, {"behavior": one_of(_BEHAVIORS), "invert": as_flag})
        return made | {"pattern": pattern}
    growth, checks = _PRE_TOKENIZERS[kind]
    budget.grow_pre_tokenized(growth)
    return fields_of(kind, value, checks)


# Post-processors ----------------------------------------------------------------------------------------------------------

_POST_PROCESSORS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel", "Sequence")


def post_processor(value: Any, budget: Budget, depth: int = 0) -> dict[str, Any]:
    """Returns a validated post-processor and adds its tokens to the totals."""
    budget.component(depth)
    kind = kind_of(value, "post_processor", dict.fromkeys(_POST_PROCESSORS))
    match kind:
        case "Sequence":
            return members_of(kind, value, "processors", lambda each: post_processor(each, budget, depth + 1))
        case "ByteLevel":
            return fields_of(kind, value, _BYTE_LEVEL)
        case "TemplateProcessing":
            return _template(value, budget)
    _count_template_tokens(budget, 2)
    marks: Mapping[str, Check] = {"sep": _mark, "cls": _mark}
    return fields_of(kind, value, {**marks, "trim_offsets": as_flag, "add_prefix_space": as_flag})


def _mark(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise Unsupported(f"{what} is not a token and its id")
    return [as_text(value[0], what, MAX_TOKEN), as_number(value[1], what, 2**32 - 1)]


def _count_template_tokens(budget: Budget, count: int) -> None:
    budget.template_tokens += count
    if budget.template_tokens > MAX_TEMPLATE_TOKENS:
        raise Unsupported(f"TemplateProcessing adds more than {MAX_TEMPLATE_TOKENS} tokens to a text")


def _template(value: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    tokens = _special_tokens(value.get("special_tokens", {}))
    made: dict[str, Any] = {"type": "TemplateProcessing"}
    for name, sequences in (("single", ["A"]), ("pair", ["A", "B"])):
        pieces = [_piece(each, tokens) for each in as_list(value.get(name), f"TemplateProcessing: {name}", 64)]
        texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
        if (name == "single" and texts != sequences) or any(texts.count(each) > 1 for each in texts):
            raise Unsupported(f"TemplateProcessing: {name} does not contain each text once")
        if name == "single":
            added = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
            _count_template_tokens(budget, sum(len(tokens[each]["ids"]) for each in added))
        made[name] = pieces
    return made | {"special_tokens": tokens}


def _special_tokens(value: Any) -> dict[str, Any]:
    given = as_object(value, "TemplateProcessing: special_tokens")
    if len(given) > MAX_TEMPLATE_TOKENS:
        raise Unsupported("TemplateProcessing: special_tokens has too many entries")
    made = {}
    for name, token in given.items():
        what = f"TemplateProcessing: special_tokens: {name[:80]}"
        token = as_object(token, what)
        ids = [as_number(each, what, 2**32 - 1) for each in as_list(token.get("ids"), what, MAX_TEMPLATE_TOKENS)]
        texts = [as_text(each, what, MAX_TOKEN) for each in as_list(token.get("tokens"), what, MAX_TEMPLATE_TOKENS)]
        made[as_text(name, what, MAX_TOKEN)] = {
            "id": as_text(token.get("id"), what, MAX_TOKEN),
            "ids": ids,
            "tokens": texts,
        }
    return made


def _piece(value: Any, tokens: Mapping[str, Any]) -> dict[str, Any]:
    given = as_object(value, "TemplateProcessing: a piece")
    for kind, known in (("Sequence", ("A", "B")), ("SpecialToken", tuple(tokens))):
        if set(given) == {kind}:
            about = as_object(given[kind], f"TemplateProcessing: {kind}")
            if about.get("id") not in known:
                raise Unsupported(f"TemplateProcessing: {kind} {str(about.get('id'))[:80]!r} is not defined")
            return {
                kind: {"id": about["id"], "type_id": as_number(about.get("type_id"), f"{kind}: type_id", 2**32 - 1)}
            }
    raise Unsupported("TemplateProcessing: a piece is neither Sequence nor SpecialToken")


# Decoders -----------------------------------------------------------------------------------------------------------------

_DECODERS: dict[str, Mapping[str, Check]] = {
    "ByteLevel": _BYTE_LEVEL,
    "ByteFallback": {},
    "Fuse": {},
    "Metaspace": _METASPACE,
    "BPEDecoder": {"suffix": as_text},
    "WordPiece": {"prefix": as_text, "cleanup": as_flag},
    "CTC": {"pad_token": as_text, "word_delimiter_token": as_text, "cleanup": as_flag},
    # With larger values the library panics on shorter tokens.
    "Strip": {
        "content": as_character,
        "start": lambda value, what: as_number(value, what, MAX_TOKEN),
        "stop": lambda value, what: as_number(value, what, 0),
    },
    "Replace": {},
    "Sequence": {},
}


def decoder(value: Any, budget: Budget, depth: int = 0) -> dict[str, Any]:
    """Returns a validated decoder and adds its costs to the totals."""
    budget.component(depth)
    kind = kind_of(value, "decoder", _DECODERS)
    if kind == "Sequence":
        return members_of(kind, value, "decoders", lambda each: decoder(each, budget, depth + 1))
    if kind == "Replace":
        made, growth = replace_of(value, budget)
        budget.grow_decoded(growth)
        return made
    if kind in ("WordPiece", "BPEDecoder", "CTC"):  # these may put a space beside a token
        budget.grow_decoded(2)
    return fields_of(kind, value, _DECODERS[kind])
