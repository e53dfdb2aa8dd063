"""What the model writes while it trains: a few tokens after a prompt, always drawn with the same dice."""

from collections.abc import Sequence

import torch

from slm.core.nn import CausalLM, KVCache
from slm.core.tokenizer import Tokenizer
from slm.train.parallel import Alone, Processes

# Hot enough not to run in circles, cold enough to show what was learned rather than what was not.
_TEMPERATURE = 0.7


@torch.no_grad()
def continue_prompts(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    seed: int,
    processes: Processes | None = None,
) -> list[str]:
    """Returns each prompt with up to `tokens` tokens after it, shorter where a text ends.

    Args:
        model: The model; with FSDP every process computes the same tokens, for each needs the others' weights.
        tokenizer: The model's.
        prompts: What to continue.
        tokens: How many at most.
        seed: Of the dice.
        processes: Those that write the same texts; None for one.
    """
    processes = processes or Alone()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        dice = torch.Generator().manual_seed(seed)
        ids = [*tokenizer.prefix_ids, *tokenizer.encode_rendered(prompt)]  # training adds nothing after a text
        cache, new = KVCache(model.config), ids
        room = model.config.max_position_embeddings - len(ids)
        written: list[int] = []
        for _ in range(min(tokens, room)):
            logits = model(torch.tensor([new], device=device), cache=cache, num_logits_to_keep=1)[0, -1]
            shares = torch.softmax(logits.float().cpu() / _TEMPERATURE, -1)
            # One throws for all: logits that differ in a last bit would part them, and each wait for the others.
            token = processes.from_first(int(torch.multinomial(shares, 1, generator=dice)))
            if token in model.config.stop_token_ids:
                break
            written.append(token)
            new = [token]
        texts.append(prompt + tokenizer.decode(written))
    model.train(training)
    return texts
