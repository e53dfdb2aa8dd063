"""A `tokenizer.json` and what slm needs of it: ids, text, the special tokens, and text as it streams."""

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
from slm.core.tokenizer_rules import MAX_ADDED_TOKENS, MAX_BYTES, MAX_TOKEN, Rules, Unsupported

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Where transformers 5 keeps the chat template; slm keeps it in tokenizer_config.json, where 4.57 looks too.
CHAT_TEMPLATE_FILE = "chat_template.jinja"

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
PAD = "<pad>"
_T = TypeVar("_T")

# A character of a private plane, which vocabularies do not have.
_UNKNOWN = "\U0010fffd"
_CONTROL = re.compile(r"[<\[][|｜].*[|｜][>\]]|<[/A-Za-z0-9]*_[/A-Za-z0-9_]*>|\[/?[A-Z_]+\]", flags=re.DOTALL)
# Characters of a text that takes the library milliseconds.
_LONG = 2048
# Characters of a template that are searched for control tokens; a longer one is refused when it is rendered.
_SEARCHED = 64 << 10
# What looks like a control token in the source of a template.
_MARKER = re.compile(r"[<\[](?=[^<>\[\]]{0,64}[A-Za-z])[^\s<>\[\]{}'\"]{1,64}[>\]]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Of tokenizer_config.json; Gemma's has 1.2 MB.
_MAX_CONFIG_BYTES = 16 << 20
# How many bytes the rules may make of a text: eight times as many, or 2 MiB. The library takes up to a kilobyte of memory for
# each of them. Gemma's rules, GPT-2's and T5's make at most five times as many of any real text.
_ORDINARY_GROWTH, _MAX_GROWN_BYTES = 8, 2 << 20

# What stands in a text for bytes that are no character.
_REPLACEMENT = "\ufffd"
# In the order in which they get ids when a vocabulary has none of them.
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: The tokenizers library's object.
        config: What `tokenizer_config.json` says beside it: names of special tokens, chat template.
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
        """Hash of the vocabulary and rules, to tell whether data was made with the same ones."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def _literal(self) -> _Tokenizer:
        """A second view of the same vocabulary, in which a control token spelled inside a text is only its characters.

        Made when it is needed: a vocabulary of 262,144 tokens takes seconds.
        """
        literal = _Tokenizer.from_str(self.backend.to_str())
        added = literal.get_added_tokens_decoder()
        controls = [token for i, token in added.items() if i in self.control_ids and not token.special]
        for token in controls:
            token.special = True
        literal.add_special_tokens(controls)  # which are there already: only their being special is new
        literal.encode_special_tokens = True
        return literal

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that are found in a text before it is tokenized."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that mean something besides their characters, which text from elsewhere must not form.

        Special tokens, those that `tokenizer_config.json` names, those that begin and end turns and texts, and the added tokens
        that the chat template spells or that are spelled as control tokens are: <|user|>, <tool_call>, [INST]. Such a token is
        one too where the template spells it and it is an entry of the vocabulary.
        """
        template = self.config.get("chat_template")
        spelled = template[:_SEARCHED] if isinstance(template, str) else ""
        added = self.backend.get_added_tokens_decoder()
        named = (self.backend.token_to_id(token) for token in (*SPECIAL_TOKENS, *_named(self.config)))
        controls = {i for i, token in added.items() if token.special or _controls(token.content, spelled)}
        bytes_ = {i for i in controls if _BYTE.fullmatch(added[i].content)}  # parts of characters, in any text
        whole = (self.encode_rendered(each) for each in set(_MARKER.findall(spelled)))
        markers = {ids[0] for ids in whole if len(ids) == 1}
        return frozenset((controls - bytes_) | self.lengthy(i for i in markers.union(named) if i is not None))

    def lengthy(self, ids: Iterable[int]) -> frozenset[int]:
        """Returns those ids that can be control tokens: neither white space nor a single character, which any text has."""
        return frozenset(i for i in ids if len(self.text_of(i).strip()) > 1)

    @cached_property
    def unknown_ids(self) -> frozenset[int]:
        """Control ids that any text may come to: that of the unknown token, unless it also means something else."""
        stated = getattr(self.backend.model, "unk_token", None)  # which a Unigram model does not state
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

        Truncation and padding are reset, as transformers resets them at each call, and so is BPE-dropout. Entries of the
        vocabulary that `tokenizer_config.json` calls special become added tokens, as in transformers.

        Raises:
            SlmError: When it is missing, not a tokenizer, or beyond the limits of `slm.core.tokenizer_rules`.
        """
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise SlmError(f"tokenizer not found: {file}", "a checkpoint or bundle carries its tokenizer.json")
        check_readable(file, TOKENIZER_FILE)
        if file.stat().st_size > MAX_BYTES:
            raise SlmError(f"{file} has more than {MAX_BYTES >> 20} MiB")
        try:
            rules = Rules(read_text(file, TOKENIZER_FILE))
        except (Unsupported, ValueError, MemoryError) as error:
            raise SlmError(
                f"not a tokenizer.json that slm supports: {file} ({error or 'it takes too much memory'})",
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
                f"not a tokenizer.json: {file} ({reason})", "docs/limits.md lists what is supported"
            ) from None
        beside, template = file.parent / TOKENIZER_CONFIG_FILE, file.parent / CHAT_TEMPLATE_FILE
        config = _read_config(beside) if beside.is_file() else {}
        if template.is_file():
            config["chat_template"] = read_text(template, "the chat template")
        config |= _one_template(config)
        try:
            json.dumps(config, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SlmError(f"{beside} is wrong: a text in it holds half of a surrogate pair") from None
        tokenizer = cls(backend, config)
        if stated := _stated_tokens(backend, config):
            backend.add_tokens(stated)
            tokenizer._adds = True
        tokenizer.dropped = rules.state
        tokenizer._growth, tokenizer._growth_later = rules.growth, rules.growth_later
        return tokenizer

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into a directory."""
        # The library's own writing says in words alone what went wrong.
        (directory / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (directory / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")

    def copy(self, source: Path, directory: Path) -> None:
        """Copies the `tokenizer.json` it was loaded from; writes it anew where `load` changed something."""
        if self.dropped or self._adds:
            (directory / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        else:
            shutil.copy(source / TOKENIZER_FILE, directory / TOKENIZER_FILE)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token spelt exactly so, None when there is none."""
        return self.backend.token_to_id(token)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts before a text."""
        return self._around[0]

    @cached_property
    def suffix_ids(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts after a text."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        processor = self.backend.post_processor
        if processor is None:
            return (), ()
        before, after = _around(json.loads(processor.__getstate__()))
        if [*before, *after] != _asked(self.backend.encode, "").ids:  # the library leaves out some of what is chained
            raise SlmError("its post-processors put other tokens around a text than each of them states")
        return tuple(before), tuple(after)

    def _checked(self, text: str) -> str:
        """Returns a text that the rules do not make too long for memory.

        Raises:
            SlmError: When they do.
        """
        if self._growth <= _ORDINARY_GROWTH or len(text) * self._growth <= _MAX_GROWN_BYTES:
            return text
        # Few texts grow as much as the rules allow, so the normalizer is tried on pieces of the text that are safe in any case.
        normalizer, longest = self.backend.normalizer, _MAX_GROWN_BYTES // self._growth
        most, grown = max(_MAX_GROWN_BYTES, _ORDINARY_GROWTH * _bytes(text)), 0
        for at in range(0, len(text), longest):
            piece = text[at : at + longest]
            grown += _bytes(piece if normalizer is None else _asked(normalizer.normalize_str, piece))
            if grown * self._growth_later > most:
                raise SlmError(
                    f"the text has {len(text):,} characters, and this tokenizer makes it too long",
                    f"split it into texts of at most {longest:,} characters",
                )
        return text

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt, as transformers makes them.

        Special tokens count where they are spelled; `prefix_ids` come before the text and `suffix_ids` after it.
        """
        ids: list[int] = _encoded(self.backend, self._checked(text), add_special_tokens=True).ids
        return ids

    def encode_literal(self, text: str, besides: frozenset[int] = frozenset()) -> list[int]:
        """Returns the ids of a text as it stands: nothing put before it, and no control token, however it is spelled.

        A control token that the vocabulary forms from plain characters is avoided by cutting the text within it.

        Args:
            text: The text.
            besides: Control tokens besides `control_ids`.
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
        """Returns the ids of a rendered chat template: special tokens where they are spelled, and nothing put before it."""
        ids: list[int] = _encoded(self.backend, self._checked(text)).ids
        return ids

    def encode_with_places(self, text: str) -> Encoding:
        """Returns what `encode_rendered` does, with the characters for which each token stands (`ids`, `token_to_chars`)."""
        return _encoded(self.backend, self._checked(text))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Like `encode_literal` for many texts at once, on all cores."""
        if self._growth > _ORDINARY_GROWTH and sum(map(len, texts)) * self._growth > _MAX_GROWN_BYTES:
            return [self.encode_literal(text) for text in texts]  # whose memory adds up otherwise
        encodings = _asked(
            self._literal.encode_batch_fast, [self._checked(text) for text in texts], add_special_tokens=False
        )
        return [
            encoding.ids if self._forbidden.isdisjoint(encoding.ids) else self.encode_literal(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

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


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _encoded(backend: _Tokenizer, text: str, add_special_tokens: bool = False) -> Encoding:
    """Encodes a text; a long one so that other threads of Python run meanwhile, as an event loop."""
    if len(text) < _LONG:
        return _asked(backend.encode, text, add_special_tokens=add_special_tokens)
    return _asked(partial(_only, backend), text, add_special_tokens=add_special_tokens)


def _only(backend: _Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
    # Unlike `encode`, the library's `encode_batch` lets go of Python's lock.
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _asked(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Calls the library, which panics over some files, fails over others, and calls a text no text.

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
        if type(error) is Exception:  # the library's own, as where a text needs an unknown token and there is none
            raise SlmError(f"the tokenizer failed: {error}", "its tokenizer.json does not cover every text") from None
        raise


_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _stated_tokens(backend: _Tokenizer, config: dict[str, Any]) -> list[AddedToken]:
    """Returns the added tokens that only `tokenizer_config.json` states, as transformers adds them.

    They are entries of `added_tokens_decoder` that differ from those of `tokenizer.json`, then named special tokens that are no
    added tokens. A token that the vocabulary does not have is left out: the model has no row for it.
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
    """Returns the special tokens that a `tokenizer_config.json` names, plainly or in objects, by whatever key."""
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
    """Returns whether an added token that is not called special is a control token; Gemma has thousands that are not, as <b>."""
    token = token.strip()
    return len(token) > 1 and (token in template or _CONTROL.fullmatch(token) is not None)


def _read_config(path: Path) -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json`.

    Raises:
        SlmError: When it is not a JSON object, or larger than any real one.
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
    """Returns the ids that a post-processor puts before a text and after it."""
    match processor["type"]:
        case "Sequence":
            before: list[int] = []
            after: list[int] = []
            for each in processor["processors"]:  # each puts its own around what the one before it made
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
    """Returns the default of several chat templates: a list of names and templates, or an object."""
    templates = config.get("chat_template")
    if isinstance(templates, list):
        pairs = [(each.get("name"), each.get("template")) for each in templates if isinstance(each, dict)]
        templates = {name: template for name, template in pairs if isinstance(name, str)}
    if templates is None or isinstance(templates, str):
        return {}
    default = templates.get("default") if isinstance(templates, dict) else None
    if not isinstance(default, str):
        raise SlmError(
            f"{TOKENIZER_CONFIG_FILE} has several chat templates and none is the default"
            if isinstance(templates, dict)
            else f"{TOKENIZER_CONFIG_FILE}: chat_template is not a text",
            "keep one of them, or name one of them default",
        )
    return {"chat_template": default}
