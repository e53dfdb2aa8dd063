"""Warnings about a recipe: settings that contradict each other, or that have no effect."""

from collections.abc import Iterator

from slm.core.config import FULL, SLIDING
from slm.train.recipe import Recipe, load_recipe, recipe_names
from slm.train.sections import Section

# Up to 4 passes over a text are worth about as much as new text; further passes add less, and beyond about this many they add
# little (arXiv:2305.16264). `tiny` on its sample, in 15 passes, is best after 13.
_PASSES = 16
# Tolerance: a run of one pass is rounded to whole updates.
_WHOLE = 0.99


def review(recipe: Recipe, passes: float | None = None, processes: int = 1, text_bytes: int | None = None) -> list[str]:
    """Returns the warnings about a recipe, one sentence each.

    Args:
        recipe: The recipe, with its length in micro-steps.
        passes: Passes over the training text, if known.
        processes: Number of processes.
        text_bytes: Size of the training text, if known.
    """
    return [
        *_schedule(recipe),
        *_model(recipe),
        *_measuring(recipe),
        *_ineffective(recipe, processes),
        *_memorizing(recipe, passes),
        *_unread(recipe, passes, text_bytes),
    ]


def _schedule(recipe: Recipe) -> list[str]:
    odd, schedule, total = [], recipe.schedule, recipe.micro_steps
    if schedule.shape != "constant" and schedule.final_learning_rate > schedule.learning_rate:
        odd.append(
            f"the learning rate rises after the warm-up, from {schedule.learning_rate:g} to "
            f"{schedule.final_learning_rate:g}: schedule.final_learning_rate is above schedule.learning_rate"
        )
    if schedule.warmup_micro_steps >= total:
        odd.append(
            f"the warm-up of {schedule.warmup_micro_steps:,} micro-steps is as long as the training of {total:,}: "
            "the learning rate never gets to its peak"
        )
    elif schedule.shape == "wsd" and schedule.warmup_micro_steps + schedule.decay * total > total:
        odd.append("schedule.decay begins before the warm-up ends: there is no stable phase")
    if 0 < schedule.warmup_micro_steps <= recipe.batch.accumulation:
        odd.append(
            f"the warm-up of {schedule.warmup_micro_steps:,} micro-steps is no longer than one update of "
            f"{recipe.batch.accumulation:,}, so there is no warm-up"
        )
    elif schedule.warmup_micro_steps and schedule.start == 1:
        odd.append("schedule.warmup_micro_steps has no effect with schedule.start=1")
    return odd


def _model(recipe: Recipe) -> list[str]:
    odd, config, context = [], recipe.model.config(), recipe.batch.context
    if SLIDING in config.layer_types and context <= config.sliding_window:
        odd.append(
            f"batch.context of {context:,} is no longer than the sliding window of {config.sliding_window:,}: while "
            "training, sliding attention never differs from full attention"
        )
    if FULL not in config.layer_types and config.max_position_embeddings > config.sliding_window:
        odd.append(
            f"none of the {config.num_hidden_layers} layers is global: information travels at most one window of "
            f"{config.sliding_window:,} tokens per layer; set model.layer_types to change that"
        )
    return odd


def _measuring(recipe: Recipe) -> list[str]:
    odd, evaluation, total = [], recipe.evaluation, recipe.micro_steps
    if evaluation.every_micro_steps > total:
        odd.append("evaluation.every_micro_steps is longer than the run: there is no evaluation during the run")
    elif evaluation.patience and evaluation.patience * evaluation.every_micro_steps >= total:
        odd.append("evaluation.patience is longer than the run: the run never stops early")
    return odd


