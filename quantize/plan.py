"""The plan of a quantization: the scheme of each weight, and everything else that determines the quantized bundle.

Dimensions: K input channels.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Self, TypeAlias

from slm.core.contract import CacheType, Device
from slm.core.errors import SlmError
from slm.core.grid import BLOCK_SIZES, fitting_block
from slm.core.manifest import Quantization, Scheme
from slm.core.qat import GRIDS, QatGrid, QatPrecision
from slm.export.graph.builder import Array
from slm.export.graph.smoothing import NO_SMOOTHING, Smoothing
from slm.quantize.frequent import FrequentTokens
from slm.quantize.linears import Linear
from slm.quantize.results import Refined
from slm.quantize.settings import Method, Prefer, Settings

Arrays: TypeAlias = Mapping[str, Array]
Schemes: TypeAlias = Mapping[str, Scheme]

# The kernel rounds activations to INT8 block by block. On a CPU, this decodes 18 times faster than float activations.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class PreferredSchemes:
    """The preferred scheme of each role of a weight (`Linear.role`)."""

    layer: Scheme
    head: Scheme
    lookup: Scheme

    @classmethod
    def of(cls, grid: QatGrid) -> Self:
        """Returns the schemes of a grid."""
        return cls(layer=grid.layers, head=grid.vocabulary, lookup=grid.vocabulary)


_IN_128, _IN_64, _IN_32 = (Scheme(bits=8, block_size=size) for size in (128, 64, 32))
INT8: Mapping[Prefer, PreferredSchemes] = {
    "auto": PreferredSchemes.of(GRIDS["int8"]),
    "speed": PreferredSchemes(layer=_IN_128, head=_IN_128, lookup=_IN_128),
    "size": PreferredSchemes(layer=_IN_128, head=_IN_128, lookup=_IN_128),
    "quality": PreferredSchemes(layer=_IN_32, head=_IN_32, lookup=_IN_32),
}
# One scale for each output channel; activations are rounded with one scale for each token. Sums of two products fit in 16 bits.
INT8_DYNAMIC = PreferredSchemes(
    layer=Scheme(bits=8, block_size=128, dynamic=True, reduced=True), head=_IN_64, lookup=_IN_64
)
INT4 = PreferredSchemes.of(GRIDS["int4"])
# The larger block size of layers in 4 bits that a search for a size or a divergence can choose.
COARSER_BLOCK = 64
# A 4-bit table. Smaller blocks would take more bytes than the rows of frequent tokens in 8 bits, and gain less
# (docs/quantization.md).
TABLE = Scheme(bits=4, block_size=128, zero_points=True)


@dataclass(frozen=True)
class Alternative:
    """Another scheme for a weight.

    Attributes:
        scheme: The scheme.
        rounded: The weight's integers and scales.
        error: The squared error of the product's output, relative to that of the plan's scheme.
    """

    scheme: Scheme
    rounded: Arrays
    error: float


@dataclass(frozen=True)
class QuantizationPlan:
    """Everything that determines a quantized bundle, given its source. Functions return new plans and change none.

    Attributes:
        schemes: The scheme of each weight, by path.
        method: The rounding method.
        device: The device that will run the bundle.
        cache: The type of cached keys and values.
        cache_steps: The quantization steps of keys and values, by name of the parameter.
        attention: The time of a step with a few attention layers in seconds, by type of cache; empty if not measured.
        smoothing: The smoothing factors.
        exact: Paths of the layers' weights that lie on grids which their schemes store exactly.
        rounded: Integers and scales of the weights that are already rounded, by path. Other weights are rounded when they
            are written.
        coarser: A scheme with fewer bytes for weights that GPTQ rounded in both, by path.
        frequent: The frequent tokens, from which schemes of tables take the first ones; None if no table has such rows.
        norms: The weights of norms that refinement has moved, by name; they replace those of the smoothed model.
        refinement: The effect of refinement, if there was one.
        sensitivity: KL divergence if only this weight has few bits, in nats, by path; empty if not measured.
        trained_for: The precision for which the model was trained, if the plan keeps that grid.
    """

    schemes: Schemes
    method: Method
    device: Device = "cpu"
    cache: CacheType = "float32"
    cache_steps: Mapping[str, Array] = field(default_factory=dict)
    attention: Mapping[CacheType, float] = field(default_factory=dict)
    smoothing: Smoothing = NO_SMOOTHING
    exact: frozenset[str] = frozenset()
    rounded: Mapping[str, Arrays] = field(default_factory=dict)
    coarser: Mapping[str, Alternative] = field(default_factory=dict)
    frequent: FrequentTokens | None = None
    norms: Mapping[str, Array] = field(default_factory=dict)
    refinement: Refined | None = None
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    trained_for: QatPrecision | None = None

    def with_schemes(self, schemes: Schemes) -> "QuantizationPlan":
        """Returns the plan with other schemes.

        A weight whose scheme changes loses its rounded arrays, or gets those in `coarser`. The number of rows of frequent
        tokens can change, because these rows are rounded apart.
        """
        kept = {
            path: arrays
            for path, arrays in self.rounded.items()
            if with_frequent(schemes[path], 0) == with_frequent(self.schemes[path], 0)
        }
        other = {path: each.rounded for path, each in self.coarser.items() if schemes[path] == each.scheme}
        return replace(self, schemes=schemes, rounded={**kept, **other})

    @property
    def counts(self) -> dict[str, int]:
        """The number of weights of each scheme, by the scheme's name."""
        count: dict[str, int] = {}
        for scheme in self.schemes.values():
            count[scheme.name] = count.get(scheme.name, 0) + 1
        return count

    def decisions(self) -> dict[str, object]:
        """Returns the decisions for reports."""
        found: dict[str, object] = {"method": self.method, "smoothing": self._exponent, "cache": self.cache}
        found["products"] = self.counts
        rows = max(scheme.frequent for scheme in self.schemes.values())
        if rows and self.frequent is not None:
            found |= {"frequent_tokens": rows, "frequent_share": round(1 - self.frequent.others[rows], 4)}
        if self.attention:
            found["attention_us"] = {each: round(1e6 * seconds, 1) for each, seconds in self.attention.items()}
        if self.trained_for is not None:
            found["trained_for"] = self.trained_for
        if self.refinement is not None:
            found["refinement"] = asdict(self.refinement)
        return found

    def record(self) -> Quantization:
        """Returns the manifest's record."""
        level = ACCURACY_LEVEL if self.device == "cpu" else 0  # products on CUDA do not round activations
        return Quantization(
            method=self.method,
            accuracy_level=level,
            smoothing=self._exponent,
            schemes=dict(self.schemes),
            refined=self.refinement is not None and self.refinement.kept,
        )

    @property
    def _exponent(self) -> float | None:
        return self.smoothing.exponent if self.smoothing.columns else None


