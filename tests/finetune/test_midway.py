"""Answers during training: when they are given, that they change nothing, and where they are recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.finetune import midway
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE, TunableLM, attach, trained_rows
from slm.finetune.batches import logits
from slm.finetune.frozen import lighten
from slm.finetune.midway import Schedule, schedule, token_cost
from slm.finetune.preparation import RowFiles
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from tests.progress import Notes

pytestmark = pytest.mark.usefixtures("short_answers")

WriteRows = Callable[..., Path]
ROWS = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(12)]
MANY = 10**9


@pytest.mark.parametrize(
    ("lengths", "epochs", "tokens", "wanted"),
    [
        ([20, 20], 3, MANY, Schedule(frozenset({1, 2, 3}), 2)),  # every epoch of a short run
        ([20, 20], 40, MANY, Schedule(frozenset({4, 8, 12, 16, 20, 24, 28, 32, 36, 40}), 2)),
        ([20, 20], 40, 1, Schedule(frozenset({20, 40}), 1)),  # the least: a run too short to pay for more
        ([20, 20], 1, 1, Schedule(frozenset({1}), 1)),
        ([20, 20], 10, 1_000, Schedule(frozenset({3, 7, 10}), 1)),  # 3 % of 10,000 tokens at 4 each: 75 tokens
        ([], 3, MANY, Schedule(frozenset(), 0)),  # --samples 0, or no row fits
    ],
)
def test_when_rows_are_answered(lengths: list[int], epochs: int, tokens: int, wanted: Schedule) -> None:
    assert schedule(lengths, epochs, tokens, cost=4.0) == wanted


def test_a_large_vocabulary_makes_answers_expensive(make_model: Callable[..., CausalLM], config: ModelConfig) -> None:
    small = make_model(config)
    large = make_model(config.model_copy(update={"vocab_size": 50 * config.vocab_size}))
    assert token_cost(large, None) > 5 * token_cost(small, None) >= 5
    assert token_cost(large, torch.bfloat16) == 5 * token_cost(large, None)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"method": "full"}, {"qat": "int8"}], ids=str)
def test_answers_change_no_weight_and_no_other_row(
    shared_checkpoint: Path, write_rows: WriteRows, settings: dict[str, Any]
) -> None:
    chosen = FinetuneSettings(epochs=3, rank=2, batch_size=6).model_copy(update=settings)
    data, heard = RowFiles(write_rows(ROWS), hold_out=0.2), Notes()
    full = chosen.method == "full"
    file = Path("checkpoint/best/model.safetensors" if full else ADAPTER_WEIGHTS_FILE)
    rows = {}
    for name, samples in (("with", 2), ("without", 0)):
        finetune(shared_checkpoint, data, Path(name), chosen, heard, samples=samples)
        metrics = Path(name, "finetune" if full else "", "metrics.jsonl").read_text()
        rows[name] = [json.loads(line) for line in metrics.splitlines()]
    assert Path("with", file).read_bytes() == Path("without", file).read_bytes()
    assert [row for row in rows["with"] if row["type"] != "sample"] == rows["without"]
    samples_of = [row for row in rows["with"] if row["type"] == "sample"]
    assert {row["epoch"] for row in samples_of} <= {1, 2, 3} and len(samples_of) >= 2
    for row in samples_of:
        assert row.keys() == {"type", "epoch", "updates", "tokens", "prompt", "wanted", "text"}
        assert row["prompt"].startswith("Say ") and row["wanted"] == row["prompt"].removeprefix("Say ")[:-1] + "!"
    assert sum(note.startswith("sample: 'Say ") for note in heard.lines) == len(samples_of)


def test_the_answer_is_that_of_the_weights_of_the_epoch(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midway, "_SHARE", 1e9)
    settings = FinetuneSettings(epochs=2, rank=2, batch_size=6, learning_rate=2e-2, keep="last")
    result = finetune(shared_checkpoint, write_rows(ROWS), Path("out"), settings, samples=2)
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    last = {row["prompt"]: row["text"] for row in rows if row["type"] == "sample" and row["epoch"] == 2}
    # The margin of a row's own length ends an answer during training before the limit of the final one does.
    for sample in result.samples:
        assert sample.answered.startswith(last[sample.prompt])
    assert len(last) == 2


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_trained_rows_of_the_head_need_no_copy_of_it(
    make_model: Callable[..., CausalLM], config: ModelConfig, products: torch.dtype | None
) -> None:
    model = attach(make_model(config), FinetuneSettings(rank=2), Path("base"), [3, 5]).get_base_model()
    assert isinstance(model, TunableLM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
        hidden = torch.randn(2, config.hidden_size)
        wanted = model.lm_head(hidden)
        lighten(model, products)
        found = logits(model, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if products is None else 0.1)
    of_the_base = hidden @ trained_rows(model.lm_head)[0].float().T
    assert not torch.allclose(found[:, [3, 5]], of_the_base[:, [3, 5]], atol=0.2)
