"""The PyTorch backend: a checkpoint's model with the interface `slm.runtime.backend.Decoder`.

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from slm.core.errors import SlmError
from slm.core.nn.cache import KVCache, KVSnapshot
from slm.core.nn.model import CausalLM

# Tokens that `score` reads in one step; the attention mask has the size (chunk, length).
_SCORE_CHUNK = 1024
# The limit of logits that `score` holds at a time, in bytes.
_LOGITS_BYTES = 256 << 20
# Tokens that can always be rewound: the length of useful drafts in speculative decoding.
_SLACK = 16


@dataclass(frozen=True)
class TorchSnapshot:
    """The state of a model's caches."""

    model: CausalLM
    caches: KVSnapshot

    @property
    def length(self) -> int:
        """Number of tokens read."""
        return self.caches.length

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return self.caches.bytes


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
        """Size of the vocabulary, which is the number of logits."""
        return self.model.config.vocab_size

    @property
    def length(self) -> int:
        """Number of tokens read since the last reset."""
        return self._cache.length

    @property
    def description(self) -> str:
        """The backend, device and dtype, in a few words."""
        weight = self.model.model.embed_tokens.weight
        return (
            f"PyTorch {torch.__version__} on {weight.device.type.upper()}, {str(weight.dtype).removeprefix('torch.')}"
        )

    def reset(self) -> None:
        """Empties the caches."""
        self._cache = KVCache(self.model.config, _SLACK)

    def read(self, ids: Sequence[int]) -> NDArray[Any]:
        """Reads tokens and returns the logits (V,) of the next token."""
        logits: NDArray[Any] = self._step(ids, keep=1)[-1]
        return logits

    @property
    def revocable(self) -> int:
        """How many tokens `read_each` may read such that `rewind` can remove any number of them."""
        return min(_SLACK, self.context - self.length)

    def read_each(self, ids: Sequence[int]) -> NDArray[Any]:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""
        return self._step(ids, keep=0)

    def rewind(self, length: int) -> None:
        """Removes all but the first `length` tokens from the caches; see `slm.runtime.backend.Decoder.rewind`."""
        self._cache.rewind(length)

    def snapshot(self) -> TorchSnapshot:
        """Returns the state of the caches. It shares their tensors, which are never modified in place."""
        return TorchSnapshot(self.model, self._cache.snapshot())

    def restore(self, snapshot: Any) -> None:
        """Restores a snapshot; see `slm.runtime.backend.Decoder.restore`."""
        if not isinstance(snapshot, TorchSnapshot) or snapshot.model is not self.model:
            raise SlmError("the snapshot is not of this model", "read the text with this model")
        self._cache.restore(snapshot.caches)

    @torch.inference_mode()
    def _step(self, ids: Sequence[int], keep: int) -> NDArray[Any]:
        """Reads one row of tokens and returns the logits (keep or T, V); an interrupted step empties the caches."""
        try:
            return self._array(self.model(self._tensor([list(ids)]), cache=self._cache, num_logits_to_keep=keep)[0])
        except BaseException:
            self.reset()
            raise

    @torch.inference_mode()
    def logits(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Returns the logits, float32 (B, T, V), at every position of complete rows (B, T); does not use the caches."""
        return self._array(self.model(self._tensor(ids)))

    @torch.inference_mode()
    def score(self, ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns log-probabilities of tokens and whether each is the most likely, both (B, T - 1), for rows (B, T).

        See `slm.runtime.backend.Scorer.score`. Only a few logits exist at a time, and they stay on the model's device.
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
