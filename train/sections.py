"""The sections of a recipe: what each value means, its unit and its default."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slm.core.config import ModelConfig, layer_pattern
from slm.core.errors import SlmError
from slm.core.presets import preset
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES
from slm.train.choices import ParallelName, PrecisionName, Sampler
from slm.train.data.corpus import SAMPLE
from slm.train.schedule import Shape

# What a recipe may say of the model: the special tokens' ids come with the tokenizer.
MODEL_FIELDS = [name for name in ModelConfig.model_fields if not name.endswith("_token_id")]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Values that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(Section):
    """What is trained on.

    Attributes:
        train: Files, directories, or "sample" or "tinystories" alone.
        validation: File or directory measured on; None takes the corpus's own split or holds out its last documents.
        tokenizer: "gpt2", "bpe" to learn one from the training text, or the path of a `tokenizer.json`.
        sampler: How rows are drawn from the stream of tokens: "random" windows anywhere in it, or "packed", where every
            epoch cuts the stream into rows anew and goes through them once in another order.
        column: What the text is called in rows.
        max_document_bytes: Bytes of UTF-8 that a row may have, and a document of a tokenizer that takes them whole.
    """

    train: tuple[str, ...] = Field(default=(SAMPLE,), min_length=1)
    validation: str | None = None
    tokenizer: str = "bpe"
    sampler: Sampler = "random"
    column: str = Field(default=TEXT_COLUMN, min_length=1)
    max_document_bytes: int = Field(default=DOCUMENT_BYTES, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class ModelRecipe(BaseModel):
    """The model: a preset, and any field of `ModelConfig` that is to differ from it.

    Attributes:
        preset: Name of a shape in `slm.core.presets`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    preset: str

    def config(self) -> ModelConfig:
        """Returns the shape; the special tokens' ids come with the tokenizer.

        Raises:
            SlmError: When the preset or a field is unknown, or the fields do not fit together.
        """
        fields = dict(self.model_extra or {})
        unknown = sorted(fields.keys() - set(MODEL_FIELDS))
        if unknown:
            raise SlmError(
                f"the recipe's model has no {unknown[0]!r}", f"there is {', '.join(['preset', *MODEL_FIELDS])}"
            )
        if isinstance(fields.get("num_hidden_layers"), int):  # anything else is for the validation to refuse
            fields.setdefault("layer_types", layer_pattern(fields["num_hidden_layers"]))
        if "head_dim" in fields:  # what scores are divided by is the width of a head, unless somebody says otherwise
            fields.setdefault("query_pre_attn_scalar", fields["head_dim"])
        return ModelConfig.checked(preset(self.preset).model_dump() | fields)


class BatchRecipe(Section):
    """How much is learned from at once.

    Attributes:
        batch_size: Windows of a micro-step, of all processes together.
        context: Tokens of a window.
        accumulation: Micro-steps whose gradients are averaged into one update.
    """

    batch_size: int = Field(gt=0)
    context: int = Field(gt=1)
    accumulation: int = Field(default=1, gt=0)


