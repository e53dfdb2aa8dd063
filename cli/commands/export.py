"""`slm export`."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.choosing import default_checkpoint
from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import after_bundle, next_step, proving, slm_command
from slm.cli.options import REPLACING, Artifact, InputFile, Whole, adapter_type, collects, json_option, out_option_for
from slm.core.checkpoint import is_checkpoint, read_info
from slm.core.contract import DEFAULT_CONTEXT
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, is_bundle, parity_devices, sealed_files
from slm.core.outputs import check_output, check_writable
from slm.core.runs import bundle_path, run_of

if TYPE_CHECKING:
    from slm.core.contract import Device, Target
    from slm.interchange.gguf import GgufType, Written


@dataclass(frozen=True)
class Formats:
    """Which of the formats is written: exactly one."""

    onnx: bool
    gguf: bool
    onnx_adapter: bool


@dataclass(frozen=True)
class BundleChoices:
    """The options of a bundle; None where the user did not choose."""

    context: int | None
    target: "Target | None"
    device: "Device | None"
    text: Path | None
    adapter_slots: bool


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Attributes:
        checkpoint: The checkpoint; None for the adapter's base, or the newest one.
        adapter: The LoRA adapter to merge, or to write as an `.onnx_adapter` file.
    """

    checkpoint: Path | None
    adapter: Path | None


