"""The products of the graph: their paths, kinds and sizes.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass
from typing import Literal, cast

from slm.core.config import ModelConfig
from slm.core.contract import product_sizes

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

Kind = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Linear:
    """One product with a weight (N, K). `layer` is None for embedding and head."""

    path: str
    kind: Kind
    outputs: int
    inputs: int
    layer: int | None = None

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.outputs * self.inputs


def linears_of(config: ModelConfig) -> tuple[Linear, ...]:
    """Returns a model's products in the order of execution, with the embedding first."""
    found = [Linear(EMBEDDING, "embed_tokens", config.vocab_size, config.hidden_size)]
    for path, inputs, outputs in product_sizes(config):
        _, _, layer, _, kind = path.split(".")
        found.append(Linear(path, cast("Kind", kind), outputs, inputs, int(layer)))
    if not config.tie_word_embeddings:
        found.append(Linear(HEAD, "lm_head", config.vocab_size, config.hidden_size))
    return tuple(found)
