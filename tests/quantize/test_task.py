"""The check of a quantization on a task: what is measured and reported, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.metrics.intervals import paired_shares, wilson
from slm.core.progress import Silent
from slm.core.task import Question, TaskRow
from slm.core.tokenizer import Tokenizer
from slm.quantize.make import quantize_bundle
from slm.quantize.page import figures, report_page
from slm.quantize.results import TaskChange, TaskScore
from slm.quantize.settings import Gate, Settings
from slm.quantize.task import TaskCheck, measure_change
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.model import Model
from tests.html_pages import checked
from tests.progress import Notes

Slm = Callable[..., Any]
LITTLE = ("--tokens", "128", "--calibration-tokens", "128", "--window", "64", "--max-kl", "100")
TEXTS = (
    "Once upon a time",
    "The fox",
    "One day a bear",
    "It rained",
    "Tom and Mia",
    "A big red ball",
    "She",
    "He said",
)
TOKENS = 32  # the smallest default limit of a reply


@pytest.fixture(scope="module")
def own_replies(shared_bundle: Bundle) -> list[str]:
    """The source's greedy replies to some prompts."""
    model = Model(Tokenizer.load(shared_bundle.path), OnnxDecoder(shared_bundle), shared_bundle.stop_token_ids)
    return [model.generate(text, temperature=0, max_new_tokens=TOKENS) for text in TEXTS]