class OptimizerRecipe(Section):
    """AdamW (arXiv:1711.05101), or Muon (arXiv:2502.16982) for the blocks' matrices and AdamW for the rest.

    Attributes:
        name: "adamw" or "muon".
        betas: Decay of AdamW's two moments; 0.95 for the second, as language models usually have it.
        eps: Added to the root of the second moment.
        weight_decay: Share of a weight taken away at every update, times the learning rate.
        decay: What is decayed: "matrices", as in GPT-2's descendants, or "all", which is PyTorch's default.
        max_grad_norm: The gradient is scaled down to this norm (arXiv:1211.5063).
        momentum: Decay of Muon's momentum.
        matrix_rate: Learning rate of the blocks' matrices, as a multiple of the schedule's.
        embedding_rate: That of embedding and head.
        ema: Decay of a moving average of the weights at every update, which is then what is measured and kept
            (arXiv:2407.20323); 0 keeps none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(default=1e-9, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    max_grad_norm: float = Field(default=1.0, gt=0)
    momentum: Share = 0.95
    matrix_rate: float = Field(default=1.0, gt=0)
    embedding_rate: float = Field(default=1.0, gt=0)
    ema: Share = 0.0


class ScheduleRecipe(Section):
    """Length of the run and its learning rate; see `slm.train.schedule`.

    Attributes:
        micro_steps: Length of the run. What is left over and fills no update is not run.
        epochs: The length in passes over the training text instead; becomes `micro_steps` when that is known.
        warmup_micro_steps: Length of the linear warm-up.
        learning_rate: At the end of the warm-up.
        start: Where the warm-up begins, as a share of `learning_rate`.
        shape: After the warm-up: "cosine", "wsd" (warm-up, stable, decay) or "constant".
        decay: Share of the run, at its end, in which "wsd" decays.
        final_learning_rate: At the end of the run; 0 is reached an update later, for one at a rate of 0 would be none.
    """

    micro_steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    warmup_micro_steps: int = Field(ge=0)
    learning_rate: float = Field(gt=0)
    start: float = Field(default=0.0, ge=0, le=1)
    shape: Shape = "cosine"
    decay: float = Field(default=0.5, gt=0, le=1)
    final_learning_rate: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.micro_steps is None) == (self.epochs is None):
            raise ValueError("the length is either schedule.micro_steps or schedule.epochs; set the other to null")
        return self


class RegularizationRecipe(Section):
    """Against learning a small text by heart.

    Attributes:
        dropout: Share of the embedding's and every sub-layer's outputs that a training step zeroes (arXiv:1207.0580).
    """

    dropout: Share = 0.0


class EvaluationRecipe(Section):
    """How the run is measured.

    Attributes:
        every_micro_steps: Interval; measured after the update that reaches each multiple of it.
        windows: Windows of held-out text: always the same ones, spread evenly.
        context: Tokens of such a window; None takes `batch.context`. Losses compare where it is the same.
        patience: The run ends after so many evaluations without a new best; None goes on to the end.
        prompts: Texts to continue at every evaluation, for people to look at.
        sample_tokens: Length of those continuations.
    """

    every_micro_steps: int = Field(gt=0)
    windows: int = Field(default=256, gt=0)
    context: int | None = Field(default=None, gt=1)
    patience: int | None = Field(default=None, gt=0)
    prompts: tuple[str, ...] = ()
    sample_tokens: int = Field(default=60, gt=0)


class CheckpointRecipe(Section):
    """What is kept beside the best and the last checkpoint.

    Attributes:
        every_updates: Interval at which the run is saved and a numbered checkpoint kept; None keeps none.
        keep: How many numbered checkpoints: the newest ones.
    """

    every_updates: int | None = Field(default=None, gt=0)
    keep: int = Field(default=3, gt=0)


class MachineRecipe(Section):
    """Where it runs, and what is traded there. None of it changes what is learned, but for rounding.

    Attributes:
        device: "auto" takes CUDA where there is any.
        precision: Of the products; "auto" is decided by `slm.train.precision.choose_precision`.
        compile: Whether torch.compile fuses what lies between the products; takes a C++ compiler on a CPU.
        gradient_checkpointing: Whether the backward pass computes each layer anew instead of keeping it
            (arXiv:1604.06174): a third more work, much less memory.
        attention: Of windows shorter than the context: "sdpa" masks scores, "flex" skips them and needs CUDA; "auto"
            takes flex on GPUs whose shared memory holds its tiles (`slm.core.nn.kernels.fits_flex`).
        parallel: With several processes: "ddp", or "fsdp" for a model that does not fit into one device.
        loss_chunk: Positions whose logits exist at once; None takes what fits into 128 MiB.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: PrecisionName = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    parallel: ParallelName = "ddp"
    loss_chunk: int | None = Field(default=None, gt=0)
