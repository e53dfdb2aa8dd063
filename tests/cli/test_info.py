"""`slm info`: of a preset, a checkpoint and a bundle; its figures against the files and the accounting."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.cli.commands.info import lineage
from slm.core.accounting import cache_bytes, decode_flops, prefill_flops
from slm.core.config import ModelConfig
from slm.core.manifest import Bundle, amend
from slm.core.presets import preset
from slm.export.bundle import ExportOptions, export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.cache import KVBuffers

Slm = Callable[..., Any]


def told(slm: Slm, *arguments: object) -> dict[str, Any]:
    result = slm("info", *arguments, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert isinstance(report, dict)
    return report


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_preset(slm: Slm) -> None:
    report = told(slm, "gemma3-270m", "--context", 32_768, "--position", 511, "--batch", 2)
    config = preset("gemma3-270m")
    assert ModelConfig.checked(report["config"]) == config
    assert report["kind"] == "preset" and report["tied_head"]
    assert report["parameters"].keys() == {"embedding", "attention", "mlp", "norms", "head", "total"}
    assert report["parameters"]["total"] == 132_520_576 and report["parameters"]["head"] == 0
    assert report["bytes"]["memory_float32"] == 2 * report["bytes"]["memory_16_bit"] == 4 * 132_520_576
    assert report["bytes"]["memory_int8_block_128"] < 0.26 * report["bytes"]["memory_float32"]
    cache = report["kv_cache_bytes"]
    assert cache["windowed"] == cache_bytes(config, 32_768, 2) == 2 * cache["windowed_16_bit"]
    assert cache["full"] == 2 * 32_768 * cache["full_per_token"]
    assert cache["windowed_without_slack"] < cache["windowed"] < cache["full"]
    decode, prefill = report["flops"]["decode"], report["flops"]["prefill_per_token"]
    flops = decode_flops(config, 511)
    assert decode.items() >= (asdict(flops) | {"total": flops.total}).items()
    assert decode["total_full"] == decode["total"] and decode["total_saved_percent"] == 0  # the window is not passed
    assert prefill["total"] == pytest.approx(prefill_flops(config, 32_768).total / 32_768)
    assert prefill["head_every_position"] == decode["head"] and prefill["attention_saved_percent"] > 80
    assert report["lineage"] == report["notices"] == []


def test_another_vocabulary(slm: Slm, shared_checkpoint: Path) -> None:
    assert told(slm, "gemma3-270m", "--vocab-size", 262_144)["parameters"]["total"] == 268_098_176
    result = slm("info", shared_checkpoint, "--vocab-size", 7)
    assert result.code == 1 and "use --vocab-size with a preset" in result.err


def test_a_run_stands_for_its_newest_suitable_artifact(
    slm: Slm, shared_checkpoint: Path, shared_bundle: Bundle
) -> None:
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    shutil.copytree(shared_bundle.path, "runs/tiny/onnx")
    for name in ("tiny", "runs/tiny"):
        result = slm("info", name)
        assert result.code == 0 and "Using runs/tiny/onnx (newest bundle of runs/tiny)." in result.err
    assert "Using runs/tiny/checkpoint/best" in slm("export", "--onnx", "tiny", "--out", "elsewhere").err
    shutil.rmtree("runs/tiny/onnx")
    for command in ("quantize", "--int8"), ("verify",), ("serve", "--port", "0"), ("web", "--port", "0"):
        result = slm(*command, "tiny")
        assert result.code == 1
        assert "hint: create one with slm export --onnx runs/tiny/checkpoint/best\n" in result.err
    Path("runs/begun").mkdir()
    Path("runs/begun/metrics.jsonl").touch()
    assert (
        "training has not saved a checkpoint\nhint: continue it with slm train --resume --out runs/begun"
        in slm("info", "begun").err
    )


def test_without_an_argument_the_newest_model(slm: Slm, shared_checkpoint: Path) -> None:
    assert "Using the bundled demo model (no model in ./runs)." in slm("info").err
    shutil.copytree(shared_checkpoint, "runs/a/checkpoint/best")
    result = slm("info")
    assert result.code == 0 and "Using runs/a/checkpoint/best" in result.err


def test_a_run_takes_precedence_over_a_preset_of_its_name(slm: Slm, shared_checkpoint: Path) -> None:
    assert told(slm, "tiny")["kind"] == "preset"
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    assert told(slm, "tiny")["kind"] == "checkpoint"


def test_defaults_take_what_fits(slm: Slm, shared_bundle: Bundle) -> None:
    assert told(slm, "gemma3-270m")["counted_with"]["context"] == 4_096
    assert told(slm, "tiny")["counted_with"] == {
        "context": 1_024,
        "batch": 1,
        "position": 1_023,
        "cache_dtype": "float32",
    }
    assert told(slm, shared_bundle.path)["counted_with"]["context"] == shared_bundle.manifest.context


def test_a_checkpoint(slm: Slm, shared_checkpoint: Path, config: ModelConfig) -> None:
    report = told(slm, shared_checkpoint)
    weights = (shared_checkpoint / "model.safetensors").stat().st_size
    in_memory = 4 * config.parameter_count()
    assert report["bytes"] == {
        "disk_weights": weights,
        "disk_total": size(shared_checkpoint),
        "memory_as_stored": in_memory,
        "memory_float32": in_memory,
        "memory_16_bit": in_memory // 2,
    }
    assert 0 < weights - in_memory < 10_000  # the header, a line for each tensor
    assert report["made_by"] == "tests" and report["lineage"] == [{"step": "made_by", "source": "tests"}]


def test_a_checkpoint_in_16_bit(slm: Slm, shared_checkpoint: Path, config: ModelConfig) -> None:
    import safetensors.torch

    shutil.copytree(shared_checkpoint, "half")
    tensors = safetensors.torch.load_file("half/model.safetensors")
    safetensors.torch.save_file({name: tensor.half() for name, tensor in tensors.items()}, "half/model.safetensors")
    assert told(slm, "half")["bytes"]["memory_as_stored"] == 2 * config.parameter_count()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (7).to_bytes(8, "little") + b'{"a":1}']
)
def test_weights_without_a_header(slm: Slm, shared_checkpoint: Path, content: bytes) -> None:
    shutil.copytree(shared_checkpoint, "cut")
    Path("cut/model.safetensors").write_bytes(content)
    result = slm("info", "cut")
    assert result.code == 1 and result.err.startswith("error: cannot read the weights: cut/model.safetensors")


def test_a_bundle(slm: Slm, shared_bundle: Bundle, config: ModelConfig) -> None:
    report, path = told(slm, shared_bundle.path), shared_bundle.path
    assert report["precision"] == "float32" and report["context"] == 256
    sizes = report["bytes"]
    assert sizes["disk_total"] == size(path)
    assert sizes["disk_graph"] == (path / "onnx" / "model.onnx").stat().st_size
    assert sizes["disk_weights"] + sizes["disk_graph"] == size(path / "onnx") == sizes["memory_weights"]
    # Tensors of a few hundred bytes lie in the graph, and those beside it begin at round offsets.
    assert sizes["memory_weights"] > 4 * config.parameter_count()
    assert sizes["disk_weights"] == pytest.approx(4 * config.parameter_count(), rel=0.05)
    assert report["provenance"] == shared_bundle.manifest.provenance
    assert [step["step"] for step in report["lineage"]] == ["checkpoint", "made_by"]


def shown(slm: Slm, path: Path) -> str:
    """The first table, each row on one line."""
    result = slm("info", path)
    assert result.code == 0, result.err
    return " ".join(result.out.replace("│", " ").split())


def test_a_bundle_tells_what_it_runs_on_and_what_was_measured(
    slm: Slm, shared_checkpoint: Path, shared_bundle: Bundle, tmp_path: Path
) -> None:
    cuda = export_bundle(shared_checkpoint, tmp_path / "cuda", ExportOptions(device="cuda"))
    report = told(slm, cuda.path)
    assert (report["target"], report["device"], report["precision"]) == ("fused", "cuda", "float16")
    assert report["ranges"] == json.loads(json.dumps(cuda.manifest.model_dump()["ranges"]))
    assert report["kv_cache_bytes"]["bundle"] == KVBuffers(cuda.manifest.cache, 256).bytes == 77_824
    text = shown(slm, cuda.path)
    assert "target fused" in text and "device cuda" in text
    assert "float16, 0.0778 MB at 256 tokens, batch 1: 1 layer with all positions, 3 layers with 16 " in text
    path, largest = max(cuda.manifest.ranges.largest.items(), key=lambda item: item[1])  # type: ignore[union-attr]
    assert f"ranges largest activation {largest:,.1f} in {path}; 0 of " in text
    assert f"parity largest difference from PyTorch float32 {cuda.manifest.parity.largest:.1e} (limit" in text  # type: ignore[union-attr]

    measured = TokenRows("some text", np.random.default_rng(0).integers(0, 320, (2, 64)))
    int8 = quantize_bundle(shared_bundle, tmp_path / "int8", measured, Settings(gate=Gate(1), cache="int8"))[0]
    report, quality = told(slm, int8.path), int8.manifest.quality
    assert quality is not None and report["quality"] == quality.model_dump()
    assert report["quantization"]["accuracy_level"] == 4
    text = shown(slm, int8.path)
    assert f"quality KL {quality.kl_nats:.5f} nats (limit 1), same top-1 {quality.same_top1:.1%}" in text
    assert (
        "quantization 9 × int8 in blocks of 64, 4 × int8 in blocks of 128, 4 × int8 in blocks of 32; rounded to "
        in text
    )
    assert "model.layers.0.self_attn.qkv_proj" not in text and len(report["quantization"]["schemes"]) == 17
    assert "tokens of some text" in text and "int8, 0.0451 MB at 256 tokens" in text and "3 layers with 16 + 16" in text

    portable = export_bundle(shared_checkpoint, tmp_path / "portable", ExportOptions(target="portable"))
    text = shown(slm, portable.path)
    assert "target portable" in text and "1 layer with all positions, 3 layers with the last 15" in text
    assert "quality" not in text and "ranges" not in text


def test_the_tables(slm: Slm, shared_bundle: Bundle) -> None:
    result = slm("info", shared_bundle.path, "--context", 100, "--position", 20)
    assert result.code == 0, result.err
    for text in (
        "3 sliding (window 16), 1 global",
        "0 (tied to the embedding)",
        "key-value cache: 100 tokens, batch 1",
        "decode at position 20",
        "made by tests → exported from ",
        "total on disk",
    ):
        assert text in result.out


def test_what_is_longer_than_it_takes_is_refused(slm: Slm, shared_bundle: Bundle) -> None:
    for option, value in (("--context", 257), ("--position", 256)):
        result = slm("info", shared_bundle.path, option, value)
        assert result.code == 1 and f"has a context of 256 tokens, not 257\nhint: choose another {option}" in result.err
    assert slm("info", "tiny", "--context", 0).code == 2


def test_a_preset_is_offered_where_nothing_is_found(slm: Slm) -> None:
    result = slm("info", "gemma3-27om")
    assert result.code == 1 and "not found: gemma3-27om" in result.err and "gemma3-270m" in result.err
    Path("tiny").mkdir()
    assert "neither a checkpoint nor a bundle: tiny" in slm("info", "tiny").err


def test_what_a_merged_checkpoint_was_made_from(slm: Slm, shared_checkpoint: Path) -> None:
    shutil.copytree(shared_checkpoint, "merged")
    merged = {
        "base": {"path": "runs/base", "weights_sha256": "0" * 64},
        "adapter": {"path": "runs/adapter"},
        "finetune": {"rows": 3},
    }
    imported = {"source": "someone/a-model", "revision": "main"}
    record = {
        "made_by": "slm import",
        "notices": ["[Somebody's] terms apply."],
        "parameters": 3,
        "recipe": {"name": "x"},
        "imported": imported,
        "data": {"path": "a.txt"},
        "merged": merged,
    }
    Path("merged/slm.json").write_text(json.dumps(record))
    report = told(slm, "merged")
    assert report["notices"] == ["[Somebody's] terms apply."] and report["provenance"] == record
    assert report["parameters"]["total"] > 3  # a record does not take the place of what was counted
    assert report["lineage"] == [
        {"step": "merged", "source": merged},
        {"step": "imported", "source": imported},
        {"step": "made_by", "source": "slm import"},
    ]
    shown = slm("info", "merged").out
    assert "[Somebody's] terms apply." in shown and "recipe" in shown
    assert "imported from someone/a-model → merged with the adapter runs/adapter" in " ".join(shown.split())


def test_notices_of_a_bundle(slm: Slm, shared_bundle: Bundle) -> None:
    shutil.copytree(shared_bundle.path, "noticed")
    amend(Path("noticed"), shared_bundle.manifest.model_copy(update={"notices": ("Some terms apply.",)}))
    assert told(slm, "noticed")["notices"] == ["Some terms apply."]
    inherited = shared_bundle.manifest.provenance | {"slm.json": {"notices": ["Older terms."]}}
    amend(Path("noticed"), shared_bundle.manifest.model_copy(update={"provenance": inherited}))
    assert told(slm, "noticed")["notices"] == ["Older terms."]


def test_the_lineage_of_a_quantized_bundle_begins_with_what_is_nearest() -> None:
    provenance = {
        "checkpoint": "runs/a/checkpoint/best",
        "adapter": "runs/a/adapters/b",
        "weights_sha256": "0",
        "slm.json": {"made_by": "slm train"},
        "bundle": "runs/a/onnx",
        "parity": {"tokens": 3},
    }
    assert [(step["step"], step["source"]) for step in lineage(provenance)] == [
        ("bundle", "runs/a/onnx"),
        ("adapter", "runs/a/adapters/b"),
        ("checkpoint", "runs/a/checkpoint/best"),
        ("made_by", "slm train"),
    ]
    assert lineage({}) == []


def test_a_checkpoint_in_several_files(slm: Slm, shared_checkpoint: Path, config: ModelConfig) -> None:
    import safetensors.torch

    shutil.copytree(shared_checkpoint, "cut")
    tensors = list(safetensors.torch.load_file("cut/model.safetensors").items())
    Path("cut/model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": tensors[:9], "model-00002-of-00002.safetensors": tensors[9:]}
    for name, part in files.items():
        safetensors.torch.save_file(dict(part), f"cut/{name}")
    index = {"weight_map": {tensor: name for name, part in files.items() for tensor, _ in part}}
    Path("cut/model.safetensors.index.json").write_text(json.dumps(index))
    sizes = told(slm, "cut")["bytes"]
    assert sizes["memory_as_stored"] == 4 * config.parameter_count()
    assert sizes["disk_weights"] == sum(Path(f"cut/{name}").stat().st_size for name in files)
    assert sizes["disk_total"] == size(Path("cut"))
