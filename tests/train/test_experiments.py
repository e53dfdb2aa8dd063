"""docs/experiments.md: every command of the page, as far as the model that it builds, and every figure.

What the values do that it sets is in `test_knobs.py`.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.cli.main import cli
from slm.core.accounting import CacheKind, cache_bytes, decode_flops, parameters
from slm.core.config import FULL, SLIDING
from slm.core.nn import CausalLM
from slm.core.presets import PRESETS, preset
from slm.core.tokenizer import SPECIAL_TOKENS
from slm.train.memory import training_bytes
from slm.train.optimizer import make_optimizers
from slm.train.precision import Precision
from slm.train.recipe import Recipe, load_recipe

PAGE = (Path(__file__).parent.parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    slm ")]
TRAININGS = [command for command in COMMANDS if command.startswith("slm train ")]

FLOAT32 = Precision(None, scale_loss=False)


def options(command: str) -> dict[str, Any]:
    """What a command was given, through its own parser."""
    _, name, *arguments = shlex.split(command)
    found = cli.get_command(cli.make_context("slm", ["--help"], resilient_parsing=True), name)
    assert found is not None
    return found.make_context(name, arguments).params


def recipe_of(command: str) -> Recipe:
    given = options(command)
    return load_recipe(given["recipe"], given["set"])


# The page


@pytest.mark.parametrize("command", TRAININGS)
def test_training_commands(command: str, tmp_path: Path) -> None:
    recipe = recipe_of(command)
    config = recipe.model.config()
    with torch.device("meta"):
        model = CausalLM(config)
    groups: list[dict[str, Any]] = make_optimizers(model, recipe.optimizer).groups
    assert {p for group in groups for p in group["params"]} == set(model.parameters())
    if recipe.data.tokenizer == "gpt2":
        assert config.vocab_size >= 50_256 + len(SPECIAL_TOKENS)
    (tmp_path / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in TRAININGS])
def test_other_commands(command: str, slm: Callable[..., Any]) -> None:
    _, name, subject, *_ = shlex.split(command)
    if name == "info":
        assert slm(*shlex.split(command)[1:]).code == 0
    else:  # measures what the page's trainings made
        assert subject.removesuffix("/checkpoint/best") in {str(options(t)["out"]) for t in TRAININGS}


def test_windows_that_training_sees() -> None:
    """The page says of which recipes; a knob of the window would do nothing in the others."""
    for name, seen in (("tiny", True), ("stories-4m", True), ("documented", False)):
        recipe = load_recipe(name)
        assert (recipe.batch.context > recipe.model.config().sliding_window) == seen
    short = load_recipe("tiny", ["model.sliding_window=32"])
    assert short.model.config().sliding_window < short.batch.context


# Figures


def size_row(name: str) -> str:
    config = preset(name)
    parts = parameters(config)
    heads = f"{config.num_attention_heads} / {config.num_key_value_heads} × {config.head_dim}"
    state = training_bytes(
        load_recipe("tiny", [f"model.preset={name}", f"batch.context={config.sliding_window}"]), config, FLOAT32
    )
    cells = (
        name,
        f"{config.vocab_size:,}",
        f"{config.hidden_size:,} / {config.intermediate_size:,}",
        f"{config.num_hidden_layers}, {config.layer_types.count(FULL)}",
        heads,
        f"{config.sliding_window} / {config.max_position_embeddings:,}",
        f"{parts.total:,}",
        f"{parts.embedding / parts.total:.0%}".replace("%", " %"),
        f"{(state.weights + state.gradients + state.moments) / 1e9:.2f} GB",
    )
    return f"| {' | '.join(cells)} |\n"


def heads_row(kv_heads: int) -> str:
    config = load_recipe("tiny", [f"model.num_key_value_heads={kv_heads}"]).model.config()
    return f"| {kv_heads} | {parameters(config).total:,} | {cache_bytes(config, 1024) / 1e6:.2f} MB |\n"


CONTEXTS = (128, 512, 2_048, 8_192, 32_768)


def context_row(context: int) -> str:
    config = preset("270m-wide")
    kinds: tuple[CacheKind, ...] = ("windowed", "full")
    caches = (f"{cache_bytes(config, context, kind=kind) / 1e6:,.1f} MB" for kind in kinds)
    flops = (f"{decode_flops(config, context - 1, windows=w).total / 1e9:.3f} GFLOP" for w in (True, False))
    return f"| {context:,} | {' | '.join((*caches, *flops))} |\n"


@pytest.mark.parametrize("name", PRESETS)
def test_sizes(name: str) -> None:
    with torch.device("meta"):
        model = CausalLM(preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters(preset(name)).total
    assert size_row(name) in PAGE


@pytest.mark.parametrize(
    ("name", "size"), [("1m", 1e6), ("10m", 1e7), ("30m", 3e7), ("100m", 1e8), ("270m-wide", 2.7e8), ("1b", 1e9)]
)
def test_names_of_sizes_are_theirs(name: str, size: float) -> None:
    config = preset(name)
    assert parameters(config).total == pytest.approx(size, rel=0.04)
    assert FULL in config.layer_types and SLIDING in config.layer_types
    assert config.num_attention_heads * config.head_dim == config.hidden_size


def test_other_figures() -> None:
    for kv_heads in (4, 2, 1):
        assert heads_row(kv_heads) in PAGE
    for context in CONTEXTS:
        assert context_row(context) in PAGE
    tied, untied = (load_recipe("tiny", [f"model.tie_word_embeddings={t}"]).model.config() for t in ("true", "false"))
    gemma = load_recipe("modern", ["model.vocab_size=262144"]).model.config()
    for number in (tied, untied, gemma):
        assert f"{number.parameter_count():,} parameters" in PAGE or f"from {number.parameter_count():,} to" in PAGE
