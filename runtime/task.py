"""Measures a model on a task: greedy replies to the requests of rows, or the most likely of a row's choices.

Dimensions: T positions, V vocabulary.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from slm.core.chat import call_ends
from slm.core.errors import SlmError
from slm.core.metrics.intervals import Interval
from slm.core.metrics.scoring import METRICS, Scores, choice_scores, difference, interval, reply_scores
from slm.core.progress import Progress
from slm.core.task import MetricName, Question, TaskRow
from slm.core.tokenizer import END_OF_TURN
from slm.runtime.backend import Array, Decoder, Reader, log_probabilities
from slm.runtime.evaluate import end_of_text
from slm.runtime.generation import Generation, Request, Result, StopReason
from slm.runtime.guide import Constraint, Later
from slm.runtime.head import read_whole
from slm.runtime.model import Model
from slm.runtime.prefix import PrefixCache, common_length
from slm.runtime.sampling import GREEDY
from slm.runtime.scheduler import SLOTS, batched, run_batch
from slm.runtime.streaming import run
from slm.runtime.tool_choice import CallGrammar

# The default limit of new tokens: twice the longest expected reply, within these bounds.
_FEWEST, _MOST, _TIMES = 32, 1024, 2
# The fewest tokens at the beginning of all requests that are read once for all: with declared tools, most of a request.
_LEAST_SHARED = 64
# Tokens of a choice that are read in one step, which has logits at each of them.
_STEP = 16


@dataclass(frozen=True)
class Answer:
    """A model's reply to one row.

    Attributes:
        row: The row.
        reply: The generated reply, or the most likely choice.
        scores: The metric's own score, under "score", and its further figures.
        tokens: The number of new tokens; for choices, of those that were read.
        stopped: Why the reply ended; None for choices. "error" if the request fills the context: such a row scores 0.
    """

    row: TaskRow
    reply: str
    scores: Scores
    tokens: int
    stopped: StopReason | None

    @property
    def score(self) -> float:
        """The metric's own score, from 0 to 1."""
        return self.scores["score"]


@dataclass(frozen=True)
class Measured:
    """The measurement of one model on a task.

    Attributes:
        metric: The metric.
        answers: The replies, in the order of the rows.
        seconds: Wall time of all replies, without the conversion of rows to tokens.
        max_tokens: The limit of new tokens.
        batch: How many rows were generated together; 1 for a model that answers rows one by one.
        tool_choice: The choice of tools that constrained the replies; None without a constraint.
    """

    metric: MetricName
    answers: tuple[Answer, ...]
    seconds: float
    max_tokens: int
    batch: int
    tool_choice: str | None = None

    @cached_property
    def scores(self) -> list[float]:
        """The score of each row."""
        return [answer.score for answer in self.answers]

    @property
    def score(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)

    @cached_property
    def interval(self) -> Interval:
        """The 95 % confidence interval of the score."""
        return interval(self.metric, self.scores)

    @property
    def others(self) -> Mapping[str, float]:
        """The means of the metric's further figures."""
        return {
            name: sum(answer.scores[name] for answer in self.answers) / len(self.answers)
            for name in METRICS[self.metric].others
        }

    def difference(self, before: "Measured") -> Interval:
        """Returns the 95 % confidence interval of the difference from another model's score on the same rows."""
        return difference(self.metric, before.scores, self.scores)

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def seconds_per_row(self) -> float:
        """Mean seconds per row."""
        return self.seconds / len(self.answers)

    @property
    def tokens_s(self) -> float:
        """New tokens per second, prompts included in the time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def cut(self) -> int:
        """The number of replies that ended at the limit of new tokens or of the context."""
        return sum(answer.stopped in ("length", "context") for answer in self.answers)

    @property
    def too_long(self) -> int:
        """The number of rows that do not fit the model's context and score 0."""
        return sum(answer.stopped == "error" for answer in self.answers)

    def worst(self, count: int) -> list[Answer]:
        """Returns the answers with the lowest scores below 1, lowest first."""
        wrong = (answer for answer in self.answers if answer.score < 1)
        return sorted(wrong, key=lambda answer: answer.score)[:count]


