"""What a model generates while it trains: a few tokens after a prompt, always sampled from the same seed."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM, KVCache
from slm.core.tokenizer import Tokenizer
from slm.runtime.generation import Chooser, Generation, Request
from slm.runtime.sampling import GREEDY
from slm.runtime.streaming import run
from slm.train.parallel import Alone, Processes

# Hot enough not to run in circles, cold enough to show what was learned rather than what was not.
TEMPERATURE = 0.7


class _Reader:
    """A model that is being trained, as the reader of a text.

    Reads under the caller's `torch.no_grad`, not in inference mode: whatever a layer caches must remain usable for training.
    """

    def __init__(self, config: ModelConfig, logits: Callable[[Tensor, KVCache], Tensor], device: torch.device) -> None:
        self._config, self._logits, self._device = config, logits, device
        self.reset()

    def reset(self) -> None:
        """Forgets everything read."""
        self._cache = KVCache(self._config)

    def read(self, ids: Sequence[int]) -> NDArray[Any]:
        """Reads tokens and returns the logits (V,) for the one that follows."""
        logits: NDArray[Any] = (
            self._logits(torch.tensor([list(ids)], device=self._device), self._cache).float().cpu().numpy()
        )
        return logits


class _Dice:
    """Samples at `TEMPERATURE`, alike in all processes."""

    def __init__(self, seed: int, processes: Processes) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._processes = processes

    def choose(self, logits: NDArray[Any]) -> int:
        """Returns the next token, by logits (V,)."""
        shares = torch.softmax(torch.from_numpy(np.ascontiguousarray(logits)) / TEMPERATURE, -1)
        # Rank 0 samples for all ranks: a last-bit difference in the logits would make them diverge.
        token: int = self._processes.from_first(int(torch.multinomial(shares, 1, generator=self._generator)))
        return token


def continued(
    config: ModelConfig,
    logits: Callable[[Tensor, KVCache], Tensor],
    device: torch.device,
    request: Request,
    until: float = float("inf"),
    chooser: Chooser | None = None,
) -> list[int]:
    """Returns the tokens that follow a prompt; none where the request leaves no room for any.

    Args:
        config: The model's.
        logits: Reads new tokens (1, T) after those in a cache and returns the logits (V,) for the next one.
        device: Where tokens are read.
        request: The prompt and its limits.
        until: When to end at the latest, in seconds of `time.perf_counter`.
        chooser: Takes the place of the request's sampling.
    """
    if request.max_new_tokens < 1:
        return []
    tokens: list[int] = []
    generation = Generation(request, config.max_position_embeddings, config.vocab_size, chooser=chooser)
    for piece in run(_Reader(config, logits, device), generation):
        if piece.token is None or time.perf_counter() > until:
            break
        tokens.append(piece.token)
    return tokens


@torch.no_grad()
def continue_prompts(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    seed: int,
    processes: Processes | None = None,
    seconds: float | None = None,
) -> list[str]:
    """Returns each prompt with up to `tokens` tokens after it, shorter where a text ends.

    Args:
        model: The model; with FSDP every process computes the same tokens, because each needs the others' weights.
        tokenizer: The model's.
        prompts: What to continue.
        tokens: The most new tokens of each.
        seed: Of the sampling.
        processes: Those that generate the same texts; None for one.
        seconds: For all prompts together, of one process alone; texts are cut when they are over. None sets no limit.
    """
    processes = processes or Alone()
    config, device = model.config, next(model.parameters()).device
    training = model.training
    model.eval()
    until = float("inf") if seconds is None else time.perf_counter() + seconds

    def logits(ids: Tensor, cache: KVCache) -> Tensor:
        row: Tensor = model(ids, cache=cache, num_logits_to_keep=1)[0, -1]
        return row

    texts = []
    for prompt in prompts:
        ids = [*tokenizer.prefix_ids, *tokenizer.encode_rendered(prompt)]  # training adds nothing after a text
        room = config.max_position_embeddings - len(ids)
        request = Request(ids, GREEDY, min(tokens, room), config.stop_token_ids)
        written = continued(config, logits, device, request, until, _Dice(seed, processes))
        texts.append(prompt + tokenizer.decode(written))
    model.train(training)
    return texts
