"""A larger model as the teacher of the one that is trained: its predictions are the targets (arXiv:1503.02531).

Dimensions: N positions with a label, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from slm.core.checkpoint import read_config
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch, Packed, batch_hidden, head_operands, mean_over
from slm.finetune.divergence import TeacherTargets
from slm.finetune.examples import Example
from slm.finetune.material import Answers
from slm.train.evaluate import Check
from slm.train.loss import linear_loss

LOSS_NAME = "divergence from the teacher"


class Teacher:
    """A model in evaluation mode whose weights are not trained.

    Attributes:
        path: The checkpoint.
        model: The model.
    """

    def __init__(self, path: Path, device: torch.device, autocast: torch.dtype | None) -> None:
        """Loads a checkpoint that `check_teacher` has accepted.

        Args:
            path: The checkpoint.
            device: The device.
            autocast: The autocast type of every forward pass, to which matrices are cast once; None for float32.
        """
        self.path = path
        self.model: CausalLM = load_checkpoint(path).requires_grad_(False).eval().to(device)
        self.autocast = autocast
        self._head = self.model.lm_head.weight.detach() if autocast is None else self.model.lm_head.weight.to(autocast)
        if autocast is not None:
            for module in self.model.model.layers.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.to(autocast)

    @torch.no_grad()
    def targets(self, batch: Batch, vocabulary: int) -> TeacherTargets:
        """Returns the predictions at the positions of a batch with a label.

        Args:
            batch: The batch.
            vocabulary: The size of the student's vocabulary.
        """
        hidden, _ = batch_hidden(self.model, batch)
        return TeacherTargets(hidden, self._head[:vocabulary])


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


def check_teacher(path: Path, tokenizer: Tokenizer, config: ModelConfig, max_length: int) -> None:
    """Checks that a checkpoint can teach a model.

    Args:
        path: The teacher.
        tokenizer: The student's tokenizer.
        config: The student's shape.
        max_length: The maximum tokens of a row.

    Raises:
        SlmError: If the tokenizers differ, or rows are longer than the teacher's context.
    """
    theirs, shape = Tokenizer.load(path), read_config(path)
    if theirs.sha256 != tokenizer.sha256:
        raise SlmError(
            f"the teacher {path} has another tokenizer than the base ({theirs.vocab_size:,} and {tokenizer.vocab_size:,} "
            f"tokens), so their predictions cannot be compared",
            "choose a teacher with the same tokenizer, such as a larger model of the same family",
        )
    if min(shape.vocab_size, config.vocab_size) < tokenizer.vocab_size:
        raise SlmError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens; the teacher {path} predicts {shape.vocab_size:,}, and the "
            f"base {config.vocab_size:,}",
            "tokenizer.json may belong to another model",
        )
    if max_length > shape.max_position_embeddings:
        raise SlmError(
            f"rows have up to {max_length:,} tokens, and the context of the teacher {path} is "
            f"{shape.max_position_embeddings:,}",
            f"--max-length {shape.max_position_embeddings}",
        )
