"""Rounding layer by layer: each layer, and last the head, is fitted to its inputs from the rounded layers before it.

Dimensions: N output channels, K input channels.
"""

from dataclasses import replace
from itertools import groupby

import numpy as np

from slm.export.graph.builder import Array
from slm.quantize.gptq import quantize_gptq, quantize_table
from slm.quantize.instrumented import InstrumentedLayer, InstrumentedNorm, embedded
from slm.quantize.linears import EMBEDDING
from slm.quantize.moments import InputMoments
from slm.quantize.plan import Alternative, Arrays, QuantizationPlan, Schemes
from slm.quantize.quantizer import Quantizer
from slm.quantize.rounding import restored
from slm.quantize.statistics import hidden_moments, second_moments
from slm.quantize.texts import TokenRows

_TINY = 1e-30  # avoids a division by zero for a weight without an error


def with_gptq(
    quantizer: Quantizer, plan: QuantizationPlan, text: TokenRows, coarser: Schemes | None = None
) -> QuantizationPlan:
    """Returns the plan with weights rounded by GPTQ on a text, in the order of execution: the layers' weights, and the head's
    if it has fewer than eight bits.

    Args:
        quantizer: The quantizer.
        plan: The plan.
        text: The text.
        coarser: Other schemes for some of the layers' weights, by path, which are rounded to both.
    """
    rounded: dict[str, Arrays] = {}
    others: dict[str, Alternative] = {}
    smoothing, tensors = plan.smoothing, quantizer.smoothed_weights(plan)
    streams = embedded(quantizer.float32, text.rows)
    layers = [list(group) for _, group in groupby(quantizer.layers, key=lambda linear: linear.layer)]
    quantizer.progress.start("GPTQ", len(layers), "layers")
    for group in layers:
        assert group[0].layer is not None
        layer = InstrumentedLayer(quantizer.float32, group, group[0].layer)
        moments = second_moments(layer, group, text, streams)
        weights: dict[str, Array] = {}
        for linear in group:
            path, name = linear.path, f"{linear.path}.weight"
            seen = moments.pop(path)
            if name in smoothing.columns:  # smoothing divides the inputs by these factors
                factors = smoothing.columns[name]
                seen /= factors[:, None] * factors
            weight, forms = tensors[name], InputMoments.of(seen)
            rounded[path] = quantize_gptq(weight, forms, plan.schemes[path])
            found = restored(rounded[path], plan.schemes[path])
            if coarser and path in coarser:
                scheme = coarser[path]
                arrays = quantize_gptq(weight, forms, scheme)
                error = _output_error(restored(arrays, scheme) - weight, seen)
                others[path] = Alternative(scheme, arrays, error / max(_output_error(found - weight, seen), _TINY))
            weights[path] = smoothing.revert(name, found)
        streams = [layer.after(row, stream, weights) for row, stream in zip(text.rows, streams, strict=True)]
        quantizer.progress.advance()
    quantizer.progress.finish()
    (head,) = (linear for linear in quantizer.linears if linear.role == "head")
    if plan.schemes[head.path].bits < 8:
        quantizer.progress.note(f"GPTQ of {head.outputs:,} rows of {head.path}")
        of_hidden = hidden_moments(InstrumentedNorm(quantizer.float32), head, streams)
        scheme, tied = plan.schemes[head.path], head.path == EMBEDDING
        rounded[head.path] = quantize_table(tensors[f"{head.path}.weight"], of_hidden, scheme, lookup=tied)
    return replace(plan, rounded={**plan.rounded, **rounded}, coarser=others)


def _output_error(off: Array, moments: Array) -> float:
    """Returns the squared error of a product's outputs, for errors (N, K) of its weight and moments (K, K) of its inputs."""
    return float(np.einsum("nk,nk->", off @ moments, off, dtype=np.float64))
