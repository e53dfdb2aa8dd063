"""`slm.quantize`: a float bundle to an INT8 or INT4 bundle, within limits of quality; and the study of settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from slm.core.errors import ArgumentError, SlmError
from slm.core.install import install_hint
from slm.core.manifest import Bundle, sealed_files
from slm.core.outputs import check_output
from slm.core.progress import Progress
from slm.core.task import MetricName
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.text.tokens import TextSource
from slm.quantize.defaults import CALIBRATION_TOKENS, MAX_DROP, REFINE_TOKENS
from slm.steps.arguments import (
    Bytes,
    PathArgument,
    Positive,
    Range,
    Share,
    Two,
    as_optional_path,
    check_input,
    step,
)
from slm.steps.bars import shown
from slm.steps.choosing import Note, default_bundle, named
from slm.steps.own_text import OwnText, check_apart, own_text

if TYPE_CHECKING:
    from slm.quantize.refinement import Refinement
    from slm.quantize.results import Report, Sweep
    from slm.quantize.settings import Settings
    from slm.quantize.task import TaskCheck
    from slm.quantize.texts import TokenRows

Precision = Literal["int8", "int8-dynamic", "int4"]


@dataclass(frozen=True)
class QuantizeResult:
    """The result of `slm.quantize`. It stands for its path: other functions accept it where they accept a path.

    Attributes:
        path: The bundle's directory.
        source: The bundle that was quantized.
        report: The measurements; `report.json` and `report.html` in the bundle have them as well.
        bundle: The bundle.
    """

    path: Path
    source: Path
    report: "Report" = field(repr=False)
    bundle: Bundle = field(repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def bytes(self) -> int:
        """Size of graph and weights."""
        return self.report.bytes_after

    @property
    def kl_nats(self) -> float:
        """The mean KL divergence from the source's predictions, in nats."""
        return self.report.change.kl_nats


@dataclass(frozen=True)
class SweepResult:
    """The result of the study of settings.

    Attributes:
        path: The directory of its files.
        source: The bundle that was quantized.
        sweep: The trials.
    """

    path: Path
    source: Path
    sweep: "Sweep"


