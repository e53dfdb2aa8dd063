"""`slm.export`: a checkpoint to an ONNX bundle, a GGUF file, or an adapter file for a bundle with slots."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slm.core.artifacts import kind_of
from slm.core.contract import Device, Target
from slm.core.errors import ArgumentError, SlmError
from slm.core.manifest import Bundle, Parity, sealed_files
from slm.core.outputs import check_output, check_writable
from slm.core.progress import Progress
from slm.core.runs import bundle_path, run_of
from slm.steps.arguments import PathArgument, Two, as_optional_path, check_input, step
from slm.steps.bars import shown
from slm.steps.choosing import Note, base_of, named

if TYPE_CHECKING:
    from slm.interchange.gguf import Written

Format = Literal["onnx", "gguf", "onnx-adapter"]


@dataclass(frozen=True)
class ExportResult:
    """The result of `slm.export`. It stands for its path: other functions accept it where they accept a path.

    Attributes:
        path: The bundle's directory, or the file.
        format: "onnx", "gguf" or "onnx-adapter".
        checkpoint: The exported checkpoint, or an adapter's base.
        adapter: The adapter that was merged or written; None without one.
        bytes: Size of graph and weights, or of the file.
        seconds: Time of the export and its verification.
        bundle: The bundle; None for a file. `bundle.manifest.parity` has the measured differences from PyTorch.
        written: For a GGUF file, its types and the largest rounding error.
        products: For an adapter file, the number of products that it changes.
    """

    path: Path
    format: Format
    checkpoint: Path
    adapter: Path | None
    bytes: int
    seconds: float
    bundle: Bundle | None = field(default=None, repr=False)
    written: "Written | None" = None
    products: int | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def parity(self) -> Parity | None:
        """The differences between the bundle and PyTorch; None for a file."""
        return None if self.bundle is None else self.bundle.manifest.parity


@dataclass(frozen=True)
class _Source:
    checkpoint: Path
    adapter: Path | None


@dataclass(frozen=True)
class _Options:
    """The options of one format each; None where the caller did not choose."""

    gguf_type: Literal["f32", "f16", "q8_0"] | None
    adapter_slots: bool
    context: int | None
    target: Target | None
    device: Device | None
    text: Path | None


@step
def export(
    checkpoint: PathArgument | None = None,
    format: Format = "onnx",
    *,
    adapter: PathArgument | None = None,
    adapter_slots: bool = False,
    context: Two | None = None,
    target: Literal["fused", "portable"] | None = None,
    device: Literal["cpu", "cuda", "webgpu"] | None = None,
    text: PathArgument | None = None,
    gguf_type: Literal["f32", "f16", "q8_0"] | None = None,
    out: PathArgument | None = None,
    progress: Progress | bool = True,
) -> ExportResult:
    """Exports a checkpoint, and verifies the result; nothing is written if it differs from PyTorch.

    Args:
        checkpoint: A checkpoint, or an adapter, which is merged into its base. None: the newest checkpoint under ./runs, or the
            one that `adapter` was trained on.
        format: "onnx" for a bundle, "gguf" for a file for llama.cpp, "onnx-adapter" for an adapter file.
        adapter: The LoRA adapter to merge, or to write as an adapter file.
        adapter_slots: For a bundle, whether the graph has inputs for LoRA adapters.
        context: For a bundle, the longest sequence in tokens; by default the model's context, at most 4,096.
        target: For a bundle, "fused" (the default) for onnxruntime, or "portable" for standard ONNX operators.
        device: For a bundle, the device that will run it; "cpu" by default.
        text: For bundles on GPUs, a text for finding the products that overflow float16; by default the stories that ship.
        gguf_type: For a GGUF file, the type of matrices; "f16" by default.
        out: The output; by default RUN/onnx, RUN/gguf/NAME.gguf, or beside the adapter.
        progress: True shows a bar, False nothing; or an object with the methods of `slm.core.progress.Progress`.

    Raises:
        SlmError: If an input is missing or wrong, options exclude each other, the output is in use by other files, or the
            result differs from the checkpoint.
    """
    display = shown(progress)
    options = _Options(gguf_type, adapter_slots, context, target, device, as_optional_path(text))
    first, second = _inputs(checkpoint, adapter, display.note)
    _check(format, options, second)
    if options.text is not None:
        check_input(options.text, "text")
    source = _Source(first or base_of(second, display.note), second)
    place, started = as_optional_path(out), time.perf_counter()
    if format == "onnx-adapter":
        return _adapter_file(source, place, started)
    if format == "gguf":
        return _gguf(source, gguf_type or "f16", place, display, started)
    return _bundle(source, options, place, display, started)


def _inputs(
    checkpoint: PathArgument | None, adapter: PathArgument | None, note: Note
) -> tuple[Path | None, Path | None]:
    """Returns the checkpoint, None for the default one, and the adapter.

    Raises:
        SlmError: If one of them is of another kind, or both are adapters.
    """
    second = None if adapter is None else named(adapter, ("adapter",), note)
    if checkpoint is None:
        return None, second
    first = named(checkpoint, ("checkpoint", "adapter"), note)
    if kind_of(first) != "adapter":
        return first, second
    if second is not None:
        raise SlmError(f"{first} is an adapter, and so is {second}", "name the checkpoint of --adapter, or one adapter")
    return None, first


def _check(format: Format, options: _Options, adapter: Path | None) -> None:
    """Checks that the options belong to the format.

    Raises:
        ArgumentError: If an option belongs to another format, or excludes another option.
    """
    if format == "onnx-adapter":
        if adapter is None:
            raise ArgumentError("--onnx-adapter requires --adapter DIR")
        return
    if options.adapter_slots and (format == "gguf" or adapter is not None):
        raise ArgumentError("--adapter-slots requires --onnx and excludes --adapter, which merges an adapter")
    if format == "gguf" and options.context is not None:
        raise ArgumentError("--context requires --onnx; llama.cpp sets the context when it loads the file")
    if format == "gguf" and (options.target, options.device, options.text) != (None, None, None):
        raise ArgumentError("--target, --device and --text require --onnx")
    if options.text is not None and options.device in (None, "cpu"):
        raise ArgumentError("--text requires --device cuda or webgpu, where products are float16")
    if format == "onnx" and options.gguf_type is not None:
        raise ArgumentError("--gguf-type requires --gguf")


def _bundle(source: _Source, chosen: _Options, out: Path | None, display: Progress, started: float) -> ExportResult:
    from slm.export.bundle import ExportOptions, export_bundle

    checkpoint, adapter = source.checkpoint, source.adapter
    target, device = chosen.target or "fused", chosen.device or "cpu"
    options = ExportOptions(chosen.context, target, device, chosen.text, chosen.adapter_slots)
    path = out or bundle_path(checkpoint, target, device, chosen.adapter_slots, adapter)
    check_output(path, sealed_files(path))
    origin = None if adapter is None else {"checkpoint": str(checkpoint), "adapter": str(adapter)}
    with source_checkpoint(checkpoint, adapter, display.note) as merged:
        bundle = export_bundle(merged, path, options, progress=display, origin=origin)
    seconds = round(time.perf_counter() - started, 2)
    return ExportResult(bundle.path, "onnx", checkpoint, adapter, bundle.bytes, seconds, bundle)


def _gguf(
    source: _Source, kind: Literal["f32", "f16", "q8_0"], out: Path | None, display: Progress, started: float
) -> ExportResult:
    from slm.interchange.gguf import check_gguf_output, write_gguf

    checkpoint, adapter = source.checkpoint, source.adapter
    path = _gguf_path(checkpoint, adapter, kind, out)
    check_gguf_output(path)
    with source_checkpoint(checkpoint, adapter, display.note) as merged:
        written = write_gguf(merged, path, kind, display)
    seconds = round(time.perf_counter() - started, 2)
    return ExportResult(written.path, "gguf", checkpoint, adapter, written.bytes, seconds, written=written)


def _adapter_file(source: _Source, out: Path | None, started: float) -> ExportResult:
    from slm.core.adapter_base import check_base
    from slm.core.checkpoint import read_config
    from slm.core.weights import weights_sha256
    from slm.interchange.onnx_adapter import slot_arrays, write_onnx_adapter
    from slm.runtime.adapters import SUFFIX, Adapter

    adapter, base = source.adapter, source.checkpoint
    assert adapter is not None  # `_check`
    path = out or adapter.with_name(f"{adapter.resolve().name}{SUFFIX}")
    check_writable(path)
    if path.exists() and (path.is_dir() or path.suffix != SUFFIX):
        raise SlmError(f"{path} exists and is not an {SUFFIX} file", "name another --out")
    config, weights = read_config(base), weights_sha256(base)
    check_base(adapter, base, weights)
    made = Adapter(adapter.resolve().name, slot_arrays(adapter, config))
    write_onnx_adapter(path, made, weights)
    seconds = round(time.perf_counter() - started, 2)
    products = len(made.arrays) // 2
    return ExportResult(path, "onnx-adapter", base, adapter, path.stat().st_size, seconds, products=products)


def _gguf_path(checkpoint: Path, adapter: Path | None, gguf_type: str, out: Path | None) -> Path:
    run = run_of(checkpoint)
    of_a_run = run != checkpoint.parent  # outside a run, the checkpoint's own name is used
    name = (run if of_a_run else checkpoint).resolve().name + ("" if adapter is None else f"-{adapter.resolve().name}")
    file = f"{name}-{gguf_type}.gguf"
    if out is None:
        return run / "gguf" / file
    return out if out.suffix == ".gguf" else out / file


@contextmanager
def source_checkpoint(checkpoint: Path, adapter: Path | None, note: Note) -> Iterator[Path]:
    """Yields the checkpoint, or a temporary checkpoint with the adapter merged into it."""
    if adapter is None:
        yield checkpoint
        return
    from slm.core.files import scratch_directory
    from slm.finetune.merge import merged_checkpoint

    note(f"merging {adapter} into {checkpoint}")
    with scratch_directory(run_of(checkpoint), "merged") as directory:
        merged = directory / "checkpoint"
        merged_checkpoint(checkpoint, adapter, merged)
        yield merged
