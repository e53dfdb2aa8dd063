"""Keys and values of positions already seen: bounded for sliding layers, whole for global ones.

Dimensions: B batch, K kv heads, S cached positions, T new positions, H head dim.
"""

import torch
from torch import Tensor

from slm.core.config import ModelConfig


class LayerCache:
    """One layer's keys (after norm and rotation) and values, oldest position first."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new positions (B, K, T, H) and returns what the new queries may look at (B, K, S + T, H).

        A sliding layer then keeps only the last `window - 1` positions: a query sees itself and those before it.
        """
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        self.key, self.value = (key, value) if self.window is None else (self._recent(key), self._recent(value))
        return key, value

    def _recent(self, x: Tensor) -> Tensor:
        assert self.window is not None
        # A copy where positions are dropped, so that what was evicted is freed.
        past = self.window - 1
        return x[:, :, x.shape[2] - past :].clone() if x.shape[2] > past else x


class KVCache:
    """The caches of all layers, and how many positions were seen."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = [LayerCache(config.window(i)) for i in range(config.num_hidden_layers)]
        self.length = 0
