"""The learning rate as a pure function of the micro-step."""

import math
from typing import Literal

Shape = Literal["cosine", "wsd", "constant"]


def learning_rate(
    micro_step: int,
    *,
    peak: float,
    final: float,
    start: float,
    warmup: int,
    total: int,
    shape: Shape = "cosine",
    decay: float = 1.0,
) -> float:
    """Returns the learning rate of the update that ends with a micro-step: a linear warm-up, then one of three shapes.

    Args:
        micro_step: Micro-steps done.
        peak: Rate at the end of the warm-up.
        final: Rate at `total` and after it; may be above `peak`. Not used by "constant".
        start: Rate at which the warm-up begins, as a share of `peak`.
        warmup: Micro-steps of the warm-up.
        total: Micro-steps of the whole schedule.
        shape: "cosine": half a cosine to `final` (arXiv:1608.03983). "wsd", warm-up-stable-decay: `peak`, then a straight
            line to `final` (arXiv:2404.06395). "constant": `peak`.
        decay: Share of the schedule, at its end, in which "wsd" falls to `final`.
    """
    if micro_step < warmup:
        return peak * (start + (1 - start) * micro_step / warmup)
    if shape == "constant":
        return peak
    if shape == "wsd":
        begin = max(warmup, total - max(1, round(decay * total)))
        return peak + (final - peak) * _share(micro_step, begin, total)
    return final + (peak - final) * (1 + math.cos(math.pi * _share(micro_step, warmup, total))) / 2


def _share(micro_step: int, begin: int, end: int) -> float:
    """Returns the position of a micro-step between `begin` and `end`, from 0 to 1."""
    return min(1.0, max(0, micro_step - begin) / max(1, end - begin))