@step
def quantize(
    bundle: PathArgument | None = None,
    precision: Precision = "int8",
    *,
    prefer: Literal["auto", "speed", "size", "quality"] = "auto",
    block_size: Literal[128, 64, 32, 16] | None = None,
    method: Literal["nearest", "searched", "gptq"] | None = None,
    smooth: bool | None = None,
    head_bits: Literal[4, 8] | None = None,
    target_size: Bytes | None = None,
    kv_cache: Literal["float32", "int8"] | None = None,
    head: Literal["whole", "halves"] = "whole",
    refine: bool = False,
    refine_tokens: Two | None = None,
    data: PathArgument | None = None,
    column: str | None = None,
    max_document_bytes: Bytes | None = None,
    tokens: Two = 2048,
    window: Two | None = None,
    calibration: PathArgument | None = None,
    calibration_tokens: Two | None = None,
    max_kl: Annotated[float, Range(0, 1000)] | None = None,
    max_ppl_increase: Annotated[float, Range(0, 1000)] | None = None,
    task: PathArgument | None = None,
    metric: MetricName | None = None,
    max_drop: Share | None = None,
    limit: Positive | None = None,
    out: PathArgument | None = None,
    progress: Progress | bool = True,
) -> QuantizeResult:
    """Quantizes a float bundle, and checks its quality; nothing is written if it fails (docs/quantization.md).

    Args:
        bundle: A float32 bundle, or a float16 bundle for CUDA; by default the newest float32 bundle under ./runs.
        precision: "int8", "int8-dynamic" (8-bit weights and activations), or "int4".
        prefer: The property to optimize.
        block_size: Weights that share a scale; by default `prefer` decides.
        method: The rounding method for 4 bits; "gptq" by default.
        smooth: Whether to smooth activations first; by default if it measures better.
        head_bits: With "int4": bits of token embeddings and head; by default 8, or chosen with a target.
        target_size: With "int4": the limit of the model's size in bytes.
        kv_cache: Type of cached keys and values; by default `prefer` decides.
        head: Storage of the tied table.
        refine: With "int4": whether to train scales and norms afterwards. Needs PyTorch.
        refine_tokens: Number of tokens of the calibration text for that training.
        data: Held-out text for the quality check; by default the held-out rows of the model's fine-tuning, or the stories that
            ship.
        column: Name of the text column in rows; "text" by default.
        max_document_bytes: Limit of a row or document; by default 16 MiB.
        tokens: Number of tokens of `data` to read.
        window: Tokens read at a time; by default enough to pass the sliding window.
        calibration: Calibration text, other than `data`; by default the training rows of the model's fine-tuning, or the
            training stories that ship.
        calibration_tokens: Number of calibration tokens; by default 1,024, or 8,192 for "int4".
        max_kl: Limit of the KL divergence in nats; by default 0.02, or 0.15 for "int4".
        max_ppl_increase: Limit of the increase of perplexity: 0.02 for 2 %.
        task: Held-out rows that `slm.finetune` reads: also compare the replies to them.
        metric: With `task`: the score of a reply; by default chosen by the rows.
        max_drop: With `task`: limit of the decrease of the score; 0.01 by default.
        limit: With `task`: number of rows to use; by default all.
        out: The bundle's directory; by default BUNDLE-int8, BUNDLE-int8-dynamic or BUNDLE-int4.
        progress: True shows a bar, False nothing; or an object with the methods of `slm.core.progress.Progress`.

    Raises:
        SlmError: If an input is missing or wrong, options exclude each other, or the result fails the quality check.
    """
    given = {each: value for each, value in locals().items() if each != "progress"}
    _check_settings(given)
    display = shown(progress)
    texts, rows = _Texts.of(given), _task_rows(given)
    path, place = _places(given, precision, display.note)
    check_output(place, sealed_files(place))
    if rows is not None and texts.calibration is not None:
        check_apart(texts.calibration.path, rows)
    source = Bundle.open(path)
    from slm.quantize.make import quantize_bundle
    from slm.quantize.settings import check_source

    settings = _settings(given)
    check_source(source, settings)
    compared = None if rows is None else _task_check(source, rows, given, display.note)
    texts = texts.with_own_rows(source, compared, display.note)
    text, on_text = texts.for_evaluation(source, display.note), texts.for_calibration(source, _bits(precision))
    display.note(f"Calibrating on {on_text.name}; measuring on {text.name}.")
    if source.manifest.device != "cpu":
        display.note("Quality is measured on the CPU.")
    refinement = _refinement(source, texts, refine_tokens) if refine else None
    made, report = quantize_bundle(source, place, text, settings, display, on_text, compared, refinement)
    return QuantizeResult(made.path, path, report, made)


def sweep(given: Mapping[str, Any], progress: Progress | bool = True) -> SweepResult:
    """Tries many settings on a bundle, and writes a report of size, speed and quality.

    Args:
        given: The arguments of `quantize`. Those that choose settings, limits or a task must have their defaults.
        progress: See `quantize`.

    Raises:
        SlmError: If an input is missing or wrong, or there are settings or limits.
    """
    chosen = given["prefer"] != "auto" or given["head"] != "whole" or given["refine"]
    settings = ("block_size", "method", "smooth", "head_bits", "target_size", "kv_cache", "max_kl", "max_ppl_increase")
    if chosen or any(given[name] is not None for name in settings):
        raise SlmError("--sweep tries all settings and has no limits", "omit the other settings")
    if given["task"] is not None:
        raise SlmError("--sweep does not support --task", "omit --task, or quantize with one setting")
    _check_settings({**given, "precision": "int8"})
    display = shown(progress)
    texts = _Texts.of(given)
    path, place = _places(given, "sweep", display.note)
    check_output(place, {"sweep.json", "sweep.html"})
    source = Bundle.open(path)
    texts = texts.with_own_rows(source, None, display.note)
    text = texts.for_evaluation(source, display.note)
    from slm.quantize.sweep import run_sweep

    calibration = {precision: texts.for_calibration(source, precision) for precision in CALIBRATION_TOKENS}
    return SweepResult(place, path, run_sweep(source, place, text, calibration, display))


