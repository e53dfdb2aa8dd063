"""The products of the graph: their paths, their sizes, and what stands before each.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass
from typing import Literal

from slm.core.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

Kind = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Linear:
    """One product with a weight (N, K); `layer` is None for embedding and head."""

    path: str
    kind: Kind
    outputs: int
    inputs: int
    layer: int | None = None

    @property
    def size(self) -> int:
        """Weights."""
        return self.outputs * self.inputs


def linears_of(config: ModelConfig) -> tuple[Linear, ...]:
    """Returns a model's products in the order in which a step meets them, the embedding first."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    joint = width + 2 * config.num_key_value_heads * config.head_dim
    found = [Linear(EMBEDDING, "embed_tokens", config.vocab_size, hidden)]
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found += [
            Linear(f"{attention}.qkv_proj", "qkv_proj", joint, hidden, i),
            Linear(f"{attention}.o_proj", "o_proj", hidden, width, i),
            Linear(f"{mlp}.gate_up_proj", "gate_up_proj", 2 * config.intermediate_size, hidden, i),
            Linear(f"{mlp}.down_proj", "down_proj", hidden, config.intermediate_size, i),
        ]
    if not config.tie_word_embeddings:
        found.append(Linear(HEAD, "lm_head", config.vocab_size, hidden))
    return tuple(found)
