"""Choice of a scheme for each product: the requested scheme, adapted to the model's dimensions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slm.core.errors import SlmError
from slm.core.manifest import Scheme
from slm.quantize.linears import Linear

Prefer = Literal["auto", "speed", "size", "quality"]

# Larger blocks have fewer scales to load and multiply. A size of 128 decodes about 20 % faster than 32 (docs/LOG.md).
BLOCK_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class Wish:
    """The preferred schemes of the layers' products, and of embedding and head."""

    layers: Scheme
    vocabulary: Scheme


INT8: Mapping[Prefer, Wish] = {
    "auto": Wish(Scheme(bits=8, block_size=128), Scheme(bits=8, block_size=64)),
    "speed": Wish(Scheme(bits=8, block_size=128), Scheme(bits=8, block_size=128)),
    "size": Wish(Scheme(bits=8, block_size=128), Scheme(bits=8, block_size=128)),
    "quality": Wish(Scheme(bits=8, block_size=32), Scheme(bits=8, block_size=32)),
}
# One scale for each output channel; activations are rounded with one scale for each token.
INT8_DYNAMIC = Wish(Scheme(bits=8, block_size=128, dynamic=True), Scheme(bits=8, block_size=64))
INT4 = Wish(Scheme(bits=4, block_size=32, zero_points=True), Scheme(bits=8, block_size=128))


def schemes_of(linears: Sequence[Linear], wish: Wish, block_size: int | None = None) -> dict[str, Scheme]:
    """Returns the scheme of each product by path. A preferred block size that does not fit is reduced.

    Args:
        linears: The products.
        wish: The preferred schemes.
        block_size: The requested block size of the layers' products.

    Raises:
        SlmError: If no block size fits a product, or the requested one does not fit.
    """
    return {linear.path: _fitting(linear, wish, block_size) for linear in linears}


def with_half_scales(schemes: Mapping[str, Scheme], kept: Collection[str]) -> dict[str, Scheme]:
    """Returns schemes with float16 scales for GPUs, except for the products kept in float32 (`slm.export.ranges`)."""
    return {path: scheme.model_copy(update={"half": path not in kept}) for path, scheme in schemes.items()}


def _fitting(linear: Linear, wish: Wish, block_size: int | None) -> Scheme:
    scheme = wish.vocabulary if linear.layer is None else wish.layers
    if scheme.dynamic:
        return scheme.model_copy(update={"block_size": linear.inputs})
    fitting = [size for size in BLOCK_SIZES if linear.inputs % size == 0]
    wanted = scheme.block_size if block_size is None or linear.layer is None else block_size
    if not fitting or (block_size is not None and linear.layer is not None and wanted not in fitting):
        raise SlmError(
            f"{linear.path} has {linear.inputs} inputs, not a multiple of the block size {block_size or BLOCK_SIZES[-1]}",
            f"use --block-size {fitting[0]}" if fitting else "quantization needs a multiple of 16 inputs",
        )
    return scheme.model_copy(update={"block_size": next((size for size in fitting if size <= wanted), fitting[-1])})


def bytes_of(linears: Sequence[Linear], schemes: Mapping[str, Scheme]) -> int:
    """Returns the size of the stored weights in bytes."""
    return sum(schemes[linear.path].bytes(linear.outputs, linear.inputs) for linear in linears)