def _ineffective(recipe: Recipe, processes: int) -> list[str]:
    """Returns a warning for each setting that another setting makes ineffective."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    shape = f"with schedule.shape={schedule.shape}"
    without_effect = (
        ("optimizer.momentum", not optimizer.orthogonalizes, "with optimizer.name=adamw, only with muon"),
        (
            "optimizer.momentum_warmup",
            not optimizer.orthogonalizes,
            "with optimizer.name=adamw, only with muon",
        ),
        (
            "optimizer.momentum_start",
            not (optimizer.orthogonalizes and optimizer.momentum_warmup),
            "without optimizer.momentum_warmup, and only with muon",
        ),
        ("optimizer.row_beta", optimizer.name != "normuon", "without optimizer.name=normuon"),
        ("optimizer.decay", not optimizer.weight_decay, "with optimizer.weight_decay=0"),
        ("optimizer.decay_shape", not optimizer.weight_decay, "with optimizer.weight_decay=0"),
        ("optimizer.cautious", not optimizer.weight_decay, "with optimizer.weight_decay=0"),
        ("batch.context_warmup", recipe.batch.first_context is None, "without batch.first_context"),
        ("schedule.decay", schedule.shape != "wsd", shape),
        ("schedule.final_learning_rate", schedule.shape == "constant", shape),
        ("schedule.start", not schedule.warmup_micro_steps, "without schedule.warmup_micro_steps"),
        ("distillation.weight", not recipe.distillation.teachers, "without distillation.teachers"),
        ("qat.start", recipe.qat.grid is None, "with qat.precision=none"),
        ("evaluation.sample_tokens", not recipe.evaluation.prompts, "without evaluation.prompts"),
        ("checkpoints.keep", recipe.checkpoints.every_updates is None, "without checkpoints.every_updates"),
        *(
            (f"spikes.{name}", recipe.spikes.action == "none", "with spikes.action=none")
            for name in ("threshold", "window", "limit")
        ),
        ("spikes.every_updates", recipe.spikes.action != "rewind", f"with spikes.action={recipe.spikes.action}"),
        ("watchdog.slow_share", recipe.watchdog.slow_minutes is None, "without watchdog.slow_minutes"),
        ("machine.parallel", processes == 1, "in one process: torchrun starts several"),
    )
    return [f"{name} has no effect {why}" for name, applies, why in without_effect if applies and _is_set(recipe, name)]


def _is_set(recipe: Recipe, name: str) -> bool:
    """Returns whether a value differs from its default."""
    section, _, key = name.partition(".")
    values: Section = getattr(recipe, section)
    return bool(getattr(values, key) != type(values).model_fields[key].default)


def _memorizing(recipe: Recipe, passes: float | None) -> list[str]:
    guarded = recipe.regularization.dropout or recipe.evaluation.patience
    if passes is None or passes <= _PASSES or guarded:
        return []
    return [
        f"the run reads the training text {passes:.1f} times, and beyond about {_PASSES} passes the model mostly memorizes it: "
        "--set regularization.dropout=0.1 or evaluation.patience=3 helps, more text helps more"
    ]


def _unread(recipe: Recipe, passes: float | None, text_bytes: int | None) -> list[str]:
    """Returns a warning if the run reads only a part of the training text, with the settings that would read all."""
    if passes is None or passes >= _WHOLE:
        return []
    read = f"{passes:.0%}" if text_bytes is None else f"{passes * text_bytes / 1e6:,.1f} of {text_bytes / 1e6:,.1f} MB"
    text_tokens = round(recipe.updates * recipe.batch.accumulation * recipe.tokens_per_micro_step / passes)
    updates = recipe.updates / passes
    ways = [
        f"--set schedule.epochs=1 reads all of it once, in about {updates:,.0f} updates instead of {recipe.updates:,}"
    ]
    other = min(_reading_all(recipe, text_tokens), key=lambda each: each.model.config().parameter_count(), default=None)
    if other is not None:
        ways.append(
            f"so does --recipe {other.name}, with {other.model.config().parameter_count() / 1e6:,.1f} M parameters"
        )
    return [f"the run reads {read} of the training text: {'; '.join(ways)}"]


def _reading_all(recipe: Recipe, text_tokens: int) -> Iterator[Recipe]:
    """Yields the other recipes of slm that read this many tokens at least once."""
    for name in recipe_names():
        other = load_recipe(name).for_tokens(text_tokens)
        if name != recipe.name and other.micro_steps * other.tokens_per_micro_step >= _WHOLE * text_tokens:
            yield other
