"""The files of a bundle for other programs. tests/peers runs these programs and compares their output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from slm.core.config import FULL, ModelConfig
from slm.core.contract import Device, cache_layers
from slm.core.manifest import Bundle
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.clients import write_client_files
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def test_a_fused_bundle(shared_bundle: Bundle) -> None:
    config, path = shared_bundle.config, shared_bundle.path
    assert {"genai_config.json", "config.json"} <= shared_bundle.manifest.files.keys()
    assert read(path, "config.json")["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    genai = read(path, "genai_config.json")
    model, decoder = genai["model"], genai["model"]["decoder"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, [0, 2], 3)
    assert model["context_length"] == shared_bundle.manifest.context == genai["search"]["max_length"]
    assert (path / decoder["filename"]).is_file()
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (config.head_dim, config.num_key_value_heads)
    sliding = decoder["sliding_window"]
    assert (sliding["window_size"], sliding["cache_slack"], sliding["layers"]) == (16, 16, [0, 1, 3])
    names = {spec.name for spec in (*shared_bundle.manifest.inputs, *shared_bundle.manifest.outputs)}
    patterns = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    assert {pattern.replace("%d", "2") for pattern in patterns} <= names


def test_quantizing_says_so(shared_bundle: Bundle, tmp_path: Path) -> None:
    rows = np.random.default_rng(5).integers(0, shared_bundle.config.vocab_size, (2, 40))
    bundle = quantize_bundle(shared_bundle, tmp_path / "int8", TokenRows("random", rows), Settings(gate=Gate(1)))[0]
    assert read(bundle.path, "config.json")["transformers.js_config"]["dtype"] == "q8"
    assert read(bundle.path, "genai_config.json")["model"]["decoder"]["filename"] == "onnx/model_quantized.onnx"


def test_a_portable_bundle(shared_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(shared_checkpoint, tmp_path / "b", ExportOptions(target="portable"))
    genai = read(bundle.path, "genai_config.json")
    assert "sliding_window" not in genai["model"]["decoder"]
    assert genai["search"] == {"max_length": 16, "past_present_share_buffer": False}
    assert genai["model"]["context_length"] == 256  # lm-evaluation-harness reads this limit
    assert read(bundle.path, "tokenizer_config.json")["padding_side"] == "left"


@pytest.mark.parametrize("device", ["cuda", "webgpu"])
def test_devices(shared_bundle: Bundle, tmp_path: Path, device: Device) -> None:
    shutil.copytree(shared_bundle.path, tmp_path / "b")
    config = shared_bundle.config
    change = {"device": device, "precision": "float16", "cache": cache_layers(config, device, "float16")}
    write_client_files(tmp_path / "b", config, shared_bundle.manifest.model_copy(update=change))
    assert read(tmp_path / "b", "config.json")["transformers.js_config"]["dtype"] == "fp16"
    decoder = read(tmp_path / "b", "genai_config.json")["model"]["decoder"]
    assert decoder["session_options"]["provider_options"] == [{device: {}}]
    slack = {name: value for name, value in decoder.get("sliding_window", {}).items() if name == "cache_slack"}
    assert slack == ({"cache_slack": 0} if device == "cuda" else {})  # caches do not slide on WebGPU


def test_what_a_model_does_not_have_is_left_out(shared_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(shared_bundle.path, tmp_path / "b")
    change = {"bos_token_id": None, "pad_token_id": None, "layer_types": (FULL,) * 4}
    config: ModelConfig = shared_bundle.config.model_copy(update=change)
    manifest = shared_bundle.manifest.model_copy(update={"cache": cache_layers(config), "target": "portable"})
    write_client_files(tmp_path / "b", config, manifest)
    genai = read(tmp_path / "b", "genai_config.json")
    assert {name for name in genai["model"] if name.endswith("_id")} == {"eos_token_id"}
    assert genai["search"]["max_length"] == 256  # without sliding caches, onnxruntime-genai supports the whole context


def test_sampling_of_generation_config(shared_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(shared_bundle.path, tmp_path / "b")
    fields = {"do_sample": True, "top_k": 64, "top_p": 0.95, "temperature": None, "cache_implementation": "hybrid"}
    (tmp_path / "b/generation_config.json").write_text(json.dumps(fields))
    write_client_files(tmp_path / "b", shared_bundle.config, shared_bundle.manifest)
    search = read(tmp_path / "b", "genai_config.json")["search"]
    assert search.keys() == {"max_length", "past_present_share_buffer", "do_sample", "top_k", "top_p"}
    assert (search["do_sample"], search["top_k"], search["top_p"]) == (True, 64, 0.95)


@pytest.mark.parametrize("begins", [True, False])
def test_how_a_text_begins(shared_bundle: Bundle, tmp_path: Path, begins: bool) -> None:
    shutil.copytree(shared_bundle.path, tmp_path / "b")
    if not begins:
        fields = read(tmp_path / "b", "tokenizer.json")
        (tmp_path / "b/tokenizer.json").write_text(json.dumps(fields | {"post_processor": None}))
    write_client_files(tmp_path / "b", shared_bundle.config, shared_bundle.manifest)
    fields = read(tmp_path / "b", "tokenizer_config.json")
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (begins, False)
    assert fields["chat_template"] == read(shared_bundle.path, "tokenizer_config.json")["chat_template"]


def test_transformers_reads_the_same_model_and_tokenizer(
    shared_bundle: Bundle, shared_checkpoint: Path, stories: list[str]
) -> None:
    fields = [
        transformers.AutoConfig.from_pretrained(path).to_dict() for path in (shared_bundle.path, shared_checkpoint)
    ]
    for each in fields:
        each.pop("_name_or_path", None)
    assert fields[0].pop("transformers.js_config")
    assert fields[0] == fields[1]
    tokenizers: list[Callable[[str], Any]] = [
        transformers.AutoTokenizer.from_pretrained(path) for path in (shared_bundle.path, shared_checkpoint)
    ]
    for text in (stories[0], " two  spaces\n", "é 🦊", "a<end_of_turn>"):
        assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[0]("a").keys() == {"input_ids", "attention_mask"}
