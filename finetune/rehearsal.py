"""The time and memory of a fine-tuning run, measured on some of its own batches with weights that are thrown away.

Nothing is estimated by formula where it can be measured: the base is loaded, the adapter attached, and updates are made, the
one with the most tokens among them. The process then has used as much memory as the run will.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slm.core.machine import memory
from slm.core.processes import peak_rss_mib
from slm.finetune.batches import casting
from slm.finetune.build import Built
from slm.finetune.fit import Fit
from slm.finetune.material import Material
from slm.finetune.preparation import Prepared
from slm.train.run import memory_of

# Updates that are timed, after one that is not; fewer if they take longer than the limit in seconds.
_UPDATES, _LIMIT_S = 8, 10.0
_MIB = 1 << 20
# Memory of matplotlib, which draws the curves at the end of a run.
_DRAWING = 20 * _MIB


@dataclass(frozen=True)
class Rehearsal:
    """Measurements of a few updates, and the run that they extrapolate to.

    Attributes:
        updates: Number of updates that were timed.
        update_seconds: Mean time of an update of the run.
        evaluation_seconds: Time of an evaluation.
        seconds: Time of the whole run, without loading, if it does not stop early.
        tokens_s: Tokens trained per second, padding included.
        memory: Peak memory in bytes: of the process on a CPU, of the device on a GPU.
        memory_available: Bytes available to the process; None if unknown.
        complete: Whether the largest batch was among the measured ones; it is left out if it would not fit.
    """

    updates: int
    update_seconds: float
    evaluation_seconds: float
    seconds: float
    tokens_s: float
    memory: int
    memory_available: int | None
    complete: bool


def rehearse(built: Built, fit: Fit, found: Prepared) -> Rehearsal:
    """Measures some updates. Changes the weights and draws random numbers: neither may be used afterwards.

    Args:
        built: The model.
        fit: The weights, before the first update.
        found: The rows.
    """
    sizes = [batch.input_ids.numel() for batch in fit.first_epoch()]
    device = built.model.model.norm.weight.device
    available = _available(device)
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    # The shortest first, so that memory that grows too fast is noticed; then the longest; then others in between.
    order = [by_size[0], by_size[len(by_size) // 2], by_size[-1], *_between(by_size[:-1], _UPDATES - 2)]
    timed: list[tuple[int, float]] = []
    peaks: list[tuple[int, int]] = []
    forward, forwarded, complete = 0.0, 0, True
    until = time.perf_counter() + _LIMIT_S
    for place, number in enumerate(order):
        if place > 2 and time.perf_counter() > until:
            break
        if place == 2 and not _fits(peaks, sizes[number], available):
            complete = False
            continue
        seconds = _update(fit, number, device)
        if place:  # the first one also pays for allocations
            timed.append((sizes[number], seconds))
            forward += _forward(built, fit.material, fit.first_epoch()[number], device)
            forwarded += sizes[number]
        peaks.append((sizes[number], _peak(device)))
    trained = sum(parameter.numel() for parameter in fit.parameters)
    each = _line([size for size, _ in timed], [seconds for _, seconds in timed], sizes)
    evaluation = forward / forwarded * _measured_tokens(found)
    reference = 0.0 if found.pairs is None else forward / forwarded * (sum(sizes) + _measured_tokens(found))
    peak = peaks[-1][1] if complete else _extrapolated(peaks, max(sizes))
    return Rehearsal(
        updates=len(timed),
        update_seconds=sum(each) / len(each),
        evaluation_seconds=evaluation,
        seconds=reference + fit.epochs * sum(each) + (fit.epochs + 1) * evaluation,
        tokens_s=sum(sizes) / sum(each),
        memory=peak + 4 * trained + (0 if device.type == "cuda" else _DRAWING),  # 4 bytes: the weights that are kept
        memory_available=available,
        complete=complete,
    )


def _update(fit: Fit, number: int, device: torch.device) -> float:
    """Makes the update of a batch of the first epoch; returns its seconds."""
    began = time.perf_counter()
    fit.standing.updates = number
    fit.update(lambda: None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def _forward(built: Built, material: Material, batch: object, device: torch.device) -> float:
    """Returns the seconds of an evaluation of a batch."""
    model = built.tuned
    model.eval()
    began = time.perf_counter()
    with casting(model, built.precision.autocast):
        loss: Tensor = material.loss(model, batch)  # type: ignore[arg-type]
    loss.item()
    seconds = time.perf_counter() - began
    model.train()
    return seconds


def _between(numbers: Sequence[int], count: int) -> list[int]:
    """Returns at most so many of the numbers, evenly spread."""
    chosen = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int))
    return [numbers[place] for place in chosen] if len(numbers) else []


def _line(sizes: Sequence[int], seconds: Sequence[float], wanted: Sequence[int]) -> list[float]:
    """Returns the seconds of batches of wanted sizes, on the line a + b * size through the measured ones, a and b from 0."""
    x, y = np.array(sizes, float), np.array(seconds, float)
    slope = 0.0
    if len(set(sizes)) > 1:
        slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()))
    start = float(y.mean() - slope * x.mean())
    if start < 0:
        start, slope = 0.0, float(y.sum() / x.sum())
    return [start + slope * size for size in wanted]


def _measured_tokens(found: Prepared) -> int:
    if found.pairs is not None:
        train, valid = found.pairs
        return sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in valid or train)
    return sum(len(example.ids) for example in found.valid.kept or found.train.kept)


def _available(device: torch.device) -> int | None:
    """Returns the bytes that this process may use in all: those in use, and those that are still free."""
    if device.type == "cuda":
        return memory_of(device)
    usable = memory().usable
    return None if usable is None else usable + round(peak_rss_mib() * _MIB)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return round(peak_rss_mib() * _MIB)


def _extrapolated(peaks: Sequence[tuple[int, int]], size: int) -> int:
    """Returns the peak of a larger batch, on the line through the smallest and the largest batch so far."""
    (small, before), (large, after) = min(peaks), max(peaks)
    slope = max(0.0, (after - before) / (large - small)) if large > small else after / large
    return round(after + slope * (size - large))


def _fits(peaks: Sequence[tuple[int, int]], size: int, available: int | None) -> bool:
    return available is None or _extrapolated(peaks, size) < available
