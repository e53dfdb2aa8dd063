"""Texts of a model in PyTorch, several at a time, and the likelihoods of given replies. Used during and before fine-tuning.

Neither dropout nor a random generator of PyTorch takes part, so that training continues as if nothing was generated.

Dimensions: B rows, T positions, N positions of replies, D hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from slm.core.nn import CausalLM, KVCache
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import casting, cross_entropy, logits
from slm.runtime.generation import Generation
from slm.train.evaluate import Check

# The most texts that are continued together, and the most positions of all of them.
_ROWS, _POSITIONS = 16, 16_384
# The most tokens of a prompt that are read in one step; the attention mask has the size (chunk, length).
_CHUNK = 512


@torch.no_grad()
def generate(
    model: TunableLM | CausalLM,
    generations: Sequence[Generation],
    autocast: torch.dtype | None,
    ended: Callable[[Generation], None],
    check: Check = lambda: None,
) -> None:
    """Continues texts until each has ended. Prompts of similar length are read together, padded on the left.

    Args:
        model: The model. It stays in evaluation mode.
        generations: The texts, none of them started. They end when the context is full.
        autocast: Type of the products; None for float32.
        ended: Receives each text when it ends.
        check: Called between steps; may raise to stop.
    """
    model.eval()
    for texts in _groups(generations):
        with casting(model, autocast):
            _continue(model, texts, ended, check)


@torch.no_grad()
def reply_likelihoods(
    model: TunableLM | CausalLM, prompt: Sequence[int], replies: Sequence[Sequence[int]], autocast: torch.dtype | None
) -> list[float]:
    """Returns the sum of the log-probabilities of each reply's tokens after a prompt, in nats. The prompt is read once.

    Args:
        model: The model. It stays in evaluation mode.
        prompt: The prompt's tokens.
        replies: The replies' tokens, each at least one.
        autocast: Type of the products; None for float32.
    """
    model.eval()
    device = model.model.norm.weight.device
    sums = []
    with casting(model, autocast):
        cache, before = _read(model, torch.tensor([list(prompt)], device=device), None)
        read = cache.snapshot()
        for first in range(0, len(replies), _ROWS):
            some = replies[first : first + _ROWS]
            # A reply's last token is predicted and not read; no position attends to the padding on its right.
            length = max(1, max(map(len, some)) - 1)
            ids = torch.tensor([[*reply[:-1], *[0] * (length + 1 - len(reply))] for reply in some], device=device)
            cache.restore(read)
            cache.keep([0] * len(some))
            after = model.model(ids, cache=cache)  # (B, T, D)
            for number, reply in enumerate(some):
                hidden = torch.cat((before[0], after[number, : len(reply) - 1]))  # (N, D)
                loss = cross_entropy(model, hidden, torch.tensor(list(reply), device=device))
                sums.append(-loss.item() * len(reply))
    return sums


def _groups(generations: Sequence[Generation]) -> Iterator[list[Generation]]:
    """Yields texts in groups that are continued together, longest prompts first: the first group needs the most memory."""
    near = sorted(generations, key=lambda each: len(each.request.prompt), reverse=True)
    group: list[Generation] = []
    longest = 0
    for each in near:
        length = len(each.request.prompt) + each.request.max_new_tokens
        if group and (len(group) == _ROWS or (len(group) + 1) * max(longest, length) > _POSITIONS):
            yield group
            group, longest = [], 0
        group.append(each)
        longest = max(longest, length)
    if group:
        yield group


def _read(
    model: TunableLM | CausalLM, ids: Tensor, mask: Tensor | None, check: Check = lambda: None
) -> tuple[KVCache, Tensor]:
    """Reads prompts (B, T); returns the caches, and the hidden states at the last position (B, 1, D)."""
    cache = KVCache(model.model.config)
    for start in range(0, ids.shape[1], _CHUNK):
        check()
        stop = start + _CHUNK
        hidden = model.model(ids[:, start:stop], None if mask is None else mask[:, :stop], cache)
    return cache, hidden[:, -1:]


def _continue(
    model: TunableLM | CausalLM, rows: list[Generation], ended: Callable[[Generation], None], check: Check
) -> None:
    """Continues some texts together until each has ended; a text that ends leaves the batch."""
    device, length = model.model.norm.weight.device, max(len(row.request.prompt) for row in rows)
    mask = torch.tensor([[0] * (length - len(r.request.prompt)) + [1] * len(r.request.prompt) for r in rows])
    ids = torch.tensor([[0] * (length - len(r.request.prompt)) + list(r.request.prompt) for r in rows], device=device)
    padding = None if bool(mask.all()) else mask.to(device)
    began = time.perf_counter()
    for row in rows:
        row.begin()
    cache, hidden = _read(model, ids, padding, check)
    while True:
        predicted = logits(model, hidden[:, 0]).float().cpu().numpy()  # (B, V)
        for row, of_row in zip(rows, predicted, strict=True):
            row.feed(of_row, began)
            if row.done:
                ended(row)
        staying = [number for number, row in enumerate(rows) if not row.done]
        if not staying:
            return
        if len(staying) < len(rows):
            rows = [rows[number] for number in staying]
            cache.keep(staying)
            padding = None if padding is None else padding[staying]
        check()
        began = time.perf_counter()
        if padding is not None:
            padding = torch.cat((padding, padding.new_ones(len(rows), 1)), dim=1)
        ids = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        hidden = model.model(ids, padding, cache)  # (B, 1, D)
