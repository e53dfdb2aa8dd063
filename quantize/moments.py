"""Second moments of a product's inputs, in the forms in which rounding needs them.

Dimensions: K input channels.
"""

from dataclasses import dataclass

import numpy as np

from slm.export.graph.builder import Array

# The term added to the diagonal, relative to its mean. It avoids a division by almost zero for a channel with little variance.
DAMPING = 0.01


@dataclass(frozen=True)
class InputMoments:
    """The sum of x xᵀ over measured inputs x of a product. Only ratios matter, not the number of inputs or their unit.

    Attributes:
        power: The diagonal (K,), float32: the importance of each channel.
        damped: Float32 (K, K), with a mean diagonal of 1 and a term added to the diagonal.
        order: The channels (K,), those with the largest moments first.
        factor: The upper Cholesky factor of the inverse of `damped`, float32 (K, K), with rows and columns in that order.
    """

    power: Array
    damped: Array
    order: Array
    factor: Array

    @classmethod
    def of(cls, moments: Array) -> "InputMoments":
        """Returns the forms of moments, float32 (K, K), which can be singular."""
        damped = moments.astype(np.float64)
        damped /= max(float(np.diagonal(damped).mean()), np.finfo(np.float64).tiny)
        damped[np.diag_indices_from(damped)] += DAMPING
        power = np.diagonal(moments).astype(np.float32)
        order = np.argsort(-power, kind="stable")
        # With rows and columns in reverse order, the result is the inverse of the lower factor.
        reverse = order[::-1]
        lower = np.linalg.cholesky(damped[np.ix_(reverse, reverse)])
        factor = np.linalg.inv(lower)[::-1, ::-1]
        return cls(power, damped.astype(np.float32), order, np.ascontiguousarray(factor, np.float32))
