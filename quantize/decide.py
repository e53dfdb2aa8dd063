"""Choice of a quantization recipe. Whatever the settings leave open is decided by measurement.

Dimensions: K input channels.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from slm.core.contract import CacheType, Device
from slm.core.manifest import Bundle, Quantization, Scheme
from slm.core.progress import Progress
from slm.export.graph import graph_tensors
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest
from slm.quantize.cache import cache_steps
from slm.quantize.cache_choice import attention_times, faster
from slm.quantize.defaults import MAX_KL_NATS
from slm.quantize.exact import (
    BLOCK_SIZE as GRID_BLOCK_SIZE,
)
from slm.quantize.exact import (
    share_on_grid,
)
from slm.quantize.lab import Lab
from slm.quantize.linears import Linear, linears_of
from slm.quantize.plan import INT4, INT8, INT8_DYNAMIC, Prefer, schemes_of, with_half_scales
from slm.quantize.quality import Change, Opened, Text, measure
from slm.quantize.rounding import Arrays, Method, gptq, placeholders, restored, rounded_tensors
from slm.quantize.search import Budget, Schemes, choose, sensitivities, within_bytes, within_kl
from slm.quantize.smoothing import NO_SMOOTHING, Smoothing, smoothing
from slm.quantize.statistics import root_mean_squares
from slm.quantize.write import ACCURACY_LEVEL, Contents, tried
from slm.runtime.decoder import OnnxDecoder

# Calibration rows for trying smoothing, for the sensitivity of each layer, and for trying mixed precision; tokens in a row.
_SMOOTHING_ROWS, _SENSITIVITY_ROWS, _TOGETHER_ROWS, _ROW_TOKENS = 1, 2, 4, 256
# The share of output channels on a grid from which the whole product counts as being on a grid.
_KEPT_SHARE = 0.5
# The KL divergence that INT4 aims for, in nats, as the sum of the layers' divergences. The measured divergence is higher
# (docs/quantization.md).
_FINE_KL_NATS: Mapping[Prefer, float] = {"auto": 0.02, "speed": 0.02, "quality": 0.012}


@dataclass(frozen=True)
class Gate:
    """The limits of the quality check. None means no limit.

    Attributes:
        max_kl_nats: Limit of the mean KL divergence from the source's predictions, in nats.
        max_perplexity_increase: Limit of the relative increase of perplexity.
    """

    max_kl_nats: float | None
    max_perplexity_increase: float | None = None

    def refuses(self, change: Change) -> str | None:
        """Returns the reason for rejection, or None. Rejects NaN."""
        if self.max_kl_nats is not None and not change.kl_nats <= self.max_kl_nats:
            return f"KL divergence {change.kl_nats:.4f} nats (limit {self.max_kl_nats:g})"
        grown = change.perplexity_after / change.perplexity_before - 1
        if self.max_perplexity_increase is not None and not grown <= self.max_perplexity_increase:
            return f"perplexity increase {grown:.1%} (limit {self.max_perplexity_increase:.1%})"
        return None


GATES = {precision: Gate(nats) for precision, nats in MAX_KL_NATS.items()}


@dataclass(frozen=True)
class Settings:
    """The settings of a quantization.

    Attributes:
        precision: "int8" or "int4". With "int4", sensitive layers can get eight bits.
        prefer: The property to optimize.
        dynamic: Use products of 8-bit integers with a dynamic scale for each token, instead of blocks.
        reduce_range: With `dynamic`, limit weights to seven bits, for processors without VNNI.
        block_size: The number of input channels that share one scale in the layers' weights. None: `prefer` decides.
        method: The rounding method. None: GPTQ for four bits, nearest for eight bits.
        smooth: Whether to smooth activations first. None: only if it measures better.
        cache: The type of cached keys and values. None: `prefer` decides; with "auto", the type with the faster attention.
        target_bytes: For INT4, the limit of the size of graph and weights, in bytes.
        target_kl_nats: For INT4, the target KL divergence. Layers get eight bits until it is reached.
        gate: The limits of the quality check. None: the default limits of the precision.
    """

    precision: Literal["int8", "int4"] = "int8"
    prefer: Prefer = "auto"
    dynamic: bool = False
    reduce_range: bool = False
    block_size: int | None = None
    method: Method | None = None
    smooth: bool | None = None
    cache: CacheType | None = None
    target_bytes: int | None = None
    target_kl_nats: float | None = None
    gate: Gate | None = None

    def words(self) -> dict[str, object]:
        """Returns the requested settings, without those left open."""
        asked: dict[str, object] = {"precision": self.precision, "prefer": self.prefer, "dynamic": self.dynamic or None}
        asked |= {"block_size": self.block_size}
        asked |= {"target_bytes": self.target_bytes, "target_kl_nats": self.target_kl_nats}
        return {name: value for name, value in asked.items() if value is not None}

    def finer(self) -> str | None:
        """Returns options that reduce the rounding error, or None if there are none."""
        if self.precision == "int4":
            if self.target_bytes:
                return "a larger --target-size"
            return "--int4 --prefer quality" if self.prefer == "size" else "--int8"
        if self.dynamic:
            return "--int8 without --int8-dynamic"
        return None if self.prefer == "quality" else "--prefer quality"


@dataclass
class Recipe:
    """The decisions that a quantized graph is built from.

    Attributes:
        schemes: The scheme of each product, by path.
        method: The rounding method.
        smoothing: The smoothing factors.
        cache: The type of cached keys and values.
        cache_steps: The quantization steps of keys and values, by name of the parameter.
        attention: The time of a step with a few attention layers in seconds, by type of cache; empty if not measured.
        rms: Root mean square of each input channel (K,) before smoothing, by path of the product; empty if not measured.
        done: Arrays of the weights that are already rounded, by path.
        harm: KL divergence when only this product has few bits, in nats, by path; empty if not measured.
        kept: Paths of the products whose weights lie on grids that their schemes store exactly.
        device: The device that will run the bundle.
    """

    schemes: dict[str, Scheme]
    method: Method
    smoothing: Smoothing = NO_SMOOTHING
    cache: CacheType = "float32"
    cache_steps: Mapping[str, Array] = field(default_factory=dict)
    attention: Mapping[CacheType, float] = field(default_factory=dict)
    rms: Mapping[str, Array] = field(default_factory=dict)
    done: Mapping[str, Arrays] = field(default_factory=dict)
    harm: Mapping[str, float] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    device: Device = "cpu"

    @property
    def inputs_rms(self) -> dict[str, Array]:
        """The root mean square of each input channel (K,) after smoothing, by path."""
        return {path: self.smoothing.activations(f"{path}.weight", values) for path, values in self.rms.items()}

    @property
    def importance(self) -> dict[str, Array]:
        """The weight of each input channel's error (K,), which is the mean square of its activations, by path."""
        return {path: np.square(values) for path, values in self.inputs_rms.items()}

    def contents(self, source: Bundle) -> Contents:
        """Returns the contents of the quantized bundle.

        Args:
            source: The float32 bundle.
        """
        plain = self.smoothing.apply(graph_tensors(source.model_path))
        rounded = rounded_tensors(plain, self.schemes, self.method != "nearest", self.importance, self.done)
        tensors = ChainMap(dict(self.cache_steps), rounded)  # type: ignore[arg-type]  # only read
        return Contents(tensors, self.describe(), self.cache, self.smoothing, self.device)

    def words(self) -> dict[str, object]:
        """Returns the decisions for reports."""
        count: dict[str, int] = {}
        for scheme in self.schemes.values():
            count[scheme.name] = count.get(scheme.name, 0) + 1
        smooth = self.smoothing.exponent if self.smoothing.columns else None
        found: dict[str, object] = {"method": self.method, "smoothing": smooth, "cache": self.cache, "products": count}
        if self.attention:
            found["attention_us"] = {each: round(1e6 * seconds, 1) for each, seconds in self.attention.items()}
        return found

    def describe(self) -> Quantization:
        """Returns the manifest's record."""
        exponent = self.smoothing.exponent if self.smoothing.columns else None
        level = ACCURACY_LEVEL if self.device == "cpu" else 0  # products on CUDA do not round activations
        return Quantization(method=self.method, accuracy_level=level, smoothing=exponent, schemes=self.schemes)


