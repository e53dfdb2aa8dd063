"""`slm finetune` from the shell: finds its base, teaches its rows, reports, and refuses in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.checkpoint import read_info

pytestmark = pytest.mark.usefixtures("short_answers")

Slm = Callable[..., Any]

ROWS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "red", "blue", "cat")]
QUICK = ("--epochs", "1", "--rank", "2", "--samples", "1")


@pytest.fixture
def run(shared_checkpoint: Path) -> Path:
    """A run with a checkpoint, under ./runs, and a file of rows beside it."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    write("pairs.jsonl", ROWS)
    return Path("runs/tiny")


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*"))


def test_the_newest_checkpoint_gets_an_adapter_beside_it(slm: Slm, run: Path) -> None:
    result = slm("finetune", "--lora", "pairs.jsonl", *QUICK)
    assert result.code == 0, result.err
    assert "Using runs/tiny/checkpoint/best (newest checkpoint)." in result.err
    assert "row 1, read only: <|endoftext|>|<start_of_turn>|" in result.err
    assert "<end_of_turn>|<|endoftext|>" in result.err
    assert "adapter runs/tiny/adapters/pairs" in result.out and "nats a token on the training rows" in result.out
    assert (run / "adapters" / "pairs" / "adapter_model.safetensors").is_file()


def test_json_says_all_of_it(slm: Slm, run: Path) -> None:
    result = slm("finetune", "--lora", "pairs.jsonl", "--json", "--name", "mine", *QUICK)
    report = json.loads(result.out)
    assert report["adapter"] == "runs/tiny/adapters/mine" and report["base"] == "runs/tiny/checkpoint/best"
    assert report["loss_after"] < report["loss_before"]
    assert {"rows", "trained_tokens", "truncated", "skipped", "trainable_parameters", "seconds"} <= report.keys()


def test_every_option_reaches_the_run(slm: Slm, run: Path) -> None:
    write("held-out.jsonl", ROWS[:2])
    options = {
        "rank": 3,
        "alpha": 5,
        "patience": 7,
        "keep": "best",
        "dropout": 0.25,
        "learning_rate": 0.001,
        "epochs": 2,
        "batch_size": 4,
        "max_length": 50,
        "seed": 9,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    base = run / "checkpoint" / "best"
    result = slm(
        "finetune", "--lora", "pairs.jsonl", "--base", base, "--val", "held-out.jsonl", "--out", "made", *arguments
    )
    assert result.code == 0, result.err
    info = read_info(Path("made"))
    assert not (info["settings"]["rslora"] or info["settings"]["dora"] or info["settings"]["pack"])
    assert {name: info["settings"][name] for name in options} == options
    assert info["validation"]["path"] == "held-out.jsonl"


def test_an_adapter_is_replaced_only_when_told(slm: Slm, run: Path) -> None:
    command = ("finetune", "--lora", "pairs.jsonl", *QUICK)
    assert slm(*command).code == 0
    result = slm(*command)
    assert result.code == 1 and "there is already an adapter" in result.err and "--overwrite" in result.err
    assert slm(*command, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "data not found: bad.jsonl"),
        (b"", "there is no row in bad.jsonl"),
        (b"\x80\x00\xff", "bad.jsonl: is not UTF-8 text"),
        (b'{"text": "a"}\n{"text": \n', "bad.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n\n{"txt": "a"}\n', "bad.jsonl, line 3: unknown kind of row (fields: txt)"),
    ],
)
def test_bad_data_is_one_error_and_leaves_nothing(slm: Slm, run: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        Path("bad.jsonl").write_bytes(content)
    before = files()
    result = slm("finetune", "--lora", "bad.jsonl")
    assert result.code == 1 and result.out == ""
    error, hint = result.err.strip().split("\n")[-2:]
    assert error.startswith("error: ") and said in error and hint.startswith("hint: ")
    assert files() == before


@pytest.mark.parametrize("base", ["none", "pairs.jsonl"])
def test_a_wrong_base_is_refused(slm: Slm, run: Path, base: str) -> None:
    before = files()
    result = slm("finetune", "--lora", "pairs.jsonl", "--base", base)
    assert result.code == 1
    assert f"error: {'not found' if base == 'none' else 'not a checkpoint'}: {base}" in result.err
    assert files() == before


def test_without_any_checkpoint_the_demo_model_becomes_one(slm: Slm) -> None:
    write("pairs.jsonl", ROWS[:1])
    for _ in range(2):  # the second command uses the checkpoint of the first
        result = slm("finetune", "--lora", "pairs.jsonl", "--overwrite", *QUICK, "--samples", 0)
        assert result.code == 0, result.err
        assert "checkpoint/imported" in result.err
    assert read_info(Path("runs/stories/checkpoint/imported"))["imported"]["kind"] == "bundle"
    assert Path("runs/stories/adapters/pairs/adapter_model.safetensors").is_file()


def test_an_unfinished_run_is_not_passed_over_for_the_demo_model(slm: Slm) -> None:
    write("pairs.jsonl", ROWS)
    Path("runs/mine/trainer").mkdir(parents=True)
    Path("runs/mine/trainer/state.json").write_text("{}")
    result = slm("finetune", "--lora", "pairs.jsonl")
    assert result.code == 1 and "no finished checkpoint under ./runs: runs/mine" in result.err


@pytest.mark.parametrize("name", ["a/b", "../escaped", "..", "", "a\\b", ".hidden"])
def test_a_name_is_one_directory(slm: Slm, run: Path, name: str) -> None:
    before = files()
    result = slm("finetune", "--lora", "pairs.jsonl", "--name", name)
    assert result.code == 1 and "cannot name an adapter" in result.err
    assert files() == before


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--lora", "a", "--full", "b"),
        ("--lora", "pairs.jsonl", "--rank", "0"),
        ("--lora", "pairs.jsonl", "--out", "a", "--name", "b"),
    ],
)
def test_wrong_usage_exits_with_2(slm: Slm, run: Path, arguments: tuple[str, ...]) -> None:
    assert slm("finetune", *arguments).code == 2


