"""Adapters: PEFT's own files, the same logits on transformers, on slm and merged, and nothing read that is not understood."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.utils.other import get_pattern_key
from torch import Tensor

from slm.core.checkpoint import read_config, read_info, tensor_shapes
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.name_patterns import by_pattern
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.peft_adapter import read_peft_adapter
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, adapter_state, attach, load_adapter
from slm.finetune.merge import merge, merged_checkpoint
from slm.finetune.settings import PROJECTIONS, FinetuneSettings
from slm.interchange.onnx_adapter import slot_arrays
from tests.finetune.conftest import TURN_TOKEN_IDS

# Float32 matrix products added in another order, at logits of magnitude 50.
TOLERANCE = 1e-4
# W x + s B A x against (W + s B A) x: one more rounding of every weight.
MERGE_TOLERANCE = 1e-4

MakeAdapter = Callable[..., Path]


@pytest.fixture
def base(either_head: CausalLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A checkpoint with random weights."""
    save_checkpoint(tmp_path / "base", either_head, tokenizer, {"made_by": "tests"})
    return tmp_path / "base"


def token_ids() -> Tensor:
    """Rows past the window, with turn tokens among them."""
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(3))
    ids[:, ::7] = 1
    ids[:, 3::7] = 2
    return ids


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def on_transformers(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter)


# What an adapter may be besides plain.
KINDS = {
    "plain": {},
    "rslora": {"rslora": True, "rank": 4},
    "dora": {"dora": True},
    "both": {"rslora": True, "dora": True},
}


