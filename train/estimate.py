"""Estimates of a recipe's tokens, memory and time, on this machine or on another GPU."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.accounting import keys_seen, prefill_flops
from slm.core.checkpoint import read_config, tensor_shapes
from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import fake_quantize
from slm.train.attention import training_kernels
from slm.train.batching import Place
from slm.train.learner import Objective
from slm.train.memory import TrainingBytes, advise, training_bytes
from slm.train.muon import orthogonalization_flops
from slm.train.optimizer import make_optimizers
from slm.train.precision import CPU, FLOAT32, Capability, Precision, capability, choose_precision
from slm.train.recipe import Recipe
from slm.train.teacher import teacher_paths

# Tokens in the timed micro-step: enough that products run at full speed and that the embedding's gradient, whose size does not
# depend on the tokens, does not dominate; few enough to be timed within seconds.
_TOKENS = 1024
_GOES = 3

# A forward pass, and a backward pass of twice its work. Gradient checkpointing repeats the forward pass.
_PASSES = 3
_PASSES_ANEW = 4
# Share of a GPU's peak that training of small models usually reaches. An assumption, not a measurement.
_UTILIZATION = 0.3
# The kernels of a small model finish before the next ones are launched: a layer takes at least this long, forward and
# backward. Also an assumption.
_LAYER_S = 1e-3
_GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU according to its vendor's data sheet.

    Attributes:
        tflops: Dense products in 16 bits, accumulated in float32, 10^12 operations a second.
        gb_s: Memory bandwidth, 10^9 bytes a second.
        memory_gib: Memory available to a process; a T4's 16 GB are 14.6 GiB with error correction on.
        compute: Compute capability.
    """

    tflops: float
    gb_s: float
    memory_gib: float
    compute: tuple[int, int]

    @property
    def able(self) -> Capability:
        """Its capabilities; bfloat16 is native from compute capability 8.0 on."""
        return Capability("cuda", self.compute >= (8, 0), self.compute)