def decide(
    source: Bundle,
    before: Opened,
    calibration: Text,
    settings: Settings,
    progress: Progress,
    scratch: Path,
    device: Device = "cpu",
) -> Recipe:
    """Chooses everything that the settings leave open, by measurement on the calibration text.

    Args:
        source: The float32 bundle (`slm.quantize.plain`).
        before: Runs the bundle that predictions are compared with. It is closed while other steps need the memory.
        calibration: The calibration text.
        settings: The requested settings.
        progress: Receives the progress of each step.
        scratch: A directory for temporary bundles.
        device: The device that will run the new bundle.
    """
    linears = linears_of(source.config)
    wish = INT4 if settings.precision == "int4" else INT8_DYNAMIC if settings.dynamic else INT8[settings.prefer]
    method = settings.method or ("gptq" if settings.precision == "int4" else "nearest")
    attention: dict[CacheType, float] = {}
    cache = settings.cache or ("int8" if settings.prefer == "speed" else "float32")
    if settings.cache is None and settings.prefer == "auto":
        attention = attention_times(source, scratch)
        cache = faster(attention)
        measured = " and ".join(f"{1e6 * seconds:.0f} µs with {each}" for each, seconds in attention.items())
        progress.note(f"{cache} caches: a step with four attention layers takes {measured} caches")
    if settings.reduce_range:
        wish = replace(wish, layers=wish.layers.model_copy(update={"reduced": True}))
    schemes = on_device(schemes_of(linears, wish, settings.block_size), source, device)
    recipe = Recipe(schemes, method, cache=cache, attention=attention, device=device)
    if cache == "int8":
        recipe.cache_steps = cache_steps(source, calibration, progress)
    layers = [linear for linear in linears if linear.layer is not None]
    if settings.smooth is not False or method != "nearest":
        recipe.rms = root_mean_squares(Lab(source, layers), layers, calibration, progress)
    tensors = graph_tensors(source.model_path)
    recipe.kept = kept_products(tensors, layers, recipe.schemes, progress)
    if settings.smooth is not False and len(recipe.kept) < len(layers):
        smooth = smoothing(tensors, source.config, recipe.rms, kept=recipe.kept)
        if settings.smooth or _better(source, before, recipe, smooth, calibration, progress, scratch):
            recipe.smoothing = smooth
    if settings.precision == "int4":
        before.close()
        _spend_bits(source, before, recipe, settings, calibration, progress, scratch)
    return recipe


