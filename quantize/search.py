"""Mixed precision: which layers get more bits, decided by what fewer bits of each do to the predictions.

Harm is taken to add up: that of many layers together is about the sum of each alone while it is small.
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

# To stay within a divergence on other text too, this share of it is aimed for; what uses so much of that is small enough.
_SAFELY, _ENOUGH = 0.8, 0.85
# So many assignments are measured at most.
_TRIALS = 5
_TINY = 1e-9


@dataclass(frozen=True)
class Budget:
    """What mixed precision must keep to: bytes of all weights at most, or the harm that is expected; one of them."""

    bytes: int | None = None
    kl_nats: float | None = None


def sensitivities(
    lab: Lab, linears: Sequence[Linear], text: Text, rounded: Callable[[Linear], Array], progress: Progress
) -> dict[str, float]:
    """Returns how far the predictions move, nats, when one product alone has its rounded weight (N, K), by path."""
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
    """Gives more bits to the products that need them most for what they take, until the budget is used.

    Args:
        linears: The products.
        low: The scheme of each with few bits.
        high: The scheme of each with more; the same where there is no choice.
        harm: What the low scheme does to the predictions, nats, of each product that has a choice.
        budget: What to keep to.

    Raises:
        SlmError: When the budget is smaller than what everything takes with few bits.
    """
    schemes = dict(low)
    if budget.bytes is not None and bytes_of(linears, schemes) > budget.bytes:
        raise SlmError(
            f"the weights take {bytes_of(linears, schemes) / 1e6:,.1f} MB at the fewest bits, "
            f"more than the {budget.bytes / 1e6:,.1f} that are left for them",
            "a larger --target-size",
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
        picked: Chooses within a budget; what it counts may be less than the files take.
        sized: Bytes of the files.
        target: The most.

    Raises:
        SlmError: When not even the fewest bits are that few.
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
    """Chooses the fewest bits found that move the predictions by at most a little less than `target` nats.

    What products do together is only about the sum of what each does alone, so the budget is corrected by what is measured.

    Args:
        linears: As for `choose`, like the next three.
        low: The schemes with few bits.
        high: The schemes with more.
        harm: What the low ones do.
        target: The most.
        moved: Measures how far schemes move the predictions.

    Returns:
        The schemes; those with the most bits where nothing measured was good enough.
    """
    aim = target * _SAFELY
    # Of budgets: the largest that was good enough, and the smallest that was not.
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
            bad = expected  # any budget from here on picks these or worse
        budget = expected * aim / max(found, _TINY)
        if not good < budget < bad:
            budget = (good + min(bad, 2 * good + aim)) / 2
    return best