@pytest.fixture
def check(shared_bundle: Bundle, own_replies: list[str]) -> TaskCheck:
    """A task on which the source has the full score. Of a random model, INT4 changes most texts."""
    tokenizer = Tokenizer.load(shared_bundle.path)
    questions = tuple(
        Question(TaskRow(text, reply, f"row {i}"), tuple(tokenizer.encode(text)), (5,) * (TOKENS // 2))
        for i, (text, reply) in enumerate(zip(TEXTS, own_replies, strict=True))
    )
    return TaskCheck("rows.jsonl", "exact", questions, 0.01)


def made(source: Bundle, out: Path, check: TaskCheck | None, **settings: Any) -> Any:
    text, calibration = (TokenRows("random", np.random.default_rng(seed).integers(0, 320, (2, 60))) for seed in (5, 6))
    return quantize_bundle(source, out, text, Settings(gate=Gate(None), **settings), Silent(), calibration, check)


COARSE: dict[str, Any] = {"precision": "int4", "prefer": "size", "head_bits": 8, "method": "nearest", "smooth": False}


def test_a_fall_of_the_score_is_refused(shared_bundle: Bundle, check: TaskCheck, tmp_path: Path) -> None:
    with pytest.raises(SlmError) as error:
        made(shared_bundle, tmp_path / "made", check, **COARSE)
    assert "task check failed: exact match on rows.jsonl falls from 100.0% to " in error.value.message
    assert "(limit 1 point)" in error.value.message and "nothing was written" in error.value.message
    assert error.value.hint == "use --int4 --prefer quality for a smaller error, or raise the limit with --max-drop"
    assert not list(tmp_path.iterdir())


def test_a_fall_within_the_limit_is_reported(shared_bundle: Bundle, check: TaskCheck, tmp_path: Path) -> None:
    bundle, report = made(shared_bundle, tmp_path / "made", replace(check, max_drop=1.0), **COARSE)
    task = report.task
    assert task.before == TaskScore(1.0, wilson(8, 8).low, 1.0) and task.after.score < 1
    right = round(8 * task.after.score)
    assert task.after == TaskScore(right / 8, wilson(right, 8).low, wilson(right, 8).high)
    between = paired_shares([True] * 8, [True] * right + [False] * (8 - right))
    assert (task.low, task.high, task.lost, task.won) == (between.low, between.high, 8 - right, 0)
    stored = json.loads((bundle.path / "report.json").read_text())["task"]
    assert stored["before"]["score"] == 1.0 and stored["metric"] == "exact" and stored["rows"] == 8
    rows = {name: (before, after) for name, before, after in figures(report)}
    assert rows["exact match, 8 rows (95 %)"][0] == "100.0% (67.6 to 100.0)"
    assert rows["difference in points (95 %)"][1].startswith(f"{100 * task.after.score - 100:+.1f} (")
    assert "exact match, 8 rows" in checked((bundle.path / "report.html").read_text()).text
    assert report_page(replace(report, task=None)).count("exact match") == 0


def test_the_limit_itself_passes() -> None:
    """0.92 - 0.91 is a little more than 0.01 in floating-point numbers."""
    check = TaskCheck("rows.jsonl", "f1", (), 0.01)

    def change(before: float, after: float) -> TaskChange:
        scores = [TaskScore(score, 0.0, 1.0) for score in (before, after)]
        return TaskChange("rows.jsonl", "f1", 100, *scores, low=-0.1, high=0.1, max_drop=0.01, lost=1, won=0)

    assert check.refuses(change(0.92, 0.91)) is None and check.refuses(change(0.5, 0.9)) is None
    assert check.refuses(change(0.92, 0.9099)) is not None and check.refuses(change(0.92, float("nan"))) is not None
    assert change(1, 1).limit == "1 point" and replace(change(1, 1), max_drop=0.005).limit == "0.5 points"


def test_a_score_that_cannot_fall_is_noted(shared_bundle: Bundle, check: TaskCheck) -> None:
    notes = Notes()
    other = tuple(replace(each, row=replace(each.row, expected="no")) for each in check.questions)
    change = measure_change(replace(check, questions=other), shared_bundle, shared_bundle, notes)
    assert change.before.score == change.after.score == 0.0 and change.lost == change.won == 0
    assert any("so the score cannot fall by more than the limit" in line for line in notes.lines)
    fine = Notes()
    measure_change(check, shared_bundle, shared_bundle, fine)
    assert not any("cannot fall" in line for line in fine.lines)


def test_the_command(slm: Slm, shared_bundle: Bundle, own_replies: list[str]) -> None:
    rows = [{"prompt": text, "completion": reply} for text, reply in zip(TEXTS, own_replies, strict=True)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        "quantize",
        "--int4",
        "--prefer",
        "size",
        "--method",
        "nearest",
        "--no-smooth",
        shared_bundle.path,
        *LITTLE,
    )
    task = ("--task", "rows.jsonl", "--metric", "rouge")
    refused = slm(*arguments, *task, "--out", "made")
    assert refused.code == 1 and "error: task check failed: ROUGE-L on rows.jsonl falls from " in refused.err
    assert not Path("made").exists() and refused.out == ""
    passed = slm(*arguments, *task, "--max-drop", "100%", "--limit", "3", "--out", "made")
    assert passed.code == 0, passed.err
    assert (
        "Task check passed: " in passed.err and "(limit 100 points)" in passed.err and "ROUGE-L, 3 rows" in passed.out
    )
    assert json.loads(Path("made/report.json").read_text())["task"]["rows"] == 3


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--int8", "--metric", "f1"), 2, "--metric requires --task"),
        (("--int8", "--max-drop", "1%"), 2, "--max-drop requires --task"),
        (("--int8", "--limit", "1"), 2, "--limit requires --task"),
        (("--int8", "--task", "rows.jsonl", "--max-drop", "-1%"), 2, "is not a share"),
        (
            ("--int8", "--task", "rows.jsonl", "--max-drop", "2"),
            2,
            "'2' is not a share from 0 to 100%, such as 2% or 0.02",
        ),
        (("--int8", "--task", "nowhere.jsonl"), 1, "rows not found: nowhere.jsonl"),
        (("--int8", "--task", "rows.jsonl"), 1, "rows.jsonl, line 1: unknown kind of row"),
        (("--sweep", "--task", "rows.jsonl"), 1, "--sweep does not support --task"),
    ],
)
def test_what_it_refuses(
    slm: Slm, shared_bundle: Bundle, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "x"}\n')
    result = slm("quantize", *options, shared_bundle.path, *LITTLE[:-2], "--out", tmp_path / "made")
    assert result.code == code and said in result.err and "Traceback" not in result.err, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"] and result.out == ""
