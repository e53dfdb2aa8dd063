"""Answers of a tuned model to held-out rows, beside the rows' own answers."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.chat import call_ends
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, KVCache
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import casting, logits
from slm.finetune.examples import Example, Renderer
from slm.finetune.rows import ChatRow, CompletionRow, PreferenceRow, Row
from slm.finetune.settings import FinetuneSettings
from slm.runtime.generation import Request
from slm.runtime.sampling import GREEDY
from slm.train.samples import continued

# Maximum tokens of an answer.
TOKENS = 64
# Tokens of the prompt, for a row that is only text.
_OPENING = 12
# Time limit in seconds, after which answers are cut: large models are slow on a CPU.
_SECONDS = 20.0


@dataclass(frozen=True)
class Sample:
    """A row and the model's answer to it.

    Attributes:
        prompt: The last request of a conversation, a prompt, or the beginning of a text.
        wanted: The row's own answer.
        answered: The model's greedy answer, of at most `TOKENS` tokens.
        held_out: Whether the row was held out; otherwise it was trained on.
    """

    prompt: str
    wanted: str
    answered: str
    held_out: bool


@dataclass(frozen=True)
class Question:
    """A row as a question to the model.

    Attributes:
        prompt: The prompt as text.
        ids: The prompt in tokens.
        wanted: The row's own answer.
        wanted_tokens: Its number of tokens, with its end.
    """

    prompt: str
    ids: tuple[int, ...]
    wanted: str
    wanted_tokens: int


def sample_answers(
    model: TunableLM | CausalLM,
    renderer: Renderer,
    rows: Sequence[Row],
    count: int,
    settings: FinetuneSettings,
    *,
    held_out: bool,
    autocast: torch.dtype | None,
) -> list[Sample]:
    """Answers some rows greedily.

    Args:
        model: The tuned model.
        renderer: Converts rows to token ids.
        rows: The rows to draw from.
        count: Maximum number of answers; fewer if rows are too long or time runs out.
        settings: Resolved hyperparameters: the maximum tokens of a row, and the seed of the draw.
        held_out: Whether the rows are held out.
        autocast: Type of the products; None for float32.
    """
    until = time.perf_counter() + _SECONDS
    found: list[Sample] = []
    for question in questions(renderer, rows, count, settings):
        if time.perf_counter() > until:
            break
        found.append(answer(model, renderer, question, TOKENS, held_out, autocast, until))
    return found


def questions(renderer: Renderer, rows: Sequence[Row], count: int, settings: FinetuneSettings) -> list[Question]:
    """Returns some rows as questions, drawn with the seed; the first of them are the same for every number.

    Args:
        renderer: Converts rows to token ids.
        rows: The rows to draw from.
        count: Maximum number of questions; fewer if rows are too long.
        settings: Resolved hyperparameters.
    """
    assert settings.max_length is not None
    found: list[Question] = []
    for number in random.Random(f"{settings.seed} samples").sample(range(len(rows)), len(rows)):
        if len(found) == count:
            break
        question = _question(rows[number], renderer, settings.max_length)
        if question is not None:
            found.append(question)
    return found


@torch.no_grad()
def answer(
    model: TunableLM | CausalLM,
    renderer: Renderer,
    question: Question,
    tokens: int,
    held_out: bool,
    autocast: torch.dtype | None,
    until: float = math.inf,
) -> Sample:
    """Answers a question greedily. Leaves the model in the mode of evaluation.

    Args:
        model: The model.
        renderer: Converts rows to token ids.
        question: The question.
        tokens: Maximum number of tokens.
        held_out: Whether the row is held out.
        autocast: Type of the products; None for float32.
        until: Time limit, in seconds of `time.perf_counter`.
    """
    model.eval()
    with casting(model, autocast):
        answered = _answer(model, renderer, list(question.ids), tokens, until)
    return Sample(question.prompt, question.wanted, answered, held_out)


def _question(row: Row, renderer: Renderer, max_length: int) -> Question | None:
    """Returns a row as a question; None if it is too long or has no answer."""
    row = row.chosen if isinstance(row, PreferenceRow) else row
    try:
        example = renderer.example(row)
    except SlmError:  # counted among the bad rows before
        return None
    if not example.spans:
        return None
    start, end = example.spans[-1]
    text = renderer.tokenizer.decode
    if not isinstance(row, ChatRow | CompletionRow):
        start = min(start - 1 + _OPENING, (start + end) // 2)
    if start >= max_length:
        return None
    wanted = text(example.ids[start:end]).strip()
    return Question(_asked(row, example, start, wanted, renderer), example.ids[:start], wanted, end - start)


def _asked(row: Row, example: Example, start: int, wanted: str, renderer: Renderer) -> str:
    match row:
        case CompletionRow():
            return row.prompt
        case ChatRow():
            answers = [n for n, message in enumerate(row.messages) if message["role"] == "assistant"]
            of_it = (n for n in reversed(answers) if str(row.messages[n]["content"]).strip() == wanted)
            place = next(of_it, answers[-1])
            return str(row.messages[place - 1]["content"]) if place else ""
    return renderer.tokenizer.decode(example.ids[:start])


def _answer(model: TunableLM | CausalLM, renderer: Renderer, ids: list[int], tokens: int, until: float) -> str:
    config, device = model.model.config, model.model.norm.weight.device
    ends = {renderer.end_of_text, *config.stop_token_ids, *renderer.turn_token_ids(), *call_ends(renderer.tokenizer)}

    def read(new: Tensor, cache: KVCache) -> Tensor:
        hidden = model.model(new, cache=cache)  # (1, T, D)
        return logits(model, hidden[0, -1])

    request = Request(ids, GREEDY, min(tokens, config.max_position_embeddings - len(ids)), ends)
    return renderer.tokenizer.decode(continued(config, read, device, request, until)).strip()
