"""Weight-only INT8 by block: a float bundle in, a bundle a quarter the size out, if it is good enough.

The graph is built anew with another weight format from the source's tensors, one at a time; nothing is searched for in
the finished graph. Embedding and tied head share one 8-bit table.
"""

import shutil
from collections import ChainMap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from slm.core.contract import CacheType, input_specs, output_specs
from slm.core.errors import SlmError
from slm.core.files import atomic_directory
from slm.core.licence import modified, write_notice
from slm.core.manifest import MANIFEST_FILE, MODEL_NAMES, Bundle, Quality, Quantization, amend, seal, sealed_files
from slm.core.progress import Progress, Silent
from slm.export.clients import write_client_files
from slm.export.graph import BlockFormat, Fused, LazyTensors, build_graph, graph_tensors, released, save_graph
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_blocks
from slm.quantize.cache import cache_steps
from slm.quantize.quality import Change, Text, measure
from slm.version import __version__

BITS = 8
# Larger blocks are fewer scales to load and multiply with; 128 decodes about a fifth faster than 32 (docs/LOG.md).
BLOCK_SIZES = (128, 64, 32, 16)
# Activations are rounded to INT8 block by block inside the kernel: 18 times faster to decode on a CPU than floats.
ACCURACY_LEVEL = 4
DEFAULT_MAX_KL_NATS = 0.02

_QUANTIZED_ENDINGS = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Int8Settings:
    """How to quantize.

    Attributes:
        block_size: Input channels that share one scale; None takes the largest that fits the model.
        max_kl_nats: The largest mean divergence from the source's predictions that is let through.
        cache: How keys and values are cached: "float32", or "int8" with a step for each channel.
    """

    block_size: int | None = None
    max_kl_nats: float = DEFAULT_MAX_KL_NATS
    cache: CacheType = "float32"


def quantize_int8(
    source: Bundle, out: Path, text: Text, settings: Int8Settings | None = None, progress: Progress | None = None
) -> Bundle:
    """Quantizes a float32 bundle and measures what that changed.

    Args:
        source: The bundle to quantize.
        out: The new bundle's directory; made or replaced once the quality is good enough.
        text: What both bundles read for the measurement.
        settings: How to quantize.
        progress: Told of each step.

    Raises:
        SlmError: When the source is quantized already, no block size fits, or the gate does not let it through; nothing
            is written then.
    """
    settings, progress = settings or Int8Settings(), progress or Silent()
    if source.manifest.precision != "float32":
        raise SlmError(f"{source.path} is {source.manifest.precision} already", "quantize the float32 bundle")
    if source.manifest.target != "fused":
        raise SlmError(
            f"{source.path} is a portable bundle, and INT8 needs onnxruntime's own operators", "quantize a fused one"
        )
    if out.resolve() == source.path.resolve():
        raise SlmError(f"{out} is the bundle to quantize; it is kept", "name another --out")
    block_size = fitting_block_size(source, settings.block_size)
    with atomic_directory(out, sealed_files(out)) as directory:
        model = directory / "onnx" / f"{MODEL_NAMES['int8']}.onnx"
        model.parent.mkdir()
        progress.note(f"quantizing {source.manifest.parameters:,} parameters to INT8 in blocks of {block_size}")
        with released():
            steps = cache_steps(source, text, progress) if settings.cache == "int8" else {}
            target = Fused(BlockFormat(BITS, block_size, ACCURACY_LEVEL), cache=settings.cache)
            tensors = quantized_tensors(graph_tensors(source.model_path), block_size)
            everything = ChainMap(steps, tensors)  # type: ignore[arg-type]  # only read
            save_graph(build_graph(source.config, target, everything, source.manifest.context), model)
        for name in source.manifest.files:
            if "/" not in name and name != MANIFEST_FILE:
                shutil.copy(source.path / name, directory / name)
        caches = target.caches(source.config)
        notices = modified(source.manifest.notices, "quantized to INT8")
        write_notice(directory, notices)
        manifest = source.manifest.model_copy(
            update={
                "slm_version": __version__,
                "model": model.relative_to(directory).as_posix(),
                "precision": "int8",
                "cache": caches,
                "inputs": input_specs(caches),
                "outputs": output_specs(source.config.vocab_size, caches),
                "parity": None,
                "notices": notices,
                "quantization": Quantization(bits=BITS, block_size=block_size, accuracy_level=ACCURACY_LEVEL),
                "provenance": source.manifest.provenance | {"bundle": str(source.path), "parity": _parity(source)},
            }
        )
        write_client_files(directory, source.config, manifest)
        bundle = seal(directory, manifest)
        change = measure(source, bundle, text, progress)
        _gate(change, settings.max_kl_nats, block_size)
        quality = Quality(text=text.name, max_kl_nats=settings.max_kl_nats, **asdict(change))
        amend(directory, bundle.manifest.model_copy(update={"quality": quality}))
    return Bundle.open(out)


def fitting_block_size(source: Bundle, wanted: int | None) -> int:
    """Returns the block size to use: the wanted one, or the largest that divides every layer's input.

    Raises:
        SlmError: When the wanted one does not, or none does.
    """
    config = source.config
    inputs = {config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim}
    fitting = [size for size in BLOCK_SIZES if all(n % size == 0 for n in inputs)]
    if not fitting or (wanted is not None and wanted not in fitting):
        sizes = ", ".join(map(str, sorted(inputs)))
        raise SlmError(
            f"the layers' inputs of {sizes} do not divide into blocks of {wanted or BLOCK_SIZES[-1]}",
            f"--block-size {fitting[0]} fits" if fitting else "INT8 by block needs multiples of 16",
        )
    return wanted or fitting[0]


def quantized_tensors(tensors: LazyTensors, block_size: int) -> LazyTensors:
    """Returns the tensors of the quantized graph: integers and scales in place of each matrix, the others as they are."""

    @lru_cache(maxsize=1)  # integers and scales of one matrix are asked for one after the other
    def quantized(name: str) -> tuple[Array, Array]:
        return quantize_blocks(tensors[name], block_size)

    makers: dict[str, Callable[[], Array]] = {}
    for name in tensors:
        if name.endswith(_QUANTIZED_ENDINGS):
            makers[f"{name}_quantized"] = partial(_part, quantized, name, 0)
            makers[f"{name}_scale"] = partial(_part, quantized, name, 1)
        else:
            makers[name] = partial(tensors.__getitem__, name)
    return LazyTensors(makers)


def _part(quantized: Callable[[str], tuple[Array, Array]], name: str, index: Literal[0, 1]) -> Array:
    return quantized(name)[index]


def _gate(change: Change, max_kl_nats: float, block_size: int) -> None:
    if not change.kl_nats <= max_kl_nats:  # NaN fails too
        smaller = [size for size in BLOCK_SIZES if size < block_size]
        better = f"--block-size {smaller[0]} is more exact; " if smaller else ""
        raise SlmError(
            f"the predictions moved by {change.kl_nats:.4f} nats, allowed {max_kl_nats:g} "
            f"(perplexity {change.perplexity_before:.2f} to {change.perplexity_after:.2f}); nothing was written",
            f"{better}--max-kl {change.kl_nats * 1.1:.2g} would let it through",
        )


def _parity(source: Bundle) -> dict[str, object] | None:
    parity = source.manifest.parity
    return None if parity is None else parity.model_dump()
