"""Batches: every row once, padding without effect, a loss on the learned tokens alone."""

import random
from collections.abc import Callable

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch, alone, batch_loss, collate, epoch_batches, mean_loss, pack
from slm.finetune.examples import Example
from slm.train.loss import IGNORED

MakeModel = Callable[..., CausalLM]

# Sums of a few hundred float32 cross-entropies, added in another order.
TOLERANCE = 1e-4

SHORT, LONG = Example.ending((0, 5, 6, 7), 2), Example.ending(range(40), 30)


def test_labels_stand_one_before_what_they_predict() -> None:
    batch = collate(alone([SHORT, Example.ending((0, 8), 1)]))
    assert batch.input_ids.tolist() == [[0, 5, 6], [0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.trained == 3 == SHORT.trained + 1


def test_padding_changes_nothing(config: ModelConfig, make_model: MakeModel) -> None:
    model = TunableLM(make_model(config)).eval()
    with torch.no_grad():
        # LONG passes the window of 16, so the masked path is taken for the short row too.
        together = batch_loss(model, collate(alone([SHORT, LONG]))).item()
        each = [batch_loss(model, collate(alone([example]))).item() for example in (SHORT, LONG)]
    expected = (2 * each[0] + 10 * each[1]) / 12
    assert together == pytest.approx(expected, abs=TOLERANCE)
    assert mean_loss(model, [SHORT, LONG], batch_size=2) == pytest.approx(expected, abs=TOLERANCE)


def test_the_loss_is_that_of_the_learned_tokens(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    with torch.no_grad():
        log_probabilities = model(torch.tensor([LONG.ids])).log_softmax(-1)
        expected = -sum(log_probabilities[0, i - 1, LONG.ids[i]].item() for i in range(LONG.start, len(LONG.ids)))
        loss = batch_loss(TunableLM(model), collate(alone([LONG]))).item()
    assert loss == pytest.approx(expected / LONG.trained, abs=TOLERANCE)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    examples = alone([Example.ending((0, *([i + 1] * (1 + i % 7))), 1) for i in range(50)])

    def epoch(order: random.Random) -> list[list[int]]:
        return [batch.labels[:, 0].tolist() for batch in epoch_batches(examples, 4, order)]

    order = random.Random(0)
    first, second = epoch(order), epoch(order)
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == list(range(1, 51))
    assert [len(batch) for batch in first].count(4) == 12
    assert first != second and first == epoch(random.Random(0))


def test_rows_of_a_batch_are_of_similar_length() -> None:
    examples = [Example.ending((0, *([1] * (1 + i % 32))), 1) for i in range(256)]
    batches = epoch_batches(alone(examples), 8, random.Random(0))
    padded = sum(batch.labels.numel() for batch in batches)
    # Random batches of 8 lengths between 1 and 32 would be padded by about seven tenths.
    assert padded < 1.2 * sum(example.trained for example in examples)


def chats(count: int, seed: int = 0) -> list[Example]:
    """Examples of several answers each, of lengths from 6 to 25."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        size = draw.randint(6, 25)
        ids = tuple(draw.randrange(4, 320) for _ in range(size))
        found.append(Example(ids, ((2, 4), (5, size))))
    return found


def test_every_answer_is_a_label_and_nothing_between() -> None:
    batch = collate(alone([Example((0, 5, 6, 7, 8, 9), ((2, 3), (4, 6)))]))
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED, 8, 9]]


def test_rows_are_filled_and_none_is_lost() -> None:
    examples = chats(200)
    rows = pack(examples, 64, random.Random(0))
    assert sorted(example.ids for row in rows for example in row) == sorted(example.ids for example in examples)
    sizes = [sum(len(example.ids) - 1 for example in row) for row in rows]
    assert max(sizes) <= 63
    assert sum(sizes) > 0.9 * 63 * len(rows)


def test_examples_packed_into_a_row_do_not_see_each_other(config: ModelConfig, make_model: MakeModel) -> None:
    model = TunableLM(make_model(config)).eval()
    examples = chats(7)
    row = tuple(examples)
    assert sum(len(example.ids) - 1 for example in row) > 3 * config.sliding_window  # windows reach across too
    packed = collate([row, *alone(examples[:1])])  # beside it one that is padded
    assert packed.segments is not None
    with torch.no_grad():
        wanted = mean_loss(model, [*examples, examples[0]], batch_size=1)
        assert batch_loss(model, packed).item() == pytest.approx(wanted, abs=TOLERANCE)
        # the control: the same row with nothing between the examples
        seeing = batch_loss(model, Batch(packed.input_ids, packed.labels)).item()
    assert abs(seeing - wanted) > 50 * TOLERANCE


def test_packed_and_unpacked_gradients_agree(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config).train()
    examples = chats(5, seed=1)

    def gradient(rows: list[tuple[Example, ...]]) -> torch.Tensor:
        model.zero_grad()
        batch_loss(model, collate(rows)).backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight.grad is not None
        return weight.grad.clone()

    apart, together = gradient(alone(examples)), gradient([tuple(examples)])
    assert (apart - together).abs().max() < TOLERANCE * apart.abs().max()
    model.zero_grad()
    batch = collate([tuple(examples)])
    batch_loss(model, Batch(batch.input_ids, batch.labels)).backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None and (grad - apart).abs().max() > 100 * TOLERANCE * apart.abs().max()
