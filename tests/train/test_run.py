"""Whole runs: what they leave, and what their settings change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.train import run as module
from slm.train.build import build_model
from slm.train.data.dataset import open_dataset
from slm.train.evaluate import evaluate
from slm.train.learner import Objective
from slm.train.recipe import Recipe
from slm.train.run import train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")


@pytest.mark.draws
def test_what_a_run_leaves(small_recipe: MakeRecipe, notes: Any, rows: Rows) -> None:
    result = train(small_recipe(), OUT, notes)
    assert sorted(path.name for path in OUT.iterdir()) == [
        "checkpoint", "config.yaml", "data", "loss.png", "metrics.jsonl", "tensorboard", "trainer"
    ]  # fmt: skip
    assert result.checkpoint == OUT / "checkpoint/best"
    assert result.loss < result.loss_before
    assert (result.micro_steps, result.updates, result.tokens) == (12, 6, 12 * 4 * 24)
    assert (OUT / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0, 4, 8, 12]
    for row in rows(OUT):
        expected = {"train": {"learning_rate", "grad_norm", "tokens_s"}, "eval": {"perplexity", "bits_per_byte"}}
        assert row.keys() == {"type", "micro_steps", "updates", "tokens", "elapsed_s", "loss"} | expected[row["type"]]
    said = "\n".join(notes.lines)
    assert f"{result.parameters:,} parameters" in said
    assert "MiB" in said
    assert "device: CPU" in said


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_the_checkpoint_is_what_was_measured(small_recipe: MakeRecipe, variant: str) -> None:
    result = train(small_recipe(variant), OUT)
    model = load_checkpoint(result.checkpoint)
    dataset = open_dataset(OUT / "data")
    tokenizer, tokens = dataset.tokenizer, dataset.validation
    measured = evaluate(Objective(model), tokens, windows=8, context=24, batch_size=4, check=lambda: None)
    assert measured.loss == result.loss
    assert measured.bits_per_byte == result.bits_per_byte
    header = tokens.header
    nats = measured.loss * header.tokens
    assert measured.bits_per_byte == pytest.approx(nats / header.text_bytes / 0.6931471805599453)
    assert model.config.bos_token_id == tokenizer.token_id("<|endoftext|>")
    assert model.config.stop_token_ids == (tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<end_of_turn>"))
    assert model.config.pad_token_id == tokenizer.token_id("<pad>")


def test_how_it_was_made_is_written_down(small_recipe: MakeRecipe) -> None:
    recipe = small_recipe()
    result = train(recipe, OUT)
    info = json.loads((result.checkpoint / "slm.json").read_text(encoding="utf-8"))
    assert info["metrics"]["loss"] == result.loss
    assert info["recipe"]["batch"] == recipe.model_dump(mode="json")["batch"]
    assert (
        info["parameters"]
        == result.parameters
        == sum(p.numel() for p in load_checkpoint(result.checkpoint).parameters())
    )
    assert info["torch_version"] == torch.__version__
    assert info["data"]["train"]["text_sha256"] != info["data"]["validation"]["text_sha256"]
    assert info["data"]["train"]["tokenizer_sha256"] == info["tokenizer_sha256"]


def test_the_seed_decides(small_recipe: MakeRecipe) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_recipe().model_copy(update={"seed": seed}), Path(name))
    weights = [(Path(name) / "checkpoint/last/model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_windows_of_the_evaluation_may_have_a_length_of_their_own(
    small_recipe: MakeRecipe, whole_run: Path, rows: Rows
) -> None:
    train(small_recipe(evaluation={"context": 48}), OUT)
    losses = [[row["loss"] for row in rows(run) if row["type"] == "eval"] for run in (OUT, whole_run)]
    assert not set(losses[0]) & set(losses[1])
    weights = [(run / "trainer/model.safetensors").read_bytes() for run in (OUT, whole_run)]
    assert weights[0] == weights[1]


def test_epochs_become_micro_steps(small_recipe: MakeRecipe) -> None:
    result = train(
        small_recipe(
            schedule={"epochs": 0.2, "micro_steps": None, "warmup_micro_steps": 1}, data={"sampler": "packed"}
        ),
        OUT,
    )
    config, dataset = module.load_recipe(OUT / "config.yaml"), open_dataset(OUT / "data")
    wanted = 2 * round(0.2 * len(dataset.train.ids) / (2 * 4 * 24))
    assert (config.schedule.micro_steps, config.schedule.epochs) == (wanted, None)
    assert result.micro_steps == wanted


def test_what_the_machine_trades_reaches_the_model(
    small_recipe: MakeRecipe, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr("shutil.which", lambda name: name)  # a compiler
    cpu = torch.device("cpu")

    def body(**machine: Any) -> Any:
        recipe = small_recipe(machine=machine)
        return build_model(recipe, recipe.model.config(), cpu, None).model

    assert not body().gradient_checkpointing
    assert body(gradient_checkpointing=True).gradient_checkpointing
    assert not body().flex  # where there is no kernel for it
    train(small_recipe(), OUT)
    assert compiled == []
    train(small_recipe(machine={"compile": True}), Path("compiled"))
    assert len(compiled) == 1
    weights = [(run / "trainer/model.safetensors").read_bytes() for run in (whole_run, Path("compiled"))]
    assert weights[0] == weights[1]  # compiled into itself


def test_cuda_that_is_not_there(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SlmError, match="no CUDA device"):
        train(small_recipe(machine={"device": "cuda"}), OUT)
    assert not OUT.parent.exists()


def test_samples_are_written_at_every_evaluation_and_disturb_nothing(
    small_recipe: MakeRecipe, notes: Any, rows: Rows
) -> None:
    prompts = ["Once upon a time", "The dog"]
    sections = {"regularization": {"dropout": 0.1}}  # which throws dice
    train(small_recipe(**sections), Path("quiet"))
    for run, tokens in ((OUT, 12), (Path("again"), 12), (Path("shorter"), 2)):
        train(small_recipe(**sections, evaluation={"prompts": prompts, "sample_tokens": tokens}), run, notes)
    samples = [[row for row in rows(run) if row["type"] == "sample"] for run in (OUT, Path("again"), Path("shorter"))]
    assert [(row["micro_steps"], row["prompt"]) for row in samples[0]] == [
        (step, prompt) for step in (0, 4, 8, 12) for prompt in prompts
    ]
    texts = [[row["text"] for row in each] for each in samples]
    assert texts[0] == texts[1]
    assert all(longer.startswith(row["prompt"]) for longer, row in zip(texts[0], samples[0], strict=True))
    assert len(set(texts[0])) > len(prompts)  # the model has changed
    assert sum(map(len, texts[2])) < sum(map(len, texts[0]))
    assert sum("sample: " in line for line in notes.lines) == 3 * 8
    weights = [(run / "trainer/model.safetensors").read_bytes() for run in (OUT, Path("quiet"))]
    assert weights[0] == weights[1]
