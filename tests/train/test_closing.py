"""What the best checkpoint of a run writes, at the end of `slm train`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.nn import load_checkpoint
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.train import closing
from slm.train.closing import closing_samples
from slm.train.samples import continue_prompts

Slm = Callable[..., Any]

RECIPE = """
name: small
model: {preset: tiny, vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1}
batch: {batch_size: 4, context: 24}
schedule: {micro_steps: 6, warmup_micro_steps: 2, learning_rate: 0.003, final_learning_rate: 0.0003}
evaluation: {every_micro_steps: 3, windows: 8, sample_tokens: 10, PROMPTS}
machine: {device: cpu, precision: float32}
"""


@pytest.fixture
def train(slm: Slm, stories: list[str]) -> Slm:
    def run(prompts: str, *options: str, held_out: list[str] | None = None) -> Any:
        Path("small.yaml").write_text(RECIPE.replace("PROMPTS", f"prompts: {prompts}"), encoding="utf-8")
        for name, part in (("train.txt", stories[:40]), ("valid.txt", held_out or stories[40:50])):
            Path(name).write_text("".join(f"{story.strip()}\n{END_OF_TEXT}\n" for story in part), encoding="utf-8")
        return slm(
            "train", "--recipe", "small.yaml", "--data", "train.txt", "--val", "valid.txt", "--out", "run", *options
        )

    return run


def test_the_best_checkpoint_s_text_is_shown_at_the_end(train: Slm, stories: list[str]) -> None:
    result = train("[Once upon a time, The dog, left out]", "--json")
    samples = json.loads(result.out)["samples"]
    assert [each["prompt"] for each in samples[:2]] == ["Once upon a time", "The dog"] and len(samples) == 3
    opening = samples[2]["prompt"]
    assert len(opening) > 3 and stories[40].strip().startswith(f"{opening} ")
    checkpoint = Path("run/checkpoint/best")
    model, tokenizer = load_checkpoint(checkpoint), Tokenizer.load(checkpoint)
    for each in samples:
        assert (each["seed"], each["temperature"]) == (0, 0.7)
        assert continue_prompts(model, tokenizer, [each["prompt"]], 10, 0) == [each["text"]]
    last = load_checkpoint(Path("run/checkpoint/last"))
    last.lm_head.weight.data.neg_()
    assert continue_prompts(last, tokenizer, [samples[0]["prompt"]], 10, 0) != [samples[0]["text"]]  # the control


def test_a_recipe_without_prompts_has_a_sample_too(train: Slm) -> None:
    result = train("[]")
    assert result.code == 0 and "temperature 0.7, seed 0)\n  " in result.out and " | " in result.out


def test_a_short_document_is_continued_from_its_beginning(train: Slm) -> None:
    samples = json.loads(train("[]", "--json", held_out=["Hi.", *["A dog and a cat."] * 40]).out)["samples"]
    assert [each["prompt"] for each in samples] == ["Hi."]


def test_no_sample_is_worth_a_failure_or_much_time(train: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    train("[]")
    run, best = Path("run"), Path("run/checkpoint/best")
    assert len(closing_samples(run, best)) == 1

    def failing(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise error

        return fail

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with monkeypatch.context() as patched:
            patched.setattr(closing, "load_checkpoint", failing(error))
            assert closing_samples(run, best) == []
    with monkeypatch.context() as patched:
        patched.setattr(closing, "load_checkpoint", failing(RuntimeError("a defect")))
        with pytest.raises(RuntimeError, match="a defect"):
            closing_samples(run, best)
    monkeypatch.setattr(closing, "_SECONDS", -1.0)
    assert closing_samples(run, best) == []
