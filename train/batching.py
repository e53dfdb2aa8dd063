"""The size of micro-steps: the largest that fits into memory, or one that another number of processes can share.

The windows of an update stay the same, so that the run learns the same; values of the recipe that count micro-steps follow.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.machine import memory
from slm.train.attention import choose_flex
from slm.train.build import build_average, build_model, teachers_of
from slm.train.learner import Learner, Objective, UpdateSettings
from slm.train.memory import advise, training_bytes
from slm.train.optimizer import make_optimizers
from slm.train.parallel import Alone, Processes, local_size
from slm.train.precision import Capability, Precision, capability, choose_precision
from slm.train.recipe import Recipe

# The estimate leaves out what libraries allocate, and fragmentation.
_SHARE = 0.9
_MIB = 1 << 20
# Updates of a trial: the optimizer's moments exist from the second one on.
_TRIAL_UPDATES = 2

Fits = Callable[[Recipe], bool]


@dataclass(frozen=True)
class Place:
    """The device of one process.

    Attributes:
        able: Its capabilities.
        precision: The type of the products on it.
        available: Bytes that training may use; None if unknown.
    """

    able: Capability
    precision: Precision
    available: int | None


def resized(recipe: Recipe, batch_size: int) -> Recipe:
    """Returns a recipe with micro-steps of another size, and with the same updates, warm-up and evaluations.

    Args:
        recipe: The recipe.
        batch_size: A divisor of the windows of an update.
    """
    windows = recipe.batch.batch_size * recipe.batch.accumulation
    assert windows % batch_size == 0
    before, after = recipe.batch.accumulation, windows // batch_size

    def scaled(micro_steps: int) -> int:
        return round(micro_steps * after / before)

    schedule, evaluation = recipe.schedule, recipe.evaluation
    length = None if schedule.micro_steps is None else recipe.updates * after
    return recipe.model_copy(
        update={
            "batch": recipe.batch.model_copy(
                update={"batch_size": batch_size, "accumulation": after, "automatic": False}
            ),
            "schedule": schedule.model_copy(
                update={"micro_steps": length, "warmup_micro_steps": scaled(schedule.warmup_micro_steps)}
            ),
            "evaluation": evaluation.model_copy(
                update={"every_micro_steps": max(1, scaled(evaluation.every_micro_steps))}
            ),
        }
    )


def regrouped(recipe: Recipe, processes: int) -> Recipe:
    """Returns a recipe whose micro-steps have a window for each process, with the same windows in an update.

    Raises:
        SlmError: When an update has too few windows.
    """
    if recipe.batch.batch_size >= processes:
        return recipe
    sizes = [size for size in _divisors(recipe) if size >= processes]
    if not sizes:
        windows = recipe.batch.batch_size * recipe.batch.accumulation
        raise SlmError(
            f"{processes} processes cannot share updates of {windows} windows", f"start at most {windows} processes"
        )
    return resized(recipe, sizes[0])


def fitted_by_estimate(recipe: Recipe, place: Place, processes: int, fits: Fits | None = None) -> Recipe:
    """Returns a recipe with the largest micro-steps that fit into the memory of a device.

    Args:
        recipe: The recipe.
        place: The device of one process.
        processes: Number of processes, each with such a device.
        fits: Tries a recipe that fits by the estimate; where it does not fit, sizes of at most half are tried.

    Raises:
        SlmError: When not even one window per process fits.
    """
    config = recipe.model.config()

    def needed(chosen: Recipe) -> int:
        return training_bytes(chosen, config, place.precision, processes, place.able).total

    limit = None if place.available is None else _SHARE * place.available
    ways = [resized(recipe, size) for size in reversed(_divisors(recipe)) if size % processes == 0]
    if not ways:
        windows = recipe.batch.batch_size * recipe.batch.accumulation
        raise SlmError(
            f"{processes} processes cannot share updates of {windows} windows evenly",
            f"--set batch.accumulation={-(-windows // processes) * processes} --set batch.batch_size=auto"
            if recipe.batch.batch_size == 1
            else "choose batch.accumulation so that batch.batch_size x batch.accumulation is a multiple of the processes",
        )
    ways = [way for way in ways if limit is None or needed(way) <= limit]
    most = None
    for way in ways:
        if most is not None and way.batch.batch_size > most:
            continue
        if fits is None or fits(way):
            return way
        most = way.batch.batch_size // 2
    raise SlmError(
        "batch.batch_size=auto: not even one window per process fits into the memory",
        advise(recipe, config, place.precision, processes, place.available, place.able),
    )


def fitted(recipe: Recipe, device: torch.device, processes: Processes, note: Callable[[str], None]) -> Recipe:
    """Returns a recipe with the largest micro-steps that fit here; the recipe itself unless it has `batch_size: auto`.

    On a GPU, updates with random tokens are tried. With FSDP they are not: no process holds the whole model there.

    Args:
        recipe: The recipe, the same in every process.
        device: The device of this process.
        processes: The processes that will train; all get the same recipe.
        note: Reports the choice.

    Raises:
        SlmError: When nothing fits.
    """
    if not recipe.batch.automatic:
        return recipe
    here = place_of(recipe, device)
    sharded = processes.size > 1 and recipe.machine.parallel == "fsdp"
    tried = device.type == "cuda" and not sharded

    def fits(way: Recipe) -> bool:
        return _runs(way, device, here, way.batch.batch_size // processes.size)

    chosen: Recipe | None = None
    error: SlmError | None = None
    try:
        chosen = fitted_by_estimate(recipe, here, processes.size, fits if tried else None)
    except SlmError as caught:
        error = caught
    sizes = processes.total(
        [float(chosen.batch.batch_size) if chosen and rank == processes.rank else 0.0 for rank in range(processes.size)]
    )
    if error is not None:
        raise error
    if min(sizes) == 0:
        raise SlmError("batch.batch_size=auto: another process has too little memory", "lower batch.context")
    chosen = resized(recipe, int(min(sizes)))
    needed = training_bytes(chosen, recipe.model.config(), here.precision, processes.size, here.able).total
    room = "" if here.available is None else f" of {here.available / _MIB:,.0f}"
    note(
        f"batch.batch_size=auto: {chosen.batch.batch_size} windows a micro-step, {chosen.batch.accumulation} micro-steps an "
        f"update ({'tried' if tried else 'by the estimate'}: about {needed / _MIB:,.0f}{room} MiB a process)"
    )
    return chosen


def place_of(recipe: Recipe, device: torch.device) -> Place:
    """Returns what this machine's device has for one of its processes."""
    able = capability(device)
    precision = choose_precision(recipe.machine.precision, able, recipe.model.config())
    if device.type == "cuda":
        return Place(able, precision, torch.cuda.mem_get_info(device)[0])
    free = memory().free
    return Place(able, precision, None if free is None else free // local_size())


def _divisors(recipe: Recipe) -> list[int]:
    windows = recipe.batch.batch_size * recipe.batch.accumulation
    return [size for size in range(1, windows + 1) if windows % size == 0]


def _runs(recipe: Recipe, device: torch.device, place: Place, rows: int) -> bool:
    """Returns whether updates with random tokens of this process's rows fit into memory."""
    config = recipe.model.config()
    try:
        with torch.random.fork_rng():
            _try(recipe, config, device, place.precision, rows)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _try(recipe: Recipe, config: ModelConfig, device: torch.device, precision: Precision, rows: int) -> None:
    flex = choose_flex(recipe, config, capability(device), precision, device, lambda _: None)
    model = build_model(recipe, config, device, None, flex=flex)
    average = build_average(recipe, model, 0) if recipe.optimizer.averages else None
    ids = torch.randint(0, config.vocab_size, (rows, recipe.batch.context), device=device)
    learner = Learner(
        Objective(
            model,
            chunk=recipe.machine.loss_chunk,
            compiled=recipe.machine.compile,
            teachers=teachers_of(recipe, device, precision),
        ),
        make_optimizers(model, recipe.optimizer),
        lambda _: (ids, ids, torch.zeros_like(ids)) if recipe.data.sampler == "best_fit" else (ids, ids),
        UpdateSettings(lambda _: 0.0, precision, accumulation=min(2, recipe.batch.accumulation)),
        processes=Alone(),
    )
    for number in range(_TRIAL_UPDATES):
        learner.update(number, lambda: None)
        if average is not None:
            average.update()
