"""From what was asked for to what is done: settings are few, and what they leave open is measured.

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

# How many rows of it, cut off at so many tokens, it takes to tell what smoothing does, each layer, and several together.
_SMOOTHING_ROWS, _SENSITIVITY_ROWS, _TOGETHER_ROWS, _ROW_TOKENS = 1, 2, 4, 256
# A product counts as one that lies on a grid if so many of its output channels do.
_KEPT_SHARE = 0.5
# What INT4 is to move the predictions by at most, nats, as the layers' harms add up; measured afterwards it is more
# (docs/quantization.md).
_FINE_KL_NATS: Mapping[Prefer, float] = {"auto": 0.02, "speed": 0.02, "quality": 0.012}


@dataclass(frozen=True)
class Gate:
    """What is let through; None asks for nothing.

    Attributes:
        max_kl_nats: The largest mean divergence from the source's predictions.
        max_perplexity_increase: The largest share by which perplexity may grow.
    """

    max_kl_nats: float | None
    max_perplexity_increase: float | None = None

    def refuses(self, change: Change) -> str | None:
        """Returns why not, or None; what is not a number is refused."""
        if self.max_kl_nats is not None and not change.kl_nats <= self.max_kl_nats:
            return f"the predictions moved by {change.kl_nats:.4f} nats, allowed {self.max_kl_nats:g}"
        grown = change.perplexity_after / change.perplexity_before - 1
        if self.max_perplexity_increase is not None and not grown <= self.max_perplexity_increase:
            return f"perplexity grew by {grown:.1%}, allowed {self.max_perplexity_increase:.1%}"
        return None


GATES = {precision: Gate(nats) for precision, nats in MAX_KL_NATS.items()}


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Attributes:
        precision: "int8" or "int4", where layers that need more may get eight bits.
        prefer: What to weigh most.
        dynamic: Products of 8-bit integers, activations rounded a token at a time, in place of blocks.
        reduce_range: With `dynamic`, weights in seven bits, for processors without VNNI.
        block_size: Input channels of a layer's weight that share one scale; None takes what `prefer` says.
        method: How integers are chosen; None takes GPTQ for four bits and the nearest for eight.
        smooth: Whether activations are smoothed first; None does where it measures better.
        cache: How keys and values are cached; None takes what `prefer` says.
        target_bytes: For INT4, the largest graph and weights together.
        target_kl_nats: For INT4, how far the predictions may move: as many layers get eight bits as that takes.
        gate: What to let through.
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
        """Returns what was asked for, without what was left open."""
        asked: dict[str, object] = {"precision": self.precision, "prefer": self.prefer, "dynamic": self.dynamic or None}
        asked |= {"block_size": self.block_size}
        asked |= {"target_bytes": self.target_bytes, "target_kl_nats": self.target_kl_nats}
        return {name: value for name, value in asked.items() if value is not None}

    def finer(self) -> str | None:
        """Returns options that round less, None where there are none."""
        if self.precision == "int4":
            if self.target_bytes:
                return "a larger --target-size"
            return "--int4 --prefer quality" if self.prefer == "size" else "--int8"
        if self.dynamic:
            return "--int8 without --int8-dynamic"
        return None if self.prefer == "quality" else "--prefer quality"


@dataclass
class Recipe:
    """What was decided: everything that the graph is built from.

    Attributes:
        schemes: Of each product, by path.
        method: How integers are chosen.
        smoothing: Factors.
        cache: How keys and values are cached.
        cache_steps: Their steps, by name of the parameter.
        rms: Root mean square of each input channel (K,) of each product, by path, where it was measured; before smoothing.
        done: Arrays of weights that are rounded already, by path.
        harm: What few bits of each product did, nats, by path, where that was tried.
        kept: Paths of the products whose weights lie on grids that their schemes store.
        device: Where the bundle is to run.
    """

    schemes: dict[str, Scheme]
    method: Method
    smoothing: Smoothing = NO_SMOOTHING
    cache: CacheType = "float32"
    cache_steps: Mapping[str, Array] = field(default_factory=dict)
    rms: Mapping[str, Array] = field(default_factory=dict)
    done: Mapping[str, Arrays] = field(default_factory=dict)
    harm: Mapping[str, float] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    device: Device = "cpu"

    @property
    def inputs_rms(self) -> dict[str, Array]:
        """Root mean square of each input channel as it is after smoothing, by path."""
        return {path: self.smoothing.activations(f"{path}.weight", values) for path, values in self.rms.items()}

    @property
    def importance(self) -> dict[str, Array]:
        """What the error of each input channel weighs: the mean square of its activations, by path."""
        return {path: np.square(values) for path, values in self.inputs_rms.items()}

    def contents(self, source: Bundle) -> Contents:
        """Returns what a bundle made of a float32 one is to hold."""
        plain = self.smoothing.apply(graph_tensors(source.model_path))
        rounded = rounded_tensors(plain, self.schemes, self.method != "nearest", self.importance, self.done)
        tensors = ChainMap(dict(self.cache_steps), rounded)  # type: ignore[arg-type]  # only read
        return Contents(tensors, self.describe(), self.cache, self.smoothing, self.device)

    def words(self) -> dict[str, object]:
        """Returns what was decided."""
        count: dict[str, int] = {}
        for scheme in self.schemes.values():
            count[scheme.name] = count.get(scheme.name, 0) + 1
        smooth = self.smoothing.exponent if self.smoothing.columns else None
        return {"method": self.method, "smoothing": smooth, "cache": self.cache, "products": count}

    def describe(self) -> Quantization:
        """Returns the manifest's record."""
        exponent = self.smoothing.exponent if self.smoothing.columns else None
        level = ACCURACY_LEVEL if self.device == "cpu" else 0  # CUDA's products take activations as they are
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
        source: The bundle in float32 (`slm.quantize.plain`).
        before: Runs the bundle that predictions are compared with; closed while memory is wanted for something else.
        calibration: What is read.
        settings: What was asked for.
        progress: Told of each step.
        scratch: A directory for what is only tried.
        device: Where the new bundle is to run.
    """
    linears = linears_of(source.config)
    wish = INT4 if settings.precision == "int4" else INT8_DYNAMIC if settings.dynamic else INT8[settings.prefer]
    method = settings.method or ("gptq" if settings.precision == "int4" else "nearest")
    cache = settings.cache or ("int8" if settings.prefer == "speed" else "float32")
    if settings.reduce_range:
        wish = replace(wish, layers=wish.layers.model_copy(update={"reduced": True}))
    schemes = on_device(schemes_of(linears, wish, settings.block_size), source, device)
    recipe = Recipe(schemes, method, cache=cache, device=device)
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
    """Returns schemes as products of a device take them: in float16 on CUDA, but where float16 would overflow."""
    if device == "cpu":
        return schemes
    return with_half_scales(schemes, source.manifest.ranges.float32 if source.manifest.ranges else ())


def kept_products(
    tensors: Mapping[str, Array], layers: Sequence[Linear], schemes: Schemes, progress: Progress
) -> frozenset[str]:
    """Returns the paths of the products whose weights lie on grids that their schemes store; notes say what that means."""
    kept = frozenset(
        linear.path
        for linear in layers
        if share_on_grid(tensors[f"{linear.path}.weight"], schemes[linear.path]) >= _KEPT_SHARE
    )
    if kept:
        progress.note(
            f"{len(kept)} of {len(layers)} products lie on a grid that {schemes[min(kept)].name} stores: their weights are"
            " kept exactly and not smoothed"
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
            f"{len(missed)} of {len(layers)} products lie on a 4-bit grid in blocks of {GRID_BLOCK_SIZE}, as Q4_0 has:"
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
    """Tries a recipe with and without smoothing; says whether the predictions move less with it."""
    part = _part(calibration, _SMOOTHING_ROWS)
    plain = replace(recipe, method="searched" if recipe.method == "gptq" else recipe.method)
    moved = [
        _moved(source, before, each, part, progress, scratch) for each in (plain, replace(plain, smoothing=smooth))
    ]
    progress.note(f"smoothing moves the predictions by {moved[1]:.4f} nats instead of {moved[0]:.4f}")
    return moved[1] < moved[0]


def _part(text: Text, rows: int) -> Text:
    return Text(text.name, text.rows[:rows, :_ROW_TOKENS])


def _moved(source: Bundle, before: Opened, recipe: Recipe, text: Text, progress: Progress, scratch: Path) -> float:
    """Returns how far a recipe moves the predictions, nats."""
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
    """Rounds to four bits, and gives eight to the layers that need them, within what the settings allow."""
    linears = linears_of(source.config)
    layers = [linear for linear in linears if linear.layer is not None]
    tensors = recipe.smoothing.apply(graph_tensors(source.model_path))
    low = recipe.schemes
    # GPTQ fits what it reads, so what it comes to is judged on rows that it has not read.
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
    # A product that four bits store exactly would lose by more.
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
            progress.note(f"{count} of {len(schemes)} products in 8 bits: the predictions move by {found:.4f} nats")
            return found

        schemes = within_kl(linears, low, high, recipe.harm, settings.target_kl_nats, moved)
    else:
        schemes = picked(Budget(kl_nats=_FINE_KL_NATS[settings.prefer]))
    recipe.done = with_schemes(schemes).done
    recipe.schemes = schemes


def _bytes_of_files(source: Bundle, recipe: Recipe, linears: Sequence[Linear], scratch: Path, schemes: Schemes) -> int:
    """Returns what graph and weights take with these schemes, tables and paddings included."""
    each = replace(recipe, schemes=schemes, done=placeholders(linears, schemes))
    with tried(source, each.contents(source), scratch) as bundle:
        return sum(file.stat().st_size for file in bundle.model_path.parent.iterdir())
