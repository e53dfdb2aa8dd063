"""Export of a checkpoint to a bundle: one directory with graph, tokenizer, configuration and manifest.

The bundle is verified against PyTorch before its directory appears.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.core.checkpoint import GENERATION_CONFIG_FILE, INFO_FILE, notices_of, read_config, read_info
from slm.core.config import ModelConfig
from slm.core.contract import DEFAULT_CONTEXT, Device, Target, input_specs, output_specs, slot_specs
from slm.core.errors import SlmError
from slm.core.files import atomic_directory
from slm.core.licence import modified, write_notice
from slm.core.manifest import MODEL_NAMES, Bundle, Manifest, Precision, Ranges, amend, seal, sealed_files
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.tokenizer_config import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from slm.core.tuned_rows import without_samples
from slm.core.weights import Weights, weights_sha256
from slm.export import graph
from slm.export.clients import write_client_files
from slm.export.graph import (
    FloatFormat,
    Fused,
    GemmFormat,
    Portable,
    SlotFormat,
    build_graph,
    check_slots,
    checkpoint_tensors,
    released,
    save_graph,
)
from slm.version import __version__


@dataclass(frozen=True)
class ExportOptions:
    """How a bundle is made.

    Attributes:
        context: The longest sequence in tokens. The default is the model's context, at most 4,096.
        target: "fused" for onnxruntime, "portable" for any runtime with standard ONNX operators.
        device: The device that will run the bundle. On "cuda" and "webgpu", products and caches are float16.
        text: A text file for finding the products that overflow float16. The default is the stories that ship with slm.
        adapter_slots: Whether the graph has inputs for LoRA adapters.
    """

    context: int | None = None
    target: Target = "fused"
    device: Device = "cpu"
    text: Path | None = None
    adapter_slots: bool = False


DEFAULTS = ExportOptions()


def export_bundle(
    checkpoint: Path,
    out: Path,
    options: ExportOptions = DEFAULTS,
    *,
    progress: Progress | None = None,
    origin: dict[str, str] | None = None,
) -> Bundle:
    """Exports a checkpoint to a bundle and verifies the bundle against PyTorch.

    Args:
        checkpoint: The checkpoint's directory.
        out: The bundle's directory. It is created or replaced only after verification.
        options: The context, the target and the device of the bundle.
        progress: Receives the progress of each step.
        origin: The origin of the checkpoint for the manifest; needed if the checkpoint's path is temporary.

    Returns:
        The bundle. Its manifest holds the measured differences from PyTorch.

    Raises:
        SlmError: If the checkpoint cannot be read, the context is out of range, the target does not support the
            device, or the bundle's output differs from PyTorch's.
    """
    progress = progress or Silent()
    config = read_config(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)  # fails early: a bundle needs a tokenizer
    context = _context(options, config)
    ranges = None if options.device == "cpu" else _scan(checkpoint, tokenizer, options.text, progress)
    operators = _operators(options, ranges)
    caches = operators.caches(config)
    precision: Precision = "float32" if options.device == "cpu" else "float16"
    with atomic_directory(out, sealed_files(out)) as directory:
        model = directory / "onnx" / f"{MODEL_NAMES[precision]}.onnx"
        model.parent.mkdir()
        progress.note(f"writing {config.parameter_count():,} parameters in {precision}")
        with released():
            tensors = checkpoint_tensors(Weights(checkpoint), config)
            save_graph(build_graph(config, operators, tensors, context), model)
        manifest = Manifest(
            slm_version=__version__,
            model=model.relative_to(directory).as_posix(),
            precision=precision,
            target=options.target,
            device=options.device,
            context=context,
            cache=caches,
            inputs=input_specs(caches, slot_specs(config) if options.adapter_slots else ()),
            outputs=output_specs(config.vocab_size, caches),
            adapter_slots=options.adapter_slots,
            parameters=config.parameter_count(),
            ranges=ranges,
            provenance={
                **(origin or {"checkpoint": str(checkpoint)}),
                "weights_sha256": weights_sha256(checkpoint),
                INFO_FILE: without_samples(read_info(checkpoint)),
            },
            notices=modified(notices_of(checkpoint), "exported to ONNX"),
        )
        _write_files(directory, checkpoint, tokenizer, manifest)
        write_client_files(directory, config, manifest)
        prove(seal(directory, manifest), checkpoint, progress)
    return Bundle.open(out)


def _context(options: ExportOptions, config: ModelConfig) -> int:
    """Returns the context of a bundle in tokens, after checking that its target supports the other options.

    Raises:
        SlmError: If the context is out of range, or the target does not support the device or adapter slots.
    """
    if options.target == "portable" and options.device != "cpu":
        raise SlmError(f"the portable target does not support {options.device}", "use --target fused, or --device cpu")
    if options.adapter_slots:
        check_slots(options.target, options.device)
    longest = config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if options.context is None else options.context
    if not min(config.sliding_window + 1, longest) <= context <= longest:
        raise SlmError(
            f"the context of {context:,} tokens must be larger than the window ({config.sliding_window:,}) "
            f"and at most the model's context ({longest:,})",
            "choose another --context",
        )
    return context


def _write_files(directory: Path, checkpoint: Path, tokenizer: Tokenizer, manifest: Manifest) -> None:
    """Writes the tokenizer, the settings of generation and the licence notice."""
    tokenizer.copy(checkpoint, directory)
    for name in (GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, directory / name)
    write_notice(directory, manifest.notices)


def _operators(options: ExportOptions, ranges: Ranges | None) -> graph.Operators[Any]:
    if options.target == "portable":
        return Portable(GemmFormat())
    if ranges is None:
        return Fused(SlotFormat(FloatFormat()) if options.adapter_slots else FloatFormat())
    return Fused(FloatFormat(half=True, kept=ranges.float32), options.device, "float16")


def _scan(checkpoint: Path, tokenizer: Tokenizer, text: Path | None, progress: Progress) -> Ranges:
    from slm.core.nn import load_checkpoint
    from slm.export.ranges import scan_ranges

    ranges = scan_ranges(load_checkpoint(checkpoint), tokenizer, text)
    if ranges.float32:
        progress.note(f"{len(ranges.float32)} products stay in float32, because float16 would overflow")
    return ranges


def prove(bundle: Bundle, checkpoint: Path, progress: Progress) -> None:
    """Compares a bundle with its checkpoint in PyTorch and records the differences in its manifest.

    Raises:
        SlmError: If a difference is above the tolerance.
    """
    from slm.core.nn import load_checkpoint
    from slm.export.parity import check_parity

    parity = check_parity(bundle, load_checkpoint(checkpoint), progress)
    amend(bundle.path, bundle.manifest.model_copy(update={"parity": parity}))
