"""Which artifact is the newest finished one, by what artifacts record rather than by the times of their files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slm.core import artifacts
from slm.core.artifacts import newest_bundle, newest_checkpoint, newest_model, unfinished
from slm.core.errors import SlmError
from slm.core.names import known_names, resolve, short_name

MODEL = ("checkpoint", "bundle")
RECIPE = {"schedule": {"micro_steps": 40}, "batch": {"accumulation": 2}, "evaluation": {"patience": None}}


def created(hour: int) -> dict[str, str]:
    return {"created": f"2026-01-01T{hour:02}:00:00+00:00"}


def checkpoint(path: str, hour: int | None, **record: Any) -> dict[str, Any]:
    directory = Path(path)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    record |= {} if hour is None else created(hour)
    (directory / "slm.json").write_text(json.dumps(record))
    return record


def bundle(path: str, hour: int | None, of: dict[str, Any] | None = None, precision: str = "float32") -> None:
    directory = Path(path)
    directory.mkdir(parents=True)
    manifest: dict[str, Any] = {"schema_version": 1, "precision": precision, "target": "fused"}
    manifest |= {} if of is None else {"provenance": {"slm.json": of}}
    (directory / "manifest.json").write_text(json.dumps(manifest | ({} if hour is None else created(hour))))


def adapter(path: str, hour: int) -> None:
    directory = Path(path)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "slm.json").write_text(json.dumps(created(hour)))


def run(path: str, updates: int, losses: dict[int, float] | None = None, patience: int | None = None) -> None:
    """A training run with its last checkpoint after so many of 20 updates, and measurements."""
    recipe = RECIPE | {"evaluation": {"patience": patience}}
    checkpoint(f"{path}/checkpoint/last", 5, made_by="slm train", updates=updates, recipe=recipe)
    rows = [{"type": "eval", "updates": at, "loss": loss} for at, loss in (losses or {0: 6.0}).items()]
    Path(path, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"type": "eval", "upd')


def chosen() -> str:
    choice = newest_model()
    assert choice is not None
    return str(choice.artifact.path)


def test_nothing_there() -> None:
    assert newest_model() is None
    for find in (newest_checkpoint, newest_bundle):
        with pytest.raises(SlmError, match=r"there is no .* under \./runs") as caught:
            find()
        assert caught.value.hint is not None and "slm " in caught.value.hint


def test_a_checkpoint_is_used_until_it_is_exported_and_again_when_it_is_newer() -> None:
    record = checkpoint("runs/a/checkpoint/best", 1)
    assert chosen() == "runs/a/checkpoint/best"
    bundle("runs/a/onnx", 2, record)
    assert chosen() == "runs/a/onnx"
    checkpoint("runs/b/checkpoint/imported", 3)
    assert chosen() == "runs/b/checkpoint/imported"
    with pytest.raises(SlmError, match="the newest model has no bundle: runs/b/checkpoint/imported") as caught:
        newest_bundle()
    assert caught.value.hint is not None and "runs/a/onnx" in caught.value.hint
    bundle("runs/a/onnx-int8", 4, record, "int8")
    assert chosen() == "runs/a/onnx-int8"


def test_copying_does_not_change_what_is_newest() -> None:
    record = checkpoint("runs/a/checkpoint/best", 1)
    bundle("runs/a/onnx", 2, record)
    bundle("runs/a/onnx-int8", 3, record, "int8")
    shutil.copytree("runs", "copied/runs")
    for number, marker in enumerate(
        ("a/onnx-int8/manifest.json", "a/onnx/manifest.json", "a/checkpoint/best/slm.json")
    ):
        os.utime(Path("runs", marker), (1e9 + number, 1e9 + number))
    assert chosen() == "runs/a/onnx-int8"
    assert newest_bundle(lambda manifest: manifest["precision"] == "float32").artifact.path == Path("runs/a/onnx")


def test_without_a_recorded_time_the_lineage_and_then_the_file_count() -> None:
    record = checkpoint("runs/a/checkpoint/best", None, made_by="slm import")
    bundle("runs/a/onnx", None, record)
    os.utime("runs/a/onnx/manifest.json", (1e9, 1e9))  # older than the checkpoint's file, and yet made from it
    assert chosen() == "runs/a/onnx"
    bundle("runs/b/onnx", None)
    assert chosen() == "runs/b/onnx"


def test_the_best_checkpoint_of_a_training_run() -> None:
    checkpoint("runs/a/checkpoint/best", 1)
    checkpoint("runs/a/checkpoint/last", 3)
    checkpoint("runs/a/checkpoint/update-0000010", 4)
    assert newest_checkpoint().artifact.path == Path("runs/a/checkpoint/best")
    checkpoint("runs/a/checkpoint/pairs", 2)
    assert newest_checkpoint().artifact.path == Path("runs/a/checkpoint/pairs")


@pytest.mark.parametrize(
    ("updates", "losses", "patience", "said"),
    [
        (20, None, None, None),
        (8, {0: 6.0, 8: 5.0}, None, "training stopped after 8 of 20 updates"),
        (0, {0: 6.0}, None, "training stopped after 0 of 20 updates"),
        (12, {4: 5.0, 8: 5.5, 12: 5.6}, 2, None),  # ended early, as the recipe asks
        (12, {4: 5.0, 8: 5.5}, 2, "training stopped after 12 of 20 updates"),
        (12, {20: 5.0}, None, None),
    ],
)
def test_whether_training_ended(
    updates: int, losses: dict[int, float] | None, patience: int | None, said: str | None
) -> None:
    run("runs/a", updates, losses, patience)
    found = unfinished(Path("runs/a"))
    assert (found and found.reason) == said


def test_an_unfinished_run_is_passed_over_and_named() -> None:
    record = checkpoint("runs/a/checkpoint/best", 1)
    bundle("runs/a/onnx", 2, record)
    run("runs/b", 8)
    Path("runs/c").mkdir()
    Path("runs/c/metrics.jsonl").touch()
    choice = newest_model()
    assert choice is not None and choice.artifact.path == Path("runs/a/onnx")
    notes = "\n".join(choice.notes)
    assert (
        "Skipped runs/b: training stopped after 8 of 20 updates; continue it with slm train --resume --out runs/b"
        in notes
    )
    assert "name runs/b/checkpoint/last" in notes
    assert "Skipped runs/c: training has not saved a checkpoint" in notes
    path, said = resolve("b", MODEL)  # named, it is used, and that it is unfinished is said
    assert path == Path("runs/b/checkpoint/last") and "Note: runs/b is unfinished" in "\n".join(said)


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "trainer/state.json"])
def test_a_run_that_saved_nothing_is_not_nothing(left: str) -> None:
    Path("runs/a", left).parent.mkdir(parents=True)
    Path("runs/a", left).touch()
    with pytest.raises(SlmError, match="there is no finished model under"):
        newest_model()


def test_a_numbered_checkpoint_counts_where_there_is_no_other() -> None:
    checkpoint("runs/a/checkpoint/update-0000010", 1)
    assert newest_checkpoint().artifact.path == Path("runs/a/checkpoint/update-0000010")


def test_nothing_but_unfinished_runs_is_an_error_and_no_other_model() -> None:
    run("runs/b", 8)
    for find in (newest_model, newest_checkpoint, newest_bundle):
        with pytest.raises(SlmError, match=r"finished .*: runs/b: training stopped after 8 of 20 updates") as caught:
            find()
        assert caught.value.hint is not None and "slm train --resume --out runs/b" in caught.value.hint


def test_a_newer_adapter_is_mentioned() -> None:
    bundle("runs/a/onnx", 2, checkpoint("runs/a/checkpoint/best", 1))
    adapter("runs/a/adapters/data", 3)
    choice = newest_model()
    assert choice is not None and "slm export --onnx --adapter runs/a/adapters/data" in choice.notes[0]
    bundle("runs/a/onnx-data", 4)
    choice = newest_model()
    assert choice is not None and choice.notes == ()


def test_what_is_no_artifact_is_left_out_and_what_is_damaged_is_not() -> None:
    Path("runs/site").mkdir(parents=True)
    Path("runs/site/manifest.json").write_text('{"name": "an app"}')
    Path("runs/.b.partial-1/onnx").mkdir(parents=True)
    Path("runs/.b.partial-1/onnx/manifest.json").write_text('{"precision": "float32"}')
    assert artifacts.artifacts() == []
    bundle("runs/a/onnx", 2)
    Path("runs/a/onnx/manifest.json").write_text("{")
    assert chosen() == "runs/a/onnx"  # opening it says what is wrong


def test_names() -> None:
    record = checkpoint("runs/tiny/checkpoint/best", 1)
    bundle("runs/tiny/onnx", 2, record)
    bundle("runs/tiny/onnx-int8", 3, record, "int8")
    adapter("runs/tiny/adapters/data", 4)
    bundle("runs/other/onnx", 1)
    bundle("runs/alone", 1)
    wanted = {
        ("tiny", MODEL): "runs/tiny/onnx-int8",
        ("runs/tiny/", MODEL): "runs/tiny/onnx-int8",
        ("tiny", ("checkpoint",)): "runs/tiny/checkpoint/best",
        ("tiny", ("bundle",)): "runs/tiny/onnx-int8",
        ("tiny", ("adapter",)): "runs/tiny/adapters/data",
        ("tiny/best", MODEL): "runs/tiny/checkpoint/best",
        ("tiny/checkpoint/best", MODEL): "runs/tiny/checkpoint/best",
        ("tiny/data", ("adapter",)): "runs/tiny/adapters/data",
        ("data", ("adapter",)): "runs/tiny/adapters/data",
        ("tiny/adapters/data", ("adapter",)): "runs/tiny/adapters/data",
        ("onnx-int8", ("bundle",)): "runs/tiny/onnx-int8",
        ("alone", MODEL): "runs/alone",
        ("runs/tiny/onnx", MODEL): "runs/tiny/onnx",
    }
    for (name, kinds), path in wanted.items():
        assert resolve(name, kinds)[0] == Path(path), name  # type: ignore[arg-type]
    assert resolve("runs/tiny/onnx", MODEL)[1] == ()  # a path needs no explanation
    assert "tiny/onnx-int8" in known_names(MODEL) and "tiny/data" not in known_names(MODEL)
    assert short_name(Path("runs/tiny/checkpoint/best")) == "tiny/best" and short_name(Path("/x/y")) == "y"
    with pytest.raises(SlmError, match="onnx is ambiguous") as caught:
        resolve("onnx", MODEL)
    assert caught.value.hint == "use one of other/onnx, tiny/onnx"


@pytest.mark.parametrize(
    ("name", "kinds", "message", "hint"),
    [
        ("tinny", MODEL, "not found: tinny", "did you mean tiny?"),
        ("tinny/onnx-int8", MODEL, "not found: tinny/onnx-int8", "did you mean tiny/onnx-int8"),
        ("runs/tiny/onxx", MODEL, "not found: runs/tiny/onxx", "tiny/onnx"),
        ("dato", ("adapter",), "not found: dato", "did you mean tiny/data?"),
        ("Once upon a time", MODEL, "not found: Once upon a time", 'slm generate -p "Once upon a time"'),
        ("Costs $5 today", MODEL, "not found", "slm generate -p 'Costs $5 today'"),
        ("google/gemma-3-270m", MODEL, "not found: google/gemma-3-270m", "slm import google/gemma-3-270m"),
        ("runs/tony", MODEL, "not found: runs/tony", "did you mean tiny?"),
        ("runs/quite-another", MODEL, "not found: runs/quite-another", "names under ./runs"),  # no id of the hub
        ("tiny/best", ("bundle",), "not a bundle", "slm export --onnx runs/tiny/checkpoint/best"),
        ("tiny/onnx", ("checkpoint",), "not a checkpoint: runs/tiny/onnx is a bundle", ""),
        ("tiny/data", MODEL, "neither a checkpoint nor a bundle", "--adapter runs/tiny/adapters/data"),
        ("tiny/onnx", ("adapter",), "not an adapter: runs/tiny/onnx is a bundle", "slm finetune"),
        ("words.txt", MODEL, "neither a checkpoint nor a bundle: words.txt", "slm train"),
        ("Once", MODEL, "not found: Once", "to continue that text: slm generate -p Once"),
        ("../tiny", MODEL, "not found: ../tiny", ""),
        ("", MODEL, "the name of an artifact is empty", ""),
        ("a long text " * 99, MODEL, "not found: a long text", "slm generate -p"),
        ("~nobody-here/x", MODEL, "not found: ~nobody-here/x", ""),
    ],
)
def test_what_to_type_instead(name: str, kinds: Any, message: str, hint: str) -> None:
    bundle("runs/tiny/onnx", 2, checkpoint("runs/tiny/checkpoint/best", 1))
    bundle("runs/tiny/onnx-int8", 3, precision="int8")
    adapter("runs/tiny/adapters/data", 4)
    Path("words.txt").write_text("Once.")
    with pytest.raises(SlmError) as caught:
        resolve(name, kinds)
    assert message in caught.value.message and hint in (caught.value.hint or "")


def test_commands_in_sentences_can_be_copied() -> None:
    record = checkpoint("runs/my run/checkpoint/best", None, made_by="slm import")
    assert record
    with pytest.raises(SlmError) as error:
        resolve("my run/best", ("bundle",))
    assert "with slm export --onnx 'runs/my run/checkpoint/best'" in str(error.value.hint)
    _, sentences = resolve("my run", ("checkpoint", "bundle"))
    assert sentences[0] == "Using runs/my run/checkpoint/best (newest checkpoint of runs/my run, not exported yet)."
