"""Refinement: training of a plan's scales and norms, which is kept only if it helps on held-back rows.

The training needs PyTorch, and quantization does not: `slm.refine` trains, and the command line passes it in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from slm.core.errors import SlmError
from slm.quantize.plan import QuantizationPlan
from slm.quantize.quantizer import Quantizer
from slm.quantize.results import Refined
from slm.quantize.texts import TokenRows

# Trains a plan on rows of text, for a number of tokens. Returns the plan with other scales and norms.
Train: TypeAlias = Callable[[Quantizer, QuantizationPlan, TokenRows, int], QuantizationPlan]

# The number of held-back tokens, and the largest share of the rows that they can be.
HELD_BACK_TOKENS = 2048
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class Refinement:
    """A training, and its text.

    Attributes:
        train: Trains a plan.
        text: The rows to train on.
        held_back: The rows on which the plans before and after training are compared.
        tokens: The number of tokens to train on. Training repeats a shorter text.
    """

    train: Train
    text: TokenRows
    held_back: TokenRows
    tokens: int

    @classmethod
    def on(cls, text: TokenRows, train: Train, tokens: int) -> "Refinement":
        """Returns a refinement on a text, whose last rows are held back.

        Raises:
            SlmError: If the text has a single row.
        """
        rows, row_tokens = text.rows.shape
        if rows < 2:
            raise SlmError(
                f"{text.name} has too little text for --refine, which needs at least two rows of {row_tokens} tokens",
                "use a longer --calibration text, or a smaller --window",
            )
        held_back = max(1, min(HELD_BACK_TOKENS // row_tokens, int(rows * _LARGEST_SHARE)))
        return cls(train, text.first(rows - held_back, row_tokens), text.after(rows - held_back), tokens)

    def unread(self, calibration: TokenRows) -> TokenRows:
        """Returns the rows of a calibration text that are not held back. Other steps must not fit the held-back rows."""
        if calibration.rows.shape[1] != self.held_back.rows.shape[1]:
            return calibration
        kept = [row for row in calibration.rows if not (row == self.held_back.rows).all(axis=1).any()]
        return TokenRows(calibration.name, np.array(kept)) if kept else self.text


def refined(quantizer: Quantizer, plan: QuantizationPlan, refinement: Refinement) -> QuantizationPlan:
    """Returns the trained plan if its divergence on the held-back rows is lower, otherwise the plan. Records both figures."""
    held_back, progress = refinement.held_back, quantizer.progress
    before = quantizer.kl_nats(plan, held_back)
    quantizer.reference.close()  # training needs its memory
    trained = refinement.train(quantizer, plan, refinement.text, refinement.tokens)
    after = quantizer.kl_nats(trained, held_back)
    kept = after < before  # false for NaN
    count = held_back.rows.size
    progress.note(
        f"refinement: KL divergence {after:.4f} nats on {count:,} held-back tokens, {before:.4f} before"
        + ("" if kept else "; the weights before are kept")
    )
    result = Refined(refinement.tokens, count, before, after, kept)
    return replace(trained if kept else plan, refinement=result)
