"""`slm info`: describes an artifact or a preset, its cost, and its origin."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from slm.cli.choosing import default_model
from slm.cli.console import print_json
from slm.cli.history import history
from slm.cli.info_tables import print_info
from slm.cli.options import Artifact, Whole, json_option
from slm.core import accounting
from slm.core.accounting import FLOAT32_BYTES, HALF_BYTES, INT8_BLOCK, saved_percent
from slm.core.checkpoint import INFO_FILE, is_checkpoint, notices_of, read_config, read_info
from slm.core.config import ModelConfig
from slm.core.contract import DEFAULT_CONTEXT
from slm.core.errors import SlmError
from slm.core.licence import recorded_notices
from slm.core.manifest import MANIFEST_FILE, Bundle, Manifest, is_bundle, parity_devices
from slm.core.presets import PRESETS, preset
from slm.core.weights import bytes_on_disk, tensor_bytes

# The dtype of the caches in graphs (`slm.core.contract`).
CACHE_DTYPE = "float32"

# Sections of a manifest about conversion and verification.
_MEASURED = ("quantization", "quality", "parity", "ranges")

Details = dict[str, Any]


@dataclass(frozen=True)
class _Subject:
    """The artifact or preset to describe.

    Attributes:
        config: The model's shape.
        context: The longest sequence, in tokens.
        details: Further facts, for people and machines.
        size: Bytes on disk and in memory, by name.
        recorded: The recorded provenance.
        notices: Licence notices.
        manifest: The manifest, if it is a bundle.
    """

    config: ModelConfig
    context: int
    details: Details
    size: dict[str, int]
    recorded: Details = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    manifest: Manifest | None = None


@click.command()
@click.argument(
    "artifact", type=Artifact(others=lambda: list(PRESETS)), required=False, metavar="[CHECKPOINT|BUNDLE|PRESET]"
)
@click.option(
    "--context",
    type=Whole(1),
    metavar="N",
    help=f"Context for the figures, in tokens. [default: the bundle's, or the model's, at most {DEFAULT_CONTEXT}]",
)
@click.option("--batch", type=Whole(1, 1_000_000), default=1, show_default=True, metavar="B", help="Rows of the cache.")
@click.option(
    "--position", type=Whole(0), metavar="P", help="Position of the decoded token, from 0. [default: the last]"
)
@click.option("--vocab-size", type=Whole(1), metavar="N", help="Size of the vocabulary, for a preset.")
@json_option
def info(
    artifact: Path | None, context: int | None, batch: int, position: int | None, vocab_size: int | None, as_json: bool
) -> None:
    """Describe a checkpoint, a bundle or a preset: sizes, cost and origin.

    Without an argument, describes the newest finished model under ./runs, or the bundled demo model if there is none. Shows
    size, lineage, parameters, key-value cache, operations per token and licence notices. Every file of a bundle is checked
    against its manifest.

    \b
      slm info
      slm info runs/tiny/onnx-int8
      slm info gemma3-270m --context 32768
      slm info gemma3-270m --vocab-size 262144 --json
    """
    if artifact is None:
        artifact = default_model()
    subject = _subject(artifact, vocab_size)
    if context is None:
        # A bundle is exported for its context; a model's longest context exceeds most uses.
        context = subject.context if subject.details["kind"] == "bundle" else min(subject.context, DEFAULT_CONTEXT)
    position = context - 1 if position is None else position
    for option, last in (("--context", context), ("--position", position + 1)):
        if last > subject.context:
            raise SlmError(
                f"{artifact} has a context of {subject.context:,} tokens, not {last:,}", f"choose another {option}"
            )
    report = _report(subject, context, batch, position)
    if as_json:
        print_json(report)
    else:
        print_info(str(artifact), subject.config, report, subject.details, history(subject.recorded))


def _report(subject: _Subject, context: int, batch: int, position: int) -> Details:
    config = subject.config
    parts = accounting.parameters(config)
    caches = _cache(config, context, batch)
    if (manifest := subject.manifest) is not None:
        caches["bundle"] = accounting.bundle_cache_bytes(manifest.cache, manifest.target, context, batch)
    return {
        **subject.details,  # a checkpoint's complete record; the fields below take precedence
        "config": config.model_dump(mode="json"),
        "parameters": asdict(parts) | {"total": parts.total},
        "tied_head": config.tie_word_embeddings,
        "bytes": subject.size,
        "counted_with": {"context": context, "batch": batch, "position": position, "cache_dtype": CACHE_DTYPE},
        "kv_cache_bytes": caches,
        "flops": {
            "decode": _decode(config, position),
            "prefill_per_token": _prefill(config, context),
        },
        "notices": list(subject.notices),
        "lineage": lineage(subject.recorded),
        "provenance": subject.recorded,
    }


def _cache(config: ModelConfig, context: int, batch: int) -> dict[str, float]:
    kinds: tuple[accounting.CacheKind, ...] = ("windowed", "windowed_without_slack", "full")
    sizes: dict[str, float] = {
        f"{kind}{ending}": accounting.cache_bytes(config, context, batch, itemsize, kind)
        for ending, itemsize in (("", FLOAT32_BYTES), ("_16_bit", HALF_BYTES))
        for kind in kinds
    }
    return sizes | {
        "full_per_token": accounting.cache_bytes(config, 1, kind="full"),
        "full_per_token_16_bit": accounting.cache_bytes(config, 1, itemsize=HALF_BYTES, kind="full"),
        "saved_percent": saved_percent(sizes["windowed"], sizes["full"]),
    }


def _decode(config: ModelConfig, position: int) -> dict[str, float]:
    return _compared(
        accounting.decode_flops(config, position), accounting.decode_flops(config, position, windows=False)
    )


def _prefill(config: ModelConfig, length: int) -> dict[str, float]:
    """Returns the average FLOPs per token of a prompt, with logits at its last position, and with logits at every one."""
    windowed = accounting.prefill_flops(config, length).per_token(length)
    full = accounting.prefill_flops(config, length, windows=False).per_token(length)
    everywhere = accounting.prefill_flops(config, length, head_positions=length).per_token(length)
    return _compared(windowed, full) | {
        "head_every_position": everywhere.head,
        "total_head_every_position": everywhere.total,
    }


def _compared(windowed: accounting.Flops, full: accounting.Flops) -> dict[str, float]:
    return asdict(windowed) | {
        "total": windowed.total,
        "attention_full": full.attention,
        "total_full": full.total,
        "attention_saved_percent": saved_percent(windowed.attention, full.attention),
        "total_saved_percent": saved_percent(windowed.total, full.total),
    }


def _subject(artifact: Path, vocab_size: int | None) -> _Subject:
    if not artifact.exists() and str(artifact) in PRESETS:
        config = preset(str(artifact))
        if vocab_size is not None:
            config = ModelConfig.checked(config.model_dump() | {"vocab_size": vocab_size})
        return _Subject(config, config.max_position_embeddings, {"kind": "preset"}, _in_memory(config))
    if is_bundle(artifact):
        subject = _bundle(artifact)
    elif is_checkpoint(artifact):
        subject = _checkpoint(artifact)
    else:
        if artifact.is_file() and artifact.suffix == ".gguf":
            raise SlmError(f"a GGUF file is neither a checkpoint nor a bundle: {artifact}", f"slm import {artifact}")
        what = "neither a checkpoint nor a bundle" if artifact.exists() else "not found"
        hint = f"name a directory that slm train or slm export wrote, or a preset: {', '.join(PRESETS)}"
        raise SlmError(f"{what}: {artifact}", hint)
    if vocab_size is not None:
        raise SlmError(f"{artifact} has a fixed vocabulary", "use --vocab-size with a preset")
    return subject


def _in_memory(config: ModelConfig) -> dict[str, int]:
    """Returns the bytes of the weights at each precision; INT8 only if the shape divides into slm's preferred blocks."""
    sizes = {
        "memory_float32": accounting.weights_bytes(config, FLOAT32_BYTES),
        "memory_16_bit": accounting.weights_bytes(config, HALF_BYTES),
    }
    int8 = accounting.int8_bytes(config)
    return sizes if int8 is None else sizes | {f"memory_int8_block_{INT8_BLOCK}": int8}


