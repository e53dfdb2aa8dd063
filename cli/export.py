"""`slm export`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.options import json_option, out_option
from slm.core.manifest import Bundle
from slm.core.runs import newest_checkpoint, run_of


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--onnx", is_flag=True, help="Write an ONNX bundle.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="Merge this LoRA adapter first.")
@click.option("--context", type=click.IntRange(min=2), metavar="N", help="Longest sequence, in tokens. [default: 4096]")
@out_option
@json_option
def export(
    checkpoint: Path | None, onnx: bool, adapter: Path | None, context: int | None, out: Path | None, as_json: bool
) -> None:
    """Export a checkpoint to an ONNX bundle and prove it equal.

    Without CHECKPOINT, the newest under ./runs. The bundle is compared with PyTorch past the sliding window: in one go,
    in chunks, step by step and as a batch. It appears only if logits and caches agree.

    \b
      slm export --onnx
      slm export --onnx runs/tiny/checkpoint/best --context 1024
      slm export --onnx --adapter runs/tiny/adapters/data
    """
    from slm.export.bundle import export_bundle

    if not onnx:
        raise click.UsageError("name the format: --onnx")
    progress = RichProgress()
    started = time.perf_counter()
    if checkpoint is None:
        checkpoint = newest_checkpoint()
        say(f"no CHECKPOINT named: the newest, {checkpoint}")
    name = "onnx" if adapter is None else f"onnx-{adapter.name}"
    out = out or run_of(checkpoint) / name
    with _merged(checkpoint, adapter, out) as complete:
        bundle = export_bundle(complete, out, context, progress)
    _report(bundle, time.perf_counter() - started, as_json)


@contextmanager
def _merged(checkpoint: Path, adapter: Path | None, out: Path) -> Iterator[Path]:
    """Yields the checkpoint, or one with the adapter merged into it that is there only for this export."""
    if adapter is None:
        yield checkpoint
        return
    from slm.finetune.merge import merged_checkpoint

    say(f"merging {adapter} into {checkpoint}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".merged-", dir=out.parent) as directory:
        merged = Path(directory) / adapter.name
        merged_checkpoint(checkpoint, adapter, merged)
        yield merged


def _report(bundle: Bundle, seconds: float, as_json: bool) -> None:
    manifest, parity = bundle.manifest, bundle.manifest.parity
    assert parity is not None
    if as_json:
        fields = {"bundle": str(bundle.path), "seconds": round(seconds, 2), "bytes": bundle.bytes}
        print_json(fields | {"context": manifest.context, "parity": parity.model_dump()})
        return
    rows = [(name, f"{parity.logits[name]:.1e}", f"{parity.caches[name]:.1e}") for name in parity.logits]
    print_table(
        f"{bundle.path}: equal to {parity.reference} over {parity.tokens} tokens (allowed {parity.tolerance:.0e})",
        ("read", "logits", "caches"),
        rows,
    )
    say(
        f"{bundle.bytes / 1e6:,.1f} MB, context {manifest.context:,}, {parity.greedy_tokens_equal} greedy tokens equal, "
        f"{seconds:.1f} s"
    )
