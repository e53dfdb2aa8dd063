"""`slm list`; the module's name avoids Python's `list`."""

from datetime import datetime

import click

from slm.cli.console import print_json, print_table, say
from slm.cli.history import history
from slm.cli.options import json_option
from slm.core.inventory import Stored, stored


@click.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the models and adapters under ./runs and in the cache, the newest first.

    Quality is the loss or the bits per byte on held-out text, or, for a quantized bundle, the KL divergence from the model
    that it was made from. Other commands accept the names.

    \b
      slm list
      slm list --json
    """
    found = stored()
    if as_json:
        print_json({"artifacts": [_record(each) for each in found], "bytes": sum(each.bytes for each in found)})
        return
    if not found:
        say("There is nothing under ./runs or in the cache.")
        return
    rows = [
        (each.name, _kind(each), f"{each.bytes / 1e6:,.1f} MB", _quality(each), _date(each), _origin(each))
        for each in found
    ]
    print_table("models and adapters", ("name", "kind", "size", "quality", "date", "made from"), rows)
    say(f"{sum(each.bytes for each in found) / 1e6:,.1f} MB in total; slm rm NAME removes one")


def _record(each: Stored) -> dict[str, object]:
    return {
        "name": each.name,
        "path": str(each.artifact.path),
        "kind": each.artifact.kind,
        "precision": each.precision or None,
        "bytes": each.bytes,
        "quality": each.quality,
        "created": datetime.fromtimestamp(each.artifact.created).astimezone().isoformat(timespec="seconds"),
        "source": each.source,
        "cached": each.cached,
    }


def _kind(each: Stored) -> str:
    return f"{each.precision} {each.artifact.kind}".strip() + " (cached)" * each.cached


def _quality(each: Stored) -> str:
    found = each.quality
    if "kl_nats" in found:
        return f"KL {found['kl_nats']:.4f}"
    if "bits_per_byte" in found:
        return f"{found['bits_per_byte']:.3f} bits/byte"
    return f"loss {found['loss']:.3f}" if "loss" in found else ""


def _date(each: Stored) -> str:
    return datetime.fromtimestamp(each.artifact.created).strftime("%Y-%m-%d")


def _steps(each: Stored) -> list[str]:
    record = each.artifact.record
    return history(record.get("provenance") or {} if each.artifact.kind == "bundle" else record)


def _origin(each: Stored) -> str:
    return each.source or next(reversed(_steps(each)), "")
