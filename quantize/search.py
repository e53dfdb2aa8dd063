"""Mixed precision: the most sensitive weights get more bits.

The sensitivity of a weight is the KL divergence if only this weight has few bits. As long as divergences are small, the
divergence of several weights is approximately the sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from slm.core.errors import SlmError
from slm.core.manifest import Scheme
from slm.quantize.instrumented import InstrumentedModel
from slm.quantize.linears import Linear
from slm.quantize.plan import QuantizationPlan, Schemes, bytes_of
from slm.quantize.quality import kl_sum
from slm.quantize.quantizer import Quantizer
from slm.quantize.rounding import restored, rounded_weight
from slm.quantize.texts import TokenRows

# The share of the target divergence to aim for, since other text can diverge more; and the share of this aim that is enough.
_SAFELY, _ENOUGH = 0.8, 0.85
# The limit of measured assignments.
_TRIALS = 5
_TINY = 1e-9


def sensitivities(
    quantizer: Quantizer, plan: QuantizationPlan, linears: Sequence[Linear], text: TokenRows
) -> dict[str, float]:
    """Returns the KL divergence in nats if only one of these weights is rounded by the plan, by path of the weight."""
    model, progress = InstrumentedModel(quantizer.float32, linears), quantizer.progress
    tensors, importance = quantizer.smoothed_weights(plan), quantizer.importance(plan)
    before = [model.predictions(row) for row in text.rows]
    progress.start("try each layer alone", len(linears), "products")
    found: dict[str, float] = {}
    for path in (linear.path for linear in linears):
        weight = restored(rounded_weight(path, tensors, plan, importance), plan.schemes[path])
        weights = {path: plan.smoothing.revert(f"{path}.weight", weight)}
        moved = sum(kl_sum(old, model.predictions(row, weights)) for row, old in zip(text.rows, before, strict=True))
        found[path] = max(0.0, moved / text.rows.size)
        progress.advance()
    progress.finish()
    return found


@dataclass(frozen=True)
class Budget:
    """The limit for mixed precision: the size of all weights in bytes, or the expected KL divergence in nats."""

    bytes: int | None = None
    kl_nats: float | None = None


@dataclass(frozen=True)
class _Assignment:
    """A scheme for each weight, their size in bytes, and the sensitivities left, in nats."""

    schemes: dict[str, Scheme]
    size: int
    left: float


@dataclass(frozen=True)
class Candidates:
    """The schemes that a search chooses from.

    Attributes:
        linears: All weights.
        low: The scheme of each weight with few bits.
        high: The scheme of each weight with more bits; equal to `low` if there is no choice.
        sensitivity: KL divergence in nats if only this weight has the low scheme, for each weight with a choice.
    """

    linears: Sequence[Linear]
    low: Schemes
    high: Schemes
    sensitivity: Mapping[str, float]

    def choose(self, budget: Budget) -> dict[str, Scheme]:
        """Gives more bits to the weights with the largest sensitivity per byte, until the budget is used.

        A table can be larger than all layers together, so that its place in this order says little. Both schemes of each
        table are tried, and the assignment is kept that has the least sensitivity left, or, with a limit of the divergence,
        the smallest size.

        Raises:
            SlmError: If the budget is smaller than the size with the low schemes.
        """
        size = bytes_of(self.linears, self.low)
        if budget.bytes is not None and size > budget.bytes:
            raise SlmError(
                f"the weights take at least {size / 1e6:,.1f} MB, "
                f"but the target size leaves {budget.bytes / 1e6:,.1f} MB for them",
                "choose a larger --target-size",
            )
        tables = [linear.path for linear in self.linears if linear.role != "layer" and self._cost(linear) > 0]
        assigned = [
            self._assigned(budget, tables, chosen)
            for count in range(len(tables) + 1)
            for chosen in combinations(tables, count)
        ]
        if budget.kl_nats is None:
            fitting = [each for each in assigned if budget.bytes is None or each.size <= budget.bytes]
            return min(fitting, key=lambda each: each.left).schemes
        reached = [each for each in assigned if each.left <= budget.kl_nats + _TINY]
        return min(reached or assigned, key=lambda each: each.size if reached else each.left).schemes

    def _assigned(self, budget: Budget, tables: Sequence[str], chosen: Sequence[str]) -> "_Assignment":
        """Returns the assignment with the high scheme for the chosen tables, and for layers within the budget."""
        cost = {linear.path: self._cost(linear) for linear in self.linears}
        schemes = {**self.low, **{path: self.high[path] for path in chosen}}
        size = bytes_of(self.linears, schemes)
        left = sum(each for path, each in self.sensitivity.items() if path not in chosen)
        choosable = [path for path in cost if cost[path] > 0 and path not in tables]
        for path in sorted(choosable, key=lambda path: (-self.sensitivity[path] / cost[path], path)):
            if budget.kl_nats is not None and left <= budget.kl_nats:
                break
            if budget.bytes is not None and size + cost[path] > budget.bytes:
                continue
            schemes[path] = self.high[path]
            size += cost[path]
            left -= self.sensitivity[path]
        return _Assignment(schemes, size, left)

    def _cost(self, linear: Linear) -> int:
        """Returns the bytes that the high scheme takes beyond the low one; 0 for a weight without a choice."""
        if linear.path not in self.sensitivity:
            return 0
        return bytes_of([linear], self.high) - bytes_of([linear], self.low)

    def within_bytes(self, target: int, measured: Callable[[Schemes], int]) -> dict[str, Scheme]:
        """Chooses schemes whose files take at most `target` bytes.

        Args:
            target: The limit in bytes.
            measured: Returns the size of the files in bytes, which can be larger than that of the weights.

        Raises:
            SlmError: If the files are larger than the limit even with the fewest bits.
        """
        budget = target
        while True:
            schemes = self.choose(Budget(bytes=budget))
            size = measured(schemes)
            if size <= target:
                return schemes
            budget -= size - target

    def within_kl(self, target: float, measured: Callable[[Schemes], float]) -> dict[str, Scheme]:
        """Searches the schemes with the fewest bits whose measured KL divergence is slightly below the target.

        The divergence of several weights is only approximately the sum, so each measurement corrects the budget.

        Args:
            target: The target KL divergence in nats.
            measured: Returns the KL divergence of schemes in nats.

        Returns:
            The best schemes found, or those with the most bits if no measurement reaches the target.
        """
        aim = target * _SAFELY
        # The largest budget that reached the aim, and the smallest that did not.
        good, bad = 0.0, math.inf
        best = self.choose(Budget(kl_nats=0.0))
        budget = aim
        for _ in range(_TRIALS):
            schemes = self.choose(Budget(kl_nats=budget))
            found = measured(schemes)
            expected = sum(each for path, each in self.sensitivity.items() if schemes[path] == self.low[path])
            if found <= aim:
                best, good = schemes, budget
                if found >= _ENOUGH * aim or schemes == self.low:
                    break
            else:
                bad = expected  # a larger budget chooses these schemes or fewer bits
            budget = expected * aim / max(found, _TINY)
            if not good < budget < bad:
                budget = (good + min(bad, 2 * good + aim)) / 2
        return best
