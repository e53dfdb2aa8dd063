"""A checkpoint as a decoder: PyTorch behind the interface that generation uses (`slm.runtime.decoder.Decoder`).

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from slm.core.nn.cache import KVCache
from slm.core.nn.model import CausalLM

# Tokens that `score` reads in one step: attention's mask is (chunk, length).
_SCORE_CHUNK = 1024
# Logits that it holds at once.
_LOGITS_BYTES = 256 << 20


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

    @torch.inference_mode()
    def score(self, ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns log-probabilities and whether each token was the likeliest, both (B, T - 1), for rows (B, T).

        See `slm.runtime.decoder.Decoder.score`. Only a few logits exist at a time, and they stay where the model is.
        """
        inputs, targets = self._tensor(ids[:, :-1]), self._tensor(ids[:, 1:])
        positions = max(1, _LOGITS_BYTES // (4 * self.vocab_size * len(ids)))
        cache = KVCache(self.model.config)
        likely, likeliest = [], []
        for start in range(0, inputs.shape[1], _SCORE_CHUNK):
            hidden = self.model.model(inputs[:, start : start + _SCORE_CHUNK], cache=cache)  # (B, t, D)
            wanted = targets[:, start : start + _SCORE_CHUNK]
            for some, target in zip(hidden.split(positions, 1), wanted.split(positions, 1), strict=True):
                logits = self.model.lm_head(some).float()  # (B, positions, V)
                chosen = logits.gather(-1, target[..., None])[..., 0]
                likely.append(chosen - logits.logsumexp(-1))
                likeliest.append(logits.argmax(-1) == target)
        return torch.cat(likely, 1).cpu().numpy(), torch.cat(likeliest, 1).cpu().numpy()

    def _tensor(self, ids: Any) -> torch.Tensor:
        return torch.as_tensor(ids, device=self.model.model.embed_tokens.weight.device)

    @staticmethod
    def _array(logits: torch.Tensor) -> NDArray[Any]:
        array: NDArray[Any] = logits.float().cpu().numpy()
        return array
