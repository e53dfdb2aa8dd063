"""slm eval from the shell: finds its model, reads its text, reports, and refuses what is wrong."""

import gzip
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from slm.core.install import install_hint
from slm.core.manifest import Bundle
from slm.core.sample import validation_path

Slm = Callable[..., Any]

# The same windows in the same float32 model, in batches of other sizes.
SAME = 1e-5

STORIES = ["Once upon a time there was a fox. 🦊", "The naïve bear slept.\n\nThen it rained."]


@pytest.fixture
def exported(shared_checkpoint: Path, shared_bundle: Bundle) -> Path:
    """A run with a checkpoint and its bundle, and a file of two stories."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    shutil.copytree(shared_bundle.path, "runs/tiny/onnx")
    Path("two.txt").write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    return Path("runs/tiny")


def measured(slm: Slm, *arguments: object) -> Any:
    result = slm("eval", "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_the_report(slm: Slm, exported: Path) -> None:
    figures = measured(slm, "--data", "two.txt")
    assert figures["model"] == "runs/tiny/onnx" and figures["backend"].startswith("onnxruntime")
    assert figures["data"] == "two.txt" and figures["protocol"] == "documents"
    assert (figures["context"], figures["stride"], figures["windows"]) == (256, 128, None)
    assert figures["documents"] == 2 and figures["bytes"] == sum(len(story.encode()) for story in STORIES)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    bits = figures["loss"] * figures["tokens"] / math.log(2) / figures["bytes"]
    assert figures["bits_per_byte"] == pytest.approx(bits)
    assert figures["end_of_text"]["id"] == 0 and figures["end_of_text"]["tokens"] == 2
    assert figures["end_of_text"]["nats"] > 0 and figures["seconds"] > 0 and figures["tokens_s"] > 0


def test_the_table(slm: Slm, exported: Path) -> None:
    result = slm("eval", "--data", "two.txt")
    assert result.code == 0
    assert "Using runs/tiny/onnx (newest bundle)." in result.err
    for said in ("nats per token", "perplexity", "bits per byte", "2 of them end-of-text", "tokens/s"):
        assert said in result.out
    windows = slm("eval", "--data", "two.txt", "--protocol", "windows", "--context", "8")
    assert "windows of 8 tokens" in windows.out


def test_a_checkpoint_and_its_bundle_agree(slm: Slm, exported: Path) -> None:
    both = [measured(slm, exported / part, "--data", "two.txt") for part in ("checkpoint/best", "onnx")]
    assert both[0]["backend"].startswith("PyTorch") and both[1]["backend"].startswith("onnxruntime")
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-4)


def test_without_anything_the_shipped_model_and_stories(slm: Slm) -> None:
    result = slm("eval", "--tokens", "300", "--threads", "1", "--json")
    assert "Using the bundled demo model (no model in ./runs)." in result.err
    assert "text: the bundled held-out stories" in result.err
    figures = json.loads(result.out)
    assert figures["data"] == "the bundled held-out stories" and figures["tokens"] == 300
    assert 5 < figures["perplexity"] < 30  # these stories are generated, of a kind it was not trained on
    assert figures == figures | {
        name: measured(slm, "--tokens", "300", "--threads", "1", "--data", validation_path())[name]
        for name in ("loss", "bytes", "bits_per_byte")
    }


def test_the_same_documents_from_every_kind_of_file(slm: Slm, exported: Path) -> None:
    rows = "".join(json.dumps({"text": story}) + "\n" for story in STORIES)
    Path("two.jsonl").write_text(rows, encoding="utf-8")
    Path("two.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    Path("each").mkdir()
    for number, story in enumerate(STORIES):
        Path("each", f"{number}.txt").write_text(story, encoding="utf-8")
    names = ("loss", "tokens", "bytes", "documents")
    wanted = {name: measured(slm, "--data", "two.txt")[name] for name in names}
    for data in (["two.jsonl"], ["two.jsonl.gz"], ["each"], ["each/0.txt", "each/1.txt"]):
        figures = measured(slm, *(part for path in data for part in ("--data", path)))
        assert {name: figures[name] for name in names} == pytest.approx(wanted)


def test_context_stride_and_tokens(slm: Slm, exported: Path) -> None:
    losses = {
        measured(slm, "--data", "two.txt", *options)["loss"]
        for options in ((), ("--context", "20"), ("--context", "20", "--stride", "3"), ("--tokens", "9"))
    }
    assert len(losses) == 4


def test_windows_are_what_training_wrote_down(slm: Slm) -> None:
    small = ("model.hidden_size=64", "model.intermediate_size=96", "model.vocab_size=320", "batch.context=48")
    more = ("schedule.micro_steps=20", "schedule.warmup_micro_steps=2", "evaluation.every_micro_steps=10")
    options = [part for value in (*small, *more, "evaluation.windows=16") for part in ("--set", value)]
    made = slm("train", "--recipe", "tiny", "--set", "machine.device=cpu", *options, "--out", "runs/small")
    assert made.code == 0, made.err
    rows = [json.loads(line) for line in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    written = [row["loss"] for row in rows if row["type"] == "eval"]
    figures = measured(slm, "runs/small/checkpoint/last", "--protocol", "windows")
    assert (figures["context"], figures["windows"], figures["tokens"]) == (48, 16, 16 * 48)
    assert figures["loss"] == pytest.approx(written[-1], rel=SAME)
    # The control: other windows have another loss.
    other = measured(slm, "runs/small/checkpoint/last", "--protocol", "windows", "--tokens", 15 * 48)
    assert other["windows"] == 15 and other["loss"] != pytest.approx(written[-1], rel=10 * SAME)
    assert slm("export", "--onnx", "runs/small/checkpoint/last").code == 0
    exported = measured(slm, "runs/small/onnx", "--protocol", "windows")
    assert (exported["context"], exported["windows"]) == (48, 16)  # a bundle knows how its checkpoint was trained
    assert exported["loss"] == pytest.approx(figures["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("evaluation", "wanted"),
    [
        ({"context": 24, "windows": 3}, (24, 3)),
        ({"context": None, "windows": 3}, (48, 3)),
        ({"windows": 2}, (48, 2)),
        ({"context": 9999, "windows": 2}, (256, 2)),  # no more than the model takes
    ],
)
def test_windows_are_as_long_as_training_measured(
    slm: Slm, exported: Path, evaluation: dict[str, Any], wanted: tuple[int, int]
) -> None:
    info = {"recipe": {"evaluation": evaluation, "batch": {"context": 48}}}
    (exported / "checkpoint/best/slm.json").write_text(json.dumps(info), encoding="utf-8")
    figures = measured(slm, exported / "checkpoint/best", "--protocol", "windows")
    assert (figures["context"], figures["windows"]) == wanted


def test_tokens_are_counted_in_windows_of_the_context_that_is_taken(
    slm: Slm, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that takes more than is read unless asked for; how it was trained is not recorded."""
    monkeypatch.setattr("slm.runtime.evaluate._DEFAULT_CONTEXT", 32)
    figures = measured(slm, exported / "checkpoint/best", "--protocol", "windows", "--tokens", "100")
    assert (figures["context"], figures["windows"], figures["tokens"]) == (32, 3, 96)
    figures = measured(slm, exported / "checkpoint/best", "--protocol", "windows", "--tokens", "5")
    assert (figures["context"], figures["windows"]) == (32, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--protocol", "windows", "--stride", "4"), "use --stride with --protocol documents"),
        (("--limit", "4"), "--limit applies to --tasks"),
        (("--tasks", " , "), "--tasks is empty"),
        (("--context", "1"), "--context"),
        (("--tokens", "0"), "--tokens"),
        (("--protocol", "all"), "--protocol"),
    ],
)
def test_wrong_usage(slm: Slm, options: tuple[str, ...], said: str) -> None:
    result = slm("eval", *options)
    assert result.code == 2 and said in result.err and result.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing",), "not found: missing"),
        (("--data", "missing.txt"), "data not found: missing.txt"),
        (("--data", "empty.txt"), "no text in empty.txt"),
        (("--data", "latin.txt"), "error: latin.txt: is not UTF-8 text"),
        (("--data", "later.txt"), "error: later.txt, after line 1: is not UTF-8 text"),
        (("--data", "dataset"), "a prepared dataset holds tokens, not text: dataset"),
        (("runs/tinny",), "did you mean tiny?"),
        (("--data", "rows.jsonl"), 'rows.jsonl, line 1: is not a row with a "text"'),
        (("--data", "two.txt", "--context", "257"), "the model takes 256 tokens, not 257"),
        (("--data", "two.txt", "--context", "20", "--stride", "21"), "a stride of 21 does not fit a context of 20"),
        (("--data", "two.txt", "--protocol", "windows", "--context", "250"), "too few for a window of 250"),
    ],
)
def test_wrong_input_ends_with_one_line(slm: Slm, exported: Path, arguments: tuple[str, ...], said: str) -> None:
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("later.txt").write_bytes(b"tea\n" + b"x" * (1 << 20) + b"\xe9")
    Path("dataset").mkdir()
    Path("dataset/dataset.json").write_text("{}")
    Path("rows.jsonl").write_text('{"story": "x"}\n')
    result = slm("eval", *arguments)
    assert result.code == 1 and result.out == ""
    assert said in result.err and "unexpected" not in result.err


