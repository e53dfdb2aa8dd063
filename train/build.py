"""Builds what a recipe describes: the device, the model set up for the machine, its optimizers and its batches."""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import fake_quantize
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, PAD, Tokenizer
from slm.train.average import WeightAverage, exponential, uniform
from slm.train.data.packing import Packing, pack
from slm.train.data.tokens import Tokens
from slm.train.data.windows import SAMPLERS, gather
from slm.train.learner import Learner, Objective, UpdateSettings
from slm.train.optimizer import make_optimizers
from slm.train.parallel import Processes, check_even, launched, local_rank, share_of, shared_like
from slm.train.precision import Precision, restore_scaler
from slm.train.qat import first_rounded_update, rounded_from_start
from slm.train.recipe import Recipe
from slm.train.schedule import Schedule, ramp
from slm.train.spikes import SpikeGuard
from slm.train.state import Counters, SavedState
from slm.train.teacher import Ensemble, FrozenModel, teacher_paths

_MUONS = {"muon": "Muon", "normuon": "NorMuon"}


def pick_device(wanted: str) -> torch.device:
    """Returns the device of a recipe's `machine.device`. Each process of a group gets a GPU of its own.

    Raises:
        SlmError: When the recipe asks for CUDA and there is no GPU, or not one per process.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise SlmError("PyTorch finds no CUDA device", "--set machine.device=cpu, or install PyTorch for CUDA")
    if not available or wanted == "cpu":
        return torch.device("cpu")
    if not launched():
        return torch.device("cuda")
    if local_rank() >= torch.cuda.device_count():
        raise SlmError(
            f"torchrun started process {local_rank()} here, and there are {torch.cuda.device_count()} GPUs",
            f"--nproc-per-node {torch.cuda.device_count()}",
        )
    return torch.device("cuda", local_rank())


def with_special_tokens(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the shape with the tokenizer's special ids.

    The end of a turn stops generation too, so that the model can be fine-tuned on chats later.
    """
    end_of_text, end_of_turn, pad = (tokenizer.token_id(token) for token in (END_OF_TEXT, END_OF_TURN, PAD))
    ids = {"bos_token_id": end_of_text, "eos_token_id": (end_of_text, end_of_turn), "pad_token_id": pad}
    return ModelConfig.checked(config.model_dump() | ids)


def check_machine(recipe: Recipe, device: torch.device, processes: Processes, *, resumed: bool = False) -> None:
    """Checks that the device and the processes support the recipe.

    Args:
        recipe: The recipe.
        device: The device of this process.
        processes: The processes that share the batches.
        resumed: Whether a run is resumed: another number of processes may then share its batches unevenly.

    Raises:
        SlmError: When they do not.
    """
    if recipe.machine.compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SlmError("machine.compile needs a C++ compiler, and there is none", "apt install g++, or leave it out")
    if recipe.machine.attention == "flex" and device.type != "cuda":
        raise SlmError(
            "machine.attention=flex needs CUDA: elsewhere FlexAttention has no backward pass", "leave it out"
        )
    if not resumed:
        check_even(recipe.batch.batch_size, processes)
    if processes.size > 1 and recipe.machine.parallel == "fsdp" and recipe.optimizer.orthogonalizes:
        raise SlmError(
            f"{_MUONS[recipe.optimizer.name]} needs whole matrices, and machine.parallel=fsdp gives each process a share of "
            "them",
            "--set machine.parallel=ddp, or --set optimizer.name=adamw",
        )


def build_model(
    recipe: Recipe,
    config: ModelConfig,
    device: torch.device,
    saved: SavedState | None,
    processes: Processes | None = None,
    *,
    flex: bool = False,
) -> CausalLM:
    """Returns the model, with weights from the seed or from a saved state, set up for the machine.

    It lies on its device, unless several processes will shard it: FSDP then moves it shard by shard.

    Args:
        recipe: The recipe.
        config: The model's shape.
        device: The device.
        saved: The state to resume from.
        processes: The processes that share the batches.
        flex: Whether to use FlexAttention; see `slm.train.attention`.

    Raises:
        SlmError: When the saved state is of another model.
    """
    model = CausalLM(config)
    if saved is None:
        model.init_weights(torch.Generator().manual_seed(recipe.seed))
    else:
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}  # a tied head counts once
        if wanted != {name: tensor.shape for name, tensor in saved.weights.items()}:
            raise SlmError(
                "the saved weights are not those of this model", "put config.yaml back as it was, or start a new run"
            )
        model.load_state_dict(saved.weights, strict=False)
    if recipe.qat.grid is not None:
        fake_quantize(model, recipe.qat.grid)
    body = model.model
    body.gradient_checkpointing = recipe.machine.gradient_checkpointing
    body.flex = flex
    for module in (body, *body.layers):
        module.dropout = recipe.regularization.dropout
    split = processes is not None and processes.size > 1 and recipe.machine.parallel == "fsdp"
    return model if split else model.to(device)


