"""Sample texts during training: a few tokens after each prompt, always sampled with the same seed."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from slm.core.nn import CausalLM, KVCache
from slm.core.tokenizer import Tokenizer
from slm.train.parallel import Alone, Processes

# High enough to avoid loops, low enough to show what the model has learned.
TEMPERATURE = 0.7


def continued(
    logits: Callable[[Sequence[int]], Tensor], ids: Sequence[int], tokens: int, choose: Callable[[Tensor], int]
) -> Iterator[int]:
    """Yields the tokens that follow a prompt.

    Args:
        logits: Reads new tokens and returns the logits (V,) of the next one.
        ids: The prompt.
        tokens: Maximum number of tokens.
        choose: Returns a token for logits (V,).
    """
    new = ids
    for _ in range(tokens):
        token = choose(logits(new))
        yield token
        new = [token]


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
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    until = float("inf") if seconds is None else time.perf_counter() + seconds
    texts = []
    for prompt in prompts:
        dice = torch.Generator().manual_seed(seed)
        ids = [
            *tokenizer.prefix_ids,
            *tokenizer.encode_rendered(prompt),
        ]  # without end-of-text, which would end the prompt
        cache = KVCache(model.config)

        def logits(new: Sequence[int], cache: KVCache = cache) -> Tensor:
            row: Tensor = model(torch.tensor([new], device=device), cache=cache, num_logits_to_keep=1)[0, -1]
            return row

        def choose(row: Tensor, dice: torch.Generator = dice) -> int:
            shares = torch.softmax(row.float().cpu() / TEMPERATURE, -1)
            # Rank 0 samples for all ranks: a last-bit difference in the logits would make them diverge.
            token: int = processes.from_first(int(torch.multinomial(shares, 1, generator=dice)))
            return token

        room = model.config.max_position_embeddings - len(ids)
        written: list[int] = []
        for token in continued(logits, ids, min(tokens, room), choose):
            if token in model.config.stop_token_ids or time.perf_counter() > until:
                break
            written.append(token)
        texts.append(prompt + tokenizer.decode(written))
    model.train(training)
    return texts
