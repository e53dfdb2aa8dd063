"""Tokenizers from `tokenizer.json`: encoding, decoding, and special tokens."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as _Tokenizer

from slm.core.errors import SlmError
from slm.core.files import check_readable, read_text
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE, declared_tokens, named_tokens, read_tokenizer_config
from slm.core.tokenizer_fields import MAX_BYTES, Unsupported
from slm.core.tokenizer_library import call, copied, encode_text, ids_around, utf8_bytes
from slm.core.tokenizer_rules import Rules

TOKENIZER_FILE = "tokenizer.json"

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
PAD = "<pad>"

# A private-use character, which vocabularies do not contain.
_UNKNOWN = "\U0010fffd"
_CONTROL = re.compile(r"[<\[][|｜].*[|｜][>\]]|<[/A-Za-z0-9]*_[/A-Za-z0-9_]*>|\[/?[A-Z_]+\]", flags=re.DOTALL)
# How many characters of a chat template are searched for control tokens; rendering rejects longer templates.
_SEARCHED = 64 << 10
# Text in the source of a template that looks like a control token.
_MARKER = re.compile(r"[<\[](?=[^<>\[\]]{0,64}[A-Za-z])[^\s<>\[\]{}'\"]{1,64}[>\]]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Limits on the bytes that the rules may produce from a text: eight times its length, or 2 MiB. The library needs up to a
# kilobyte of memory for each. The rules of Gemma, GPT-2 and T5 produce at most five times the length of real texts.
_ORDINARY_GROWTH, _MAX_GROWN_BYTES = 8, 2 << 20

# In this order they get ids if a vocabulary has none of them.
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD)


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        backend: The tokenizers library's object.
        config: The contents of `tokenizer_config.json`: names of special tokens, the chat template.
        dropped: Fields of the file that are state and were reset: "truncation", "padding", "dropout".
    """

    def __init__(self, backend: _Tokenizer, config: dict[str, Any]) -> None:
        self.backend = backend
        self.config = config
        self.dropped: tuple[str, ...] = ()
        self._growth = self._growth_later = 1
        self._adds = False

    @cached_property
    def sha256(self) -> str:
        """Hash of the vocabulary and rules; prepared data records it."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def _literal(self) -> _Tokenizer:
        """A copy of the tokenizer that encodes the text of control tokens as plain characters."""
        literal = copied(self.backend)
        added = literal.get_added_tokens_decoder()
        controls = [token for i, token in added.items() if i in self.control_ids and not token.special]
        for token in controls:
            token.special = True
        literal.add_special_tokens(controls)  # the tokens exist; this only marks them as special
        literal.encode_special_tokens = True
        return literal

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of the added tokens, which are found in a text before it is tokenized."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, which have a meaning besides their characters; untrusted text must not form them.

        They are the special tokens, those named in `tokenizer_config.json`, those that start and end turns and texts, and added
        tokens that the chat template contains or that look like control tokens: <|user|>, <tool_call>, [INST]. An entry of the
        vocabulary that looks like a control token counts too if the template contains it.
        """
        template = self.config.get("chat_template")
        spelled = template[:_SEARCHED] if isinstance(template, str) else ""
        added = self.backend.get_added_tokens_decoder()
        named = (self.backend.token_to_id(token) for token in (*SPECIAL_TOKENS, *named_tokens(self.config)))
        controls = {i for i, token in added.items() if token.special or _controls(token.content, spelled)}
        bytes_ = {i for i in controls if _BYTE.fullmatch(added[i].content)}  # byte tokens may occur in any text
        whole = (self.encode_rendered(each) for each in set(_MARKER.findall(spelled)))
        markers = {ids[0] for ids in whole if len(ids) == 1}
        return frozenset((controls - bytes_) | self.lengthy(i for i in markers.union(named) if i is not None))

    def lengthy(self, ids: Iterable[int]) -> frozenset[int]:
        """Returns the ids that can be control tokens: not white space or a single character, which occur in any text."""
        return frozenset(i for i in ids if len(self.text_of(i).strip()) > 1)

    @cached_property
    def unknown_ids(self) -> frozenset[int]:
        """Control ids that any text may contain: the unknown token's, unless that token has another role too."""
        stated = getattr(self.backend.model, "unk_token", None)  # Unigram models do not have the attribute
        found = {self.backend.token_to_id(stated)} if isinstance(stated, str) else set()
        found.update(call(self._literal.encode, _UNKNOWN, add_special_tokens=False).ids)
        unknown = self.control_ids & found
        ends = {name: self.config.get(name) for name in ("bos_token", "eos_token")}
        return frozenset(
            unknown - {self.backend.token_to_id(token) for token in (*SPECIAL_TOKENS, *named_tokens(ends))}
        )

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        return self.control_ids - self.unknown_ids

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Loads a `tokenizer.json`, or the one in an artifact's directory.

        Truncation, padding and BPE-dropout are reset; transformers resets the first two at each call. Entries of the
        vocabulary that `tokenizer_config.json` declares special become added tokens, as in transformers.

        Raises:
            SlmError: If the file is missing, not a tokenizer, or exceeds the limits of `slm.core.tokenizer_rules`.
        """
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise SlmError(f"tokenizer not found: {file}", "checkpoints and bundles contain a tokenizer.json")
        backend, rules = _read(file)
        tokenizer = cls(backend, read_tokenizer_config(file.parent))
        if declared := declared_tokens(backend, tokenizer.config):
            backend.add_tokens(declared)
            tokenizer._adds = True
        tokenizer.dropped = rules.state
        tokenizer._growth, tokenizer._growth_later = rules.growth, rules.growth_later
        return tokenizer

    def rebuilt(self, backend: _Tokenizer, config: dict[str, Any]) -> "Tokenizer":
        """Returns a tokenizer of the same rules with another vocabulary, under the same limits on the length of texts."""
        made = Tokenizer(backend, config)
        made._growth, made._growth_later = self._growth, self._growth_later
        return made

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` to a directory."""
        self._write(directory)
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (directory / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8", newline="")

    def copy(self, source: Path, directory: Path) -> None:
        """Copies the `tokenizer.json` that was loaded, or writes a new one if `load` changed something."""
        if self.dropped or self._adds:
            self._write(directory)
        else:
            shutil.copy(source / TOKENIZER_FILE, directory / TOKENIZER_FILE)

    def _write(self, directory: Path) -> None:
        """Writes `tokenizer.json` without indentation: Gemma's has 14 MB then, not 33, and loads faster."""
        # Written here, because the library's own errors have no error number.
        (directory / TOKENIZER_FILE).write_text(self.backend.to_str(), encoding="utf-8", newline="")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token with exactly this spelling, or None."""
        return self.backend.token_to_id(token)

    def ids_of(self, tokens: Iterable[str]) -> frozenset[int]:
        """Returns the ids of those tokens that the vocabulary has with exactly these spellings."""
        return frozenset(i for token in tokens if (i := self.token_id(token)) is not None)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that the post-processor puts before a text."""
        return self._around[0]

    @cached_property
    def suffix_ids(self) -> tuple[int, ...]:
        """The tokens that the post-processor puts after a text."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return ids_around(self.backend)

    def _checked(self, text: str) -> str:
        """Returns the text, after a check that the tokenizer's rules do not make it too long for memory.

        Raises:
            SlmError: If they do.
        """
        if self._growth <= _ORDINARY_GROWTH or len(text) * self._growth <= _MAX_GROWN_BYTES:
            return text
        # Few texts grow by the rules' maximum, so the normalizer is tried on pieces that are short enough in any case.
        normalizer, longest = self.backend.normalizer, _MAX_GROWN_BYTES // self._growth
        most, grown = max(_MAX_GROWN_BYTES, _ORDINARY_GROWTH * utf8_bytes(text)), 0
        for at in range(0, len(text), longest):
            piece = text[at : at + longest]
            grown += utf8_bytes(piece if normalizer is None else call(normalizer.normalize_str, piece))
            if grown * self._growth_later > most:
                raise SlmError(
                    f"the text has {len(text):,} characters, which this tokenizer's rules expand too much",
                    f"split it into texts of at most {longest:,} characters",
                )
        return text

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt, as transformers encodes it.

        Text of special tokens is encoded as special tokens; `prefix_ids` come before the text and `suffix_ids` after it.
        """
        ids: list[int] = encode_text(self.backend, self._checked(text), add_special_tokens=True).ids
        return ids

    def encode_literal(self, text: str, besides: frozenset[int] = frozenset()) -> list[int]:
        """Returns the ids of plain text, without `prefix_ids`; text of control tokens is encoded as plain characters.

        If the vocabulary would form a control token from plain characters, the text is split within it.

        Args:
            text: The text.
            besides: Further ids to avoid, in addition to `control_ids`.
        """
        ids: list[int] = encode_text(self._literal, self._checked(text)).ids
        forbidden = self._forbidden | besides if besides else self._forbidden
        if forbidden.isdisjoint(ids):
            return ids
        if len(text) <= 1:
            return [token for token in ids if token not in forbidden]
        middle = len(text) // 2
        return self.encode_literal(text[:middle], besides) + self.encode_literal(text[middle:], besides)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat template: with special tokens, but without `prefix_ids`."""
        ids: list[int] = encode_text(self.backend, self._checked(text)).ids
        return ids

    def encode_with_places(self, text: str) -> Encoding:
        """Returns the result of `encode_rendered` with the characters of each token (`ids`, `token_to_chars`)."""
        return encode_text(self.backend, self._checked(text))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the result of `encode_literal` for many texts, computed on all cores."""
        if self._growth > _ORDINARY_GROWTH and sum(map(len, texts)) * self._growth > _MAX_GROWN_BYTES:
            return [self.encode_literal(text) for text in texts]  # one by one, because their memory adds up otherwise
        encodings = call(
            self._literal.encode_batch_fast, [self._checked(text) for text in texts], add_special_tokens=False
        )
        return [
            encoding.ids if self._forbidden.isdisjoint(encoding.ids) else self.encode_literal(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, without special tokens."""
        return call(self.backend.decode, list(ids))

    def text_of(self, token: int) -> str:
        """Returns the text of one token, also of a special token; U+FFFD for a part of a character."""
        # Decoded after another token, because some decoders drop a space at the start of a text.
        once, twice = (call(self.backend.decode, [token] * times, skip_special_tokens=False) for times in (1, 2))
        return twice[len(once) :]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def special_tokens_in(self, text: str) -> list[tuple[int, int, int]]:
        """Returns the special tokens whose text a text contains: id, start and end (half-open, in characters)."""
        encoding = call(self.backend.encode, text, add_special_tokens=False)
        return [
            (token, *where)
            for token, where in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self.special_ids and where[0] < where[1]
        ]


def _read(file: Path) -> tuple[_Tokenizer, Rules]:
    """Returns the tokenizer of a file, and the rules that it was checked by.

    Raises:
        SlmError: If the file is not a tokenizer, or exceeds the limits of `slm.core.tokenizer_rules`.
    """
    check_readable(file, TOKENIZER_FILE)
    if file.stat().st_size > MAX_BYTES:
        raise SlmError(f"{file} has more than {MAX_BYTES >> 20} MiB")
    try:
        rules = Rules(read_text(file, TOKENIZER_FILE))
    except (Unsupported, ValueError, MemoryError) as error:
        raise SlmError(
            f"unsupported tokenizer.json: {file} ({error or 'it takes too much memory'})",
            "docs/limits.md lists what is supported",
        ) from None
    try:
        backend = call(_Tokenizer.from_str, rules.text)
        if "dropout" in rules.state:
            backend.model.dropout = None
        ids_around(backend)  # the post-processor may name a token that does not exist
    except Exception as error:  # the library raises a bare Exception for any malformed file
        reason = error.message if isinstance(error, SlmError) else error
        raise SlmError(f"invalid tokenizer.json: {file} ({reason})", "docs/limits.md lists what is supported") from None
    return backend, rules


def _controls(token: str, template: str) -> bool:
    """Returns whether an added token that is not marked special is a control token; Gemma has thousands that are not: <b>."""
    token = token.strip()
    return len(token) > 1 and (token in template or _CONTROL.fullmatch(token) is not None)