def build_learner(
    recipe: Recipe,
    model: CausalLM,
    tokens: Tokens,
    device: torch.device,
    precision: Precision,
    saved: SavedState | None,
    processes: Processes,
    guard: SpikeGuard | None = None,
) -> Learner:
    """Returns the learner of a model.

    Args:
        recipe: The recipe, with its length in micro-steps.
        model: The model, on its device.
        tokens: The training tokens.
        device: The device.
        precision: The type of the products.
        saved: The state to resume from.
        processes: The processes that share the batches.
        guard: Judges the updates; see `slm.train.spikes`.
    """
    mine = share_of(recipe.batch.batch_size, processes)
    loss = Objective(
        model,
        chunk=recipe.machine.loss_chunk,
        compiled=recipe.machine.compile,
        teachers=teachers_of(recipe, device, precision),
    )
    objective = processes.wrap(loss, recipe.machine.parallel, device)
    optimizers = make_optimizers(model, recipe.optimizer)
    batches = partial(_batch, recipe, tokens, mine, processes.rank, device)

    left_out_before = 0 if saved is None else saved.counters.spikes.left_out

    def batch(micro_step: int) -> tuple[Any, ...]:
        """Returns the batch of a micro-step, behind the data that rewinding left out, also before it was switched off."""
        left_out = left_out_before if guard is None else guard.left_out
        return batches(micro_step + left_out * recipe.batch.accumulation, recipe.context_at(micro_step))

    learner = Learner(
        objective,
        optimizers,
        rounded_from_start(recipe, model, batch),
        UpdateSettings(
            rate=schedule_of(recipe).rate,
            precision=precision,
            accumulation=recipe.batch.accumulation,
            max_grad_norm=recipe.optimizer.max_grad_norm,
            momentum=momentum_of(recipe),
            decay=decay_of(recipe),
            share=(mine.stop - mine.start) * processes.size / recipe.batch.batch_size,
        ),
        processes=processes,
        guard=guard,
    )
    if saved is not None:
        optimizers.load_state_tensors(model, saved.optimizer)
        restore_scaler(learner.scaler, saved.counters.scaler)
    return learner


@torch.no_grad()
def restore(model: CausalLM, learner: Learner, saved: SavedState) -> None:
    """Returns a model in training, its optimizers and its loss scale to an earlier state of the same run."""
    for name, parameter in model.named_parameters():
        parameter.copy_(shared_like(saved.weights[name], parameter))
    learner.optimizers.load_state_tensors(model, saved.optimizer)
    restore_scaler(learner.scaler, saved.counters.scaler)


def make_guard(recipe: Recipe, counters: Counters) -> SpikeGuard | None:
    """Returns what judges the updates of a run, as its saved state left it; None where the recipe makes every update."""
    spikes = recipe.spikes
    if spikes.action == "none":
        return None
    advice = (
        "try a lower schedule.learning_rate or a longer warm-up in config.yaml, then --resume; spikes.limit and "
        "spikes.threshold can be raised there too"
    )
    guard = SpikeGuard(spikes.action, spikes.threshold, spikes.window, spikes.limit, advice, phase_of(recipe))
    guard.restore(counters.spikes)
    return guard


def phase_of(recipe: Recipe) -> Callable[[int], tuple[int, bool]]:
    """Returns what distinguishes updates by their numbers, from 0: the length of rows, and whether products are rounded."""
    first_rounded = first_rounded_update(recipe)

    def phase(update: int) -> tuple[int, bool]:
        return recipe.context_at(update * recipe.batch.accumulation), update >= first_rounded

    return phase


def build_average(recipe: Recipe, model: CausalLM, updates: int) -> WeightAverage | None:
    """Returns the average of the weights that evaluations and checkpoints use; None without one.

    Args:
        recipe: The recipe, with its length in micro-steps.
        model: The model, on its device.
        updates: Number of updates done.
    """
    optimizer = recipe.optimizer
    if not optimizer.averages:
        return None
    before = recipe.updates - max(1, round(optimizer.tail * recipe.updates))
    kept = partial(exponential, optimizer.ema) if optimizer.ema else partial(uniform, before)
    return WeightAverage(model, kept, updates)


