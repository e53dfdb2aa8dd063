"""Checkpoints: read by transformers and from transformers, refused by name when something is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from slm.core.checkpoint import read_config, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer

IDS = torch.arange(40)[None] * 7 % 320


@torch.no_grad()
def test_transformers_loads_what_we_save(shared_checkpoint: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shared_checkpoint)
    assert isinstance(theirs, transformers.Gemma3ForCausalLM)
    ours = load_checkpoint(shared_checkpoint)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)
    assert theirs.config.eos_token_id == [0, 2]


@torch.no_grad()
def test_we_load_what_transformers_saves(shared_checkpoint: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shared_checkpoint)
    theirs.save_pretrained(tmp_path / "hf")
    torch.testing.assert_close(load_checkpoint(tmp_path / "hf")(IDS), load_checkpoint(shared_checkpoint)(IDS))


def test_transformers_tokenizes_alike(shared_checkpoint: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(shared_checkpoint)
    ours = Tokenizer.load(shared_checkpoint)
    for text in ("Once upon a time, there was a fox.", " two  spaces\n\nand lines", "naïve 東京 🦊", ""):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == 0 and theirs.pad_token_id == 3


def test_the_chat_template_is_the_prompt_of_training(shared_checkpoint: Path) -> None:
    from slm.core.chat import turn_prompt

    theirs = transformers.AutoTokenizer.from_pretrained(shared_checkpoint)
    ours = Tokenizer.load(shared_checkpoint)
    rendered = theirs.apply_chat_template(
        [{"role": "user", "content": " Tell me a story. "}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|endoftext|>" + turn_prompt("Tell me a story.")
    ids = theirs(rendered, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(turn_prompt("Tell me a story."))
    assert ids[:2] == [0, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_saved_once_if_tied(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    model = make_model(config.model_copy(update={"tie_word_embeddings": tied}))
    save_checkpoint(tmp_path / "c", model, tokenizer, {"made_by": "test"})
    saved = safetensors.torch.load_file(tmp_path / "c" / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    again = load_checkpoint(tmp_path / "c")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    torch.testing.assert_close(again(IDS), model(IDS), atol=0, rtol=0)
    info = read_info(tmp_path / "c")
    assert again.config == model.config and info.pop("created") and info == {"made_by": "test"}


def altered(shared_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_checkpoint, tmp_path / "altered"))


def test_missing_extra_and_misshapen_tensors_are_named(shared_checkpoint: Path, tmp_path: Path) -> None:
    path = altered(shared_checkpoint, tmp_path)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 3)
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    with pytest.raises(SlmError) as caught:
        load_checkpoint(path)
    for part in (
        "missing: model.norm.weight",
        "unknown: model.layers.9.mlp.up_proj.weight",
        "wrong shape: model.layers.0.mlp.up_proj.weight (2, 3) instead of (96, 64)",
    ):
        assert part in caught.value.message


def test_truncated_weights_are_refused(shared_checkpoint: Path, tmp_path: Path) -> None:
    path = altered(shared_checkpoint, tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SlmError, match="cannot read the weights"):
        load_checkpoint(path)


def test_a_pickle_is_never_opened(shared_checkpoint: Path, tmp_path: Path) -> None:
    path = altered(shared_checkpoint, tmp_path)
    torch.save(safetensors.torch.load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(SlmError, match="not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(("content", "said"), [("{", "not JSON"), ("[1]", "not a JSON object"), ("\xff", "not JSON")])
def test_a_damaged_configuration_is_refused(shared_checkpoint: Path, tmp_path: Path, content: str, said: str) -> None:
    path = altered(shared_checkpoint, tmp_path)
    (path / "config.json").write_text(content)
    with pytest.raises(SlmError, match=said):
        read_config(path)


def test_saving_over_a_checkpoint_replaces_it_whole(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    target = tmp_path / "c"
    save_checkpoint(target, make_model(config, seed=1), tokenizer, {})
    save_checkpoint(target, make_model(config, seed=2), tokenizer, {})
    (target / "stray").write_text("mine")
    with pytest.raises(SlmError, match="contains other files: stray"):
        save_checkpoint(target, make_model(config, seed=3), tokenizer, {})
    (target / "stray").unlink()
    assert json.loads((target / "config.json").read_text())["model_type"] == "gemma3_text"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
