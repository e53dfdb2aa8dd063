"""Measures a model on a task: greedy replies to the requests of rows, or the most likely of a row's choices.

Dimensions: T positions, V vocabulary.
"""

import time
from collections.abc import Collection, Sequence

import numpy as np

from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.core.task import MetricName, Question
from slm.runtime.answers import Answer, Measured, choice_answer, no_answer, reply_answer, reply_ends, token_limit
from slm.runtime.backend import Array, Decoder, Reader, log_probabilities
from slm.runtime.generation import Generation, Request
from slm.runtime.guide import Constraint, Later
from slm.runtime.head import read_whole
from slm.runtime.model import Model
from slm.runtime.prefix import PrefixCache, common_length
from slm.runtime.sampling import GREEDY
from slm.runtime.scheduler import SLOTS, batched, run_batch
from slm.runtime.streaming import run
from slm.runtime.tool_choice import CallGrammar

# The fewest tokens at the beginning of all requests that are read once for all: with declared tools, most of a request.
_LEAST_SHARED = 64
# Tokens of a choice that are read in one step, which has logits at each of them.
_STEP = 16


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
        max_tokens = token_limit(questions)
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
        stops = reply_ends(model.tokenizer, model.stop_token_ids)
        constraints = self._constraints(questions, stops)
        numbers: dict[Generation, int] = {}
        for number, question in enumerate(questions):
            if len(question.ids) >= decoder.context:
                self._put(number, no_answer(self._metric, question))
                continue
            request = Request(question.ids, GREEDY, max_tokens, stops, constraint=constraints[number])
            try:
                numbers[Generation(request, decoder.context, decoder.vocab_size, model.tokenizer)] = number
            except SlmError as error:
                raise SlmError(f"{question.row.place}: {error.message}", error.hint) from None

        def ended(generation: Generation) -> None:
            number = numbers[generation]
            self._put(number, reply_answer(self._metric, questions[number], generation.result, model.tokenizer))

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
                self._put(number, no_answer(self._metric, question))
                continue
            self._put(number, choice_answer(question, likelihoods(decoder, question, reader)))
        return 1

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
