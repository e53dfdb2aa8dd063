"""Warnings about rows and settings; and silence about a usual run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.checkpoint import read_config
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.finetune.examples import Renderer
from slm.finetune.preparation import RowFiles, prepare
from slm.finetune.review import review
from slm.finetune.settings import FinetuneSettings

USUAL = [{"prompt": f"Say {n}", "completion": f" {n}!"} for n in range(240)]
FEW = USUAL[:10]


def calling(*after: dict[str, Any]) -> list[Any]:
    """Returns rows that call a tool."""
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    return [
        {"messages": [{"role": "user", "content": f"Clock {n}?"}, {"role": "assistant", "tool_calls": [call]}, *after]}
        for n in range(240)
    ]


@pytest.fixture
def warnings(shared_checkpoint: Path, write_rows: Callable[..., Path]) -> Callable[..., str]:
    """Returns the warnings about rows and settings, as one text."""

    def reviewed(rows: list[Any], **settings: Any) -> str:
        config = read_config(shared_checkpoint)
        given = FinetuneSettings(**settings)
        renderer = Renderer(Tokenizer.load(shared_checkpoint), config)
        found = prepare(RowFiles(write_rows(rows)), given, config, renderer, Silent())
        return "\n".join(review(found, given, config))

    return reviewed


@pytest.mark.parametrize("settings", [{}, {"rank": 16, "alpha": 32, "epochs": 5}, {"method": "full"}], ids=str)
def test_a_usual_run_has_no_warning(warnings: Callable[..., str], settings: dict[str, Any]) -> None:
    assert warnings(USUAL, **settings) == ""


def test_calls_without_any_result(warnings: Callable[..., str]) -> None:
    answer = [{"role": "tool", "tool_call_id": "1", "content": "nine"}, {"role": "assistant", "content": "Nine."}]
    assert warnings(calling()).startswith("no training row has the result of a call")
    assert warnings(calling(*answer)) == ""


@pytest.mark.parametrize(
    ("rows", "settings", "warning"),
    [
        (FEW, {}, "10 training rows are few"),
        ([*USUAL, *USUAL[:3]], {}, "training rows equal an earlier row"),
        (
            [*USUAL, {"prompt": "Say 3", "completion": " never"}],
            {"seed": 1},
            "have the prompt of an earlier row and another",
        ),
        ([*USUAL, {"text": "### Response: no"}], {}, "1 rows of text contain turns"),
        (USUAL, {"learning_rate": 0.5}, "times the default for this model and these rows"),
        (USUAL, {"learning_rate": 1e-5}, "the model may learn little"),
        (USUAL, {"epochs": 1, "batch_size": 16}, "the run has only 14 updates"),
        (FEW, {"epochs": 40, "batch_size": 64}, "the batch size of 64 is larger than the number of rows, 10"),
        (USUAL, {"alpha": 256}, "alpha / rank is 32"),
        (USUAL, {"rank": 64, "alpha": 64}, "the rank of 64 is not below the model's width of 64"),
        (USUAL, {"method": "full", "rank": 16}, "training.rank has no effect with training.method=full"),
        (USUAL, {"beta": 0.5}, "training.beta has no effect without rows that have chosen and rejected"),
        (USUAL, {"keep": "last", "patience": 2}, "training.patience has no effect with training.keep=last"),
    ],
)
def test_what_looks_wrong(
    warnings: Callable[..., str], rows: list[Any], settings: dict[str, Any], warning: str
) -> None:
    assert warning in warnings(rows, **settings)
