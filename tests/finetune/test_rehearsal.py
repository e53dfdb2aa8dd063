"""Time and memory by measuring some updates: what is measured, and what it extrapolates to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slm.core.checkpoint import read_config, read_info
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.finetune import rehearsal
from slm.finetune.build import build
from slm.finetune.examples import Renderer
from slm.finetune.preparation import RowFiles, prepare
from slm.finetune.rehearsal import Rehearsal, _extrapolated, _line, rehearse
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import Standing
from slm.train.precision import FLOAT32

ROWS = [{"prompt": "a", "completion": " b" * (n + 1)} for n in range(40)]
PAIRS = [{"prompt": "a", "chosen": " b" * (n + 1), "rejected": " c"} for n in range(8)]


@pytest.mark.parametrize(
    ("sizes", "seconds", "wanted", "expected"),
    [
        ([10, 20], [1.2, 2.2], [10, 30], [1.2, 3.2]),  # 0.2 + 0.1 n
        ([10, 20], [2.0, 1.0], [10, 30], [1.5, 1.5]),  # noise: larger batches are not faster
        ([10, 20], [0.1, 2.0], [10, 20], [0.7, 1.4]),  # noise: no time below 0
        ([10], [1.0], [10, 10], [1.0, 1.0]),
    ],
)
def test_the_time_of_batches(sizes: list[int], seconds: list[float], wanted: list[int], expected: list[float]) -> None:
    assert _line(sizes, seconds, wanted) == pytest.approx(expected)


def test_memory_grows_with_the_batch() -> None:
    assert _extrapolated([(10, 100), (20, 150)], 40) == 250
    assert _extrapolated([(10, 150), (20, 150)], 40) == 150  # a peak before the first update
    assert _extrapolated([(20, 100)], 40) == 200


def rehearsed(base: Path, data: Path, settings: FinetuneSettings, memory: int | None = None) -> Rehearsal:
    config = read_config(base)
    renderer = Renderer(Tokenizer.load(base), config)
    found = prepare(RowFiles(data), settings, config, renderer, Silent())
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        if memory is not None:
            patch.setattr(rehearsal, "_available", lambda device: memory)
        built = build(base, read_info(base), found, renderer, torch.device("cpu"), FLOAT32, Silent())
        return rehearse(built, built.fit(found, Standing(course={"settings": {}}), refer=False), found)


@pytest.mark.parametrize(("method", "rows"), [("lora", ROWS), ("full", ROWS), ("lora", PAIRS)])
def test_more_epochs_take_longer(
    shared_checkpoint: Path, write_rows: Callable[..., Path], method: str, rows: list[object]
) -> None:
    data = write_rows(rows)
    short, long = (
        rehearsed(shared_checkpoint, data, FinetuneSettings(method=method, epochs=epochs, rank=2))
        for epochs in (2, 200)
    )
    assert long.seconds > 20 * short.seconds > 0
    assert short.complete and 1 <= short.updates <= 8 and short.tokens_s > 0
    assert long.memory >= short.memory > 50 << 20


def test_a_batch_that_would_not_fit_is_not_tried(shared_checkpoint: Path, write_rows: Callable[..., Path]) -> None:
    settings = FinetuneSettings(rank=2, epochs=2)
    found = rehearsed(shared_checkpoint, write_rows(ROWS), settings, memory=1)
    assert not found.complete and found.memory > 1
