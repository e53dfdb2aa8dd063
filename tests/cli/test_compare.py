"""`slm compare`: which runs a name means, what differs, the figures, the picture, and runs that cannot be compared."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from slm.core.manifest import Bundle

Slm = Callable[..., Any]
Make = Callable[..., Path]

LOSSES = (6.0, 3.0, 2.0, 2.5)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_metrics(path: Path, losses: tuple[float, ...], tokens: int, seconds: float | None = None) -> None:
    """Writes a measurement before training, and an update of 10 and a measurement for each further loss."""
    rows: list[Mapping[str, Any]] = []
    for number, loss in enumerate(losses):
        where = {"updates": 10 * number, "tokens": tokens * number}
        where |= {} if seconds is None else {"elapsed_s": seconds * number}
        if number:
            rows.append({"type": "train", **where, "loss": loss + 0.5})
        rows.append({"type": "eval", **where, "loss": loss, **({} if seconds is None else {"bits_per_byte": loss / 2})})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def png(software: str) -> bytes:
    """The smallest beginning of a picture that a program wrote."""
    text = b"tEXtSoftware\0" + software.encode()
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))


@pytest.fixture(autouse=True)
def pictures_are_ours(
    request: pytest.FixtureRequest, curves_are_placeholders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The placeholder of a picture names the program, as the picture does."""
    if request.node.get_closest_marker("draws") is None:
        figure = MagicMock()
        figure.savefig.side_effect = lambda file, metadata, **_: Path(file).write_bytes(png(metadata["Software"]))
        monkeypatch.setattr("slm.train.metrics.new_figure", lambda *_: figure)


@pytest.fixture
def trained(shared_checkpoint: Path) -> Make:
    """Writes a run of slm train: (name, losses, values of the recipe by dotted name)."""
    from slm.train.recipe import load_recipe

    def make(name: str, losses: tuple[float, ...] = LOSSES, *values: str, text: str = "t", updates: int = 30) -> Path:
        run = Path("runs", name)
        recipe = load_recipe("tiny", [f"schedule.micro_steps={updates}", "schedule.warmup_micro_steps=1", *values])
        shutil.copytree(shared_checkpoint, run / "checkpoint" / "best")
        record = {"made_by": "slm train", "slm_version": "1.2", "parameters": 4321, "updates": 20}
        record |= {"recipe": recipe.model_dump(mode="json"), "tokenizer_sha256": "k"}
        write_json(run / "checkpoint" / "best" / "slm.json", record | {"data": {"validation": {"text_sha256": text}}})
        (run / "config.yaml").write_text("name: unread\n")
        write_metrics(run / "metrics.jsonl", losses, tokens=1000, seconds=2.0)
        return run

    return make


def tuned(
    name: str, losses: tuple[float, ...] = LOSSES, held_out: int = 5, pairs: bool = False, **settings: Any
) -> Path:
    """Writes an adapter as slm finetune leaves it."""
    path = Path("runs", name.replace("/", "/adapters/"))
    write_json(path / "adapter_config.json", {})
    metrics = {"validation_rows": held_out, "seconds": 12.5, "trainable_parameters": 77}
    metrics |= {"preferred_after": 0.9 if pairs else None}
    record = {"made_by": "slm finetune", "slm_version": "1.3", "settings": {"rank": 8, "seed": 6, **settings}}
    record |= {"base": {"path": "runs/x/checkpoint/best", "weights_sha256": "w", "tokenizer_sha256": "k"}}
    record |= {"data": {"path": "rows.jsonl", "sha256": "d" * 64}, "held_out_rows": [1, 2], "metrics": metrics}
    write_json(path / "slm.json", record)
    write_metrics(path / "metrics.jsonl", losses, tokens=100)
    return path