@click.command(epilog=REPLACING)
@click.argument("checkpoint", type=Artifact(bundles=False), required=False)
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
@collects("formats", Formats)
@collects("choices", BundleChoices)
@collects("source", ExportSource)
def export(
    source: ExportSource,
    formats: Formats,
    choices: BundleChoices,
    gguf_type: "GgufType | None",
    out: Path | None,
    as_json: bool,
) -> None:
    """Export a checkpoint to an ONNX bundle or a GGUF file, and verify the result.

    The default CHECKPOINT is the newest one in ./runs, or the one that --adapter was trained on. A bundle is verified
    against PyTorch beyond the sliding window: in one step, in chunks, token by token, and as a batch. Nothing is written
    if logits or caches differ. A GGUF file is read back and compared with the checkpoint: every tensor, the settings and
    the tokenizer.

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
    _check_formats(formats, source, choices, gguf_type)
    if formats.onnx_adapter:
        _export_adapter(source, out, as_json)
    elif formats.gguf:
        _export_gguf(source, gguf_type or "f16", out, as_json)
    else:
        _export_bundle(source, choices, out, as_json)


def _check_formats(
    formats: Formats, source: ExportSource, choices: BundleChoices, gguf_type: "GgufType | None"
) -> None:
    """Checks that the options belong to the format.

    Raises:
        click.UsageError: If there is not one format, or an option belongs to another one.
    """
    if formats.onnx + formats.gguf + formats.onnx_adapter != 1:
        raise click.UsageError("choose one format: --onnx, --gguf or --onnx-adapter")
    if formats.onnx_adapter:
        if source.adapter is None:
            raise click.UsageError("--onnx-adapter requires --adapter DIR")
        return
    if choices.adapter_slots and (formats.gguf or source.adapter is not None):
        raise click.UsageError("--adapter-slots requires --onnx and excludes --adapter, which merges an adapter")
    if formats.gguf and choices.context is not None:
        raise click.UsageError("--context requires --onnx; llama.cpp sets the context when it loads the file")
    if formats.gguf and (choices.target, choices.device, choices.text) != (None, None, None):
        raise click.UsageError("--target, --device and --text require --onnx")
    if choices.text is not None and choices.device in (None, "cpu"):
        raise click.UsageError("--text requires --device cuda or webgpu, where products are float16")
    if formats.onnx and gguf_type is not None:
        raise click.UsageError("--gguf-type requires --gguf")


def _export_bundle(source: ExportSource, choices: BundleChoices, out: Path | None, as_json: bool) -> None:
    from slm.export.bundle import ExportOptions, export_bundle

    started = time.perf_counter()
    checkpoint, adapter = source.checkpoint or base_of(source.adapter), source.adapter
    target, device = choices.target or "fused", choices.device or "cpu"
    options = ExportOptions(choices.context, target, device, choices.text, choices.adapter_slots)
    path = out or bundle_path(checkpoint, target, device, choices.adapter_slots, adapter)
    check_output(path, sealed_files(path))
    origin = None if adapter is None else {"checkpoint": str(checkpoint), "adapter": str(adapter)}
    with source_checkpoint(checkpoint, adapter) as merged:
        bundle = export_bundle(merged, path, options, progress=RichProgress(), origin=origin)
    _report(bundle, time.perf_counter() - started, as_json)


def _export_gguf(source: ExportSource, gguf_type: "GgufType", out: Path | None, as_json: bool) -> None:
    from slm.interchange.gguf import check_gguf_output, write_gguf

    started = time.perf_counter()
    checkpoint = source.checkpoint or base_of(source.adapter)
    path = _gguf_path(checkpoint, source.adapter, gguf_type, out)
    check_gguf_output(path)
    with source_checkpoint(checkpoint, source.adapter) as merged:
        written = write_gguf(merged, path, gguf_type, RichProgress())
        _report_gguf(written, time.perf_counter() - started, as_json)


def _export_adapter(source: ExportSource, out: Path | None, as_json: bool) -> None:
    from slm.core.adapter_base import check_base
    from slm.core.checkpoint import read_config
    from slm.core.weights import weights_sha256
    from slm.interchange.onnx_adapter import slot_arrays, write_onnx_adapter
    from slm.runtime.adapters import SUFFIX, Adapter

    adapter = source.adapter
    assert adapter is not None  # `_check_formats`
    base = source.checkpoint or base_of(adapter)
    path = out or adapter.with_name(f"{adapter.resolve().name}{SUFFIX}")
    _check_adapter_output(path)
    config, weights = read_config(base), weights_sha256(base)
    check_base(adapter, base, weights)
    made = Adapter(adapter.resolve().name, slot_arrays(adapter, config))
    write_onnx_adapter(path, made, weights)
    following = _after_onnx_adapter(path, base, weights)
    if as_json:
        report = {"adapter": str(path), "bytes": path.stat().st_size, "products": len(made.arrays) // 2}
        print_json(report | {"next": following})
        return
    say(f"{path}: {path.stat().st_size / 1e6:,.2f} MB, for {len(made.arrays) // 2} products of {base}")
    next_step(following)


def _check_adapter_output(path: Path) -> None:
    """Checks that an adapter file can be written: the path does not exist, or is an adapter file."""
    from slm.runtime.adapters import SUFFIX

    check_writable(path)
    if path.exists() and (path.is_dir() or path.suffix != SUFFIX):
        raise SlmError(f"{path} exists and is not an {SUFFIX} file", "name another --out")


def _after_onnx_adapter(path: Path, base: Path, weights: str) -> str:
    """Returns a command that uses the adapter with a bundle, or one that exports a bundle with adapter slots."""
    for bundle in sorted(run_of(base).glob("onnx*")):
        if is_bundle(bundle):
            manifest = Bundle.open(bundle).manifest
            if manifest.adapter_slots and manifest.provenance.get("weights_sha256") == weights:
                return slm_command("generate", bundle, "--adapter", path, "-p", "Once upon a time")
    return slm_command("export", "--onnx", "--adapter-slots", base)


def _gguf_path(checkpoint: Path, adapter: Path | None, gguf_type: str, out: Path | None) -> Path:
    run = run_of(checkpoint)
    of_a_run = run != checkpoint.parent  # outside a run, the checkpoint's own name is used
    name = (run if of_a_run else checkpoint).resolve().name + ("" if adapter is None else f"-{adapter.resolve().name}")
    file = f"{name}-{gguf_type}.gguf"
    if out is None:
        return run / "gguf" / file
    return out if out.suffix == ".gguf" else out / file


def base_of(adapter: Path | None) -> Path:
    """Returns the checkpoint that an adapter was trained on, or the newest one if it does not exist. Prints its path.

    An adapter records the path of its base. If the run was moved, the base is searched in the run.
    """
    recorded = {} if adapter is None else read_info(adapter).get("base", {})
    base = Path(str(recorded.get("path", "")))
    places = [base, *([] if adapter is None else [run_of(adapter) / "checkpoint" / base.name])]
    for place in places if recorded else []:
        if is_checkpoint(place):
            place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
            say(f"Using {place} (the checkpoint that the adapter was trained on).")
            return place
    return default_checkpoint()


@contextmanager
def source_checkpoint(checkpoint: Path, adapter: Path | None) -> Iterator[Path]:
    """Yields the checkpoint, or a temporary checkpoint with the adapter merged into it."""
    if adapter is None:
        yield checkpoint
        return
    from slm.core.files import scratch_directory
    from slm.finetune.merge import merged_checkpoint

    say(f"merging {adapter} into {checkpoint}")
    with scratch_directory(run_of(checkpoint), "merged") as directory:
        merged = directory / "checkpoint"
        merged_checkpoint(checkpoint, adapter, merged)
        yield merged


def _report(bundle: Bundle, seconds: float, as_json: bool) -> None:
    manifest, parity = bundle.manifest, bundle.manifest.parity
    assert parity is not None
    if as_json:
        fields = {"bundle": str(bundle.path), "seconds": round(seconds, 2), "bytes": bundle.bytes}
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
                "seconds": round(seconds, 2),
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
