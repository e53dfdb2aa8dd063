"""Adapters as other programs write them: merged into the base, in slots, and on transformers through PEFT they are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from slm.core.checkpoint import read_config
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.merge import merge
from slm.interchange.onnx_adapter import adapter_from_peft, slot_arrays
from slm.runtime.decoder import OnnxDecoder

# Float32 sums in another order and merged weights rounded once more, at logits of magnitude 50.
TOLERANCE = 1e-4
# What newer versions of Unsloth write; it has a look-ahead.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?"
    r"\.(?:q_proj|v_proj|o_proj))|(?:\bmodel\.layers\.[\d]{1,}(?!.*\.experts\.\d)\..*?"
    r"(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?\.(?:(?:q_proj|v_proj|o_proj)))"
)
QVO = {"target_modules": ("q_proj", "v_proj", "o_proj")}

# What the adapter is made with, and what its files are changed to: fields, tensors' type.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.dtype]] = {}


def case(
    name: str,
    made: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    CASES[name] = (made or {}, fields or {}, dtype)


case("plain")
case("bfloat16", dtype=torch.bfloat16)
case("float16", dtype=torch.float16)
case("float64", dtype=torch.float64)
case(
    "alpha by a regular expression",
    fields={"alpha_pattern": {r"layers\.[0-2]\.self_attn\.q_proj": 64, "mlp.down_proj": 2}},
)
case(
    "the first pattern counts",
    fields={"alpha_pattern": {r".*\.mlp\..*": 3, "up_proj": 99, r"self_attn\.(q|k)_proj": 30}},
)
case("an end that is no name", fields={"alpha_pattern": {"proj": 99}})  # PEFT matches whole names
case("alpha with rslora", {"rank": 3, "rslora": True}, {"alpha_pattern": {"k_proj": 1}})
case("Unsloth's expression", QVO, {"target_modules": UNSLOTH, "unsloth_version": "2026.1"})
case("all-linear", fields={"target_modules": "all-linear"})
case("layers", fields={"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"})
case("drawn by a normal distribution", fields={"init_lora_weights": "gaussian"})
case("drawn orthogonally", fields={"init_lora_weights": "orthogonal"})
case("not drawn", fields={"init_lora_weights": False})
case("biases, of which there are none", fields={"bias": "all", "fan_in_fan_out": True, "lora_dropout": 0.1})
case("excluded", QVO, {"exclude_modules": ["k_proj"], "target_modules": ["q_proj", "v_proj", "o_proj", "k_proj"]})
case("nulls", fields={"alpha_pattern": None, "rank_pattern": None, "use_dora": None, "use_rslora": None})


def rewrite(path: Path, fields: dict[str, Any], dtype: torch.dtype, rename: Callable[[str], str] = str) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    changed = {rename(name): tensor.to(dtype) for name, tensor in tensors.items()}
    safetensors.torch.save_file(changed, path / "adapter_model.safetensors")


def in_slots(bundle: Bundle, adapter: Path, ids: np.ndarray) -> np.ndarray:
    decoder = OnnxDecoder(bundle)
    decoder.use(adapter_from_peft(adapter, bundle))
    return decoder.logits(ids)


def merged(base: Path, adapter: Path, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return merge(base, adapter)(torch.from_numpy(ids)).numpy()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of fields that it does not follow
def test_merged_in_slots_and_on_transformers(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: Callable[..., Path], name: str
) -> None:
    made, fields, dtype = CASES[name]
    path = make_adapter(tmp_path / "a", shared_checkpoint, **({"rank": 4} | made))
    rewrite(path, fields, dtype)
    ids = np.random.default_rng(3).integers(0, 320, (2, 40))
    # PEFT rejects a null where it expects a pattern or a flag; what it means to it is a field that is left out.
    nulls = {key: value for key, value in fields.items() if value is None}
    if nulls:
        wanted = merged(shared_checkpoint, make_adapter(tmp_path / "b", shared_checkpoint, rank=4), ids)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(shared_checkpoint, attn_implementation="eager")
        with torch.inference_mode():
            wanted = peft.PeftModel.from_pretrained(model, path)(torch.from_numpy(ids)).logits.float().numpy()
    np.testing.assert_allclose(merged(shared_checkpoint, path, ids), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(in_slots(slotted, path, ids), wanted, atol=TOLERANCE)
    assert np.abs(OnnxDecoder(slotted).logits(ids) - wanted).max() > 100 * TOLERANCE


def test_ranks_of_their_own(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    path = make_adapter(tmp_path / "a", shared_checkpoint, rank=4)
    rewrite(path, {"rank_pattern": {r"layers\.1\.mlp\..*": 2}}, torch.float32)
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    for name in tensors:
        if "layers.1.mlp" in name:
            tensors[name] = (tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]).contiguous()
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    ids = np.random.default_rng(3).integers(0, 320, (2, 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_checkpoint, attn_implementation="eager")
    with torch.inference_mode():
        wanted = peft.PeftModel.from_pretrained(model, path)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(merged(shared_checkpoint, path, ids), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(in_slots(slotted, path, ids), wanted, atol=TOLERANCE)


MULTIMODAL = {
    "before 4.52": lambda name: name.replace(".model.model.", ".model.language_model.model."),
    "since 4.52": lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
    "named default": lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
}


@pytest.mark.parametrize("layout", MULTIMODAL)
def test_names_of_a_multimodal_model(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: Callable[..., Path], layout: str
) -> None:
    """An adapter that was trained on Gemma 3 with its vision part: the text part's tensors count."""
    path = make_adapter(tmp_path / "a", shared_checkpoint, rank=4)
    ids = np.random.default_rng(3).integers(0, 320, (2, 40))
    wanted = merged(shared_checkpoint, path, ids)
    rewrite(path, {}, torch.float32, MULTIMODAL[layout])
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 9)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    np.testing.assert_allclose(merged(shared_checkpoint, path, ids), wanted, atol=0)
    np.testing.assert_allclose(in_slots(slotted, path, ids), wanted, atol=TOLERANCE)


