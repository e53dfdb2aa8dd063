"""Which scheme each product gets: what was asked for, made to fit the model's sizes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slm.core.errors import SlmError
from slm.core.manifest import Scheme
from slm.quantize.linears import Linear

Prefer = Literal["auto", "speed", "size", "quality"]

# Larger blocks are fewer scales to load and multiply with; 128 decodes about a fifth faster than 32 (docs/LOG.md).
BLOCK_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class Wish:
    """Blocks to use where they fit: for the layers' products, and for embedding and head, which everything depends on."""

    layers: Scheme
    vocabulary: Scheme


INT8: Mapping[Prefer, Wish] = {
    "auto": Wish(Scheme(bits=8, block_size=128), Scheme(bits=8, block_size=64)),
    "speed": Wish(Scheme(bits=8, block_size=128), Scheme(bits=8, block_size=128)),
    "size": Wish(Scheme(bits=8, block_size=128), Scheme(bits=8, block_size=128)),
    "quality": Wish(Scheme(bits=8, block_size=32), Scheme(bits=8, block_size=32)),
}
# Activations are rounded a token at a time; a scale for each output channel.
INT8_DYNAMIC = Wish(Scheme(bits=8, block_size=128, dynamic=True), Scheme(bits=8, block_size=64))
INT4 = Wish(Scheme(bits=4, block_size=32, zero_points=True), Scheme(bits=8, block_size=128))


def schemes_of(linears: Sequence[Linear], wish: Wish, block_size: int | None = None) -> dict[str, Scheme]:
    """Returns the scheme of each product by path, in the largest blocks that fit it.

    Args:
        linears: The products.
        wish: What is wanted of them.
        block_size: Another size of the layers' blocks; it must fit.

    Raises:
        SlmError: When no block size fits a product, or the one asked for does not.
    """
    return {linear.path: _fitting(linear, wish, block_size) for linear in linears}


def with_half_scales(schemes: Mapping[str, Scheme], kept: Collection[str]) -> dict[str, Scheme]:
    """Returns schemes with float16 scales, as GPUs multiply, but for the products kept in float32 (`slm.export.ranges`)."""
    return {path: scheme.model_copy(update={"half": path not in kept}) for path, scheme in schemes.items()}


def _fitting(linear: Linear, wish: Wish, block_size: int | None) -> Scheme:
    scheme = wish.vocabulary if linear.layer is None else wish.layers
    if scheme.dynamic:
        return scheme.model_copy(update={"block_size": linear.inputs})
    fitting = [size for size in BLOCK_SIZES if linear.inputs % size == 0]
    wanted = scheme.block_size if block_size is None or linear.layer is None else block_size
    if not fitting or (block_size is not None and linear.layer is not None and wanted not in fitting):
        raise SlmError(
            f"{linear.path} has {linear.inputs} inputs, which do not divide into blocks of {block_size or BLOCK_SIZES[-1]}",
            f"--block-size {fitting[0]} fits it" if fitting else "blocks need multiples of 16",
        )
    return scheme.model_copy(update={"block_size": next((size for size in fitting if size <= wanted), fitting[-1])})


def bytes_of(linears: Sequence[Linear], schemes: Mapping[str, Scheme]) -> int:
    """Returns what the weights take in the file."""
    return sum(schemes[linear.path].bytes(linear.outputs, linear.inputs) for linear in linears)
