"""Bundles: every file is checked by name before anything is run, and nothing outside the directory is opened."""

import json
import shutil
from pathlib import Path

import pytest

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle


@pytest.fixture
def copy(shared_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_bundle.path, tmp_path / "copy"))


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_everything_is_sealed(shared_bundle: Bundle) -> None:
    files = {p.relative_to(shared_bundle.path).as_posix() for p in shared_bundle.path.rglob("*") if p.is_file()}
    assert files - {"manifest.json"} == set(shared_bundle.manifest.files)
    assert files >= {"onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "tokenizer_config.json",
                     "config.json", "generation_config.json"}  # fmt: skip


def test_a_copy_opens(copy: Path) -> None:
    assert Bundle.open(copy).manifest.precision == "float32"


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damage_is_refused_by_name(copy: Path, name: str, damage: str) -> None:
    file = copy / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    said = {"missing": "is missing", "truncated": "bytes instead of", "altered": "was altered"}[damage]
    with pytest.raises(SlmError, match=f"{name} .*{said}"):
        slm.load(copy)


def test_files_outside_the_directory_are_refused(copy: Path) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit_manifest(copy, files={"../secret": entry})
    with pytest.raises(SlmError, match="leads out of the directory"):
        Bundle.open(copy)


def test_a_graph_that_is_not_sealed_is_refused(copy: Path) -> None:
    edit_manifest(copy, model="onnx/other.onnx")
    with pytest.raises(SlmError, match=r"onnx/other.onnx is not listed in manifest.json"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "manifest schema 2"),
        ({"precision": "int3"}, "precision"),
        ({"surprise": 1}, "surprise"),
        ({"context": "long"}, "context"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(copy: Path, change: dict[str, object], said: str) -> None:
    edit_manifest(copy, **change)
    with pytest.raises(SlmError, match=said):
        Bundle.open(copy)


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="not found"):
        slm.load(tmp_path / "nothing")
    with pytest.raises(SlmError, match="neither a checkpoint nor a bundle"):
        slm.load(tmp_path)
    with pytest.raises(SlmError, match="not a bundle"):
        Bundle.open(tmp_path)
