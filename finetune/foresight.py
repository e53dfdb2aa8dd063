"""`slm finetune --dry-run`: everything up to the first update, then the time and memory of a few updates."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.finetune.build import build
from slm.finetune.recipe import FinetuneRecipe, resolved
from slm.finetune.rehearsal import Rehearsal, rehearse
from slm.finetune.run import check_free
from slm.finetune.start import Start, start_of
from slm.finetune.state import Standing, resumable
from slm.train.state import TRAINER

_WARNING = "warning: "
# Number of rows that are shown, and the beginning of their lines among the notes.
_SHOWN, _ROW = 2, "row "


@dataclass(frozen=True)
class Foresight:
    """What a run would do.

    Attributes:
        base: The base.
        out: The directory of the result.
        recipe: The resolved recipe.
        rows: Number of training rows.
        validation_rows: Number of held-out rows.
        truncated: Number of rows, training and held-out, that lose their end.
        skipped: Number of rows left out because their prompt is too long.
        bad: Number of rows left out because they cannot be read.
        tokens: Tokens of the training rows.
        trained_tokens: Those that count in the loss.
        epochs: Passes over the rows; fewer if the run stops early.
        updates: Steps of the optimizer; fewer if the run stops early.
        modules: Number of modules that get an adapter; 0 if every weight is trained.
        trainable_parameters: Number of trained parameters.
        embedding_rows: Number of rows of the embedding that are trained with an adapter.
        device: Name of the device.
        precision: Type of the products.
        setup_seconds: Time to read the rows and to load the model.
        seconds: Time of the whole run if it does not stop early; an estimate from `measured`.
        measured: Time and memory of a few updates.
        resumes: Whether the directory holds an interrupted run.
        rendered: The first rows as texts of their tokens, in parts, each with whether it counts in the loss.
        warnings: What looks wrong, one sentence each.
    """

    base: Path
    out: Path
    recipe: FinetuneRecipe
    rows: int
    validation_rows: int
    truncated: int
    skipped: int
    bad: int
    tokens: int
    trained_tokens: int
    epochs: int
    updates: int
    modules: int
    trainable_parameters: int
    embedding_rows: int
    device: str
    precision: str
    setup_seconds: float
    seconds: float
    measured: Rehearsal
    resumes: bool
    rendered: tuple[tuple[tuple[bool, str], ...], ...]
    warnings: tuple[str, ...]


@dataclass
class _Listener:
    """Passes notes on, but keeps warnings, and drops the rows, which the result has."""

    progress: Progress
    warnings: list[str] = field(default_factory=list)

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Starts a task."""
        self.progress.start(name, total, unit)

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Advances the task."""
        self.progress.advance(amount, **fields)

    def finish(self) -> None:
        """Ends the task."""
        self.progress.finish()

    def note(self, text: str) -> None:
        """Takes a note."""
        if text.startswith(_WARNING):
            self.warnings.append(text.removeprefix(_WARNING))
        elif not text.startswith(_ROW):
            self.progress.note(text)


def foresee(
    recipe: FinetuneRecipe,
    base: Path,
    place: Path,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    teacher: Path | None = None,
) -> Foresight:
    """Checks the inputs of a run, and measures a few updates. Writes nothing.

    Args:
        recipe: The recipe.
        base: The base.
        place: Where the base would lie, if it is only temporary; else the same path.
        out: The directory of the result.
        progress: Receives notes.
        overwrite: Whether an existing result may be replaced.
        teacher: The checkpoint whose predictions would be learned.

    Raises:
        SlmError: As fine-tuning would raise it.
    """
    began = time.perf_counter()
    check_free(out, recipe.training.method, overwrite)
    heard, files = _Listener(progress), recipe.files()
    start = start_of(base, files, recipe.training, teacher, (out, overwrite), heard, answer=False)
    resumes, found = _resumes(out, start, place, overwrite), start.found
    with torch.random.fork_rng():
        built = build(base, start.info, found, start.renderer, start.device, start.precision, heard)
        loaded = None if start.teaching is None else start.teaching.load()
        fit = built.fit(found, Standing(course=dict(start.course)), refer=False, teacher=loaded)
        setup = time.perf_counter() - began
        measured = rehearse(built, fit, found)
    complete = resolved(place, files, found.settings, recipe.samples, recipe.log, teacher)
    return Foresight(
        base=place,
        out=out,
        # A recipe must not name a base that does not exist yet.
        recipe=complete if place == base else complete.model_copy(update={"base": None}),
        rows=len(found.train.kept),
        validation_rows=len(found.valid.kept),
        truncated=found.train.truncated + found.valid.truncated,
        skipped=found.train.skipped + found.valid.skipped,
        bad=found.bad,
        tokens=sum(len(example.ids) for example in found.train.kept),
        trained_tokens=found.train.trained,
        epochs=fit.epochs,
        updates=fit.updates,
        modules=built.modules,
        trainable_parameters=sum(parameter.numel() for parameter in fit.parameters),
        embedding_rows=len(built.rows),
        device=start.device.type.upper(),
        precision=start.precision.name,
        setup_seconds=round(setup, 2),
        seconds=setup + measured.seconds,
        measured=measured,
        resumes=resumes,
        rendered=tuple(tuple(start.renderer.preview(example)) for example in found.train.kept[:_SHOWN]),
        warnings=(*heard.warnings, *_limits(start, measured)),
    )


def _resumes(out: Path, start: Start, place: Path, overwrite: bool) -> bool:
    """Returns whether the run, whose base would lie at a place, continues an interrupted one.

    Raises:
        SlmError: When the directory holds another interrupted run, which may not be replaced.
    """
    if start.unanswered:  # the answers of the teacher may decide which rows are held out
        return (out / TRAINER).is_dir()
    try:
        course = {**start.course, "base": start.course["base"] | {"path": str(place.resolve())}}
        return resumable(out, course) is not None
    except SlmError:
        if overwrite:
            return False
        raise


def _limits(start: Start, measured: Rehearsal) -> Iterator[str]:
    """Yields what the estimates do not contain, and whether the run does not fit into memory."""
    if start.unanswered:
        yield (
            f"the teacher first answers {start.unanswered} row{'s' if start.unanswered > 1 else ''}; the estimates contain "
            "neither the time for it nor the answers"
        )
    if start.found.settings.metric is not None:
        yield "the estimate of the time does not contain the replies that training.metric scores after each epoch"
    if measured.memory_available is not None and measured.memory > measured.memory_available:
        yield "the run does not fit into the memory of the device: lower training.batch_size or training.max_length"
