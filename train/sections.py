"""The sections of a recipe: what each value means, its unit and its default."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from slm.core.config import ModelConfig, layer_pattern
from slm.core.errors import SlmError
from slm.core.presets import preset
from slm.core.qat import GRIDS, QatGrid, QatPrecision
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES
from slm.train.choices import LogName, ParallelName, PrecisionName, Sampler
from slm.train.data.corpus import SAMPLE
from slm.train.schedule import Shape

# Fields of the model that a recipe may set: the special ids come from the tokenizer.
MODEL_FIELDS = [name for name in ModelConfig.model_fields if not name.endswith("_token_id")]
Share = Annotated[float, Field(ge=0, lt=1)]


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _whole_or_auto(value: Any) -> Any:
    # The recipe accepts "auto" before this is called.
    if isinstance(value, str) and not value.strip().removeprefix("-").isdecimal():
        raise ValueError('must be a whole number or "auto"')
    return value


# One name, or several.
LogNames = Annotated[tuple[LogName, ...], BeforeValidator(_several)]


class Section(BaseModel):
    """A section of a recipe: frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(Section):
    """The data.

    Attributes:
        train: Training text: files or directories, or one name such as "sample" or "tinystories".
        validation: Validation text: a file or directory. None uses the corpus's own split, or holds out its last documents.
        tokenizer: "gpt2", "bpe" to learn one from the training text, or the path of a `tokenizer.json`.
        sampler: How rows are drawn from the stream of tokens: "random" draws windows anywhere in it; "packed" cuts the stream
            into rows, differently in every epoch, and reads each once in random order; "best_fit" packs whole documents into
            rows (arXiv:2404.10830), which do not attend to each other.
        column: Name of the field that holds the text, in rows.
        max_document_bytes: Maximum UTF-8 bytes of a row, and of a document if the tokenizer needs whole documents.
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
        return _several(value)


class ModelRecipe(BaseModel):
    """The model: a preset, and any field of `ModelConfig` that differs from it.

    Attributes:
        preset: Name of a shape in `slm.core.presets`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    further_names: ClassVar = MODEL_FIELDS

    preset: str

    def config(self) -> ModelConfig:
        """Returns the shape, without the special ids, which come from the tokenizer.

        Raises:
            SlmError: When the preset or a field is unknown, or the fields do not fit together.
        """
        fields = dict(self.model_extra or {})
        unknown = sorted(fields.keys() - set(MODEL_FIELDS))
        if unknown:
            raise SlmError(
                f"the recipe's model has no {unknown[0]!r}", f"there is {', '.join(['preset', *MODEL_FIELDS])}"
            )
        if isinstance(fields.get("num_hidden_layers"), int):  # the validation rejects anything else
            fields.setdefault("layer_types", layer_pattern(fields["num_hidden_layers"]))
        if "head_dim" in fields:  # the scale of attention scores follows the head width unless it is set
            fields.setdefault("query_pre_attn_scalar", fields["head_dim"])
        return ModelConfig.checked(preset(self.preset).model_dump() | fields)


class BatchRecipe(Section):
    """The size of micro-steps and updates.

    Attributes:
        batch_size: Windows in a micro-step, over all processes. "auto" chooses the most that fit into memory, and cuts the
            update of batch_size x accumulation windows accordingly: `--set batch.batch_size=auto` keeps the recipe's update. In
            a file, "auto" stands for 1, so that `accumulation` is the windows of an update, and the schedule counts windows.
        context: Tokens in a window.
        accumulation: Micro-steps whose gradients are averaged into one update.
        first_context: Length of the rows with which training begins (arXiv:2108.06084); the windows of a micro-step are cut
            into rows of this length, which doubles in equal steps up to `context`. None disables it.
        context_warmup: Share of the run after which rows have the length `context`.
        automatic: Whether batch_size is still to be chosen so; a run's config.yaml has the choice.
    """

    batch_size: Annotated[int, BeforeValidator(_whole_or_auto)] = Field(gt=0)
    context: int = Field(gt=1)
    accumulation: int = Field(default=1, gt=0)
    first_context: int | None = Field(default=None, gt=1)
    context_warmup: float = Field(default=0.3, gt=0, le=1)
    automatic: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.contexts[-1] != self.context:
            raise ValueError(
                f"batch.context of {self.context} is not batch.first_context of {self.first_context} times 2, 4, 8, …"
            )
        return self

    @property
    def contexts(self) -> tuple[int, ...]:
        """The lengths of rows in the order in which training uses them."""
        lengths = [self.first_context or self.context]
        while lengths[-1] < self.context:
            lengths.append(2 * lengths[-1])
        return tuple(lengths)

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("batch_size") == "auto":
            return {**values, "batch_size": 1, "automatic": True}
        return values