# For training. A V100 needs a PyTorch built for CUDA 12: CUDA 13 and onnxruntime-gpu 1.31 have no kernels for 7.0.
GPUS = {
    "t4": Gpu(65, 320, 14.6, (7, 5)),
    "v100": Gpu(125, 900, 15.8, (7, 0)),
    "l4": Gpu(121, 300, 22, (8, 9)),
    "a10": Gpu(125, 600, 22, (8, 6)),
    "a100": Gpu(312, 2039, 79, (8, 0)),
    "h100": Gpu(989, 3350, 79, (9, 0)),
    "h200": Gpu(989, 4800, 139, (9, 0)),
    "rtx3090": Gpu(71, 936, 23.6, (8, 6)),
    "rtx4090": Gpu(165, 1008, 23.6, (8, 9)),
}
# Values that an update reads and writes per parameter: AdamW its value, two moments and the gradient; Muon one moment.
_ADAMW_BYTES, _MUON_BYTES = 28, 20
# Bytes that a micro-step reads and writes per parameter to round it: for the range of each block, and for the rounded values.
_QAT_BYTES = 24


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run.

    Attributes:
        device: Name of the device.
        precision: Type of the products.
        parameters: Parameters of the model.
        updates: Updates in the run.
        micro_steps: Micro-steps in the run.
        tokens: Tokens in the run.
        kernels: Number of layers by attention kernel.
        memory: Memory of one process.
        memory_available: Bytes available to a process; None if unknown.
        seconds: Time of the run.
        update_seconds: The part of it that the optimizer takes.
        basis: How the time was estimated, in a few words.
        advice: Settings to lower if memory does not suffice.
    """

    device: str
    precision: str
    parameters: int
    updates: int
    micro_steps: int
    tokens: int
    kernels: dict[str, int]
    memory: TrainingBytes
    memory_available: int | None
    seconds: float
    update_seconds: float
    basis: str
    advice: str | None


def place_on(recipe: Recipe, card: Gpu) -> Place:
    """Returns what a GPU has for a process that trains a recipe."""
    precision = choose_precision(recipe.machine.precision, card.able, recipe.model.config())
    return Place(card.able, precision, round(card.memory_gib * _GIB))


def estimate(recipe: Recipe, gpu: str | None, memory_bytes: int | None, processes: int = 1) -> Estimate:
    """Estimates the tokens, memory and time of a recipe.

    Args:
        recipe: The recipe, with its length in micro-steps.
        gpu: A name in `GPUS`; None stands for the device that training would use here.
        memory_bytes: Memory of this machine; None if unknown.
        processes: Number of processes, each on such a device.
    """
    config = recipe.model.config()
    here = torch.device("cuda" if torch.cuda.is_available() and recipe.machine.device != "cpu" else "cpu")
    available: int | None
    if gpu is not None:
        card = GPUS[gpu]
        able, available = card.able, round(card.memory_gib * _GIB)
    else:
        able = capability(here)
        available = torch.cuda.get_device_properties(here).total_memory if here.type == "cuda" else memory_bytes
    precision = choose_precision(recipe.machine.precision, able, config)
    memory = training_bytes(recipe, config, precision, processes, able)
    tokens = recipe.updates * recipe.batch.accumulation * recipe.tokens_per_micro_step
    if gpu is not None:
        speed = card.tflops * 1e12 * _UTILIZATION / (1 if precision.autocast is not None else 8)
        at_least = recipe.micro_steps * config.num_hidden_layers * _LAYER_S
        updating = recipe.updates * _update_seconds(recipe, config, card)
        rounding = recipe.micro_steps * config.parameter_count() * _QAT_BYTES / (card.gb_s * 1e9)
        learning = max(tokens * training_flops(recipe, config, able, precision) / speed, at_least)
        learning += rounding if recipe.qat.grid is not None else 0
        name, basis = gpu.upper(), f"{_UTILIZATION:.0%} of its {card.tflops:g} TFLOP/s, not run on that hardware"
    else:
        learning, updating = _timed_seconds(recipe, config, precision, here)
        name, basis = here.type.upper(), "one layer and the head, timed now"
    return Estimate(
        device=name,
        precision=precision.name,
        parameters=config.parameter_count(),
        updates=recipe.updates,
        micro_steps=recipe.micro_steps,
        tokens=tokens,
        kernels=dict(Counter(training_kernels(recipe, config, able, precision))),
        memory=memory,
        memory_available=available,
        seconds=learning / processes + updating,  # every process makes every update
        update_seconds=updating,
        basis=basis,
        advice=None
        if available is None or memory.total < available
        else advise(recipe, config, precision, processes, available, able),
    )


def training_flops(
    recipe: Recipe, config: ModelConfig, able: Capability = CPU, precision: Precision = FLOAT32
) -> float:
    """Returns the floating-point operations of training on one token, without updates.

    A kernel that masks scores outside the window computes them all the same, so they count.
    """
    context = recipe.batch.context
    forward = prefill_flops(config, context, head_positions=context)
    operations: float = forward.total
    for layer, kernel in enumerate(training_kernels(recipe, config, able, precision)):
        window = config.window(layer)
        if kernel == "efficient" and window is not None and context > window:
            operations += 4 * config.num_attention_heads * config.head_dim * (context**2 - keys_seen(context, window))
    passes = _PASSES_ANEW if recipe.machine.gradient_checkpointing else _PASSES
    return (operations * passes + _teachers_flops(recipe)) / context


def _teachers_flops(recipe: Recipe) -> float:
    """Returns the floating-point operations of all teachers for one row: a forward pass each."""
    context = recipe.batch.context
    shapes = (read_config(path) for path in teacher_paths(recipe))
    return sum(prefill_flops(shape, context, head_positions=context).total for shape in shapes)


def _update_seconds(recipe: Recipe, config: ModelConfig, card: Gpu) -> float:
    """Returns the seconds of an update on a GPU: every value is read and written once, and Muon orthogonalizes matrices."""
    matrices = [shape for name, shape in tensor_shapes(config).items() if ".layers." in name and len(shape) > 1]
    muon = recipe.optimizer.orthogonalizes
    by_muon = sum(rows * columns for rows, columns in matrices) if muon else 0
    moved = _ADAMW_BYTES * (config.parameter_count() - by_muon) + _MUON_BYTES * by_muon
    operations = sum(orthogonalization_flops(*shape) for shape in matrices) if muon else 0
    return moved / (card.gb_s * 1e9) + operations / (card.tflops * 1e12 * _UTILIZATION)


def _timed_seconds(
    recipe: Recipe, config: ModelConfig, precision: Precision, device: torch.device
) -> tuple[float, float]:
    """Times a model of one layer, forward and backward, a layer alone, and updates. Evaluations are not included.

    Returns:
        The seconds of all micro-steps, and of all updates.
    """
    one = config.model_copy(update={"num_hidden_layers": 1, "layer_types": config.layer_types[:1]})
    model = CausalLM(one)
    if recipe.qat.grid is not None:
        fake_quantize(model, recipe.qat.grid)
    model.to(device)
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

    def step() -> float:
        began = time.perf_counter()
        optimizers.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    total = seconds(whole) + (config.num_hidden_layers - 1) * seconds(layer)
    passes = _PASSES_ANEW / _PASSES if recipe.machine.gradient_checkpointing else 1
    learning = passes * total / ids.numel() * recipe.micro_steps * recipe.tokens_per_micro_step
    own = prefill_flops(config, recipe.batch.context, head_positions=recipe.batch.context).total
    learning *= 1 + _teachers_flops(recipe) / (_PASSES * own)  # at the speed of the model itself
    optimizers = make_optimizers(model, recipe.optimizer)
    with_layer = min(step() for _ in range(_GOES))
    for parameter in model.model.layers.parameters():
        parameter.grad = None  # the optimizers skip parameters without a gradient
    without = min(step() for _ in range(_GOES))
    update = without + config.num_hidden_layers * max(0.0, with_layer - without)
    return learning, update * recipe.updates
