"""Sample texts during training: a few tokens after each prompt, always sampled with the same seed."""

import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM, KVCache
from slm.core.tokenizer import Tokenizer
from slm.runtime.generation import Generation, Request
from slm.runtime.sampling import GREEDY
from slm.runtime.streaming import run
from slm.train.parallel import Alone, Processes

# High enough to avoid loops, low enough to show what the model has learned.
TEMPERATURE = 0.7


class _Reader:
    """A model that is being trained, as the reader of a text.

    It reads under the caller's `torch.no_grad`, not in inference mode: what a layer caches must remain usable for training.
    """

    def __init__(self, config: ModelConfig, logits: Callable[[Tensor, KVCache], Tensor], device: torch.device) -> None:
        self._config, self._logits, self._device = config, logits, device

    def reset(self) -> None:
        """Forgets everything read."""
        self._cache = KVCache(self._config)

    def read(self, ids: Sequence[int]) -> NDArray[Any]:
        """Reads tokens and returns the logits (V,) for the one that follows."""
        row: NDArray[Any] = self._logits(torch.tensor([ids], device=self._device), self._cache).float().cpu().numpy()
        return row


def continued(
    config: ModelConfig,
    logits: Callable[[Tensor, KVCache], Tensor],
    device: torch.device,
    request: Request,
    until: float,
    choose: Callable[[NDArray[Any]], int] | None = None,
) -> list[int]:
    """Returns the tokens that follow a prompt; none where the request leaves no room for any.

    Args:
        config: The model's shape.
        logits: Reads new tokens (1, T) after those in a cache and returns the logits (V,) for the next one.
        device: Device of the tokens.
        request: The prompt and its limits.
        until: Time limit, in seconds of `time.perf_counter`.
        choose: Chooses tokens in place of the request's sampling.
    """
    if request.max_new_tokens < 1:
        return []
    generation = Generation(request, config.max_position_embeddings, config.vocab_size, choose=choose)
    pieces = run(_Reader(config, logits, device), generation)
    return [
        piece.token for piece in takewhile(lambda _: time.perf_counter() <= until, pieces) if piece.token is not None
    ]


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
    """Returns each prompt followed by up to `tokens` tokens, fewer if a text ends earlier.

    Args:
        model: The model. With FSDP all processes compute the same tokens, because each needs the others' weights.
        tokenizer: The model's tokenizer.
        prompts: The prompts.
        tokens: Maximum number of tokens per text.
        seed: Sampling seed.
        processes: The processes that sample together; None for a single one.
        seconds: Time limit for all prompts, of a single process; texts are cut when it is over. None sets no limit.
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
        dice = torch.Generator().manual_seed(seed)
        ids = [
            *tokenizer.prefix_ids,
            *tokenizer.encode_rendered(prompt),
        ]  # without end-of-text, which would end the prompt

        def choose(row: NDArray[Any], dice: torch.Generator = dice) -> int:
            shares = torch.softmax(torch.from_numpy(row) / TEMPERATURE, -1)
            # Rank 0 samples for all ranks: a last-bit difference in the logits would make them diverge.
            token: int = processes.from_first(int(torch.multinomial(shares, 1, generator=dice)))
            return token

        request = Request(ids, GREEDY, min(tokens, config.max_position_embeddings - len(ids)), config.stop_token_ids)
        texts.append(prompt + tokenizer.decode(continued(config, logits, device, request, until, choose)))
    model.train(training)
    return texts
