"""Results of quantization and of sweeps as data. `quality`, `report` and `sweep` measure them, and `page` renders them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from slm.core.task import MetricName

# The files of a report in a bundle.
REPORT_FILE, PAGE_FILE = "report.json", "report.html"


@dataclass(frozen=True)
class Change:
    """Differences between two bundles, averaged over positions.

    Attributes:
        tokens: Number of compared positions.
        kl_nats: Kullback-Leibler divergence of the new predictions from the old ones, in nats.
        same_top1: Share of positions with the same most likely token.
        same_top5: Mean share of the five most likely tokens that stay among the five most likely.
        perplexity_before: Perplexity of the source on the text.
        perplexity_after: Perplexity of the result on the text.
    """

    tokens: int
    kl_nats: float
    same_top1: float
    same_top5: float
    perplexity_before: float
    perplexity_after: float


@dataclass(frozen=True)
class Divergence:
    """Comparison of two bundles' greedy texts.

    Attributes:
        tokens: The length of each text.
        equal: The number of equal tokens before the first difference, for each prompt.
    """

    tokens: int
    equal: tuple[int, ...]


@dataclass(frozen=True)
class Speeds:
    """Speeds of two bundles in tokens per second, as medians of alternating rounds.

    Attributes:
        prompt: The length of the prompt in tokens.
        decode: Decode speed of the source and of the quantized bundle.
        prefill: Prefill speed of the source and of the quantized bundle.
    """

    prompt: int
    decode: tuple[float, float]
    prefill: tuple[float, float]

    @property
    def decode_ratio(self) -> float:
        """The decode speed of the quantized bundle relative to the source."""
        return self.decode[1] / self.decode[0]

    @property
    def prefill_ratio(self) -> float:
        """The prefill speed of the quantized bundle relative to the source."""
        return self.prefill[1] / self.prefill[0]


@dataclass(frozen=True)
class TensorError:
    """The quantization error of one weight.

    Attributes:
        path: Path of the product.
        scheme: Name of the scheme.
        bytes: Size of the stored weight.
        snr_db: Signal-to-noise ratio of the product's output for average inputs, in dB; of the weight itself without statistics
            of the inputs. None if there is no error.
        error: Relative error of the weight.
        harm_nats: KL divergence if only this weight has few bits, in nats; None if not measured.
    """

    path: str
    scheme: str
    bytes: int
    snr_db: float | None
    error: float
    harm_nats: float | None = None


@dataclass(frozen=True)
class Refined:
    """The effect of refinement, measured on held-back rows of the calibration text.

    Attributes:
        tokens: The number of tokens of the text that training read, each as often as it was read.
        held_back: The number of held-back tokens.
        kl_before: KL divergence on the held-back tokens before refinement, in nats.
        kl_after: The same after refinement.
        kept: Whether the refined weights were kept. They are if they reduce the divergence.
    """

    tokens: int
    held_back: int
    kl_before: float
    kl_after: float
    kept: bool


@dataclass(frozen=True)
class HeadChange:
    """The predictions of single-token steps from a head in halves, compared with those of the whole head.

    Attributes:
        tokens: The number of compared positions.
        kl_nats: The mean KL divergence from the whole head, in nats.
        same_top1: The share of positions with the same most likely token.
    """

    tokens: int
    kl_nats: float
    same_top1: float


@dataclass(frozen=True)
class TaskScore:
    """A score from 0 to 1, with its 95 % confidence interval."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskChange:
    """The scores of two bundles on a task.

    Attributes:
        name: Name of the rows' file.
        metric: Name of the metric.
        rows: Number of rows.
        before: The source's score.
        after: The result's score.
        low: Lower end of the 95 % confidence interval of the difference, after - before.
        high: Its upper end.
        max_drop: Limit of the decrease.
        lost: Number of rows with a lower score.
        won: Number of rows with a higher score.
    """

    name: str
    metric: MetricName
    rows: int
    before: TaskScore
    after: TaskScore
    low: float
    high: float
    max_drop: float
    lost: int
    won: int

    @property
    def limit(self) -> str:
        """The limit in words."""
        points = round(100 * self.max_drop, 6)
        return f"{points:g} point{'s' if points != 1 else ''}"


@dataclass(frozen=True)
class Report:
    """The measurements of one quantization.

    Attributes:
        source: Name of the source bundle.
        settings: The settings, requested and decided.
        bytes_before: Size of the source's graph and weights.
        bytes_after: Size of the result's graph and weights.
        parts: Bytes by part of the model.
        change: Comparison of the predictions before and after.
        divergence: Comparison of greedy texts before and after.
        speeds: Speeds before and after, measured alternately on the CPU; None for a bundle for CUDA.
        tensors: The error of each weight.
        seconds: Total time.
        head: For a head in halves, comparison of its single-token steps with the whole head.
        task: The scores on a task; None without one.
        calibration: Name of the text on which settings were chosen.
        text: Name of the held-out text on which predictions were compared.
    """

    source: str
    settings: dict[str, Any]
    bytes_before: int
    bytes_after: int
    parts: dict[str, int]
    change: Change
    divergence: Divergence
    speeds: Speeds | None
    tensors: tuple[TensorError, ...]
    seconds: float
    head: HeadChange | None = None
    task: TaskChange | None = None
    calibration: str = ""
    text: str = ""

    @property
    def in_words(self) -> str:
        """The schemes of the weights, with the number of products of each."""
        products: dict[str, int] = self.settings["products"]
        return ", ".join(f"{count} × {name}" for name, count in products.items())

    @property
    def worst(self) -> list[TensorError]:
        """Weights in order of their signal-to-noise ratio, lowest first."""
        return sorted((each for each in self.tensors if each.snr_db is not None), key=lambda each: each.snr_db or 0.0)


@dataclass(frozen=True)
class Trial:
    """The result of one set of options.

    Attributes:
        options: Options of `slm quantize`.
        decided: The decisions that the settings left open (`QuantizationPlan.decisions`).
        bytes: Size of graph and weights.
        change: Comparison of the predictions before and after.
        decode_ratio: Decode speed relative to the source.
        prefill_ratio: Prefill speed relative to the source.
    """

    options: str
    decided: dict[str, Any]
    bytes: int
    change: Change
    decode_ratio: float
    prefill_ratio: float


@dataclass
class Sweep:
    """The trials of one bundle.

    Attributes:
        bundle: Name of the source bundle.
        bytes_before: Size of its graph and weights.
        text: Name of the text on which predictions were compared.
        tokens: Number of its tokens.
        key: Hash of everything that trials depend on; trials with another key are not reused.
        trials: The trials, in order.
        skipped: Options that this model does not support, with the reason.
    """

    bundle: str
    bytes_before: int
    text: str
    tokens: int
    key: str
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def frontier(self, cost: Callable[[Trial], float]) -> set[str]:
        """Returns the options of the Pareto-optimal trials in divergence and cost."""

        def beaten(trial: Trial) -> bool:
            mine = trial.change.kl_nats, cost(trial)
            others = [(other.change.kl_nats, cost(other)) for other in self.trials]
            return any(kl <= mine[0] and paid <= mine[1] and (kl, paid) != mine for kl, paid in others)

        return {trial.options for trial in self.trials if not beaten(trial)}
