"""Replies to the rows of a task, and their scores. `slm eval --task` and fine-tuning share these rules, so their scores agree.

The module needs neither onnxruntime nor torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from slm.core.chat import turn_ends
from slm.core.metrics.intervals import Interval
from slm.core.metrics.scoring import METRICS, Scores, choice_scores, difference, interval, reply_scores
from slm.core.task import MetricName, Question, TaskRow
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.runtime.generation import Result, StopReason

# The default limit of new tokens: twice the longest expected reply, within these bounds.
_FEWEST, _MOST, _TIMES = 32, 1024, 2


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


def token_limit(questions: Sequence[Question]) -> int:
    """Returns the default limit of new tokens: twice the longest expected reply, from 32 to 1,024."""
    return min(_MOST, max(_FEWEST, _TIMES * max(len(question.reply) for question in questions)))


def end_of_text(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> int | None:
    """Returns the token that ends a document: "<|endoftext|>" if there is one, otherwise the first end-of-text token."""
    token = tokenizer.token_id(END_OF_TEXT)
    return token if token is not None else next(iter(stop_token_ids), None)


def reply_ends(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> frozenset[int]:
    """Returns the tokens that end a reply: a stop token, the end of a turn, the end of a text, or the end of calls."""
    end = end_of_text(tokenizer, stop_token_ids)
    return frozenset((*stop_token_ids, *turn_ends(tokenizer), *(() if end is None else (end,))))


def reply_answer(metric: MetricName, question: Question, result: Result, tokenizer: Tokenizer) -> Answer:
    """Returns the scored answer of a generated reply; with the metric "tool-call", special tokens are part of the reply."""
    text = result.text
    if metric == "tool-call":  # the marks of calls may be special tokens
        text = tokenizer.backend.decode(result.tokens, skip_special_tokens=False)
    scores = reply_scores(metric, question.row, text, question.style)
    return Answer(question.row, text.strip(), scores, len(result.tokens), result.stopped)


def choice_answer(question: Question, log_probabilities: Sequence[float]) -> Answer:
    """Returns the scored answer of a row with choices, from the sum of the log-probabilities of each choice's tokens."""
    chosen, scores = choice_scores(question.row, log_probabilities)
    return Answer(question.row, chosen, scores, sum(map(len, question.choices)), None)


def no_answer(metric: MetricName, question: Question) -> Answer:
    """Returns the answer of a row that does not fit the model's context, which scores 0."""
    scores = {"score": 0.0} | dict.fromkeys(METRICS[metric].others, 0.0)
    return Answer(question.row, "", scores, 0, "error")
