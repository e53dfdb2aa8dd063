"""What a run says while it trains, which epoch it keeps, and what the result answers at the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.checkpoint import read_config, read_info
from slm.core.config import ModelConfig
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.task import MetricName
from slm.core.tokenizer import Tokenizer
from slm.finetune import loop, samples
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE, load_adapter
from slm.finetune.batches import mean_loss
from slm.finetune.examples import Renderer
from slm.finetune.merge import merge
from slm.finetune.preparation import RowFiles, prepare
from slm.finetune.rows import read_rows
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from slm.loading import load
from tests.progress import Notes, Stopper

pytestmark = pytest.mark.usefixtures("short_answers")

WriteRows = Callable[..., Path]
QUICK = FinetuneSettings(rank=4, epochs=3, batch_size=4)
ROWS = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(30)]


def held(data: Path) -> RowFiles:
    """Returns the rows with a tenth held out."""
    return RowFiles(data, hold_out=0.1)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_epoch_has_a_line_with_both_losses(shared_checkpoint: Path, write_rows: WriteRows, method: str) -> None:
    heard = Notes()
    settings = QUICK.model_copy(update={"method": method, "learning_rate": 1e-3})
    finetune(shared_checkpoint, held(write_rows(ROWS)), Path("out"), settings, heard, samples=0)
    rows = metrics(Path("out") if method == "lora" else Path("out/finetune"))
    measured = [row["loss"] for row in rows if row["type"] == "eval"]
    lines = [note for note in heard.lines if note.startswith(("before training", "epoch "))]
    assert lines[0] == f"before training: held-out loss {measured[0]:.3f}"
    tokens = 0
    for epoch in range(1, 4):
        updates = [row for row in rows if row["type"] == "train" and row["epoch"] == epoch]
        total = sum(
            row["loss"] * (row["tokens"] - before)
            for row, before in zip(updates, [tokens, *(r["tokens"] for r in updates)], strict=False)
        )
        mean, tokens = total / (updates[-1]["tokens"] - tokens), updates[-1]["tokens"]
        best = " (best so far)" if measured[epoch] == min(measured[1 : epoch + 1]) else ""
        assert lines[epoch] == f"epoch {epoch}/3: train loss {mean:.3f}, held-out loss {measured[epoch]:.3f}{best}"


def test_a_long_epoch_has_lines_of_its_own(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, quiet, talkative = held(write_rows(ROWS)), Notes(), Notes()
    finetune(shared_checkpoint, data, Path("a"), QUICK, quiet, samples=0)
    monkeypatch.setattr(loop, "_LINE_EVERY_S", 0.0)
    finetune(shared_checkpoint, data, Path("b"), QUICK, talkative, samples=0)
    assert not any(note.startswith("update ") for note in quiet.lines)
    lines = [note for note in talkative.lines if note.startswith("update ")]
    assert len(lines) == 18 and lines[0].startswith("update 1 of 21, epoch 1/3: train loss ")
    assert all("tokens/s, about " in line and " left" in line for line in lines)
    first = next(row for row in metrics(Path("b")) if row["type"] == "train")
    assert f"train loss {first['loss']:.3f}, " in lines[0]
    assert Path("a", ADAPTER_WEIGHTS_FILE).read_bytes() == Path("b", ADAPTER_WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_epoch_that_is_kept(shared_checkpoint: Path, write_rows: WriteRows, keep: str) -> None:
    """Held out: what learning makes less likely, so that the best epoch is not the last."""
    learned = write_rows([{"prompt": "a", "completion": "b" * 20}])
    unlikely = write_rows([{"prompt": "a", "completion": "z" * 20}], "held-out.jsonl")
    settings = FinetuneSettings.checked(epochs=12, learning_rate=2e-2, keep=keep)
    result = finetune(shared_checkpoint, RowFiles(learned, unlikely), Path("out"), settings, samples=0)
    losses = [row["loss"] for row in metrics(Path("out")) if row["type"] == "eval"]
    assert result.best_epoch == losses.index(min(losses[1:])) < 12
    assert len(losses) == (13 if keep == "last" else result.best_epoch + 3 + 1)  # patience
    assert result.kept_epoch == (12 if keep == "last" else result.best_epoch)
    assert (result.loss_before, result.loss_after) == (losses[0], losses[result.kept_epoch])
    kept = load_adapter(load_checkpoint(shared_checkpoint), Path("out")).get_base_model()
    renderer = Renderer(Tokenizer.load(shared_checkpoint), load_checkpoint(shared_checkpoint).config)
    held_out = [renderer.example(row) for row in read_rows(unlikely)]
    assert mean_loss(kept, held_out, 1) == pytest.approx(result.loss_after, abs=1e-5)
    assert read_info(Path("out"))["settings"]["keep"] == keep


def test_the_last_epoch_is_the_same_after_an_interruption(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data, settings = write_rows(ROWS), QUICK.model_copy(update={"keep": "last", "dropout": 0.1})
    whole = Notes()
    finetune(shared_checkpoint, data, Path("whole"), settings, whole)
    for update in (3, 7, 10):
        out, parts = Path(f"parts-{update}"), Notes()
        with pytest.raises(KeyboardInterrupt):
            finetune(shared_checkpoint, data, out, settings, Stopper(update))
        finetune(shared_checkpoint, data, out, settings, parts)
        for name in (ADAPTER_WEIGHTS_FILE, "metrics.jsonl"):
            assert (out / name).read_bytes() == Path("whole", name).read_bytes()
        for field in ("samples", "held_out", "held_out_rows"):
            assert read_info(out)[field] == read_info(Path("whole"))[field]
        # The train loss of an epoch that was interrupted is that of all its updates.
        lines = [note for note in parts.lines if note.startswith("epoch ")]
        assert lines and lines == [note for note in whole.lines if note.startswith("epoch ")][-len(lines) :]


def test_a_run_whose_rows_were_split_otherwise_is_not_gone_on_with(
    shared_checkpoint: Path, write_rows: WriteRows
) -> None:
    data = held(write_rows(ROWS))
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), QUICK, Stopper(3))
    file = Path("out/trainer/state.json")
    state = json.loads(file.read_text())
    state["course"]["held_out"]["sha256"] = "0"
    file.write_text(json.dumps(state))
    with pytest.raises(Exception, match="differs in held_out"):
        finetune(shared_checkpoint, data, Path("out"), QUICK)


@pytest.mark.parametrize(
    ("count", "keep", "said"),
    [
        (30, "best", "warning: 3 held-out rows are too few to choose an epoch by (fewer than 20)"),
        (30, "last", None),
        (200, "best", None),
    ],
)
def test_too_few_rows_to_choose_by_are_said(
    shared_checkpoint: Path, write_rows: WriteRows, count: int, keep: str, said: str | None
) -> None:
    heard = Notes()
    rows = [{"prompt": f"{n}", "completion": "b"} for n in range(count)]
    settings = QUICK.model_copy(update={"keep": keep, "epochs": 1, "batch_size": 64})
    finetune(shared_checkpoint, held(write_rows(rows)), Path("out"), settings, heard, samples=0)
    warned = [note for note in heard.lines if "held out" in note or "held-out" in note if note.startswith("warning")]
    assert [note.startswith(said) for note in warned] == [True] if said else warned == []
    if said:
        assert "--val FILE" in warned[0] and "--keep last" in warned[0] and "kept" in warned[0]


@pytest.mark.parametrize(("metric", "best"), [(None, "lowest loss"), ("exact", "highest score")])
@pytest.mark.parametrize("hold_out", [0.1, None])
def test_the_warning_names_what_the_epoch_is_chosen_by(
    shared_checkpoint: Path, write_rows: WriteRows, hold_out: float | None, metric: MetricName | None, best: str
) -> None:
    heard, config = Notes(), read_config(shared_checkpoint)
    data = RowFiles(write_rows([{"prompt": f"{n}", "completion": "b"} for n in range(30)]), hold_out=hold_out)
    settings = QUICK.model_copy(update={"metric": metric})
    prepare(data, settings, config, Renderer(Tokenizer.load(shared_checkpoint), config), heard)
    wanted = f"{best} on them is kept" if hold_out else f"the {best.split()[1]} is that of the training rows"
    assert sum(wanted in note for note in heard.lines) == 1


@pytest.mark.parametrize(("count", "held_out"), [(199, 0), (200, 20)])
def test_none_of_few_rows_are_held_out(
    shared_checkpoint: Path, write_rows: WriteRows, count: int, held_out: int
) -> None:
    heard = Notes()
    rows = [{"prompt": f"{n}", "completion": "b"} for n in range(count)]
    settings = QUICK.model_copy(update={"epochs": 1, "batch_size": 64})
    result = finetune(shared_checkpoint, write_rows(rows), Path("out"), settings, heard, samples=0)
    assert (result.rows, result.validation_rows) == (count - held_out, held_out)
    assert any(note.startswith("no rows are held out: the loss is") for note in heard.lines) == (held_out == 0)


def test_validation_rows_that_are_learned_are_said(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    heard = Notes()
    held_out = write_rows([*ROWS[:2], {"instruction": "New.", "output": "x"}], "held-out.jsonl")
    finetune(shared_checkpoint, RowFiles(write_rows(ROWS), held_out), Path("out"), QUICK, heard, samples=0)
    assert "warning: of the 3 validation rows 2 are training rows too: their loss says little" in heard.lines


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_samples_are_what_the_result_answers(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, write_rows: WriteRows, method: str
) -> None:
    model = make_model(config)
    model.model.embed_tokens.weight.data *= 20  # so that answers can be learned by heart
    save_checkpoint(Path("base"), model, tokenizer, {})
    chat = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Goodbye."},
    ]
    rows = [
        {"messages": chat},
        {"prompt": "The sky is", "completion": " blue."},
        {"instruction": "Say one.", "output": "One!"},
    ]
    settings = FinetuneSettings.checked(
        epochs=60, batch_size=3, learning_rate=2e-2 if method == "lora" else 5e-3, method=method
    )
    result = finetune(Path("base"), write_rows(rows), Path("out"), settings)
    assert result.loss_before > 4 and result.loss_after < 0.1
    found = {sample.prompt: sample for sample in result.samples}
    assert found.keys() == {"And now?", "The sky is", "Say one."}
    for prompt, wanted in (("And now?", "Goodbye."), ("The sky is", "blue."), ("Say one.", "One!")):
        assert found[prompt].wanted == found[prompt].answered == wanted and not found[prompt].held_out
    info = read_info(result.made)
    info = info if method == "lora" else info["finetuned"]
    assert [sample["answered"] for sample in info["samples"]] == [sample.answered for sample in result.samples]
    assert "samples" not in info["metrics"]


def test_the_samples_are_of_held_out_rows_and_the_merged_model_says_the_same(
    shared_checkpoint: Path, write_rows: WriteRows
) -> None:
    data = held(write_rows([{"prompt": f"Say {n}", "completion": f" {n}!"} for n in range(40)]))
    result = finetune(shared_checkpoint, data, Path("out"), QUICK)
    numbers = read_info(Path("out"))["held_out_rows"]
    assert len(result.samples) == 3 and all(sample.held_out for sample in result.samples)
    assert {sample.prompt for sample in result.samples} <= {f"Say {number - 1}" for number in numbers}
    save_checkpoint(Path("merged"), merge(shared_checkpoint, Path("out")), Tokenizer.load(shared_checkpoint), {})
    merged = load("merged")
    end_of_turn = {merged.tokenizer.token_id(token) for token in ("<start_of_turn>", "<end_of_turn>")}
    merged.stop_token_ids = (*merged.stop_token_ids, *(token for token in end_of_turn if token is not None))
    for sample in result.samples:
        ids = [*merged.tokenizer.encode(""), *merged.tokenizer.encode_literal(sample.prompt)]
        answer = merged.generate(ids, temperature=0, max_new_tokens=samples.TOKENS)
        assert sample.answered == answer.strip() and sample.wanted == sample.prompt.removeprefix("Say ") + "!"
    assert finetune(shared_checkpoint, data, Path("none"), QUICK, samples=0).samples == ()


def test_samples_take_no_longer_than_they_may(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_SECONDS", -1.0)
    assert finetune(shared_checkpoint, write_rows(ROWS), Path("out"), QUICK).samples == ()


def test_texts_are_continued_from_their_beginning(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    texts = [f"Once upon a time there was a dog number {n} that liked to run." for n in range(3)]
    result = finetune(shared_checkpoint, write_rows([{"text": text} for text in texts]), Path("out"), QUICK)
    assert len(result.samples) == 3
    for sample in result.samples:
        (text,) = (text for text in texts if text.startswith(sample.prompt) and text.endswith(sample.wanted))
        assert sample.prompt and sample.wanted and len(sample.prompt) < len(text)


def test_sampling_leaves_the_random_state_alone(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(ROWS)
    for count in (0, 3):
        torch.manual_seed(1)
        finetune(shared_checkpoint, data, Path(f"out-{count}"), QUICK, samples=count)
    assert Path("out-0", ADAPTER_WEIGHTS_FILE).read_bytes() == Path("out-3", ADAPTER_WEIGHTS_FILE).read_bytes()
