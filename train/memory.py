"""Estimates of the memory of training, and which settings to lower if it does not suffice.

Dimensions: B windows, T positions, D hidden, F intermediate, N heads, K kv heads, H head dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from slm.core.checkpoint import read_config, tensor_shapes
from slm.core.config import ModelConfig
from slm.core.nn.attention import SHORT
from slm.core.nn.kernels import AttentionKernel
from slm.train.attention import training_kernels
from slm.train.loss import CHUNK_BYTES
from slm.train.precision import CPU, Capability, Precision
from slm.train.recipe import Recipe
from slm.train.teacher import teacher_paths

_FLOAT32 = 4
_PRODUCT = 2  # bytes of autocast's types
_MIB = 1 << 20


@dataclass(frozen=True)
class TrainingBytes:
    """Memory of one process, in bytes.

    Attributes:
        weights: The weights, in float32.
        gradients: The gradients, in float32.
        moments: The optimizers' moments.
        average: The average of the weights.
        teachers: The weights of the teachers, with their matrices cast by autocast.
        update: Copies of the weights during an update, when activations are freed.
        activations: Tensors that the forward pass saves for the backward pass, including matrices cast by autocast or rounded
            to a grid.
        snapshot: Copies in main memory that a thread writes to disk; only on a CPU, where they share the memory.
        loss: A chunk of logits, and the head's gradients while they are computed; the rounded head.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    teachers: int
    update: int
    activations: int
    loss: int
    snapshot: int = 0

    @property
    def total(self) -> int:
        """The peak: the larger of what a micro-step and an update add to the rest."""
        kept = self.weights + self.gradients + self.moments + self.average + self.teachers + self.snapshot
        return kept + max(self.update, self.activations + self.loss)


