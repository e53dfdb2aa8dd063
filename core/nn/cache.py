"""The key-value cache: of limited length for sliding layers, of full length for global layers.

Dimensions: B batch, K kv heads, S cached positions, T new positions, H head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.rewind import check_rewind


class LayerCache:
    """One layer's keys (after norm and rotation) and values, oldest position first.

    A query in a sliding layer attends to itself and the `window - 1` positions before it. The cache keeps those, and `slack`
    positions more so that it can be rewound.
    """

    def __init__(self, window: int | None, slack: int = 0) -> None:
        self.window = window
        self.slack = slack
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new positions (B, K, T, H); returns the keys and values that the new queries attend to (B, K, S + T, H)."""
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
        """Number of cached positions."""
        return 0 if self.key is None else self.key.shape[2]

    def drop(self, count: int) -> None:
        """Removes the last `count` positions."""
        if self.key is not None and self.value is not None:
            left = self.positions - count
            self.key, self.value = self.key[:, :, :left], self.value[:, :, :left]


def _last(x: Tensor, count: int) -> Tensor:
    # A copy, where positions are removed, lets the memory of the old tensor be freed.
    return x[:, :, x.shape[2] - count :].clone() if x.shape[2] > count else x


@dataclass(frozen=True)
class KVSnapshot:
    """The state of the caches. It shares their tensors, which caches replace and never modify in place."""

    length: int
    layers: tuple[tuple[Tensor | None, Tensor | None], ...]

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        tensors = (tensor for layer in self.layers for tensor in layer if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class KVCache:
    """The caches of all layers, and the number of positions read."""

    def __init__(self, config: ModelConfig, slack: int = 0) -> None:
        self.layers = [LayerCache(config.window(i), slack) for i in range(config.num_hidden_layers)]
        self.length = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Removes all rows of the batch but some, which are put into this order; a row may be given several times."""
        for layer in self.layers:
            if layer.key is not None and layer.value is not None:
                layer.key, layer.value = layer.key[list(rows)], layer.value[list(rows)]

    def rewind(self, length: int) -> None:
        """Removes the positions from `length` on.

        Raises:
            SlmError: If a sliding layer no longer holds the positions that the next token attends to.
        """
        dropped = self.length - length
        for layer in self.layers:
            check_rewind(self.length, length, layer.window, self.length - layer.positions)
        for layer in self.layers:
            layer.drop(min(dropped, layer.positions))
        self.length = length

    def snapshot(self) -> KVSnapshot:
        """Returns the state of the caches."""
        return KVSnapshot(self.length, tuple((layer.key, layer.value) for layer in self.layers))

    def restore(self, snapshot: KVSnapshot) -> None:
        """Restores the state of a snapshot."""
        self.length = snapshot.length
        for layer, (key, value) in zip(self.layers, snapshot.layers, strict=True):
            layer.key, layer.value = key, value
