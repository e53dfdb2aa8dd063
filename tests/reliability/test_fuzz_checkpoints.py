"""Damaged checkpoints, adapters and GGUF files: each loads and answers, or is refused in one line."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

from slm.core.manifest import Bundle
from slm.core.nn import load_checkpoint
from slm.finetune.adapter import adapter_state, attach, save_adapter
from slm.finetune.settings import FinetuneSettings
from slm.interchange.gguf import write_gguf
from slm.interchange.onnx_adapter import adapter_from_peft, write_onnx_adapter

examples = pytest.mark.examples(few=15, many=600)

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def peft_adapter(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small adapter in PEFT's format."""
    adapter = attach(load_checkpoint(shared_checkpoint), FinetuneSettings(rank=2), shared_checkpoint, ())
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("peft") / "adapter"
    path.mkdir()
    save_adapter(path, adapter, adapter_state(adapter))
    return path


@pytest.fixture(scope="module")
def sharded(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with its weights in two files behind an index."""
    path = tmp_path_factory.mktemp("sharded") / "two"
    path.mkdir()
    tensors = safetensors.numpy.load_file(shared_checkpoint / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in some}, path / file)
    homes = {name: file for file, some in shards.items() for name in some}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).write_bytes((shared_checkpoint / name).read_bytes())
    return path


def header_of(content: bytes) -> tuple[Any, bytes]:
    """Returns the header of a safetensors file and what follows it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lying_headers(damage: Any, content: bytes, most: int) -> list[Any]:
    """Damages to fields of a safetensors header, the rest as it was: every value of the first tensors', evenly spread."""
    header, _ = header_of(content)
    first = [where for where in damage.pointers(header) if where and where[0] in sorted(header)[:3]]
    cases = [damage.replaced(header, where, value) for where in first for value in damage.nasty]
    some = sorted(header)[1:3]
    swapped = {**header, some[0]: header[some[1]]}  # two names for the same bytes
    return [swapped, *cases[:: max(1, len(cases) // most) | 1]]


@examples
def test_checkpoints(fuzz: Any, damage: Any, shared_checkpoint: Path, examples: int) -> None:
    names = ("config.json", WEIGHTS, "tokenizer.json", "generation_config.json", "slm.json")
    files = {name: (shared_checkpoint / name).read_bytes() for name in names}
    seen = fuzz.explore("checkpoint", shared_checkpoint, damage.of(files), examples)
    seen += fuzz.every("checkpoint", shared_checkpoint, "config.json", examples)
    assert seen["refused"]


@examples
def test_headers_of_weights(fuzz: Any, damage: Any, shared_checkpoint: Path, examples: int) -> None:
    content = (shared_checkpoint / WEIGHTS).read_bytes()
    _, data = header_of(content)
    for header in lying_headers(damage, content, examples // 2):
        case = fuzz.directory(shared_checkpoint, damage.One(WEIGHTS, with_header(header, data)))
        for how in ("checkpoint", "info"):
            outcome, what = fuzz.worker.ask(how, case)
            assert outcome != "wrong", (what, str(header)[:400])


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_lengths_of_headers(fuzz: Any, damage: Any, shared_checkpoint: Path, length: int) -> None:
    content = (shared_checkpoint / WEIGHTS).read_bytes()
    case = fuzz.directory(shared_checkpoint, damage.One(WEIGHTS, struct.pack("<Q", length) + content[8:]))
    for how in ("checkpoint", "info", "imported"):
        outcome, what = fuzz.worker.ask(how, case)
        assert outcome == "refused", what


@examples
def test_indexes_of_shards(fuzz: Any, damage: Any, sharded: Path, examples: int) -> None:
    index = "model.safetensors.index.json"
    seen = fuzz.every("checkpoint", sharded, index, examples // 2)
    names = (index, "model-1.safetensors", "model-2.safetensors")
    seen += fuzz.explore(
        "checkpoint", sharded, damage.of({name: (sharded / name).read_bytes() for name in names}), examples // 2
    )
    assert seen["refused"] > seen["works"]


@examples
def test_what_info_says_of_damaged_checkpoints(fuzz: Any, damage: Any, shared_checkpoint: Path, examples: int) -> None:
    names = ("config.json", WEIGHTS, "slm.json")
    files = {name: (shared_checkpoint / name).read_bytes() for name in names}
    seen = fuzz.explore("info", shared_checkpoint, damage.of(files), examples // 2)
    assert seen["refused"]


@examples
def test_imports_of_damaged_directories(fuzz: Any, damage: Any, shared_checkpoint: Path, examples: int) -> None:
    names = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "slm.json")
    files = {name: (shared_checkpoint / name).read_bytes() for name in names}
    seen = fuzz.explore("imported", shared_checkpoint, damage.of(files), examples // 2)
    assert seen["refused"]


@examples
def test_chat_templates(fuzz: Any, damage: Any, shared_checkpoint: Path, examples: int) -> None:
    content = (shared_checkpoint / "tokenizer_config.json").read_bytes()
    seen = fuzz.every("chat", shared_checkpoint, "tokenizer_config.json", examples)
    seen += fuzz.explore("chat", shared_checkpoint, damage.of({"tokenizer_config.json": content}), examples)
    assert seen["refused"]


@examples
def test_adapters(
    fuzz: Any, damage: Any, shared_checkpoint: Path, slotted: Bundle, peft_adapter: Path, examples: int
) -> None:
    files = {file.name: file.read_bytes() for file in peft_adapter.iterdir()}
    for how, base in (("peft", shared_checkpoint), ("slots", slotted.path)):
        seen = fuzz.explore(how, peft_adapter, damage.of(files), examples // 2, base=base)
        seen += fuzz.every(how, peft_adapter, "adapter_config.json", examples // 2, base=base)
        assert seen["refused"]
    content = files["adapter_model.safetensors"]
    _, data = header_of(content)
    for header in lying_headers(damage, content, examples // 6):
        case = fuzz.directory(peft_adapter, damage.One("adapter_model.safetensors", with_header(header, data)))
        for how, base in (("peft", shared_checkpoint), ("slots", slotted.path)):
            outcome, what = fuzz.worker.ask(how, case, base=base)
            assert outcome != "wrong", (what, str(header)[:400])


@examples
def test_adapters_of_onnxruntime(
    fuzz: Any, damage: Any, slotted: Bundle, peft_adapter: Path, tmp_path: Path, examples: int
) -> None:
    file = tmp_path / "small.onnx_adapter"
    write_onnx_adapter(file, adapter_from_peft(peft_adapter, slotted), slotted.manifest.provenance["weights_sha256"])
    changes = damage.bytes(file.read_bytes()).map(lambda data: damage.One(file.name, data))
    seen = fuzz.explore("slots", file, changes, examples, base=slotted.path)
    assert seen["refused"]


@examples
def test_gguf_files(fuzz: Any, damage: Any, shared_checkpoint: Path, tmp_path: Path, examples: int) -> None:
    file = tmp_path / "small.gguf"
    write_gguf(shared_checkpoint, file, "f32")
    content = file.read_bytes()
    front = content.index(b"blk.0") + 4096  # metadata, the vocabulary among them, and the first tensors
    changes = damage.bytes(content, front=front).map(lambda data: damage.One(file.name, data))
    seen = fuzz.explore("imported", file, changes, examples)
    assert seen["refused"]


def test_pipes_are_not_waited_for(
    fuzz: Any, damage: Any, shared_checkpoint: Path, slotted: Bundle, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.onnx_adapter")
    os.mkfifo(tmp_path / "pipe.gguf")
    checks: list[tuple[str, Path, dict[str, Any]]] = [
        ("slots", tmp_path / "pipe.onnx_adapter", {"base": slotted.path}),
        ("imported", tmp_path / "pipe.gguf", {}),
        *(("checkpoint", fuzz.directory(shared_checkpoint, damage.One(name, place="fifo")), {}) for name in (WEIGHTS,)),
    ]
    for how, path, about in checks:
        outcome, what = fuzz.worker.ask(how, path, **about)
        assert outcome == "refused", what
