"""The learning rate as a pure function of the micro-step."""

import math


def learning_rate(micro_step: int, *, peak: float, final: float, start: float, warmup: int, total: int) -> float:
    """Returns the rate of an update that ends with a micro-step: linear warm-up, then a half cosine (arXiv:1608.03983).

    Args:
        micro_step: Micro-steps done.
        peak: The rate at the end of the warm-up.
        final: The rate at `total` and after it; above `peak` it makes the rate rise.
        start: Where the warm-up begins, as a share of `peak`.
        warmup: Micro-steps of the warm-up.
        total: Micro-steps of the whole schedule.
    """
    if micro_step < warmup:
        return peak * (start + (1 - start) * micro_step / warmup)
    share = min(1.0, (micro_step - warmup) / max(1, total - warmup))
    return final + (peak - final) * (1 + math.cos(math.pi * share)) / 2
