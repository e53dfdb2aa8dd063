"""`slm verify`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.choosing import default_bundle
from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.export import source_checkpoint
from slm.cli.following import after_bundle, next_step
from slm.cli.options import Artifact, adapter_type, allow_slow_option, json_option, trust_option
from slm.core.checkpoint import is_checkpoint
from slm.core.errors import SlmError
from slm.core.manifest import Bundle

if TYPE_CHECKING:
    from slm.runtime.session import Device


@click.command()
@click.argument("bundle", type=Artifact(checkpoints=False), required=False)
@click.option(
    "--against",
    type=Artifact(bundles=False),
    metavar="CHECKPOINT",
    help="The checkpoint that it must be. [default: the one that it was exported from]",
)
@click.option("--adapter", type=adapter_type, metavar="ADAPTER", help="LoRA adapter that was merged into it.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where to run the bundle. [default: the CPU, and CUDA where it is available and would run the bundle's attention]",
)
@trust_option
@allow_slow_option
@json_option
def verify(
    bundle: Path | None,
    against: Path | None,
    adapter: Path | None,
    device: "Device | None",
    trust: bool,
    allow_slow: bool,
    as_json: bool,
) -> None:
    """Prove that a bundle is the checkpoint that it was made from.

    Every weight is compared with the checkpoint's: equal in float32, rounded in float16, within half a step in INT8. Then
    logits, caches and greedy tokens are compared with PyTorch past the sliding window: read in one go, in chunks, step by
    step and as a ragged batch, with and without onnxruntime's optimizations. INT8 is also run on the CPU with activations
    in floats, where nothing but the order of additions may differ. Anything beyond what is allowed is an error.

    onnxruntime changes the graph in another way on CUDA, so export, which compares on the CPU, does not prove that a bundle
    computes the same there: --device cuda does, on the GPU at hand, and records it in the bundle's manifest.

    \b
      slm verify
      slm verify runs/tiny/onnx-cuda --device cuda
      slm verify runs/tiny/onnx-int8 --against runs/tiny/checkpoint/best --json
    """
    if bundle is None:
        bundle = default_bundle()
    opened = Bundle.open(bundle, trust)
    origin = opened.manifest.provenance
    if against is None:
        against = Path(str(origin.get("checkpoint", "")))
        if "checkpoint" not in origin or not is_checkpoint(against):
            raise SlmError(f"the checkpoint of {bundle} is not at {against}", "name one: --against CHECKPOINT")
        say(f"Comparing with {against} (the checkpoint that it was exported from).")
        adapter = adapter or (Path(str(origin["adapter"])) if "adapter" in origin else None)
        if adapter is not None and not adapter.exists():
            raise SlmError(f"the adapter of {bundle} is not at {adapter}", "name it: --adapter ADAPTER")
    from slm.export.verify import record_parity, verify_bundle

    started = time.perf_counter()
    with source_checkpoint(against, adapter) as checkpoint:
        found = verify_bundle(opened, checkpoint, RichProgress(), device, allow_slow)
    seconds = time.perf_counter() - started
    recorded = record_parity(opened, found)
    if as_json:
        parity = {provider: parity.model_dump() for provider, parity in found.parity.items()}
        fields = {"bundle": str(bundle), "against": str(against), "weights": found.weights}
        fields |= {
            "weights_off": found.weights_off,
            "parity": parity,
            "seconds": round(seconds, 2),
            "recorded": recorded,
        }
        print_json(fields | {"next": after_bundle(opened, verified=True)})
        return
    rows = [
        (provider, read, f"{parity.logits[read]:.1e}", f"{parity.caches[read]:.1e}", f"{parity.tolerance:.0e}")
        for provider, parity in found.parity.items()
        for read in parity.logits
    ]
    print_table(f"Verified: {bundle} matches {against}", ("provider", "read", "logits", "caches", "allowed"), rows)
    greedy = ", ".join(f"{parity.greedy_tokens_equal} ({provider})" for provider, parity in found.parity.items())
    tokens = next(iter(found.parity.values())).tokens
    say(f"{found.weights} weights equal, {tokens:,} tokens compared, greedy tokens equal: {greedy}; {seconds:.1f} s")
    if not recorded:
        say(f"note: {bundle} cannot be written to, so its manifest does not record the comparison on CUDA")
    next_step(after_bundle(opened, verified=True))