def compared(slm: Slm, *arguments: object) -> Any:
    result = slm("compare", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_what_differs_and_the_figures(slm: Slm, trained: Make) -> None:
    trained("one", LOSSES, "optimizer.weight_decay=0.2")
    trained("two", (6.0, 4.0, 3.5, 3.25), "seed=9", "qat.precision=int4")
    found = compared(slm, "one", "runs/two")
    assert found["differing"] == {
        "seed": [0, 9],
        "optimizer.weight_decay": [0.2, 0.1],
        "qat.precision": ["none", "int4"],
    }
    first, second = found["runs"]
    assert (first["name"], first["path"], first["kind"], first["state"]) == ("one", "runs/one", "train", "finished")
    assert (first["best_loss"], first["best_at_update"], first["last_loss"]) == (2.0, 20, 2.5)
    assert (first["bits_per_byte"], first["tokens"], first["updates"], first["seconds"]) == (1.0, 3000, 30, 6.0)
    assert (first["tokens_s"], first["parameters"], first["seed"], first["slm_version"]) == (500.0, 4321, 0, "1.2")
    assert (second["best_loss"], second["seed"]) == (3.25, 9)
    assert found["notes"] == [] and found["picture"] == "runs/compare.png"
    shown = slm("compare", "one", "two")
    assert shown.code == 0 and "weight_decay" in shown.out and "batch_size" not in shown.out
    assert "2.0000" in shown.out and "curves: runs/compare.png" in shown.err


def test_equal_recipes_and_values_that_an_older_version_did_not_record(slm: Slm, trained: Make) -> None:
    for name in ("one", "two"):
        trained(name)
    file = Path("runs/one/checkpoint/best/slm.json")
    record = json.loads(file.read_text())
    del record["recipe"]["qat"]
    write_json(file, record)
    result = slm("compare", "one", "two")
    assert result.code == 0 and "The recipes are equal." in result.err and "qat" not in result.out


@pytest.mark.draws
def test_the_picture_has_the_curves_and_is_replaced(slm: Slm, trained: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from slm.core import figures

    drawn: list[Any] = []
    monkeypatch.setattr(
        "slm.train.metrics.new_figure", lambda *size: drawn.append(figures.new_figure(*size)) or drawn[-1]
    )
    trained("one")
    trained("_$two$")
    for _ in range(2):
        assert slm("compare", "one", "_$two$", "--axis", "updates", "--out", "mine/c.png").code == 0
    axes = drawn[-1].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["one, training", "one, validation", r" _\$two\$, training", r" _\$two\$, validation"]
    assert list(lines["one, validation"].get_xdata()) == [0, 10, 20, 30]
    assert list(lines["one, training"].get_ydata()) == [3.5, 2.5, 3.0]
    assert axes.get_xlabel() == "updates" and axes.get_ylabel() == "loss (nats a token)"
    assert Path("mine/c.png").read_bytes().startswith(b"\x89PNG")
    assert len({line.get_color() for line in axes.lines}) == 2  # one for each run
    compared(slm, "one", "_$two$")
    assert list(drawn[-1].axes[0].lines[1].get_xdata()) == [0, 1000, 2000, 3000]


@pytest.mark.parametrize("content", [b"", b"text", png("Matplotlib")])
def test_a_file_of_another_program_stays(slm: Slm, trained: Make, content: bytes) -> None:
    trained("one")
    trained("two")
    Path("mine.png").write_bytes(content)
    result = slm("compare", "one", "two", "--out", "mine.png")
    assert result.code == 1 and "mine.png exists and is not a picture of slm compare" in result.err
    assert Path("mine.png").read_bytes() == content
    Path("mine.png").write_bytes(png("slm compare"))  # the control
    assert slm("compare", "one", "two", "--out", "mine.png").code == 0


def test_adapters_and_their_bundles(slm: Slm, trained: Make, shared_bundle: Bundle) -> None:
    run = trained("one")
    tuned("one/a")
    tuned("one/b", (5.0, 1.0), rank=4)
    merged = {
        "checkpoint": "runs/one/checkpoint/b",
        "slm.json": {"merged": {"adapter": {"path": "runs/one/adapters/b"}}},
    }
    for name, origin in (("onnx-a-int8", {"adapter": "runs/one/adapters/a"}), ("onnx", {}), ("onnx-b", merged)):
        shutil.copytree(shared_bundle.path, run / name)
        manifest = json.loads((run / name / "manifest.json").read_text())
        manifest["provenance"] = {"checkpoint": "runs/one/checkpoint/best", **origin}
        quantized = {"precision": "int8", "quality": {"kl_nats": 0.004, "same_top1": 0.97}}
        manifest |= quantized if name.endswith("int8") else {}
        write_json(run / name / "manifest.json", manifest)
    found = compared(slm, "one/a", "runs/one/adapters/b", "--axis", "updates")
    assert found["differing"] == {"rank": [8, 4]} and found["notes"] == []
    first, second = found["runs"]
    assert [first[key] for key in ("name", "kind", "seconds", "tokens", "tokens_s", "parameters", "seed")] == [
        "one/a", "finetune --lora", 12.5, 300, 24.0, 77, 6,
    ]  # fmt: skip
    (bundle,) = first["bundles"]
    assert (bundle["name"], bundle["precision"], bundle["kl_nats"], bundle["same_top1"]) == (
        "one/onnx-a-int8", "int8", 0.004, 0.97,
    )  # fmt: skip
    assert [each["name"] for each in second["bundles"]] == ["one/onnx-b"]  # of slm merge, then slm export
    assert "one/onnx-a-int8" in slm("compare", "one/a", "b").out  # a name that occurs once under ./runs
    trained("two")
    (own, other) = compared(slm, "one", "two/best")["runs"]  # a checkpoint is its run
    assert [each["name"] for each in own["bundles"]] == ["one/onnx"] and other["name"] == "two"


def test_full_training_is_a_run(slm: Slm, shared_checkpoint: Path) -> None:
    tuned("one/a")
    run = Path("runs/one-rows")
    shutil.copytree(shared_checkpoint, run / "checkpoint" / "best")
    record = json.loads(Path("runs/one/adapters/a/slm.json").read_text())
    record["settings"]["method"] = "full"
    write_json(run / "checkpoint" / "best" / "slm.json", {"made_by": "slm train", "finetuned": record})
    write_metrics(run / "finetune" / "metrics.jsonl", LOSSES, tokens=100)
    found = compared(slm, "one/a", "one-rows")
    assert found["runs"][1]["kind"] == "finetune --full" and found["differing"] == {"method": ["lora", "full"]}


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        (lambda t: t("one"), lambda t: tuned("x/a"), "have different recipes, and their losses are not comparable"),
        (lambda t: t("one"), lambda t: t("two", text="u"), "measured on different text"),
        (lambda t: t("one"), lambda t: t("two", LOSSES, "evaluation.windows=2"), "measured on different text"),
        (lambda t: tuned("x/a"), lambda t: tuned("x/b", pairs=True), "one is per pair, the other per token"),
        (lambda t: tuned("x/a"), lambda t: tuned("x/b", held_out=0), "x/b: no rows were held out"),
        (
            lambda t: t("one"),
            lambda t: t("two", updates=50),
            "two is unfinished: training stopped after 20 of 50 updates",
        ),
    ],
)
def test_what_is_not_comparable_is_said(
    slm: Slm, trained: Make, first: Callable[[Make], Path], second: Callable[[Make], Path], note: str
) -> None:
    paths = first(trained), second(trained)
    result = slm("compare", *paths)
    assert result.code == 0 and note in result.err, result.err
    assert any(note in each for each in compared(slm, *paths)["notes"])


