"""The steps called from Python: the chain of results, checks of arguments, progress, and what importing slm loads."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slm
from slm.core.checkpoint import read_info
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.steps.bars import NotebookProgress, RichProgress, shown

ROWS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "red", "blue", "cat", "dog")]
QUIET: dict[str, Any] = {"progress": False}
QUICK: dict[str, Any] = {"epochs": 1, "rank": 2, "samples": 1, **QUIET}

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture
def run(shared_checkpoint: Path) -> Path:
    """A run with a checkpoint, and a file of rows."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return Path("runs/tiny")


def test_each_result_is_the_next_step_s_input(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = slm.finetune("rows.jsonl", **QUICK)
    assert (adapter.path, os.fspath(adapter)) == (run / "adapters" / "rows", "runs/tiny/adapters/rows")
    bundle = slm.export(adapter, **QUIET)
    assert (bundle.path, bundle.format, bundle.checkpoint) == (run / "onnx-rows", "onnx", adapter.base)
    assert bundle.adapter == adapter.path and bundle.parity is not None and bundle.bytes == bundle.bundle.bytes  # type: ignore[union-attr]
    small = slm.quantize(bundle, "int8", tokens=256, window=64, calibration_tokens=64, **QUIET)
    assert (small.path, small.source) == (run / "onnx-rows-int8", bundle.path)
    assert 0 < small.kl_nats < 0.02 and small.bytes < bundle.bytes
    scores = slm.evaluate([adapter, small], task="rows.jsonl", metric="exact", max_tokens=4, **QUIET)
    assert list(scores.scores) == [str(adapter.path), str(small.path)]
    assert scores.page == Path("runs/eval-rows/report.html") and scores.page.is_file()
    assert repr(scores).startswith("Comparison(metric='exact', rows=6, scores={") and "<table>" in scores._repr_html_()
    model = slm.load(small, threads=1)
    assert model.about is not None and model.about.path == small.path
    assert slm.evaluate(small, tokens=100, **QUIET).text.tokens >= 100  # type: ignore[union-attr]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_the_command_and_the_function_do_the_same(slm: Callable[..., Any], run: Path) -> None:
    from slm.steps.finetuning import finetune

    result = slm("finetune", "--lora", "rows.jsonl", "--epochs", "1", "--rank", "2", "--samples", "1")
    assert result.code == 0, result.err
    finetune("rows.jsonl", out="mine", **QUICK)
    theirs, mine = run / "adapters" / "rows", Path("mine")
    assert (theirs / "adapter_model.safetensors").read_bytes() == (mine / "adapter_model.safetensors").read_bytes()
    records = [read_info(path) for path in (theirs, mine)]
    for record in records:
        record["metrics"].pop("seconds")
    assert records[0] == records[1]


def test_the_working_directory_as_rows_gives_the_adapter_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("chats").mkdir()
    Path("rows.jsonl").rename("chats/rows.jsonl")
    monkeypatch.chdir("chats")
    assert slm.finetune(".", base=Path("..") / run / "checkpoint/best", **QUICK).path.name == "chats"


def test_full_training_is_another_checkpoint(run: Path) -> None:
    made = slm.finetune(full="rows.jsonl", epochs=1, samples=0, **QUIET)
    assert made.path == Path("runs/tiny-rows/checkpoint/best")
    assert slm.export(made, **QUIET).path == Path("runs/tiny-rows/onnx")


def test_training_takes_values_of_the_recipe() -> None:
    short = {"schedule.micro_steps": 2, "schedule.warmup_micro_steps": 1, "evaluation.every_micro_steps": 2}
    sizes = {"evaluation.windows": 1, "batch.batch_size": 1, "batch.context": 16, "model.sliding_window": 8}
    made = slm.train(recipe="tiny", set={**short, **sizes, "evaluation.prompts": ["The"]}, seed=4, **QUIET)
    assert (made.path, made.updates) == (Path("runs/tiny/checkpoint/best"), 2)
    recipe = read_info(made.path)["recipe"]
    assert recipe["seed"] == 4 and recipe["evaluation"]["prompts"] == ["The"] and recipe["batch"]["context"] == 16
    with pytest.raises(slm.ArgumentError, match="leave out --seed, --set"):
        slm.train(resume=True, seed=5, set=["seed=1"])
    assert slm.train(resume=True, out="tiny", **QUIET).updates == 2


def test_gguf_and_slots(run: Path, make_adapter: Callable[..., Path]) -> None:
    file = slm.export(format="gguf", gguf_type="q8_0", **QUIET)
    assert file.path == run / "gguf" / "tiny-q8_0.gguf" and file.bytes == file.path.stat().st_size
    assert file.bundle is None and file.written is not None and file.written.types.keys() == {"Q8_0", "F32"}
    Path("runs/tiny/adapters").mkdir()
    adapter = make_adapter(run / "adapters" / "mine", run / "checkpoint" / "best")
    written = slm.export(adapter, "onnx-adapter", **QUIET)
    assert written.path == run / "adapters" / "mine.onnx_adapter" and written.checkpoint == run / "checkpoint" / "best"
    assert written.products == 16 and written.bytes == written.path.stat().st_size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slm.finetune(), "give --lora FILE, --full FILE or --recipe FILE"),
        (lambda: slm.finetune("rows.jsonl", full="rows.jsonl"), "give either --lora or --full, not both"),
        (lambda: slm.finetune(full="rows.jsonl", dora=True), "--dora is an option of adapters"),
        (lambda: slm.finetune("rows.jsonl", keep="last", patience=2), "--patience requires --keep best"),
        (lambda: slm.finetune("rows.jsonl", val="rows.jsonl", hold_out=0.1), "not both"),
        (lambda: slm.finetune("rows.jsonl", hold_out=1.5), "hold_out is float 1.5; it must be a number above 0 and at"),
        (lambda: slm.finetune("rows.jsonl", rank=0), "rank is int 0; it must be a whole number of at least 1"),
        (lambda: slm.finetune("rows.jsonl", rank=True), "rank is bool True; it must be a whole number"),
        (lambda: slm.finetune("rows.jsonl", learning_rate=float("nan")), "learning_rate is float nan"),
        (lambda: slm.finetune("rows.jsonl", keep="worst"), "keep is str 'worst'; it must be 'best' or 'last'"),
        (lambda: slm.finetune("rows.jsonl", ranks=8), "finetune() has no argument 'ranks'"),
        (lambda: slm.finetune(["rows.jsonl"]), "lora is a list; it must be a string or a path or None"),
        (lambda: slm.finetune(""), "a path is empty"),
        (lambda: slm.finetune("none.jsonl"), "fine-tuning data not found: none.jsonl"),
        (lambda: slm.train(data=["a.txt", 1]), "data[1] is int 1; it must be a string or a path"),
        (lambda: slm.train(log="wandb"), "log is str 'wandb'; it must be a list"),
        (lambda: slm.train(log=["wandbs"]), "log[0] is str 'wandbs'; it must be 'tensorboard' or 'wandb' or 'mlflow'"),
        (lambda: slm.train("tiny"), "train(): too many positional arguments"),
        (lambda: slm.finetune("rows.jsonl", progress=None), "progress is None; it must be an object with the methods"),
        (lambda: slm.finetune("/"), "'' cannot name an adapter"),
        (lambda: slm.train(set=["schedule.epoch=1"]), "schedule.epoch"),
        (lambda: slm.export("tiny", "onyx"), "format is str 'onyx'; it must be 'onnx' or 'gguf' or 'onnx-adapter'"),
        (lambda: slm.export("tiny", text="x.txt"), "--text requires --device cuda or webgpu"),
        (lambda: slm.export("tiny", device="cuda", text="x.txt"), "text not found: x.txt"),
        (lambda: slm.export("tiny", "onnx-adapter"), "--onnx-adapter requires --adapter"),
        (lambda: slm.quantize("tiny", block_size=30), "block_size is int 30; it must be 128 or 64 or 32 or 16 or None"),
        (lambda: slm.quantize("tiny", max_drop=0.1), "--max-drop requires --task"),
        (lambda: slm.quantize("tiny", head_bits=4), "--head-bits requires --int4"),
        (lambda: slm.quantize("tiny", data="none.txt"), "text not found: none.txt"),
        (lambda: slm.evaluate(["tiny", "tiny"]), "several models require --task"),
        (lambda: slm.evaluate("tiny", task="rows.jsonl", tokens=5), "--task is evaluated alone"),
        (lambda: slm.evaluate("tiny", min=0.5), "--min requires --task"),
        (lambda: slm.evaluate("nothing"), "not found: nothing"),
    ],
)
def test_wrong_calls_are_errors_that_write_nothing(run: Path, call: Callable[[], Any], message: str) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(slm.SlmError) as error:
        call()
    assert message in str(error.value), str(error.value)
    assert sorted(Path().rglob("*")) == before


