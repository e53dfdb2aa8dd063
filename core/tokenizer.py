"""Tokenizers from `tokenizer.json`: encoding, decoding, special tokens, and incremental text of a stream of tokens."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as _Tokenizer

from slm.core.errors import SlmError
from slm.core.files import check_readable, read_json, read_text
from slm.core.tokenizer_fields import MAX_BYTES, MAX_TOKEN, Unsupported
from slm.core.tokenizer_rules import MAX_ADDED_TOKENS, Rules

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# transformers 5 stores the chat template in this file. slm stores it in tokenizer_config.json, which 4.57 reads too.
CHAT_TEMPLATE_FILE = "chat_template.jinja"

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
PAD = "<pad>"
_T = TypeVar("_T")

# A private-use character, which vocabularies do not contain.
_UNKNOWN = "\U0010fffd"
_CONTROL = re.compile(r"[<\[][|｜].*[|｜][>\]]|<[/A-Za-z0-9]*_[/A-Za-z0-9_]*>|\[/?[A-Z_]+\]", flags=re.DOTALL)
# Shorter texts take the library milliseconds; length in characters.
_LONG = 2048
# How many characters of a chat template are searched for control tokens; rendering rejects longer templates.
_SEARCHED = 64 << 10
# Text in the source of a template that looks like a control token.
_MARKER = re.compile(r"[<\[](?=[^<>\[\]]{0,64}[A-Za-z])[^\s<>\[\]{}'\"]{1,64}[>\]]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The largest tokenizer_config.json; Gemma's has 1.2 MB.
_MAX_CONFIG_BYTES = 16 << 20
# Limits on the bytes that the rules may produce from a text: eight times its length, or 2 MiB. The library needs up to a
# kilobyte of memory for each. The rules of Gemma, GPT-2 and T5 produce at most five times the length of real texts.
_ORDINARY_GROWTH, _MAX_GROWN_BYTES = 8, 2 << 20

# The replacement for bytes that are not a character.
_REPLACEMENT = "\ufffd"
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
        """A copy of the tokenizer that encodes the text of control tokens as plain characters.

        Created on first use: a vocabulary of 262,144 tokens takes seconds.
        """
        literal = _Tokenizer.from_str(self.backend.to_str())
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
        named = (self.backend.token_to_id(token) for token in (*SPECIAL_TOKENS, *_named(self.config)))
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
        found.update(_asked(self._literal.encode, _UNKNOWN, add_special_tokens=False).ids)
        unknown = self.control_ids & found
        ends = {name: self.config.get(name) for name in ("bos_token", "eos_token")}
        return frozenset(unknown - {self.backend.token_to_id(token) for token in (*SPECIAL_TOKENS, *_named(ends))})

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
            backend = _asked(_Tokenizer.from_str, rules.text)
            if "dropout" in rules.state:
                backend.model.dropout = None
            cls(backend, {}).prefix_ids  # noqa: B018  # the post-processor may name a token that does not exist
        except Exception as error:  # the library raises a bare Exception for any malformed file
            reason = error.message if isinstance(error, SlmError) else error
            raise SlmError(
                f"invalid tokenizer.json: {file} ({reason})", "docs/limits.md lists what is supported"
            ) from None
        beside, template = file.parent / TOKENIZER_CONFIG_FILE, file.parent / CHAT_TEMPLATE_FILE
        config = _read_config(beside) if beside.is_file() else {}
        if template.is_file():
            config["chat_template"] = read_text(template, "the chat template")
        config |= _one_template(config)
        try:
            json.dumps(config, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SlmError(f"{beside} is invalid: it contains a lone surrogate") from None
        tokenizer = cls(backend, config)
        if stated := _stated_tokens(backend, config):
            backend.add_tokens(stated)
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
        # Written here, because the library's own errors have no error number.
        (directory / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (directory / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")

    def copy(self, source: Path, directory: Path) -> None:
        """Copies the `tokenizer.json` that was loaded, or writes a new one if `load` changed something."""
        if self.dropped or self._adds:
            (directory / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        else:
            shutil.copy(source / TOKENIZER_FILE, directory / TOKENIZER_FILE)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token with exactly this spelling, or None."""
        return self.backend.token_to_id(token)

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
        processor = self.backend.post_processor
        if processor is None:
            return (), ()
        before, after = _around(json.loads(processor.__getstate__()))
        if [*before, *after] != _asked(self.backend.encode, "").ids:  # the library ignores some of a chain
            raise SlmError("the post-processors of tokenizer.json put other tokens around a text than they state")
        return tuple(before), tuple(after)

    def _checked(self, text: str) -> str:
        """Returns the text, after a check that the tokenizer's rules do not make it too long for memory.

        Raises:
            SlmError: If they do.
        """
        if self._growth <= _ORDINARY_GROWTH or len(text) * self._growth <= _MAX_GROWN_BYTES:
            return text
        # Few texts grow by the rules' maximum, so the normalizer is tried on pieces that are short enough in any case.
        normalizer, longest = self.backend.normalizer, _MAX_GROWN_BYTES // self._growth
        most, grown = max(_MAX_GROWN_BYTES, _ORDINARY_GROWTH * _bytes(text)), 0
        for at in range(0, len(text), longest):
            piece = text[at : at + longest]
            grown += _bytes(piece if normalizer is None else _asked(normalizer.normalize_str, piece))
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
        ids: list[int] = _encoded(self.backend, self._checked(text), add_special_tokens=True).ids
        return ids

    def encode_literal(self, text: str, besides: frozenset[int] = frozenset()) -> list[int]:
        """Returns the ids of plain text, without `prefix_ids`; text of control tokens is encoded as plain characters.

        If the vocabulary would form a control token from plain characters, the text is split within it.

        Args:
            text: The text.
            besides: Further ids to avoid, in addition to `control_ids`.
        """
        ids: list[int] = _encoded(self._literal, self._checked(text)).ids
        forbidden = self._forbidden | besides if besides else self._forbidden
        if forbidden.isdisjoint(ids):
            return ids
        if len(text) <= 1:
            return [token for token in ids if token not in forbidden]
        middle = len(text) // 2
        return self.encode_literal(text[:middle], besides) + self.encode_literal(text[middle:], besides)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat template: with special tokens, but without `prefix_ids`."""
        ids: list[int] = _encoded(self.backend, self._checked(text)).ids
        return ids

    def encode_with_places(self, text: str) -> Encoding:
        """Returns the result of `encode_rendered` with the characters of each token (`ids`, `token_to_chars`)."""
        return _encoded(self.backend, self._checked(text))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the result of `encode_literal` for many texts, computed on all cores."""
        if self._growth > _ORDINARY_GROWTH and sum(map(len, texts)) * self._growth > _MAX_GROWN_BYTES:
            return [self.encode_literal(text) for text in texts]  # one by one, because their memory adds up otherwise
        encodings = _asked(
            self._literal.encode_batch_fast, [self._checked(text) for text in texts], add_special_tokens=False
        )
        return [
            encoding.ids if self._forbidden.isdisjoint(encoding.ids) else self.encode_literal(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, without special tokens."""
        return _asked(self.backend.decode, list(ids))

    def text_of(self, token: int) -> str:
        """Returns the text of one token, also of a special token; U+FFFD for a part of a character."""
        # Decoded after another token, because some decoders drop a space at the start of a text.
        once, twice = (_asked(self.backend.decode, [token] * times, skip_special_tokens=False) for times in (1, 2))
        return twice[len(once) :]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def special_tokens_in(self, text: str) -> list[tuple[int, int, int]]:
        """Returns the special tokens whose text a text contains: id, start and end (half-open, in characters)."""
        encoding = _asked(self.backend.encode, text, add_special_tokens=False)
        return [
            (token, *where)
            for token, where in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self.special_ids and where[0] < where[1]
        ]


class TextStream:
    """Converts a stream of tokens to text, in whole characters.

    The pieces together equal `Tokenizer.decode` of all tokens. Bytes that do not form a character become U+FFFD, as soon as
    that is certain or the text ends. (The library's own DecodeStream fails for byte-fallback vocabularies: one such byte makes
    its decoder treat the characters before it as invalid too.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []  # the tokens of the last piece: decoders join and strip at the start of a text
        self._held: list[int] = []

    @property
    def begun(self) -> bool:
        """Whether a token of the text has arrived."""
        return bool(self._before or self._held)

    def push(self, token: int) -> str:
        """Takes a token and returns the characters that it completes, often none."""
        if token in self.tokenizer.special_ids:
            return ""
        self._held.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT):  # perhaps the start of a character
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Returns the rest of a text that ended within a character."""
        text, self._held = self._text(), []
        return text

    def _text(self) -> str:
        before, text = (self.tokenizer.decode(ids) for ids in (self._before, self._before + self._held))
        return text[len(before) :] if text.startswith(before) else self.tokenizer.decode(self._held)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _encoded(backend: _Tokenizer, text: str, add_special_tokens: bool = False) -> Encoding:
    """Encodes a text; during a long one, other Python threads can run."""
    if len(text) < _LONG:
        return _asked(backend.encode, text, add_special_tokens=add_special_tokens)
    return _asked(partial(_only, backend), text, add_special_tokens=add_special_tokens)


def _only(backend: _Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
    # Unlike `encode`, the library's `encode_batch` releases Python's global lock.
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _asked(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Calls the library and converts its panics and exceptions.

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
        if (
            type(error) is Exception
        ):  # raised by the library, for example if a text needs an unknown token and none exists
            raise SlmError(f"the tokenizer failed: {error}", "its tokenizer.json does not cover every text") from None
        raise


_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _stated_tokens(backend: _Tokenizer, config: dict[str, Any]) -> list[AddedToken]:
    """Returns the added tokens that only `tokenizer_config.json` declares; transformers adds the same.

    These are entries of `added_tokens_decoder` that differ from those of `tokenizer.json`, and named special tokens that are
    not added tokens. Tokens that the vocabulary does not contain are ignored: the model has no embedding for them.
    """
    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    stated: dict[str, AddedToken] = {}
    listed = config.get("added_tokens_decoder")
    for given in listed.values() if isinstance(listed, dict) else ():
        token = _added_token(given) if isinstance(given, dict) else None
        if token is not None and not _same_token(there.get(token.content), token):
            stated[token.content] = token
    for name in sorted(_named(config)):
        if name not in there and name not in stated:
            stated[name] = AddedToken(name, special=True, normalized=False)
    found = [token for name, token in stated.items() if name and backend.token_to_id(name) is not None]
    if len(found) > MAX_ADDED_TOKENS:
        raise SlmError(f"{TOKENIZER_CONFIG_FILE} has more than {MAX_ADDED_TOKENS:,} added tokens")
    return found


def _added_token(given: dict[str, Any]) -> AddedToken | None:
    content = given.get("content")
    flags = {name: given[name] for name in _TOKEN_FLAGS if isinstance(given.get(name), bool)}
    return AddedToken(content, **flags) if isinstance(content, str) else None


def _same_token(token: AddedToken | None, other: AddedToken) -> bool:
    return token is not None and all(getattr(token, name) == getattr(other, name) for name in _TOKEN_FLAGS)


def _named(config: dict[str, Any]) -> set[str]:
    """Returns the special tokens named in `tokenizer_config.json`, as strings or in objects, under any key."""
    values = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        several = config.get(key)
        values += several.values() if isinstance(several, dict) else several if isinstance(several, list) else []
    added = config.get("added_tokens_decoder")
    if isinstance(added, dict):
        values += [token for token in added.values() if isinstance(token, dict) and token.get("special") is True]
    spelled = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {each for each in spelled if isinstance(each, str)}


def _controls(token: str, template: str) -> bool:
    """Returns whether an added token that is not marked special is a control token; Gemma has thousands that are not: <b>."""
    token = token.strip()
    return len(token) > 1 and (token in template or _CONTROL.fullmatch(token) is not None)


def _read_config(path: Path) -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json`.

    Raises:
        SlmError: If the file is not a JSON object, or is larger than real ones.
    """
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise SlmError(f"{path} has more than {_MAX_CONFIG_BYTES >> 20} MiB")
    config = read_json(path, TOKENIZER_CONFIG_FILE)
    for name, value in config.items():
        spelt = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(spelt, str) and len(spelt) > MAX_TOKEN:
            raise SlmError(f"{path}: {name} has more than {MAX_TOKEN:,} characters")
    return config


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


def _one_template(config: dict[str, Any]) -> dict[str, str]:
    """Returns the default chat template, if the configuration has several: a list of names and templates, or an object."""
    templates = config.get("chat_template")
    if isinstance(templates, list):
        pairs = [(each.get("name"), each.get("template")) for each in templates if isinstance(each, dict)]
        templates = {name: template for name, template in pairs if isinstance(name, str)}
    if templates is None or isinstance(templates, str):
        return {}
    default = templates.get("default") if isinstance(templates, dict) else None
    if not isinstance(default, str):
        raise SlmError(
            f"{TOKENIZER_CONFIG_FILE} has several chat templates but no default"
            if isinstance(templates, dict)
            else f"{TOKENIZER_CONFIG_FILE}: chat_template is not a string",
            "keep one of them, or name one of them default",
        )
    return {"chat_template": default}
