"""A larger model as the teacher of the one that is trained: its predictions are the targets (arXiv:1503.02531).

Dimensions: N positions with a label, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from slm.core.nn import CausalLM
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch, Packed, batch_hidden, head_operands, mean_over
from slm.finetune.divergence import TeacherTargets
from slm.finetune.examples import Example
from slm.finetune.material import Answers
from slm.train.evaluate import Check
from slm.train.loss import linear_loss
from slm.train.teacher import FrozenModel

LOSS_NAME = "divergence from the teacher"


class Teacher(FrozenModel):
    """A model whose predictions at the learned tokens of rows are the targets."""

    @torch.no_grad()
    def targets(self, batch: Batch, vocabulary: int) -> TeacherTargets:
        """Returns the predictions at the positions of a batch with a label.

        Args:
            batch: The batch.
            vocabulary: The size of the student's vocabulary.
        """
        hidden, _ = batch_hidden(self.model, batch)
        return TeacherTargets(hidden, self.head[:vocabulary])


class Distilled(Answers):
    """Rows at whose learned tokens a model learns the predictions of a teacher."""

    def __init__(
        self, rows: Sequence[Packed], measured: Sequence[Example], teacher: Teacher, loss_name: str = LOSS_NAME
    ) -> None:
        """Takes the rows.

        Args:
            rows: The rows to train on; see `Answers`.
            measured: The examples on which the divergence is measured.
            teacher: The teacher.
            loss_name: Name of the measured divergence in messages.
        """
        super().__init__(rows, measured, loss_name)
        self._teacher = teacher

    @override
    def loss(self, model: TunableLM | CausalLM, batch: Batch) -> Tensor:
        hidden, _ = batch_hidden(model, batch)
        hidden, weight, rows = head_operands(model, hidden)
        return linear_loss(hidden, weight, self._teacher.targets(batch, len(weight)), rows=rows)

    @override
    def measure(
        self, model: TunableLM | CausalLM, batch_size: int, autocast: torch.dtype | None, check: Check
    ) -> float:
        return mean_over(model, self._measured, batch_size, self.loss, autocast, check)
