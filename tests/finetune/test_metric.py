"""`--metric`: the score of replies after every epoch is that of `slm eval --task`, and decides which epoch is kept."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.core.metrics.scoring import METRICS
from slm.core.progress import Silent
from slm.core.task import MetricName
from slm.export.bundle import export_bundle
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE
from slm.finetune.examples import Renderer
from slm.finetune.judge import Judge
from slm.finetune.merge import merged_checkpoint
from slm.finetune.preparation import RowFiles
from slm.finetune.run import FinetuneResult, finetune
from slm.finetune.settings import FinetuneSettings
from slm.finetune.task import questions, read_task
from slm.loading import load
from slm.runtime.answers import Answer, Measured
from slm.runtime.task import measure_task
from tests.progress import Notes, Stopper

pytestmark = pytest.mark.usefixtures("short_answers")

WriteRows = Callable[..., Path]
WORDS = ("one", "two", "red", "blue", "cat", "dog", "sun", "sea", "cup", "hat")
ROWS = [{"instruction": f"Say {word}.", "output": f"It is {word} and {word}!"} for word in WORDS]
COLOURS = [{"prompt": f"{word}:", "completion": (" yes", " no", " so")[n % 3]} for n, word in enumerate(WORDS)]
QUICK = FinetuneSettings.checked(rank=4, epochs=2, batch_size=4, patience=None, learning_rate=1e-2)


def evaluations(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["type"] == "eval"]


def measured_again(model: Path, rows: Path, metric: MetricName, adapter: Path | None, limit: int | None) -> Measured:
    """The score of `slm eval --task`."""
    loaded = load(model, adapter=adapter)
    found = questions(read_task(rows, metric, limit=limit), Renderer(loaded.tokenizer, loaded))
    return measure_task(loaded, found, metric, Silent())


@pytest.mark.parametrize(
    ("metric", "rows", "limit"),
    [("f1", ROWS, None), ("f1", ROWS, 4), ("choice", COLOURS, None)],
    ids=("f1", "f1-of-4", "choice"),
)
def test_the_score_is_that_of_eval(
    shared_checkpoint: Path, write_rows: WriteRows, metric: MetricName, rows: list[Any], limit: int | None
) -> None:
    data, held_out = write_rows(rows), write_rows(rows[::-1], "held-out.jsonl")
    settings = QUICK.model_copy(update={"metric": metric, "metric_rows": limit or 200})
    result = finetune(shared_checkpoint, RowFiles(data, held_out), Path("out"), settings)
    measures = evaluations(Path("out"))
    before, kept = measures[0], measures[result.kept_epoch]
    assert (result.metric, result.metric_rows) == (metric, limit or len(rows))
    assert (result.score_before, result.score_after) == (before["score"], kept["score"])
    assert kept["score"] > 0
    of_base = measured_again(shared_checkpoint, held_out, metric, None, limit)
    assert before["score"] == pytest.approx(of_base.score, abs=1e-12)
    again = measured_again(shared_checkpoint, held_out, metric, Path("out"), limit)
    assert kept["score"] == pytest.approx(again.score, abs=1e-12)
    assert kept["score_others"] == pytest.approx(again.others) and kept["score_low"] == again.interval.low
    merged_checkpoint(shared_checkpoint, Path("out"), Path("merged"))
    export_bundle(Path("merged"), Path("onnx"))
    of_bundle = measured_again(Path("onnx"), held_out, metric, None, limit)
    assert kept["score"] == pytest.approx(of_bundle.score, abs=1e-12)
    if metric == "f1":  # negative control: other weights have another score
        assert of_bundle.score != of_base.score


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_trained_is_the_same_with_and_without(
    shared_checkpoint: Path, write_rows: WriteRows, method: str
) -> None:
    data, weights = write_rows(ROWS), []
    for metric in (None, "exact"):
        update = {"metric": metric, "keep": "last", "method": method} | ({"dropout": 0.2} if method == "lora" else {})
        result = finetune(shared_checkpoint, data, Path(f"out-{metric}"), QUICK.model_copy(update=update))
        name = ADAPTER_WEIGHTS_FILE if method == "lora" else "model.safetensors"
        weights.append((result.made / name).read_bytes())
    assert weights[0] == weights[1]


def judged(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    """Replaces the scores of the base and of each epoch."""
    left = iter(scores)

    def measure(judge: Judge, *_: object) -> Measured:
        score, others = next(left), dict.fromkeys(METRICS["exact"].others, 0.0)
        rows = [Answer(question.row, "", {"score": score} | others, 1, "end") for question in judge._questions]
        return Measured("exact", tuple(rows), 1.0, 32, 1)

    monkeypatch.setattr(Judge, "measure", measure)


def tuned(base: Path, data: Path, progress: Any = None, **settings: Any) -> FinetuneResult:
    return finetune(base, data, Path("out"), QUICK.model_copy(update={"metric": "exact"} | settings), progress)


def test_the_epoch_with_the_highest_score_is_kept_and_of_equal_ones_the_lowest_loss(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    result = tuned(shared_checkpoint, write_rows(ROWS), epochs=5)
    losses = [row["loss"] for row in evaluations(Path("out"))]
    assert losses[5] < losses[4] < losses[3] < losses[2]  # the loss alone would keep the last epoch
    assert (result.kept_epoch, result.loss_after) == (3, losses[3])
    assert (result.score_before, result.score_after) == (0.0, 1.0)


def test_patience_counts_epochs_since_the_best_score(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    heard = Notes()
    result = tuned(shared_checkpoint, write_rows(ROWS), heard, epochs=5, patience=2)
    assert (result.kept_epoch, result.updates) == (1, 3 * 3)
    assert any(line.endswith("exact match 100.0% (best so far)") for line in heard.lines)


@pytest.mark.parametrize("update", [1, 3, 4])
def test_a_resumed_run_keeps_its_scores(shared_checkpoint: Path, write_rows: WriteRows, update: int) -> None:
    data, settings = write_rows(ROWS), QUICK.model_copy(update={"metric": "f1"})
    finetune(shared_checkpoint, data, Path("whole"), settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("parts"), settings, Stopper(update))
    finetune(shared_checkpoint, data, Path("parts"), settings)
    for name in ("metrics.jsonl", ADAPTER_WEIGHTS_FILE):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    assert all("score" in row for row in evaluations(Path("parts")))


def test_a_state_without_scores_is_damaged(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data, settings = write_rows(ROWS), QUICK.model_copy(update={"metric": "f1"})
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), settings, Stopper(4))
    file = Path("out/trainer/state.json")
    fields = json.loads(file.read_text(encoding="utf-8"))
    for _, row in fields["history"]:
        row.pop("score", None)
    file.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(SlmError, match="the saved state contradicts itself"):
        finetune(shared_checkpoint, data, Path("out"), settings)


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([{"text": "Once upon a time."}], "exact", "line 1: a row of text has no request and no reply to compare"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "exact", "does not choose the epoch of preferences"),
        (COLOURS, "json", "line 1: the expected reply is not JSON"),
        (COLOURS, "tool-call", "no reply of .*rows.jsonl calls a tool"),
        (COLOURS[:1], "choice", "rows have no 'choices'"),
    ],
)
def test_rows_that_have_no_such_score(
    shared_checkpoint: Path, write_rows: WriteRows, rows: list[Any], metric: MetricName, message: str
) -> None:
    with pytest.raises(SlmError, match=message):
        finetune(shared_checkpoint, write_rows(rows), Path("out"), QUICK.model_copy(update={"metric": metric}))
    assert not Path("out").exists()


def test_choices_of_rows_are_compared(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    rows = [row | {"choices": ["yes", "no", "so", "perhaps"]} for row in COLOURS]
    result = finetune(shared_checkpoint, write_rows(rows), Path("out"), QUICK.model_copy(update={"metric": "choice"}))
    again = measured_again(shared_checkpoint, Path("rows.jsonl"), "choice", Path("out"), None)
    assert result.score_after == again.score
    assert again.answers[0].row.choices == ("yes", "no", "so", "perhaps")


def test_rows_that_the_template_rejects_are_not_asked(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    rows = [*ROWS[:4], {"text": 7}]
    files = RowFiles(write_rows(rows), skip_bad=True)
    result = finetune(shared_checkpoint, files, Path("out"), QUICK.model_copy(update={"metric": "exact"}))
    assert (result.bad, result.metric_rows) == (1, 4)