@pytest.mark.parametrize(
    ("option", "value"), [("--learning-rate", "nan"), ("--learning-rate", "inf"), ("--seed", "-1")]
)
def test_settings_out_of_range_are_wrong_usage(slm: Slm, run: Path, option: str, value: str) -> None:
    result = slm("finetune", "--lora", "pairs.jsonl", option, value)
    assert result.code == 2 and f"error: Invalid value for '{option}': " in result.err


def test_help_shows_each_kind_of_row(slm: Slm) -> None:
    told = slm("finetune", "--help").out
    for line in told.splitlines():
        if line.strip().startswith("{"):
            assert json.JSONDecoder().raw_decode(line.strip())
    fields = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text")
    assert all(f'"{field}"' in told for field in fields)


def test_the_kind_of_adapter_is_an_option(slm: Slm, run: Path) -> None:
    flags = ("--rslora", "--dora", "--pack", "--targets", "q_proj, down_proj", "--patience", "0")
    result = slm("finetune", "--lora", "pairs.jsonl", *QUICK, *flags)
    assert result.code == 0, result.err
    settings = read_info(run / "adapters" / "pairs")["settings"]
    assert settings["rslora"] and settings["dora"] and settings["pack"] and settings["patience"] is None
    assert settings["target_modules"] == ["q_proj", "down_proj"]
    written = json.loads((run / "adapters" / "pairs" / "adapter_config.json").read_text())
    assert written["use_rslora"] and written["use_dora"]


def test_in_full_there_is_another_checkpoint(slm: Slm, run: Path) -> None:
    result = slm("finetune", "--full", "pairs.jsonl", "--epochs", "1", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["checkpoint"] == "runs/tiny-pairs/checkpoint/best"
    assert "Using runs/tiny/checkpoint/best (newest checkpoint)." in result.err
    again = slm("finetune", "--lora", "pairs.jsonl", *QUICK)  # the newest is that one now
    assert "adapter runs/tiny-pairs/adapters/pairs" in again.out


def test_bad_rows_are_counted_on_request(slm: Slm, run: Path) -> None:
    write("pairs.jsonl", [*ROWS, {"txt": "a"}])
    assert slm("finetune", "--lora", "pairs.jsonl", *QUICK).code == 1
    result = slm("finetune", "--lora", "pairs.jsonl", "--skip-bad", *QUICK)
    assert result.code == 0 and "1 bad" in result.out
    assert "warning: bad rows left out: 1; the first: pairs.jsonl, line 6" in result.err


@pytest.mark.parametrize("option", [("--rank", "4"), ("--dora",), ("--targets", "q_proj")])
def test_an_adapter_s_options_are_not_of_full_training(slm: Slm, run: Path, option: tuple[str, ...]) -> None:
    result = slm("finetune", "--full", "pairs.jsonl", *option)
    assert result.code == 2 and f"{option[0]} is an option of adapters" in result.err


def test_an_unknown_projection_is_one_error(slm: Slm, run: Path) -> None:
    result = slm("finetune", "--lora", "pairs.jsonl", "--targets", "c_attn")
    assert result.code == 1 and "the fine-tuning settings are wrong: training.target_modules" in result.err


def test_a_log_has_a_line_for_each_epoch_and_no_bar(slm: Slm, run: Path) -> None:
    result = slm("finetune", "--lora", "pairs.jsonl", "--epochs", "3", "--rank", "2")
    lines = result.err.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("epoch ")] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert "before training: loss on the training rows " in result.err
    assert "\r" not in result.err and "\x1b" not in result.err and "fine-tuning" not in result.err
    assert lines[-1] == "next: slm export --onnx --adapter runs/tiny/adapters/pairs"


