"""Computes the cost of a model from its configuration: parameters, bytes of weights and caches, and FLOPs.

No weights are loaded. A multiply-add is two operations. The counts include matrix products and attention's scores and
values. They leave out lookups, norms, rotations, activations and softmax, as PyTorch's counter does: their cost is linear in
the widths. Tests compare each figure with a measured one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slm.core.config import ModelConfig
from slm.core.contract import CacheLayer, CacheType, Target, cache_layers

# Cached positions: those that slm allocates (windows and slack), those that windows need, or the whole context.
CacheKind = Literal["windowed", "windowed_without_slack", "full"]

FLOAT32_BYTES = 4
HALF_BYTES = 2
_CACHE_BYTES: dict[CacheType, int] = {"float32": FLOAT32_BYTES, "float16": HALF_BYTES, "int8": 1}
# The block size that `slm quantize` prefers.
INT8_BLOCK = 128


@dataclass(frozen=True)
class Parameters:
    """Number of parameters in each part; `head` is 0 if the head is tied to the embedding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """The total; a tied head is counted once."""
        return self.embedding + self.attention + self.mlp + self.norms + self.head


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: `body` is the blocks' matrix products, `attention` is attention's scores and values."""

    body: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """The total."""
        return self.body + self.attention + self.head

    def per_token(self, tokens: int) -> "Flops":
        """Returns the average per token, for a total over `tokens`."""
        return Flops(self.body / tokens, self.attention / tokens, self.head / tokens)


def parameters(config: ModelConfig) -> Parameters:
    """Returns the number of parameters in each part."""
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    table = config.vocab_size * hidden
    return Parameters(
        embedding=table,
        attention=layers * hidden * config.head_dim * 2 * (heads + config.num_key_value_heads),
        mlp=layers * 3 * hidden * config.intermediate_size,
        norms=layers * (4 * hidden + 2 * config.head_dim) + hidden,
        head=0 if config.tie_word_embeddings else table,
    )


def weights_bytes(config: ModelConfig, itemsize: int) -> int:
    """Returns the bytes of all weights at `itemsize` bytes each, without rotation tables and file headers."""
    return parameters(config).total * itemsize


def int8_bytes(config: ModelConfig, block_size: int = INT8_BLOCK) -> int | None:
    """Returns the bytes of the weights in block-wise INT8, or None if a matrix does not divide into such blocks.

    A value takes one byte, a block's scale is a float32, and norms stay in float32.
    """
    inputs = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    if any(size % block_size for size in inputs):
        return None
    parts = parameters(config)
    matrices = parts.total - parts.norms
    return matrices + matrices // block_size * FLOAT32_BYTES + parts.norms * FLOAT32_BYTES


def cache_bytes(
    config: ModelConfig, context: int, batch: int = 1, itemsize: int = FLOAT32_BYTES, kind: CacheKind = "windowed"
) -> int:
    """Returns the bytes of keys and values in all layers.

    Args:
        config: The model's shape.
        context: Tokens in a row.
        batch: Rows.
        itemsize: Bytes of one value.
        kind: "windowed" is what slm allocates: a sliding layer's window and slack, even if the context is shorter.
            "windowed_without_slack" is what sliding layers attend to. "full" ignores windows.
    """
    total = 0
    for layer in cache_layers(config):
        if layer.window is None or kind == "full":
            positions = context
        else:
            positions = layer.capacity(context) if kind == "windowed" else min(context, layer.window)
        total += 2 * batch * layer.kv_heads * positions * layer.head_dim * itemsize
    return total


def bundle_cache_bytes(layers: Sequence[CacheLayer], target: Target, context: int, batch: int = 1) -> int:
    """Returns the bytes of keys and values in a bundle's layers for rows of `context` cached tokens.

    A portable graph returns only the positions within its windows. The buffers of other graphs have a fixed capacity.
    """
    total = 0
    for layer in layers:
        positions = layer.capacity(context)
        if target == "portable" and layer.window is not None:
            positions = min(context, layer.window - 1)
        total += 2 * batch * layer.kv_heads * positions * layer.head_dim * _CACHE_BYTES[layer.dtype]
    return total


def decode_flops(config: ModelConfig, position: int, *, windows: bool = True) -> Flops:
    """Returns the operations for one token at a position, counted from 0, with all earlier tokens cached.

    The token attends to position + 1 keys, itself included; in sliding layers at most to the window.
    """
    return prefill_flops(config, position + 1, windows=windows, start=position)


def prefill_flops(
    config: ModelConfig, length: int, *, windows: bool = True, head_positions: int = 1, start: int = 0
) -> Flops:
    """Returns the operations for the tokens from `start` to `length`, without those for masked scores.

    A kernel that computes scores and masks them afterwards needs more operations.

    Args:
        config: The model's shape.
        length: Tokens of the prompt.
        windows: Whether sliding layers use their window; if not, they attend to all positions.
        head_positions: Number of positions with logits: one in generation, all in training.
        start: Tokens that are already cached.
    """
    parts = parameters(config)
    keys = 0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer) if windows else None
        keys += keys_seen(length, window) - keys_seen(start, window)
    return Flops(
        body=2 * (parts.attention + parts.mlp) * (length - start),
        # In each query head, a key's score takes one product of head_dim values, and so does its value.
        attention=2 * 2 * config.num_attention_heads * config.head_dim * keys,
        head=2 * config.hidden_size * config.vocab_size * head_positions,
    )


def keys_seen(length: int, window: int | None) -> int:
    """Returns the number of keys that the first `length` queries attend to in total: min(position + 1, window) each."""
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def saved_percent(less: float, more: float) -> float:
    """Returns by how many percent `less` is below `more`; negative if it is above."""
    return 100 * (1 - less / more)
