"""Statistics of the inputs of a model's products, measured on a text.

Dimensions: T positions, K input channels.
"""

from collections.abc import Sequence

import numpy as np

from slm.core.progress import Progress
from slm.export.graph.builder import Array
from slm.quantize.instrumented import InstrumentedLayer, InstrumentedModel, InstrumentedNorm, ResidualStream
from slm.quantize.linears import Linear
from slm.quantize.texts import TokenRows


def root_mean_squares(
    model: InstrumentedModel, linears: Sequence[Linear], text: TokenRows, progress: Progress
) -> dict[str, Array]:
    """Returns the root mean square of each input channel (K,) of each product, float32, by path."""
    paths = [linear.path for linear in linears]
    sums = {linear.path: np.zeros(linear.inputs) for linear in linears}
    progress.start("measure activations", len(text.rows), "rows")
    for row in text.rows:
        for path, x in model.products_inputs(row, paths).items():
            sums[path] += np.einsum("tk,tk->k", x, x, dtype=np.float64)
        progress.advance()
    progress.finish()
    return {path: np.sqrt(total / text.rows.size).astype(np.float32) for path, total in sums.items()}


def second_moments(
    layer: InstrumentedLayer, linears: Sequence[Linear], text: TokenRows, streams: Sequence[ResidualStream]
) -> dict[str, Array]:
    """Returns the sum of x xᵀ, float32 (K, K), over the inputs x of each product of a layer, by path.

    Args:
        layer: Runs the layer.
        linears: The layer's products.
        text: The calibration text.
        streams: The inputs of the layer for each row of the text.
    """
    moments = {linear.path: np.zeros((linear.inputs, linear.inputs), np.float32) for linear in linears}
    for row, stream in zip(text.rows, streams, strict=True):
        for path, x in layer.inputs(row, stream).items():
            moments[path] += x.T @ x
    return moments


def hidden_moments(norm: InstrumentedNorm, head: Linear, streams: Sequence[ResidualStream]) -> Array:
    """Returns the sum of x xᵀ, float32 (K, K), over the hidden states x that the head multiplies.

    Args:
        norm: Runs the last norm.
        head: The head.
        streams: The outputs of the last layer for each row of the text.
    """
    moments = np.zeros((head.inputs, head.inputs), np.float32)
    for stream in streams:
        x = norm(stream)
        moments += x.T @ x
    return moments
