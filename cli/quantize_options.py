"""The options of `slm quantize`, in two groups: the settings, and the texts."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from slm.cli.console import say
from slm.cli.options import check_input
from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.install import install_hint
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.text.tokens import TextSource
from slm.quantize.defaults import CALIBRATION_TOKENS, LEAST_HELD_OUT, MAX_DROP, REFINE_TOKENS

if TYPE_CHECKING:
    from slm.core.contract import CacheType
    from slm.core.manifest import Bundle
    from slm.core.task import MetricName
    from slm.finetune.own_rows import OwnRows
    from slm.quantize.refinement import Refinement
    from slm.quantize.settings import Head, Method, Prefer, Settings
    from slm.quantize.task import TaskCheck
    from slm.quantize.texts import TokenRows


@dataclass(frozen=True)
class SettingOptions:
    """The options that choose what to make. Raises an error for options that exclude each other."""

    int8: bool
    int8_dynamic: bool
    reduce_range: bool
    int4: bool
    sweep: bool
    prefer: "Prefer"
    block_size: str | None
    method: "Method | None"
    smooth: bool | None
    head_bits: str | None
    target_size: int | None
    kv_cache: "CacheType | None"
    head: "Head"
    refine: bool
    refine_tokens: int | None
    max_kl: float | None
    max_ppl_increase: float | None

    def __post_init__(self) -> None:
        """Checks that the options go together.

        Raises:
            click.UsageError: If there is not exactly one kind of output.
            SlmError: If an option does not apply to the kind.
        """
        if self.int8 + self.int8_dynamic + self.int4 + self.sweep != 1:
            raise click.UsageError("choose one of --int8, --int8-dynamic, --int4 and --sweep")
        open_by_default = (self.block_size, self.method, self.smooth, self.head_bits, self.target_size, self.kv_cache)
        limits = (self.max_kl, self.max_ppl_increase)
        chosen = self.prefer != "auto" or self.head != "whole" or self.refine
        if self.sweep and (chosen or any(value is not None for value in (*open_by_default, *limits))):
            raise SlmError("--sweep tries all settings and has no limits", "omit the other settings")
        if self.target_size is not None and not self.int4:
            raise SlmError(
                "--target-size requires --int4: it chooses between 4 and 8 bits for each layer",
                "use slm quantize --int4 --target-size SIZE",
            )
        if self.refine and not self.int4:
            raise SlmError(
                "--refine requires --int4; 8-bit weights change the predictions too little",
                "use --int4, or omit --refine",
            )
        if self.refine_tokens is not None and not self.refine:
            raise SlmError("--refine-tokens requires --refine", "add --refine, or omit --refine-tokens")
        if self.head_bits is not None and not self.int4:
            raise SlmError("--head-bits requires --int4; INT8 bundles have 8 bits everywhere", "omit --head-bits")
        if self.head_bits == "4" and self.head == "halves":
            raise SlmError("--head halves stores 8 bits, which excludes --head-bits 4", "omit one of them")
        if self.reduce_range and not self.int8_dynamic:
            raise SlmError(
                "--reduce-range requires --int8-dynamic; other products do not overflow", "omit --reduce-range"
            )
        if self.int8_dynamic and (self.block_size or self.method):
            raise SlmError("--int8-dynamic does not support --block-size or --method", "omit them, or use --int8")

    @property
    def precision(self) -> Literal["int8", "int4"]:
        """The precision of the bundle."""
        return "int4" if self.int4 else "int8"

    @property
    def ending(self) -> str:
        """The ending of the default output's name."""
        return "sweep" if self.sweep else "int8-dynamic" if self.int8_dynamic else self.precision

    def settings(self) -> "Settings":
        """Returns the settings of a quantization."""
        from slm.quantize.settings import GATES, Gate, Settings

        aims_at_kl = self.int4 and self.target_size is None and self.prefer != "size"
        max_kl = GATES[self.precision].max_kl_nats if self.max_kl is None else self.max_kl
        return Settings(
            precision=self.precision,
            prefer=self.prefer,
            dynamic=self.int8_dynamic,
            reduce_range=self.reduce_range,
            block_size=None if self.block_size is None else int(self.block_size),
            method=self.method,
            smooth=self.smooth,
            cache=self.kv_cache,
            head_bits=None if self.head_bits is None else 4 if self.head_bits == "4" else 8,
            head=self.head,
            target_bytes=self.target_size,
            target_kl_nats=self.max_kl if aims_at_kl else None,
            refine=self.refine,
            gate=Gate(max_kl, self.max_ppl_increase),
        )

    def refinement(self, source: "Bundle", texts: "TextOptions", own: "OwnText | None") -> "Refinement | None":
        """Returns the training of `--refine` and its text; None without the option.

        Raises:
            SlmError: If PyTorch is not installed, or the text is too short.
        """
        if not self.refine:
            return None
        if find_spec("torch") is None:
            raise SlmError("--refine needs PyTorch, which is not installed", install_hint("train"))
        from slm.quantize.refinement import Refinement
        from slm.refine.training import refine

        tokens = self.refine_tokens or REFINE_TOKENS
        return Refinement.on(texts.for_refinement(source, tokens, own), refine, tokens)


