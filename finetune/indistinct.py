"""Tokens that a base cannot tell apart, because their rows of the embedding are nearly equal.

In training, the rows of tokens that a text does not contain all move in the same direction, away from hidden states. A model
of stories so has one row for "{", "_" and "<". An adapter of the projections cannot separate them: their logits stay equal. So
fine-tuning trains these rows with the adapter.

Dimensions: V vocabulary, D hidden.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from slm.finetune.examples import Example

# Distance of two rows, relative to the length of one, below which they count as equal. In the bundled demo model the 326 rows
# that collapsed are at most 0.008 from their neighbour, and all others at least 0.08.
_NEAR = 0.05
# Share of the learned tokens below which indistinct tokens do not matter.
_MATTERS = 0.01
# Dimensions of the projection that finds candidates, the margin for its error, and rows per product.
_DIMENSIONS, _MARGIN, _CHUNK = 16, 2.0, 512


def indistinct_tokens(table: Tensor, examples: Iterable[Example]) -> list[int]:
    """Returns the learned tokens whose rows nearly equal another row, or none if they are rare among all learned tokens.

    Args:
        table: The embedding (V, D).
        examples: The training examples.
    """
    counts: Counter[int] = Counter()
    for example in examples:
        for start, end in example.spans:
            counts.update(example.ids[start:end])
    found = near_another(table, sorted(counts))
    return found if sum(counts[token] for token in found) >= _MATTERS * counts.total() else []


@torch.no_grad()
def near_another(table: Tensor, tokens: list[int]) -> list[int]:
    """Returns the tokens whose rows are nearly equal to the row of any other token.

    A random projection finds candidates (Johnson and Lindenstrauss, 1984), whose distance is then computed exactly.
    """
    table = table.float()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(table.shape[1], _DIMENSIONS, generator=generator).to(table.device) / _DIMENSIONS**0.5
    short = table @ directions
    squares = short.square().sum(1)
    found = []
    for first in range(0, len(tokens), _CHUNK):
        some = torch.tensor(tokens[first : first + _CHUNK], device=table.device)
        limits = _NEAR * table[some].norm(dim=1)
        # |a - b|² < m² is 2 a b > |a|² + |b|² - m².
        bounds = (squares[some] - (_MARGIN * limits).square()) / 2
        products = (short[some] @ short.T).sub_(squares / 2)
        places, others = (products > bounds[:, None]).nonzero(as_tuple=True)
        differ = some[places] != others
        places, others = places[differ], others[differ]
        near = (table[others] - table[some[places]]).norm(dim=1) < limits[places]
        found += some[places[near].unique()].tolist()
    return found
