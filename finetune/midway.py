"""Answers of the model to one or two rows while it is trained. They change no weight and use no random generator.

Their number follows from the run's length alone, never from a clock, so that a resumed run gives the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import rounded_in_place
from slm.finetune import samples
from slm.finetune.adapter import TunableLM
from slm.finetune.examples import Renderer
from slm.finetune.preparation import Prepared
from slm.finetune.samples import Question, Sample, answer, questions

# Rows that are answered, and how often in a run.
_ROWS, _TIMES = 2, 10
# The least number of times, if the run has so many epochs.
_LEAST = 2
# Share of the run that answers may take.
_SHARE = 0.03
# Tokens that an answer may have beyond the row's own.
_MARGIN = 8


@dataclass(frozen=True)
class Schedule:
    """When a run answers rows.

    Attributes:
        epochs: The epochs after which it does, from 1.
        rows: Number of rows.
    """

    epochs: frozenset[int]
    rows: int


class Midway:
    """Answers some rows after some epochs."""

    def __init__(
        self,
        model: TunableLM | CausalLM,
        renderer: Renderer,
        found: Prepared,
        count: int,
        autocast: torch.dtype | None,
    ) -> None:
        """Chooses rows and epochs.

        Args:
            model: The model.
            renderer: Converts rows to token ids.
            found: The rows: held-out ones are answered, or training rows if none are held out.
            count: Maximum number of rows; 0 answers none.
            autocast: Type of the products; None for float32.
        """
        assert found.settings.max_length is not None and found.settings.epochs is not None
        self._model, self._renderer, self._autocast = model, renderer, autocast
        self._held_out = bool(found.valid.kept)
        rows = found.split.held_out if self._held_out else found.split.train
        self._questions = questions(renderer, rows, min(count, _ROWS), found.settings)
        tokens = sum(len(example.ids) for row in found.rows for example in row)
        lengths = [_longest(question) for question in self._questions]
        self._schedule = schedule(lengths, found.settings.epochs, tokens, token_cost(model, autocast))

    def due(self, epoch: int) -> bool:
        """Returns whether rows are answered after an epoch."""
        return epoch in self._schedule.epochs

    def answers(self) -> list[Sample]:
        """Returns the answers of the model as it is."""
        training = self._model.training
        with rounded_in_place(self._model):
            found = [
                answer(self._model, self._renderer, question, _longest(question), self._held_out, self._autocast)
                for question in self._questions[: self._schedule.rows]
            ]
        self._model.train(training)
        return found


def schedule(lengths: Sequence[int], epochs: int, tokens: int, cost: float) -> Schedule:
    """Returns when to answer rows, so that the answers take at most a few percent of the run.

    Args:
        lengths: The most tokens of each answer.
        epochs: Epochs of the run.
        tokens: Tokens of an epoch.
        cost: Time of a generated token, in tokens that are trained in the same time.
    """
    if not lengths:
        return Schedule(frozenset(), 0)
    allowed = _SHARE * tokens * epochs / cost
    most, rows = min(_TIMES, epochs), len(lengths)
    if rows > 1 and most * sum(lengths) > allowed:
        rows = 1
    times = max(min(_LEAST, epochs), min(most, int(allowed / sum(lengths[:rows]))))
    return Schedule(frozenset(round(epochs * number / times) for number in range(1, times + 1)), rows)


def token_cost(model: TunableLM | CausalLM, autocast: torch.dtype | None) -> float:
    """Returns about how many tokens are trained in the time in which one is generated.

    A generated token reads every weight from memory once. A trained token shares that with all others of its batch, and
    computes with the layers three times. 16-bit products take less time per token, so the memory counts for more.
    """
    table, layers = _sizes(model)
    balance = _BALANCE_16 if autocast is not None else _BALANCE_32
    return max(1.0, balance * (table + layers) / (3 * layers))


# Products in the time in which a weight is read: round numbers for a CPU with a few cores. With float32, the demo model and
# examples/faq, answers took 2.4 % of a thread's processor time, within the budget of 3 %. 16 bits were not measured.
_BALANCE_16, _BALANCE_32 = 100.0, 20.0


def _sizes(model: TunableLM | CausalLM) -> tuple[int, int]:
    """Returns the numbers of weights in the head, and in all layers."""
    config: ModelConfig = model.model.config
    table = config.vocab_size * config.hidden_size
    tensors: list[Tensor] = list(model.model.layers.parameters())
    return table, max(1, sum(tensor.numel() for tensor in tensors))


def _longest(question: Question) -> int:
    return min(samples.TOKENS, question.wanted_tokens + _MARGIN)
