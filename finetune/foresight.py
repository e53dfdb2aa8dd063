"""`slm finetune --dry-run`: everything up to the first update, then the time and memory of a few updates."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slm.core.checkpoint import read_config, read_info
from slm.core.progress import Progress
from slm.core.tokenizer import Tokenizer
from slm.finetune.build import build
from slm.finetune.examples import Renderer
from slm.finetune.preparation import prepare
from slm.finetune.recipe import FinetuneRecipe, resolved
from slm.finetune.rehearsal import Rehearsal, rehearse
from slm.finetune.review import review
from slm.finetune.rows import Row
from slm.finetune.run import check_free
from slm.finetune.state import Standing
from slm.finetune.teaching import check_rows, teaching_of
from slm.train.build import pick_device
from slm.train.precision import capability, choose_precision
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
    config, tokenizer, info = read_config(base), Tokenizer.load(base), read_info(base)
    renderer = Renderer(tokenizer, config)
    device = pick_device("auto")
    precision = choose_precision("auto", capability(device), config.hidden_size)
    max_length = recipe.training.context(config)
    teaching = teaching_of(teacher, (out, overwrite), config, max_length, renderer, device, precision, heard)
    unanswered = 0

    def as_they_are(rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
        """Keeps the placeholders of answers, which a run lets the teacher write."""
        nonlocal unanswered
        unanswered += len(numbers)
        return list(rows)

    found = prepare(files, recipe.training, config, renderer, heard, None if teaching is None else as_they_are)
    if teacher is not None:
        check_rows(found, teacher, tokenizer, heard)
    odd = review(found, recipe.training, config)
    if unanswered:
        odd.append(
            f"the teacher first answers {unanswered} rows; the estimates contain neither the time for it nor the answers"
        )
    with torch.random.fork_rng():
        built = build(base, info, found, renderer, device, precision, heard)
        loaded = None if teaching is None else teaching.load()
        fit = built.fit(found, Standing(course={"settings": {}}), refer=False, teacher=loaded)
        setup = time.perf_counter() - began
        measured = rehearse(built, fit, found)
    if measured.memory_available is not None and measured.memory > measured.memory_available:
        odd.append(
            "the run does not fit into the memory of the device: lower training.batch_size or training.max_length"
        )
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
        device=device.type.upper(),
        precision=precision.name,
        setup_seconds=round(setup, 2),
        seconds=setup + measured.seconds,
        measured=measured,
        resumes=(out / TRAINER).is_dir(),
        rendered=tuple(tuple(renderer.preview(example)) for example in found.train.kept[:_SHOWN]),
        warnings=(*heard.warnings, *odd),
    )
