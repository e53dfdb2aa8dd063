"""The contract of a graph: names of inputs, outputs and dimensions, and the order of the caches.

Other programs depend on these names: transformers.js and onnxruntime-genai read `past_key_values.{i}.key` and `batch_size`,
and lm-evaluation-harness sizes unknown inputs by dimension names. transformers.js takes the sequence length from the first
cache, which must therefore belong to a global layer.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import gcd
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slm.core.config import FULL, ModelConfig

# The set of operators of a graph.
Target = Literal["fused", "portable"]
# The device that a bundle is made for; `slm.runtime.session.RuntimeDevice` has those on which slm itself runs a model.
Device = Literal["cpu", "cuda", "webgpu"]
Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
LOGITS_TO_KEEP = "num_logits_to_keep"
LOGITS = "logits"

# The limit of a bundle's default context, which commands also use for estimates. The file does not grow with the context, but
# programs like onnxruntime-genai allocate caches for all of it by default.
DEFAULT_CONTEXT = 4096

# The positions of a sliding cache beyond its window. With them, the CPU kernel moves the window once every SLACK + 1 steps
# instead of at every step. onnxruntime-genai measured 16 as best.
CACHE_SLACK = 16

# Steps of up to this many new tokens read 8-bit caches directly. Longer ones read float32 copies, which from about 14 tokens
# on takes less time than the kernel for 8-bit caches (docs/LOG.md).
FEW_TOKENS = 16


def past_name(layer: int, side: Side) -> str:
    """Returns the name of a cache input."""
    return f"past_key_values.{layer}.{side}"


def present_name(layer: int, side: Side) -> str:
    """Returns the name of a cache output."""
    return f"present.{layer}.{side}"


# The number of tokens whose logits the head in halves computes exactly for one row (docs/bundles.md), the largest share of the
# vocabulary, and the most parts of the vocabulary in which they are found at the same time.
_HEAD_CANDIDATES, _HEAD_SHARE, _HEAD_PARTS = 1280, 4, 8


def head_parts(vocab_size: int) -> tuple[int, int]:
    """Returns in how many parts of the vocabulary the candidates of a head in halves are found, and how many in each.

    Part i of n has the tokens i, i + n, i + 2 n and so on, so that frequent tokens, which have low ids, are in all parts.
    """
    parts = gcd(vocab_size, _HEAD_PARTS)
    return parts, max(1, min(_HEAD_CANDIDATES, vocab_size // _HEAD_SHARE) // parts)


def head_candidates(vocab_size: int) -> int:
    """Returns the number of tokens whose logits the head in halves computes exactly for one row."""
    parts, each = head_parts(vocab_size)
    return parts * each


CacheType = Literal["float32", "float16", "int8"]


class TensorSpec(BaseModel):
    """One input or output. `shape` has numbers for fixed dimensions and names for dynamic ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Literal["int64", "float32", "float16", "int8"]
    shape: tuple[int | str, ...]
    optional: bool = False


class CacheLayer(BaseModel):
    """One layer's cache (batch_size, kv_heads, capacity, head_dim). `window` is None for a global layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    kv_heads: int
    head_dim: int
    window: int | None
    slack: int = CACHE_SLACK
    dtype: CacheType = "float32"

    def capacity(self, context: int) -> int:
        """Returns the number of positions in the buffer for a context in tokens; constant for a sliding layer."""
        return context if self.window is None else self.window + self.slack


def cache_layers(config: ModelConfig, device: Device = "cpu", dtype: CacheType = "float32") -> tuple[CacheLayer, ...]:
    """Returns the caches in the order of inputs and outputs, with global layers first.

    onnxruntime's CUDA kernel requires sliding buffers of exactly the window. Its WebGPU kernel does not support sliding
    buffers, so every layer keeps the whole sequence.
    """
    layers = (
        CacheLayer(
            layer=i,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=None if device == "webgpu" else config.window(i),
            slack=0 if device == "cuda" else CACHE_SLACK,
            dtype=dtype,
        )
        for i in range(config.num_hidden_layers)
    )
    return tuple(sorted(layers, key=lambda cache: (config.layer_types[cache.layer] != FULL, cache.layer)))


def input_specs(caches: Sequence[CacheLayer], slots: Sequence[TensorSpec] = ()) -> tuple[TensorSpec, ...]:
    """Returns the graph's inputs in order. `slots` are the inputs for adapters."""
    return (
        TensorSpec(name=INPUT_IDS, dtype="int64", shape=("batch_size", "sequence_length")),
        TensorSpec(name=ATTENTION_MASK, dtype="int64", shape=("batch_size", "total_sequence_length")),
        *_cache_specs(caches, "past"),
        TensorSpec(name=LOGITS_TO_KEEP, dtype="int64", shape=(), optional=True),
        *slots,
    )


def output_specs(vocab_size: int, caches: Sequence[CacheLayer]) -> tuple[TensorSpec, ...]:
    """Returns the graph's outputs in order."""
    return (
        TensorSpec(name=LOGITS, dtype="float32", shape=("batch_size", "kept", vocab_size)),
        *_cache_specs(caches, "present"),
    )


def slot_names(path: str) -> tuple[str, str]:
    """Returns the names of a product's adapter inputs: A and B of x W + x A B."""
    return f"lora.{path}.A", f"lora.{path}.B"


def slot_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Returns the inputs for adapters, one pair for each product of the layers.

    A is (1 or batch, inputs, rank) and B is (1 or batch, rank, outputs), so that each row can have its own adapter. The
    default has rank 0, with which the product is exactly that of the base model.
    """
    return tuple(
        TensorSpec(name=name, dtype="float32", shape=shape, optional=True)
        for path, inputs, outputs in product_sizes(config)
        for name, shape in zip(
            slot_names(path), (("adapters", inputs, f"{path}.rank"), ("adapters", f"{path}.rank", outputs)), strict=True
        )
    )


def product_sizes(config: ModelConfig) -> list[tuple[str, int, int]]:
    """Returns path, inputs and outputs of each product of the layers, in order. q, k, v are joined, and so are gate, up."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    joint = width + 2 * config.num_key_value_heads * config.head_dim
    return [
        (f"model.layers.{i}.{path}", inputs, outputs)
        for i in range(config.num_hidden_layers)
        for path, inputs, outputs in (
            ("self_attn.qkv_proj", hidden, joint),
            ("self_attn.o_proj", width, hidden),
            ("mlp.gate_up_proj", hidden, 2 * config.intermediate_size),
            ("mlp.down_proj", config.intermediate_size, hidden),
        )
    ]


def module_rows(path: str, config: ModelConfig) -> dict[str, slice]:
    """Returns the modules of a checkpoint whose weights a tensor of the graph joins, by path, with their rows in it.

    The graph joins q, k, v and gate, up along their outputs. Every other tensor belongs to one module.
    """
    parent, _, product = path.rpartition(".")
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    sizes: dict[str, int]
    match product:
        case "qkv_proj":
            sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        case "gate_up_proj":
            sizes = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        case _:
            return {path: slice(None)}
    ends = list(accumulate(sizes.values()))
    return {f"{parent}.{name}": slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _cache_specs(caches: Sequence[CacheLayer], when: Literal["past", "present"]) -> tuple[TensorSpec, ...]:
    name = past_name if when == "past" else present_name
    return tuple(
        TensorSpec(
            name=name(cache.layer, side),
            dtype=cache.dtype,
            shape=("batch_size", cache.kv_heads, f"{when}_{'window' if cache.window else 'sequence'}", cache.head_dim),
        )
        for cache in caches
        for side in SIDES
    )
