"""Trained models as teachers: their predictions are targets beside the tokens of the text (arXiv:1503.02531).

Dimensions: N positions of a batch, E hidden of a teacher, V vocabulary of the student, U ids that both have.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from slm.core.checkpoint import CONFIG_FILE, open_weights, read_config
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.core.weights import WEIGHTS_FILE
from slm.train.loss import IGNORED, Targets, cached_rows
from slm.train.recipe import Recipe


class FrozenModel:
    """A model in evaluation mode whose weights are not trained.

    Attributes:
        path: The checkpoint.
        model: The model.
        head: The head (V, E), in the type of the products.
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
        self.head = self.model.lm_head.weight.detach() if autocast is None else self.model.lm_head.weight.to(autocast)
        if autocast is not None:
            for module in self.model.model.layers.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.to(autocast)


class Ensemble:
    """Teachers whose mean prediction is a part of the targets; not a module, so that nothing trains, shards or saves it."""

    def __init__(self, teachers: Sequence[FrozenModel], weight: float) -> None:
        """Takes the teachers.

        Args:
            teachers: At least one.
            weight: Share of the teachers in the targets; the rest is the token of the text.
        """
        self._teachers, self._weight = teachers, weight

    @torch.no_grad()
    def targets(self, inputs: Tensor, targets: Tensor, segments: Tensor | None) -> "BlendedTargets":
        """Returns the targets of a batch; the arguments are those of `slm.train.learner.Objective`."""
        predictions = [
            (teacher.model.model(inputs, segments=segments).flatten(0, 1), teacher.head) for teacher in self._teachers
        ]
        return BlendedTargets(targets.flatten(), predictions, self._weight)


class BlendedTargets(Targets):
    """Distributions that blend the token of the text with the mean prediction of teachers.

    The loss of a position is the cross-entropy of the student's prediction for the blend, in nats.
    """

    def __init__(self, targets: Tensor, predictions: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
        """Takes the targets.

        Args:
            targets: Ids (N,); positions whose target is `IGNORED` do not count.
            predictions: Last hidden states (N, E) and head (V, E) of each teacher.
            weight: Share of the teachers.
        """
        self._targets, self._learned = targets, targets != IGNORED
        self._predictions, self._weight = predictions, weight

    @override
    def count(self) -> Tensor:
        return self._learned.sum().clamp(min=1)

    @override
    def compare(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns the sum of the losses, and overwrites the logits with their gradient; see `slm.train.loss.Targets`."""
        step, vocabulary = max(1, cached_rows(logits)), logits.shape[1]
        total = logits.new_zeros((), dtype=torch.float32)
        for first in range(0, len(logits), step):
            block = logits[first : first + step]
            place = slice(rows.start + first, rows.start + first + len(block))
            learned = self._learned[place, None]
            blend = block.new_zeros(block.shape, dtype=torch.float32)  # (n, V)
            for hidden, head in self._predictions:
                shared = head[:vocabulary]  # (U, E)
                theirs = hidden[place].to(dtype) @ shared.to(dtype).T
                blend[:, : len(shared)] += theirs.float().softmax(-1)
            blend *= self._weight / len(self._predictions)
            target = self._targets[place, None].where(learned, 0)
            blend.scatter_add_(1, target, blend.new_full(target.shape, 1 - self._weight))
            student = block.float().log_softmax(-1)
            total -= (blend * student * learned).sum()
            block.copy_((student.exp_() - blend) * learned)
        return total


def teacher_paths(recipe: Recipe) -> list[Path]:
    """Returns the checkpoints of the teachers that a recipe names; empty without any.

    Raises:
        SlmError: When one of them does not exist, or is not a checkpoint.
    """
    paths = [Path(path).expanduser() for path in recipe.distillation.teachers]
    for path in paths:
        if not path.exists():
            raise SlmError(
                f"distillation.teachers: checkpoint not found: {path}",
                f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}",
            )
        read_config(path)
    return paths


def check_teacher(
    path: Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    max_length: int,
    *,
    student: str = "the base",
    shorter: str = "--max-length {}",
) -> None:
    """Checks that a checkpoint can teach a model.

    Args:
        path: The teacher.
        tokenizer: The student's tokenizer.
        config: The student's shape.
        max_length: The maximum tokens of a row.
        student: What the messages call the student.
        shorter: The option that shortens rows, with braces for the length.

    Raises:
        SlmError: If the tokenizers differ, rows are longer than the teacher's context, or its weights are damaged or of
            another shape than its configuration.
    """
    shape, theirs = read_config(path), Tokenizer.load(path)
    if theirs.sha256 != tokenizer.sha256:
        raise SlmError(
            f"the teacher {path} has another tokenizer than {student} ({theirs.vocab_size:,} and {tokenizer.vocab_size:,} "
            f"tokens), so their predictions cannot be compared",
            "choose a teacher with the same tokenizer, such as a larger model of the same family",
        )
    if min(shape.vocab_size, config.vocab_size) < tokenizer.vocab_size:
        raise SlmError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens; the teacher {path} predicts {shape.vocab_size:,}, and "
            f"{student} {config.vocab_size:,}",
            "tokenizer.json may belong to another model",
        )
    if max_length > shape.max_position_embeddings:
        raise SlmError(
            f"rows have up to {max_length:,} tokens, and the context of the teacher {path} is "
            f"{shape.max_position_embeddings:,}",
            shorter.format(shape.max_position_embeddings),
        )
    open_weights(path, shape)