def measure_task(
    model: Model,
    questions: Sequence[Question],
    metric: MetricName,
    progress: Progress,
    *,
    max_tokens: int | None = None,
    batch: int = SLOTS,
    tool_choice: str | None = None,
) -> Measured:
    """Measures a model on the rows of a task. The same model and rows give the same scores.

    Args:
        model: The model. It decodes greedily, until a stop token, the end of a turn, or the end of a text.
        questions: The rows in the model's tokens.
        metric: The metric.
        progress: Advances with each row.
        max_tokens: The most new tokens of a reply; by default twice the longest expected reply, from 32 to 1,024.
        batch: How many rows a fused bundle generates together.
        tool_choice: "auto" or "required" constrains the replies to rows with tools, as `slm serve` does; None does not.

    Raises:
        SlmError: If a row has a token that the model lacks, or the tools of a row cannot constrain a reply.
    """
    if max_tokens is None:
        max_tokens = min(_MOST, max(_FEWEST, _TIMES * max(len(question.reply) for question in questions)))
    measuring = _Run(model, metric, progress, tool_choice)
    progress.start("answering", len(questions), "rows")
    began = time.perf_counter()
    try:
        together = (
            measuring.choose(questions) if metric == "choice" else measuring.generate(questions, max_tokens, batch)
        )
    finally:
        progress.finish()
    answers = tuple(measuring.answers[number] for number in range(len(questions)))
    return Measured(metric, answers, time.perf_counter() - began, max_tokens, together, tool_choice)


class _Run:
    """One measurement.

    Attributes:
        answers: The answers so far, by the number of their row.
    """

    def __init__(self, model: Model, metric: MetricName, progress: Progress, tool_choice: str | None) -> None:
        self.answers: dict[int, Answer] = {}
        self._choice = tool_choice
        self._model, self._metric, self._progress = model, metric, progress
        self._sum = 0.0

    def generate(self, questions: Sequence[Question], max_tokens: int, batch: int) -> int:
        """Generates all replies, and returns how many at a time."""
        model, decoder = self._model, self._model.decoder
        ends = (model.tokenizer.token_id(END_OF_TURN), end_of_text(model))
        known = (token for token in ends if token is not None)
        stops = frozenset((*model.stop_token_ids, *known, *call_ends(model.tokenizer)))
        constraints = self._constraints(questions, stops)
        numbers: dict[Generation, int] = {}
        for number, question in enumerate(questions):
            if len(question.ids) >= decoder.context:
                self._put(number, self._unanswered(question))
                continue
            request = Request(question.ids, GREEDY, max_tokens, stops, constraint=constraints[number])
            try:
                numbers[Generation(request, decoder.context, decoder.vocab_size, model.tokenizer)] = number
            except SlmError as error:
                raise SlmError(f"{question.row.place}: {error.message}", error.hint) from None

        def ended(generation: Generation) -> None:
            number = numbers[generation]
            question, result = questions[number], generation.result
            text = self._with_marks(result) if self._metric == "tool-call" else result.text
            scores = reply_scores(self._metric, question.row, text, question.style)
            self._put(number, Answer(question.row, text.strip(), scores, len(result.tokens), result.stopped))

        generations, shared = list(numbers), shared_beginning([each.request.prompt for each in numbers])
        reader = _AfterShared(decoder, shared) if shared else decoder
        if batched(decoder, generations) is None:
            for generation in generations:
                run(reader, generation).finish()
                ended(generation)
            return 1
        prefixes = None
        if isinstance(reader, _AfterShared):
            prefixes = PrefixCache(1 << 62, shortest=1 << 62)  # of this snapshot alone
            prefixes.add(shared, reader.snapshot)
        run_batch(decoder, generations, batch, ended=ended, prefixes=prefixes)
        return batch

    def _constraints(self, questions: Sequence[Question], stops: Collection[int]) -> list[Constraint | None]:
        """Returns the constraint of each reply."""
        if self._choice is None or not any(question.tools for question in questions):
            return [None] * len(questions)
        model, choice = self._model, self._choice
        grammar = CallGrammar(model.tokenizer, model.decoder.vocab_size, sorted(stops))
        try:
            return [Later(grammar.prepared(each.tools, choice)) if each.tools else None for each in questions]
        finally:
            grammar.close()

    def choose(self, questions: Sequence[Question]) -> int:
        """Compares the choices of all rows, one after the other."""
        decoder = self._model.decoder
        read_whole(decoder, True)
        fitting = [each.ids for each in questions if len(each.ids) < decoder.context]
        shared = shared_beginning(fitting)
        reader = _AfterShared(decoder, shared) if shared else decoder
        for number, question in enumerate(questions):
            longest = len(question.ids) + max(map(len, question.choices)) - 1
            highest = max(max(question.ids), *map(max, question.choices))
            if highest >= decoder.vocab_size:
                raise SlmError(
                    f"{question.row.place}: the row has token id {highest:,}, and the model's vocabulary has "
                    f"{decoder.vocab_size:,} tokens",
                    "tokenizer.json may belong to another model",
                )
            if longest > decoder.context:
                self._put(number, self._unanswered(question))
                continue
            chosen, scores = choice_scores(question.row, likelihoods(decoder, question, reader))
            self._put(number, Answer(question.row, chosen, scores, sum(map(len, question.choices)), None))
        return 1

    def _with_marks(self, result: Result) -> str:
        """Returns a reply with its special tokens: the marks of calls may be some."""
        text: str = self._model.tokenizer.backend.decode(result.tokens, skip_special_tokens=False)
        return text

    def _unanswered(self, question: Question) -> Answer:
        scores = {"score": 0.0} | dict.fromkeys(METRICS[self._metric].others, 0.0)
        return Answer(question.row, "", scores, 0, "error")

    def _put(self, number: int, answer: Answer) -> None:
        self.answers[number] = answer
        self._sum += answer.score
        self._progress.advance(1, score=f"{self._sum / len(self.answers):.1%}")