def test_tasks_without_the_harness(slm: Slm) -> None:
    if find_spec("lm_eval"):
        pytest.skip("lm_eval is installed here")
    result = slm("eval", "--tasks", "hellaswag")
    assert result.code == 1 and result.err == (
        f"error: --tasks needs lm-evaluation-harness, which is not installed\nhint: {install_hint('eval')}\n"
    )


def test_a_bundle_is_measured_without_torch() -> None:
    """As on an edge device, where neither torch nor onnx nor the training packages are installed."""
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors', 'datasets', 'pyarrow', 'yaml', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        "from slm.cli.main import main\n"
        "main(['eval', '--tokens', '50', '--threads', '1', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 50


def test_every_kind_of_file_measures_the_same(slm: Slm, exported: Path) -> None:
    rows = "".join(json.dumps({"id": 1, "story": story}) + "\n" for story in STORIES)
    Path("two.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + rows.encode()))
    Path("two.TXT").write_bytes(b"\xef\xbb\xbf" + Path("two.txt").read_bytes().replace(b"\n", b"\r\n"))
    model = exported / "onnx"
    plain = measured(slm, model, "--data", "two.txt")
    for arguments in (("two.TXT",), ("two.jsonl.gz", "--column", "story")):
        found = measured(slm, model, "--data", *arguments)
        for figure in ("tokens", "bytes", "documents", "loss"):
            assert found[figure] == plain[figure], (arguments, figure)
    refused = slm("eval", model, "--data", "two.txt", "--max-document-bytes", "20")
    assert refused.code == 1 and "two.txt, line 1: the document that begins here is longer than 20 bytes" in refused.err
