"""Rebuilds a tokenizer with fewer tokens, whose ids are numbered from 0."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.interchange.trim.choice import Array


def trim_tokenizer(tokenizer: Tokenizer, document: Mapping[str, Any], kept: Array) -> Tokenizer:
    """Returns the tokenizer with the kept tokens; merges stay in their order if all of their tokens do.

    Args:
        tokenizer: The tokenizer.
        document: Its `tokenizer.json`.
        kept: The ids that stay, in the order of the new ids: those of the model before those of added tokens.

    Raises:
        SlmError: If the tokenizers library numbers the tokens otherwise.
    """
    new = {int(old): number for number, old in enumerate(kept)}
    added = [token | {"id": new[token["id"]]} for token in document["added_tokens"] if token["id"] in new]
    made = {
        **document,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": _processor(document["post_processor"], new),
        "model": _model(document["model"], new),
    }
    backend = Backend.from_str(json.dumps(made))
    for old, number in new.items():
        token = tokenizer.backend.id_to_token(old)
        if token is None or backend.id_to_token(number) != token or backend.token_to_id(token) != number:
            raise SlmError(f"cannot trim this tokenizer: the token {token!r} does not get the id {number:,}")
    if backend.get_vocab_size(with_added_tokens=True) != len(new):
        raise SlmError("cannot trim this tokenizer: it has several tokens of one spelling")
    return tokenizer.rebuilt(backend, trimmed_config(tokenizer.config, backend, new))


def _model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: the id is the position
        entries = [entry for i, entry in enumerate(vocabulary) if i in new]
        unknown = model.get("unk_id")
        return {**model, "vocab": entries, "unk_id": None if unknown is None else new[unknown]}
    tokens = {token: new[i] for token, i in vocabulary.items() if i in new}
    if "merges" not in model:
        return {**model, "vocab": tokens}
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [[a, b] for a, b in pairs if a in tokens and b in tokens and a + b in tokens]
    return {**model, "vocab": tokens, "merges": merges}


def _processor(processor: Mapping[str, Any] | None, new: Mapping[int, int]) -> Any:
    if processor is None:
        return None
    match processor["type"]:
        case "Sequence":
            return {**processor, "processors": [_processor(each, new) for each in processor["processors"]]}
        case "TemplateProcessing":
            tokens = {
                name: {**token, "ids": [new[i] for i in token["ids"]]}
                for name, token in processor["special_tokens"].items()
            }
            return {**processor, "special_tokens": tokens}
        case "BertProcessing" | "RobertaProcessing":
            marks = {name: [processor[name][0], new[processor[name][1]]] for name in ("cls", "sep")}
            return {**processor, **marks}
    return processor


def trimmed_config(config: Mapping[str, Any], backend: Backend, new: Mapping[int, int]) -> dict[str, Any]:
    """Returns `tokenizer_config.json` with new ids, and without tokens that left."""

    def stays(value: Any) -> bool:
        token = value.get("content") if isinstance(value, dict) else value
        return not isinstance(token, str) or backend.token_to_id(token) is not None

    made: dict[str, Any] = {}
    for name, value in config.items():
        if name == "added_tokens_decoder" and isinstance(value, dict):
            ids = {int(i): token for i, token in value.items() if i.isdecimal()}
            made[name] = {str(new[i]): token for i, token in sorted(ids.items()) if i in new}
        elif name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            made[name] = [token for token in value if stays(token)]
        elif name == "extra_special_tokens" and isinstance(value, dict):
            made[name] = {key: token for key, token in value.items() if stays(token)}
        elif name.endswith("_token_id") and type(value) is int:
            if value in new:
                made[name] = new[value]
        elif not name.endswith("_token") or stays(value):
            made[name] = value
    return made


def trimmed_generation(fields: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Returns the fields of `generation_config.json` with new ids, and without ids that left."""
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens"):
            if isinstance(value, list):
                made[name] = [new[i] for i in value if i in new]
            elif type(value) is not int:
                made[name] = value
            elif value in new:
                made[name] = new[value]
        elif name in ("bad_words_ids", "force_words_ids") and isinstance(value, list):
            words = [word for word in value if isinstance(word, list) and all(i in new for i in word)]
            made[name] = [[new[i] for i in word] for word in words] or None
        elif name in ("sequence_bias", "forced_decoder_ids"):
            continue  # their ids are spelled in ways that differ between versions of transformers
        else:
            made[name] = value
    return made
