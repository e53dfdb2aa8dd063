"""export, quantize, generate and info from the shell: each finds what the one before made, and refuses what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle
from tests import quick

Slm = Callable[..., Any]


@pytest.fixture
def run(shared_checkpoint: Path) -> Path:
    """A run with a checkpoint, under ./runs."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    return Path("runs/tiny")


@pytest.fixture
def exported(run: Path, shared_bundle: Bundle) -> Path:
    """That run with its bundle."""
    shutil.copytree(shared_bundle.path, run / "onnx")
    return run


def test_each_step_finds_the_one_before(slm: Slm, run: Path) -> None:
    result = slm("export", "--onnx")
    assert result.code == 0, result.err
    assert "Using runs/tiny/checkpoint/best (newest checkpoint)." in result.err
    assert "Verified: runs/tiny/onnx matches PyTorch" in result.out
    result = slm("quantize", "--int8", *quick.QUANTIZE)
    assert result.code == 0, result.err
    assert "Using runs/tiny/onnx (newest float32 bundle)." in result.err and "int8 in blocks of 64" in result.out
    result = slm("generate", "-p", "Once", "--max-new-tokens", "5", "--greedy")
    assert result.code == 0, result.err
    assert "runs/tiny/onnx-int8: onnxruntime" in result.err and result.out.startswith("Once")
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint", "onnx", "onnx-int8"]


def test_a_text_shorter_than_the_window_is_said(slm: Slm, exported: Path) -> None:
    Path("short.txt").write_text("One day.")
    result = slm("quantize", "--int8", "--data", "short.txt", "--max-kl", "1")
    assert result.code == 0 and "do not exceed the sliding window of 16" in result.err
    assert "warning" not in slm("quantize", "--int8", *quick.QUANTIZE).err


def test_json_of_every_step(slm: Slm, exported: Path) -> None:
    made = json.loads(slm("export", "--onnx", "--json", "--out", "elsewhere/onnx").out)
    assert made["bundle"] == "elsewhere/onnx" and made["parity"]["logits"]["steps"] < 1e-4
    made = json.loads(slm("quantize", "--int8", "--json", *quick.QUANTIZE, exported / "onnx").out)
    assert made["bytes_after"] < made["bytes_before"] and made["change"]["kl_nats"] > 0
    told = json.loads(
        slm("generate", "--json", "-p", "One day", "--greedy", "--max-new-tokens", "9", exported / "onnx").out
    )
    assert {"ttft_ms", "decode_tok_s", "prefill_tok_s", "peak_rss_mib"} <= told.keys()
    assert all(told[name] > 0 for name in ("ttft_ms", "decode_tok_s", "prefill_tok_s", "peak_rss_mib"))
    assert json.loads(slm("info", "--json", exported / "onnx").out)["precision"] == "float32"


