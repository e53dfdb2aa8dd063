"""Keys and values of positions already seen: bounded for sliding layers, whole for global ones.

Dimensions: B batch, K kv heads, S cached positions, T new positions, H head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.rewind import check_rewind


class LayerCache:
    """One layer's keys (after norm and rotation) and values, oldest position first.

    A sliding layer keeps the last `window - 1` positions, for a query sees itself and those before it, and `slack` more
    that going back may need.
    """

    def __init__(self, window: int | None, slack: int = 0) -> None:
        self.window = window
        self.slack = slack
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new positions (B, K, T, H) and returns what the new queries may look at (B, K, S + T, H)."""
        new = key.shape[2]
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        self.key, self.value = key, value
        if self.window is None:
            return key, value
        past = self.window - 1
        self.key, self.value = _last(key, past + self.slack), _last(value, past + self.slack)
        seen = max(0, key.shape[2] - past - new)
        return key[:, :, seen:], value[:, :, seen:]

    @property
    def positions(self) -> int:
        """How many positions it holds."""
        return 0 if self.key is None else self.key.shape[2]

    def drop(self, count: int) -> None:
        """Forgets the last positions."""
        if self.key is not None and self.value is not None:
            left = self.positions - count
            self.key, self.value = self.key[:, :, :left], self.value[:, :, :left]


def _last(x: Tensor, count: int) -> Tensor:
    # A copy where positions are dropped, so that what was evicted is freed.
    return x[:, :, x.shape[2] - count :].clone() if x.shape[2] > count else x


@dataclass(frozen=True)
class KVSnapshot:
    """What the caches held: the tensors themselves, which are replaced and never written to."""

    length: int
    layers: tuple[tuple[Tensor | None, Tensor | None], ...]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        tensors = (tensor for layer in self.layers for tensor in layer if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class KVCache:
    """The caches of all layers, and how many positions were seen."""

    def __init__(self, config: ModelConfig, slack: int = 0) -> None:
        self.layers = [LayerCache(config.window(i), slack) for i in range(config.num_hidden_layers)]
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forgets the positions from `length` on.

        Raises:
            SlmError: When sliding layers no longer hold what the next token would look at.
        """
        dropped = self.length - length
        for layer in self.layers:
            check_rewind(self.length, length, layer.window, self.length - layer.positions)
        for layer in self.layers:
            layer.drop(min(dropped, layer.positions))
        self.length = length

    def snapshot(self) -> KVSnapshot:
        """Returns what the caches hold."""
        return KVSnapshot(self.length, tuple((layer.key, layer.value) for layer in self.layers))

    def restore(self, snapshot: KVSnapshot) -> None:
        """Makes the caches hold what they held then."""
        self.length = snapshot.length
        for layer, (key, value) in zip(self.layers, snapshot.layers, strict=True):
            layer.key, layer.value = key, value
