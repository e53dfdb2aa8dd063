"""Recipes: everything that determines a training run, as YAML in `recipes/` or in a user's file."""

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.train.sections import (
    MODEL_FIELDS,
    BatchRecipe,
    CheckpointRecipe,
    DataRecipe,
    EvaluationRecipe,
    MachineRecipe,
    ModelRecipe,
    OptimizerRecipe,
    QatRecipe,
    RegularizationRecipe,
    ScheduleRecipe,
    Section,
)


class Recipe(Section):
    """The configuration of a run, saved with it as `config.yaml`.

    Attributes:
        name: Name of the recipe, and of runs that have no other.
        seed: Seed of the initial weights, the windows and dropout; the same seed gives the same run.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    data: DataRecipe = DataRecipe()
    model: ModelRecipe
    batch: BatchRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    regularization: RegularizationRecipe = RegularizationRecipe()
    qat: QatRecipe = QatRecipe()
    evaluation: EvaluationRecipe
    checkpoints: CheckpointRecipe = CheckpointRecipe()
    machine: MachineRecipe = MachineRecipe()

    @model_validator(mode="after")
    def _check(self) -> Self:
        config = self.model.config()
        longest = config.max_position_embeddings
        for name, context in (("batch", self.batch.context), ("evaluation", self.evaluation.context or 0)):
            if context > longest:
                raise ValueError(f"{name}.context is {context}, the model's max_position_embeddings {longest}")
        if self.schedule.micro_steps is not None and self.schedule.micro_steps < self.batch.accumulation:
            raise ValueError("schedule.micro_steps is less than batch.accumulation: there would be no update")
        if self.qat.grid is not None:
            for _ in self.qat.grid.schemes(config):  # raises if a product does not fit
                pass
        return self

    def for_tokens(self, tokens: int) -> "Recipe":
        """Returns the recipe with its length in micro-steps, for a training text of a number of tokens."""
        epochs = self.schedule.epochs
        if epochs is None:
            return self
        micro_steps = max(self.batch.accumulation, round(epochs * tokens / self.tokens_per_micro_step))
        schedule = self.schedule.model_copy(update={"micro_steps": micro_steps, "epochs": None})
        return self.model_copy(update={"schedule": schedule})

    @property
    def micro_steps(self) -> int:
        """Micro-steps of the schedule, once they are known; see `for_tokens`."""
        assert self.schedule.micro_steps is not None
        return self.schedule.micro_steps

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.micro_steps // self.batch.accumulation

    @property
    def course(self) -> dict[str, Any]:
        """The values that a resumed run must not change, by their names in `--set`: the saved state depends on them."""
        batch = self.batch
        return {
            "seed": self.seed,
            "data.sampler": self.data.sampler,
            "batch.batch_size × accumulation": batch.batch_size * batch.accumulation,
            "batch.context": batch.context,
            "optimizer.name": self.optimizer.name,
            "optimizer.ema": bool(self.optimizer.ema),
            "qat.precision": self.qat.precision,
            "qat.start": self.qat.start,
        }

    @property
    def tokens_per_micro_step(self) -> int:
        """Tokens in a micro-step."""
        return self.batch.batch_size * self.batch.context

    def to_yaml(self) -> str:
        """Returns the resolved recipe as YAML for `load_recipe`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """Returns the names of the recipes that ship with slm."""
    return sorted(Path(file.name).stem for file in _packaged().iterdir() if file.name.endswith(".yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe.

    Args:
        name: Name of a recipe that ships with slm, or path of a YAML file.
        overrides: Values as `a.b=c`, with c in YAML.

    Raises:
        SlmError: When there is no such recipe, or a value is wrong; the message names the key and lists the valid ones.
    """
    file = Path(name)
    if str(name) in recipe_names():
        text, source = (_packaged() / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"
    elif file.suffix in (".yaml", ".yml"):
        text, source = read_text(file, "recipe"), str(file)
    else:
        near = get_close_matches(str(name).lower(), recipe_names(), n=2)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise SlmError(f"recipe not found: {name}", f"{meant}{_one_of(recipe_names())}, or the path of a .yaml file")
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SlmError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise SlmError(f"{source} is not a mapping of sections")
    for override in overrides:
        _set(fields, override)
    _keep_one_length(fields, overrides)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise SlmError(f"{source}: {first_mistake(error)}", _hint(error)) from None


def _keep_one_length(fields: dict[str, Any], overrides: Sequence[str]) -> None:
    """Replaces the recipe's length by one that was set, in micro-steps or in epochs."""
    ways = ("micro_steps", "epochs")
    mine = [way for way in ways if any(override.startswith(f"schedule.{way}=") for override in overrides)]
    if len(mine) == 1:
        (other,) = set(ways) - set(mine)
        schedule = fields["schedule"]
        if schedule[mine[0]] is not None:
            schedule[other] = None


def _packaged() -> Any:
    return resources.files("slm.train.recipes")


def _set(fields: dict[str, Any], override: str) -> None:
    """Applies an override `a.b=c`."""
    path, equals, text = override.partition("=")
    if not equals:
        raise SlmError(f"--set {override}: there is no '='", "write it like --set optimizer.weight_decay=0.05")
    valid = _paths(Recipe)
    if path not in valid:
        raise SlmError(f"--set {override}: the recipe has no value {path!r}", _meant(path, valid))
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(fields.get(section), dict):  # absent, or empty in the file
            fields[section] = {}
        fields = fields[section]
    try:
        fields[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SlmError(f"--set {override}: the value is not YAML", "quote it, as in --set 'name=\"a: b\"'") from None


def _meant(path: str, valid: Sequence[str]) -> str:
    """Returns a hint for an unknown name of a value: the closest names, those of its section, or the sections."""
    near = get_close_matches(path, valid, n=2, cutoff=0.75)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    section = path.partition(".")[0]
    inside = [known for known in valid if known.startswith(f"{section}.")]
    if inside or near:
        return f"{meant}{_one_of(inside)}" if inside else meant.rstrip()
    key = path.rpartition(".")[2]
    elsewhere = [known for known in valid if known.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    sections = dict.fromkeys(known.partition(".")[0] for known in valid if "." in known)
    return f"the sections are {', '.join(sections)}; slm train --dry-run shows every value"


def _paths(section: type[BaseModel]) -> list[str]:
    """Returns the dotted names of all values."""
    paths = [*MODEL_FIELDS] if section is ModelRecipe else []
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            paths += [f"{key}.{path}" for path in _paths(inner)]
        else:
            paths.append(key)
    return paths


def _hint(error: ValidationError) -> str | None:
    """Returns a list of the valid keys if the mistake is an unknown key."""
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return None
    prefix = "".join(f"{key}." for key in first["loc"][:-1])
    return _one_of([path for path in _paths(Recipe) if path.startswith(prefix)])


def _one_of(names: Sequence[str]) -> str:
    return f"there is {', '.join(names)}"
