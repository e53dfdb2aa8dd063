"""95 % confidence intervals of scores, and of the difference between two models on the same rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# The 97.5 % quantile of the standard normal distribution.
Z95 = 1.959963984540054
# Bootstrap: number of resamples, and the seed, which is fixed so that the same scores give the same interval.
RESAMPLES = 2_000
SEED = 0
# Random numbers that one draw holds in memory at a time.
_DRAWN = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval.

    Attributes:
        low: The lower end.
        high: The upper end.
    """

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Returns whether a value lies in the interval."""
        return self.low <= value <= self.high


def score_text(score: float, interval: Interval) -> str:
    """Returns a score and its interval in percent, such as "90.0% (80.1 to 95.2)"."""
    return f"{score:.1%} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def difference_text(difference: float, interval: Interval) -> str:
    """Returns a difference of scores and its interval in points, such as "-1.0 (-2.5 to +0.5)"."""
    return f"{100 * difference:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def wilson(hits: int, count: int) -> Interval:
    """Returns the score interval of a share (Wilson 1927), without continuity correction.

    Args:
        hits: The number of successes.
        count: The number of trials, at least 1.
    """
    share, z2 = hits / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Exactly 0 and 1 at the ends, where the formula is so up to rounding.
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == count else middle + half)


def paired_shares(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Returns the interval of the difference of two shares on the same rows, after - before (Bonett and Price 2012).

    Only rows on which the two differ count. One is added to both numbers of such rows, so that the interval has a width even
    if there is none.

    Args:
        before: Success of the first model in each row.
        after: Success of the second model in each row.
    """
    count = len(before) + 2
    lost = (sum(b and not a for b, a in zip(before, after, strict=True)) + 1) / count
    won = (sum(a and not b for b, a in zip(before, after, strict=True)) + 1) / count
    half = Z95 * math.sqrt((won + lost - (won - lost) ** 2) / count)
    return Interval(max(-1.0, won - lost - half), min(1.0, won - lost + half))


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """Returns the percentile bootstrap interval of a mean (Efron 1979). The same values in any order give the same interval.

    Args:
        values: The scores of the rows, at least one.
    """
    return _bootstrap(tuple(sorted(values)))


@lru_cache(32)
def _bootstrap(values: tuple[float, ...]) -> Interval:
    if values[0] == values[-1]:
        return Interval(values[0], values[0])
    scores, random = np.array(values), np.random.default_rng(SEED)
    at_once = max(1, _DRAWN // len(values))
    means = np.concatenate(
        [
            scores[random.integers(0, len(values), (min(at_once, RESAMPLES - start), len(values)))].mean(axis=1)
            for start in range(0, RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(high))


def paired_means(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Returns the bootstrap interval of the mean difference of two models on the same rows, after - before."""
    return bootstrap_mean([new - old for old, new in zip(before, after, strict=True)])
