"""Numerical comparison of a trimmed checkpoint with its source in PyTorch, and bits per byte of both.

Both models read the same tokens, which all stay in the vocabulary. Their layers and embedding rows are the same numbers, so the
hidden states and the logits of the kept tokens may differ only by the order in which float32 products are summed.

Dimensions: T positions, D hidden, K kept tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.nn.decoder import TorchDecoder
from slm.core.progress import Progress
from slm.core.text.cuts import PieceEncoder
from slm.core.tokenizer import Tokenizer
from slm.export.parity import TOLERANCE
from slm.runtime.evaluate import Measurement, evaluate_documents
from slm.runtime.model import Model

# Positions whose logits are computed at a time: 64 rows of 262,144 logits are 64 MiB.
_POSITIONS = 64
# Positions beyond the window that are compared.
_BEYOND = 64
# Unit roundoff of float32.
_UNIT = 2.0**-24

Array = NDArray[Any]


@dataclass(frozen=True)
class TrimParity:
    """The comparison of a trimmed model with its source.

    Attributes:
        positions: Number of compared positions.
        equal: Whether all logits of kept tokens are equal bit for bit.
        max_abs_difference: The largest difference of a logit.
        limit_share: The largest difference as a share of its limit, 2 D 2^-24 times the sum of the absolute products of the
            logit, plus the effect of the difference of the hidden states. Rounding errors of two sums of D products are below
            it in any order (Higham 2002, section 3.1).
        bits_per_byte: Bits per byte of the source and of the trimmed model, on the same texts; None if a tokenizer does not
            allow an exact count.
    """

    positions: int
    equal: bool
    max_abs_difference: float
    limit_share: float
    bits_per_byte: tuple[float | None, float | None]


def compare_trimmed(
    source: Path,
    trimmed: Path,
    tokenizers: tuple[Tokenizer, Tokenizer],
    kept: Array,
    texts: Sequence[str],
    progress: Progress,
) -> TrimParity:
    """Compares the logits of kept tokens on texts, and measures both models on the texts; one model is loaded at a time.

    Args:
        source: The checkpoint.
        trimmed: The trimmed checkpoint.
        tokenizers: Those of the source and of the trimmed checkpoint.
        kept: The id in the source of each token of the trimmed vocabulary.
        texts: Held-out texts.
        progress: Receives the progress of the measurements.

    Raises:
        SlmError: If hidden states or logits differ by more than rounding.
    """
    new = {int(old): number for number, old in enumerate(kept)}
    encode = PieceEncoder(tokenizers[0]).encode
    read = [i for text in texts for i in (*tokenizers[0].prefix_ids, *encode(text)) if i in new]
    model = load_checkpoint(source)
    length = min(len(read), model.config.sliding_window + _BEYOND, model.config.max_position_embeddings)
    ids = read[:length]
    hidden, logits = _outputs(model, ids, torch.from_numpy(kept))
    before = _bits_per_byte(model, tokenizers[0], texts, progress)
    del model
    model = load_checkpoint(trimmed)
    theirs, their_logits = _outputs(model, [new[i] for i in ids], None)
    after = _bits_per_byte(model, tokenizers[1], texts, progress)
    moved = (theirs - hidden).abs()
    if not moved.max() <= TOLERANCE * max(1.0, float(hidden.abs().max())):
        raise SlmError(f"the hidden states differ from the source's by {moved.max():.2g}", "nothing was written")
    equal = bool(torch.equal(their_logits, logits))
    difference, share = _differences(model, hidden, moved, their_logits.sub_(logits).abs_())
    if not share <= 1:
        raise SlmError(
            f"logits of kept tokens differ from the source's by up to {difference:.2g}, {share:.3g} times the limit",
            "nothing was written",
        )
    return TrimParity(length, equal, difference, share, (before, after))


def _differences(model: CausalLM, hidden: Tensor, moved: Tensor, differences: Tensor) -> tuple[float, float]:
    """Returns the largest difference of logits, and the largest share of its limit.

    Args:
        model: The trimmed model.
        hidden: The source's hidden states (T, D).
        moved: Absolute differences of the hidden states (T, D).
        differences: Absolute differences of the logits (T, K).
    """
    rows, share = model.lm_head.weight.detach().abs(), 0.0
    effect = moved + 2 * hidden.shape[1] * _UNIT * hidden.abs()
    for part, difference in zip(effect.split(_POSITIONS), differences.split(_POSITIONS), strict=True):
        limit = (part @ rows.T).clamp_(min=torch.finfo(torch.float32).tiny)  # (64, K)
        share = max(share, float((difference / limit).max()))
    return float(differences.max()), share


@torch.no_grad()
def _outputs(model: CausalLM, ids: Sequence[int], kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns hidden states (T, D) and the logits of the kept tokens (T, K)."""
    hidden = model.model(torch.tensor([ids]))[0]
    logits = [
        model.lm_head(part) if kept is None else model.lm_head(part)[:, kept] for part in hidden.split(_POSITIONS)
    ]
    return hidden, torch.cat(logits)


def _bits_per_byte(model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], progress: Progress) -> float | None:
    loaded = Model(tokenizer, TorchDecoder(model), model.config.stop_token_ids)
    measured: Measurement = evaluate_documents(loaded, texts, progress)
    return measured.bits_per_byte
