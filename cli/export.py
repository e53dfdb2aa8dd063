"""`slm export`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.options import json_option, out_option
from slm.core.checkpoint import is_checkpoint, read_info
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
        checkpoint = _base_of(adapter)
    out = out or run_of(checkpoint) / ("onnx" if adapter is None else f"onnx-{adapter.resolve().name}")
    if adapter is None:
        bundle = export_bundle(checkpoint, out, context, progress)
    else:
        origin = {"checkpoint": str(checkpoint), "adapter": str(adapter)}
        with _merged(checkpoint, adapter, out) as merged:
            bundle = export_bundle(merged, out, context, progress, origin)
    _report(bundle, time.perf_counter() - started, as_json)


def _base_of(adapter: Path | None) -> Path:
    """Returns the checkpoint that an adapter was trained on, where it says so and it is there; else the newest."""
    recorded = {} if adapter is None else read_info(adapter).get("base", {})
    base = Path(str(recorded.get("path", "")))
    if recorded and is_checkpoint(base):
        base = base.relative_to(Path.cwd()) if base.is_relative_to(Path.cwd()) else base
        say(f"no CHECKPOINT named: the adapter's, {base}")
        return base
    checkpoint = newest_checkpoint()
    say(f"no CHECKPOINT named: the newest, {checkpoint}")
    return checkpoint


@contextmanager
def _merged(checkpoint: Path, adapter: Path, out: Path) -> Iterator[Path]:
    """Yields a checkpoint with the adapter merged into it that is there only for this export."""
    from slm.finetune.merge import merged_checkpoint

    say(f"merging {adapter} into {checkpoint}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".merged-", dir=out.parent) as directory:
        merged = Path(directory) / "checkpoint"
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