def on_device(schemes: dict[str, Scheme], source: Bundle, device: Device) -> dict[str, Scheme]:
    """Returns the schemes for a device. On CUDA, scales are float16 except for products that overflow float16."""
    if device == "cpu":
        return schemes
    return with_half_scales(schemes, source.manifest.ranges.float32 if source.manifest.ranges else ())


def kept_products(
    tensors: Mapping[str, Array], layers: Sequence[Linear], schemes: Schemes, progress: Progress
) -> frozenset[str]:
    """Returns the paths of the products whose weights lie on grids that their schemes store exactly.

    Prints a note if there are such products, or if `--int4 --block-size 32` would keep products exactly.
    """
    kept = frozenset(
        linear.path
        for linear in layers
        if share_on_grid(tensors[f"{linear.path}.weight"], schemes[linear.path]) >= _KEPT_SHARE
    )
    if kept:
        progress.note(
            f"{len(kept)} of {len(layers)} products lie on a grid that {schemes[min(kept)].name} stores exactly; their"
            " weights keep their values and are not smoothed"
        )
    four_bits = Scheme(bits=4, block_size=GRID_BLOCK_SIZE, zero_points=True)
    missed = [
        linear
        for linear in layers
        if linear.path not in kept
        and linear.inputs % GRID_BLOCK_SIZE == 0
        and share_on_grid(tensors[f"{linear.path}.weight"], four_bits) >= _KEPT_SHARE
    ]
    if missed:
        progress.note(
            f"{len(missed)} of {len(layers)} products lie on a 4-bit grid in blocks of {GRID_BLOCK_SIZE}, as in Q4_0;"
            f" --int4 --block-size {GRID_BLOCK_SIZE} keeps their weights exactly"
        )
    return kept


