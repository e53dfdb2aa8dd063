"""`slm train --dry-run`: the recipe as it would run, what it takes, what is odd; and nothing is made."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm.train.data.tokenizer import train_bpe
from slm.train.parallel import Alone
from slm.train.recipe import Recipe, load_recipe

Slm = Callable[..., Any]


def test_it_prints_a_recipe_that_can_be_run_and_makes_nothing(slm: Slm) -> None:
    result = slm("train", "--recipe", "tiny", "--dry-run", "--set", "schedule.warmup_micro_steps=600", "--on", "t4")
    assert result.code == 0, result.err
    shown = result.out[: result.out.index("estimated time and memory")]
    wanted = load_recipe("tiny", ["schedule.warmup_micro_steps=600"])
    assert Recipe.model_validate(yaml.safe_load(shown)) == wanted
    for part in (
        "1,511,296 parameters",
        "560 updates of 1,024 tokens",
        "573,440",
        "T4",
        "MiB",
        "fits",
        "yes: ",
        "not run on that",
    ):
        assert part in result.out
    assert "warning: the warm-up of 600 micro-steps is as long as the training of 560" in result.err
    assert not Path("runs").exists()


def test_for_machines(slm: Slm) -> None:
    result = slm("train", "--recipe", "documented", "--dry-run", "--on", "T4", "--json")
    fields = json.loads(result.out)
    assert fields["updates"] == 4687 and fields["device"] == "T4"
    assert fields["kernels"] == {"efficient": 18}
    assert fields["memory"]["total"] < fields["memory_available"] == round(14.6 * 2**30)
    assert fields["memory"]["total"] == sum(size for part, size in fields["memory"].items() if part != "total")
    assert len(fields["warnings"]) == 2
    assert Recipe.model_validate(fields["recipe"]) == load_recipe("documented")


@pytest.mark.parametrize(
    ("recipe", "tokens", "accumulation"), [("documented", "32 x 128", 32), ("modern", "16 x 512", 4)]
)
def test_both_recipes_fit_a_t4_and_the_table_says_why(slm: Slm, recipe: str, tokens: str, accumulation: int) -> None:
    def fits(*overrides: str) -> str:
        settings = [part for override in overrides for part in ("--set", override)]
        out = slm("train", "--recipe", recipe, "--dry-run", "--on", "t4", *settings).out
        lines = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
        words = " ".join(" ".join(cells[1].split()) for cells in lines)
        return words[words.rindex(": ", 0, words.index(" of 14,950 MiB")) - 3 :].strip()

    said = fits()
    assert said.startswith("yes: ") and "% of it activations" in said
    assert (
        f"{tokens} tokens per micro-step, {accumulation} micro-steps per update, without gradient checkpointing" in said
    )
    assert fits(f"batch.batch_size={32 * 16}").startswith("no: ")
    assert "with gradient checkpointing" in fits("machine.gradient_checkpointing=true")


def test_passes_become_updates_when_the_text_is_prepared(slm: Slm, stories: list[str]) -> None:
    Path("text.txt").write_text("\n<|endoftext|>\n".join(stories[:80]), encoding="utf-8")
    prepared = slm("data", "prepare", "--data", "text.txt", "--vocab-size", "300", "--out", "prepared", "--json")
    assert prepared.code == 0, prepared.err
    recipe = ("train", "--recipe", "stories-4m", "--dry-run", "--on", "t4", "--json", "--set", "batch.batch_size=2")
    passes = load_recipe("stories-4m").schedule.epochs
    assert passes is not None
    fields = json.loads(slm(*recipe, "--data", "prepared").out)
    assert fields["micro_steps"] == round(passes * fields["text_tokens"] / 512)
    guessed = json.loads(slm(*recipe, "--data", "text.txt").out)
    assert guessed["text_tokens"] != fields["text_tokens"]  # by its size


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistaken")


@pytest.fixture
def mistaken(slm: Slm, stories: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, a dataset with a vocabulary larger than that of `tiny`, a tokenizer, and directories that are taken.

    The tests share them, and must not change them.
    """
    monkeypatch.chdir(home)
    if any(home.iterdir()):
        return
    for name, text in (("text.txt", stories[:80]), ("valid.txt", stories[80:90]), ("short.txt", ["A fox."])):
        Path(name).write_text("\n<|endoftext|>\n".join(text), encoding="utf-8")
    Path("doubtful.txt").write_text(" fox" * 126, encoding="utf-8")
    Path("words.txt").write_text("".join(f"word{number} " * 3 for number in range(2000)), encoding="utf-8")
    Path("other").mkdir()
    train_bpe(stories[:50], 300, 64).save(Path("other"))
    for name, text, val, size in (
        ("dataset", "text.txt", "valid.txt", 400),
        ("large", "words.txt", "valid.txt", 4096),
        ("brief", "text.txt", "short.txt", 400),
    ):
        made = slm("data", "prepare", "--data", text, "--val", val, "--vocab-size", size, "--out", name)
        assert made.code == 0, made.err
    for name in ("mine/notes.txt", "done/config.yaml", "done/checkpoint/best/model.safetensors"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "mine"], "the run directory is not empty: mine"),
        (["--out", "done"], "the run directory is not empty: done"),
        (["--out", "text.txt"], "not a directory: text.txt"),
        (["--data", "dataset", "--val", "valid.txt"], "dataset is a prepared dataset with its own validation text"),
        (["--data", "dataset", "--tokenizer", "gpt2"], "dataset was made with another tokenizer than gpt2"),
        (["--data", "dataset", "--tokenizer", "other/tokenizer.json"], "made with another tokenizer than other/"),
        (["--data", "large"], "and the model's vocabulary 1,024"),
        (["--data", "text.txt", "--tokenizer", "gpt-2"], "tokenizer not found: gpt-2"),
        (["--data", "text.txt", "--tokenizer", "large"], "and the model's vocabulary 1,024"),
        (["--data", "text.txt", "--val", "short.txt"], "the validation text is too short: "),
        (["--data", "text.txt", "--val", "doubtful.txt"], "the validation text is too short: 127 tokens"),
        (["--data", "short.txt", "--val", "valid.txt"], "the training text is too short: "),
        (["--data", "brief"], "the validation text is too short: "),
        (["--data", "missing.txt"], "data not found: missing.txt"),
        (["--set", "machine.device=cuda"], "PyTorch finds no CUDA device"),
        (["--set", "machine.attention=flex"], "machine.attention=flex needs CUDA"),
    ],
)
def test_it_refuses_what_training_refuses(
    slm: Slm, mistaken: None, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("tiktoken.get_encoding", lambda _: pytest.fail("nothing is to be downloaded"))
    before = sorted(Path().rglob("*"))
    foreseen, trained = (
        slm("train", "--recipe", "tiny", *arguments, "--dry-run"),
        slm("train", "--recipe", "tiny", *arguments),
    )
    assert foreseen.code == trained.code == 1
    assert foreseen.out == trained.out == ""
    (said,) = {result.err[result.err.index("error: ") :] for result in (foreseen, trained)}
    assert message in said and said.count("\n") == 2  # the hint too
    assert sorted(Path().rglob("*")) == before


def test_it_refuses_what_several_processes_are_refused(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alone, "size", 3)
    split = ("train", "--recipe", "tiny", "--dry-run", "--on", "t4", "--set", "machine.parallel=fsdp")
    assert "3 processes cannot share batches of 8 windows evenly" in slm(*split).err
    split = (*split, "--set", "batch.batch_size=9")
    assert slm(*split).code == 0
    assert "Muon needs whole matrices" in slm(*split, "--set", "optimizer.name=muon").err


def test_what_is_here_is_looked_at_even_if_the_text_is_not(slm: Slm) -> None:
    far = ("train", "--recipe", "documented", "--dry-run", "--on", "t4")
    assert slm(*far).code == 0
    assert "data not found: missing.txt" in slm(*far, "--val", "missing.txt").err
    assert "tokenizer not found: missing.json" in slm(*far, "--tokenizer", "missing.json").err


def test_another_gpu_is_not_looked_for_here(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wanted = ("--set", "machine.device=cuda", "--set", "machine.attention=flex")
    result = slm("train", "--recipe", "tiny", "--dry-run", "--on", "t4", *wanted)
    assert result.code == 0, result.err


def test_what_a_text_has_is_counted_only_in_doubt(slm: Slm, mistaken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer is learned from a text that is long enough in any case."""
    monkeypatch.setattr("slm.train.prepare.resolve_tokenizer", lambda *_: pytest.fail("it was learned"))
    dry = ("train", "--recipe", "tiny", "--dry-run", "--on", "t4", "--data", "text.txt")
    assert slm(*dry, "--val", "text.txt").code == 0
    with pytest.raises(pytest.fail.Exception, match="it was learned"):
        slm(*dry, "--val", "doubtful.txt")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "tiny", "--dry-run", "--on", "t5"], 1, "error: unknown GPU t5"),
        (["--recipe", "tiny", "--on", "t4"], 2, "error: --on requires --dry-run"),
        (["--resume", "--dry-run"], 2, "leave out --dry-run"),
        (["--recipe", "stories-4m", "--dry-run"], 1, "error: schedule.epochs cannot be converted to updates"),
    ],
)
def test_mistakes(slm: Slm, arguments: list[str], code: int, message: str) -> None:
    result = slm("train", *arguments)
    assert (result.code, message in result.err) == (code, True), result.err


def test_what_does_not_fit_is_lowered_until_it_does(slm: Slm) -> None:
    far = ("train", "--recipe", "documented", "--dry-run", "--json", "--on", "t4", "--set")
    (warning,) = (w for w in json.loads(slm(*far, "batch.batch_size=512").out)["warnings"] if "does not fit" in w)
    (fewer,) = re.findall(r"batch.batch_size=(\d+)", warning)
    fits = [
        not any("does not fit" in w for w in json.loads(slm(*far, f"batch.batch_size={size}").out)["warnings"])
        for size in (int(fewer), 2 * int(fewer))
    ]
    assert fits == [True, False]
