"""What the model writes while it trains: a few tokens after a prompt, always drawn with the same dice."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from slm.core.nn import CausalLM, KVCache
from slm.core.tokenizer import Tokenizer
from slm.train.parallel import Alone, Processes

# Hot enough not to run in circles, cold enough to show what was learned rather than what was not.
TEMPERATURE = 0.7


def continued(
    logits: Callable[[Sequence[int]], Tensor], ids: Sequence[int], tokens: int, choose: Callable[[Tensor], int]
) -> Iterator[int]:
    """Yields the tokens that follow a prompt.

    Args:
        logits: Reads new tokens after those before and returns the logits (V,) for the next one.
        ids: The prompt.
        tokens: How many at most.
        choose: Takes logits (V,) and returns a token.
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
    """Returns each prompt with up to `tokens` tokens after it, shorter where a text ends.

    Args:
        model: The model; with FSDP every process computes the same tokens, for each needs the others' weights.
        tokenizer: The model's.
        prompts: What to continue.
        tokens: How many at most.
        seed: Of the random choices.
        processes: Those that write the same texts; None for one.
        seconds: For all prompts together, of one process alone; texts are cut when they are over. None sets no limit.
    """
    processes = processes or Alone()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    until = float("inf") if seconds is None else time.perf_counter() + seconds
    texts = []
    for prompt in prompts:
        dice = torch.Generator().manual_seed(seed)
        ids = [*tokenizer.prefix_ids, *tokenizer.encode_rendered(prompt)]  # training adds nothing after a text
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
