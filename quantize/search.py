"""Mixed precision: the most sensitive layers get more bits.

The sensitivity of a layer is the KL divergence if only this layer has few bits. As long as divergences are small, the
divergence of several layers is approximately the sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slm.core.errors import SlmError
from slm.core.manifest import Scheme
from slm.core.progress import Progress
from slm.export.graph.builder import Array
from slm.quantize.lab import Lab
from slm.quantize.linears import Linear
from slm.quantize.plan import bytes_of
from slm.quantize.quality import Text, kl_sum

Schemes = dict[str, Scheme]

# The share of the target divergence to aim for, since other text can diverge more; and the share of this aim that is enough.
_SAFELY, _ENOUGH = 0.8, 0.85
# The limit of measured assignments.
_TRIALS = 5
_TINY = 1e-9


@dataclass(frozen=True)
class Budget:
    """The limit for mixed precision: the size of all weights in bytes, or the expected KL divergence in nats."""

    bytes: int | None = None
    kl_nats: float | None = None


def sensitivities(
    lab: Lab, linears: Sequence[Linear], text: Text, rounded: Callable[[Linear], Array], progress: Progress
) -> dict[str, float]:
    """Returns the KL divergence in nats if only one product has its rounded weight (N, K), by path of the product."""
    before = [lab.predictions(row) for row in text.rows]
    progress.start("try each layer alone", len(linears), "products")
    harm: dict[str, float] = {}
    for linear in linears:
        weights = {linear.path: rounded(linear)}
        moved = sum(kl_sum(old, lab.predictions(row, weights)) for row, old in zip(text.rows, before, strict=True))
        harm[linear.path] = max(0.0, moved / text.rows.size)
        progress.advance()
    progress.finish()
    return harm


def choose(
    linears: Sequence[Linear],
    low: Mapping[str, Scheme],
    high: Mapping[str, Scheme],
    harm: Mapping[str, float],
    budget: Budget,
) -> Schemes:
    """Gives more bits to the products with the largest sensitivity per byte, until the budget is used.

    Args:
        linears: The products.
        low: The scheme of each product with few bits.
        high: The scheme of each product with more bits; equal to `low` if there is no choice.
        harm: KL divergence in nats if only this product has the low scheme, for each product with a choice.
        budget: The limit.

    Raises:
        SlmError: If the budget is smaller than the size with the low schemes.
    """
    schemes = dict(low)
    if budget.bytes is not None and bytes_of(linears, schemes) > budget.bytes:
        raise SlmError(
            f"the weights take at least {bytes_of(linears, schemes) / 1e6:,.1f} MB, "
            f"but the target size leaves {budget.bytes / 1e6:,.1f} MB for them",
            "choose a larger --target-size",
        )
    size, left = bytes_of(linears, schemes), sum(harm.values())

    def price(linear: Linear) -> int:
        path = linear.path
        return high[path].bytes(linear.outputs, linear.inputs) - low[path].bytes(linear.outputs, linear.inputs)

    open_to_choice = [linear for linear in linears if linear.path in harm and price(linear) > 0]
    for linear in sorted(open_to_choice, key=lambda linear: (-harm[linear.path] / price(linear), linear.path)):
        if budget.kl_nats is not None and left <= budget.kl_nats:
            break
        if budget.bytes is not None and size + price(linear) > budget.bytes:
            continue
        schemes[linear.path] = high[linear.path]
        size += price(linear)
        left -= harm[linear.path]
    return schemes


def within_bytes(picked: Callable[[Budget], Schemes], sized: Callable[[Schemes], int], target: int) -> Schemes:
    """Chooses schemes whose files take at most `target` bytes.

    Args:
        picked: Chooses schemes within a budget. Its estimate may be smaller than the files.
        sized: Returns the size of the files in bytes.
        target: The limit in bytes.

    Raises:
        SlmError: If the files are larger than the limit even with the fewest bits.
    """
    budget = target
    while True:
        schemes = picked(Budget(bytes=budget))
        size = sized(schemes)
        if size <= target:
            return schemes
        budget -= size - target


def within_kl(
    linears: Sequence[Linear],
    low: Mapping[str, Scheme],
    high: Mapping[str, Scheme],
    harm: Mapping[str, float],
    target: float,
    moved: Callable[[Schemes], float],
) -> Schemes:
    """Searches the schemes with the fewest bits whose measured KL divergence is slightly below the target.

    The divergence of several products is only approximately the sum, so each measurement corrects the budget.

    Args:
        linears: The products.
        low: The scheme of each product with few bits.
        high: The scheme of each product with more bits.
        harm: KL divergence in nats if only this product has the low scheme.
        target: The target KL divergence in nats.
        moved: Measures the KL divergence of schemes.

    Returns:
        The best schemes found, or those with the most bits if no measurement reaches the target.
    """
    aim = target * _SAFELY
    # The largest budget that reached the aim, and the smallest that did not.
    good, bad = 0.0, math.inf
    best = choose(linears, low, high, harm, Budget(kl_nats=0.0))
    budget = aim
    for _ in range(_TRIALS):
        schemes = choose(linears, low, high, harm, Budget(kl_nats=budget))
        found = moved(schemes)
        expected = sum(each for path, each in harm.items() if schemes[path] == low[path])
        if found <= aim:
            best, good = schemes, budget
            if found >= _ENOUGH * aim or schemes == low:
                break
        else:
            bad = expected  # a larger budget chooses these schemes or fewer bits
        budget = expected * aim / max(found, _TINY)
        if not good < budget < bad:
            budget = (good + min(bad, 2 * good + aim)) / 2
    return best