def teachers_of(recipe: Recipe, device: torch.device, precision: Precision) -> Ensemble | None:
    """Returns the teachers of a run, loaded on a device; None without them."""
    teachers = [FrozenModel(path, device, precision.autocast) for path in teacher_paths(recipe)]
    return Ensemble(teachers, recipe.distillation.weight) if teachers else None


def schedule_of(recipe: Recipe) -> Schedule:
    """Returns the schedule of the learning rate of a recipe, which has its length in micro-steps."""
    schedule = recipe.schedule
    # The schedule reaches 0 one update after the end: an update at a rate of 0 would change nothing.
    after_the_end = 0 if schedule.final_learning_rate else recipe.batch.accumulation
    return Schedule(
        peak=schedule.learning_rate,
        final=schedule.final_learning_rate,
        total=recipe.micro_steps + after_the_end,
        warmup=schedule.warmup_micro_steps,
        start=schedule.start,
        shape=schedule.shape,
        decay=schedule.decay,
    )


def momentum_of(recipe: Recipe) -> Callable[[int], float] | None:
    """Returns the warm-up of Muon's momentum; None without one. The first update has `momentum_start`."""
    optimizer, first = recipe.optimizer, recipe.batch.accumulation
    if not (optimizer.orthogonalizes and optimizer.momentum_warmup):
        return None
    end = first + round(optimizer.momentum_warmup * recipe.micro_steps)
    return partial(ramp, optimizer.momentum_start, optimizer.momentum, first, end)


def decay_of(recipe: Recipe) -> Callable[[int], float] | None:
    """Returns the schedule of the weight decay; None if it is constant. 0 is reached at the end."""
    return None if recipe.optimizer.decay_shape == "constant" else partial(ramp, 1.0, 0.0, 0, recipe.micro_steps)


def positions_of(recipe: Recipe, tokens: Tokens) -> int:
    """Returns the positions of rows in one pass over the training text."""
    packing = packing_of(recipe, tokens)
    return len(tokens.ids) if packing is None else packing.positions


def tokens_seen(recipe: Recipe, tokens: Tokens, micro_steps: int) -> int:
    """Returns the number of targets in the first micro-steps of a run."""
    packing = packing_of(recipe, tokens)
    if packing is None:
        return micro_steps * recipe.tokens_per_micro_step
    return packing.targets_before(recipe.seed, micro_steps * recipe.batch.batch_size)


def packing_of(recipe: Recipe, tokens: Tokens) -> Packing | None:
    """Returns the documents of the training text in rows; None if rows are cut from the stream."""
    return pack(tokens.ids, recipe.batch.context) if recipe.data.sampler == "best_fit" else None


def _batch(
    recipe: Recipe, tokens: Tokens, mine: slice, rank: int, device: torch.device, micro_step: int, length: int
) -> tuple[Any, ...]:
    """Returns this process's windows of a micro-step as rows of a length, and seeds dropout from the recipe's seed alone."""
    ids, batch, seed = tokens.ids, recipe.batch, recipe.seed
    torch.manual_seed(int(np.random.default_rng([seed, micro_step, rank]).integers(1 << 62)))
    packing = packing_of(recipe, tokens)
    if packing is not None:
        rows = packing.drawn(seed, micro_step * batch.batch_size, batch.batch_size)[mine]
        shorter = [tensor.reshape(-1, length) for tensor in packing.gather(rows, device)]
        return *shorter, _share_of_update(recipe, packing, rows, micro_step)
    # Drawn for the update as a whole, so that its windows do not depend on how they are divided among micro-steps.
    update, part = divmod(micro_step, batch.accumulation)
    windows = batch.accumulation * batch.batch_size
    all_starts = SAMPLERS[recipe.data.sampler](len(ids), windows, batch.context, seed, update)
    starts = all_starts[part * batch.batch_size : (part + 1) * batch.batch_size][mine]
    inputs, targets = gather(ids, starts, batch.context, device)
    return inputs.reshape(-1, length), targets.reshape(-1, length)  # shorter rows at first, of the same tokens


def _share_of_update(recipe: Recipe, packing: Packing, mine: NDArray[np.int64], micro_step: int) -> float:
    """Returns the factor that makes a process's mean loss of a micro-step count by its targets among those of the update.

    Losses are averaged over the processes and micro-steps of an update. With this factor the result is the mean over all
    targets of the update, however it is divided.
    """
    batch = recipe.batch
    first = micro_step // batch.accumulation * batch.accumulation * batch.batch_size
    all_rows = packing.drawn(recipe.seed, first, batch.accumulation * batch.batch_size)
    mean_row: float = packing.targets_in(all_rows).mean()
    return float(packing.targets_in(mine).mean() / mean_row)
