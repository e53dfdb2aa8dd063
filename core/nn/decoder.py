"""A checkpoint as a decoder: PyTorch behind the interface that generation uses (`slm.runtime.decoder.Decoder`).

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from slm.core.nn.cache import KVCache
from slm.core.nn.model import CausalLM


class TorchDecoder:
    """A model in PyTorch with its caches."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model.eval()
        self.reset()

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """How many logits there are."""
        return self.model.config.vocab_size

    @property
    def length(self) -> int:
        """Tokens read since the start."""
        return self._cache.length

    @property
    def description(self) -> str:
        """What runs where, in a few words."""
        weight = self.model.model.embed_tokens.weight
        return (
            f"PyTorch {torch.__version__} on {weight.device.type.upper()}, {str(weight.dtype).removeprefix('torch.')}"
        )

    def reset(self) -> None:
        """Forgets everything read."""
        self._cache = KVCache(self.model.config)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> NDArray[Any]:
        """Reads tokens and returns the logits (V,) for the one that follows."""
        return self._array(self.model(self._tensor([list(ids)]), cache=self._cache, num_logits_to_keep=1)[0, -1])

    @torch.inference_mode()
    def logits(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T), independent of what was read."""
        return self._array(self.model(self._tensor(ids)))

    def _tensor(self, ids: Any) -> torch.Tensor:
        return torch.as_tensor(ids, device=self.model.model.embed_tokens.weight.device)

    @staticmethod
    def _array(logits: torch.Tensor) -> NDArray[Any]:
        array: NDArray[Any] = logits.float().cpu().numpy()
        return array