class OptimizerRecipe(Section):
    """AdamW (arXiv:1711.05101), or Muon (arXiv:2502.16982) for the blocks' matrices and AdamW for the rest.

    Attributes:
        name: "adamw", "muon", or "normuon": Muon whose steps are normalized row by row (arXiv:2510.05491).
        betas: Decay of AdamW's two moments; 0.95 for the second, as language models usually have it.
        embedding_betas: The same for embedding and head; None uses `betas`. nanochat and modded-nanogpt use shorter memories.
        norm_betas: The same for the norms; None uses `betas`.
        eps: Term added to the root of the second moment.
        weight_decay: Share of a weight subtracted at every update, times the learning rate.
        decay: Parameters that decay: "matrices", as in GPT-2 and its successors, or "all", as by default in PyTorch.
        cautious: Whether a weight decays only in updates that move it towards 0 anyway (arXiv:2510.12402).
        decay_shape: "constant", or "linear": `weight_decay` falls along a straight line to 0 at the end, as in nanochat.
        max_grad_norm: The gradient is scaled down to this norm (arXiv:1211.5063).
        momentum: Decay of Muon's momentum.
        momentum_start: Decay of Muon's momentum at the first update, if it warms up; modded-nanogpt's value.
        momentum_warmup: Share of the run in which the momentum rises from `momentum_start` to `momentum`; 0 disables it.
        row_beta: Decay of the second moment of each row in "normuon".
        matrix_rate: Learning rate of the blocks' matrices, as a multiple of the schedule's.
        embedding_rate: Learning rate of embedding and head, as a multiple of the schedule's.
        ema: Decay per update of a moving average of the weights (arXiv:2407.20323). Evaluations and checkpoints then use the
            average; 0 disables it.
        tail: Share of the run, at its end, over which evaluations and checkpoints use the mean of the weights after every
            update (arXiv:1803.05407, arXiv:2306.03241); 0 disables it.
    """

    name: Literal["adamw", "muon", "normuon"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.95)
    embedding_betas: tuple[Share, Share] | None = None
    norm_betas: tuple[Share, Share] | None = None
    eps: float = Field(default=1e-9, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    cautious: bool = False
    decay_shape: Literal["constant", "linear"] = "constant"
    max_grad_norm: float = Field(default=1.0, gt=0)
    momentum: Share = 0.95
    momentum_start: Share = 0.85
    momentum_warmup: Share = 0.0
    row_beta: Share = 0.95
    matrix_rate: float = Field(default=1.0, gt=0)
    embedding_rate: float = Field(default=1.0, gt=0)
    ema: Share = 0.0
    tail: Share = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ema and self.tail:
            raise ValueError("optimizer.ema and optimizer.tail are two averages of the weights; set one of them to 0")
        return self

    @property
    def orthogonalizes(self) -> bool:
        """Whether Muon or a variant of it moves the blocks' matrices."""
        return self.name != "adamw"

    @property
    def averages(self) -> bool:
        """Whether evaluations and checkpoints use an average of the weights."""
        return bool(self.ema or self.tail)


class ScheduleRecipe(Section):
    """The length of the run and its learning rate; see `slm.train.schedule`.

    Attributes:
        micro_steps: Length of the run, rounded down to whole updates.
        epochs: Length in passes over the training text, instead of `micro_steps`.
        warmup_micro_steps: Length of the linear warm-up.
        learning_rate: Learning rate at the end of the warm-up.
        start: Rate at which the warm-up begins, as a share of `learning_rate`.
        shape: Shape after the warm-up: "cosine", "wsd" (warm-up, stable, decay) or "constant".
        decay: Share of the run, at its end, in which "wsd" decays.
        final_learning_rate: Learning rate at the end of the run; 0 is reached one update later.
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
    """Regularization, against memorizing a small text.

    Attributes:
        dropout: Share of the outputs of the embedding and of every sub-layer that a training step zeroes (arXiv:1207.0580).
    """

    dropout: Share = 0.0


class DistillationRecipe(Section):
    """Distillation (arXiv:1503.02531): trained models whose mean prediction is a part of the targets.

    Attributes:
        teachers: Checkpoints with the tokenizer of the run; none disables distillation.
        weight: Share of the teachers in the targets; the rest is the token of the text.
    """

    teachers: tuple[str, ...] = ()
    weight: float = Field(default=0.5, gt=0, le=1)

    @field_validator("teachers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return _several(value)


class QatRecipe(Section):
    """Quantization-aware training (arXiv:1712.05877): products compute with the values of the quantized bundle.

    Attributes:
        precision: "int8" or "int4", for the grid of `slm quantize --int8` or `--int4`; "none" trains in floats.
        start: Share of the run after which rounding begins. Evaluations and checkpoints are rounded from the beginning.
    """

    precision: Literal["none"] | QatPrecision = "none"
    start: Share = 0.0

    @property
    def grid(self) -> QatGrid | None:
        """The grid; None without quantization-aware training."""
        return None if self.precision == "none" else GRIDS[self.precision]


class EvaluationRecipe(Section):
    """Evaluations during the run.

    Attributes:
        every_micro_steps: Interval; an evaluation follows the update that reaches a multiple of it.
        windows: Number of windows of held-out text, evenly spaced and always the same.
        context: Tokens in such a window; None uses `batch.context`. Only losses with the same context are comparable.
        patience: Number of evaluations without a new best after which the run ends; None disables early stopping.
        prompts: Prompts for sample texts at every evaluation.
        sample_tokens: Tokens per sample text.
    """

    every_micro_steps: int = Field(gt=0)
    windows: int = Field(default=256, gt=0)
    context: int | None = Field(default=None, gt=1)
    patience: int | None = Field(default=None, gt=0)
    prompts: tuple[str, ...] = ()
    sample_tokens: int = Field(default=60, gt=0)


class CheckpointRecipe(Section):
    """Checkpoints besides the best and the last.

    Attributes:
        every_updates: Interval at which the run is saved with a numbered checkpoint; None disables them.
        keep: Number of numbered checkpoints to keep, the newest ones.
        asynchronous: Whether a thread writes the files while training goes on, from a copy of weights and moments in main
            memory.
    """

    every_updates: int | None = Field(default=None, gt=0)
    keep: int = Field(default=3, gt=0)
    asynchronous: bool = False


class SpikesRecipe(Section):
    """Loss spikes; see `slm.train.spikes`.

    Attributes:
        action: "skip" leaves an update out that spikes; "rewind" goes back to the last multiple of `every_updates`, and leaves
            the data after it out, up to the spike; "none" makes every update with a finite loss.
        threshold: Standard deviations of the noise above the median, of the loss or of the gradient norm's logarithm.
        window: Updates in the median; the first quarter of them is not judged.
        every_updates: Interval between the saves to which "rewind" goes back.
        limit: The most spikes within 1,000 updates; one more stops the run.
    """

    action: Literal["none", "skip", "rewind"] = "none"
    threshold: float = Field(default=8.0, gt=0)
    window: int = Field(default=128, ge=8)
    every_updates: int = Field(default=100, gt=0)
    limit: int = Field(default=10, gt=0)


class WatchdogRecipe(Section):
    """Warnings about a run that becomes slow or stops; see `slm.train.watchdog`.

    Attributes:
        slow_share: The run is slow below this share of its own median tokens per second.
        slow_minutes: Time of training over which it is slow before a warning; None disables the warning.
        hang_minutes: How long no micro-step, evaluation batch or save ends before a warning; None disables it.
        abort: Whether a process that hangs prints the stacks of its threads and ends, so that torchrun restarts it.
    """

    slow_share: float = Field(default=0.5, gt=0, lt=1)
    slow_minutes: float | None = Field(default=10.0, gt=0)
    hang_minutes: float | None = Field(default=15.0, gt=0)
    abort: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.abort and self.hang_minutes is None:
            raise ValueError("watchdog.abort needs watchdog.hang_minutes")
        return self


class MachineRecipe(Section):
    """The machine, and trade-offs of time and memory. Results depend on these settings only by rounding.

    Attributes:
        device: "auto" uses CUDA if available.
        precision: Type of the products; `slm.train.precision.choose_precision` resolves "auto".
        compile: Whether torch.compile fuses the operations between products; on a CPU it needs a C++ compiler.
        gradient_checkpointing: Whether the backward pass recomputes each layer (arXiv:1604.06174): a third more work, much
            less memory.
        attention: Kernel for windows shorter than the context: "sdpa" masks scores, "flex" skips them and needs CUDA; "auto"
            uses flex on GPUs whose shared memory holds its tiles (`slm.core.nn.kernels.fits_flex`).
        parallel: Parallelism of several processes: "ddp", or "fsdp" for a model that does not fit into one device.
        loss_chunk: Positions whose logits exist at once; None uses as many as fit into 128 MiB.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: PrecisionName = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    parallel: ParallelName = "ddp"
    loss_chunk: int | None = Field(default=None, gt=0)
