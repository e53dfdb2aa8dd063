"""Selects the tokens of a trimmed vocabulary by their number in a text."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.chat import Message, chat_ids
from slm.core.errors import SlmError
from slm.core.tokenizer import SPECIAL_TOKENS, Tokenizer
from slm.core.tools import Call, Tool
from slm.interchange.trim.needs import Needs

# Matrices whose rows are a multiple of this suit the products of CPUs and GPUs.
MULTIPLE = 64
# Added tokens that a vocabulary reserves and that nothing uses: Gemma has 6,242 of them.
_RESERVED = re.compile(r"[<\[]\|?(unused|reserved|placeholder)[a-z_]*\d+\|?[>\]]", flags=re.IGNORECASE)

Array = NDArray[Any]


@dataclass(frozen=True)
class Wanted:
    """The size of a vocabulary; one of `keep` and `coverage` is not None.

    Attributes:
        keep: Number of tokens, rounded up to a multiple of 64 if that is below the number of tokens that there are.
        coverage: The share of the text's tokens that must stay, above 0 and at most 1.
        also: Spelling of further tokens that stay.
    """

    keep: int | None = None
    coverage: float | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The selected tokens.

    Attributes:
        ids: The ids in the original vocabulary, in the order of the new one.
        required: Number of tokens that stay whatever the text: bytes, characters, added tokens, turns of a conversation.
        used: Number of tokens of the text that stay, beyond the required ones.
        parts: Number of tokens that stay because merges pass through them.
        filled: Number of further tokens, spelled with the text's characters.
        wanted: The number that was asked for; None for a coverage.
    """

    ids: Array
    required: int
    used: int
    parts: int
    filled: int
    wanted: int | None


def required_tokens(
    tokenizer: Tokenizer,
    document: dict[str, Any],
    needs: Needs,
    ids: Iterable[int],
    rows: int,
    also: Iterable[str] = (),
) -> frozenset[int]:
    """Returns the tokens that stay whatever the text.

    Args:
        tokenizer: The tokenizer.
        document: Its `tokenizer.json`.
        needs: The tokens that each token needs.
        ids: Ids that the model's configuration names.
        rows: Rows of the embedding; tokens beyond them have no meaning to the model and do not stay.
        also: Spelling of further tokens.

    Raises:
        SlmError: If a token of `also` does not exist, or the post-processor adds one without a row.
    """
    around = _ids_around(document)
    if around and max(around) >= rows:
        raise SlmError(f"the post-processor adds the token {max(around):,}, and the embedding has {rows:,} rows")
    template = tokenizer.config.get("chat_template")
    spelled = template if isinstance(template, str) else ""
    named = {*SPECIAL_TOKENS, *_names(tokenizer.config)}
    found = {i for i in (*ids, *tokenizer.prefix_ids, *tokenizer.suffix_ids, *around) if i is not None}
    for token in document["added_tokens"]:
        content = token["content"]
        if content in named or content in spelled or not _RESERVED.fullmatch(content):
            found.add(token["id"])
    for token in also:
        i = tokenizer.token_id(token)
        if i is None:
            raise SlmError(f"the tokenizer has no token {token!r}", "--keep-token takes the spelling of a token")
        found |= needs.of(i)
    found |= {i for name in named if (i := tokenizer.token_id(name)) is not None} | needs.basic
    for i in _turns(tokenizer):
        found |= needs.of(i)
    return frozenset(i for i in found if i < rows)


def choose(
    needs: Needs, counts: Array, required: Collection[int], wanted: Wanted, total: int, added: Collection[int] = ()
) -> Choice:
    """Selects the most frequent tokens with all that they need, up to the size.

    If the text has fewer tokens, the vocabulary is filled with others in the order of their ids, which is that of the
    tokenizer's training: first those that are spelled with characters of the text.

    Args:
        needs: The tokens that each token needs.
        counts: Number of each id in the text.
        required: Tokens that stay in any case.
        wanted: The size.
        total: Number of tokens that can stay.
        added: Ids of added tokens, which never fill the vocabulary.

    Raises:
        SlmError: If the size is below what must stay, or not below the number of tokens.
    """
    kept = set(required)
    if wanted.keep is not None:
        size = _size(wanted.keep, len(kept), total)
    order = [int(i) for i in np.lexsort((np.arange(len(counts)), -counts)) if counts[i]]
    left = order
    if wanted.coverage is not None:
        covered, enough = int(counts[list(kept)].sum()), float(counts.sum()) * wanted.coverage
        for number, i in enumerate(order):
            if covered >= enough:
                left = order[number:]
                break
            if i not in kept:
                new = needs.of(i) - kept
                kept |= new
                covered += int(counts[list(new)].sum())
        else:
            left = []
        size = _rounded(len(kept), total)
    for i in left:
        if len(kept) >= size:
            break
        if i not in kept:
            new = needs.of(i) - kept
            if len(kept) + len(new) <= size:
                kept |= new
    used = sum(1 for i in kept if counts[i] and i not in required)
    parts = len(kept) - len(required) - used
    before = len(kept)
    _fill(needs, kept, size, {i for i in order if i in kept}, added)
    model = [i for i in sorted(kept) if i in needs.tokens]
    beyond = [i for i in sorted(kept) if i not in needs.tokens]
    return Choice(np.array([*model, *beyond], np.int64), len(required), used, parts, len(kept) - before, wanted.keep)


