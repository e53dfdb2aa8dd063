"""Batches: every row once, padding without effect, a loss on the learned tokens alone."""

import random
from collections.abc import Callable

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import IGNORED, batch_loss, collate, epoch_batches, mean_loss
from slm.finetune.examples import Example

MakeModel = Callable[..., CausalLM]

# Sums of a few hundred float32 cross-entropies, added in another order.
TOLERANCE = 1e-4

SHORT, LONG = Example((0, 5, 6, 7), 2), Example(tuple(range(40)), 30)


def test_labels_stand_one_before_what_they_predict() -> None:
    batch = collate([SHORT, Example((0, 8), 1)])
    assert batch.input_ids.tolist() == [[0, 5, 6], [0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.trained == 3 == SHORT.trained + 1


def test_padding_changes_nothing(config: ModelConfig, make_model: MakeModel) -> None:
    model = TunableLM(make_model(config)).eval()
    with torch.no_grad():
        # LONG passes the window of 16, so the masked path is taken for the short row too.
        together = batch_loss(model, collate([SHORT, LONG])).item()
        alone = [batch_loss(model, collate([example])).item() for example in (SHORT, LONG)]
    assert together == pytest.approx(sum(alone), abs=TOLERANCE)
    assert mean_loss(model, [SHORT, LONG], batch_size=2) == pytest.approx(sum(alone) / 12, abs=TOLERANCE)


def test_the_loss_is_that_of_the_learned_tokens(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    with torch.no_grad():
        log_probabilities = model(torch.tensor([LONG.ids])).log_softmax(-1)
        expected = -sum(log_probabilities[0, i - 1, LONG.ids[i]].item() for i in range(LONG.start, len(LONG.ids)))
        assert batch_loss(TunableLM(model), collate([LONG])).item() == pytest.approx(expected, abs=TOLERANCE)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    examples = [Example((0, *([i + 1] * (1 + i % 7))), 1) for i in range(50)]

    def epoch(order: random.Random) -> list[list[int]]:
        return [batch.labels[:, 0].tolist() for batch in epoch_batches(examples, 4, order)]

    order = random.Random(0)
    first, second = epoch(order), epoch(order)
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == list(range(1, 51))
    assert [len(batch) for batch in first].count(4) == 12
    assert first != second and first == epoch(random.Random(0))


def test_rows_of_a_batch_are_of_similar_length() -> None:
    examples = [Example((0, *([1] * (1 + i % 32))), 1) for i in range(256)]
    batches = epoch_batches(examples, 8, random.Random(0))
    padded = sum(batch.labels.numel() for batch in batches)
    # Random batches of 8 lengths between 1 and 32 would be padded by about seven tenths.
    assert padded < 1.2 * sum(example.trained for example in examples)
