"""Validates a `tokenizer.json`, because the tokenizers library limits neither time nor memory and cannot be interrupted.

The file is rebuilt from the fields below: components of known types, with limits on how much text they add (`MAX_GROWTH`) and
on their running time. Other fields are dropped, so the library reads only validated ones. `truncation` and `padding` are state
of the program that wrote the file, as in transformers, which resets both at each call. BPE's `dropout` makes encoding random
for training, and is dropped too.
"""

import base64
import binascii
import gc
import json
import math
import struct
from collections.abc import Callable, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # the standard decoder uses it
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.tokenizer_regex import Slow, linear_regex

# Gemma's file has 33 MB.
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
# The time to build the library's search for added tokens grows faster than the number of their characters.
MAX_ADDED_TOKENS = 65_536
MAX_ADDED_CHARACTERS = 1 << 20
# The library iterates over all ids up to the largest one when it copies a tokenizer.
MAX_ID = (1 << 24) - 1
# Unigram's vocabulary becomes a tree of bytes, at 350 bytes of memory each. mT5's 250,000 tokens have 2.5 MB.
MAX_UNIGRAM_BYTES = 4 << 20
# The longest Unigram token, in characters: at each position the library copies all tokens that start there. SentencePiece's
# tokens have at most 16.
MAX_UNIGRAM_TOKEN = 256
# The most tokens that a template adds to a text.
MAX_TEMPLATE_TOKENS = 64
# WordPiece takes quadratic time in the length of a word; BERT's limit is 100.
MAX_WORD = 256

_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_SCHEMES = ("first", "never", "always")
_SPACE = " \t\n\r"


class Unsupported(ValueError):
    """The reason why a file is rejected, as the end of a sentence."""


class Rules:
    """A validated `tokenizer.json`.

    Attributes:
        text: The rebuilt file, for the library.
        growth: How many bytes one byte of text can become.
        growth_later: The factor of that growth that follows normalization of the whole text.
        state: Fields of the file that were dropped because they are state: "truncation", "padding", "dropout".
    """

    def __init__(self, content: str) -> None:
        """Validates the content of the file.

        Raises:
            Unsupported: If it contains something that is not supported, or is not JSON.
        """
        parsed, model_text = _top_level(content)
        budget = _Budget()
        made: dict[str, Any] = {"version": parsed.get("version", "1.0"), "truncation": None, "padding": None}
        made["added_tokens"] = _added_tokens(parsed.get("added_tokens") or [])
        makers: dict[str, Callable[[Any, _Budget], Any]] = {
            "normalizer": _normalizer,
            "pre_tokenizer": _pre_tokenizer,
            "post_processor": _post_processor,
            "decoder": _decoder,
        }
        for name, make in makers.items():
            value = parsed.get(name)
            made[name] = None if value is None else make(value, budget)
        _check_model(parsed.get("model"))
        self.state = tuple(name for name in ("truncation", "padding") if parsed.get(name) is not None)
        if parsed["model"].get("dropout"):
            self.state = (*self.state, "dropout")
        self.growth, self.growth_later = math.ceil(budget.growth), math.ceil(budget.growth_later)
        self.text = json.dumps(made)[:-1] + f', "model": {model_text}}}'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # parsers differ in which of two values they use
        raise Unsupported("it has a field twice")
    return found


