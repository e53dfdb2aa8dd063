"""Metrics: one object a line, what a resumed run drops, and TensorBoard's own reader sees the same numbers."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slm.train.logs.log import About
from slm.train.logs.logs import Logs
from slm.train.metrics import Metrics

RUN = Path("run")
# TensorBoard keeps scalars as float32.
FLOAT32 = 1e-6


@pytest.fixture(autouse=True)
def run() -> None:
    RUN.mkdir()


def position(micro_steps: int) -> dict[str, Any]:
    return {"micro_steps": micro_steps, "updates": micro_steps // 2, "tokens": 1500 * micro_steps, "elapsed_s": 0.5}


def train(metrics: Metrics, micro_steps: int, loss: float = 3.0, grad_norm: float | None = 0.5) -> None:
    more = {"loss": loss, "learning_rate": 1e-3 / micro_steps, "grad_norm": grad_norm, "tokens_s": 1234.5}
    metrics.add("train", position(micro_steps) | more)


def evaluate(metrics: Metrics, micro_steps: int, loss: float, text: str | None = None) -> None:
    if text is not None:
        metrics.add("sample", position(micro_steps) | {"prompt": "Once upon", "text": text})
    metrics.add("eval", position(micro_steps) | {"loss": loss, "perplexity": 2 * loss, "bits_per_byte": loss / 3})


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def to_board() -> Logs:
    return Logs(["tensorboard"], About(RUN, {}, lambda row: row["tokens"] // 1000))


def board() -> EventAccumulator:
    events = EventAccumulator(str(RUN / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def assert_the_board_shows_the_rows() -> None:
    events, tags = board(), {"train": "train", "eval": "validation"}
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in rows():
        if row["type"] != "sample":
            for name in row.keys() - {"type", "micro_steps", "updates", "tokens", "elapsed_s"}:
                if row[name] is not None:
                    shown = (row["tokens"] // 1000, pytest.approx(row[name], rel=FLOAT32))
                    wanted.setdefault(f"{tags[row['type']]}/{name}", []).append(shown)
    assert set(events.Tags()["scalars"]) == wanted.keys()
    for tag, values in wanted.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == values, tag


def test_tensorboard_shows_what_the_rows_say() -> None:
    metrics = Metrics(RUN, 0, logs=to_board())
    evaluate(metrics, 0, 5.0)
    for micro_steps in (2, 4, 6):
        train(metrics, micro_steps, 4.0 - micro_steps / 3, grad_norm=None if micro_steps == 4 else 0.25)
    evaluate(metrics, 6, 2.5, "Once upon a time")
    metrics.logs.close()
    assert len(rows()) == 6
    assert_the_board_shows_the_rows()
    assert len(board().Scalars("train/loss")) == 3
    assert len(board().Scalars("train/grad_norm")) == 2  # JSON and TensorBoard know no infinity
    (tag,) = board().Tags()["tensors"]
    assert "Once upon" in tag.replace("_", " ")
    assert board().Tensors(tag)[0].tensor_proto.string_val == [b"Once upon a time"]


def test_tensorboard_is_written_while_the_run_goes_on() -> None:
    metrics = Metrics(RUN, 0, logs=to_board())
    train(metrics, 2)
    evaluate(metrics, 2, 2.5)
    deadline = time.monotonic() + 20  # it writes in a thread of its own
    while "validation/bits_per_byte" not in board().Tags()["scalars"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_the_board_shows_the_rows()
    metrics.logs.close()


def test_a_resumed_run_drops_what_came_later_from_both() -> None:
    metrics = Metrics(RUN, 0, logs=to_board())
    for micro_steps in (2, 4, 6):
        train(metrics, micro_steps)
        evaluate(metrics, micro_steps, 3.0 - micro_steps / 10)
    metrics.logs.close()
    resumed = Metrics(RUN, 2, logs=to_board())
    assert [row["micro_steps"] for row in rows()] == [2, 2, 4, 4]
    assert [row["micro_steps"] for row in resumed.evaluations] == [2, 4]
    train(resumed, 6, loss=1.5)
    resumed.logs.close()
    assert_the_board_shows_the_rows()
    assert [event.value for event in board().Scalars("train/loss")] == [3.0, 3.0, 1.5]


def test_half_a_line_is_dropped() -> None:
    metrics = Metrics(RUN, 0)
    train(metrics, 2)
    with (RUN / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"type": "tra')
    assert [row["micro_steps"] for row in rows_after(4)] == [2]


def rows_after(micro_steps: int) -> list[dict[str, Any]]:
    Metrics(RUN, micro_steps // 2)
    return rows()


def test_samples_without_their_evaluation_are_drawn_again() -> None:
    metrics = Metrics(RUN, 0)
    evaluate(metrics, 2, 3.0, "kept")
    metrics.add("sample", position(4) | {"prompt": "Once", "text": "its evaluation was interrupted"})
    assert [row["type"] for row in rows_after(4)] == ["sample", "eval"]


def test_the_best_is_the_lowest_after_an_update() -> None:
    metrics = Metrics(RUN, 0)
    assert metrics.best is None
    evaluate(metrics, 0, 1.0)
    assert metrics.best is None
    for micro_steps, loss in ((2, 4.0), (4, 3.0), (6, 3.0), (8, 3.5)):
        evaluate(metrics, micro_steps, loss)
    assert metrics.best is not None
    assert metrics.best["micro_steps"] == 4  # the first of equals


def test_the_best_checkpoint_stays_the_best_without_its_row() -> None:
    metrics = Metrics(RUN, 0, best={"updates": 4, "micro_steps": 8, "loss": 2.5})
    assert metrics.best is not None and metrics.best["updates"] == 4
    evaluate(metrics, 2, 3.0)
    assert metrics.best["updates"] == 4
    evaluate(metrics, 8, 2.5)  # which comes again
    assert metrics.best in metrics.evaluations
    evaluate(metrics, 10, 2.0)
    assert metrics.best["updates"] == 5


def test_a_process_that_is_not_the_first_remembers_and_writes_nothing() -> None:
    metrics = Metrics(RUN, 0, write=False)
    evaluate(metrics, 2, 3.0)
    metrics.draw()
    metrics.logs.close()
    assert metrics.best is not None
    assert list(RUN.iterdir()) == []


@pytest.mark.draws
def test_the_curve_is_a_picture() -> None:
    metrics = Metrics(RUN, 0)
    metrics.draw()  # of nothing
    blank = (RUN / "loss.png").read_bytes()
    train(metrics, 2)
    evaluate(metrics, 2, 3.0)
    metrics.draw()
    drawn = (RUN / "loss.png").read_bytes()
    assert blank.startswith(b"\x89PNG")
    assert drawn.startswith(b"\x89PNG")
    assert drawn != blank
