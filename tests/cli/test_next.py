"""The chain, each command as the one before it says under `next:`, and names, defaults and completion on the way."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from slm.cli.main import COMMANDS, cli
from slm.core.contract import DEFAULT_CONTEXT
from slm.core.manifest import Bundle
from slm.quantize.defaults import CALIBRATION_TOKENS
from slm.quantize.settings import GATES
from tests import quick

Slm = Callable[..., Any]


def following(result: Any) -> list[str]:
    assert result.code == 0, result.err
    said = [line for line in result.err.splitlines() if line.startswith("next: slm ")]
    assert len(said) == 1 and result.err.splitlines()[-1] == said[0], result.err
    return shlex.split(said[0])[2:]


def test_each_command_says_the_next(slm: Slm, shared_checkpoint: Path) -> None:
    place = "runs/a run"  # with a space, which has to be quoted
    shutil.copytree(shared_checkpoint, f"{place}/checkpoint/best")
    export = following(slm("eval", "--tokens", "50"))
    assert export == ["export", "--onnx", f"{place}/checkpoint/best"]
    quantize = following(slm(*export))
    assert quantize == ["quantize", "--int8", f"{place}/onnx"]
    verify = following(slm(*quantize, *quick.QUANTIZE))
    assert verify == ["verify", f"{place}/onnx-int8"]
    ask = following(slm(*verify))
    assert ask == ["generate", f"{place}/onnx-int8", "-p", "Once upon a time"]
    assert slm(*ask, "--max-new-tokens", "3").code == 0
    assert json.loads(slm(*export, "--json").out)["next"] == shlex.join(["slm", *quantize])
    row = {"instruction": "Say one.", "output": "One!"}
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    merge = following(slm("finetune", "--lora", "rows.jsonl", *quick.FINETUNE))
    assert merge == ["export", "--onnx", "--adapter", f"{place}/adapters/rows"]
    assert following(slm(*merge)) == ["quantize", "--int8", f"{place}/onnx-rows"]
    assert following(slm("eval", f"{place}/onnx-rows", "--tokens", "50")) == [
        "quantize",
        "--int8",
        f"{place}/onnx-rows",
    ]


def test_the_readers_own_model_answers_at_every_step(slm: Slm, shared_checkpoint: Path, shared_bundle: Bundle) -> None:
    def used() -> str:
        result = slm("eval", "--tokens", "50", "--json")
        assert result.code == 0, result.err
        model: str = json.loads(result.out)["model"]
        return model

    assert used().endswith("shipped/model")
    shutil.copytree(shared_checkpoint, "runs/mine/checkpoint/best")
    assert used() == "runs/mine/checkpoint/best"
    assert slm("export", "--onnx").code == 0
    assert used() == "runs/mine/onnx"
    assert slm("quantize", "--int8", *quick.QUANTIZE).code == 0
    assert used() == "runs/mine/onnx-int8"
    assert slm("import", shared_checkpoint, "--out", "runs/new/checkpoint/imported").code == 0
    assert used() == "runs/new/checkpoint/imported"


def test_an_unfinished_run_is_not_measured_in_its_place(slm: Slm, shared_bundle: Bundle) -> None:
    Path("runs/aborted").mkdir(parents=True)
    Path("runs/aborted/metrics.jsonl").touch()
    result = slm("eval", "--tokens", "50")
    assert result.code == 1 and "runs/aborted: training has not saved a checkpoint" in result.err
    shutil.copytree(shared_bundle.path, "runs/old/onnx")
    result = slm("eval", "--tokens", "50", "--json")
    assert json.loads(result.out)["model"] == "runs/old/onnx"


def test_a_chat_model_asked_without_turns_is_told_how(slm: Slm, shared_checkpoint: Path) -> None:
    shutil.copytree(shared_checkpoint, "tuned")
    Path("tuned/slm.json").write_text(json.dumps({"finetuned": {"turns": True}}))
    ask = ("generate", "-p", "x", "--max-new-tokens", "1")
    assert "use --instruct for one user t" in slm(*ask, "tuned").err
    assert "--instruct" not in slm(*ask, "tuned", "--instruct").err + slm(*ask, shared_checkpoint).err


def test_defaults_in_the_help_are_those_of_the_code(slm: Slm) -> None:
    words = " ".join(slm("quantize", "--help").out.split())
    assert f"[default: {CALIBRATION_TOKENS['int8']}; {CALIBRATION_TOKENS['int4']} for --int4]" in words
    assert f"[default: {GATES['int8'].max_kl_nats}; {GATES['int4'].max_kl_nats} for --int4]" in words
    for command in ("export", "info"):
        assert f"at most {DEFAULT_CONTEXT}]" in " ".join(slm(command, "--help").out.split())


def options_of(command: click.Command) -> list[click.Option]:
    own = [each for each in command.params if isinstance(each, click.Option)]
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return own + [option for each in inner for option in options_of(each)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_default_that_click_knows_is_not_typed_by_hand(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for option in options_of(command):
        if option.help and "[default: " in option.help:
            assert option.default is None or "Sentinel" in type(option.default).__name__, option.name


def test_the_shell_completes_names(
    slm: Slm, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shared_bundle.path, tmp_path / "runs/tiny/onnx")

    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        for name, value in ({"_SLM_COMPLETE": "bash_complete"} | words).items():
            monkeypatch.setenv(name, value)
        return [each.partition(",")[2] for each in slm().out.splitlines()]

    assert {"tiny", "tiny/onnx"} <= set(completed("slm generate ti"))
    assert completed("slm qu") == ["quantize"]
    assert "gemma3-270m" in completed("slm info gem")
