"""Recipes of `slm finetune`: everything that determines a run, as YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.core.text.streams import DOCUMENT_BYTES
from slm.finetune.rows import DATA_BYTES, Limits
from slm.finetune.settings import FinetuneSettings
from slm.train.choices import LogName
from slm.train.recipe_file import RecipeForm, put, value_at
from slm.train.sections import LogNames, Section

if TYPE_CHECKING:
    from slm.finetune.preparation import RowFiles

CONFIG = "config.yaml"
# Number of sample answers at the end.
SAMPLES = 3
MAX_SAMPLES = 100
# Pairs of values that exclude each other: an option or override for one replaces the recipe's value of the other.
_EITHER = (("data.validation", "data.hold_out"), ("name", "out"))


class RowsRecipe(Section):
    """The rows. Relative paths start at the current directory.

    Attributes:
        train: A file or directory of training rows.
        validation: A file or directory of held-out rows.
        hold_out: The share of the training rows to hold out, such as 0.2 or "20%"; see `slm.finetune.preparation.RowFiles`.
        skip_bad: Whether to skip and count bad rows instead of failing.
        max_document_bytes: Maximum UTF-8 bytes of a row.
        max_data_bytes: Maximum bytes of memory of all rows.
    """

    train: str | None = Field(default=None, min_length=1)
    validation: str | None = Field(default=None, min_length=1)
    hold_out: float | None = Field(default=None, gt=0, le=1)
    skip_bad: bool = False
    max_document_bytes: int = Field(default=DOCUMENT_BYTES, ge=1)
    max_data_bytes: int = Field(default=DATA_BYTES, ge=1)

    @field_validator("hold_out", mode="before")
    @classmethod
    def _percentage(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip().removesuffix("%")) / 100
            except ValueError:
                pass  # the type of the field rejects it
        return value


class FinetuneRecipe(Section):
    """The configuration of a run, saved with its result as `config.yaml`.

    Attributes:
        base: The base: a path, or a name under ./runs. None chooses the newest checkpoint.
        name: Name of the result in the base's run.
        out: The directory of the result, instead of `name`.
        samples: Number of rows that the result answers at the end. 0 also disables the answers during training.
        log: Where metrics go besides `metrics.jsonl`.
        teacher: A checkpoint, or a name under ./runs, whose predictions are learned.
        data: The rows.
        training: The hyperparameters.
    """

    base: str | None = Field(default=None, min_length=1)
    name: str | None = Field(default=None, min_length=1)
    out: str | None = Field(default=None, min_length=1)
    samples: int = Field(default=SAMPLES, ge=0, le=MAX_SAMPLES)
    log: LogNames = ()
    teacher: str | None = Field(default=None, min_length=1)
    data: RowsRecipe = RowsRecipe()
    training: FinetuneSettings = FinetuneSettings()

    @field_validator("training", mode="before")
    @classmethod
    def _without_patience(cls, value: Any) -> Any:
        """Accepts a patience of 0, as the option does."""
        if isinstance(value, Mapping) and type(value.get("patience")) is int and value["patience"] == 0:
            return {**value, "patience": None}
        return {} if value is None else value

    @field_validator("data", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for one, other in _EITHER:
            if self._value(one) is not None and self._value(other) is not None:
                raise ValueError(f"set either {one} or {other}, not both")
        return self

    def _value(self, path: str) -> Any:
        section, _, key = path.rpartition(".")
        return getattr(getattr(self, section) if section else self, key)

    def files(self) -> "RowFiles":
        """Returns the files of rows.

        Raises:
            SlmError: When the recipe names no training rows.
        """
        from slm.finetune.preparation import RowFiles

        data = self.data
        limits = Limits(data.max_document_bytes, data.max_data_bytes)
        return RowFiles(self.train, _path(data.validation), data.hold_out, data.skip_bad, limits)

    @property
    def train(self) -> Path:
        """The training rows.

        Raises:
            SlmError: When the recipe names none.
        """
        path = _path(self.data.train)
        if path is None:
            raise SlmError("the recipe has no data.train", "--lora FILE or --full FILE names the rows")
        return path

    def to_yaml(self) -> str:
        """Returns the recipe as YAML for `load_recipe`."""
        return _FORM.to_yaml(self)


_FORM = RecipeForm(FinetuneRecipe, "slm finetune", "training.rank=16")


def load_recipe(
    file: Path | None, overrides: Sequence[str] = (), options: Mapping[str, object] | None = None
) -> FinetuneRecipe:
    """Loads a recipe.

    Args:
        file: A YAML file; None for a recipe of defaults.
        overrides: Values as `a.b=c`, with c in YAML. They replace those of the file.
        options: Values by their dotted names, which replace both.

    Raises:
        SlmError: When there is no such file, or a value is wrong; the message names the key and lists the valid ones.
    """
    options = options or {}
    source = "the fine-tuning settings are wrong" if file is None else str(file)
    fields: dict[str, Any] = {} if file is None else _FORM.read(read_text(file, "recipe"), source)
    for override in overrides:
        _FORM.override(fields, override)
    for path, value in options.items():
        put(fields, path, value)
    given = {*options, *(override.partition("=")[0] for override in overrides)}
    for pair in _EITHER:
        chosen = [path for path in pair if path in given and value_at(fields, path) is not None]
        if len(chosen) == 1:
            (other,) = set(pair) - set(chosen)
            put(fields, other, None)
    recipe = _FORM.checked(fields, source)
    _check_files(recipe, file)
    return recipe


def resolved(
    base: Path,
    files: "RowFiles",
    settings: FinetuneSettings,
    samples: int,
    log: Sequence[LogName],
    teacher: Path | None = None,
) -> FinetuneRecipe:
    """Returns the recipe of a run, with absolute paths and no defaults left open, except for the place of the result."""
    data = RowsRecipe(
        train=str(files.train.absolute()),
        validation=None if files.validation is None else str(files.validation.absolute()),
        hold_out=files.hold_out,
        skip_bad=files.skip_bad,
        max_document_bytes=files.limits.row,
        max_data_bytes=files.limits.data,
    )
    return FinetuneRecipe(
        base=str(base.absolute()),
        samples=samples,
        log=tuple(log),
        teacher=None if teacher is None else str(teacher.absolute()),
        data=data,
        training=settings,
    )


def _check_files(recipe: FinetuneRecipe, file: Path | None) -> None:
    """Rejects a missing file of rows, with a hint if it lies beside the recipe."""
    if file is None:
        return
    for name in (recipe.data.train, recipe.data.validation):
        path = _path(name)
        beside = None if path is None else file.parent / path
        if path is not None and beside is not None and not path.exists() and beside.exists():
            raise SlmError(
                f"fine-tuning data not found: {path}",
                f"paths in a recipe start at the current directory, not at the recipe's; there is {beside}",
            )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name).expanduser()
