"""Whether training takes FlexAttention: settings and device decide, and what fails is replaced, with a line."""

from collections.abc import Iterator

import pytest
import torch

from slm.core.nn import flex
from slm.train import attention
from slm.train.attention import choose_flex, wants_flex
from slm.train.estimate import GPUS
from slm.train.precision import CPU, FLOAT32, Capability, Precision
from slm.train.recipe import load_recipe

HALF = Precision(torch.float16, scale_loss=True)
LONG = ("batch.context=1024", "batch.batch_size=2")


@pytest.mark.parametrize(
    ("able", "precision", "overrides", "wanted"),
    [
        (GPUS["h100"].able, HALF, LONG, True),
        (GPUS["h100"].able, HALF, (), False),  # windows as long as the context: nothing to skip
        (GPUS["h100"].able, FLOAT32, LONG, False),
        (GPUS["h100"].able, HALF, (*LONG, "machine.attention=sdpa"), False),
        (GPUS["t4"].able, HALF, LONG, False),
        (GPUS["t4"].able, HALF, (*LONG, "machine.attention=flex"), True),  # a choice is obeyed
        (GPUS["rtx4090"].able, HALF, LONG, False),
        (GPUS["rtx4090"].able, HALF, (*LONG, "model.head_dim=128"), True),
        (CPU, HALF, LONG, False),
    ],
)
def test_what_is_wanted(able: Capability, precision: Precision, overrides: tuple[str, ...], wanted: bool) -> None:
    recipe = load_recipe("modern", list(overrides))
    assert wants_flex(recipe, recipe.model.config(), able, precision) == wanted


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with Triton and a compiler, and a CPU that stands for its GPU."""
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(attention.shutil, "which", lambda name: f"/usr/bin/{name}")
    yield
    flex.window_mask.cache_clear()


def choose(lines: list[str]) -> bool:
    recipe = load_recipe("modern", ["batch.context=48", "batch.batch_size=2", "model.sliding_window=16"])
    config = recipe.model.config()
    return choose_flex(recipe, config, GPUS["h100"].able, HALF, torch.device("cpu"), lines.append)


def test_a_kernel_that_fails_is_replaced_with_a_line(tools: None) -> None:
    """On a CPU FlexAttention has no backward pass: as good as a compiler that fails."""
    lines: list[str] = []
    assert not choose(lines)
    (line,) = lines
    assert line.startswith("warning: FlexAttention is not available here (") and "masks" in line


def test_a_kernel_that_works_is_taken(tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(flex, "attend_in_blocks", lambda q, k, v, mask, scale: q * k * v)
    assert choose(lines) and lines == []


def test_without_a_compiler_it_is_not_tried(tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(attention.shutil, "which", lambda name: None)
    assert not choose(lines)
    assert "C compiler" in lines[0]
