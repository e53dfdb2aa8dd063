"""A `tokenizer.json` and what slm needs of it: ids, text, the special tokens, and text as it streams."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as _Tokenizer

from slm.core.errors import SlmError
from slm.core.files import read_json, read_text

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Where transformers 5 keeps the chat template; slm keeps it in tokenizer_config.json, where 4.57 looks too.
CHAT_TEMPLATE_FILE = "chat_template.jinja"

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
PAD = "<pad>"
_T = TypeVar("_T")

# Characters of a text that takes the library milliseconds.
_LONG = 2048
# What stands in a text for bytes that are no character.
_REPLACEMENT = "\ufffd"
# In the order in which they get ids when a vocabulary has none of them.
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: The tokenizers library's object.
        config: What `tokenizer_config.json` says beside it: names of special tokens, chat template.
    """

    def __init__(self, backend: _Tokenizer, config: dict[str, Any]) -> None:
        self.backend = backend
        self.config = config

    @cached_property
    def sha256(self) -> str:
        """Hash of the vocabulary and rules, to tell whether data was made with the same ones."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def _literal(self) -> _Tokenizer:
        """A second view of the same vocabulary in which "<|endoftext|>" inside a text is only those characters.

        Made when it is needed: a vocabulary of 262,144 tokens takes seconds.
        """
        literal = _Tokenizer.from_str(self.backend.to_str())
        literal.encode_special_tokens = True
        return literal

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Loads a `tokenizer.json`, or the one in an artifact's directory.

        Raises:
            SlmError: When it is missing or not a tokenizer.
        """
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise SlmError(f"tokenizer not found: {file}", "a checkpoint or bundle carries its tokenizer.json")
        try:
            backend = _asked(_Tokenizer.from_file, str(file))
            _asked(backend.encode, "")  # of what is put before a text, too, something may be missing
        except Exception as error:  # the library raises a bare Exception for any malformed file
            raise SlmError(f"not a tokenizer.json: {file} ({error})") from None
        beside, template = file.parent / TOKENIZER_CONFIG_FILE, file.parent / CHAT_TEMPLATE_FILE
        config = read_json(beside, TOKENIZER_CONFIG_FILE) if beside.is_file() else {}
        if template.is_file():
            config["chat_template"] = read_text(template, "the chat template")
        config |= _one_template(config)
        try:
            json.dumps(config, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SlmError(f"{beside} is wrong: a text in it holds half of a surrogate pair") from None
        return cls(backend, config)

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into a directory."""
        # The library's own writing says in words alone what went wrong.
        (directory / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (directory / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens that mean something besides their characters, as they are spelt."""
        return tuple(token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token spelt exactly so, None when there is none."""
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt: what the tokenizer puts before a text, and special tokens where they are spelt."""
        return _ids(self.backend, text)

    def encode_literal(self, text: str) -> list[int]:
        """Returns the ids of a text as it stands: nothing put before it, no special token read out of it."""
        return _ids(self._literal, text, add_special_tokens=False)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat template: special tokens where they are spelt, and nothing put before it."""
        return _ids(self.backend, text, add_special_tokens=False)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Like `encode_literal` for many texts at once, on all cores."""
        encodings = _asked(self._literal.encode_batch_fast, list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, special tokens left out."""
        return _asked(self.backend.decode, list(ids))

    def text_of(self, token: int) -> str:
        """Returns what a token adds to a text, special tokens as they are spelt; U+FFFD for parts of characters."""
        # Beside another one: at the beginning of a text some decoders drop a space.
        once, twice = (_asked(self.backend.decode, [token] * times, skip_special_tokens=False) for times in (1, 2))
        return twice[len(once) :]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def special_tokens_in(self, text: str) -> list[tuple[int, int, int]]:
        """Returns the special tokens that a text spells: id, and where in the text (half-open, in characters)."""
        encoding = _asked(self.backend.encode, text, add_special_tokens=False)
        return [
            (token, *where)
            for token, where in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self.special_ids and where[0] < where[1]
        ]


class TextStream:
    """The text of tokens as they come, never half a character.

    The pieces make up what `Tokenizer.decode` returns for all of the tokens. Bytes that become no character appear as
    U+FFFD, once it is certain or the text ends. (The library's own DecodeStream fails when a byte-fallback vocabulary
    writes them: to its decoder one such byte makes the characters before it invalid too. Those stay here.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []  # the tokens of the last piece: decoders join and strip at the beginning of a text
        self._held: list[int] = []

    @property
    def begun(self) -> bool:
        """Whether a token has come that is part of the text."""
        return bool(self._before or self._held)

    def push(self, token: int) -> str:
        """Takes a token and returns the whole characters that are complete with it, often none."""
        if token in self.tokenizer.special_ids:
            return ""
        self._held.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT):  # perhaps the beginning of a character
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Returns the rest: the text ended within a character."""
        text, self._held = self._text(), []
        return text

    def _text(self) -> str:
        before, text = (self.tokenizer.decode(ids) for ids in (self._before, self._before + self._held))
        return text[len(before) :] if text.startswith(before) else self.tokenizer.decode(self._held)


def _ids(backend: _Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Returns the ids of a text. Other threads can run during a long one: only the library's batches release Python's lock."""
    if len(text) < _LONG:
        return _asked(backend.encode, text, add_special_tokens=add_special_tokens).ids
    (encoding,) = _asked(backend.encode_batch_fast, [text], add_special_tokens=add_special_tokens)
    return encoding.ids


def _asked(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Calls the library, which panics over some files and calls a text no text over others.

    Raises:
        SlmError: When it does.
    """
    try:
        return function(*arguments, **options)
    except TypeError:
        if all(isinstance(each, str | list) for each in arguments):
            raise SlmError("the text holds half of a surrogate pair", "write the character itself") from None
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of no module that could be imported
            raise SlmError(f"the tokenizer failed: {error}", "its tokenizer.json is damaged") from None
        raise


def _one_template(config: dict[str, Any]) -> dict[str, str]:
    """Returns the default of several chat templates, which transformers also allows as a list of names and templates."""
    templates = config.get("chat_template")
    if not isinstance(templates, list):
        return {}
    found = (each.get("template") for each in templates if isinstance(each, dict) and each.get("name") == "default")
    default = next(found, None)
    if not isinstance(default, str):
        raise SlmError("tokenizer_config.json has several chat templates and none is the default", "keep one of them")
    return {"chat_template": default}
