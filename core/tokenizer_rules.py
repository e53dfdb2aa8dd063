"""Validates a `tokenizer.json`, because the tokenizers library limits neither time nor memory and cannot be interrupted.

The file is rebuilt from components of known types (`slm.core.tokenizer_components`), with limits on how much text they add and
on their running time (`slm.core.tokenizer_fields`). Other fields are dropped, so the library reads only validated ones.
`truncation` and `padding` are state of the program that wrote the file, as in transformers, which resets both at each call.
BPE's `dropout` makes encoding random for training, and is dropped too.
"""

import gc
import json
import math
from collections.abc import Callable
from json.decoder import scanstring  # type: ignore[attr-defined]  # the standard decoder uses it
from typing import Any

from slm.core.tokenizer_components import decoder, normalizer, post_processor, pre_tokenizer
from slm.core.tokenizer_fields import (
    MAX_TOKEN,
    Budget,
    Unsupported,
    as_flag,
    as_list,
    as_number,
    as_object,
    as_text,
    utf8_length,
)

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
# WordPiece takes quadratic time in the length of a word; BERT's limit is 100.
MAX_WORD = 256

_SPACE = " \t\n\r"


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
        budget = Budget()
        made: dict[str, Any] = {"version": parsed.get("version", "1.0"), "truncation": None, "padding": None}
        made["added_tokens"] = _added_tokens(parsed.get("added_tokens") or [])
        makers: dict[str, Callable[[Any, Budget], Any]] = {
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor,
            "decoder": decoder,
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
    reader = json.JSONDecoder(object_pairs_hook=_unique)
    found: dict[str, Any] = {}
    model = ""
    collects = gc.isenabled()
    gc.disable()  # halves the time: parsing creates hundreds of thousands of small lists, none of them garbage
    try:
        at = _after(content, 0, "{")
        while content[at : at + 1] != "}":
            name, at = scanstring(content, _after(content, at, '"'), True)
            at = _blank(content, _after(content, _blank(content, at), ":"))
            value, end = reader.raw_decode(content, at)
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


def _added_tokens(value: Any) -> list[dict[str, Any]]:
    made, characters = [], 0
    for each in as_list(value, "added_tokens", MAX_ADDED_TOKENS):
        given = as_object(each, "added_tokens: an entry")
        content = as_text(given.get("content"), "added_tokens: content", MAX_TOKEN)
        characters += len(content)
        flags = {
            name: as_flag(given[name], f"added_tokens: {name}")
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if name in given
        }
        if content.isspace() and (flags.get("lstrip") or flags.get("rstrip")):
            raise Unsupported("added_tokens: a white-space token with lstrip or rstrip takes quadratic time")
        made.append({"id": as_number(given.get("id"), "added_tokens: id", MAX_ID), "content": content, **flags})
    if characters > MAX_ADDED_CHARACTERS:
        raise Unsupported(f"its added tokens have more than {MAX_ADDED_CHARACTERS:,} characters")
    return made


def _check_model(value: Any) -> None:
    model = as_object(value, "model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(name) is not None:
            as_text(model[name], f"model: {name}", 64 if name != "unk_token" else MAX_TOKEN)
    if model.get("max_input_chars_per_word") is not None:
        as_number(model["max_input_chars_per_word"], "model: max_input_chars_per_word", MAX_WORD)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram's vocabulary, with scores
        tokens = [
            each[0] if isinstance(each, list) and each and isinstance(each[0], str) else "" for each in vocabulary
        ]
        if max(map(len, tokens), default=0) > MAX_UNIGRAM_TOKEN:
            raise Unsupported(f"model: a token of its vocabulary has more than {MAX_UNIGRAM_TOKEN:,} characters")
        if sum(map(utf8_length, tokens)) > MAX_UNIGRAM_BYTES:
            raise Unsupported(f"model: its vocabulary has more than {MAX_UNIGRAM_BYTES:,} bytes")
    elif isinstance(vocabulary, dict):
        tokens = list(vocabulary)
        if not all(type(each) is int and 0 <= each <= MAX_ID for each in vocabulary.values()):
            raise Unsupported(f"model: an id of its vocabulary is not a number from 0 to {MAX_ID:,}")
    else:
        raise Unsupported("model: vocab is missing")
    if max(map(len, tokens), default=0) > MAX_TOKEN:
        raise Unsupported(f"model: a token of the vocabulary has more than {MAX_TOKEN:,} characters")
