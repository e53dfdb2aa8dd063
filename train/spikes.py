"""Loss spikes: updates whose loss or gradient norm is far above those of the updates before it."""

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slm.core.errors import SlmError

Action = Literal["skip", "rewind"]

# Standard deviations of normal noise in a median absolute deviation, and in a median absolute difference of two updates.
_PER_DEVIATION = 1.4826
_PER_DIFFERENCE = _PER_DEVIATION / math.sqrt(2)
# The least noise that is assumed: a share of the median loss, and a factor (as a logarithm) between gradient norms.
_LEAST_LOSS_NOISE = 0.01
_LEAST_NORM_NOISE = 0.1
# Updates that are seen before any is judged, as a share of the window: the first losses fall fast.
_SEEN_FIRST = 4
# `limit` counts the spikes within this many updates.
LIMIT_UPDATES = 1000


@dataclass(frozen=True)
class Spike:
    """An update that was not made.

    Attributes:
        loss: Its loss, which may not be finite.
        grad_norm: The norm of its gradient, which may not be finite.
        usual_loss: Median loss of the updates before it; None if there were too few.
        usual_grad_norm: Median norm of the updates before it; None if there were too few.
        reason: What was far above the median, in words.
    """

    loss: float
    grad_norm: float
    usual_loss: float | None
    usual_grad_norm: float | None
    reason: str

    def fields(self) -> dict[str, float | None]:
        """Returns the numbers for a row of metrics, where what is not finite is None: JSON has no infinity."""
        numbers = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "usual_loss": self.usual_loss,
            "usual_grad_norm": self.usual_grad_norm,
        }
        return {name: None if x is None or not math.isfinite(x) else x for name, x in numbers.items()}


class SpikeState(BaseModel):
    """What a run has to remember about spikes.

    Attributes:
        losses: Losses of the last updates that were made.
        norms: The norms of their gradients.
        left_out: Updates whose data was left out by rewinding, over the whole run.
        found: The updates that spiked, counted with those that were left out.
        rewinds: The rows of metrics about rewinds, which the metrics lose when a rewind is interrupted.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    losses: list[float] = []
    norms: list[float] = []
    left_out: int = Field(default=0, ge=0)
    found: list[int] = []
    rewinds: list[dict[str, Any]] = []

    def without_statistic(self) -> "SpikeState":
        """Returns the state without the updates by which later ones are judged."""
        return self.model_copy(update={"losses": [], "norms": []})


class SpikeGuard:
    """Judges each update by a running robust statistic of the updates before it.

    An update spikes if its loss or the logarithm of its gradient norm exceeds the median of the window by more than
    `threshold` standard deviations of the noise. The noise is estimated from medians, so that spikes do not raise it.
    """

    def __init__(
        self,
        action: Action,
        threshold: float,
        window: int,
        limit: int,
        advice: str,
        phase: Callable[[int], Hashable] | None = None,
    ) -> None:
        """Starts without a history.

        Args:
            action: What is done about a spike.
            threshold: Standard deviations above the median from which an update spikes.
            window: Updates in the statistic.
            limit: The most spikes within `LIMIT_UPDATES` updates.
            advice: A hint for more spikes than that.
            phase: What is trained in an update, by its number from 0: where it changes, the losses before are no measure of
                those after. None if it never changes.
        """
        self.action = action
        self.left_out = 0
        self.rewinds: list[dict[str, Any]] = []
        self._threshold, self._window, self._limit, self._advice = threshold, window, limit, advice
        self._phase = phase
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._found: list[int] = []

    def begin(self, update: int) -> None:
        """Prepares for an update, by its number from 0: forgets the statistic where the phase changes."""
        if self._phase is not None and update and self._phase(update) != self._phase(update - 1):
            self._losses.clear()
            self._norms.clear()

    def judge(self, loss: float, grad_norm: float, *, overflow: bool) -> Spike | None:
        """Returns why an update must not be made; None if it may.

        Args:
            loss: The loss of the update.
            grad_norm: The norm of its gradient before clipping.
            overflow: Whether float16 may have overflowed: the loss scale handles a gradient that is not finite.
        """
        reasons = []
        usual_loss = usual_norm = None
        if not math.isfinite(loss):
            reasons.append(f"the loss is {loss}")
        if not (math.isfinite(grad_norm) or overflow):
            reasons.append(f"the gradient's norm is {grad_norm}")
        if len(self._losses) >= max(2, self._window // _SEEN_FIRST):
            usual_loss, noise = _loss_noise(self._losses)
            if math.isfinite(loss) and loss > usual_loss + self._threshold * noise:
                reasons.append(f"the loss is {loss:.4g}, usually {usual_loss:.4g}")
        if len(self._norms) >= max(2, self._window // _SEEN_FIRST):
            logarithm, noise = _norm_noise(self._norms)
            usual_norm = math.exp(logarithm)
            if math.isfinite(grad_norm) and _log(grad_norm) > logarithm + self._threshold * noise:
                reasons.append(f"the gradient's norm is {grad_norm:.4g}, usually {usual_norm:.4g}")
        return Spike(loss, grad_norm, usual_loss, usual_norm, " and ".join(reasons)) if reasons else None

    def accept(self, loss: float, grad_norm: float) -> None:
        """Takes an update that was made into the statistic."""
        self._losses.append(loss)
        if math.isfinite(grad_norm):
            self._norms.append(grad_norm)

    def count(self, update: int, spike: Spike) -> None:
        """Counts a spike.

        Args:
            update: Number of the update, from 0, without those that were left out.
            spike: The spike.

        Raises:
            SlmError: When there were more than the limit.
        """
        number = update + self.left_out
        self._found = [each for each in self._found if number - each < LIMIT_UPDATES] + [number]
        if len(self._found) > self._limit:
            raise SlmError(
                f"update {update + 1:,}: {spike.reason}; this is spike {len(self._found)} within {LIMIT_UPDATES:,} updates, "
                f"and the limit is {self._limit}",
                self._advice,
            )

    def state(self) -> SpikeState:
        """Returns what a saved state keeps."""
        return SpikeState(
            losses=list(self._losses),
            norms=list(self._norms),
            left_out=self.left_out,
            found=list(self._found),
            rewinds=list(self.rewinds),
        )

    def restore(self, state: SpikeState) -> None:
        """Restores what `state` returned."""
        self.restore_statistic(state)
        self.left_out, self._found, self.rewinds = state.left_out, list(state.found), list(state.rewinds)

    def restore_statistic(self, state: SpikeState) -> None:
        """Restores the statistic of an earlier update, and keeps the count of spikes and of what was left out."""
        self._losses = deque(state.losses, maxlen=self._window)
        self._norms = deque(state.norms, maxlen=self._window)


def _loss_noise(losses: deque[float]) -> tuple[float, float]:
    """Returns the median loss and the noise. Differences of successive losses do not contain the loss's own fall."""
    middle = median(losses)
    differences = _PER_DIFFERENCE * median(abs(b - a) for a, b in pairwise(losses))
    return middle, max(differences, _LEAST_LOSS_NOISE * abs(middle))


def _norm_noise(norms: deque[float]) -> tuple[float, float]:
    """Returns the median of the logarithms of gradient norms and their noise. Norms drift in both directions."""
    logarithms = [_log(norm) for norm in norms]
    middle = median(logarithms)
    deviations = _PER_DEVIATION * median(abs(each - middle) for each in logarithms)
    differences = _PER_DIFFERENCE * median(abs(b - a) for a, b in pairwise(logarithms))
    return middle, max(deviations, differences, _LEAST_NORM_NOISE)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
