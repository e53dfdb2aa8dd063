"""What a recipe would take: tokens, memory and time, on this machine or on a GPU that is not here. Estimates, all of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.accounting import prefill_flops
from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.train.learner import Objective
from slm.train.memory import TrainingBytes, advise, training_bytes
from slm.train.precision import Capability, Precision, capability, choose_precision
from slm.train.recipe import Recipe

# Enough for the products to run at their full speed and for the embedding's gradient, as large as the table however few the
# tokens, not to weigh too much; little enough to be timed within a few seconds.
_TOKENS = 1024
_GOES = 3

# A forward pass and a backward pass of twice its work; a third more where each layer is computed anew.
_PASSES = 3
_PASSES_ANEW = 4
# Share of a GPU's peak that training of small models usually gets. An assumption, not a measurement.
_UTILIZATION = 0.3
# A small model's kernels end before the next ones are launched: a layer takes at least this long, forward and backward. As
# much of an assumption.
_LAYER_S = 1e-3
_GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU as its vendor's data sheet has it.

    Attributes:
        tflops: Dense products in 16 bits, accumulated in float32, 10^12 operations a second.
        memory_gib: Of the card.
        bf16: Whether it multiplies bfloat16 in hardware.
    """

    tflops: float
    memory_gib: float
    bf16: bool


GPUS = {
    "t4": Gpu(65, 15, False),
    "v100": Gpu(125, 16, False),
    "l4": Gpu(121, 22, True),
    "a10": Gpu(125, 22, True),
    "a100": Gpu(312, 80, True),
    "h100": Gpu(989, 80, True),
    "h200": Gpu(989, 141, True),
    "rtx3090": Gpu(71, 24, True),
    "rtx4090": Gpu(165, 24, True),
}


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        device: Where.
        precision: What the products would be computed in.
        parameters: Of the model.
        updates: Of the run.
        micro_steps: Of the run.
        tokens: Learned from.
        memory: Of one process.
        seconds: Of the run.
        basis: How the time was arrived at, in a few words.
        advice: What to lower when the memory is not there.
    """

    device: str
    precision: str
    parameters: int
    updates: int
    micro_steps: int
    tokens: int
    memory: TrainingBytes
    seconds: float
    basis: str
    advice: str | None


def estimate(recipe: Recipe, gpu: str | None, memory_bytes: int | None, processes: int = 1) -> Estimate:
    """Estimates what a recipe takes.

    Args:
        recipe: With its length in micro-steps.
        gpu: A name in `GPUS`; None takes the device that training would take here.
        memory_bytes: What there is here; None where that is not known.
        processes: How many share the work, each on such a device.
    """
    config = recipe.model.config()
    here = torch.device("cuda" if torch.cuda.is_available() and recipe.machine.device != "cpu" else "cpu")
    available: int | None
    if gpu is not None:
        card = GPUS[gpu]
        able, available = Capability("cuda", card.bf16), round(card.memory_gib * _GIB)
    else:
        able = capability(here)
        available = torch.cuda.get_device_properties(here).total_memory if here.type == "cuda" else memory_bytes
    precision = choose_precision(recipe.machine.precision, able, config.hidden_size)
    memory = training_bytes(recipe, config, precision, processes)
    tokens = recipe.updates * recipe.batch.accumulation * recipe.tokens_per_micro_step
    if gpu is not None:
        speed = card.tflops * 1e12 * _UTILIZATION / (1 if precision.autocast is not None else 8)
        at_least = recipe.micro_steps * config.num_hidden_layers * _LAYER_S
        seconds = max(tokens * training_flops(recipe, config) / speed, at_least)
        name, basis = gpu.upper(), f"{_UTILIZATION:.0%} of its {card.tflops:g} TFLOP/s, not run on that hardware"
    else:
        seconds = _timed_seconds(recipe, config, precision, here)
        name, basis = here.type.upper(), "one layer and the head, timed now"
    return Estimate(
        device=name,
        precision=precision.name,
        parameters=config.parameter_count(),
        updates=recipe.updates,
        micro_steps=recipe.micro_steps,
        tokens=tokens,
        memory=memory,
        seconds=seconds / processes,
        basis=basis,
        advice=None
        if available is None or memory.total < available
        else advise(recipe, config, precision, processes, available),
    )


def training_flops(recipe: Recipe, config: ModelConfig) -> float:
    """Returns the floating-point operations of training on one token, updates not counted."""
    context = recipe.batch.context
    forward = prefill_flops(config, context, head_positions=context).total / context
    return forward * (_PASSES_ANEW if recipe.machine.gradient_checkpointing else _PASSES)


def _timed_seconds(recipe: Recipe, config: ModelConfig, precision: Precision, device: torch.device) -> float:
    """Times a model of one layer, forward and backward, and a layer alone; updates and evaluations come on top."""
    one = config.model_copy(update={"num_hidden_layers": 1, "layer_types": config.layer_types[:1]})
    model = CausalLM(one).to(device)
    objective = Objective(model)
    length = min(_TOKENS, recipe.batch.context)
    ids = torch.arange(_TOKENS // length * length, device=device).remainder(config.vocab_size).view(-1, length)
    positions = model.model.positions(ids, None, past=0)[config.layer_types[0]]
    hidden = torch.randn(*ids.shape, config.hidden_size, device=device)

    def whole() -> Tensor:
        loss: Tensor = objective(ids, ids)
        return loss

    def layer() -> Tensor:
        out: Tensor = model.model.layers[0](hidden, positions, None)
        return out.float().square().mean()

    def seconds(loss: Callable[[], Tensor]) -> float:
        def once() -> float:
            began = time.perf_counter()
            with torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
                value = loss()
            value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        return min(once() for _ in range(_GOES))

    total = seconds(whole) + (config.num_hidden_layers - 1) * seconds(layer)
    passes = _PASSES_ANEW / _PASSES if recipe.machine.gradient_checkpointing else 1
    return passes * total / ids.numel() * recipe.micro_steps * recipe.tokens_per_micro_step
