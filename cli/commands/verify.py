"""`slm verify`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.choosing import default_bundle
from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import after_bundle, next_step
from slm.cli.options import Artifact, adapter_type, allow_slow_option, json_option, trust_option
from slm.core.checkpoint import is_checkpoint
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.steps.exporting import source_checkpoint

if TYPE_CHECKING:
    from slm.export.verify import Verification
    from slm.runtime.session import RuntimeDevice


@click.command()
@click.argument("bundle", type=Artifact(checkpoints=False), required=False)
@click.option(
    "--against",
    type=Artifact(bundles=False),
    metavar="CHECKPOINT",
    help="Checkpoint to compare with. [default: the one that the bundle was exported from]",
)
@click.option("--adapter", type=adapter_type, metavar="ADAPTER", help="LoRA adapter that was merged into the bundle.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device that runs the bundle. [default: the CPU, and CUDA if it is available and runs the bundle's attention]",
)
@trust_option
@allow_slow_option
@json_option
def verify(
    bundle: Path | None,
    against: Path | None,
    adapter: Path | None,
    device: "RuntimeDevice | None",
    trust: bool,
    allow_slow: bool,
    as_json: bool,
) -> None:
    """Verify a bundle against its checkpoint.

    Every weight is compared with the checkpoint: it must be equal in float32, rounded in float16, and have the recorded
    rounding error if it is quantized. Then logits, caches and greedy tokens are compared with PyTorch beyond the sliding
    window: in one step, in chunks, token by token, and as a ragged batch, with and without onnxruntime's optimizations. A
    quantized bundle also runs on the CPU with float activations, where only the order of sums may differ. A difference
    above its limit is an error.

    On CUDA, onnxruntime optimizes the graph differently. slm export verifies bundles on the CPU only; --device cuda verifies
    a bundle on this machine's GPU, and records the result in the bundle's manifest.

    \b
      slm verify
      slm verify runs/tiny/onnx-cuda --device cuda
      slm verify runs/tiny/onnx-int8 --against runs/tiny/checkpoint/best --json
    """
    if bundle is None:
        bundle = default_bundle()
    opened = Bundle.open(bundle, trust)
    against, adapter = _source(opened, against, adapter)
    from slm.export.verify import record_parity, verify_bundle

    started = time.perf_counter()
    with source_checkpoint(against, adapter, say) as checkpoint:
        found = verify_bundle(opened, checkpoint, RichProgress(), device, allow_slow)
    seconds = time.perf_counter() - started
    recorded = record_parity(opened, found)
    if as_json:
        _print_json(opened, against, found, seconds, recorded)
        return
    _print_report(opened, against, found, seconds)
    if not recorded:
        say(f"note: {bundle} is not writable, so its manifest does not record the comparison on CUDA")
    next_step(after_bundle(opened, verified=True))


def _source(bundle: Bundle, against: Path | None, adapter: Path | None) -> tuple[Path, Path | None]:
    """Returns the checkpoint and the adapter that a bundle was exported from, unless the user names a checkpoint.

    Raises:
        SlmError: If one of them is no longer at its path.
    """
    if against is not None:
        return against, adapter
    origin = bundle.manifest.provenance
    against = Path(str(origin.get("checkpoint", "")))
    if "checkpoint" not in origin or not is_checkpoint(against):
        raise SlmError(f"the checkpoint of {bundle.path} is not at {against}", "use --against CHECKPOINT")
    say(f"Comparing with {against} (the checkpoint that the bundle was exported from).")
    adapter = adapter or (Path(str(origin["adapter"])) if "adapter" in origin else None)
    if adapter is not None and not adapter.exists():
        raise SlmError(f"the adapter of {bundle.path} is not at {adapter}", "use --adapter ADAPTER")
    return against, adapter


def _print_json(bundle: Bundle, against: Path, found: "Verification", seconds: float, recorded: bool) -> None:
    print_json(
        {
            "bundle": str(bundle.path),
            "against": str(against),
            "weights": found.weights,
            "weights_off": found.weights_off,
            "parity": {provider: parity.model_dump() for provider, parity in found.parity.items()},
            "seconds": round(seconds, 2),
            "recorded": recorded,
            "next": after_bundle(bundle, verified=True),
        }
    )


def _print_report(bundle: Bundle, against: Path, found: "Verification", seconds: float) -> None:
    rows = [
        (provider, read, f"{parity.logits[read]:.1e}", f"{parity.caches[read]:.1e}", f"{parity.tolerance:.0e}")
        for provider, parity in found.parity.items()
        for read in parity.logits
    ]
    print_table(f"Verified: {bundle.path} matches {against}", ("provider", "read", "logits", "caches", "limit"), rows)
    greedy = ", ".join(f"{parity.greedy_tokens_equal} ({provider})" for provider, parity in found.parity.items())
    tokens = next(iter(found.parity.values())).tokens
    say(f"{found.weights} weights match, {tokens:,} tokens compared, equal greedy tokens: {greedy}; {seconds:.1f} s")
