"""The learning rate, and other values that change during a run, as pure functions of the micro-step."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up of the learning rate, then one of three shapes.

    Attributes:
        peak: Rate at the end of the warm-up.
        final: Rate at `total` and after it; may be above `peak`. Not used by "constant".
        total: Micro-steps of the whole schedule.
        warmup: Micro-steps of the warm-up.
        start: Rate at which the warm-up begins, as a share of `peak`.
        shape: "cosine": half a cosine to `final` (arXiv:1608.03983). "wsd", warm-up-stable-decay: `peak`, then a straight
            line to `final` (arXiv:2404.06395). "constant": `peak`.
        decay: Share of the schedule, at its end, in which "wsd" falls to `final`.
    """

    peak: float
    final: float
    total: int
    warmup: int = 0
    start: float = 0.0
    shape: Shape = "cosine"
    decay: float = 1.0

    def rate(self, micro_step: int) -> float:
        """Returns the learning rate of the update that ends with a micro-step, by the number of micro-steps done."""
        peak, final = self.peak, self.final
        if micro_step < self.warmup:
            return peak * (self.start + (1 - self.start) * micro_step / self.warmup)
        if self.shape == "constant":
            return peak
        if self.shape == "wsd":
            begin = max(self.warmup, self.total - max(1, round(self.decay * self.total)))
            return peak + (final - peak) * _share(micro_step, begin, self.total)
        return final + (peak - final) * (1 + math.cos(math.pi * _share(micro_step, self.warmup, self.total))) / 2


def ramp(first: float, last: float, begin: int, end: int, micro_step: int) -> float:
    """Returns the value on a straight line from `first` at micro-step `begin` to `last` at `end`, and constant outside."""
    return first + (last - first) * _share(micro_step, begin, end)


def _share(micro_step: int, begin: int, end: int) -> float:
    """Returns the position of a micro-step between `begin` and `end`, from 0 to 1."""
    return min(1.0, max(0, micro_step - begin) / max(1, end - begin))
