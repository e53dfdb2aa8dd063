"""Calls to the tokenizers library, whose panics and exceptions become an `SlmError`."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer

from slm.core.errors import SlmError

_T = TypeVar("_T")

# Shorter texts take the library milliseconds; length in characters.
_LONG = 2048


def utf8_bytes(text: str) -> int:
    """Returns the UTF-8 bytes of a text, which may contain lone surrogates."""
    return len(text.encode("utf-8", "surrogatepass"))


def encode_text(backend: Tokenizer, text: str, add_special_tokens: bool = False) -> Encoding:
    """Encodes a text; during a long one, other Python threads can run."""
    if len(text) < _LONG:
        return call(backend.encode, text, add_special_tokens=add_special_tokens)
    return call(partial(_only, backend), text, add_special_tokens=add_special_tokens)


def _only(backend: Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
    # Unlike `encode`, the library's `encode_batch` releases Python's global lock.
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def call(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Calls the library, and converts its panics and exceptions.

    Raises:
        SlmError: If the library panics or fails, or a text contains a lone surrogate.
    """
    try:
        return function(*arguments, **options)
    except TypeError:
        if all(isinstance(each, str | list) for each in arguments):
            raise SlmError("the text contains a lone surrogate", "write the character itself") from None
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # the class cannot be imported
            raise SlmError(f"the tokenizer failed: {error}", "its tokenizer.json is damaged") from None
        if type(error) is Exception:  # the library's, for example if a text needs an unknown token and none exists
            raise SlmError(f"the tokenizer failed: {error}", "its tokenizer.json does not cover every text") from None
        raise


def copied(backend: Tokenizer) -> Tokenizer:
    """Returns a tokenizer with the same ids, whose added tokens can be changed; both share the vocabulary.

    A copy through JSON takes seconds for a vocabulary of 262,144 tokens, and twice its memory.
    """
    made = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(made, part, value)
    added = backend.get_added_tokens_decoder()
    made.add_tokens([added[token] for token in sorted(added)])
    if _spelled(made.get_added_tokens_decoder()) == _spelled(added):
        return made
    return Tokenizer.from_str(backend.to_str())  # in case the library numbers them in another way


def _spelled(added: dict[int, AddedToken]) -> dict[int, str]:
    return {token: repr(each) for token, each in added.items()}


def ids_around(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that a tokenizer puts before and after a text.

    Raises:
        SlmError: If the library puts others there than the post-processors state.
    """
    processor = backend.post_processor
    if processor is None:
        return (), ()
    before, after = _around(json.loads(processor.__getstate__()))
    if [*before, *after] != call(backend.encode, "").ids:  # the library ignores some of a chain
        raise SlmError("the post-processors of tokenizer.json put other tokens around a text than they state")
    return tuple(before), tuple(after)


def _around(processor: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Returns the ids that a post-processor puts before and after a text."""
    match processor["type"]:
        case "Sequence":
            before: list[int] = []
            after: list[int] = []
            for each in processor["processors"]:  # each adds its tokens around the previous result
                first, last = _around(each)
                before, after = [*first, *before], [*after, *last]
            return before, after
        case "TemplateProcessing":
            parts: tuple[list[int], list[int]] = [], []
            behind = 0
            for piece in processor["single"]:
                if "Sequence" in piece:
                    behind = 1
                else:
                    parts[behind].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
            return parts
        case "BertProcessing" | "RobertaProcessing":
            return [processor["cls"][1]], [processor["sep"][1]]
    return [], []
