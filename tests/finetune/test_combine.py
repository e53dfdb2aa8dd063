"""Several models made into one: each method against its definition, and what does not fit together refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm.core.checkpoint import read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.combine import Combination, combine
from slm.finetune.merge import merge

MakeAdapter = Callable[..., Path]

# Sums of a few float32 values in another order.
TOLERANCE = 1e-6

rng = np.random.default_rng(0)
A, B, BASE = (rng.normal(size=(6, 8)).astype(np.float32) for _ in range(3))


def test_linear_is_the_weighted_mean() -> None:
    np.testing.assert_allclose(Combination("linear", (3, 1)).tensor([A, B], None), 0.75 * A + 0.25 * B, atol=TOLERANCE)
    np.testing.assert_array_equal(Combination("linear", (1, 1)).tensor([A, A], None), A)


def test_slerp_keeps_to_the_arc() -> None:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x)

    for share in (0.0, 0.25, 0.5, 1.0):
        found = Combination("slerp", (1 - share, share)).tensor([A, B], None)
        wanted = (1 - share) * np.linalg.norm(A) + share * np.linalg.norm(B)
        assert np.linalg.norm(found) == pytest.approx(wanted, rel=1e-5)
        whole, gone = (np.arccos(np.sum(unit(A) * unit(other))) for other in (B, found))
        assert gone == pytest.approx(share * whole, abs=1e-3)
    middle = Combination("slerp", (1, 1)).tensor([A, B], None)
    assert np.linalg.norm(middle) > 1.2 * np.linalg.norm((A + B) / 2)  # a mean would be shorter
    np.testing.assert_allclose(Combination("slerp", (1, 1)).tensor([A, 2 * A], None), 1.5 * A, rtol=1e-5)
    np.testing.assert_allclose(Combination("slerp", (1, 3)).tensor([A, 0 * A], None), 0.25 * A, rtol=1e-5)


def test_task_arithmetic_adds_changes() -> None:
    found = Combination("task", (1, -0.5), scale=2).tensor([A, B], BASE)
    np.testing.assert_allclose(found, BASE + 2 * ((A - BASE) - 0.5 * (B - BASE)), atol=1e-5)
    np.testing.assert_allclose(Combination("task", (1,)).tensor([A], BASE), A, atol=TOLERANCE)


def test_ties_against_a_plain_loop() -> None:
    changes = [A - BASE, B - BASE]
    keep = round(0.5 * A.size)
    trimmed = []
    for change in changes:
        least = sorted(abs(change).ravel())[-keep]
        trimmed.append([x if abs(x) >= least else 0.0 for x in change.ravel()])
    wanted = []
    for first, second in zip(*trimmed, strict=True):
        sign = np.sign(first + second)
        agreed = [x for x in (first, second) if np.sign(x) == sign and sign]
        wanted.append(sum(agreed) / len(agreed) if agreed else 0.0)
    found = Combination("ties", (1, 1), density=0.5).tensor([A, B], BASE)
    np.testing.assert_allclose(found, BASE + np.array(wanted).reshape(A.shape), atol=1e-5)
    assert np.abs(found - Combination("task", (0.5, 0.5)).tensor([A, B], BASE)).max() > 0.1


@pytest.fixture
def models(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> list[Path]:
    """A base and two that differ from it."""
    paths = [tmp_path / name for name in ("base", "one", "two")]
    for seed, path in enumerate(paths):
        save_checkpoint(path, make_model(config, seed), tokenizer, {"made_by": "tests"})
    return paths


def test_checkpoints_combine_tensor_by_tensor(models: list[Path], tmp_path: Path) -> None:
    base, one, two = models
    combine([one, two], tmp_path / "out", Combination("task", (1, 1)), base)
    states = [dict(load_checkpoint(path).named_parameters()) for path in (base, one, two, tmp_path / "out")]
    for name in states[0]:
        wanted = states[1][name] + states[2][name] - states[0][name]
        torch.testing.assert_close(states[3][name], wanted, atol=1e-5, rtol=1e-5)
    made = load_checkpoint(tmp_path / "out")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    info = read_info(tmp_path / "out")["combined"]
    assert info["method"] == "task" and len(info["models"]) == 2 and info["base"]["path"] == str(base)


def test_one_adapter_alone_is_its_merged_model(models: list[Path], tmp_path: Path, make_adapter: MakeAdapter) -> None:
    base = models[0]
    first, second = (make_adapter(tmp_path / f"a{seed}", base, seed) for seed in (1, 2))
    combine([], tmp_path / "out", Combination("task", (1,)), base, [first])
    wanted = dict(merge(base, first).named_parameters())
    for name, parameter in load_checkpoint(tmp_path / "out").named_parameters():
        torch.testing.assert_close(parameter, wanted[name], atol=1e-6, rtol=1e-5)
    combine([], tmp_path / "both", Combination("task", (1, 0.5)), base, [first, second])
    other = dict(merge(base, second).named_parameters())
    plain = dict(load_checkpoint(base).named_parameters())
    for name, parameter in load_checkpoint(tmp_path / "both").named_parameters():
        torch.testing.assert_close(parameter, wanted[name] + (other[name] - plain[name]) / 2, atol=1e-5, rtol=1e-4)


def test_models_that_do_not_fit_are_refused(
    models: list[Path],
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    stories: list[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    save_checkpoint(
        tmp_path / "wide",
        make_model(config.model_copy(update={"intermediate_size": 2 * config.intermediate_size})),
        tokenizer,
        {},
    )
    with pytest.raises(SlmError, match="different shapes: intermediate_size"):
        combine([models[0], tmp_path / "wide"], tmp_path / "out", Combination("linear", (1, 1)))
    other = tmp_path / "other"
    save_checkpoint(other, make_model(config), tokenizer, {})
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(SlmError, match="different tokenizers"):
        combine([models[0], other], tmp_path / "out", Combination("linear", (1, 1)))
    assert not (tmp_path / "out").exists()


def test_the_command(slm: Callable[..., Any], models: list[Path], tmp_path: Path) -> None:
    base, one, two = models
    result = slm("merge", one, two, "--weights", "3,1", "--out", "soup", "--json")
    assert result.code == 0 and json.loads(result.out)["method"] == "linear"
    wanted = 0.75 * load_checkpoint(one).model.norm.weight + 0.25 * load_checkpoint(two).model.norm.weight
    torch.testing.assert_close(load_checkpoint(Path("soup")).model.norm.weight, wanted)
    for method in ("slerp", "ties", "task"):
        options = () if method == "slerp" else ("--base", base)
        assert slm("merge", one, two, "--method", method, *options, "--out", method).code == 0
    for wrong in (
        (one,),
        (one, two, two, "--method", "slerp"),
        (one, two, "--method", "ties"),
        (one, two, "--weights", "1"),
        (one, two, "--weights", "a,b"),
        (one, two, "--weights", "1,-1"),
        (one, two, "--density", 0.1),
        (one, two, "--scale", 2),
        (one, two, "--base", base),
    ):
        assert slm("merge", *wrong, "--out", "wrong").code == 2
    result = slm("merge", "--adapter", one, "--out", "wrong")
    assert result.code == 1 and "is a checkpoint" in result.err
    result = slm("merge", one, two, "--out", one)
    assert result.code == 1 and "is one of the inputs" in result.err
