"""What a model of a given shape costs: parameters, bytes of weights and caches, floating-point operations.

Everything follows from the configuration; nothing is loaded. A multiply-add is two operations. Counted are the matrix
products and attention's scores and values; lookups, norms, rotations, activations and softmax are not: they are linear in
the widths, and PyTorch's own counter leaves them out too. The tests compare each figure with what it is a figure of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slm.core.config import ModelConfig
from slm.core.contract import CacheLayer, CacheType, Target, cache_layers

# How much of a context a cache holds: what slm allocates (windows and slack), what its windows need, or all of it.
CacheKind = Literal["windowed", "windowed_without_slack", "full"]

FLOAT32_BYTES = 4
HALF_BYTES = 2
_CACHE_BYTES: dict[CacheType, int] = {"float32": FLOAT32_BYTES, "float16": HALF_BYTES, "int8": 1}
# The block that `slm quantize` prefers.
INT8_BLOCK = 128


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part has; `head` is 0 where the head is the embedding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All of them; a tied head is counted once."""
        return self.embedding + self.attention + self.mlp + self.norms + self.head


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: `body` is the blocks' matrix products, `attention` its scores and values."""

    body: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.body + self.attention + self.head

    def per_token(self, tokens: int) -> "Flops":
        """Returns the average over that many tokens."""
        return Flops(self.body / tokens, self.attention / tokens, self.head / tokens)


def parameters(config: ModelConfig) -> Parameters:
    """Returns the parameters of each part."""
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
    """Returns the bytes of the weights at `itemsize` bytes each; rotation tables and file headers are not weights."""
    return parameters(config).total * itemsize


def int8_bytes(config: ModelConfig, block_size: int = INT8_BLOCK) -> int | None:
    """Returns the bytes of the weights in INT8 by block: a byte each, a float32 scale a block, norms in float32.

    None where a matrix's input does not divide into such blocks.
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
    """Returns the bytes of keys and values of all layers.

    Args:
        config: The model's shape.
        context: Tokens a row.
        batch: Rows.
        itemsize: Bytes of one number.
        kind: "windowed" is what slm allocates: a sliding layer's window and slack, however short the context.
            "windowed_without_slack" is what sliding layers look at, and "full" has no windows.
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
    """Returns the bytes of keys and values of a bundle's layers once so many tokens a row are cached.

    A portable graph puts out no more than what its windows let through; the others' buffers have a capacity.
    """
    total = 0
    for layer in layers:
        positions = layer.capacity(context)
        if target == "portable" and layer.window is not None:
            positions = min(context, layer.window - 1)
        total += 2 * batch * layer.kv_heads * positions * layer.head_dim * _CACHE_BYTES[layer.dtype]
    return total


def decode_flops(config: ModelConfig, position: int, *, windows: bool = True) -> Flops:
    """Returns the operations for one token at a position counted from 0, everything before it cached.

    It sees position + 1 keys, itself included, and in sliding layers at most the window.
    """
    return prefill_flops(config, position + 1, windows=windows, start=position)


def prefill_flops(
    config: ModelConfig, length: int, *, windows: bool = True, head_positions: int = 1, start: int = 0
) -> Flops:
    """Returns the operations for the tokens from `start` to `length`, if each computes only what it sees.

    A kernel that computes scores and masks them afterwards does more.

    Args:
        config: The model's shape.
        length: Tokens of the prompt.
        windows: Whether sliding layers slide, or see everything.
        head_positions: At how many positions logits are computed: once is what generating needs, training needs all.
        start: Tokens that are cached already.
    """
    parts = parameters(config)
    keys = 0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer) if windows else None
        keys += keys_seen(length, window) - keys_seen(start, window)
    return Flops(
        body=2 * (parts.attention + parts.mlp) * (length - start),
        # One product of head_dim numbers for the score of a key and one for its value, in each query head.
        attention=2 * 2 * config.num_attention_heads * config.head_dim * keys,
        head=2 * config.hidden_size * config.vocab_size * head_positions,
    )


def keys_seen(length: int, window: int | None) -> int:
    """Returns how many keys the first `length` queries see together: min(position + 1, window) each."""
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def saved_percent(less: float, more: float) -> float:
    """Returns by how many percent `less` is below `more`; negative where it is above."""
    return 100 * (1 - less / more)
