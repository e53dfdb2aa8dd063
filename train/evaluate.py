"""The loss on fixed windows of held-out text.

Dimensions: B windows, T positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from slm.core.windows import fixed_starts
from slm.train.data.tokens import Tokens
from slm.train.data.windows import gather
from slm.train.parallel import Alone, Processes

# Called where a run can be stopped; raises to stop it.
Check = Callable[[], None]


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on held-out text.

    Attributes:
        loss: Mean cross-entropy, in nats per token.
        bits_per_byte: The same in bits per byte of text, which is comparable between tokenizers.
        tokens: Number of predictions.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))  # the loss of a diverged model must not overflow a float


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Converts nats per token to bits per byte of the text that the tokens encode; end-of-text counts as a token."""
    return loss * tokens / (math.log(2) * text_bytes)


@torch.no_grad()
def evaluate(
    objective: nn.Module,
    tokens: Tokens,
    *,
    windows: int,
    context: int,
    batch_size: int,
    check: Check,
    processes: Processes | None = None,
) -> Evaluation:
    """Evaluates a model in float32, as exported graphs are evaluated.

    Args:
        objective: Returns the loss of a batch; its model is on its device.
        tokens: Held-out tokens, more than `context`.
        windows: Number of windows, evenly spaced and always the same.
        context: T.
        batch_size: B.
        check: Called between batches; may raise to stop.
        processes: The processes that share the batches; each gets the result.
    """
    processes = processes or Alone()
    device = next(objective.parameters()).device
    starts = fixed_starts(len(tokens.ids), windows, context)
    batches = [starts[first : first + batch_size] for first in range(0, len(starts), batch_size)]
    sums = [0.0] * len(batches)
    objective.eval()
    with processes.gathered(objective):
        # Every process makes the same number of turns, because with FSDP each needs the others' weights.
        for turn in range(-(-len(batches) // processes.size)):
            check()
            number = turn * processes.size + processes.rank
            inputs, targets = gather(tokens.ids, batches[min(number, len(batches) - 1)], context, device)
            loss = objective(inputs, targets).item()
            if number < len(batches):
                sums[number] = loss * len(inputs)
    objective.train()
    loss = sum(processes.total(sums)) / len(starts)
    header = tokens.header
    return Evaluation(loss, bits_per_byte(loss, header.tokens, header.text_bytes), len(starts) * context)
