"""Rounding of a model's weights by a plan.

Dimensions: N output channels, K input channels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np

from slm.core.manifest import Scheme
from slm.export.graph import LazyTensors
from slm.export.graph.blocks import LOWER, QUANTIZED, SCALE, SHIFT, UPPER, ZERO_POINTS, dequantized, parts_of
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest
from slm.quantize.frequent import frequent_rows
from slm.quantize.linears import Linear
from slm.quantize.plan import Arrays, QuantizationPlan, Schemes


def rounded_weight(
    path: str, tensors: Mapping[str, Array], plan: QuantizationPlan, importance: Mapping[str, Array]
) -> Arrays:
    """Returns the arrays of one weight: those in the plan, or the nearest integers.

    Args:
        path: The path of the weight.
        tensors: The float graph's tensors, with the plan's smoothing.
        plan: The plan.
        importance: For searched scales, the mean square of each input channel (K,), by path; empty if not measured.
    """
    scheme = plan.schemes[path]
    if path in plan.rounded:
        arrays = plan.rounded[path]
    else:
        search = plan.method != "nearest" and scheme.bits < 8
        arrays = quantize_nearest(tensors[f"{path}.weight"], scheme, search, importance.get(path))
    if not scheme.frequent:
        return arrays
    assert plan.frequent is not None
    return {**arrays, **frequent_rows(tensors[f"{path}.weight"], plan.frequent.ids, scheme)}


def rounded_tensors(
    tensors: Mapping[str, Array], plan: QuantizationPlan, importance: Mapping[str, Array]
) -> LazyTensors:
    """Returns the tensors of the quantized graph: integers and scales for each weight, and the other tensors unchanged.

    Args:
        tensors: The float graph's tensors, with the plan's smoothing.
        plan: The plan.
        importance: For searched scales, the mean square of each input channel (K,), by path; empty if not measured.
    """

    @lru_cache(maxsize=1)  # the integers and scales of a weight are read one after the other
    def rounded(path: str) -> Arrays:
        return rounded_weight(path, tensors, plan, importance)

    makers: dict[str, Callable[[], Array]] = {}
    for name in tensors:
        path = name.removesuffix(".weight")
        if path not in plan.schemes:
            makers[name] = partial(tensors.__getitem__, name)
            continue
        for part in parts_of(plan.schemes[path]):
            makers[f"{path}.{part}"] = partial(_part, rounded, path, part)
    return LazyTensors(makers)


def placeholders(linears: Sequence[Linear], schemes: Schemes) -> dict[str, Arrays]:
    """Returns arrays of zeros in the shapes of each weight's arrays, by path, for measuring the size of a file.

    The rows of frequent tokens are not among them: `rounded_weight` adds them.
    """
    found: dict[str, Arrays] = {}
    for linear in linears:
        scheme, blocks = schemes[linear.path], linear.inputs // schemes[linear.path].block_size
        if scheme.halves:
            found[linear.path] = _halves_placeholders(linear, scheme)
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


def _halves_placeholders(linear: Linear, scheme: Scheme) -> Arrays:
    blocks = linear.inputs // scheme.block_size
    packed = (linear.outputs, blocks, scheme.block_size // 2)
    return {
        UPPER: np.zeros(packed, np.uint8),
        LOWER: np.zeros(packed, np.uint8),
        SCALE: np.zeros((linear.outputs, blocks), np.float32),
        SHIFT: np.zeros(linear.outputs, np.float32),
    }


def restored(arrays: Arrays, scheme: Scheme) -> Array:
    """Returns the dequantized weight of a product, float32 (N, K)."""
    return dequantized(arrays, scheme)


def _part(rounded: Callable[[str], Arrays], path: str, part: str) -> Array:
    return rounded(path)[part]