def _size(keep: int, required: int, total: int) -> int:
    if keep < required:
        raise SlmError(
            f"{keep:,} tokens are too few: {required:,} always stay (bytes, characters, added tokens, turns)",
            f"--keep {_rounded(required, total)} or more",
        )
    if keep >= total:
        raise SlmError(f"the tokenizer has {total:,} tokens; there is nothing to trim", "choose a smaller --keep")
    return _rounded(keep, total)


def _rounded(size: int, total: int) -> int:
    """Returns the next multiple of 64, if that is below the number of tokens that there are."""
    rounded = -(-size // MULTIPLE) * MULTIPLE
    return rounded if rounded < total else size


def _fill(needs: Needs, kept: set[int], size: int, used: Collection[int], added: Collection[int]) -> None:
    """Adds tokens up to the size, in the order of their ids."""
    characters = {character for i in used if i in needs.tokens for character in needs.tokens[i]}
    rest = [i for i in sorted(needs.tokens) if i not in kept and i not in added]
    own = [i for i in rest if characters.issuperset(needs.tokens[i])]
    for i in (*own, *sorted({*rest} - {*own})):
        if len(kept) >= size:
            return
        if i not in kept and needs.is_made(i):
            new = needs.of(i) - kept
            if len(kept) + len(new) <= size:
                kept |= new


def _names(config: dict[str, Any]) -> set[str]:
    """Returns the special tokens that `tokenizer_config.json` names, without its list of all added tokens."""
    values = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        several = config.get(key)
        values += several.values() if isinstance(several, dict) else several if isinstance(several, list) else []
    spelled = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {each for each in spelled if isinstance(each, str)}


def _ids_around(document: dict[str, Any]) -> list[int]:
    """Returns the ids of all tokens that the post-processor can add."""

    def ids(processor: dict[str, Any]) -> list[int]:
        match processor["type"]:
            case "Sequence":
                return [i for each in processor["processors"] for i in ids(each)]
            case "TemplateProcessing":
                return [i for token in processor["special_tokens"].values() for i in token["ids"]]
            case "BertProcessing" | "RobertaProcessing":
                return [processor["cls"][1], processor["sep"][1]]
        return []

    return ids(document["post_processor"]) if document["post_processor"] else []


# What declarations consist of besides their own words.
_TOOLS = (
    Tool(
        "a",
        "a",
        {
            "type": "object",
            "properties": {
                "a": {"type": "string", "enum": ["a", "b"], "description": "a"},
                "b": {"type": "array", "items": {"type": ["integer", "number", "boolean", "null"]}},
                "c": {"type": "object", "properties": {"d": {"type": "integer", "minimum": 0, "maximum": 1}}},
            },
            "required": ["a"],
        },
    ),
)


def _turns(tokenizer: Tokenizer) -> set[int]:
    """Returns the tokens of a conversation's turns: roles, line breaks and marks, and those of tools and calls."""
    user: Message = {"role": "user", "content": "a"}
    model: Message = {"role": "assistant", "content": "a"}
    system: Message = {"role": "system", "content": "a"}
    calling: Message = {
        "role": "assistant",
        "content": "a",
        "calls": (Call("a", {"a": "a", "b": [True, False, None, 1.5]}),),
    }
    result: Message = {"role": "tool", "name": "a", "content": "a"}
    found: set[int] = set()
    for messages in ([user], [user, model, user], [system, user], [user, calling, result]):
        try:
            found.update(chat_ids(tokenizer, messages, (), _TOOLS if result in messages else ()))
        except SlmError:  # no turns, or a template that rejects such a conversation
            continue
    return found
