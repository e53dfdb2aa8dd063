"""Export of a checkpoint to a bundle: one directory with graph, tokenizer, configuration and manifest.

The bundle is verified against PyTorch before its directory appears.
"""

import shutil
from pathlib import Path
from typing import Any

from slm.core.checkpoint import GENERATION_CONFIG_FILE, INFO_FILE, notices_of, read_config, read_info
from slm.core.contract import DEFAULT_CONTEXT, Device, Target, input_specs, output_specs, slot_specs
from slm.core.errors import SlmError
from slm.core.files import atomic_directory
from slm.core.licence import modified, write_notice
from slm.core.manifest import MODEL_NAMES, Bundle, Manifest, Precision, Ranges, amend, seal, sealed_files
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.tokenizer_config import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
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


def export_bundle(
    checkpoint: Path,
    out: Path,
    context: int | None = None,
    progress: Progress | None = None,
    origin: dict[str, str] | None = None,
    target: Target = "fused",
    device: Device = "cpu",
    text: Path | None = None,
    adapter_slots: bool = False,
) -> Bundle:
    """Exports a checkpoint to a bundle and verifies the bundle against PyTorch.

    Args:
        checkpoint: The checkpoint's directory.
        out: The bundle's directory. It is created or replaced only after verification.
        context: The longest sequence in tokens. The default is the model's context, at most 4,096.
        progress: Receives the progress of each step.
        origin: The origin of the checkpoint for the manifest; needed if the checkpoint's path is temporary.
        target: "fused" for onnxruntime, "portable" for any runtime with standard ONNX operators.
        device: The device that will run the bundle. On "cuda" and "webgpu", products and caches are float16.
        text: A text file for finding the products that overflow float16. The default is the stories that ship with slm.
        adapter_slots: Whether the graph has inputs for LoRA adapters.

    Returns:
        The bundle. Its manifest holds the measured differences from PyTorch.

    Raises:
        SlmError: If the checkpoint cannot be read, the context is out of range, the target does not support the
            device, or the bundle's output differs from PyTorch's.
    """
    if target == "portable" and device != "cpu":
        raise SlmError(f"the portable target does not support {device}", "use --target fused, or --device cpu")
    progress = progress or Silent()
    config = read_config(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)  # fails early: a bundle needs a tokenizer
    longest = config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not min(config.sliding_window + 1, longest) <= context <= longest:
        raise SlmError(
            f"the context of {context:,} tokens must be larger than the window ({config.sliding_window:,}) "
            f"and at most the model's context ({longest:,})",
            "choose another --context",
        )
    precision: Precision = "float32" if device == "cpu" else "float16"
    ranges = None if device == "cpu" else _scan(checkpoint, tokenizer, text, progress)
    if adapter_slots:
        check_slots(target, device)
    operators = _operators(target, device, ranges, adapter_slots)
    caches = operators.caches(config)
    with atomic_directory(out, sealed_files(out)) as directory:
        model = directory / "onnx" / f"{MODEL_NAMES[precision]}.onnx"
        model.parent.mkdir()
        progress.note(f"writing {config.parameter_count():,} parameters in {precision}")
        with released():
            tensors = checkpoint_tensors(Weights(checkpoint), config)
            save_graph(build_graph(config, operators, tensors, context), model)
        tokenizer.copy(checkpoint, directory)
        for name in (GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE):
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, directory / name)
        notices = modified(notices_of(checkpoint), "exported to ONNX")
        write_notice(directory, notices)
        manifest = Manifest(
            slm_version=__version__,
            model=model.relative_to(directory).as_posix(),
            precision=precision,
            target=target,
            device=device,
            context=context,
            cache=caches,
            inputs=input_specs(caches, slot_specs(config) if adapter_slots else ()),
            outputs=output_specs(config.vocab_size, caches),
            adapter_slots=adapter_slots,
            parameters=config.parameter_count(),
            ranges=ranges,
            provenance={
                **(origin or {"checkpoint": str(checkpoint)}),
                "weights_sha256": weights_sha256(checkpoint),
                INFO_FILE: read_info(checkpoint),
            },
            notices=notices,
        )
        write_client_files(directory, config, manifest)
        bundle = seal(directory, manifest)
        prove(bundle, checkpoint, progress)
    return Bundle.open(out)


def _operators(target: Target, device: Device, ranges: Ranges | None, adapter_slots: bool) -> graph.Target[Any]:
    if target == "portable":
        return Portable(GemmFormat())
    if ranges is None:
        return Fused(SlotFormat(FloatFormat()) if adapter_slots else FloatFormat())
    return Fused(FloatFormat(half=True, kept=ranges.float32), device, "float16")


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