def _bundle(path: Path) -> _Subject:
    bundle = Bundle.open(path, trust=True)  # the graph is not run
    manifest = bundle.manifest
    details: Details = {
        "kind": "bundle",
        "precision": manifest.precision,
        "target": manifest.target,
        "device": manifest.device,
        "context": manifest.context,
        "cache": [layer.model_dump() for layer in manifest.cache],
        "files": f"{len(manifest.files)} files, as they were sealed",
        "slm_version": manifest.slm_version,
    }
    for name in _MEASURED:
        if (record := getattr(manifest, name)) is not None:
            details[name] = record.model_dump()
    if manifest.gpu_parity:
        details["gpu_parity"] = {name: parity.model_dump() for name, parity in manifest.gpu_parity.items()}
    details["parity_devices"] = parity_devices(manifest)
    graph = manifest.files[manifest.model].bytes
    # The file of the graph's weights is beside it; its name starts with the graph's.
    data = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(manifest.model)) - graph
    size = {
        "disk_weights": data,
        "disk_graph": graph,
        "disk_total": bundle.bytes + (path / MANIFEST_FILE).stat().st_size,
        "memory_weights": data + graph,
    }
    notices = manifest.notices or recorded_notices(manifest.provenance.get(INFO_FILE, {}))
    return _Subject(bundle.config, manifest.context, details, size, manifest.provenance, notices, manifest)


def _checkpoint(path: Path) -> _Subject:
    config, recorded = read_config(path), read_info(path)
    size = {
        "disk_weights": bytes_on_disk(path),
        "disk_total": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "memory_as_stored": tensor_bytes(path),
    }
    details = {"kind": "checkpoint"} | {name: value for name, value in recorded.items() if name != "kind"}
    size |= _in_memory(config)
    return _Subject(config, config.max_position_embeddings, details, size, recorded, notices_of(path))


# Fields of a record that name a source, nearest first.
_SOURCES = ("bundle", "adapter", "checkpoint", "source", "origin")
# Fields of a nested record that name a source. Data have paths too, but are not models.
_SOURCE_FIELDS = frozenset(("base", "adapter", "checkpoint", "bundle", "path", "source", "repository", "repo", "url"))
_NO_SOURCES = frozenset(("data", "validation", "recipe", "settings", "metrics"))


def lineage(recorded: Mapping[str, Any]) -> list[Details]:
    """Returns the recorded sources of an artifact, nearest first: each step with its name and source.

    A step is a nested record that names a base, a path or a repository. Each command adds its record after those of the
    checkpoint that it read, so later records are nearer.
    """
    steps: list[Details] = [{"step": name, "source": recorded[name]} for name in _SOURCES if name in recorded]
    inner = recorded.get(INFO_FILE)
    for name, value in reversed(list(recorded.items())):
        if name in _NO_SOURCES or name in _SOURCES or not isinstance(value, Mapping):
            continue
        if _SOURCE_FIELDS & value.keys():
            steps.append({"step": name, "source": value})
    if "made_by" in recorded:
        steps.append({"step": "made_by", "source": recorded["made_by"]})
    return steps + (lineage(inner) if isinstance(inner, Mapping) else [])