def _better(
    source: Bundle,
    before: Opened,
    recipe: Recipe,
    smooth: Smoothing,
    calibration: Text,
    progress: Progress,
    scratch: Path,
) -> bool:
    """Tries a recipe with and without smoothing, and returns whether smoothing reduces the KL divergence."""
    part = _part(calibration, _SMOOTHING_ROWS)
    plain = replace(recipe, method="searched" if recipe.method == "gptq" else recipe.method)
    moved = [
        _moved(source, before, each, part, progress, scratch) for each in (plain, replace(plain, smoothing=smooth))
    ]
    progress.note(f"KL divergence with smoothing {moved[1]:.4f} nats, without {moved[0]:.4f}")
    return moved[1] < moved[0]


def _part(text: Text, rows: int) -> Text:
    return Text(text.name, text.rows[:rows, :_ROW_TOKENS])


def _moved(source: Bundle, before: Opened, recipe: Recipe, text: Text, progress: Progress, scratch: Path) -> float:
    """Returns the KL divergence of a recipe on a text, in nats."""
    with tried(source, recipe.contents(source), scratch) as bundle:
        return measure(before(), OnnxDecoder(bundle), text, progress).kl_nats


def _spend_bits(
    source: Bundle,
    before: Opened,
    recipe: Recipe,
    settings: Settings,
    calibration: Text,
    progress: Progress,
    scratch: Path,
) -> None:
    """Rounds to four bits, then gives eight bits to the most sensitive layers, within the budget of the settings."""
    linears = linears_of(source.config)
    layers = [linear for linear in linears if linear.layer is not None]
    tensors = recipe.smoothing.apply(graph_tensors(source.model_path))
    low = recipe.schemes
    # GPTQ fits the rows that it reads, so its KL divergence is measured on other rows.
    kept_back = 0 if settings.target_kl_nats is None else min(_TOGETHER_ROWS, len(calibration.rows) // 2)
    fitted = Text(calibration.name, calibration.rows[kept_back:])
    if recipe.method == "gptq":
        recipe.done = gptq(source, layers, low, recipe.smoothing, tensors, fitted, progress)
    if settings.prefer == "size" and settings.target_bytes is None and settings.target_kl_nats is None:
        return

    def rounded(linear: Linear) -> Array:
        name = f"{linear.path}.weight"
        arrays = recipe.done.get(linear.path) or quantize_nearest(
            tensors[name], low[linear.path], recipe.method == "searched", recipe.importance.get(linear.path)
        )
        return recipe.smoothing.revert(name, restored(arrays, low[linear.path]))

    recipe.harm = sensitivities(Lab(source, layers), layers, _part(calibration, _SENSITIVITY_ROWS), rounded, progress)
    # A product that lies on a 4-bit grid keeps four bits, because eight bits would be less exact.
    eight = schemes_of([linear for linear in layers if linear.path not in recipe.kept], INT8["auto"])
    high = low | on_device(eight, source, recipe.device)
    picked = partial(choose, linears, low, high, recipe.harm)

    def with_schemes(schemes: Schemes) -> Recipe:
        done = {path: arrays for path, arrays in recipe.done.items() if schemes[path] == low[path]}
        return replace(recipe, schemes=schemes, done=done)

    if settings.target_bytes is not None:
        sized = partial(_bytes_of_files, source, recipe, linears, scratch)
        schemes = within_bytes(picked, sized, settings.target_bytes)
    elif settings.target_kl_nats is not None:
        part = _part(calibration, max(1, kept_back))

        def moved(schemes: Schemes) -> float:
            found = _moved(source, before, with_schemes(schemes), part, progress, scratch)
            count = sum(scheme.bits == 8 for scheme in schemes.values())
            progress.note(f"{count} of {len(schemes)} products in 8 bits: KL divergence {found:.4f} nats")
            return found

        schemes = within_kl(linears, low, high, recipe.harm, settings.target_kl_nats, moved)
    else:
        schemes = picked(Budget(kl_nats=_FINE_KL_NATS[settings.prefer]))
    recipe.done = with_schemes(schemes).done
    recipe.schemes = schemes


def _bytes_of_files(source: Bundle, recipe: Recipe, linears: Sequence[Linear], scratch: Path, schemes: Schemes) -> int:
    """Returns the size of graph and weights with these schemes in bytes, padding included."""
    each = replace(recipe, schemes=schemes, done=placeholders(linears, schemes))
    with tried(source, each.contents(source), scratch) as bundle:
        return sum(file.stat().st_size for file in bundle.model_path.parent.iterdir())