def test_answers_are_shown_at_the_end(slm: Slm, run: Path) -> None:
    command = ("finetune", "--lora", "pairs.jsonl", "--overwrite", "--epochs", "1", "--rank", "2")
    shown = slm(*command).out
    assert "greedy answers to rows that were trained on" in shown
    assert [shown.count(f"  {name}") for name in ("prompt:", "wanted:", "answered:")] == [3, 3, 3]
    samples = json.loads(slm(*command, "--json", "--samples", "2").out)["samples"]
    assert len(samples) == 2 and all(each.keys() == {"prompt", "wanted", "answered", "held_out"} for each in samples)
    assert samples == read_info(run / "adapters" / "pairs")["samples"]
    assert "greedy answers" not in slm(*command, "--samples", "0").out
    assert slm(*command, "--samples", "-1").code == 2


def test_what_is_shown_of_an_answer_is_one_line(slm: Slm, run: Path) -> None:
    write("long.jsonl", [{"prompt": "Say\n\x1b[31m this [bold]", "completion": "the\n " * 60}])
    shown = slm("finetune", "--lora", "long.jsonl", *QUICK).out
    assert "prompt:   Say  [31m this [bold]\n" in shown and "\x1b" not in shown
    (wanted,) = (line for line in shown.splitlines() if line.startswith("  wanted:"))
    assert wanted.endswith("…") and len(wanted) < 230


def test_the_last_epoch_is_kept_when_asked_for(slm: Slm, run: Path) -> None:
    result = slm("finetune", "--lora", "pairs.jsonl", "--keep", "last", "--epochs", "2", "--rank", "2")
    assert result.code == 0 and "epoch 2 of 2, the last" in result.out
    assert read_info(run / "adapters" / "pairs")["settings"]["keep"] == "last"
    refused = slm("finetune", "--lora", "pairs.jsonl", "--keep", "last", "--patience", "2")
    assert refused.code == 2 and "--patience requires --keep best" in refused.err


def test_a_metric_is_shown_and_decides(slm: Slm, run: Path) -> None:
    command = ("finetune", "--lora", "pairs.jsonl", "--metric", "f1", "--metric-rows", "3", "--overwrite", *QUICK)
    result = slm(*command)
    assert result.code == 0, result.err
    assert "F1 of words" in result.out and "on 3 of the training rows" in " ".join(result.out.replace("│", "").split())
    assert ", F1 of words " in result.err
    report = json.loads(slm(*command, "--json").out)
    assert (report["metric"], report["metric_rows"]) == ("f1", 3)
    assert 0 <= report["score_low"] <= report["score_after"] <= report["score_high"] <= 1
    assert report["score_before"] is not None and report["teacher"] is None
    plain = json.loads(slm("finetune", "--lora", "pairs.jsonl", "--overwrite", "--json", *QUICK).out)
    assert plain["metric"] is plain["score_after"] is None
    assert slm("finetune", "--lora", "pairs.jsonl", "--metric-rows", "3", *QUICK).code == 2


def test_a_teacher_answers_prompts(slm: Slm, run: Path, shared_checkpoint: Path) -> None:
    write("prompts.jsonl", [{"prompt": f"Say {word}"} for word in ("one", "two")])
    refused = slm("finetune", "--lora", "prompts.jsonl", *QUICK)
    assert refused.code == 1 and "--teacher MODEL" in refused.err
    options = ("--max-length", "24", "--teacher", "runs/tiny/checkpoint/best", *QUICK)
    result = slm("finetune", "--lora", "prompts.jsonl", *options)
    assert result.code == 0, result.err
    assert "answers written by the teacher: 2" in result.err
    assert "divergence" in result.out and "divergence from the teacher on the training rows" in result.err
    assert slm("finetune", "--lora", "prompts.jsonl", "--teacher", "missing", *QUICK).code == 1