Tensors = dict[str, torch.Tensor]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "half of a pair": (lambda t: t.pop(f"{Q}.lora_B.weight"), "missing: model.layers.0.self_attn.q_proj.lora_B"),
    "a module missing": (
        lambda t: [t.pop(f"{Q}.lora_{s}.weight") for s in "AB"],
        "missing: model.layers.0.self_attn.q_proj",
    ),
    "magnitudes without DoRA": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(128)}),
        "use_dora is false",
    ),
    "a bias": (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(128)}), "has a bias"),
    "a whole matrix": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(320, 64)}),
        "replaces the matrix of lm_head|more than the slots' products: lm_head",
    ),
    "a norm": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
        "has more than low-rank updates, which is not supported: base_model.model.model.norm.weight",
    ),
    "rows that are not named": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)}
        ),
        "trainable_token_indices lists 0 rows of model.embed_tokens, but the file has 2",
    ),
    "a layer too many": (
        lambda t: t.update({n.replace(".0.", ".9."): x.clone() for n, x in list(t.items()) if n.startswith(Q)}),
        "no linear layer model.layers.9.self_attn.q_proj",
    ),
    "another width": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(8, 63)}),
        "the layer has 64 inputs and 128 outputs",
    ),
    "not a number": (lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), "NaN or infinite"),
    "integers": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(8, 64, dtype=torch.int8)}), "is stored as I8"),
    "twice": (lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(8, 64)}), "two tensors lora_A"),
    "another program's names": (lambda t: t.update({"lora_unet.weight": torch.ones(1)}), "not a tensor name of PEFT's"),
}


@pytest.mark.parametrize("path", ["merged", "slots"])
@pytest.mark.parametrize("what", DAMAGES)
def test_tensors_that_contradict_the_configuration(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: Callable[..., Path], what: str, path: str
) -> None:
    adapter = make_adapter(tmp_path / "a", shared_checkpoint)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    DAMAGES[what][0](tensors)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(SlmError, match=DAMAGES[what][1]):
        if path == "merged":
            merge(shared_checkpoint, adapter)
        else:
            adapter_from_peft(adapter, slotted)


ELSEWHERE = {
    "target": {"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"},
    "excluded": {"target_modules": r".*_proj", "exclude_modules": r"model\.layers\.3\..*"},
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_expressions_that_leave_out_modules_with_tensors(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: Callable[..., Path], what: str
) -> None:
    """PEFT ignores the tensors of modules that the expression does not match: slm would compute something else."""
    adapter = make_adapter(tmp_path / "a", shared_checkpoint)
    rewrite(adapter, ELSEWHERE[what], torch.float32)
    for load in (lambda: merge(shared_checkpoint, adapter), lambda: adapter_from_peft(adapter, slotted)):
        with pytest.raises(SlmError, match=r"contradicts itself: it has tensors for model\.layers"):
            load()
    rewrite(adapter, {"target_modules": "(q_proj"}, torch.float32)
    with pytest.raises(SlmError, match=r"target_modules: '.q_proj' is not a regular expression"):
        adapter_from_peft(adapter, slotted)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_adapter_of_embedding_and_head_with_copies_of_both(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """PEFT writes what it adapts of an embedding beside the update; a copy that equals the base's changes nothing."""
    save_checkpoint(
        tmp_path / "base", make_model(config.model_copy(update={"tie_word_embeddings": False})), tokenizer, {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    modules = ["q_proj", "embed_tokens", "lm_head"]
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "a")
    names = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert any(name.endswith("base_layer.weight") for name in names)
    ids = np.random.default_rng(3).integers(0, 320, (2, 40))
    wanted = theirs.eval()(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(merged(tmp_path / "base", tmp_path / "a", ids), wanted, atol=TOLERANCE)
    with pytest.raises(SlmError, match="more than the slots' products"):
        slot_arrays(tmp_path / "a", read_config(tmp_path / "base"))
