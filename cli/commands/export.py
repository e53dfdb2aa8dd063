"""`slm export`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.calling import call
from slm.cli.console import print_json, print_table, say
from slm.cli.following import after_bundle, next_step, proving, slm_command
from slm.cli.options import REPLACING, Artifact, InputFile, Whole, adapter_type, json_option, out_option_for
from slm.core.contract import DEFAULT_CONTEXT
from slm.core.manifest import Bundle, is_bundle, parity_devices
from slm.core.runs import run_of

if TYPE_CHECKING:
    from slm.interchange.gguf import Written
    from slm.steps.exporting import ExportResult


@click.command(epilog=REPLACING)
@click.argument("checkpoint", type=Artifact(bundles=False, adapters=True), required=False)
@click.option("--onnx", is_flag=True, help="Write an ONNX bundle.")
@click.option("--gguf", is_flag=True, help="Write a GGUF file, which llama.cpp runs.")
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "q8_0"]),
    help="Type of matrices in a GGUF file. [default: f16]",
)
@click.option("--adapter", type=adapter_type, metavar="ADAPTER", help="Merge this LoRA adapter first.")
@click.option("--adapter-slots", is_flag=True, help="With --onnx: add inputs for LoRA adapters to the graph.")
@click.option("--onnx-adapter", is_flag=True, help="Write --adapter as an .onnx_adapter file for adapter slots.")
@click.option(
    "--context",
    type=Whole(2),
    metavar="N",
    help=f"Longest sequence, in tokens. [default: the model's, at most {DEFAULT_CONTEXT}]",
)
@click.option(
    "--target",
    type=click.Choice(["fused", "portable"]),
    help="Operators: onnxruntime's own, or only standard ONNX. [default: fused]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "webgpu"]),
    help="Device that will run the bundle; products and caches are float16 on GPUs. [default: cpu]",
)
@click.option(
    "--text",
    type=InputFile("text"),
    metavar="FILE",
    help="Text for finding the products that overflow float16. [default: stories that ship with slm]",
)
@out_option_for("bundle, or the GGUF or adapter file", "RUN/onnx, RUN/gguf/NAME.gguf, or beside the adapter")
@json_option
def export(onnx: bool, gguf: bool, onnx_adapter: bool, as_json: bool, **options: Any) -> None:
    """Export a checkpoint to an ONNX bundle or a GGUF file, and verify the result.

    The default CHECKPOINT is the newest one in ./runs, or the one that --adapter was trained on; an adapter as CHECKPOINT is
    merged into its base. A bundle is verified against PyTorch beyond the sliding window: in one step, in chunks, token by
    token, and as a batch. Nothing is written if logits or caches differ. A GGUF file is read back and compared with the
    checkpoint: every tensor, the settings and the tokenizer.

    \b
      slm export --onnx
      slm export --gguf --gguf-type q8_0
      slm export --onnx runs/tiny/checkpoint/best --context 1024
      slm export --onnx --target portable      # for transformers.js, optimum, any ONNX runtime
      slm export --onnx --device cuda
      slm export --onnx --adapter runs/tiny/adapters/data
      slm export --onnx --adapter-slots        # one bundle for many adapters: slm generate --adapter
      slm export --onnx-adapter --adapter runs/tiny/adapters/data
    """
    if onnx + gguf + onnx_adapter != 1:
        raise click.UsageError("choose one format: --onnx, --gguf or --onnx-adapter")
    from slm.steps.exporting import export as run

    result = call(run, format="gguf" if gguf else "onnx-adapter" if onnx_adapter else "onnx", **options)
    if result.bundle is not None:
        _report(result.bundle, result.seconds, as_json)
    elif result.written is not None:
        _report_gguf(result.written, result.seconds, as_json)
    else:
        _report_adapter(result, as_json)


def _report_adapter(result: "ExportResult", as_json: bool) -> None:
    from slm.core.weights import weights_sha256

    path, base = result.path, result.checkpoint
    following = _after_onnx_adapter(path, base, weights_sha256(base))
    if as_json:
        report = {"adapter": str(path), "bytes": result.bytes, "products": result.products}
        print_json(report | {"next": following})
        return
    say(f"{path}: {result.bytes / 1e6:,.2f} MB, for {result.products} products of {base}")
    next_step(following)


def _after_onnx_adapter(path: Path, base: Path, weights: str) -> str:
    """Returns a command that uses the adapter with a bundle, or one that exports a bundle with adapter slots."""
    for bundle in sorted(run_of(base).glob("onnx*")):
        if is_bundle(bundle):
            manifest = Bundle.open(bundle).manifest
            if manifest.adapter_slots and manifest.provenance.get("weights_sha256") == weights:
                return slm_command("generate", bundle, "--adapter", path, "-p", "Once upon a time")
    return slm_command("export", "--onnx", "--adapter-slots", base)


def _report(bundle: Bundle, seconds: float, as_json: bool) -> None:
    manifest, parity = bundle.manifest, bundle.manifest.parity
    assert parity is not None
    if as_json:
        fields = {"bundle": str(bundle.path), "seconds": seconds, "bytes": bundle.bytes}
        fields |= {"context": manifest.context, "parity": parity.model_dump()}
        fields |= {"parity_devices": parity_devices(manifest), "parity_missing": _unproved(bundle)}
        print_json(fields | {"next": after_bundle(bundle)})
        return
    rows = [(name, f"{parity.logits[name]:.1e}", f"{parity.caches[name]:.1e}") for name in parity.logits]
    print_table(
        f"Verified: {bundle.path} matches {parity.reference} over {parity.tokens} tokens (limit {parity.tolerance:.0e})",
        ("read", "logits", "caches"),
        rows,
    )
    say(
        f"{bundle.bytes / 1e6:,.1f} MB, context {manifest.context:,}, {parity.greedy_tokens_equal} greedy tokens equal, "
        f"{seconds:.1f} s"
    )
    if (missing := _unproved(bundle)) is not None:
        say(f"Verified on the CPU only. {missing}")
    next_step(after_bundle(bundle))


def _unproved(bundle: Bundle) -> str | None:
    """Returns a line if a bundle was not verified on the device that it is for; otherwise None."""
    device = bundle.manifest.device
    if device in parity_devices(bundle.manifest):
        return None
    if device == "cuda":
        return f"The bundle is not verified on CUDA; on a machine with a GPU, run: {proving(bundle)}"
    return "The bundle is not verified on WebGPU, which onnxruntime for Python does not support."


def _report_gguf(written: "Written", seconds: float, as_json: bool) -> None:
    following = shlex.join(["llama-cli", "-m", str(written.path)])
    if as_json:
        print_json(
            {
                "gguf": str(written.path),
                "bytes": written.bytes,
                "types": written.types,
                "largest_difference": written.largest_difference,
                "seconds": seconds,
                "next": following,
            }
        )
        return
    stored = ", ".join(f"{count} {kind}" for kind, count in written.types.items())
    print_table(
        f"Verified: {written.path} matches the checkpoint",
        ("", ""),
        [
            ("size", f"{written.bytes / 1e6:,.1f} MB"),
            ("tensors", stored),
            ("largest rounding error", f"{written.largest_difference:.1g} of a block's or tensor's largest value"),
            ("time", f"{seconds:.0f} s"),
        ],
    )
    next_step(following)