def preferred_schemes(settings: Settings) -> PreferredSchemes:
    """Returns the schemes that the settings ask for."""
    if settings.precision == "int4":
        return INT4
    return INT8_DYNAMIC if settings.dynamic else INT8[settings.prefer]


def with_frequent(scheme: Scheme, count: int) -> Scheme:
    """Returns the scheme of a table with another number of rows of frequent tokens in 8 bits."""
    return scheme.model_copy(update={"frequent": count})


def with_four_bit_tables(preferred: PreferredSchemes) -> PreferredSchemes:
    """Returns preferred schemes with 4 bits for the head and for the lookup of embeddings."""
    return replace(preferred, head=TABLE, lookup=TABLE)


def schemes_of(
    linears: Sequence[Linear], preferred: PreferredSchemes, block_size: int | None = None
) -> dict[str, Scheme]:
    """Returns the scheme of each weight by path. A preferred block size that does not fit is reduced.

    Args:
        linears: The weights.
        preferred: The preferred schemes.
        block_size: The requested block size of the layers' weights.

    Raises:
        SlmError: If no block size fits a weight, or the requested one does not fit.
    """
    return {linear.path: _fitting(linear, preferred, block_size) for linear in linears}


def coarser_schemes(layers: Sequence[Linear], schemes: Schemes) -> dict[str, Scheme]:
    """Returns schemes in larger blocks for the layers' weights that have 4 bits in smaller blocks, by path."""
    return {
        linear.path: schemes[linear.path].model_copy(update={"block_size": COARSER_BLOCK})
        for linear in layers
        if schemes[linear.path].bits == 4
        and schemes[linear.path].block_size < COARSER_BLOCK
        and linear.inputs % COARSER_BLOCK == 0
    }


def with_half_scales(schemes: Schemes, kept: Collection[str]) -> dict[str, Scheme]:
    """Returns schemes with float16 scales for GPUs, except for the products kept in float32 (`slm.export.ranges`)."""
    return {path: scheme.model_copy(update={"half": path not in kept}) for path, scheme in schemes.items()}


def _fitting(linear: Linear, preferred: PreferredSchemes, block_size: int | None) -> Scheme:
    scheme: Scheme = getattr(preferred, linear.role)
    if scheme.dynamic:
        return scheme.model_copy(update={"block_size": linear.inputs})
    requested = block_size if linear.role == "layer" else None
    wanted = requested or scheme.block_size
    size = fitting_block(linear.inputs, wanted)
    if size is None or (requested is not None and size != requested):
        largest = fitting_block(linear.inputs, BLOCK_SIZES[0])
        raise SlmError(
            f"{linear.path} has {linear.inputs} inputs, not a multiple of the block size {block_size or BLOCK_SIZES[-1]}",
            f"use --block-size {largest}" if largest else "quantization needs a multiple of 16 inputs",
        )
    return scheme.model_copy(update={"block_size": size})


def bytes_of(linears: Sequence[Linear], schemes: Schemes) -> int:
    """Returns the size of the stored weights in bytes."""
    return sum(schemes[linear.path].bytes(linear.outputs, linear.inputs) for linear in linears)
