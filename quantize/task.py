"""The score of a task before and after quantization, and its limit."""

import gc
from dataclasses import dataclass

from slm.core.manifest import Bundle
from slm.core.metrics.scoring import METRICS, reaches
from slm.core.progress import Progress
from slm.core.task import MetricName, Question
from slm.core.tokenizer import Tokenizer
from slm.quantize.results import TaskChange, TaskScore
from slm.runtime.answers import Measured
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.model import Model
from slm.runtime.task import measure_task


@dataclass(frozen=True)
class TaskCheck:
    """A task, and how much of its score quantization may cost.

    Attributes:
        name: The name of the rows' file.
        metric: The metric.
        questions: The rows in tokens of the source's tokenizer.
        max_drop: Limit of the decrease of the score, where 0.01 is one point of 100.
    """

    name: str
    metric: MetricName
    questions: tuple[Question, ...]
    max_drop: float

    def refuses(self, change: TaskChange) -> str | None:
        """Returns the reason for rejection, or None. Rejects NaN."""
        before, after = change.before.score, change.after.score
        if reaches(after, before - self.max_drop):
            return None
        return (
            f"{METRICS[self.metric].title} on {self.name} falls from {before:.1%} to {after:.1%} (limit {change.limit})"
        )


def measure_change(check: TaskCheck, source: Bundle, made: Bundle, progress: Progress) -> TaskChange:
    """Measures the source and the quantized bundle on a task, one after the other, on the CPU.

    Args:
        check: The task.
        source: The source.
        made: The quantized bundle.
        progress: Receives the progress.
    """
    progress.note(f"measuring {len(check.questions):,} rows of {check.name}, before and after")
    tokenizer = Tokenizer.load(source.path)
    found: list[Measured] = []
    for bundle in (source, made):
        model = Model(tokenizer, OnnxDecoder(bundle), bundle.stop_token_ids)
        found.append(measure_task(model, check.questions, check.metric, progress))
        del model
        gc.collect()  # the memory of one model, before the next is loaded
    before, after = found
    if before.score <= check.max_drop:
        progress.note(
            f"warning: the source scores {before.score:.1%} on {check.name}, so the score cannot fall by more than the limit"
        )
    between = after.difference(before)
    return TaskChange(
        name=check.name,
        metric=check.metric,
        rows=len(check.questions),
        before=_score(before),
        after=_score(after),
        low=between.low,
        high=between.high,
        max_drop=check.max_drop,
        lost=sum(new < old for old, new in zip(before.scores, after.scores, strict=True)),
        won=sum(new > old for old, new in zip(before.scores, after.scores, strict=True)),
    )


def _score(measured: Measured) -> TaskScore:
    return TaskScore(measured.score, measured.interval.low, measured.interval.high)
