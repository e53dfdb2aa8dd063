"""Rounding of a model's weights: each weight alone, when it is read, or layer by layer with GPTQ.

Dimensions: N output channels, K input channels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Literal

import numpy as np

from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Progress
from slm.export.graph import LazyTensors
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, dequantize, parts_of
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest
from slm.quantize.gptq import quantize_gptq
from slm.quantize.halves import placeholders as halves_placeholders
from slm.quantize.lab import LayerLab, embedded
from slm.quantize.linears import Linear
from slm.quantize.quality import Text
from slm.quantize.smoothing import Smoothing
from slm.quantize.statistics import second_moments

Method = Literal["nearest", "searched", "gptq"]
Arrays = Mapping[str, Array]


def rounded_tensors(
    tensors: Mapping[str, Array],
    schemes: Mapping[str, Scheme],
    search: bool,
    importance: Mapping[str, Array],
    done: Mapping[str, Arrays],
) -> LazyTensors:
    """Returns the tensors of the quantized graph: integers and scales for each weight, and the other tensors unchanged.

    Args:
        tensors: The float graph's tensors.
        schemes: The scheme of each product, by path.
        search: Whether to search for the best scales of 4-bit weights.
        importance: For the search, the mean square of each input channel (K,), by path; empty if not measured.
        done: Arrays of the weights that are already rounded, by path.
    """

    @lru_cache(maxsize=1)  # the integers and scales of a weight are read one after the other
    def rounded(path: str) -> Arrays:
        if path in done:
            return done[path]
        scheme = schemes[path]
        return quantize_nearest(tensors[f"{path}.weight"], scheme, search and scheme.bits == 4, importance.get(path))

    makers: dict[str, Callable[[], Array]] = {}
    for name in tensors:
        path = name.removesuffix(".weight")
        if path not in schemes:
            makers[name] = partial(tensors.__getitem__, name)
            continue
        for part in parts_of(schemes[path]):
            makers[f"{path}.{part}"] = partial(_part, rounded, path, part)
    return LazyTensors(makers)


def gptq(
    source: Bundle,
    linears: Sequence[Linear],
    schemes: Mapping[str, Scheme],
    smoothing: Smoothing,
    tensors: Mapping[str, Array],
    text: Text,
    progress: Progress,
) -> dict[str, Arrays]:
    """Rounds the layers' weights in order. Each layer is fitted to its inputs from the rounded layers before it.

    Args:
        source: The float bundle, without smoothing.
        linears: The layers' products, in order.
        schemes: The scheme of each product, by path.
        smoothing: The smoothing factors of the tensors.
        tensors: The float graph's tensors, after smoothing.
        text: The calibration text.
        progress: Advances with each layer.

    Returns:
        The arrays of each weight, by path.
    """
    done: dict[str, Arrays] = {}
    streams = embedded(source, text.rows)
    layers = [list(group) for _, group in groupby(linears, key=lambda linear: linear.layer)]
    progress.start("GPTQ", len(layers), "layers")
    for group in layers:
        assert group[0].layer is not None
        lab = LayerLab(source, group, group[0].layer)
        moments = second_moments(lab, group, text, streams)
        weights: dict[str, Array] = {}
        for linear in group:
            path, name = linear.path, f"{linear.path}.weight"
            seen = moments.pop(path)
            if name in smoothing.columns:  # smoothing divides the inputs by these factors
                factors = smoothing.columns[name]
                seen /= factors[:, None] * factors
            done[path] = quantize_gptq(tensors[name], seen, schemes[path])
            weights[path] = smoothing.revert(name, restored(done[path], schemes[path]))
        streams = [lab.after(row, stream, weights) for row, stream in zip(text.rows, streams, strict=True)]
        progress.advance()
    progress.finish()
    return done


def placeholders(linears: Sequence[Linear], schemes: Mapping[str, Scheme]) -> dict[str, Arrays]:
    """Returns arrays of zeros in the shapes of each weight's arrays, by path, for measuring the size of a file."""
    found: dict[str, Arrays] = {}
    for linear in linears:
        scheme, blocks = schemes[linear.path], linear.inputs // schemes[linear.path].block_size
        if scheme.halves:
            found[linear.path] = halves_placeholders(linear, scheme)
            continue
        shape = (linear.outputs, blocks, scheme.block_size * scheme.bits // 8)
        arrays: dict[str, Array] = {
            QUANTIZED: np.zeros(shape, np.uint8),
            SCALE: np.zeros((linear.outputs, blocks), np.float32),
        }
        if scheme.zero_points:
            arrays[ZERO_POINTS] = np.zeros((linear.outputs, -(-blocks * scheme.bits // 8)), np.uint8)
        found[linear.path] = arrays
    return found


def restored(arrays: Arrays, scheme: Scheme) -> Array:
    """Returns the dequantized weight of a product, float32 (N, K)."""
    return dequantize(arrays[QUANTIZED], arrays[SCALE], arrays.get(ZERO_POINTS), scheme)


def _part(rounded: Callable[[str], Arrays], path: str, part: str) -> Array:
    return rounded(path)[part]
