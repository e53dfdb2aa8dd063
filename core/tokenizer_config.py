"""Reads `tokenizer_config.json`: the chat template, named special tokens, and added tokens that only this file declares."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from slm.core.errors import SlmError
from slm.core.files import read_json, read_text
from slm.core.tokenizer_fields import MAX_TOKEN
from slm.core.tokenizer_rules import MAX_ADDED_TOKENS

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# transformers 5 stores the chat template in this file. slm stores it in tokenizer_config.json, which 4.57 reads too.
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# The largest tokenizer_config.json; Gemma's has 1.2 MB.
_MAX_CONFIG_BYTES = 16 << 20
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Returns the configuration of a tokenizer with one chat template, its own file's if there is one; {} without files.

    Raises:
        SlmError: If a file is not valid, or is larger than real ones.
    """
    path, template = directory / TOKENIZER_CONFIG_FILE, directory / CHAT_TEMPLATE_FILE
    config = _read_config(path) if path.is_file() else {}
    if template.is_file():
        config["chat_template"] = read_text(template, "the chat template")
    config |= _one_template(config)
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise SlmError(f"{path} is invalid: it contains a lone surrogate") from None
    return config


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


def declared_tokens(backend: Tokenizer, config: dict[str, Any]) -> list[AddedToken]:
    """Returns the added tokens that only `tokenizer_config.json` declares; transformers adds the same.

    Two kinds count: entries of `added_tokens_decoder` that differ from those of `tokenizer.json`, and named special tokens that
    are not added tokens. Tokens that the vocabulary does not contain are ignored: the model has no embedding for them.
    """
    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    stated: dict[str, AddedToken] = {}
    listed = config.get("added_tokens_decoder")
    for given in listed.values() if isinstance(listed, dict) else ():
        token = _added_token(given) if isinstance(given, dict) else None
        if token is not None and not _same_token(there.get(token.content), token):
            stated[token.content] = token
    for name in sorted(named_tokens(config)):
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


def named_tokens(config: dict[str, Any]) -> set[str]:
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
