"""Writes a checkpoint with a part of its vocabulary."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.core.checkpoint import (
    CHECKPOINT_FILES,
    GENERATION_CONFIG_FILE,
    INFO_FILE,
    fill_checkpoint,
    notices_of,
    now,
    open_weights,
    read_config,
    read_info,
    tensor_shapes,
)
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_json
from slm.core.licence import modified
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import EMBEDDING, HEAD, Array, Weights, weights_sha256
from slm.interchange.trim.choice import MULTIPLE, Choice, Wanted, choose, required_tokens
from slm.interchange.trim.needs import Needs
from slm.interchange.trim.texts import Compared, Counted, Texts, compare_pieces, count_tokens
from slm.interchange.trim.tokenizer import trim_tokenizer, trimmed_generation
from slm.version import __version__

# Compares the models: (source, trimmed checkpoint, both tokenizers, original id of each new one, held-out texts) to figures for
# `slm.json`.
Prove = Callable[[Path, Path, tuple[Tokenizer, Tokenizer], Array, list[str]], Mapping[str, Any]]

_TABLES = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Trimmed:
    """A trimmed checkpoint.

    Attributes:
        path: The checkpoint.
        choice: The tokens that stay.
        vocab_size: Rows of the embedding before and after.
        parameters: Number of parameters before and after.
        bytes: Bytes of the tensors before and after.
        data: The tokens of the data.
        held_out: The tokens of the held-out text.
        data_compared: The data in both tokenizers.
        held_out_compared: The held-out text in both tokenizers.
        proof: The figures of the comparison of the models; empty without PyTorch.
        notices: The licence notices.
    """

    path: Path
    choice: Choice
    vocab_size: tuple[int, int]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    data: Counted
    held_out: Counted
    data_compared: Compared
    held_out_compared: Compared
    proof: Mapping[str, Any]
    notices: tuple[str, ...]


def trim_checkpoint(
    source: Path,
    out: Path,
    data: Texts,
    held_out: Texts,
    wanted: Wanted,
    prove: Prove | None = None,
    progress: Progress | None = None,
) -> Trimmed:
    """Writes a checkpoint with the tokens that a text needs, completely or not at all.

    Args:
        source: The checkpoint.
        out: The directory to create or replace.
        data: The text whose tokens stay.
        held_out: Text that the result is measured on.
        wanted: The size of the vocabulary.
        prove: Compares the models before the checkpoint appears; raises SlmError if they differ.
        progress: Receives the progress of each pass.

    Raises:
        SlmError: If the checkpoint or a text cannot be read, the tokenizer is not supported, the size is not possible, or the
            result differs from the source.
    """
    progress = progress or Silent()
    if out.resolve() == source.resolve():
        raise SlmError(f"{out} is the source itself", "choose another --out")
    config, tokenizer = read_config(source), Tokenizer.load(source)
    weights, wanted_shapes = open_weights(source, config), tensor_shapes(config)
    document = json.loads(tokenizer.backend.to_str())
    needs, rows = Needs(document["model"]), config.vocab_size
    if max(needs.ids.values()) >= rows:
        raise SlmError(f"{source}: the tokenizer has more tokens than the embedding's {rows:,} rows")
    stated = [i for i in (config.bos_token_id, config.pad_token_id, *config.stop_token_ids) if i is not None]
    required = required_tokens(tokenizer, document, needs, stated, rows, wanted.also)
    nameless = sorted(i for i in required if tokenizer.backend.id_to_token(i) is None)
    if nameless:
        raise SlmError(f"config.json names the token {nameless[0]}, which the tokenizer does not have")
    added = [token["id"] for token in document["added_tokens"]]
    total = len({*needs.ids.values(), *(i for i in added if i < rows)})

    counted = count_tokens(data, tokenizer, rows, progress, "count tokens")
    choice = choose(needs, counted.counts, required, wanted, total, added)
    if wanted.keep is not None and len(choice.ids) > wanted.keep:
        progress.note(f"--keep {wanted.keep} is rounded up to {len(choice.ids):,}, a multiple of {MULTIPLE}")
    made = trim_tokenizer(tokenizer, document, choice.ids)
    del document, needs
    compared = compare_pieces(data, counted, tokenizer, made, choice.ids, progress, "compare pieces")
    kept_back = count_tokens(held_out, tokenizer, rows, progress, "held-out text")
    compared_back = compare_pieces(held_out, kept_back, tokenizer, made, choice.ids, progress, "compare pieces")

    new_config = _trimmed_config(config, choice)
    notices = modified(notices_of(source), f"vocabulary trimmed from {rows:,} to {len(choice.ids):,} tokens")
    record = {
        "path": str(source),
        "weights_sha256": weights_sha256(source),
        "tokenizer_sha256": tokenizer.sha256,
        "slm_version": __version__,
        "vocab_size": [rows, len(choice.ids)],
        "kept_ids": ranges(choice.ids),
        "tokens": {name: value for name, value in asdict(choice).items() if name != "ids"},
        "data": _summary(data, counted, compared),
        "held_out": _summary(held_out, kept_back, compared_back),
    }
    info = read_info(source) | {"trimmed": record, "notices": notices}
    info.setdefault("made_by", "slm trim")
    generation = _generation(source, choice)
    with atomic_directory(out, CHECKPOINT_FILES) as directory:
        tensors = _gathered(weights, wanted_shapes, choice.ids, progress)
        size = sum(array.nbytes for array in tensors.values())
        fill_checkpoint(directory, new_config, tensors, made, info, generation)
        del tensors
        _check_written(directory, weights, wanted_shapes, choice.ids, progress)
        proof = {} if prove is None else dict(prove(source, directory, (tokenizer, made), choice.ids, kept_back.sample))
        record["proof"] = proof
        text = json.dumps({**info, "created": now()}, indent=2) + "\n"
        (directory / INFO_FILE).write_text(text, encoding="utf-8", newline="")
    return Trimmed(
        out,
        choice,
        (rows, len(choice.ids)),
        (config.parameter_count(), new_config.parameter_count()),
        (_bytes(weights, wanted_shapes), size),
        counted,
        kept_back,
        compared,
        compared_back,
        proof,
        notices,
    )


def ranges(ids: Array) -> str:
    """Returns ids in ascending order as text: "0-5 7 9-12"."""
    ordered = np.sort(ids)
    starts = np.flatnonzero(np.diff(ordered, prepend=-2) != 1)
    ends = np.append(starts[1:], len(ordered)) - 1
    pairs = zip(ordered[starts], ordered[ends], strict=True)
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in pairs)


def _trimmed_config(config: ModelConfig, choice: Choice) -> ModelConfig:
    new = {int(old): number for number, old in enumerate(choice.ids)}
    ends = config.eos_token_id
    changes = {
        "vocab_size": len(choice.ids),
        "bos_token_id": None if config.bos_token_id is None else new[config.bos_token_id],
        "pad_token_id": None if config.pad_token_id is None else new[config.pad_token_id],
        "eos_token_id": tuple(new[i] for i in ends) if isinstance(ends, tuple) else None if ends is None else new[ends],
    }
    return ModelConfig.checked(config.model_dump() | changes)


def _generation(source: Path, choice: Choice) -> dict[str, Any]:
    file = source / GENERATION_CONFIG_FILE
    fields = read_json(file, GENERATION_CONFIG_FILE) if file.is_file() else {}
    return trimmed_generation(fields, {int(old): number for number, old in enumerate(choice.ids)})


def _gathered(weights: Weights, names: Mapping[str, Any], kept: Array, progress: Progress) -> dict[str, Array]:
    """Returns the tensors of the trimmed model, in their stored type, or float32 if there are several types."""
    same_type = len({weights.dtypes[name] for name in names}) == 1 and weights.dtypes[EMBEDDING] != "float64"
    tensors: dict[str, Array] = {}
    progress.start("read", len(names), "tensors")
    try:
        for name in names:
            array = weights.rows(name, kept) if name in _TABLES else weights.read(name)
            tensors[name] = np.ascontiguousarray(array if same_type else array.astype(np.float32))
            progress.advance()
    finally:
        progress.finish()
    return tensors


def _check_written(
    directory: Path, weights: Weights, names: Mapping[str, Any], kept: Array, progress: Progress
) -> None:
    """Compares each written tensor with the source's, bit by bit.

    Raises:
        SlmError: If one differs.
    """
    written = Weights(directory)
    progress.start("read back", len(names), "tensors")
    try:
        for name in names:
            ours = written.read(name)
            theirs = weights.rows(name, kept) if name in _TABLES else weights.read(name)
            if not np.array_equal(ours, theirs.astype(ours.dtype, copy=False)):
                raise SlmError(f"{name} was not written as it was read", "nothing was written; check the disk")
            progress.advance()
    finally:
        progress.finish()


def _bytes(weights: Weights, names: Mapping[str, Any]) -> int:
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    return sum(int(np.prod(weights.shapes[name])) * sizes[weights.dtypes[name]] for name in names)


def _summary(texts: Texts, counted: Counted, compared: Compared) -> dict[str, Any]:
    return {
        "source": texts.about,
        "sha256": counted.sha256,
        "bytes": counted.bytes,
        "tokens": [counted.tokens, compared.tokens],
        "covered": compared.covered,
        "pieces_changed": compared.changed,
    }
