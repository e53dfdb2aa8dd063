"""The rows of a fine-tuning run: reads, splits and converts them to examples, and warns about what looks wrong."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.finetune.batches import Packed, alone, pack
from slm.finetune.examples import Examples, Renderer
from slm.finetune.material import Answers, Material
from slm.finetune.preference import Pair, Preferences
from slm.finetune.provenance import provenance
from slm.finetune.rows import ChatRow, Limits, PreferenceRow, Row, read_rows
from slm.finetune.settings import FEW, FinetuneSettings
from slm.finetune.split import FEW_ROWS, HELD_OUT, Split, learned_before, split_rows
from slm.finetune.teacher import LOSS_NAME, Distilled, Teacher

# Number of rows shown before training.
_SHOWN = 2


@dataclass(frozen=True)
class RowFiles:
    """The files of a run's rows, and how they are read.

    Attributes:
        train: A file or directory of training rows; see `slm.finetune.rows`.
        validation: Held-out rows; None holds out some of the training rows, drawn with the seed.
        hold_out: The share of the training rows to hold out, from 0 to 1, if `validation` is None. None: a tenth, or nothing of
            fewer than `FEW` rows.
        skip_bad: Whether to skip and count bad rows instead of raising an error.
        limits: Limits of reading.
    """

    train: Path
    validation: Path | None = None
    hold_out: float | None = None
    skip_bad: bool = False
    limits: Limits = field(default_factory=Limits)

    def record(self) -> dict[str, Any]:
        """Returns paths and hashes of the rows, for `slm.json`."""
        validation = None if self.validation is None else provenance(self.validation)
        record = {"data": provenance(self.train), "validation": validation, "skip_bad": self.skip_bad}
        return record if self.hold_out is None else record | {"hold_out": self.hold_out}

    def split(self, rows: list[Row], measured: list[Row] | None, seed: int) -> Split:
        """Returns training rows and held-out rows.

        Raises:
            SlmError: When all rows are held out.
        """
        if measured is not None:
            return Split(rows, measured)
        usual = HELD_OUT if len(rows) >= FEW else 0.0
        split = split_rows(rows, seed, usual if self.hold_out is None else self.hold_out)
        if not split.train:
            raise SlmError("all rows are held out, so none are left to train on", "choose a smaller --hold-out")
        return split


@dataclass(frozen=True)
class Prepared:
    """The rows of a run, converted to examples.

    Attributes:
        train: The training examples.
        valid: The held-out examples.
        rows: The training examples as rows of a batch, packed or one by one.
        split: The rows that the examples come from.
        settings: The settings with all defaults resolved.
        chats: Whether a row is a conversation.
        declares_tools: Whether rows with calls declare the tools; None if no row has calls.
        bad: Number of rows left out because they could not be read.
        choices: The column `choices` of rows that have one, by the row's place.
        pairs: If the rows are preferences, the training pairs and the held-out pairs; the examples are then their preferred
            answers.
    """

    train: Examples
    valid: Examples
    rows: tuple[Packed, ...]
    split: Split
    settings: FinetuneSettings
    chats: bool
    declares_tools: bool | None
    bad: int
    choices: Mapping[str, Any]
    pairs: tuple[tuple[Pair, ...], tuple[Pair, ...]] | None = None

    def material(self, teacher: Teacher | None = None) -> Material:
        """Returns what to train on and what to measure: held-out rows, or the training rows if none are held out."""
        name = "held-out loss" if self.valid.kept else "loss on the training rows"
        if teacher is not None:
            which = f"held-out {LOSS_NAME}" if self.valid.kept else f"{LOSS_NAME} on the training rows"
            return Distilled(self.rows, self.valid.kept or self.train.kept, teacher, which)
        if self.pairs is not None:
            train, valid = self.pairs
            return Preferences(train, valid or train, self.settings.beta, name)
        return Answers(self.rows, self.valid.kept or self.train.kept, name)


# Answers the rows whose numbers are given, which end with a request.
Complete = Callable[[Sequence[Row], Sequence[int]], list[Row]]


def prepare(
    files: RowFiles,
    settings: FinetuneSettings,
    config: ModelConfig,
    renderer: Renderer,
    progress: Progress,
    complete: Complete | None = None,
) -> Prepared:
    """Reads rows, converts them to examples, and reports what will be trained.

    Args:
        files: The rows.
        settings: Hyperparameters.
        config: The shape of the base.
        renderer: Converts rows to token ids.
        progress: Receives notes.
        complete: Answers rows that end with a request; None rejects a prompt alone.

    Raises:
        SlmError: When a file or a row cannot be read, or there is nothing to learn or to measure.
    """
    max_length = settings.context(config)
    if max_length > config.max_position_embeddings:
        raise SlmError(f"max_length {max_length} is longer than the base's context of {config.max_position_embeddings}")
    bad: list[SlmError] | None = [] if files.skip_bad else None
    left_out: set[str] = set()
    choices: dict[str, Any] = {}

    def read(path: Path) -> list[Row]:
        column: list[Any] = []
        unanswered: list[int] | None = None if complete is None else []
        found = read_rows(path, bad, left_out=left_out, limits=files.limits, choices=column, unanswered=unanswered)
        choices.update((row.place, options) for row, options in zip(found, column, strict=True) if options)
        return found if complete is None or not unanswered else complete(found, unanswered)

    rows = read(files.train)
    measured = None if files.validation is None else read(files.validation)
    if left_out:
        progress.note(f"fields that are not learned from: {', '.join(map(_printable, sorted(left_out)))}")
    split = files.split(rows, measured, settings.seed)
    preferences = _are_preferences(rows + (measured or []), settings)
    train, valid, pairs = _examples(split, preferences, renderer, max_length, bad)
    if bad:
        progress.note(f"warning: bad rows left out: {len(bad)}; the first: {bad[0].message}")
    # A teacher's predictions say after each token whether the text ends there.
    _check(train, valid, renderer, max_length, needs_end=complete is None)
    packed = pack(train.kept, max_length, random.Random(settings.seed)) if settings.pack else alone(train.kept)
    _tell(train, valid, renderer, max_length, progress)
    _check_measure(split, len(valid.kept), settings, progress)
    if settings.pack:
        progress.note(f"packed into {len(packed)} rows of at most {max_length} tokens")
    answers = [row.chosen if isinstance(row, PreferenceRow) else row for row in rows]
    return Prepared(
        train,
        valid,
        tuple(packed),
        split,
        settings.resolved(config, len(train.kept), len(packed), preferences=preferences),
        any(isinstance(row, ChatRow) for row in answers),
        _declares_tools(answers),
        len(bad or ()),
        choices,
        pairs,
    )


def _examples(
    split: Split, preferences: bool, renderer: Renderer, max_length: int, bad: list[SlmError] | None
) -> tuple[Examples, Examples, tuple[tuple[Pair, ...], tuple[Pair, ...]] | None]:
    """Returns the training examples and the held-out examples, and both as pairs if the rows are preferences."""
    parts = split.train, split.held_out
    if not preferences:
        train, valid = (renderer.examples(part, max_length, bad) for part in parts)
        return train, valid, None
    rendered = [renderer.pairs(part, max_length, bad) for part in parts]  # type: ignore[arg-type]
    (train, pairs), (valid, measured) = rendered
    return train, valid, (tuple(Pair(*pair) for pair in pairs), tuple(Pair(*pair) for pair in measured))


def _are_preferences(rows: list[Row], settings: FinetuneSettings) -> bool:
    """Returns whether all rows are preferences.

    Raises:
        SlmError: If only some are, or the settings do not support them.
    """
    found = [row for row in rows if isinstance(row, PreferenceRow)]
    if not found:
        return False
    if len(found) < len(rows):
        other = next(row for row in rows if not isinstance(row, PreferenceRow))
        raise SlmError(
            f"{other.place}: a file with chosen and rejected has no other rows", "train on one file after the other"
        )
    if settings.method == "full":
        raise SlmError("preferences train an adapter, with the base as the reference", "use --lora")
    if settings.pack:
        raise SlmError("preferences cannot be packed", "leave --pack out")
    return True


def _declares_tools(rows: Sequence[Row]) -> bool | None:
    """Returns whether rows with calls declare the tools; None if no row has calls."""
    calling = [row for row in rows if isinstance(row, ChatRow) and any(each.get("calls") for each in row.messages)]
    return any(row.tools for row in calling) if calling else None


def _check(train: Examples, valid: Examples, renderer: Renderer, max_length: int, *, needs_end: bool) -> None:
    """Rejects rows from which the model would learn nothing, or never learn to stop."""
    hint = f"rows may have {max_length} tokens; --max-length raises that"
    if not train.kept:
        raise SlmError("nothing to learn: every row's prompt alone is too long", hint)
    if needs_end and not any(example.targets(renderer.end_of_text) for example in train.kept):
        raise SlmError("every row is cut before its end, so the model would never learn to stop", hint)
    if valid.skipped and not valid.kept:
        raise SlmError("nothing to measure: every validation row's prompt alone is too long", hint)


def _check_measure(split: Split, held_out: int, settings: FinetuneSettings, progress: Progress) -> None:
    """Warns if the held-out rows cannot show which epoch is the best."""
    measure = "loss" if settings.metric is None else "score"
    if split.numbers == () and (both := learned_before(split.train, split.held_out)):
        progress.note(
            f"warning: of the {held_out} validation rows {both} are training rows too: their {measure} says little"
        )
    if settings.keep == "last" or held_out >= FEW_ROWS:
        return
    if held_out:
        best = "lowest loss" if settings.metric is None else "highest score"
        progress.note(
            f"warning: {held_out} held-out rows are too few to choose an epoch by (fewer than {FEW_ROWS}); the epoch with the "
            f"{best} on them is kept all the same; --val FILE measures on more rows, --keep last keeps the last epoch"
        )
    else:
        progress.note(
            f"no rows are held out: the {measure} is that of the training rows, and says nothing about other requests; "
            "--val FILE or --hold-out 10% measures that"
        )


def _tell(train: Examples, valid: Examples, renderer: Renderer, max_length: int, progress: Progress) -> None:
    for number, example in enumerate(train.kept[:_SHOWN], 1):
        for learned, tokens in renderer.preview(example):
            progress.note(f"row {number}, {'learned:  ' if learned else 'read only:'} {tokens}")
    progress.note(
        f"{len(train.kept)} rows with {train.trained:,} learned tokens, " + f"{len(valid.kept) or 'no'} rows held out"
    )
    truncated, skipped = train.truncated + valid.truncated, train.skipped + valid.skipped
    if truncated:
        progress.note(f"warning: rows cut at {max_length} tokens, which lose their end-of-text: {truncated}")
    if skipped:
        progress.note(f"warning: rows left out, whose prompt alone has {max_length} tokens or more: {skipped}")


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= 60 else f"{ascii(name)[1:-1]:.60}"
