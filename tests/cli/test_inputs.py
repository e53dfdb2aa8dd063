"""Wrong inputs are refused before anything is loaded, measured or downloaded; each in a process of its own, without PyTorch."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Run, forks

Slm = Callable[..., Any]

# Whoever imports one of these has begun to load.
HEAVY = ("torch", "onnx", "transformers", "peft", "datasets")
PROGRAM = f"""
import sys
from slm.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in {HEAVY!r} if name in sys.modules])
"""


# What commands import before they look at their inputs: none of it is heavy, as each program sees.
LIGHT = "import slm.cli.main, slm.core.artifacts, slm.core.outputs, slm.train.data.corpus, slm.train.recipe"


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a program in a process that has imported nothing heavy."""
    with forks(LIGHT, tmp_path_factory.mktemp("apart")) as run:
        yield run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train --data nosuch.txt", "data not found: nosuch.txt"),
        ("train --data text.txt --val nosuch.txt", "data not found: nosuch.txt"),
        ("train --data text.pdf", "unknown kind of file: text.pdf"),
        ("train --data text.txt --tokenizer nosuch.json", "tokenizer not found: nosuch.json"),
        ("train --data text.txt --recipe nosuch.yaml", "recipe not found: nosuch.yaml"),
        ("train --data text.txt --recipe tinny", "recipe not found: tinny"),
        ("train --data text.txt --recipe tiny --set seed=-1", "recipe tiny: seed"),
        ("train --data text.txt --set batch.size=3", "the recipe has no value 'batch.size'"),
        ("train --data text.txt --set schedule.learning_rate=nan", "must be a finite number"),
        ("train --resume", "there is no run under ./runs"),
        ("train --resume --seed 3", "leave out --seed"),
        ("train --data text.txt --out text.txt/run", "cannot write text.txt/run"),
        ("train --on t4", "--on requires --dry-run"),
        ("data prepare --data text.txt --val nosuch.txt", "data not found: nosuch.txt"),
        ("data prepare --data text.txt --tokenizer nosuch.json", "tokenizer not found: nosuch.json"),
        ("data prepare --data text.txt --out text.txt/set", "cannot write text.txt/set"),
        ("finetune --lora nosuch.jsonl", "fine-tuning data not found: nosuch.jsonl"),
        ("finetune --lora text.txt --val nosuch.jsonl", "fine-tuning data not found: nosuch.jsonl"),
        ("finetune --lora text.txt --base nosuch", "not found: nosuch"),
        ("export --onnx nosuch", "not found: nosuch"),
        ("export --onnx --adapter nosuch", "not found: nosuch"),
        ("export --onnx --device cuda --text nosuch.txt", "text not found: nosuch.txt"),
        ("quantize --int8 nosuch", "not found: nosuch"),
        ("quantize --int8 --data nosuch.txt", "text not found: nosuch.txt"),
        ("verify nosuch", "not found: nosuch"),
        ("merge nosuch other --out made", "not found: nosuch"),
        ("eval nosuch", "not found: nosuch"),
        ("eval --data nosuch.txt", "data not found: nosuch.txt"),
        ("generate nosuch -p x", "not found: nosuch"),
        ("generate --adapter nosuch -p x", "not found: nosuch"),
        ("chat nosuch", "not found: nosuch"),
        ("serve nosuch", "not found: nosuch"),
        ("web --out text.txt", "text.txt exists and is not a directory"),
        ("bench --plot text.txt", "text.txt exists and is not a plot of slm bench"),
        ("bench --compare text.txt", "text.txt"),
        ("import nosuch --out text.txt", "text.txt exists and is not a directory"),
    ],
)
def test_nothing_is_loaded_for_a_wrong_input(apart: Run, arguments: str, said: str, tmp_path: Path) -> None:
    for name in ("text.txt", "text.pdf"):
        Path(name).write_text("Once upon a time.")
    done = apart(PROGRAM, *arguments.split())
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr.splitlines()[0]
    assert done.stdout.splitlines()[-1] == "[]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.pdf", "text.txt"]


@pytest.mark.parametrize(
    "command",
    [
        "train --data",
        "train --val",
        "train --out",
        "data prepare --data",
        "finetune --lora",
        "import",
        "export --onnx --out",
        "quantize --int8 --data",
        "eval --data",
        "bench --plot",
        "web --out",
        "serve --host",  # which would listen on every address
        "serve --name",
        "generate --adapter",
    ],
)
def test_an_empty_word_is_not_the_working_directory(slm: Slm, command: str) -> None:
    Path("rows.jsonl").write_text('{"text": "Once upon a time."}\n')
    result = slm(*command.split(), "")
    assert result.code in (1, 2) and " empty" in result.err.splitlines()[0] and "hint: " in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_a_place_that_permissions_allow_and_the_system_does_not(slm: Slm) -> None:
    for command in (
        ("train", "--data", "sample", "--out", "/proc/run"),
        ("bench", "--plot", "/proc/a.png"),
        ("web", "--out", "/proc/x"),
    ):
        result = slm(*command)
        assert (
            result.code == 1
            and "/proc is not writable (" in result.err
            and "hint: name a writable directory" in result.err
        )


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("learning_rate=1", "did you mean schedule.learning_rate?"),
        ("schedule.learningrate=1", "did you mean schedule.learning_rate or "),
        ("schedule.updates=1", "there is schedule.micro_steps, "),
        ("a.b=c", "the sections are data, model, "),
    ],
)
def test_a_misspelt_value_of_the_recipe_names_the_nearest(slm: Slm, value: str, meant: str) -> None:
    result = slm("train", "--set", value)
    assert result.code == 1 and f"hint: {meant}" in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_named(slm: Slm) -> None:
    Path("closed").mkdir(mode=0o500)
    result = slm("data", "prepare", "--data", "sample", "--out", "closed/set")
    assert result.code == 1 and "is not writable" in result.err and "(Permission denied)" in result.err


def test_a_read_only_place_is_named(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for command in (
        ("train", "--data", "sample"),
        ("data", "prepare", "--data", "sample"),
        ("import", "nosuch"),
        ("demo",),
        ("web", "--out", "site"),
    ):
        result = slm(*command)
        assert result.code == 1 and "is not writable" in result.err and "hint: name a writable directory" in result.err
    assert list(Path().iterdir()) == []