def test_names_that_repeat_are_paths(slm: Slm, trained: Make) -> None:
    trained("one")
    shutil.copytree("runs/one", "elsewhere/one")
    assert [each["name"] for each in compared(slm, "one", "elsewhere/one")["runs"]] == ["runs/one", "elsewhere/one"]


def break_line(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"type": "eval", "loss": "x"}\n')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (break_line, "runs/two/metrics.jsonl, line 8: has no number as 'updates'"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "runs/two has no metrics yet"),
        (lambda run: (run / "metrics.jsonl").unlink(), "runs/two"),
        (lambda run: (run / "checkpoint/best/slm.json").write_text("{"), "slm.json"),
        (lambda run: shutil.rmtree(run / "checkpoint"), "recipe is wrong|config.yaml"),
    ],
)
def test_a_damaged_run_is_one_line(slm: Slm, trained: Make, spoil: Callable[[Path], object], said: str) -> None:
    trained("one")
    spoil(trained("two"))
    result = slm("compare", "one", "two")
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and len(lines) == 1 and any(part in lines[0] for part in said.split("|")), result.err
    assert not Path("runs/compare.png").exists() and "Traceback" not in result.err


def test_a_line_that_is_being_written_is_left_out(slm: Slm, trained: Make) -> None:
    trained("one")
    file = trained("two") / "metrics.jsonl"
    file.write_text(file.read_text() + '{"type": "ev')
    assert compared(slm, "one", "two")["runs"][1]["updates"] == 30


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("one",), 2, "name two runs or more"),
        (("one", "one/best"), 1, "runs/one is named twice"),
        (("one", "nothing"), 1, "not found: nothing"),
        (("one", "tuning"), 1, "runs/tuning has no metrics yet: fine-tuning was interrupted"),
        (("one", "foreign"), 1, "runs/foreign is an adapter without metrics.jsonl"),
        (("one", "rows.jsonl"), 1, "rows.jsonl is not a run"),
        (("one", "two", "--out", "c.jpg"), 2, "is not the name of a .png file"),
    ],
)
def test_what_is_no_comparison(slm: Slm, trained: Make, arguments: tuple[str, ...], code: int, said: str) -> None:
    trained("one")
    Path("runs/tuning/trainer").mkdir(parents=True)
    write_json(Path("runs/foreign/adapter_config.json"), {})
    Path("rows.jsonl").touch()
    result = slm("compare", *arguments)
    assert result.code == code and said in result.err and result.out == "", result.err
