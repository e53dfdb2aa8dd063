"""Damaged bundles: each loads and answers, or is refused in one line; none crashes, hangs, or reads what is not its own."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle

examples = pytest.mark.examples(few=15, many=600)


def sealed_again(path: Path) -> None:
    """Makes the manifest fit what lies beside it: whoever damages a bundle on purpose does that too."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        beside = path / name
        if beside.is_file():
            content = beside.read_bytes()
            manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    file.unlink()
    file.write_text(json.dumps(manifest))


def contents(bundle: Bundle, *names: str) -> dict[str, bytes]:
    return {name: (bundle.path / name).read_bytes() for name in names}


@examples
def test_manifests(fuzz: Any, damage: Any, shared_bundle: Bundle, examples: int) -> None:
    seen = fuzz.explore(
        "bundle", shared_bundle.path, damage.of(contents(shared_bundle, "manifest.json"), links=True), examples
    )
    seen += fuzz.every("bundle", shared_bundle.path, "manifest.json", 2 * examples)
    assert seen["refused"] > examples


@examples
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_fields_of_sealed_files(fuzz: Any, shared_bundle: Bundle, name: str, examples: int) -> None:
    seen = fuzz.every("bundle", shared_bundle.path, name, examples, sealed_again)
    assert seen["refused"] or name == "tokenizer_config.json"


@examples
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/model.onnx"])
def test_files_that_were_sealed_again(fuzz: Any, damage: Any, shared_bundle: Bundle, name: str, examples: int) -> None:
    files = damage.of(contents(shared_bundle, name), links=True)
    seen = fuzz.explore("bundle", shared_bundle.path, files, examples // 2, sealed_again)
    assert seen["refused"]


@examples
def test_what_else_lies_in_a_bundle(fuzz: Any, damage: Any, shared_bundle: Bundle, examples: int) -> None:
    names = ("tokenizer_config.json", "generation_config.json", "genai_config.json", "onnx/model.onnx_data")
    files = damage.of(contents(shared_bundle, *names), links=True)
    seen = fuzz.explore("bundle", shared_bundle.path, files, examples // 2, sealed_again)
    assert seen["refused"]


@pytest.mark.parametrize(
    ("careless", "said"),
    [
        ("field", "KeyError: 'context'"),
        ("path", "opened "),
        ("memory", "MemoryError"),
        ("crash", "the process died"),
        ("wait", "it hangs"),
    ],
)
def test_the_test_notices(
    worker: Any, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless: str, said: str
) -> None:
    """The negative control: loaders that take a field for granted, leave the directory, or ask for a terabyte."""
    case = shutil.copytree(shared_bundle.path, tmp_path / "case" / "onnx")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    assert worker.ask("bundle", case)[0] == "works"
    manifest = json.loads((case / "manifest.json").read_text())
    (case / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "context"}))
    assert worker.ask("bundle", case)[0] == "refused"
    if careless == "wait":
        monkeypatch.setattr(worker, "seconds", 1)
    outcome, what = worker.ask(f"careless_{careless}", case)
    assert outcome == "wrong" and what.startswith(said)
