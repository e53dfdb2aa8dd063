"""The licence travels from a model's card to everything that is made from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.checkpoint import read_info
from slm.core.config import ModelConfig
from slm.core.licence import foreign_notices, modified
from slm.core.manifest import Bundle
from tests import quick

SENTENCE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


@pytest.fixture
def gemma(shared_checkpoint: Path, tmp_path: Path) -> Path:
    """A directory whose model card states Gemma's licence."""
    path = Path(shutil.copytree(shared_checkpoint, tmp_path / "gemma"))
    (path / "slm.json").unlink()
    (path / "README.md").write_text("---\ntags: [x]\nlicense: gemma\n---\n# A model\n")
    return path


def check(path: Path, notices: list[str], *changes: str) -> None:
    """The notice, its link and a statement of each change, recorded and in a file of its own."""
    assert notices[0] == SENTENCE
    assert "https://ai.google.dev/gemma/terms" in notices[1]
    assert [notice.split(" by slm")[0] for notice in notices[2:]] == [f"Modified: {change}" for change in changes]
    assert (path / "NOTICE").read_text().splitlines() == notices


def test_from_import_to_everything(gemma: Path, slm: Callable[..., Any]) -> None:
    stored = "weights of 54 tensors (float32) stored as float32"
    assert slm("import", gemma).code == 0
    run = Path("runs/gemma")
    check(run / "checkpoint/imported", read_info(run / "checkpoint/imported")["notices"], stored)

    assert slm("export", "--onnx").code == 0
    check(run / "onnx", [*Bundle.open(run / "onnx").manifest.notices], stored, "exported to ONNX")

    assert slm("quantize", "--int8", *quick.QUANTIZE).code == 0
    notices = [*Bundle.open(run / "onnx-int8").manifest.notices]
    check(run / "onnx-int8", notices, stored, "exported to ONNX", "quantized to INT8")

    Path("data.jsonl").write_text("".join(f'{{"prompt": "a{i}", "completion": "b"}}\n' for i in range(12)))
    assert slm("finetune", "--lora", "data.jsonl", *quick.FINETUNE).code == 0
    check(run / "adapters/data", read_info(run / "adapters/data")["notices"], stored, "fine-tuned with LoRA")

    assert slm("export", "--onnx", "--adapter", run / "adapters/data").code == 0
    merged = [*Bundle.open(run / "onnx-data").manifest.notices]
    check(run / "onnx-data", merged, stored, "fine-tuned with LoRA", "merged with a LoRA adapter", "exported to ONNX")

    assert slm("info", run / "onnx", "--json").out.count(SENTENCE) >= 1

    assert slm("export", "--gguf", "--gguf-type", "f32").code == 0
    assert slm("import", run / "gguf/gemma-f32.gguf", "--out", "back").code == 0
    back = read_info(Path("back"))["notices"]
    check(Path("back"), back, stored, "converted to GGUF (F32)", "weights of 54 tensors (F32) stored as float32")


def test_a_directory_used_without_import_carries_it_too(gemma: Path, slm: Callable[..., Any]) -> None:
    assert slm("export", "--onnx", gemma, "--out", "bundle").code == 0
    check(Path("bundle"), [*Bundle.open(Path("bundle")).manifest.notices], "exported to ONNX")


@pytest.mark.parametrize(
    ("card", "vocabulary", "said"),
    [
        ("---\nlicense: gemma\n---\n", 320, SENTENCE),
        ('---\nlicense: "gemma"  # see there\n---\n', 320, SENTENCE),
        ("---\nlicense: apache-2.0\n---\n", 320, "model states the licence apache-2.0"),
        ("---\nlicense: apache-2.0\n---\n", 262_144, SENTENCE),  # its vocabulary says otherwise
        ("---\nlicense:\n- gemma\n---\n", 320, SENTENCE),
        ("---\nlicense: [gemma]\n---\n", 320, SENTENCE),
        ("---\nlicense:\nlanguage: en\n---\n", 320, None),
        (None, 262_144, SENTENCE),
        (None, 262_208, SENTENCE),
        (None, 320, None),
        ("# license: gemma\n", 320, None),
    ],
)
def test_what_a_foreign_directory_says(
    config: ModelConfig, tmp_path: Path, card: str | None, vocabulary: int, said: str | None
) -> None:
    (tmp_path / "model").mkdir()
    if card is not None:
        (tmp_path / "model" / "README.md").write_text(card)
    notices = foreign_notices(tmp_path / "model", config.to_hf() | {"vocab_size": vocabulary})
    assert (notices[0] if notices else None) == said


def test_what_has_no_notices_gets_none(shared_bundle: Bundle, slm: Callable[..., Any]) -> None:
    assert modified((), "exported to ONNX") == ()
    assert shared_bundle.manifest.notices == () and not (shared_bundle.path / "NOTICE").exists()
    assert json.loads(slm("info", shared_bundle.path, "--json").out)["notices"] == []
