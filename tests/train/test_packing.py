"""Best-fit packing: every token is a target once, documents stay whole and apart, and the rows follow from seed and number.

Dimensions: B rows, T positions.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.train.data.packing import Packing, best_fit
from slm.train.data.tokens import TokenIds
from slm.train.learner import Objective
from slm.train.loss import IGNORED

END = 9
CPU = torch.device("cpu")


def stream(*lengths: int) -> TokenIds:
    """Returns documents of so many tokens with their end-of-text, in two files."""
    draw = np.random.default_rng(0)
    ids = np.concatenate([[*draw.integers(10, 60, length - 1), END] for length in lengths]).astype(np.uint16)
    return TokenIds([ids[: len(ids) // 2], ids[len(ids) // 2 :]])


def many(context: int) -> TokenIds:
    return stream(*np.random.default_rng(1).integers(1, 2 * context, 200).tolist())


@pytest.mark.parametrize("context", [8, 24])
def test_every_token_is_a_target_once(context: int) -> None:
    ids = many(context)
    packing = Packing(ids, context)
    _, targets, _ = packing.gather(np.arange(packing.rows), CPU)
    assert sorted(targets[targets != IGNORED].tolist()) == sorted(ids[:].tolist())
    assert packing.targets_in(np.arange(packing.rows)).tolist() == (targets != IGNORED).sum(1).tolist()
    assert packing.tokens == len(ids)
    assert packing.positions == packing.rows * context > len(ids)


def test_rows_hold_whole_documents_and_only_longer_ones_are_cut() -> None:
    ids = stream(5, 3, 20, 2, 6)
    packing = Packing(ids, 8)
    inputs, targets, segments = packing.gather(np.arange(packing.rows), CPU)
    found = []
    for row in range(packing.rows):
        for number in segments[row].unique():
            mine = segments[row] == number
            if (targets[row, mine] != IGNORED).all():
                assert torch.equal(inputs[row, mine][1:], targets[row, mine][:-1])  # shifted by one within a document
                found.append((inputs[row, mine][0].item(), targets[row, mine].tolist()))
            else:
                assert (targets[row, mine] == IGNORED).all() and number == segments[row].max()
    bounds = np.cumsum([0, 5, 3, 20, 2, 6])
    documents = [ids[start:stop].tolist() for start, stop in pairwise(bounds.tolist())]
    long = documents.pop(2)
    wanted = [(END, each) for each in documents]
    wanted += [(END, long[:8]), (long[7], long[8:16]), (long[15], long[16:])]
    assert sorted(found) == sorted(wanted)
    assert packing.cut == 1


def test_best_fit_takes_the_fullest_row_with_space() -> None:
    # By size 7, 6, 4, 4, 3, 2, 2. The 4s share a row; 3 opens one, 2 completes the 6, the other 2 joins the 3.
    row_of = best_fit(np.array([2, 4, 3, 7, 6, 4, 2]), 8)
    assert row_of.tolist() == [1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("context", [16, 64, 512])
def test_few_positions_are_left_where_documents_are_short(context: int) -> None:
    sizes = np.random.default_rng(2).integers(1, max(3, context // 3), 3000)
    row_of = best_fit(sizes, context)
    filled = np.bincount(row_of, weights=sizes)
    assert filled.max() <= context
    assert len(filled) <= 1.01 * -(-sizes.sum() // context) + 1


def test_a_pass_reads_every_row_once_in_an_order_of_its_own() -> None:
    packing = Packing(many(16), 16)
    rows = packing.rows
    one, two = packing.drawn(3, 0, rows), packing.drawn(3, rows, rows)
    assert sorted(one) == sorted(two) == list(range(rows))
    assert one.tolist() != two.tolist() != packing.drawn(4, 0, rows).tolist()
    across = packing.drawn(3, rows - 2, 5)  # the end of a pass and the beginning of the next
    assert across.tolist() == [*one[-2:], *two[:3]]


def test_targets_are_counted_as_they_are_read() -> None:
    packing = Packing(many(16), 16)
    read = np.cumsum(packing.targets_in(packing.drawn(3, 0, 2 * packing.rows + 7)))
    for drawn in (1, 5, packing.rows, packing.rows + 1, 2 * packing.rows + 7):
        assert packing.targets_before(3, drawn) == read[drawn - 1]
    assert packing.targets_before(3, 0) == 0


def test_a_document_in_a_row_with_others_is_the_document_alone(
    config: ModelConfig, make_model: Callable[..., CausalLM]
) -> None:
    """The loss of a row is the mean over its targets of what each document has in a row of its own."""
    model = make_model(config)
    packing = Packing(stream(5, 9, 4, 6), 24)
    assert packing.rows == 1
    inputs, targets, segments = packing.gather(np.array([0]), CPU)
    objective = Objective(model)
    together = objective(inputs, targets, segments).item()
    alone = 0.0
    for number in range(4):
        mine = segments[0] == number
        alone += objective(inputs[:, mine], targets[:, mine]).item() * mine.sum().item()
    assert together == pytest.approx(alone / 24, rel=1e-5)
    assert abs(objective(inputs, targets).item() - together) > 1e-3  # the control: documents that see each other
