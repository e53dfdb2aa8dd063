"""The score of a model's replies to the measured rows, by which fine-tuning chooses the epoch to keep.

Prompts, limits, ends and scores are those of `slm eval --task` on the same rows.
"""

import time
from collections.abc import Sequence

import torch

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.metrics.scoring import METRICS
from slm.core.nn import CausalLM
from slm.core.task import MetricName, Question
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import TunableLM
from slm.finetune.examples import Renderer
from slm.finetune.preparation import Prepared, RowFiles
from slm.finetune.replies import generate, reply_likelihoods
from slm.finetune.rows import ChatRow, CompletionRow, PreferenceRow
from slm.finetune.task import questions, task_of
from slm.runtime.answers import Answer, Measured, choice_answer, no_answer, reply_answer, reply_ends, token_limit
from slm.runtime.generation import Generation, Request
from slm.runtime.sampling import GREEDY
from slm.train.evaluate import Check
from slm.train.metrics import Row


class Judge:
    """Scores a model's replies to rows.

    Attributes:
        title: What the score is, for messages.
        rows: The number of rows.
    """

    def __init__(self, metric: MetricName, rows: Sequence[Question], tokenizer: Tokenizer, config: ModelConfig) -> None:
        """Takes rows.

        Args:
            metric: The metric.
            rows: The rows in the model's tokens.
            tokenizer: The model's tokenizer.
            config: The model's shape.
        """
        self.title, self.rows = METRICS[metric].title, len(rows)
        self._metric, self._questions, self._tokenizer, self._config = metric, rows, tokenizer, config

    def measure(self, model: TunableLM | CausalLM, autocast: torch.dtype | None, check: Check) -> Measured:
        """Lets the model answer the rows, greedily, and scores the replies. The same weights give the same score.

        Args:
            model: The model. It stays in evaluation mode.
            autocast: Type of the products; None for float32.
            check: Called between steps; may raise to stop.
        """
        began, limit = time.perf_counter(), token_limit(self._questions)
        answer = self._chosen if self._metric == "choice" else self._generated
        found = answer(model, autocast, check, limit)
        return Measured(self._metric, found, time.perf_counter() - began, limit, 1)

    def _chosen(
        self, model: TunableLM | CausalLM, autocast: torch.dtype | None, check: Check, limit: int
    ) -> tuple[Answer, ...]:
        found = []
        for question in self._questions:
            check()
            longest = len(question.ids) + max(map(len, question.choices)) - 1
            if longest > self._config.max_position_embeddings:
                found.append(no_answer(self._metric, question))
            else:
                likely = reply_likelihoods(model, question.ids, question.choices, autocast)
                found.append(choice_answer(question, likely))
        return tuple(found)

    def _generated(
        self, model: TunableLM | CausalLM, autocast: torch.dtype | None, check: Check, limit: int
    ) -> tuple[Answer, ...]:
        config, tokenizer = self._config, self._tokenizer
        context, ends = config.max_position_embeddings, reply_ends(tokenizer, config.stop_token_ids)
        found = {n: no_answer(self._metric, each) for n, each in enumerate(self._questions)}
        numbers = {
            Generation(Request(each.ids, GREEDY, limit, ends), context, config.vocab_size, tokenizer): n
            for n, each in enumerate(self._questions)
            if len(each.ids) < context
        }

        def ended(generation: Generation) -> None:
            number = numbers[generation]
            found[number] = reply_answer(self._metric, self._questions[number], generation.result, tokenizer)

        generate(model, list(numbers), autocast, ended, check)
        return tuple(found[number] for number in range(len(found)))


def judge_of(found: Prepared, files: RowFiles, renderer: Renderer, config: ModelConfig) -> Judge | None:
    """Returns the judge of a run: the held-out rows, or the training rows if none are held out. None without a metric.

    Args:
        found: The rows and the settings.
        files: The files of the rows.
        renderer: Converts rows to token ids.
        config: The shape of the base.

    Raises:
        SlmError: When the rows have no requests and replies, or do not fit the metric; the message names the row.
    """
    metric = found.settings.metric
    if metric is None:
        return None
    held_out = bool(found.valid.kept)
    rows = found.split.held_out if held_out else found.split.train
    if any(isinstance(row, PreferenceRow) for row in rows):
        raise SlmError(
            "a metric does not choose the epoch of preferences, whose chosen answer is not the only right one",
            "omit --metric; slm eval --task measures the result",
        )
    # A reply that was cut is not an expected one.
    rows = [row for row in rows if not (isinstance(row, ChatRow | CompletionRow) and row.unended)]
    if found.bad:  # conversations that the template rejects were counted before
        rendered = zip(rows, renderer.uncut(rows), strict=True)
        rows = [row for row, example in rendered if not isinstance(example, SlmError)]
    if not rows:
        raise SlmError(f"no row is left whose reply --metric {metric} could compare", "raise --max-length")
    path = files.validation if held_out and files.validation is not None else files.train
    choices = [found.choices.get(row.place) for row in rows]
    file = task_of(rows, choices, path, metric, found.settings.metric_rows)
    return Judge(metric, questions(file, renderer), renderer.tokenizer, config)


def score_fields(measured: Measured) -> Row:
    """Returns the fields of a row of metrics."""
    interval = measured.interval
    return {
        "metric": measured.metric,
        "score": measured.score,
        "score_low": interval.low,
        "score_high": interval.high,
        "score_others": dict(measured.others),
    }
