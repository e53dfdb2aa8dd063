"""The settings of fine-tuning and their defaults."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slm.core.config import ModelConfig, first_mistake
from slm.core.errors import SlmError
from slm.core.qat import GRIDS, QatGrid, QatPrecision
from slm.core.task import MetricName

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Default length at which rows are cut: answers are short, and memory grows with the longest row.
DEFAULT_MAX_LENGTH = 512
# Rows below which a file counts as small: every row is to be learned, and the defaults give more updates.
FEW = 200
# Ratio of the rate for all weights to that for an adapter, according to "LoRA Without Regret".
_FULL = 0.1
# Ratio of the rate for preferences to that for answers: their gradient does not vanish when the answers are likely.
_PREFERENCES = 0.1


class FinetuneSettings(BaseModel):
    """Hyperparameters of fine-tuning, by low-rank adaptation (arXiv:2106.09685) or of all weights.

    None means that the value follows from the model or the data; see `resolved`.

    Attributes:
        method: "lora" trains an adapter, "full" every weight.
        rank: Columns of A and rows of B; 8 as in the paper's GPT-3 runs.
        alpha: The update is scaled by alpha / rank.
        rslora: Scale by alpha / sqrt(rank) instead, so that the update does not shrink with the rank (arXiv:2312.03732).
        dora: Train the norm of each row of the adapted matrices separately from its direction (arXiv:2402.09353).
        dropout: Share of the adapter's inputs that a training step zeroes.
        target_modules: The projections that get an adapter. All seven: attention alone learns less for the same number
            of parameters (arXiv:2305.14314, section 4).
        learning_rate: Peak learning rate of AdamW.
        epochs: Passes over the rows.
        keep: The epoch to keep: "best", the one with the highest score of `metric`, or else with the lowest loss on the
            held-out rows; or "last".
        metric: Score of the greedy replies to the measured rows after each epoch; None measures the loss only.
        metric_rows: The most rows that are answered for `metric`, evenly spread over the measured rows.
        patience: Epochs without a new best after which training ends; None disables early stopping, as keep="last" does.
        batch_size: Rows per update: 8, or 4 for fewer than `FEW` examples, which gives more updates for the same work.
        pack: Pack as many examples into a row as fit into `max_length`; they do not attend to each other.
        max_length: Maximum tokens of a row, including special tokens.
        max_grad_norm: The gradient is scaled down to this norm (arXiv:1211.5063).
        skip_spikes: Whether an update is left out whose loss or gradient norm is far above those before it
            (`slm.train.spikes`).
        qat: Quantization-aware training for the grid of `slm quantize --int8` or `--int4`; "none" trains in floats.
        beta: For preferences, how strongly the model is kept near the base; see `slm.finetune.preference`.
        seed: Seed of the adapter's initial weights, dropout, the order of the rows, and the held-out rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096)
    alpha: int = Field(default=16, gt=0, le=1_000_000)
    rslora: bool = False
    dora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[Projection, ...] = Field(default=PROJECTIONS, min_length=1)
    learning_rate: float | None = Field(default=None, gt=0, le=100)
    epochs: int | None = Field(default=None, ge=1, le=1_000_000)
    keep: Literal["best", "last"] = "best"
    metric: MetricName | None = None
    metric_rows: int = Field(default=200, ge=1, le=1_000_000)
    patience: int | None = Field(default=3, ge=1, le=1_000_000)
    batch_size: int | None = Field(default=None, ge=1, le=65_536)
    pack: bool = False
    max_length: int | None = Field(default=None, ge=2)
    max_grad_norm: float = Field(default=1.0, gt=0)
    skip_spikes: bool = False
    qat: Literal["none"] | QatPrecision = "none"
    beta: float = Field(default=0.1, gt=0, le=100)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qat != "none" and self.dropout:
            raise ValueError("dropout is not supported with qat, which rounds an adapter together with its base")
        return self

    @property
    def grid(self) -> QatGrid | None:
        """The grid of quantization-aware training; None without it."""
        return None if self.qat == "none" else GRIDS[self.qat]

    @classmethod
    def checked(cls, **fields: object) -> Self:
        """Returns validated settings; raises the first mistake as an SlmError."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise SlmError(f"the fine-tuning settings are wrong: {first_mistake(error)}") from None

    def resolved(
        self, config: ModelConfig, examples: int, rows: int | None = None, *, preferences: bool = False
    ) -> "FinetuneSettings":
        """Returns the settings with all defaults resolved.

        Args:
            config: The model's shape.
            examples: Number of training examples.
            rows: Number of rows that they are packed into; None if they are not packed.
            preferences: Whether they are preferences.
        """
        rows = rows or examples
        rate = default_learning_rate(config.hidden_size, examples) * (1.0 if self.method == "lora" else _FULL)
        rate *= _PREFERENCES if preferences else 1.0
        batch_size = self.batch_size or (4 if examples < FEW else 8)
        return self.model_copy(
            update={
                "learning_rate": self.learning_rate or rate,
                "batch_size": batch_size,
                "epochs": self.epochs or default_epochs(rows, batch_size, examples),
                "max_length": self.context(config),
            }
        )

    def context(self, config: ModelConfig) -> int:
        """Returns the maximum tokens of a row."""
        return self.max_length or min(config.max_position_embeddings, DEFAULT_MAX_LENGTH)


def default_learning_rate(hidden_size: int, examples: int) -> float:
    """Returns the peak rate for a width: 4.3e-3 at 128, 1.2e-3 at 640; twice that for few examples.

    The fit that "LoRA Without Regret" (Schulman et al., 2025) gives for Llama at any rank: ten times the rate of full
    fine-tuning, falling with the width; it finds higher rates better for short runs. Their models are wider than 2,000. At 128,
    with 87 instructions and rates from 1e-3 to 1.6e-2, a well-trained base did best at 4e-3, a less trained one at 8e-3.
    At 256, twice the rate taught 58 of 60 answers in 300 updates, and the rate itself 49 (docs/LOG.md).
    """
    return 5e-4 * (2000 / hidden_size) ** 0.781 * (2 if examples < FEW else 1)


def default_epochs(rows: int, batch_size: int, examples: int) -> int:
    """Returns three epochs, or as many as make 150 updates; of few examples 400: 27 epochs for 60 rows in batches of 4.

    More than 40 epochs only if they make fewer than 100 updates.

    Args:
        rows: Number of rows, each of one example or of several that are packed.
        batch_size: Rows per update.
        examples: Number of examples.
    """
    updates = math.ceil(rows / batch_size)
    wanted = 400 if examples < FEW else 150
    return max(3, min(round(wanted / updates), max(40, round(100 / updates))))
