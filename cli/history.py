"""Describes how an artifact was made: trained, imported, fine-tuned, merged, trimmed, exported, quantized, with its source."""

from collections.abc import Mapping
from typing import Any

from slm.core.checkpoint import INFO_FILE


def history(recorded: Mapping[str, Any]) -> list[str]:
    """Returns the recorded steps in words, the first step first.

    Args:
        recorded: The `slm.json` of a checkpoint, or the provenance of a bundle.
    """
    inner = recorded.get(INFO_FILE)
    if isinstance(inner, Mapping):
        return [*_of_checkpoint(inner), *_of_bundle(recorded)]
    return [*_of_checkpoint(recorded), *_of_bundle(recorded)]


def _of_checkpoint(record: Mapping[str, Any]) -> list[str]:
    steps = []
    imported, combined, tuned, merged, trimmed = (
        _mapping(record, name) for name in ("imported", "combined", "finetuned", "merged", "trimmed")
    )
    if record.get("made_by") == "slm train" or ("recipe" in record and not imported):
        recipe = _mapping(record, "recipe")
        data = ", ".join(map(str, _mapping(recipe, "data").get("train") or ())) or "text"
        updates = record.get("updates")
        length = f", {updates:,} updates" if isinstance(updates, int) else ""
        steps.append(f"trained on {data} (recipe {recipe.get('name', 'unknown')}{length})")
    if imported:
        steps.append(f"imported from {imported.get('source')}")
    if combined:
        models = [_path(each) for each in combined.get("models") or ()] + list(map(str, combined.get("adapters") or ()))
        base = f" over {_path(combined['base'])}" if combined.get("base") else ""
        steps.append(f"combined ({combined.get('method')}) from {', '.join(models)}{base}")
    # Fine-tuning adds its record after that of the checkpoint that it read.
    last = [name for name in record if name in ("trimmed", "finetuned")][-1:]
    if trimmed and last == ["finetuned"]:
        steps.append(_trimmed(trimmed))
    if tuned:
        steps.append(f"fine-tuned from {_path(tuned.get('base'))} on {_path(tuned.get('data'))}")
    if merged:
        steps.append(f"merged with the adapter {_path(merged.get('adapter'))}")
    if trimmed and last == ["trimmed"]:
        steps.append(_trimmed(trimmed))
    if not steps and "made_by" in record:
        steps.append(f"made by {record['made_by']}")
    return steps


def _of_bundle(provenance: Mapping[str, Any]) -> list[str]:
    steps = []
    if isinstance(provenance.get("checkpoint"), str):
        adapter = f" with the adapter {provenance['adapter']}" if provenance.get("adapter") else ""
        steps.append(f"exported from {provenance['checkpoint']}{adapter}")
    if isinstance(provenance.get("bundle"), str):
        steps.append(f"quantized from {provenance['bundle']}")
    return steps


def _trimmed(record: Mapping[str, Any]) -> str:
    before, after = record.get("vocab_size") or (None, None)
    size = f" from {before:,} to {after:,} tokens" if isinstance(before, int) and isinstance(after, int) else ""
    return f"vocabulary of {_path(record)} trimmed{size}"


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _path(record: object) -> str:
    return str(record.get("path", "unknown")) if isinstance(record, Mapping) else "unknown"
