"""A checkpoint becomes a bundle: graph, tokenizer, configuration and manifest in one directory, proved before it appears."""

import json
import shutil
from pathlib import Path

from slm.core.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE, INFO_FILE, notices_of, read_config, read_info
from slm.core.config import ModelConfig
from slm.core.contract import cache_layers, input_specs, output_specs
from slm.core.errors import SlmError
from slm.core.files import atomic_directory
from slm.core.licence import modified, write_notice
from slm.core.manifest import MODEL_NAMES, Bundle, Manifest, amend, seal, sealed_files
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from slm.core.weights import Weights, weights_sha256
from slm.export.graph import FloatFormat, build_graph, checkpoint_tensors, released, save_graph
from slm.version import __version__

# Rotation tables are as long as the context (2 bases * 2 tables * head_dim / 2 * 4 bytes a position: 2 KiB at the 270M
# shape), so a bundle carries no more than most uses want.
DEFAULT_CONTEXT = 4096


def export_bundle(
    checkpoint: Path,
    out: Path,
    context: int | None = None,
    progress: Progress | None = None,
    origin: dict[str, str] | None = None,
) -> Bundle:
    """Exports a checkpoint and proves the bundle equal to it.

    Args:
        checkpoint: The checkpoint's directory.
        out: The bundle's directory; made or replaced once everything is proved.
        context: The longest sequence in tokens; by default the model's own, at most 4,096.
        progress: Told of each step.
        origin: Where the checkpoint came from, for the manifest, when its own path will not last.

    Returns:
        The bundle, its manifest carrying the differences found.

    Raises:
        SlmError: When the checkpoint cannot be read, the context is longer than the model's, or the bundle's output
            differs from PyTorch's.
    """
    progress = progress or Silent()
    config = read_config(checkpoint)
    Tokenizer.load(checkpoint)  # a bundle without one would answer nothing
    longest = config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if context is None else context
    if not min(config.sliding_window + 1, longest) <= context <= longest:
        raise SlmError(
            f"the context of {context:,} tokens must be above the window of {config.sliding_window:,} "
            f"and at most the model's {longest:,}",
            "choose another --context",
        )
    with atomic_directory(out, sealed_files(out)) as directory:
        model = directory / "onnx" / f"{MODEL_NAMES['float32']}.onnx"
        model.parent.mkdir()
        progress.note(f"writing {config.parameter_count():,} parameters in float32")
        with released():
            _write_graph(checkpoint, config, context, model)
        for name in (GENERATION_CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE):
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, directory / name)
        (directory / CONFIG_FILE).write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
        notices = modified(notices_of(checkpoint), "exported to ONNX")
        write_notice(directory, notices)
        manifest = Manifest(
            slm_version=__version__,
            model=model.relative_to(directory).as_posix(),
            precision="float32",
            context=context,
            cache=cache_layers(config),
            inputs=input_specs(config),
            outputs=output_specs(config),
            parameters=config.parameter_count(),
            provenance={
                **(origin or {"checkpoint": str(checkpoint)}),
                "weights_sha256": weights_sha256(checkpoint),
                INFO_FILE: read_info(checkpoint),
            },
            notices=notices,
        )
        bundle = seal(directory, manifest)
        prove(bundle, checkpoint, progress)
    return Bundle.open(out)


def _write_graph(checkpoint: Path, config: ModelConfig, context: int, path: Path) -> None:
    """Writes the float32 graph."""
    tensors = checkpoint_tensors(Weights(checkpoint), config)
    save_graph(build_graph(config, FloatFormat(), tensors, context), path)


def prove(bundle: Bundle, checkpoint: Path, progress: Progress) -> None:
    """Compares a bundle with its checkpoint in PyTorch and writes the differences into its manifest.

    Raises:
        SlmError: When they are too large.
    """
    from slm.core.nn import load_checkpoint
    from slm.export.parity import check_parity

    parity = check_parity(bundle, load_checkpoint(checkpoint), progress)
    amend(bundle.path, bundle.manifest.model_copy(update={"parity": parity}))