@pytest.mark.parametrize("tokens", [[], TURN_TOKEN_IDS], ids=["projections", "with-tokens"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_logits_on_slm_on_transformers_and_merged(
    base: Path, random_adapter: MakeAdapter, tokens: list[int], kind: str
) -> None:
    adapter, ids = random_adapter(base, tokens, **KINDS[kind]), token_ids()
    ours = load_adapter(load_checkpoint(base), adapter)(ids)
    assert difference(ours, load_checkpoint(base)(ids)) > 1  # the adapter matters
    theirs = on_transformers(base, adapter)
    assert difference(ours, theirs(ids).logits) < TOLERANCE
    assert difference(ours, theirs.merge_and_unload()(ids).logits) < TOLERANCE
    assert difference(ours, merge(base, adapter)(ids)) < MERGE_TOLERANCE


@pytest.mark.parametrize("tokens", [[], TURN_TOKEN_IDS], ids=["projections", "with-tokens"])
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_the_file_has_exactly_the_tensors_that_peft_makes_on_transformers(
    base: Path, random_adapter: MakeAdapter, tokens: list[int], kind: str
) -> None:
    ours = safetensors.torch.load_file(random_adapter(base, tokens, **KINDS[kind]) / ADAPTER_WEIGHTS_FILE)
    assert ours["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].dtype == torch.float32
    theirs = on_transformers(base, base.parent / "adapter")
    theirs = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_trains_nothing_else(base: Path) -> None:
    ids = token_ids()
    before = load_checkpoint(base)(ids)
    adapter = attach(load_checkpoint(base), FinetuneSettings(), base, TURN_TOKEN_IDS)
    assert difference(adapter.eval()(ids), before) == 0
    trained = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    assert sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad) == sum(
        tensor.numel() for tensor in adapter_state(adapter).values()
    )


def test_trained_token_rows_are_scaled_like_the_others(base: Path, random_adapter: MakeAdapter) -> None:
    # peft looks trained rows up by itself: without `embed_scale` they would come out sqrt(D) times too small.
    model = load_checkpoint(base)
    attach(model, FinetuneSettings(), base, TURN_TOKEN_IDS)
    plain = load_checkpoint(base).model.embed_tokens
    ids = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(model.model.embed_tokens(ids), plain(ids))


def test_merging_keeps_the_tie_and_the_names(base: Path, random_adapter: MakeAdapter) -> None:
    plain, merged = load_checkpoint(base), merge(base, random_adapter(base, TURN_TOKEN_IDS))
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.requires_grad for parameter in merged.parameters()) and not merged.training
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == plain.config.tie_word_embeddings
    changed = (merged.lm_head.weight != plain.lm_head.weight).any(dim=1).nonzero().flatten().tolist()
    assert changed == TURN_TOKEN_IDS


@pytest.mark.parametrize("knob", ["lora_alpha", "use_rslora"])
@torch.no_grad()
def test_a_changed_scale_is_noticed(base: Path, random_adapter: MakeAdapter, knob: str) -> None:
    adapter, ids = random_adapter(base, []), token_ids()
    ours = load_adapter(load_checkpoint(base), adapter)(ids)
    edit(adapter, **{knob: {"lora_alpha": 17, "use_rslora": True}[knob]})
    assert difference(ours, merge(base, adapter)(ids)) > 100 * MERGE_TOLERANCE


@torch.no_grad()
def test_a_merged_checkpoint_stands_alone(base: Path, random_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter, ids = random_adapter(base, TURN_TOKEN_IDS), token_ids()
    merged_checkpoint(base, adapter, tmp_path / "merged")
    expected = load_adapter(load_checkpoint(base), adapter)(ids)
    assert difference(load_checkpoint(tmp_path / "merged")(ids), expected) < MERGE_TOLERANCE
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert difference(theirs(ids).logits, expected) < MERGE_TOLERANCE
    info = read_info(tmp_path / "merged")
    assert info["made_by"] == "tests" and info["merged"]["adapter"]["path"] == str(adapter)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_an_adapter_of_other_weights_is_refused_and_both_are_named(
    shared_checkpoint: Path, random_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = random_adapter(shared_checkpoint, [])
    recorded = {"base": {"path": "runs/other/checkpoint/best", "weights_sha256": "0" * 64}}
    (adapter / "slm.json").write_text(json.dumps(recorded))
    with pytest.raises(SlmError) as error:
        merged_checkpoint(shared_checkpoint, adapter, tmp_path / "merged")
    assert "runs/other/checkpoint/best (weights 000000000000)" in error.value.message
    assert str(shared_checkpoint) in error.value.message
    assert not (tmp_path / "merged").exists()


def edit(adapter: Path, **fields: Any) -> None:
    file = adapter / ADAPTER_CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "adapters of type 'IA3' are not supported"),
        ({"use_qalora": True}, "sets use_qalora=True"),
        ({"use_dora": True}, "missing: model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "sets megatron_config"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save=['lm_head'], which is not supported: it replaces"),
        ({"lora_bias": True}, "sets lora_bias=True"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "sets layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "sets target_parameters"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"invented_later": 2}, "sets invented_later=2"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "sets init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "a base from which that initialisation was subtracted"),
        ({"init_lora_weights": "invented"}, "sets init_lora_weights='invented'"),
        ({"r": 4}, "has rank 4 for model.layers.0.self_attn.q_proj, but its tensors have rank 8"),
        ({"rank_pattern": {"q_proj": 4}}, "has rank 4 for model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["q_proj"]}, "has tensors for model.layers.0.mlp.down_proj"),
        ({"exclude_modules": ["q_proj"]}, "has tensors for model.layers.0.self_attn.q_proj"),
        ({"layers_to_transform": [0, 1]}, "has tensors for model.layers.2"),
        ({"target_modules": ["c_attn"]}, "which has none of the target modules: c_attn"),
        ({"target_modules": [*PROJECTIONS, "lm_head"]}, "the base ties the two"),
        ({"trainable_token_indices": [5000]}, "trainable_token_indices lists 1 rows of model.embed_tokens"),
        ({"alpha_pattern": {"[": 1.0}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": "8"}}, "adapter_config.json is invalid: alpha_pattern"),
        ({"alpha_pattern": {f"q{{{i}}}": 1.0 for i in range(1, 30)}}, "29 patterns with counts; the limit is 20"),
        ({"alpha_pattern": {f"(?!{i}).": 1.0 for i in range(9)}}, "more than 8 patterns with look-around"),
        ({"alpha_pattern": {str(i): 1.0 for i in range(2001)}}, "has 2,001 patterns"),
        ({"target_modules": ["q_proj"] * 4001}, "target_modules has 4,001 entries"),
        ({"r": 0}, "adapter_config.json is invalid: r:"),
        ({"r": "8"}, "adapter_config.json is invalid: r:"),
        ({"target_modules": None}, "adapter_config.json is invalid: target_modules"),
    ],
)
@pytest.mark.parametrize("path", ["merged", "slots"])
def test_what_is_not_understood_is_refused(
    shared_checkpoint: Path, random_adapter: MakeAdapter, fields: dict[str, Any], said: str, path: str
) -> None:
    """By the merged model and by slots alike: there is one reader."""
    adapter = random_adapter(shared_checkpoint, [])
    edit(adapter, **fields)
    with pytest.raises(SlmError) as error:
        if path == "merged":
            merge(shared_checkpoint, adapter)
        else:
            slot_arrays(adapter, read_config(shared_checkpoint))
    assert said in error.value.message and "\n" not in error.value.message


def test_a_field_that_a_later_peft_leaves_off_is_no_obstacle(
    shared_checkpoint: Path, random_adapter: MakeAdapter
) -> None:
    adapter = random_adapter(shared_checkpoint, [])
    before = merge(shared_checkpoint, adapter).state_dict()
    edit(adapter, invented_later=None, invented_even_later=False, peft_version="9.0")
    for name, tensor in merge(shared_checkpoint, adapter).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_damaged_file_is_refused(shared_checkpoint: Path, random_adapter: MakeAdapter) -> None:
    adapter = random_adapter(shared_checkpoint, [])
    file = adapter / ADAPTER_WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SlmError, match="cannot read the adapter"):
        merge(shared_checkpoint, adapter)


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_pickle_is_never_opened(shared_checkpoint: Path, random_adapter: MakeAdapter) -> None:
    adapter = random_adapter(shared_checkpoint, [])
    (adapter / ADAPTER_WEIGHTS_FILE).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(SlmError, match=r"adapter_model\.safetensors"):
        merge(shared_checkpoint, adapter)
    assert not Path("executed").exists()


def test_what_is_no_adapter_is_said(shared_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="not an adapter"):
        merge(shared_checkpoint, shared_checkpoint)
    with pytest.raises(SlmError, match="not found"):
        merge(shared_checkpoint, tmp_path / "none")
    with pytest.raises(SlmError, match="not found"):
        merge(tmp_path / "none", tmp_path / "none")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(.*_proj)", None),
        (r".*\.(q_proj|v_proj)$", None),
        (r"(?!.*mlp).*q_proj", None),  # look-around, and simple enough
        (r"(.+)+!", None),  # the engine takes linear time
        (r".*.*.*.*.*.*.*.*.*!", None),
        ("[", "not a regular expression"),
        (r"(.+)+!(?=x)", "may take very long"),
        (r".*.*.*.*!(?=x)", "may take very long"),
        (r"\w?\w?\w?\w?\w?\w?!(?=x)", "may take very long"),
        (r"((((a{99}){99}){99}){99})", "may take very long"),  # which would take gigabytes to compile
        ("a" * 5000, "the limit is 2,000"),
    ],
)
def test_regular_expressions_take_no_time(
    shared_checkpoint: Path, random_adapter: Callable[..., Path], pattern: str, said: str | None
) -> None:
    path = random_adapter(shared_checkpoint, [], rank=2)
    edit(path, alpha_pattern={pattern: 4.0})
    started = time.process_time()
    if said is None:
        read_peft_adapter(path, read_config(shared_checkpoint))
    else:
        with pytest.raises(SlmError, match=said):
            read_peft_adapter(path, read_config(shared_checkpoint))
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "mlp.down_proj",
        r"layers\.[0-2]\.self_attn\.q_proj",
        r"^model\.layers\.(0|3)\..*",
        r".*\.mlp\..*",
        "proj",
        r"model.layers.1.self_attn.k_proj|up_proj",
        r"(?!.*mlp).*",
        r"(?i:Q_PROJ)",
        r"\Amodel\.layers\.\d+\.mlp\.up_proj\Z",
    ],
)
def test_patterns_match_as_in_peft(config: ModelConfig, pattern: str) -> None:
    names = [name.removesuffix(".weight") for name in tensor_shapes(config)]
    found = by_pattern({pattern: 1}, names, "alpha_pattern")
    assert set(found) == {name for name in names if get_pattern_key([pattern], name) == pattern != name}