def test_a_score_below_the_minimum_keeps_its_measurements(run: Path) -> None:
    with pytest.raises(slm.SlmError, match=r"below --min 50\.0%") as error:
        slm.evaluate("tiny", task="rows.jsonl", metric="exact", min=0.5, max_tokens=2, **QUIET)
    assert Path("runs/eval-rows/report.html").is_file()
    compared = error.value.comparison  # type: ignore[attr-defined]
    assert compared.scores == {"runs/tiny/checkpoint/best": 0.0}
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # noqa: S301  # what was just made


class Notes:
    """Collects the notes of a step."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Does nothing."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        self.said.append(text)


def test_progress_goes_where_the_caller_says(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    notes = Notes()
    slm.finetune("rows.jsonl", **{**QUICK, "progress": notes})
    assert notes.said[0] == "Using runs/tiny/checkpoint/best (newest checkpoint)."
    assert any(line.startswith("epoch 1/1") for line in notes.said)
    assert capfd.readouterr() == ("", "")
    slm.finetune("rows.jsonl", overwrite=True, **{**QUICK, "progress": True})
    assert "Using runs/tiny/checkpoint/best (newest checkpoint)." in capfd.readouterr().err


class Display:
    """A notebook's display: keeps what is shown, by the handle."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []
        self.handles = 0

    def __call__(self, data: dict[str, str], raw: bool, display_id: bool) -> "Display":
        assert raw and display_id
        self.handles += 1
        self.shown.append(data)
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(data)