def test_the_same_text_from_checkpoint_and_bundle(slm: Slm, exported: Path) -> None:
    texts = [
        json.loads(slm("generate", "--json", "--greedy", "-p", "The", "--max-new-tokens", "40", path).out)["tokens"]
        for path in (exported / "checkpoint" / "best", exported / "onnx")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 3


def test_the_prompt_from_standard_input(slm: Slm, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe"))
    assert slm("generate", "-p", "-", "--max-new-tokens", "2").out.startswith("From a pipe")


def test_seeds_and_sampling_change_the_text(slm: Slm, exported: Path) -> None:
    def text(*options: str) -> str:
        return slm("generate", "-p", "The", "--max-new-tokens", "30", "--temperature", "1.5", *options).out

    assert text("--seed", "0") == text("--seed", "0") != text("--seed", "1")
    assert len({text() for _ in range(4)}) > 1
    assert text("--top-k", "1") == text("--greedy") == text("--top-p", "0.000001") != text()


def test_instructions_are_asked_as_turns(slm: Slm, exported: Path) -> None:
    def tokens(*options: str) -> Any:
        return json.loads(slm("generate", "--json", "-p", "Hi", "--greedy", "--max-new-tokens", "3", *options).out)

    assert tokens("--instruct")["prompt_tokens"] > tokens()["prompt_tokens"]


@pytest.mark.parametrize("command", [("export", "--onnx"), ("quantize", "--int8"), ("info",), ("generate",)])
def test_wrong_inputs_end_with_one_line_and_leave_nothing(slm: Slm, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "manifest.json", "model.safetensors"):
        (tmp_path / "broken" / name).write_text("{")
    before = sorted(tmp_path.rglob("*"))
    for wrong in ("missing", "file", "empty", "broken"):
        result = slm(*command, tmp_path / wrong)
        assert result.code == 1, (command, wrong, result)
        error, *hints = result.err.strip().split("\n")
        assert error.startswith("error: ") and wrong in error and len(hints) <= 1
        assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_is_interrupted_leaves_what_was_there(
    slm: Slm, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(exported.rglob("*"))
    monkeypatch.setattr("slm.export.bundle.prove", interrupt)
    assert slm("export", "--onnx").code == 130
    monkeypatch.setattr("slm.quantize.report.measure", interrupt)
    assert slm("quantize", "--int8").code == 130
    assert sorted(exported.rglob("*")) == before


def test_a_gate_that_does_not_pass(slm: Slm, exported: Path) -> None:
    result = slm("quantize", "--int8", "--tokens", "100", "--max-kl", "0")
    assert result.code == 1 and "nothing was written" in result.err and "--prefer quality" in result.err
    assert not (exported / "onnx-int8").exists()


def test_cuda_without_a_provider_says_what_to_install(slm: Slm, exported: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    result = slm("generate", "--device", "cuda", "-p", "x")
    assert result.code == 1 and "slm-edge[cuda]" in result.err


def test_info_of_a_checkpoint(slm: Slm, exported: Path) -> None:
    result = slm("info", exported / "checkpoint" / "best")
    assert result.code == 0 and "3 sliding (window 16), 1 global" in result.out and "made_by" in result.out


def test_nothing_of_the_users_is_replaced(slm: Slm, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "app" / "src").mkdir(parents=True)
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my app"}')
    (tmp_path / "app" / "src" / "main.js").write_text("years of work")
    shutil.copytree(exported / "onnx", tmp_path / "annotated")
    (tmp_path / "annotated" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for command in (("export", "--onnx"), ("quantize", "--int8", "--max-kl", "1", "--tokens", "100")):
        for out in (tmp_path / "app", tmp_path / "annotated", Path(), exported / "checkpoint" / "best"):
            result = slm(*command, *([exported / "onnx"] if command[0] == "quantize" else []), "--out", out)
            assert result.code == 1 and "another --out" in result.err, (command, out, result.err)
    result = slm("quantize", "--int8", exported / "onnx", "--out", exported / "onnx")
    assert result.code == 1 and "cannot be overwritten" in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_without_its_tokenizer_is_not_exported(slm: Slm, run: Path) -> None:
    (run / "checkpoint" / "best" / "tokenizer.json").unlink()
    result = slm("export", "--onnx", run / "checkpoint" / "best")
    assert result.code == 1 and "tokenizer not found" in result.err
    assert not (run / "onnx").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-p", "bad \udcff bytes"), "the prompt is not UTF-8 text"),
        (("--seed", "-1"), "seed"),
        (("--top-p", "nan"), "top"),
        (("--temperature", "nan"), "temperature"),
    ],
)
def test_a_prompt_or_option_that_will_not_do_prints_no_text(
    slm: Slm, exported: Path, options: tuple[str, ...], said: str
) -> None:
    result = slm("generate", *options)
    assert result.code in (1, 2) and result.out == "" and said in result.err and "unexpected" not in result.err


def test_next_to_no_temperature_is_greedy(slm: Slm, exported: Path) -> None:
    common = ("generate", "-p", "The", "--max-new-tokens", "12")
    assert slm(*common, "--temperature", "1e-320").out == slm(*common, "--greedy").out


def test_a_turn_typed_in_a_request_is_only_characters(slm: Slm, exported: Path) -> None:
    def tokens(request: str) -> Any:
        command = ("generate", "--json", "--instruct", "-p", request, "--max-new-tokens", "1")
        return json.loads(slm(*command).out)["prompt_tokens"]

    assert tokens("<end_of_turn>") > tokens("x") + 5
