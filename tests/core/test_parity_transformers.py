"""The model against transformers' Gemma 3, with copied weights, past the window and in every arrangement of the input.

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.nn import CausalLM, KVCache

# Two float32 implementations that add in another order, over four layers, at logits of magnitude 10.
TOLERANCE = 3e-5

WINDOW = 16
LENGTHS = [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]

MakeModel = Callable[..., CausalLM]


def reference(model: CausalLM, config: ModelConfig | None = None) -> transformers.Gemma3ForCausalLM:
    """transformers' model with our weights, built from the config.json that we would write."""
    fields = (config or model.config).to_hf()
    hf = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**fields)).eval()
    hf.set_attn_implementation("eager")
    hf.load_state_dict(model.state_dict())
    return hf


def token_ids(config: ModelConfig, length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_whole_prompt(config: ModelConfig, make_model: MakeModel, length: int) -> None:
    model = make_model(config)
    ids = token_ids(config, length, batch=2)
    assert difference(model(ids), reference(model)(ids).logits) < TOLERANCE


@pytest.mark.parametrize(
    "chunks", [[1] * 3 * WINDOW, [WINDOW, 5, 1, 1, 20, 5], [3 * WINDOW - 1, 1]], ids=["step", "mixed", "last"]
)
@torch.no_grad()
def test_chunks_with_cache(config: ModelConfig, make_model: MakeModel, chunks: list[int]) -> None:
    model = make_model(config)
    ids = token_ids(config, sum(chunks), batch=2)
    cache = KVCache(config)
    parts = [model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
    assert difference(torch.cat(parts, dim=1), reference(model)(ids).logits) < TOLERANCE
    assert cache.length == sum(chunks)


@torch.no_grad()
def test_sliding_caches_are_bounded(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    cache = KVCache(config)
    model(token_ids(config, 3 * WINDOW), cache=cache)
    lengths = [layer.key.shape[2] for layer in cache.layers if layer.key is not None]
    assert lengths == [WINDOW - 1 if kind == SLIDING else 3 * WINDOW for kind in config.layer_types]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch(config: ModelConfig, make_model: MakeModel, side: str) -> None:
    model = make_model(config)
    lengths = [3 * WINDOW, WINDOW + 1, 5]
    ids = token_ids(config, max(lengths), batch=len(lengths))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    ours = model(ids, attention_mask=mask)
    for row in range(len(lengths)):
        alone = model(ids[row : row + 1, mask[row].bool()])
        assert difference(ours[row, mask[row].bool()], alone[0]) < TOLERANCE
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = reference(model)(ids, attention_mask=mask, position_ids=position_ids).logits
    assert difference(ours[mask.bool()], theirs[mask.bool()]) < TOLERANCE


@torch.no_grad()
def test_left_padded_batch_steps_with_cache(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    ids = token_ids(config, 2 * WINDOW + 4, batch=2)
    mask = torch.ones_like(ids)
    mask[1, : WINDOW // 2] = 0
    cache = KVCache(config)
    parts = [model(ids[:, :WINDOW], mask[:, :WINDOW], cache)]
    parts += [model(ids[:, i : i + 1], mask[:, : i + 1], cache) for i in range(WINDOW, ids.shape[1])]
    assert difference(torch.cat(parts, 1)[mask.bool()], model(ids, mask)[mask.bool()]) < TOLERANCE


def test_gradients(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    hf = reference(model).train()
    ids = token_ids(config, 2 * WINDOW)
    for network, logits in ((model, model(ids)), (hf, hf(ids).logits)):
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        assert all(p.grad is not None for p in network.parameters())
    theirs = dict(hf.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        assert difference(parameter.grad, theirs[name].grad) < TOLERANCE * max(scale, 1.0), name


@torch.no_grad()
def test_untied_head(config: ModelConfig, make_model: MakeModel) -> None:
    untied = config.model_copy(update={"tie_word_embeddings": False})
    model = make_model(untied)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    ids = token_ids(config, 2 * WINDOW)
    assert difference(model(ids), reference(model)(ids).logits) < TOLERANCE


def rope(**bases: float) -> dict[str, RopeParameters]:
    return {kind: RopeParameters(rope_theta=bases[kind]) for kind in (SLIDING, FULL)}


KNOBS = {
    "window": {"sliding_window": WINDOW + 1},
    "local base": {"rope_parameters": rope(sliding_attention=101.0, full_attention=10_000.0)},
    "global base": {"rope_parameters": rope(sliding_attention=100.0, full_attention=10_100.0)},
    "attention scale": {"query_pre_attn_scalar": 25},
    "layer pattern": {"layer_types": (SLIDING, FULL, SLIDING, SLIDING)},
    "norm epsilon": {"rms_norm_eps": 1e-4},
}


@pytest.mark.parametrize("knob", KNOBS)
@torch.no_grad()
def test_a_turned_knob_is_noticed(config: ModelConfig, make_model: MakeModel, knob: str) -> None:
    model = make_model(config)
    ids = token_ids(config, 3 * WINDOW)
    wrong = reference(model, config.model_copy(update=KNOBS[knob]))(ids).logits
    assert difference(model(ids), wrong) > 10 * TOLERANCE


@torch.no_grad()
def test_a_wrong_norm_offset_is_noticed(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    hf = reference(model)
    hf.model.norm.weight += 1e-3
    ids = token_ids(config, WINDOW)
    assert difference(model(ids), hf(ids).logits) > 10 * TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_the_270m_shape() -> None:
    from slm.core.presets import preset

    config = preset("gemma3-270m")
    model = CausalLM(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    for length in (config.sliding_window + 1, 3 * config.sliding_window):
        ids = token_ids(config, length)
        hf = reference(model)
        assert difference(model(ids, num_logits_to_keep=64), hf(ids, logits_to_keep=64).logits) < TOLERANCE