def _bits(precision: Precision) -> Literal["int8", "int4"]:
    return "int4" if precision == "int4" else "int8"


def _check_settings(given: Mapping[str, Any]) -> None:
    """Checks that the settings go together.

    Raises:
        ArgumentError: If a setting of --task comes without it.
        SlmError: If a setting does not apply to the precision.
    """
    int4, dynamic = given["precision"] == "int4", given["precision"] == "int8-dynamic"
    if given["target_size"] is not None and not int4:
        raise SlmError(
            "--target-size requires --int4: it chooses between 4 and 8 bits for each layer",
            "use slm quantize --int4 --target-size SIZE",
        )
    if given["refine"] and not int4:
        raise SlmError(
            "--refine requires --int4; 8-bit weights change the predictions too little",
            "use --int4, or omit --refine",
        )
    if given["refine_tokens"] is not None and not given["refine"]:
        raise SlmError("--refine-tokens requires --refine", "add --refine, or omit --refine-tokens")
    if given["head_bits"] is not None and not int4:
        raise SlmError("--head-bits requires --int4; INT8 bundles have 8 bits everywhere", "omit --head-bits")
    if given["head_bits"] == 4 and given["head"] == "halves":
        raise SlmError("--head halves stores 8 bits, which excludes --head-bits 4", "omit one of them")
    if dynamic and (given["block_size"] or given["method"]):
        raise SlmError("--int8-dynamic does not support --block-size or --method", "omit them, or use --int8")
    for name in ("metric", "max_drop", "limit"):
        if given["task"] is None and given[name] is not None:
            raise ArgumentError(f"--{name.replace('_', '-')} requires --task")


def _settings(given: Mapping[str, Any]) -> "Settings":
    from slm.quantize.settings import GATES, Gate, Settings

    precision, max_kl = _bits(given["precision"]), given["max_kl"]
    aims_at_kl = precision == "int4" and given["target_size"] is None and given["prefer"] != "size"
    return Settings(
        precision=precision,
        prefer=given["prefer"],
        dynamic=given["precision"] == "int8-dynamic",
        block_size=given["block_size"],
        method=given["method"],
        smooth=given["smooth"],
        cache=given["kv_cache"],
        head_bits=given["head_bits"],
        head=given["head"],
        target_bytes=given["target_size"],
        target_kl_nats=max_kl if aims_at_kl else None,
        refine=given["refine"],
        gate=Gate(GATES[precision].max_kl_nats if max_kl is None else max_kl, given["max_ppl_increase"]),
    )


def _places(given: Mapping[str, Any], ending: str, note: Note) -> tuple[Path, Path]:
    """Returns the bundle and the output."""
    name = given["bundle"]
    path = default_bundle(note, to_quantize=True) if name is None else named(name, ("bundle",), note)
    place = as_optional_path(given["out"]) or path.with_name(f"{path.name}-{ending}")
    if place.resolve() == path.resolve():
        raise SlmError(f"{place} is the bundle to quantize and cannot be overwritten", "choose another --out")
    return path, place


