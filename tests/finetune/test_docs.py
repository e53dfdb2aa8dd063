"""docs/finetune.md: its rows are rows, and its commands, exactly as they stand there, work one after the other."""

import csv
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.finetune import settings
from slm.finetune.recipe import load_recipe
from slm.finetune.rows import read_rows

DOCS = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")


def shown_rows() -> str:
    found = re.search(r"```json\n(.*?)```", DOCS, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_rows_are_rows() -> None:
    Path("rows.jsonl").write_text(shown_rows())
    assert len(read_rows(Path("rows.jsonl"))) == 5


def test_the_recipes_are_recipes() -> None:
    found = re.search(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)
    assert found is not None
    Path("recipe.yaml").write_text(found[1], encoding="utf-8")
    recipe = load_recipe(Path("recipe.yaml"))
    assert (recipe.training.learning_rate, recipe.data.hold_out, recipe.log) == (2e-3, 0.2, ("tensorboard",))
    example = load_recipe(Path(__file__).parents[2] / "examples" / "smart_home" / "recipe.yaml")
    assert (example.name, example.training.rank, example.training.epochs) == ("home", 16, 5)


def test_the_commands_work(slm: Callable[..., Any], shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "default_epochs", lambda *_: 1)
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    Path("pairs.jsonl").write_text(shown_rows())
    with Path("pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), ("The sky is", " blue."), ("Grass is", "")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Name a colour.\nAnother?\n")))
    block = re.search(r"(?:^    .*\n)+", DOCS, flags=re.MULTILINE)
    assert block is not None
    commands = [shlex.split(line.rpartition(" | ")[2], comments=True) for line in block[0].splitlines()]
    assert [command[1] for command in commands] == [*["finetune"] * 6, "export", "chat"]
    for command in commands:
        result = slm(*command[1:])
        assert result.code == 0, (command, result.err)
    assert Path("runs/tiny-pairs/checkpoint/best/slm.json").is_file()
    written = json.loads(Path("runs/tiny/adapters/wide/adapter_config.json").read_text())
    assert written["use_rslora"] and written["r"] == 64
