"""Loss on fixed windows of held-out text.

Dimensions: B windows, T positions, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.core.nn import CausalLM
from slm.train.data.tokens import Tokens
from slm.train.data.windows import fixed_starts, gather

# Called where a run may be stopped: it raises then.
Check = Callable[[], None]


@dataclass(frozen=True)
class Evaluation:
    """A model measured on held-out text.

    Attributes:
        loss: Mean cross-entropy, in nats a token.
        bits_per_byte: The same by byte of text: comparable between tokenizers.
        tokens: How many predictions were measured.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))  # a model that diverged does not overflow a float


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy of logits (B, T, V) for targets (B, T), computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Returns nats a token as bits a byte of the text that the tokens encode, end-of-text counted among the tokens."""
    return loss * tokens / (math.log(2) * text_bytes)


@torch.inference_mode()
def evaluate(
    model: CausalLM, tokens: Tokens, *, windows: int, context: int, batch_size: int, check: Check
) -> Evaluation:
    """Measures a model in float32, as exported graphs are measured.

    Args:
        model: The model, on its device.
        tokens: Held-out text, longer than `context`.
        windows: How many windows to measure, evenly spread and always the same ones.
        context: T.
        batch_size: B.
        check: Called between batches; may raise to stop.
    """
    device = next(model.parameters()).device
    starts = fixed_starts(len(tokens.ids), windows, context)
    model.eval()
    total = 0.0
    for first in range(0, len(starts), batch_size):
        check()
        inputs, targets = gather(tokens.ids, starts[first : first + batch_size], context, device)
        total += cross_entropy(model(inputs), targets).item() * len(inputs)
    model.train()
    loss = total / len(starts)
    header = tokens.header
    return Evaluation(loss, bits_per_byte(loss, header.tokens, header.text_bytes), len(starts) * context)
