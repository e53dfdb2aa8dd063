"""Mixed precision: the most sensitive weights get more bits.

The sensitivity of a weight is the KL divergence if only this weight has few bits. As long as divergences are small, the
divergence of several weights is approximately the sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

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
    paths = [linear.path for linear in linears]
    progress.start("try each layer alone", len(linears) * len(text.rows), "products")
    rounded = {path: rounded_weight(path, tensors, plan, importance) for path in paths}
    moved = dict.fromkeys(paths, 0.0)
    for row in text.rows:  # the logits of one row take 268 MB with Gemma's vocabulary
        before = model.predictions(row)
        for path in paths:
            weight = restored(rounded[path], plan.schemes[path])
            weights = {path: plan.smoothing.revert(f"{path}.weight", weight)}
            moved[path] += kl_sum(before, model.predictions(row, weights))
            progress.advance()
    progress.finish()
    return {path: max(0.0, nats / text.rows.size) for path, nats in moved.items()}


@dataclass(frozen=True)
class Budget:
    """The limit for mixed precision: the size of all weights in bytes, or the expected KL divergence in nats."""

    bytes: int | None = None
    kl_nats: float | None = None


@dataclass(frozen=True)
class Choice:
    """A scheme that a weight can get, and the KL divergence in nats if only this weight is rounded, to this scheme."""

    scheme: Scheme
    harm: float


@dataclass(frozen=True)
class _Assignment:
    """A choice for each weight that has several, the size of all weights in bytes, and the sum of the choices' harms."""

    chosen: dict[str, Choice]
    size: int
    left: float


@dataclass(frozen=True)
class Candidates:
    """The schemes that a search chooses from.

    Attributes:
        linears: All weights.
        schemes: The scheme of each weight without a choice.
        choices: The choices of each other weight.
    """

    linears: Sequence[Linear]
    schemes: Schemes
    choices: Mapping[str, Sequence[Choice]]

    def choose(self, budget: Budget) -> dict[str, Scheme]:
        """Gives more bytes to the weights with the largest gain per byte, until the budget is used.

        A table can be larger than all layers together, so that its place in this order says little. Every choice for each
        table is tried, and the assignment is kept that has the least harm left, or, with a limit of the divergence, the
        smallest size.

        Raises:
            SlmError: If the budget is smaller than the size with the fewest bytes for each weight.
        """
        least = bytes_of(self.linears, self.fewest_bytes)
        if budget.bytes is not None and least > budget.bytes:
            raise SlmError(
                f"the weights take at least {least / 1e6:,.1f} MB, "
                f"but the target size leaves {budget.bytes / 1e6:,.1f} MB for them",
                "choose a larger --target-size",
            )
        tables = [linear.path for linear in self.linears if linear.role != "layer" and linear.path in self.choices]
        assigned = [
            self._assigned(budget, dict(zip(tables, chosen, strict=True)))
            for chosen in product(*(self.choices[path] for path in tables))
        ]
        if budget.kl_nats is None:
            fitting = [each for each in assigned if budget.bytes is None or each.size <= budget.bytes]
            best = min(fitting, key=lambda each: each.left)
        else:
            reached = [each for each in assigned if each.left <= budget.kl_nats + _TINY]
            best = min(reached or assigned, key=lambda each: each.size if reached else each.left)
        return {**self.schemes, **{path: choice.scheme for path, choice in best.chosen.items()}}

    def expected(self, schemes: Schemes) -> float:
        """Returns the sum of the harms of schemes, in nats."""
        return sum(
            choice.harm
            for path, choices in self.choices.items()
            for choice in choices
            if choice.scheme == schemes[path]
        )

    @property
    def fewest_bytes(self) -> dict[str, Scheme]:
        """The schemes with the fewest bytes for each weight."""
        smallest = {path: self._by_size(path)[0].scheme for path in self.choices}
        return {**self.schemes, **smallest}

    def _by_size(self, path: str) -> list[Choice]:
        return sorted(self.choices[path], key=lambda choice: self._size(path, choice))

    def _size(self, path: str, choice: Choice) -> int:
        (linear,) = (each for each in self.linears if each.path == path)
        return choice.scheme.bytes(linear.outputs, linear.inputs)

    def _assigned(self, budget: Budget, tables: Mapping[str, Choice]) -> _Assignment:
        """Returns the assignment with these choices for tables, and with choices for layers within the budget."""
        layers = {path: self._by_size(path) for path in self.choices if path not in tables}
        sizes = {path: [self._size(path, choice) for choice in choices] for path, choices in layers.items()}
        chosen = dict.fromkeys(layers, 0)
        start = {**tables, **{path: choices[0] for path, choices in layers.items()}}
        size = bytes_of(self.linears, {**self.schemes, **{path: choice.scheme for path, choice in start.items()}})
        left = sum(choice.harm for choice in start.values())
        while budget.kl_nats is None or left > budget.kl_nats:
            # Every larger choice of every layer: its gain in nats, its cost in bytes, the path and the index of the choice.
            larger = [
                (choices[now].harm - choices[then].harm, sizes[path][then] - sizes[path][now], path, then)
                for path, choices in layers.items()
                for now in (chosen[path],)
                for then in range(now + 1, len(choices))
            ]
            room = None if budget.bytes is None else budget.bytes - size
            able = [each for each in larger if each[0] >= 0 and each[1] > 0 and (room is None or each[1] <= room)]
            if not able:
                break
            gain, cost, path, then = min(able, key=lambda each: (-each[0] / each[1], each[2], each[3]))
            chosen[path] = then
            size += cost
            left -= gain
        found = {path: choices[chosen[path]] for path, choices in layers.items()}
        return _Assignment({**tables, **found}, size, left)

    def within_bytes(self, target: int, measured: Callable[[Schemes], int]) -> dict[str, Scheme]:
        """Chooses schemes whose files take at most `target` bytes.

        Args:
            target: The limit in bytes.
            measured: Returns the size of the files in bytes, which can be larger than that of the weights.

        Raises:
            SlmError: If the files are larger than the limit even with the fewest bits.
        """
        smallest = self.fewest_bytes
        budget, least = target, bytes_of(self.linears, smallest)
        while True:
            # The rest of the files can be smaller with the fewest bytes than with the schemes that were tried.
            if budget < least <= target and measured(smallest) <= target:
                return smallest
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
            expected = self.expected(schemes)
            if found <= aim:
                best, good = schemes, budget
                if found >= _ENOUGH * aim or schemes == self.fewest_bytes:
                    break
            else:
                bad = expected  # a larger budget chooses these schemes or fewer bits
            budget = expected * aim / max(found, _TINY)
            if not good < budget < bad:
                budget = (good + min(bad, 2 * good + aim)) / 2
        return best