def _top_level(content: str) -> tuple[dict[str, Any], str]:
    """Returns the fields of the document, and the source text of its model, which the library parses again."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    found: dict[str, Any] = {}
    model = ""
    collects = gc.isenabled()
    gc.disable()  # halves the time: parsing creates hundreds of thousands of small lists, none of them garbage
    try:
        at = _after(content, 0, "{")
        while content[at : at + 1] != "}":
            name, at = scanstring(content, _after(content, at, '"'), True)
            at = _blank(content, _after(content, _blank(content, at), ":"))
            value, end = decoder.raw_decode(content, at)
            if name in found:
                raise Unsupported(f"it has {name!r} twice")
            found[name] = value
            if name == "model":
                model = content[at:end]
            at = _blank(content, end)
            if content[at : at + 1] == ",":
                at = _blank(content, at + 1)
    except json.JSONDecodeError as error:
        raise Unsupported(f"it is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise Unsupported("it is nested too deeply") from None
    finally:
        if collects:
            gc.enable()
    if _blank(content, at + 1) != len(content):
        raise Unsupported("it is not JSON: text follows the document")
    return found, model


def _blank(content: str, at: int) -> int:
    while at < len(content) and content[at] in _SPACE:
        at += 1
    return at


def _after(content: str, at: int, mark: str) -> int:
    at = _blank(content, at)
    if content[at : at + 1] != mark:
        raise json.JSONDecodeError(f"expected {mark!r}", content, at)
    return _blank(content, at + 1) if mark == "{" else at + 1


class _Budget:
    """The totals over all components of a file, with their limits."""

    def __init__(self) -> None:
        self.components = self.work = self.template_tokens = 0
        self.growth = self.growth_later = self.pre_tokenized_growth = self.decoded_growth = 1.0

    def component(self, depth: int) -> None:
        self.components += 1
        if self.components > MAX_COMPONENTS or depth > MAX_NESTING:
            raise Unsupported(f"more than {MAX_COMPONENTS} components, or nested more than {MAX_NESTING} deep")

    def grow(self, factor: float, later: bool = False) -> None:
        self.growth *= factor
        self.growth_later *= factor if later else 1.0
        if self.growth > MAX_GROWTH:
            raise Unsupported(f"its rules can make a text more than {MAX_GROWTH} times as long")

    def grow_pre_tokenized(self, factor: float) -> None:
        self.grow(factor, later=True)
        self.pre_tokenized_growth *= factor
        if self.pre_tokenized_growth > MAX_PRE_TOKENIZED_GROWTH:
            raise Unsupported(f"its pre-tokenizers can make a text more than {MAX_PRE_TOKENIZED_GROWTH} times as long")

    def grow_decoded(self, factor: float) -> None:
        self.decoded_growth *= factor
        if self.decoded_growth > MAX_DECODED_GROWTH:
            raise Unsupported(f"its decoders can make a text more than {MAX_DECODED_GROWTH} times as long")

    def regex(self, expression: Any, where: str) -> tuple[str, int]:
        """Returns the expression to run, and the smallest number of bytes that it matches."""
        try:
            linear = linear_regex(_text(expression, f"{where}: pattern", 1 << 16))
        except Slow as error:
            raise Unsupported(
                f"{where}: the regular expression {str(expression)[:80]!r} is rejected: {error}"
            ) from None
        self.work += linear.work
        if self.work > MAX_REGEX_WORK:
            raise Unsupported("its regular expressions together take too long")
        return linear.expression, linear.shortest


# Fields -------------------------------------------------------------------------------------------------------------------


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unsupported(f"{what} is not an object")
    return value


def _list(value: Any, what: str, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        raise Unsupported(f"{what} is not a list of at most {longest:,} entries")
    return value


def _text(value: Any, what: str, longest: int = MAX_INSERT) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise Unsupported(f"{what} is not a string of at most {longest:,} characters")
    return value


def _number(value: Any, what: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise Unsupported(f"{what} is not a number from 0 to {most:,}")
    return value


def _character(value: Any, what: str) -> str:
    if len(_text(value, what, 1)) != 1:
        raise Unsupported(f"{what} is not one character")
    return str(value)


def _choice(options: tuple[str, ...]) -> Callable[[Any, str], str]:
    def check(value: Any, what: str) -> str:
        # The library also accepts "merged_with_previous" for MergedWithPrevious.
        if not isinstance(value, str) or value.replace("_", "").lower() not in [each.lower() for each in options]:
            raise Unsupported(f"{what} must be one of {', '.join(options)}")
        return value

    return check


def _flag(value: Any, what: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise Unsupported(f"{what} is not true or false")
    return value


_Check = Callable[[Any, str], Any]


def _fields(kind: str, value: Mapping[str, Any], checks: Mapping[str, _Check]) -> dict[str, Any]:
    """Returns a component with its listed fields, each validated."""
    kept = {name: check(value[name], f"{kind}: {name}") for name, check in checks.items() if name in value}
    return {"type": kind, **kept}


def _kind(value: Any, what: str, known: Mapping[str, Any]) -> str:
    kind = _object(value, what).get("type")
    if not isinstance(kind, str) or kind not in known:
        raise Unsupported(f"the {what} type {kind!r} is not supported")
    return kind


def _members(kind: str, value: Mapping[str, Any], name: str, make: Callable[[Any], Any]) -> dict[str, Any]:
    return {"type": kind, name: [make(each) for each in _list(value.get(name), f"{kind}: {name}", MAX_COMPONENTS)]}


def _pattern(value: Any, where: str, budget: _Budget) -> tuple[dict[str, str], int]:
    """Returns a pattern, and the smallest number of bytes that it matches."""
    value = _object(value, f"{where}: pattern")
    if set(value) == {"String"}:
        text = _text(value["String"], f"{where}: pattern")
        if not text:
            raise Unsupported(f"{where}: the pattern is empty")
        return {"String": text}, _bytes(text)
    if set(value) == {"Regex"}:
        expression, shortest = budget.regex(value["Regex"], where)
        return {"Regex": expression}, shortest
    raise Unsupported(f"{where}: the pattern is neither String nor Regex")


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _replace(value: Mapping[str, Any], budget: _Budget) -> tuple[dict[str, Any], float]:
    """Returns a Replace component, and the factor by which it can lengthen a text."""
    pattern, shortest = _pattern(value.get("pattern"), "Replace", budget)
    content = _text(value.get("content"), "Replace: content")
    # An empty match is replaced before every character.
    growth = 1.0 + _bytes(content) if shortest == 0 else max(1.0, _bytes(content) / shortest)
    return {"type": "Replace", "pattern": pattern, "content": content}, growth


# Normalizers --------------------------------------------------------------------------------------------------------------

_NORMALIZERS: dict[str, tuple[float, Mapping[str, _Check]]] = {
    # NFKC and NFKD turn the three bytes of U+FDFA into 33; NFC and NFD at most triple a character.
    "NFC": (3, {}),
    "NFD": (3, {}),
    "NFKC": (11, {}),
    "NFKD": (11, {}),
    "Lowercase": (1.5, {}),
    "StripAccents": (1, {}),
    "Nmt": (1, {}),
    "ByteLevel": (2, {}),
    "Strip": (1, {"strip_left": _flag, "strip_right": _flag}),
    "StripNormalizer": (1, {"strip_left": _flag, "strip_right": _flag}),
    "BertNormalizer": (
        6,
        {"clean_text": _flag, "handle_chinese_chars": _flag, "strip_accents": _flag, "lowercase": _flag},
    ),
    "Sequence": (1, {}),
    "Prepend": (1, {}),
    "Replace": (1, {}),
    "Precompiled": (1, {}),
}


def _normalizer(value: Any, budget: _Budget, depth: int = 0) -> dict[str, Any]:
    budget.component(depth)
    kind = _kind(value, "normalizer", _NORMALIZERS)
    match kind:
        case "Sequence":
            return _members(kind, value, "normalizers", lambda each: _normalizer(each, budget, depth + 1))
        case "Replace":
            made, growth = _replace(value, budget)
            budget.grow(growth)
            return made
        case "Prepend":
            prefix = _text(value.get("prepend"), "Prepend: prepend")
            # The prefix is put before each part between added tokens, which may be one byte long.
            budget.grow(1 + _bytes(prefix), later=True)
            return {"type": kind, "prepend": prefix}
        case "Precompiled":
            packed = _text(value.get("precompiled_charsmap"), "Precompiled: precompiled_charsmap", MAX_BYTES)
            budget.grow(charsmap_growth(packed))
            return {"type": kind, "precompiled_charsmap": packed}
    growth, checks = _NORMALIZERS[kind]
    budget.grow(growth)
    return _fields(kind, value, checks)


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

_METASPACE: Mapping[str, _Check] = {
    "replacement": _character,
    "str_rep": lambda value, what: _text(value, what, 1),
    "prepend_scheme": _choice(_SCHEMES),
    "add_prefix_space": _flag,
    "split": _flag,
}
_BYTE_LEVEL: Mapping[str, _Check] = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _flag}
_PRE_TOKENIZERS: dict[str, tuple[float, Mapping[str, _Check]]] = {
    "BertPreTokenizer": (1, {}),
    "ByteLevel": (2, _BYTE_LEVEL),  # also covers a space before a part, which at most doubles it
    "CharDelimiterSplit": (1, {"delimiter": _character}),
    "Metaspace": (4, _METASPACE),
    "Whitespace": (1, {}),
    "WhitespaceSplit": (1, {}),
    "Punctuation": (1, {"behavior": _choice(_BEHAVIORS)}),
    "Digits": (1, {"individual_digits": _flag}),
    "UnicodeScripts": (1, {}),
    "FixedLength": (1, {"length": lambda value, what: max(1, _number(value, what, 1 << 20))}),
    "Split": (1, {}),
    "Sequence": (1, {}),
}


def _pre_tokenizer(value: Any, budget: _Budget, depth: int = 0) -> dict[str, Any]:
    budget.component(depth)
    kind = _kind(value, "pre_tokenizer", _PRE_TOKENIZERS)
    if kind == "Sequence":
        return _members(kind, value, "pretokenizers", lambda each: _pre_tokenizer(each, budget, depth + 1))
    if kind == "Split":
        pattern, _ = _pattern(value.get("pattern"), kind, budget)
        made = _fields(kind, value, {"behavior": _choice(_BEHAVIORS), "invert": _flag})
        return made | {"pattern": pattern}
    growth, checks = _PRE_TOKENIZERS[kind]
    budget.grow_pre_tokenized(growth)
    return _fields(kind, value, checks)


# Post-processors ----------------------------------------------------------------------------------------------------------

_POST_PROCESSORS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel", "Sequence")


def _post_processor(value: Any, budget: _Budget, depth: int = 0) -> dict[str, Any]:
    budget.component(depth)
    kind = _kind(value, "post_processor", dict.fromkeys(_POST_PROCESSORS))
    match kind:
        case "Sequence":
            return _members(kind, value, "processors", lambda each: _post_processor(each, budget, depth + 1))
        case "ByteLevel":
            return _fields(kind, value, _BYTE_LEVEL)
        case "TemplateProcessing":
            return _template(value, budget)
    _count_template_tokens(budget, 2)
    marks: Mapping[str, _Check] = {"sep": _mark, "cls": _mark}
    return _fields(kind, value, {**marks, "trim_offsets": _flag, "add_prefix_space": _flag})


def _mark(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise Unsupported(f"{what} is not a token and its id")
    return [_text(value[0], what, MAX_TOKEN), _number(value[1], what, 2**32 - 1)]


def _count_template_tokens(budget: _Budget, count: int) -> None:
    budget.template_tokens += count
    if budget.template_tokens > MAX_TEMPLATE_TOKENS:
        raise Unsupported(f"TemplateProcessing adds more than {MAX_TEMPLATE_TOKENS} tokens to a text")


def _template(value: Mapping[str, Any], budget: _Budget) -> dict[str, Any]:
    tokens = _special_tokens(value.get("special_tokens", {}))
    made: dict[str, Any] = {"type": "TemplateProcessing"}
    for name, sequences in (("single", ["A"]), ("pair", ["A", "B"])):
        pieces = [_piece(each, tokens) for each in _list(value.get(name), f"TemplateProcessing: {name}", 64)]
        texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
        if (name == "single" and texts != sequences) or any(texts.count(each) > 1 for each in texts):
            raise Unsupported(f"TemplateProcessing: {name} does not contain each text once")
        if name == "single":
            added = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
            _count_template_tokens(budget, sum(len(tokens[each]["ids"]) for each in added))
        made[name] = pieces
    return made | {"special_tokens": tokens}


def _special_tokens(value: Any) -> dict[str, Any]:
    given = _object(value, "TemplateProcessing: special_tokens")
    if len(given) > MAX_TEMPLATE_TOKENS:
        raise Unsupported("TemplateProcessing: special_tokens has too many entries")
    made = {}
    for name, token in given.items():
        what = f"TemplateProcessing: special_tokens: {name[:80]}"
        token = _object(token, what)
        ids = [_number(each, what, 2**32 - 1) for each in _list(token.get("ids"), what, MAX_TEMPLATE_TOKENS)]
        texts = [_text(each, what, MAX_TOKEN) for each in _list(token.get("tokens"), what, MAX_TEMPLATE_TOKENS)]
        made[_text(name, what, MAX_TOKEN)] = {
            "id": _text(token.get("id"), what, MAX_TOKEN),
            "ids": ids,
            "tokens": texts,
        }
    return made


def _piece(value: Any, tokens: Mapping[str, Any]) -> dict[str, Any]:
    given = _object(value, "TemplateProcessing: a piece")
    for kind, known in (("Sequence", ("A", "B")), ("SpecialToken", tuple(tokens))):
        if set(given) == {kind}:
            about = _object(given[kind], f"TemplateProcessing: {kind}")
            if about.get("id") not in known:
                raise Unsupported(f"TemplateProcessing: {kind} {str(about.get('id'))[:80]!r} is not defined")
            return {kind: {"id": about["id"], "type_id": _number(about.get("type_id"), f"{kind}: type_id", 2**32 - 1)}}
    raise Unsupported("TemplateProcessing: a piece is neither Sequence nor SpecialToken")


# Decoders -----------------------------------------------------------------------------------------------------------------

_DECODERS: dict[str, Mapping[str, _Check]] = {
    "ByteLevel": _BYTE_LEVEL,
    "ByteFallback": {},
    "Fuse": {},
    "Metaspace": _METASPACE,
    "BPEDecoder": {"suffix": _text},
    "WordPiece": {"prefix": _text, "cleanup": _flag},
    "CTC": {"pad_token": _text, "word_delimiter_token": _text, "cleanup": _flag},
    # With larger values the library panics on shorter tokens.
    "Strip": {
        "content": _character,
        "start": lambda value, what: _number(value, what, MAX_TOKEN),
        "stop": lambda value, what: _number(value, what, 0),
    },
    "Replace": {},
    "Sequence": {},
}


def _decoder(value: Any, budget: _Budget, depth: int = 0) -> dict[str, Any]:
    budget.component(depth)
    kind = _kind(value, "decoder", _DECODERS)
    if kind == "Sequence":
        return _members(kind, value, "decoders", lambda each: _decoder(each, budget, depth + 1))
    if kind == "Replace":
        made, growth = _replace(value, budget)
        budget.grow_decoded(growth)
        return made
    if kind in ("WordPiece", "BPEDecoder", "CTC"):  # these may put a space beside a token
        budget.grow_decoded(2)
    return _fields(kind, value, _DECODERS[kind])


# Tokens and model ---------------------------------------------------------------------------------------------------------


def _added_tokens(value: Any) -> list[dict[str, Any]]:
    made, characters = [], 0
    for each in _list(value, "added_tokens", MAX_ADDED_TOKENS):
        given = _object(each, "added_tokens: an entry")
        content = _text(given.get("content"), "added_tokens: content", MAX_TOKEN)
        characters += len(content)
        flags = {
            name: _flag(given[name], f"added_tokens: {name}")
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if name in given
        }
        if content.isspace() and (flags.get("lstrip") or flags.get("rstrip")):
            raise Unsupported("added_tokens: a white-space token with lstrip or rstrip takes quadratic time")
        made.append({"id": _number(given.get("id"), "added_tokens: id", MAX_ID), "content": content, **flags})
    if characters > MAX_ADDED_CHARACTERS:
        raise Unsupported(f"its added tokens have more than {MAX_ADDED_CHARACTERS:,} characters")
    return made


def _check_model(value: Any) -> None:
    model = _object(value, "model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(name) is not None:
            _text(model[name], f"model: {name}", 64 if name != "unk_token" else MAX_TOKEN)
    if model.get("max_input_chars_per_word") is not None:
        _number(model["max_input_chars_per_word"], "model: max_input_chars_per_word", MAX_WORD)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram's vocabulary, with scores
        tokens = [
            each[0] if isinstance(each, list) and each and isinstance(each[0], str) else "" for each in vocabulary
        ]
        if max(map(len, tokens), default=0) > MAX_UNIGRAM_TOKEN:
            raise Unsupported(f"model: a token of its vocabulary has more than {MAX_UNIGRAM_TOKEN:,} characters")
        if sum(map(_bytes, tokens)) > MAX_UNIGRAM_BYTES:
            raise Unsupported(f"model: its vocabulary has more than {MAX_UNIGRAM_BYTES:,} bytes")
    elif isinstance(vocabulary, dict):
        tokens = list(vocabulary)
        if not all(type(each) is int and 0 <= each <= MAX_ID for each in vocabulary.values()):
            raise Unsupported(f"model: an id of its vocabulary is not a number from 0 to {MAX_ID:,}")
    else:
        raise Unsupported("model: vocab is missing")
    if max(map(len, tokens), default=0) > MAX_TOKEN:
        raise Unsupported(f"model: a token of the vocabulary has more than {MAX_TOKEN:,} characters")
