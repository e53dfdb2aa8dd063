"""A recipe that trains in a second, text to train it on, and torchrun."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slm.core.tokenizer import END_OF_TEXT
from slm.train.recipe import Recipe

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "preset": "tiny",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 64,
    },
    "batch": {"batch_size": 4, "context": 24, "accumulation": 2},
    "schedule": {
        "micro_steps": 12,
        "warmup_micro_steps": 2,
        "learning_rate": 3e-3,
        "final_learning_rate": 3e-4,
    },
    "evaluation": {"every_micro_steps": 4, "windows": 8},
    "machine": {"device": "cpu", "precision": "float32"},
}


@pytest.fixture
def story_file(tmp_path: Path, stories: list[str]) -> Path:
    """Sixty stories as TinyStories has them."""
    file = tmp_path / "stories.txt"
    file.write_text("".join(f"{story.strip()}\n{END_OF_TEXT}\n" for story in stories[:60]), encoding="utf-8")
    return file


@pytest.fixture
def small_recipe(story_file: Path) -> Callable[..., Recipe]:
    """The factory of small recipes: sections given replace single values."""

    def make(**sections: dict[str, Any]) -> Recipe:
        fields = {**SMALL, "data": {"train": [str(story_file)]}}
        for name, values in sections.items():
            fields[name] = {**fields.get(name, {}), **values}
        return Recipe.model_validate(fields)

    return make


_SECONDS = 100


def _torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@dataclass(frozen=True)
class Ended:
    """How torchrun ended, without what it reports itself."""

    code: int
    out: str
    err: list[str]


def _end_of(started: subprocess.Popen[str]) -> Ended:
    try:
        out, err = started.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        started.terminate()
        raise
    own = re.split(r"^Traceback", err, maxsplit=1, flags=re.MULTILINE)
    assert "slm/" not in "".join(own[1:]), err  # the traceback is torchrun's
    return Ended(started.returncode, out, [line for line in own[0].splitlines() if not re.match(r"[WEI]\d{4} ", line)])


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.Popen[str]]:
    """Starts so many processes of a program, or of `-m MODULE`, with these arguments."""
    return _torchrun


@pytest.fixture(scope="session")
def end_of() -> Callable[[subprocess.Popen[str]], Ended]:
    """Waits for what `torchrun` started, and makes sure that it shows no traceback of ours."""
    return _end_of


@pytest.fixture(autouse=True)
def one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts record one time of making, so that runs can be compared to the byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
