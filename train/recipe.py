"""Recipes: everything that determines a training run, as YAML in `recipes/` or in a user's file."""

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.train.recipe_file import RecipeForm, one_of
from slm.train.sections import (
    BatchRecipe,
    CheckpointRecipe,
    DataRecipe,
    DistillationRecipe,
    EvaluationRecipe,
    LogNames,
    MachineRecipe,
    ModelRecipe,
    OptimizerRecipe,
    QatRecipe,
    RegularizationRecipe,
    ScheduleRecipe,
    Section,
    SpikesRecipe,
    WatchdogRecipe,
)


class Recipe(Section):
    """The configuration of a run, saved with it as `config.yaml`.

    Attributes:
        name: Name of the recipe, and of runs that have no other.
        seed: Seed of the initial weights, the windows and dropout; the same seed gives the same run.
        log: Where metrics go besides `metrics.jsonl`.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    log: LogNames = ("tensorboard",)
    data: DataRecipe = DataRecipe()
    model: ModelRecipe
    batch: BatchRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    regularization: RegularizationRecipe = RegularizationRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    qat: QatRecipe = QatRecipe()
    evaluation: EvaluationRecipe
    checkpoints: CheckpointRecipe = CheckpointRecipe()
    spikes: SpikesRecipe = SpikesRecipe()
    watchdog: WatchdogRecipe = WatchdogRecipe()
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
        if self.data.sampler == "best_fit" and self.machine.attention == "flex":
            raise ValueError(
                "machine.attention=flex cannot keep the documents of a row apart; leave it out with data.sampler=best_fit"
            )
        if self.qat.grid is not None:
            for _ in self.qat.grid.schemes(config):  # raises if a product does not fit
                pass
        return self

    def for_tokens(self, tokens: int) -> "Recipe":
        """Returns the recipe with its length in micro-steps, for a text whose rows have a number of positions in one pass.

        The length is the nearest number of whole updates, which does not depend on the size of micro-steps.
        """
        epochs = self.schedule.epochs
        if epochs is None:
            return self
        per_update = self.batch.accumulation * self.tokens_per_micro_step
        micro_steps = self.batch.accumulation * max(1, round(epochs * tokens / per_update))
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

    def context_at(self, micro_step: int) -> int:
        """Returns the length of the rows of a micro-step, by its number from 0; see `BatchRecipe.first_context`.

        All micro-steps of an update have rows of the same length.
        """
        contexts, update = self.batch.contexts, micro_step // self.batch.accumulation
        stage = int(update * (len(contexts) - 1) / (self.batch.context_warmup * self.updates))
        return contexts[min(stage, len(contexts) - 1)]

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
            "optimizer.tail": self.optimizer.tail,
            "distillation.teachers": list(self.distillation.teachers),
            "qat.precision": self.qat.precision,
            "qat.start": self.qat.start,
        }

    @property
    def tokens_per_micro_step(self) -> int:
        """Tokens in a micro-step."""
        return self.batch.batch_size * self.batch.context

    def to_yaml(self) -> str:
        """Returns the resolved recipe as YAML for `load_recipe`."""
        return _FORM.to_yaml(self)


_FORM = RecipeForm(Recipe, "slm train", "optimizer.weight_decay=0.05")


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
        raise SlmError(f"recipe not found: {name}", f"{meant}{one_of(recipe_names())}, or the path of a .yaml file")
    fields = _FORM.read(text, source)
    batch = fields.get("batch")
    size = batch.get("batch_size") if isinstance(batch, dict) else None
    for override in overrides:
        _FORM.override(fields, override)
    _keep_update(fields, size)
    _keep_one_length(fields, overrides)
    return _FORM.checked(fields, source)


def _keep_update(fields: dict[str, Any], size: Any) -> None:
    """Keeps the file's batch size where an override says "auto": it determines the windows of an update."""
    batch = fields.get("batch")
    if isinstance(batch, dict) and batch.get("batch_size") == "auto" and size not in (None, "auto"):
        batch |= {"batch_size": size, "automatic": True}


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
