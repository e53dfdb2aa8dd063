"""slm bench from the shell: what a report holds, what it is compared with, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slm.cli.commands.bench as command
from slm.cli import bench_report
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime import bench

Slm = Callable[..., Any]
QUICK = ("--prompt", "6,12", "--batch", "1,3", "--new", "3", "--rounds", "3", "--threads", "1")


@pytest.fixture
def exported(shared_bundle: Bundle) -> Path:
    """A run with a bundle."""
    shutil.copytree(shared_bundle.path, "runs/tiny/onnx")
    return Path("runs/tiny/onnx")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes of their own, and little memory read: for tests of what surrounds the figures."""
    figures = {"load_ms": 10.0, "ttft_ms": 5.0, "rss_mib": 90.0, "peak_rss_mib": 100.0}
    monkeypatch.setattr(command, "fresh_process", lambda *of, **named: figures)
    monkeypatch.setattr(bench, "_PROBE_BYTES", 1 << 16)


def reported(slm: Slm, *arguments: object) -> Any:
    result = slm("bench", "--json", *QUICK, *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def consistent(report: Any, cases: list[tuple[int, int]]) -> None:
    """Asserts that a report's figures say the same thing in several ways."""
    assert [(row["prompt"], row["batch"]) for row in report["results"]] == cases
    for row in report["results"]:
        for name in ("ttft_ms", "prefill_tok_s", "decode_tok_s", "step_ms", "memory_share"):
            spread = row[name]
            assert (spread is None) == (row["batch"] > 1 and name in ("ttft_ms", "prefill_tok_s"))
            assert spread is None or 0 < spread["min"] <= spread["median"] <= spread["max"]
        rows = row["decode_tok_s"]["median"] * row["step_ms"]["median"] / 1e3
        assert rows == pytest.approx(row["batch"], rel=1e-3)
        if row["ttft_ms"]:
            read = row["prefill_tok_s"]["median"] * row["ttft_ms"]["median"] / 1e3
            assert read == pytest.approx(row["prompt"], rel=1e-3)


def test_the_report(slm: Slm, exported: Path, shared_bundle: Bundle) -> None:
    report = reported(slm)
    assert set(report) == {
        *("schema_version", "date", "model", "backend", "precision", "parameters", "weights_sha256", "file_bytes"),
        *("threads", "versions", "machine", "device", "rounds", "new_tokens", "load_ms", "memory"),
        *("read_gb_s", "results"),
    }
    assert report["schema_version"] == 1 and report["model"] == "runs/tiny/onnx"
    assert (report["rounds"], report["new_tokens"], report["threads"], report["device"]) == (3, 3, 1, "cpu")
    assert report["file_bytes"] == shared_bundle.bytes
    assert report["weights_sha256"] == shared_bundle.manifest.files["onnx/model.onnx_data"].sha256
    assert set(report["versions"]) == {"slm", "onnxruntime", "python"}
    assert report["machine"]["processor"]
    consistent(report, [(6, 1), (12, 1), (6, 3), (12, 3)])
    by_case = {(row["prompt"], row["batch"]): row["step_bytes"] for row in report["results"]}
    # Weights are read once a step, caches once a row.
    assert by_case[6, 3] - by_case[6, 1] == 2 * bench.cache_bytes_read(shared_bundle.manifest.cache, 6)
    assert [row["prompt"] for row in report["memory"]] == [6, 12]
    for row in report["memory"]:
        assert row["load_ms"] > 0 and row["ttft_ms"] > 0 and row["peak_rss_mib"] > 20


def test_a_checkpoint(slm: Slm, quick: None, shared_checkpoint: Path) -> None:
    report = reported(slm, shared_checkpoint)
    assert report["backend"].startswith("PyTorch") and report["precision"] == "float32"
    assert len(report["weights_sha256"]) == 64 and "torch" in report["versions"]
    consistent(report, [(6, 1), (12, 1), (6, 3), (12, 3)])


def test_rows_of_a_checkpoint_begin_where_the_prompt_ends(shared_checkpoint: Path) -> None:
    import numpy as np
    import torch

    from slm.loading import load

    decoder: Any = load(shared_checkpoint).decoder
    rows: Any = command._torch_rows(decoder)(bench.Case(40, 2), 4)
    assert rows.step(np.array([[5], [6]])).shape == (2, 320)
    assert rows._cache.length == 41
    kept = {layer.window: layer.key.shape[2] for layer in rows._cache.layers}
    real = type(rows._cache)(decoder.model.config)
    with torch.inference_mode():
        decoder.model(torch.zeros(1, 41, dtype=torch.int64), cache=real)
    assert kept == {layer.window: layer.key.shape[2] for layer in real.layers}


def test_the_tables(slm: Slm, quick: None, exported: Path) -> None:
    result = slm("bench", *QUICK)
    assert result.code == 0, result.err
    assert "(newest bundle)." in result.err
    for said in ("prefill tokens/s", "decode tokens/s", "% of memory bandwidth", "GB/s read", "100 MiB peak", "files"):
        assert said in result.out


def test_a_comparison(slm: Slm, quick: None, exported: Path) -> None:
    old = reported(slm)
    old["results"] = old["results"][1:]  # (12, 1), (6, 3), (12, 3)
    for row in old["results"]:
        for name in ("median", "min", "max"):
            row["decode_tok_s"][name] /= 1e6
    old["versions"]["onnxruntime"] = "1.0"
    old["memory"][0]["peak_rss_mib"] *= 2
    Path("old.json").write_text(json.dumps(old))
    compared = reported(slm, "--compare", "old.json")["compared"]
    assert compared["differences"] == ["versions"]
    assert [(row["prompt"], row["batch"]) for row in compared["ratios"]] == [(12, 1), (6, 3), (12, 3)]
    for row in compared["ratios"]:
        assert row["decode_tok_s"]["ratio"] > 1e3 and not row["decode_tok_s"]["rounds_overlap"]
        assert ("ttft_ms" in row) == (row["batch"] == 1)
    assert compared["peak_rss_mib"] == {"6": 0.5, "12": 1.0} and compared["load_ms"] == 1.0
    result = slm("bench", *QUICK, "--compare", "old.json")
    assert "ratio to old.json; different: versions" in result.out and "better" in result.out


def test_a_report_compared_with_itself_has_not_changed() -> None:
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    row = {"prompt": 6, "batch": 1, "ttft_ms": spread, "prefill_tok_s": spread, "decode_tok_s": spread}
    report = {"results": [row], "memory": [{"prompt": 6, "peak_rss_mib": 7.0}], "load_ms": 3.0}
    compared = bench_report.compare(report, report)
    same = {"ratio": 1.0, "rounds_overlap": True}
    assert compared["differences"] == [] and compared["peak_rss_mib"] == {6: 1.0}
    assert compared["ratios"] == [
        {"prompt": 6, "batch": 1, "ttft_ms": same, "prefill_tok_s": same, "decode_tok_s": same}
    ]
    with pytest.raises(SlmError, match="no case in common"):
        bench_report.compare(report, report | {"results": [row | {"batch": 2}]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read old.json: No such file"),
        ("{", "cannot read old.json: it is not JSON"),
        ("[1]", "old.json is not a report of slm bench"),
        ('{"loss": 1}', "old.json is not a report of slm bench"),
        ('{"schema_version": 99, "results": []}', "old.json has schema 99"),
    ],
)
def test_what_it_will_not_compare_with(slm: Slm, exported: Path, content: str | None, said: str) -> None:
    if content is not None:
        Path("old.json").write_text(content)
    result = slm("bench", *QUICK, "--compare", "old.json")
    assert (result.code, result.out) == (1, "") and said in result.err


def test_a_plot(slm: Slm, quick: None, exported: Path) -> None:
    old = reported(slm)
    Path("old.json").write_text(json.dumps(old))
    assert slm("bench", *QUICK, "--plot", "speed.png", "--compare", "old.json").code == 0
    assert Path("speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(slm: Slm, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = slm("bench", *QUICK, "--plot", "speed.png")
    assert (result.code, result.out) == (1, "") and "--plot needs matplotlib" in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "6,x"), "is not a list of numbers"),
        (("--prompt", "0"), "is not a list of numbers"),
        (("--batch", ""), "is not a list of numbers"),
        (("--new", "1"), "--new"),
        (("--rounds", "0"), "--rounds"),
    ],
)
def test_wrong_usage(slm: Slm, options: tuple[str, ...], said: str) -> None:
    result = slm("bench", *options)
    assert (result.code, result.out) == (2, "") and said in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing",), "not found: missing"),
        (("--prompt", "6,255"), "255 tokens and 32 new ones do not fit into the context of 256"),
        (("--new", "200"), "128 tokens and 200 new ones do not fit"),
    ],
)
def test_wrong_input_ends_with_one_line(slm: Slm, exported: Path, arguments: tuple[str, ...], said: str) -> None:
    result = slm("bench", *arguments)
    assert (result.code, result.out) == (1, "") and said in result.err


def test_prompts_by_default_are_those_that_fit(slm: Slm, quick: None, exported: Path) -> None:
    result = slm("bench", "--json", "--new", "2", "--rounds", "1", "--threads", "1")
    assert {row["prompt"] for row in json.loads(result.out)["results"]} == {128}
    assert "the context is 256 tokens; omitted prompt lengths: 512, 2,048" in result.err


def test_a_process_of_its_own_that_fails_is_named(shared_bundle: Bundle) -> None:
    shutil.copytree(shared_bundle.path, "broken")
    Path("broken/tokenizer.json").unlink()
    with pytest.raises(SlmError, match=r"a process that loads broken failed: .*tokenizer\.json is missing"):
        command.fresh_process(Path("broken"), 4)


def test_ctrl_c(slm: Slm, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*of: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    result = slm("bench", *QUICK)
    assert (result.code, result.out) == (130, "") and "interrupted" in result.err


def test_a_bundle_is_measured_without_torch() -> None:
    """As on an edge device, where neither torch nor onnx nor matplotlib are installed."""
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors', 'matplotlib', 'yaml', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        "from slm.cli.main import main\n"
        "main(['bench', '--prompt', '8', '--new', '2', '--rounds', '1', '--threads', '1', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["prompt"] == 8