def test_a_notebook_has_one_bar_that_disappears(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slm.steps.bars._REDRAW_S", 0.0)
    display = Display()
    progress: Progress = NotebookProgress(display)
    progress.start("training", 4, "updates")
    progress.advance(2, loss="1.5", text="<b>")
    progress.note("half")
    progress.start("reading", None, "rows")
    progress.finish()
    assert display.handles == 1
    assert [each["text/plain"].split(" 0:00")[0] for each in display.shown] == [
        "training 0/4 updates", "training 2/4 updates", "reading 0 rows", "",
    ]  # fmt: skip
    assert display.shown[1]["text/plain"].endswith("left 0:00 loss 1.5  text <b>")
    assert (
        '<progress value="2" max="4"' in display.shown[1]["text/html"] and "&lt;b&gt;" in display.shown[1]["text/html"]
    )
    assert "value" not in display.shown[2]["text/html"] and display.shown[3]["text/html"] == ""
    assert capsys.readouterr().out == "half\n"


def test_the_display_depends_on_where_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(shown(True), RichProgress)
    notes = Notes()
    assert shown(notes) is notes

    class Shell:
        kernel = None

    ipython, displaying = type(sys)("IPython"), type(sys)("IPython.display")
    ipython.get_ipython = lambda: Shell  # type: ignore[attr-defined]
    displaying.display = Display()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displaying)
    assert isinstance(shown(True), RichProgress)  # IPython in a terminal
    Shell.kernel = object()  # type: ignore[assignment]
    assert isinstance(shown(True), NotebookProgress)


def test_importing_slm_and_naming_a_step_loads_nothing_heavy() -> None:
    script = (
        "import sys, slm; slm.finetune, slm.quantize\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pydantic', 'rich', 'click'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "import slm.train.recipe\n"
        "assert callable(slm.train) and slm.train.recipe.load_recipe and 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_an_adapter_is_exported_by_name(slm: Callable[..., Any], run: Path) -> None:
    assert slm("finetune", "--lora", "rows.jsonl", "--epochs", "1", "--samples", "0").code == 0
    result = slm("export", "--onnx", "tiny/rows")
    assert result.code == 0, result.err
    assert Bundle.open(run / "onnx-rows").manifest.provenance["adapter"] == "runs/tiny/adapters/rows"
    named = slm("export", "--onnx", "tiny")  # a run is its checkpoint, even if it has an adapter
    assert named.code == 0 and "runs/tiny/onnx " in named.out
    both = slm("export", "--onnx", "tiny/rows", "--adapter", "tiny/rows")
    assert both.code == 1 and "is an adapter, and so is" in both.err


def test_the_packages_pickle_by_name() -> None:
    """Ray ships functions whose globals have these modules."""
    import slm.train.recipe

    for package in (slm, slm.train):
        assert pickle.loads(pickle.dumps(package)) is package  # noqa: S301  # what was just made