@dataclass(frozen=True)
class _Texts:
    """The texts for calibration and for the quality check."""

    data: TextSource | None
    tokens: int
    window: int | None
    calibration: TextSource | None
    calibration_tokens: int | None
    own: OwnText | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "_Texts":
        """Returns the texts of the arguments, after checking that they exist and are readable.

        Raises:
            SlmError: If one does not or is not.
        """
        data, calibration = (_text(given[name], given) for name in ("data", "calibration"))
        return cls(data, given["tokens"], given["window"], calibration, given["calibration_tokens"])

    def with_own_rows(self, source: Bundle, check: "TaskCheck | None", note: Note) -> "_Texts":
        """Returns the texts with the rows that the model was fine-tuned on, in place of texts that are not given."""
        given = self.data is not None and self.calibration is not None
        return self if given else replace(self, own=own_text(source, check, note))

    def for_evaluation(self, source: Bundle, note: Note) -> "TokenRows":
        """Returns the held-out text: as given, the held-out rows of the model's fine-tuning, or the default."""
        from slm.quantize.texts import measuring_text

        held_out = None
        if self.own is not None and self.data is None:
            held_out = self.own.held_out(source, self.tokens, self.window)
        text = held_out or measuring_text(source, self.data, self.tokens, self.window)
        if text.rows.shape[1] <= source.config.sliding_window:
            note(
                f"warning: the text has rows of {text.rows.shape[1]} tokens, which do not exceed the sliding window of "
                f"{source.config.sliding_window}"
            )
        return text

    def for_calibration(self, source: Bundle, precision: str) -> "TokenRows":
        """Returns the calibration text for a precision."""
        return self._calibrating(source, self.calibration_tokens or CALIBRATION_TOKENS[precision])

    def for_refinement(self, source: Bundle, tokens: int) -> "TokenRows":
        """Returns the calibration text for `refine`: the tokens to train on, and those to hold back."""
        from slm.quantize.refinement import HELD_BACK_TOKENS

        return self._calibrating(source, tokens + HELD_BACK_TOKENS)

    def _calibrating(self, source: Bundle, tokens: int) -> "TokenRows":
        """Returns the calibration text: as given, the training rows of the model's fine-tuning, or the default."""
        from slm.quantize.texts import calibration_text

        rows = None
        if self.own is not None and self.calibration is None:
            rows = self.own.training(source, tokens, self.window)
        return rows or calibration_text(source, self.calibration, tokens, self.window)


def _text(name: PathArgument | None, given: Mapping[str, Any]) -> TextSource | None:
    path = as_optional_path(name)
    if path is None:
        return None
    check_input(path, "text", directories=True)
    return TextSource(path, given["column"] or TEXT_COLUMN, given["max_document_bytes"] or DOCUMENT_BYTES)


def _task_rows(given: Mapping[str, Any]) -> Path | None:
    path = as_optional_path(given["task"])
    if path is not None:
        check_input(path, "rows", directories=True)
    return path


def _refinement(source: Bundle, texts: _Texts, tokens: int | None) -> "Refinement":
    """Returns the training of `refine` and its text.

    Raises:
        SlmError: If PyTorch is not installed, or the text is too short.
    """
    if find_spec("torch") is None:
        raise SlmError("--refine needs PyTorch, which is not installed", install_hint("train"))
    from slm.quantize.refinement import Refinement
    from slm.refine.training import refine

    tokens = tokens or REFINE_TOKENS
    return Refinement.on(texts.for_refinement(source, tokens), refine, tokens)


def _task_check(source: Bundle, rows: Path, given: Mapping[str, Any], note: Note) -> "TaskCheck":
    """Returns the check on a task, with the rows in tokens of the source.

    Raises:
        SlmError: If a row cannot be used.
    """
    from slm.core.tokenizer import Tokenizer
    from slm.finetune.examples import Renderer
    from slm.finetune.task import questions, read_task
    from slm.quantize.task import TaskCheck

    file = read_task(rows, given["metric"], limit=given["limit"])
    task = file.task
    if task.why:
        note(f"metric: {task.metric} ({task.why}); --metric chooses another")
    found = questions(file, Renderer(Tokenizer.load(source.path), source))
    drop = given["max_drop"]
    return TaskCheck(task.name, task.metric, tuple(found), MAX_DROP if drop is None else drop)
