"""The divergence of a student's predictions from a teacher's, without the logits of a whole batch; see `slm.train.loss`.

Dimensions: N positions, D hidden of the student, E hidden of the teacher, V vocabulary of the student, U ids that both have.
"""

import torch
from torch import Tensor

from slm.train.loss import cached_rows


class TeacherTargets:
    """The predictions of a teacher as targets of `slm.train.loss.linear_loss`.

    The loss of a position is KL(teacher || student) = sum of p (log p - log q) in nats, with the teacher's probabilities p and
    the student's q (arXiv:1503.02531, at temperature 1). If the teacher's vocabulary is longer, which is padding, p is
    normalized over the ids that both have; ids that only the student has count in q.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        """Takes a teacher's last hidden states and its head.

        Args:
            hidden: Hidden states (N, E) at the positions of the student.
            weight: The rows (U, E) of the head for the ids that both have.
        """
        self._hidden, self._weight = hidden, weight

    def count(self) -> Tensor:
        """Returns the number of positions."""
        return torch.tensor(max(1, len(self._hidden)), device=self._hidden.device)

    def compare(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns the sum of the divergences, and overwrites the logits with their gradient; see `slm.train.loss.Targets`."""
        wanted = self._hidden[rows].to(dtype) @ self._weight.to(dtype).T  # (n, U)
        step, shared = max(1, cached_rows(logits)), len(self._weight)
        total = logits.new_zeros((), dtype=torch.float32)
        for first in range(0, len(logits), step):
            block = logits[first : first + step]
            teacher = wanted[first : first + step].float().log_softmax(-1)  # (n, U)
            student = block.float().log_softmax(-1)  # (n, V)
            share = teacher.exp()
            total += (share * teacher.sub_(student[:, :shared])).sum()
            student.exp_()[:, :shared] -= share
            block.copy_(student)
        return total