class _AfterShared:
    """Reads texts that all begin with the same tokens, which are read once.

    Attributes:
        decoder: The decoder that computes.
        snapshot: The decoder's state after the shared tokens.
    """

    def __init__(self, decoder: Decoder, shared: Sequence[int]) -> None:
        self.decoder = decoder
        decoder.reset()
        decoder.read(shared)
        self.snapshot, self._shared, self._begun = decoder.snapshot(), len(shared), False

    def reset(self) -> None:
        """Begins another text."""
        self._begun = False

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the next token."""
        if self._begun:
            return self.decoder.read(ids)
        self._begun = True
        self.decoder.restore(self.snapshot)
        return self.decoder.read(ids[self._shared :])


def shared_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the tokens that all prompts begin with, at least one fewer than the shortest has; none if they are few."""
    if len(prompts) < 2:
        return []
    common = min(common_length(prompts[0], each) for each in prompts)
    common = min(common, *(len(each) - 1 for each in prompts))
    return list(prompts[0][:common]) if common >= _LEAST_SHARED else []


def likelihoods(decoder: Decoder, question: Question, reader: Reader | None = None) -> list[float]:
    """Returns the sum of the log-probabilities of each choice's tokens after the prompt, the end token included, in nats.

    The prompt is read once.

    Args:
        decoder: The model.
        question: The prompt and the choices.
        reader: Reads prompts into the decoder; None reads with the decoder itself.
    """
    reader = reader or decoder
    reader.reset()
    first = reader.read(question.ids).copy()  # (V,)
    before = decoder.snapshot()
    sums = []
    for choice in question.choices:
        decoder.restore(before)
        total, logits = 0.0, first[None]
        for start in range(0, len(choice), _STEP):
            # The last token of the choice is predicted and not read.
            part = choice[start : start + _STEP]
            unread = part[: len(choice) - 1 - start]
            after = decoder.read_each(unread) if unread else logits[:0]  # (T, V)
            known = np.concatenate([logits, after])[: len(part)]  # logits before each token of the part
            total += float(log_probabilities(known[None], np.array([part], np.int64))[0].sum(dtype=np.float64))
            logits = after[-1:].copy() if len(after) else logits
        sums.append(total)
    return sums
