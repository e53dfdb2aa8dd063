"""Training of the student: its predictions are moved towards the float model's (distillation, arXiv:1503.02531).

Dimensions: B rows of a batch, R rows, T positions, D hidden, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slm.core.errors import SlmError
from slm.core.nn import CausalLM
from slm.core.progress import Progress
from slm.quantize.plan import QuantizationPlan
from slm.quantize.quantizer import Quantizer
from slm.quantize.texts import TokenRows
from slm.refine.student import Student, teacher
from slm.refine.vocabulary import Vocabulary, divergence

# Tokens of an update, and rows that the teacher reads at a time.
UPDATE_TOKENS = 512
_TEACHER_ROWS = 4
# Learning rates of Adam, whose first updates move a parameter by about this much, relative to its value (docs/quantization.md).
SCALE_RATE, NORM_RATE = 2e-3, 1e-3
_BETAS = (0.9, 0.95)
# The share of updates in which the learning rate rises.
_WARMUP = 0.1
_SEED = 0


def refine(quantizer: Quantizer, plan: QuantizationPlan, text: TokenRows, tokens: int) -> QuantizationPlan:
    """Trains scales and norms of a plan so that its predictions come close to the float model's.

    The result depends on the arguments alone, for one version of PyTorch and number of threads.

    Args:
        quantizer: The quantizer, whose reference is closed.
        plan: The plan.
        text: The rows to train on.
        tokens: The number of tokens to train on.

    Raises:
        SlmError: If the loss becomes NaN or infinite.
    """
    rows = torch.from_numpy(text.rows.astype(np.int64))
    per_update = max(1, UPDATE_TOKENS // rows.shape[1])
    updates = max(1, tokens // (per_update * rows.shape[1]))
    generator = torch.Generator().manual_seed(_SEED)
    target = _Target.of(teacher(quantizer), rows, min(len(rows), updates * per_update), generator, quantizer.progress)
    student = Student(quantizer, plan)
    _train(student, target, updates, per_update, generator, quantizer.progress)
    return student.plan()


@dataclass(frozen=True)
class _Target:
    """The text, and the float model's hidden states on it, which a step multiplies with rows of its head.

    Attributes:
        rows: Tokens (R, T).
        hidden: Hidden states (R, T, D).
        head: The float head (V, D).
        vocabulary: The compared tokens.
    """

    rows: Tensor
    hidden: Tensor
    head: Tensor
    vocabulary: Vocabulary

    @classmethod
    @torch.no_grad()
    def of(cls, model: CausalLM, rows: Tensor, count: int, generator: torch.Generator, progress: Progress) -> "_Target":
        """Runs the float model over `count` rows (R, T), drawn without replacement."""
        rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
        found = []
        progress.start("float model", len(rows), "rows")
        for part in rows.split(_TEACHER_ROWS):
            found.append(model.model(part))
            progress.advance(len(part))
        progress.finish()
        hidden, head = torch.cat(found), model.lm_head.weight.detach()
        return cls(rows, hidden, head, Vocabulary.of(head, hidden.flatten(0, 1), rows.unique(), generator))


def _train(
    student: Student,
    target: _Target,
    updates: int,
    per_update: int,
    generator: torch.Generator,
    progress: Progress,
) -> None:
    groups = [
        {"params": [product.change for product in student.products], "rate": SCALE_RATE},
        {"params": student.norms, "rate": NORM_RATE},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=_BETAS, fused=True)
    kept = target.vocabulary.kept
    wanted_kept, found_kept = target.head[kept], student.head[kept]
    student.model.train()
    progress.start("refine", updates, "updates")
    order = torch.empty(0, dtype=torch.int64)
    for update in range(updates):
        while len(order) < per_update:  # another epoch
            order = torch.cat([order, torch.randperm(len(target.rows), generator=generator)])
        some, order = order[:per_update], order[per_update:]
        tokens, added = target.vocabulary.drawn(generator)
        drawn = tokens[len(kept) :]
        wanted, found = (
            torch.cat([table_kept, table[drawn]])
            for table_kept, table in ((wanted_kept, target.head), (found_kept, student.head))
        )
        logits = student.hidden(target.rows[some]).flatten(0, 1) @ found.T + added
        loss = divergence(target.hidden[some].flatten(0, 1) @ wanted.T + added, logits)
        if not math.isfinite(loss.item()):
            raise SlmError("refinement diverged: the loss is not finite", "omit --refine")
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * _share(update, updates)
        optimizer.step()
        student.bound()
        progress.advance(kl=f"{loss.item():.4f}")
    progress.finish()


def _share(update: int, updates: int) -> float:
    """Returns the share of the learning rate for an update: it rises, and then falls to 0 as a cosine."""
    rising = (update + 1) / max(1.0, _WARMUP * updates)
    return min(1.0, rising) * (0.5 + 0.5 * math.cos(math.pi * update / updates))