@dataclass(frozen=True)
class TaskOptions:
    """The options of the check on a task. Raises an error for options without --task."""

    task: Path | None
    metric: "MetricName | None"
    max_drop: float | None
    limit: int | None

    def __post_init__(self) -> None:
        """Checks that the rows exist, and that there are no options without rows.

        Raises:
            click.UsageError: If --task is missing.
            SlmError: If the rows are not readable.
        """
        for name, value in (("--metric", self.metric), ("--max-drop", self.max_drop), ("--limit", self.limit)):
            if self.task is None and value is not None:
                raise click.UsageError(f"{name} requires --task")
        if self.task is not None:
            check_input(self.task.expanduser(), "rows", directories=True)

    def check(self, source: "Bundle") -> "TaskCheck | None":
        """Returns the check, with the rows in tokens of the source; None without --task.

        Raises:
            SlmError: If a row cannot be used.
        """
        if self.task is None:
            return None
        from slm.core.tokenizer import Tokenizer
        from slm.finetune.examples import Renderer
        from slm.finetune.task import questions, read_task
        from slm.quantize.task import TaskCheck

        file = read_task(self.task.expanduser(), self.metric, limit=self.limit)
        task = file.task
        if task.why:
            say(f"metric: {task.metric} ({task.why}); --metric chooses another")
        found = questions(file, Renderer(Tokenizer.load(source.path), source))
        return TaskCheck(task.name, task.metric, tuple(found), MAX_DROP if self.max_drop is None else self.max_drop)


@dataclass(frozen=True)
class OwnText:
    """The rows that a model was fine-tuned on, as text for its quantization.

    Attributes:
        rows: The rows.
        asked: The prompts of a task that is measured, in tokens.
    """

    rows: "OwnRows"
    asked: frozenset[tuple[int, ...]]

    def training(self, source: "Bundle", tokens: int, window: int | None) -> "TokenRows | None":
        """Returns the training rows without those of the task, filled up with the default text; None if none is left."""
        from slm.quantize.texts import filled_up

        rows = self.rows
        documents = rows.tokens(rows.train, source, tokens, self.asked)
        if not documents:
            say(f"No training row of {rows.path} is left for calibration: all are rows of the task.")
            return None
        return filled_up(source, f"the model's training rows, {rows.path}", documents, tokens, window)

    def held_out(self, source: "Bundle", tokens: int, window: int | None) -> "TokenRows | None":
        """Returns the held-out rows; None if they are fewer tokens than the shortest text that is measured."""
        from slm.quantize.texts import row_tokens_of, rows_of_documents

        rows, least = self.rows, max(min(tokens, LEAST_HELD_OUT), row_tokens_of(source, window))
        documents = rows.tokens(rows.held_out, source, max(tokens, least)) if rows.held_out else []
        if sum(map(len, documents)) < least:
            return None
        return rows_of_documents(source, f"the model's held-out rows, {rows.held_out_path}", documents, tokens, window)