def training_bytes(
    recipe: Recipe, config: ModelConfig, precision: Precision, processes: int = 1, able: Capability = CPU
) -> TrainingBytes:
    """Estimates the memory of training, without libraries, data and fragmentation.

    Args:
        recipe: The recipe.
        config: The model's shape.
        precision: The type of the products.
        processes: Number of processes that share the batch and, with FSDP, the weights.
        able: The capabilities of the device, on which the attention kernel depends.
    """
    shared = processes if recipe.machine.parallel == "fsdp" else 1
    weights = config.parameter_count() * _FLOAT32
    matrices = sum(
        prod(shape) for name, shape in tensor_shapes(config).items() if ".layers." in name and len(shape) > 1
    )
    moments = 2 * weights + _moments_less_adamw(recipe, config)
    on_grid = recipe.qat.grid is not None
    cast = matrices * (_PRODUCT if precision.autocast is not None else _FLOAT32 if on_grid else 0)
    if recipe.machine.gradient_checkpointing:
        cast //= config.num_hidden_layers  # one layer at a time
    tokens = -(-recipe.batch.batch_size // processes) * recipe.batch.context
    chunk = recipe.machine.loss_chunk
    product = _PRODUCT if precision.autocast is not None else _FLOAT32
    snapshot = 0
    if recipe.checkpoints.asynchronous and able.device == "cpu":
        # In the first process, which writes: the trained weights, the weights of checkpoints where they differ, the optimizer's
        # moments, and the average.
        deployed = weights if recipe.optimizer.averages or on_grid else 0
        snapshot = weights + deployed + moments + (weights if recipe.optimizer.averages else 0)
    rows = min(tokens, chunk if chunk is not None else max(1, CHUNK_BYTES // (product * config.vocab_size)))
    per_token = max(
        _bytes_per_token(_with(recipe, "batch", context=length, first_context=None), config, precision, able)
        for length in recipe.batch.contexts
    )
    return TrainingBytes(
        weights=weights // shared,
        gradients=weights // shared,
        moments=moments // shared,
        average=weights // shared if recipe.optimizer.averages else 0,
        teachers=_teacher_bytes(recipe, precision),
        update=weights // shared if recipe.optimizer.cautious else 0,
        activations=tokens * per_token + cast,
        loss=_loss_bytes(rows, config, product, able)
        + (config.vocab_size * config.hidden_size * _FLOAT32 if on_grid else 0),
        snapshot=snapshot,
    )


def _teacher_bytes(recipe: Recipe, precision: Precision) -> int:
    """Returns the weights of all teachers; every process has them whole.

    Autocast keeps the matrices of the blocks in its own type alone, and a second copy of the head in it.
    """
    total = 0
    for path in teacher_paths(recipe):
        config = read_config(path)
        if precision.autocast is None:
            total += config.parameter_count() * _FLOAT32
            continue
        matrices = sum(
            prod(shape) for name, shape in tensor_shapes(config).items() if ".layers." in name and len(shape) > 1
        )
        head = config.vocab_size * config.hidden_size
        total += (config.parameter_count() - matrices) * _FLOAT32 + (matrices + head) * _PRODUCT
    return total


def _moments_less_adamw(recipe: Recipe, config: ModelConfig) -> int:
    """Returns what the optimizer's state adds to AdamW's two moments: Muon keeps one, NorMuon also a value for each row."""
    if not recipe.optimizer.orthogonalizes:
        return 0
    shapes = [shape for name, shape in tensor_shapes(config).items() if ".layers." in name and len(shape) > 1]
    rows = sum(shape[0] for shape in shapes) if recipe.optimizer.name == "normuon" else 0
    return (rows - sum(map(prod, shapes))) * _FLOAT32


def _loss_bytes(rows: int, config: ModelConfig, product: int, able: Capability) -> int:
    """Returns what `linear_cross_entropy` holds at its peak, for chunks of so many positions."""
    logits, table = rows * config.vocab_size, config.vocab_size * config.hidden_size
    if able.device == "cpu":
        return logits * product + 2 * table * _FLOAT32  # the softmax goes over a few rows at a time
    # The softmax of a chunk in float32 beside it; the gradient of the head, what a chunk adds to it, and the head in the type
    # of the products.
    cast = product if product < _FLOAT32 else 0
    return logits * (product + _FLOAT32) + table * (_FLOAT32 + product + cast)


def advise(
    recipe: Recipe,
    config: ModelConfig,
    precision: Precision,
    processes: int,
    available: int | None = None,
    able: Capability = CPU,
) -> str:
    """Returns which settings to lower, how far, and what that saves.

    Args:
        recipe: The recipe.
        config: The model's shape.
        precision: The type of the products.
        processes: Number of processes that share the batch.
        available: Bytes available to a process: settings are lowered until it needs less. None lowers them by one step.
        able: The capabilities of the device.
    """

    def total(chosen: Recipe) -> int:
        return training_bytes(chosen, config, precision, processes, able).total

    def first_to_fit(ways: Sequence[Recipe]) -> Recipe | None:
        return next((way for way in ways if available is None or total(way) < available), None)

    ways = [_smaller_batches(recipe, processes)]
    anew = _with(recipe, "machine", gradient_checkpointing=True)
    if total(anew) < total(recipe):  # of no use if it is on already, or with a single layer
        ways.append([anew, *_smaller_batches(anew, processes)])
    found = [way for way in map(first_to_fit, ways) if way is not None]
    if found:
        return "; or ".join(_advice(recipe, way, total(recipe), total(way)) for way in found)
    least = ways[-1][-1] if ways[-1] else recipe
    shorter = [_with(least, "batch", context=context) for context in _halves(recipe)]
    chosen = first_to_fit(shorter)
    if chosen is None:
        least = shorter[-1] if shorter else least
        return f"a smaller model: this one takes {total(least) / _MIB:,.0f} MiB with all other settings at their lowest"
    return f"{_advice(recipe, chosen, total(recipe), total(chosen))}; or a smaller model"


def _smaller_batches(recipe: Recipe, processes: int) -> list[Recipe]:
    """Returns the recipe with each batch cut into more micro-steps, down to one window per process."""
    batch = recipe.batch
    mine = batch.batch_size // processes
    return [
        _with(recipe, "batch", batch_size=batch.batch_size // parts, accumulation=batch.accumulation * parts)
        for parts in range(2, mine + 1)
        if mine % parts == 0
    ]


def _halves(recipe: Recipe) -> list[int]:
    """Returns half of the context, a quarter, and so on, down to the first length of rows or the shortest that still trains."""
    context, least = recipe.batch.context, recipe.batch.first_context or 2
    return [context >> times for times in range(1, context.bit_length() - 1) if context >> times >= least]


def _advice(recipe: Recipe, chosen: Recipe, now: int, then: int) -> str:
    """Returns the options that lead from one recipe to the other, with what they save and cost."""
    settings = "".join(
        f"--set {section}.{name}={str(value).lower()} "
        for section in ("batch", "machine")
        for name, value in getattr(chosen, section)
        if value != getattr(getattr(recipe, section), name)
    )
    costs = []
    parts = chosen.batch.accumulation // recipe.batch.accumulation
    if parts > 1 and chosen.batch.context == recipe.batch.context:
        costs.append(
            f", and learns as much with {parts} times as many micro-steps "
            "(schedule.micro_steps, schedule.warmup_micro_steps, evaluation.every_micro_steps)"
        )
    if chosen.machine.gradient_checkpointing != recipe.machine.gradient_checkpointing:
        costs.append(", for a third more work")
    return f"{settings}saves about {(now - then) / _MIB:,.0f} of {now / _MIB:,.0f} MiB{''.join(costs)}"


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _bytes_per_token(recipe: Recipe, config: ModelConfig, precision: Precision, able: Capability) -> int:
    """Returns the bytes per position that all layers save for the backward pass."""
    autocast = precision.autocast is not None
    layers = [
        _layer_bytes(config, autocast, kernel, recipe.qat.grid is not None)
        + _attention_bytes(config, autocast, kernel, recipe.batch.context, layer, recipe.data.sampler == "best_fit")
        for layer, kernel in enumerate(training_kernels(recipe, config, able, precision))
    ]
    stream = config.hidden_size * _FLOAT32
    ends = 3 * stream  # of the last norm, and of the gradient that the loss computes
    if recipe.machine.gradient_checkpointing:
        return config.num_hidden_layers * stream + max(layers) + ends  # all inputs, and one layer's tensors
    return sum(layers) + ends


def _layer_bytes(config: ModelConfig, autocast: bool, kernel: AttentionKernel, on_grid: bool) -> int:
    """Returns the bytes per position that a layer saves, without those specific to the attention kernel.

    A norm saves only its input: in float32 on CUDA (`_fused_rms_norm`), in the input's own type on a CPU
    (`slm.core.nn.norm`). The inputs of two norms of a layer, and of those of queries and keys, are the results of products.
    """
    product = _PRODUCT if autocast else _FLOAT32
    of_product = product if kernel == "cpu" else _FLOAT32
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    # Four norms a layer. The five products that read a norm share two input tensors, but autocast and rounding copy them for
    # each product.
    norms = config.hidden_size * (2 * _FLOAT32 + 2 * of_product + (5 if autocast or on_grid else 2) * product)
    # Queries and keys before their norms; queries, keys and values as attention reads them; its output. Only the
    # memory-efficient kernel writes the output in the layout that the next product reads; the others need a copy.
    outputs = 1 if kernel == "efficient" else 2
    attention = (queries + keys) * of_product + ((1 + outputs) * queries + 2 * keys) * product
    # Cosines and sines, cast for queries and for keys.
    rotation = 2 * config.head_dim * product if autocast else 0
    rounded = queries * product if on_grid else 0  # attention's own output is saved beside the one that is rounded
    return norms + attention + rotation + rounded + 4 * config.intermediate_size * product


def _attention_bytes(
    config: ModelConfig, autocast: bool, kernel: AttentionKernel, context: int, layer: int, apart: bool
) -> int:
    """Returns the bytes per position that attention saves besides queries, keys, values and its output.

    Args:
        config: The model's shape.
        autocast: Whether products are computed in 16 bits.
        kernel: The kernel.
        context: Length of a row.
        layer: Number of the layer.
        apart: Whether rows have documents that do not attend to each other.
    """
    product = _PRODUCT if autocast else _FLOAT32
    heads, window = config.num_attention_heads, config.window(layer)
    if apart:  # a mask for each row, as booleans and as numbers; the plain products are not used
        expanded = 2 * (heads - config.num_key_value_heads) * config.head_dim * product
        return context * (1 + product) + (expanded if kernel == "efficient" else 0)
    if kernel == "efficient":  # keys and values, repeated for each query head
        return 2 * (heads - config.num_key_value_heads) * config.head_dim * product
    if kernel == "cpu" and context <= SHORT and (window is None or context <= window):  # attend_in_products
        return heads * context * (_FLOAT32 + (product if autocast else 0))
    return 0
