"""Vocabularies in GGUF's terms and in those of `tokenizer.json`.

GGUF has two kinds that Gemma-style models use. "llama" is SentencePiece's BPE, which merges the pair whose result has the best
score; in `tokenizer.json` it is a list of merges with byte fallback. "gpt2" is byte-level BPE with the same merges.
"""

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer

# SentencePiece's symbol for a space.
_SPACE = "▁"
# GPT-2's pattern (openai/gpt-2, encoder.py) in tiktoken's spelling; tokenizers' ByteLevel has it built in.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_GPT2_PRE = ("gpt-2", "gpt2")
_PAD_PREFIX = "[PAD"
# Maximum length of a token in characters. Gemma's longest has 31; a token of a million could be split in a million ways.
_MAX_TOKEN_CHARACTERS = 1024


class TokenType(IntEnum):
    """GGUF's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def from_gguf(fields: Mapping[str, Any], path: Path, max_length: int) -> Tokenizer:
    """Returns the tokenizer described by the metadata of a GGUF file.

    Args:
        fields: The metadata.
        path: The file, for messages.
        max_length: The longest context, in tokens.

    Raises:
        SlmError: When it is of another kind, or incomplete.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    tokens = list(fields.get("tokenizer.ggml.tokens", []))
    types = [TokenType(kind) for kind in fields.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))]
    if any(len(token) > _MAX_TOKEN_CHARACTERS for token in tokens):
        raise SlmError(f"{path}: a token is longer than {_MAX_TOKEN_CHARACTERS:,} characters")
    if not tokens or len(tokens) != len(types):
        raise SlmError(f"{path} carries no whole vocabulary ({len(tokens):,} tokens, {len(types):,} types)")
    if kind == "llama":
        backend = _sentencepiece(tokens, fields.get("tokenizer.ggml.scores", []), types, path)
        # llama.cpp matches these tokens before it escapes spaces; tokenizers matches them as spelled.
        if fields.get("tokenizer.ggml.add_space_prefix", True):
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), backend.normalizer])
    elif kind == "gpt2" and pre in _GPT2_PRE:
        backend = _byte_level(tokens, fields.get("tokenizer.ggml.merges", []), types)
    else:
        raise SlmError(
            f"{path}: the tokenizer is {kind!r} with pre-tokenizer {pre!r}, which slm does not know",
            "import the Hugging Face directory of the model instead",
        )
    names = {
        name: tokens[int(fields[f"tokenizer.ggml.{key}_token_id"])]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos" in names:
        bos = names["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in names.items()},
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return Tokenizer(backend, config)


def _sentencepiece(tokens: list[str], scores: Sequence[float], types: list[TokenType], path: Path) -> Backend:
    if len(scores) != len(tokens):
        raise SlmError(f"{path}: {len(scores):,} scores for {len(tokens):,} tokens")
    # In GGUF a user-defined run of spaces has spaces; in SentencePiece and tokenizer.json the spaces are escaped.
    spelt = [
        token.replace(" ", _SPACE) if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = {token: i for i, token in enumerate(spelt)}
    merges = _merges(vocabulary, scores, types)
    unknown = next((token for token, kind in zip(spelt, types, strict=True) if kind == TokenType.UNKNOWN), None)
    unknown = unknown or ("<unk>" if "<unk>" in vocabulary else None)
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=TokenType.BYTE in types
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_special(backend, spelt, types)
    return backend


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], types: list[TokenType]) -> list[tuple[str, str]]:
    """Returns the merges that are equivalent to scores of tokens: every way to make a token of two, best score first.

    User-defined tokens come first, longer ones before shorter ones, because SentencePiece never splits them.
    """
    ranked = []
    for token, i in vocabulary.items():
        if types[i] == TokenType.USER_DEFINED:
            score = 0.0
        elif types[i] == TokenType.NORMAL:
            score = scores[i]
        else:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((score, cut, len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _byte_level(tokens: list[str], merges: Sequence[str], types: list[TokenType]) -> Backend:
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[_pair(merge) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, types)
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_special(backend: Backend, tokens: list[str], types: list[TokenType]) -> None:
    """Adds the tokens that are matched before merges; control tokens do not appear in decoded text."""
    kinds = list(zip(tokens, types, strict=True))
    user = [AddedToken(token, normalized=False) for token, kind in kinds if kind == TokenType.USER_DEFINED]
    control = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in kinds
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN)
    ]
    backend.add_tokens(user)
    backend.add_special_tokens(control)


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Returns the metadata of a tokenizer by GGUF's keys, without their prefix "tokenizer.ggml.".

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the embedding; ids without a token are written as unused.

    Raises:
        SlmError: When GGUF cannot express the tokenizer.
    """
    document = json.loads(tokenizer.backend.to_str())
    model = document["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("ignore_merges"):
        raise SlmError(
            f"a tokenizer of the kind {model['type']} cannot be written as GGUF", "slm writes byte-pair encodings"
        )
    added = {token["id"]: token for token in document["added_tokens"]}
    tokens = [f"{_PAD_PREFIX}{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    if max(model["vocab"].values()) >= vocab_size:
        raise SlmError(f"the tokenizer has more tokens than the embedding's {vocab_size:,} rows")
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for i, token in added.items():
        if i < vocab_size:  # a multimodal tokenizer has an image token beyond the text model's rows
            tokens[i], types[i] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [tuple(_pair(merge) if isinstance(merge, str) else merge) for merge in model["merges"]]
    fields: dict[str, Any]
    if model.get("byte_fallback") and _escapes_spaces(document):
        unknown = model.get("unk_token")
        for i, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[i] = TokenType.BYTE
            elif types[i] == TokenType.USER_DEFINED:
                tokens[i] = token.replace(_SPACE, " ")
        fields = {
            "model": "llama",
            "pre": "default",
            "scores": _scores(tokens, types, merges),
            "add_space_prefix": False,
            "unknown_token_id": tokens.index(unknown) if unknown in tokens else None,
        }
    elif _is_gpt2(document):
        fields = {"model": "gpt2", "pre": _GPT2_PRE[0], "merges": [" ".join(merge) for merge in merges]}
    else:
        raise SlmError(
            "the tokenizer splits or normalizes text in a way that slm cannot write as GGUF",
            "it writes GPT-2's byte-level BPE and SentencePiece's BPE with byte fallback",
        )
    return fields | {
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "add_bos_token": len(tokenizer.prefix_ids) > 0,
        "add_eos_token": False,
    }


def _escapes_spaces(document: Mapping[str, Any]) -> bool:
    normalizer, split = document["normalizer"] or {}, document["pre_tokenizer"]
    escaped = normalizer.get("type") == "Replace" and normalizer["pattern"] == {"String": " "}
    # Gemma's file splits at spaces, which has no effect after escaping.
    unsplit = split is None or (split["type"] == "Split" and split["pattern"] == {"String": " "})
    return escaped and normalizer["content"] == _SPACE and unsplit


def _is_gpt2(document: Mapping[str, Any]) -> bool:
    split = document["pre_tokenizer"] or {}
    if document["normalizer"] is not None:
        return False
    if split.get("type") == "ByteLevel":
        return bool(split["use_regex"]) and not split["add_prefix_space"]
    if split.get("type") != "Sequence" or len(split["pretokenizers"]) != 2:
        return False
    first, second = split["pretokenizers"]
    return (
        first["type"] == "Split"
        and first["pattern"] == {"Regex": _GPT2_PATTERN}
        and second["type"] == "ByteLevel"
        and not second["use_regex"]
    )


def _scores(tokens: list[str], types: list[TokenType], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Returns scores of tokens that give the order of the merges; -1000 for tokens without a merge."""
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault("".join(merge), len(order))
    return [
        -float(order[token]) if kind == TokenType.NORMAL and token in order else -1000.0
        for token, kind in zip(tokens, types, strict=True)
    ]