@dataclass(frozen=True)
class TextOptions:
    """The options that choose the texts for calibration and for the quality check."""

    data: Path | None
    column: str | None
    max_document_bytes: int | None
    tokens: int
    window: int | None
    calibration: Path | None
    calibration_tokens: int | None

    def __post_init__(self) -> None:
        """Checks that the texts exist and are readable.

        Raises:
            SlmError: If one does not or is not.
        """
        for path in (self.data, self.calibration):
            if path is not None:
                check_input(path, "text", directories=True)

    def own_rows(self, source: "Bundle", check: "TaskCheck | None") -> "OwnText | None":
        """Returns the rows that the model was fine-tuned on, unless both texts are given or the rows cannot be used.

        Args:
            source: The bundle.
            check: The check on a task, whose rows are not calibrated on.
        """
        if self.data is not None and self.calibration is not None:
            return None
        from slm.finetune.own_rows import own_rows

        rows = own_rows(source)
        if isinstance(rows, str):
            say(f"The rows that the model was fine-tuned on are not used: {rows}.")
        asked = frozenset(question.ids for question in check.questions) if check is not None else frozenset()
        return None if rows is None or isinstance(rows, str) else OwnText(rows, asked)

    def for_evaluation(self, source: "Bundle", own: "OwnText | None") -> "TokenRows":
        """Returns the held-out text: --data, the held-out rows of the model's fine-tuning, or the default."""
        from slm.quantize.texts import measuring_text

        rows = None if own is None or self.data is not None else own.held_out(source, self.tokens, self.window)
        return rows or measuring_text(source, self._source(self.data), self.tokens, self.window)

    def for_calibration(self, source: "Bundle", precision: str, own: "OwnText | None") -> "TokenRows":
        """Returns the calibration text for a precision."""
        return self._calibration(source, self.calibration_tokens or CALIBRATION_TOKENS[precision], own)

    def for_refinement(self, source: "Bundle", tokens: int, own: "OwnText | None") -> "TokenRows":
        """Returns the calibration text for `--refine`: the tokens to train on, and those to hold back."""
        from slm.quantize.refinement import HELD_BACK_TOKENS

        return self._calibration(source, tokens + HELD_BACK_TOKENS, own)

    def _calibration(self, source: "Bundle", tokens: int, own: "OwnText | None") -> "TokenRows":
        """Returns --calibration, the training rows of the model's fine-tuning, or the default."""
        from slm.quantize.texts import calibration_text

        rows = None if own is None or self.calibration is not None else own.training(source, tokens, self.window)
        return rows or calibration_text(source, self._source(self.calibration), tokens, self.window)

    def _source(self, path: Path | None) -> TextSource | None:
        if path is None:
            return None
        return TextSource(path.expanduser(), self.column or TEXT_COLUMN, self.max_document_bytes or DOCUMENT_BYTES)


def check_apart(texts: TextOptions, task: TaskOptions) -> None:
    """Checks that the rows of a task are not the calibration text.

    Raises:
        SlmError: If they are.
    """
    if texts.calibration is None or task.task is None:
        return
    first, second = texts.calibration.expanduser(), task.task.expanduser()
    same = first.samefile(second)
    if not same and first.is_file() and second.is_file():
        same = first.stat().st_size == second.stat().st_size and sha256_file(first) == sha256_file(second)
    if same:
        raise SlmError(
            f"--calibration and --task are the same rows: {texts.calibration}",
            "calibrate on other text: settings that fit these rows would hide a loss on others",
        )
