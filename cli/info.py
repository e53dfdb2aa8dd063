"""`slm info`."""

from pathlib import Path
from typing import Any

import click

from slm.cli.console import print_json, print_table
from slm.cli.options import json_option
from slm.core.checkpoint import WEIGHTS_FILE, is_checkpoint, read_config, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, is_bundle


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
def info(artifact: Path, as_json: bool) -> None:
    """Say what a checkpoint or a bundle is and how it was made.

    Every file of a bundle is checked against its manifest.

    \b
      slm info runs/tiny/onnx-int8
    """
    if is_bundle(artifact):
        bundle = Bundle.open(artifact)
        config, details = bundle.config, _bundle(bundle)
    elif is_checkpoint(artifact):
        config, details = read_config(artifact), _checkpoint(artifact)
    else:
        what = "not found" if not artifact.exists() else "neither a checkpoint nor a bundle"
        raise SlmError(f"{what}: {artifact}", "name a directory that slm train or slm export made")
    if as_json:
        print_json({"config": config.model_dump(mode="json")} | details)
        return
    rows = _shape(config) + [(name, str(value)) for name, value in details.items() if not isinstance(value, dict)]
    print_table(str(artifact), ("", ""), rows)


def _shape(config: ModelConfig) -> list[tuple[str, str]]:
    sliding = sum(config.window(i) is not None for i in range(config.num_hidden_layers))
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value, {config.head_dim} wide"
    return [
        ("parameters", f"{config.parameter_count():,}"),
        ("layers", f"{sliding} sliding over {config.sliding_window}, {config.num_hidden_layers - sliding} global"),
        ("hidden, intermediate", f"{config.hidden_size}, {config.intermediate_size}"),
        ("heads", heads),
        ("vocabulary", f"{config.vocab_size:,}{' (tied head)' if config.tie_word_embeddings else ''}"),
    ]


def _bundle(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    details: dict[str, Any] = {
        "kind": "bundle",
        "precision": manifest.precision,
        "context": manifest.context,
        "bytes": bundle.bytes,
        "files": f"{len(manifest.files)} files, as they were sealed",
        "slm_version": manifest.slm_version,
        "provenance": manifest.provenance,
    }
    if manifest.parity is not None:
        details["largest_difference"] = manifest.parity.largest
    if manifest.quality is not None:
        details |= {"kl_nats": manifest.quality.kl_nats, "perplexity": manifest.quality.perplexity_after}
    return details


def _checkpoint(path: Path) -> dict[str, Any]:
    details = {"kind": "checkpoint", "bytes": (path / WEIGHTS_FILE).stat().st_size}
    return details | {name: value for name, value in read_info(path).items() if name not in details}
