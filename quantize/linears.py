"""The weights to quantize: their paths, roles and sizes.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass
from typing import Literal

from slm.core.config import ModelConfig
from slm.core.contract import product_sizes

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

Role = Literal["layer", "head", "lookup"]


@dataclass(frozen=True)
class Linear:
    """A weight (N, K) that is stored as integers.

    Attributes:
        path: The path of the product or table.
        role: The use of the weight: a product in a layer, the product that computes the logits, or the lookup of token
            embeddings. A tied table has the role "head", although lookups read it too.
        outputs: N.
        inputs: K.
        layer: The index of the layer; None outside of layers.
    """

    path: str
    role: Role
    outputs: int
    inputs: int
    layer: int | None = None

    @property
    def size(self) -> int:
        """The number of values."""
        return self.outputs * self.inputs


def linears_of(config: ModelConfig) -> tuple[Linear, ...]:
    """Returns a model's weights in the order of execution, with the embedding first."""
    tied = config.tie_word_embeddings
    found = [Linear(EMBEDDING, "head" if tied else "lookup", config.vocab_size, config.hidden_size)]
    for path, inputs, outputs in product_sizes(config):
        found.append(Linear(path, "layer", outputs, inputs, int(path.split(".")[2])))
    if not tied:
        found.append(Linear(HEAD, "head", config.vocab_size, config.hidden_size))
    return tuple(found)
