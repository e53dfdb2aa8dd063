"""The model against transformers' Gemma 3, with copied weights, past the window and in every arrangement of the input.

One awkward shape, to be read; `test_parity_drawn.py` repeats it on drawn ones. Dimensions: B batch, T positions,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.nn import CausalLM, KVCache

# Two float32 implementations that add in another order, over four layers, at logits of magnitude 10.
TOLERANCE = 3e-5

# Of each gradient's largest value; measured 3e-6.
GRADIENT_TOLERANCE = 3e-5

# In bfloat16, the share of logits that equal those of transformers' SDPA attention bit for bit. Measured 1: what is
# rounded is rounded at the same places. Below 1 for kernels that add in another order on another processor.
BFLOAT16_EQUAL = 0.99

# And how far from float32 they may be, in units of what transformers' eager attention is, root mean square. Measured
# 0.89 to 0.98: eager attention rounds the scores too.
BFLOAT16_RATIO = 1.25

WINDOW = 16
LENGTHS = [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]

MakeModel = Callable[..., CausalLM]
Reference = Callable[..., Any]
TokenIds = Callable[..., Tensor]
Difference = Callable[[Tensor, Tensor], float]


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_whole_prompt(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    difference: Difference,
    length: int,
) -> None:
    model = make_model(config)
    ids = token_ids(config, length, batch=2)
    assert difference(model(ids), reference(model)(ids).logits) < TOLERANCE


@pytest.mark.parametrize(
    "chunks", [[1] * 3 * WINDOW, [WINDOW, 5, 1, 1, 20, 5], [3 * WINDOW - 1, 1]], ids=["step", "mixed", "last"]
)
@torch.no_grad()
def test_chunks_with_cache(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    difference: Difference,
    chunks: list[int],
) -> None:
    model = make_model(config)
    ids = token_ids(config, sum(chunks), batch=2)
    cache = KVCache(config)
    parts = [model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
    assert difference(torch.cat(parts, dim=1), reference(model)(ids).logits) < TOLERANCE
    assert cache.length == sum(chunks)


@torch.no_grad()
def test_sliding_caches_are_bounded(config: ModelConfig, make_model: MakeModel, token_ids: TokenIds) -> None:
    model = make_model(config)
    cache = KVCache(config)
    model(token_ids(config, 3 * WINDOW), cache=cache)
    lengths = [layer.key.shape[2] for layer in cache.layers if layer.key is not None]
    assert lengths == [WINDOW - 1 if kind == SLIDING else 3 * WINDOW for kind in config.layer_types]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    padding: Callable[..., tuple[Tensor, Tensor]],
    difference: Difference,
    side: str,
) -> None:
    model = make_model(config)
    lengths = [3 * WINDOW, WINDOW + 1, 5]
    ids = token_ids(config, max(lengths), batch=len(lengths))
    mask, position_ids = padding(lengths, side)
    ours = model(ids, attention_mask=mask)
    for row in range(len(lengths)):
        alone = model(ids[row : row + 1, mask[row].bool()])
        assert difference(ours[row, mask[row].bool()], alone[0]) < TOLERANCE
    theirs = reference(model)(ids, attention_mask=mask, position_ids=position_ids).logits
    assert difference(ours[mask.bool()], theirs[mask.bool()]) < TOLERANCE


@torch.no_grad()
def test_left_padded_batch_steps_with_cache(
    config: ModelConfig, make_model: MakeModel, token_ids: TokenIds, difference: Difference
) -> None:
    model = make_model(config)
    ids = token_ids(config, 2 * WINDOW + 4, batch=2)
    mask = torch.ones_like(ids)
    mask[1, : WINDOW // 2] = 0
    cache = KVCache(config)
    parts = [model(ids[:, :WINDOW], mask[:, :WINDOW], cache)]
    parts += [model(ids[:, i : i + 1], mask[:, : i + 1], cache) for i in range(WINDOW, ids.shape[1])]
    assert difference(torch.cat(parts, 1)[mask.bool()], model(ids, mask)[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    gradient_difference: Callable[..., float],
    side: str,
) -> None:
    model = make_model(config)
    lengths = [3 * WINDOW, WINDOW + 1]
    ids = token_ids(config, max(lengths), batch=2)
    assert gradient_difference(model, reference(model), ids, lengths, side) < GRADIENT_TOLERANCE


def rope(local: float = 100.0, everywhere: float = 10_000.0, factor: float = 1.0) -> dict[str, RopeParameters]:
    """The rotation of both kinds of layer, the awkward config's by default."""
    stretched = RopeParameters(rope_theta=everywhere, rope_type="default" if factor == 1 else "linear", factor=factor)
    return {SLIDING: RopeParameters(rope_theta=local), FULL: stretched}


VARIANTS: dict[str, dict[str, Any]] = {
    "untied head": {"tie_word_embeddings": False},
    "gelu": {"hidden_activation": "gelu"},
    "silu": {"hidden_activation": "silu"},
    "relu": {"hidden_activation": "relu"},
    "stretched positions": {"rope_parameters": rope(factor=8.0)},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "sliding alone": {"layer_types": (SLIDING,) * 4},
    "global alone": {"layer_types": (FULL,) * 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variant(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    difference: Difference,
    variant: str,
) -> None:
    model = make_model(config.model_copy(update=VARIANTS[variant]))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    ids = token_ids(config, 3 * WINDOW)
    assert difference(model(ids), reference(model)(ids).logits) < TOLERANCE


# What the reference is told wrongly, or what is done to it; the model itself is the awkward one with an untied head.
KNOBS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": WINDOW + 1},
    "local base": {"rope_parameters": rope(local=101.0)},
    "global base": {"rope_parameters": rope(everywhere=10_100.0)},
    "rope factor": {"rope_parameters": rope(factor=1.01)},
    "attention scale": {"query_pre_attn_scalar": 25},
    "layer pattern": {"layer_types": (SLIDING, FULL, SLIDING, SLIDING)},
    "norm epsilon": {"rms_norm_eps": 1e-4},
    "activation": {"hidden_activation": "gelu"},
    "head tying": {"tie_word_embeddings": True},
}


def shift_last_norm(hf: Any) -> None:
    hf.model.norm.weight += 1e-3


def shift_a_key_norm(hf: Any) -> None:
    hf.model.layers[1].self_attn.k_norm.weight += 1e-3


def scale_embedding(hf: Any) -> None:
    hf.model.embed_tokens.embed_scale *= 1.001


def permute_attention(hf: Any, q: Tensor | None = None, k: Tensor | None = None) -> None:
    """Puts the query heads, or the kv heads, of every layer in another order."""
    for layer in hf.model.layers:
        attention, dim = layer.self_attn, hf.config.head_dim
        for order, proj in ((q, attention.q_proj), (k, attention.k_proj), (k, attention.v_proj)):
            if order is not None:
                proj.weight.copy_(proj.weight.unflatten(0, (-1, dim))[order].flatten(0, 1))
        if q is not None:
            attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (-1, dim))[:, q].flatten(1, 2))


def swap_kv_heads(hf: Any) -> None:
    permute_attention(hf, k=torch.tensor([1, 0]))


def deal_heads_in_turn(hf: Any) -> None:
    """Query head i looks at kv head i % K, where it should be i // (N / K)."""
    permute_attention(hf, q=torch.tensor([0, 2, 1, 3]))


def rotate_neighbours(hf: Any) -> None:
    """Turns elements 2i and 2i + 1 against each other, where it should be i and i + H/2."""
    dim = hf.config.head_dim
    order = torch.arange(dim).view(-1, 2).T.flatten()
    for layer in hf.model.layers:
        attention = layer.self_attn
        for proj, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
            proj.weight.copy_(proj.weight.unflatten(0, (-1, dim))[:, order].flatten(0, 1))
            norm.weight.copy_(norm.weight[order])


MISTAKES: dict[str, Callable[[Any], None]] = {
    "norm offset": shift_last_norm,
    "key norm offset": shift_a_key_norm,
    "embedding scale": scale_embedding,
    "kv heads swapped": swap_kv_heads,
    "kv heads dealt in turn": deal_heads_in_turn,
    "neighbours rotated": rotate_neighbours,
}


@pytest.mark.parametrize("knob", [*KNOBS, *MISTAKES])
def test_a_turned_knob_is_noticed(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    difference: Difference,
    gradient_difference: Callable[..., float],
    knob: str,
) -> None:
    untied = config.model_copy(update={"tie_word_embeddings": False})
    model = make_model(untied)
    wrong = reference(model, untied.model_copy(update=KNOBS.get(knob, {})))
    ids = token_ids(config, 3 * WINDOW)
    with torch.no_grad():
        MISTAKES.get(knob, lambda hf: None)(wrong)
        assert difference(model(ids), wrong(ids).logits) > 10 * TOLERANCE
    if knob != "head tying":  # a tied model has no gradient of a head to compare with
        assert gradient_difference(model, wrong, ids, [3 * WINDOW], "left") > 10 * GRADIENT_TOLERANCE


def test_a_wrong_gradient_of_one_tensor_is_noticed(
    config: ModelConfig,
    make_model: MakeModel,
    reference: Reference,
    token_ids: TokenIds,
    gradient_difference: Callable[..., float],
) -> None:
    model = make_model(config)
    wrong = reference(model)
    ids = token_ids(config, 3 * WINDOW)
    for name, parameter in wrong.named_parameters():
        hook = parameter.register_hook(lambda gradient: 1.01 * gradient)
        assert gradient_difference(model, wrong, ids, [3 * WINDOW], "left") > 10 * GRADIENT_TOLERANCE, name
        hook.remove()


@pytest.fixture
def in_bfloat16(config: ModelConfig, make_model: MakeModel) -> CausalLM:
    """A model in bfloat16 where sqrt(hidden_size) is not a bfloat16 number."""
    return make_model(config.model_copy(update={"hidden_size": 60})).to(torch.bfloat16)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_bfloat16_is_rounded_where_transformers_rounds(
    in_bfloat16: CausalLM, reference: Reference, token_ids: TokenIds, length: int
) -> None:
    hf = reference(in_bfloat16, dtype=torch.bfloat16)
    hf.set_attn_implementation("sdpa")
    ids = token_ids(in_bfloat16.config, length, batch=2)
    assert equal_share(in_bfloat16(ids), hf(ids).logits) > BFLOAT16_EQUAL


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers(
    in_bfloat16: CausalLM, reference: Reference, token_ids: TokenIds
) -> None:
    ids = token_ids(in_bfloat16.config, 3 * WINDOW, batch=2)
    truth = reference(in_bfloat16)(ids).logits
    theirs = reference(in_bfloat16, dtype=torch.bfloat16)(ids).logits
    cache = KVCache(in_bfloat16.config)
    steps = torch.cat([in_bfloat16(step, cache=cache) for step in ids.split(1, dim=1)], dim=1)
    for ours in (in_bfloat16(ids), steps):
        assert (ours - truth).pow(2).mean() < BFLOAT16_RATIO**2 * (theirs - truth).pow(2).mean()


def round_frequencies(hf: Any) -> None:
    """What `.to(torch.bfloat16)` does to transformers' model, and from_pretrained does not."""
    for name, buffer in hf.model.rotary_emb.named_buffers():
        setattr(hf.model.rotary_emb, name, buffer.bfloat16())


def round_before_the_gain(hf: Any) -> None:
    """Llama's norm, which Gemma's is not."""
    for norm in hf.modules():
        if type(norm).__name__ == "Gemma3RMSNorm":
            norm.forward = lambda x, norm=norm: norm._norm(x.float()).type_as(x) * (1 + norm.weight)


def keep_the_embedding_scale(hf: Any) -> None:
    embedding, scale = hf.model.embed_tokens, hf.config.hidden_size**0.5
    embedding.forward = lambda ids: (nn.functional.embedding(ids, embedding.weight).float() * scale).bfloat16()


@pytest.mark.parametrize("mistake", [round_frequencies, round_before_the_gain, keep_the_embedding_scale])
@torch.no_grad()
def test_rounding_elsewhere_in_bfloat16_is_noticed(
    in_bfloat16: CausalLM, reference: Reference, token_ids: TokenIds, mistake: Callable[[Any], None]
) -> None:
    hf = reference(in_bfloat16, dtype=torch.bfloat16)
    hf.set_attn_implementation("sdpa")
    mistake(hf)
    ids = token_ids(in_bfloat16.config, 3 * WINDOW, batch=2)
    assert equal_share(in_bfloat16(ids), hf(ids).logits) < 0.5


def equal_share(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype == torch.bfloat16
    return (ours == theirs).float().mean().item()


@pytest.mark.slow
@torch.no_grad()
def test_the_270m_shape(reference: Reference, token_ids: TokenIds, difference: Difference) -> None:
    from slm.core.presets import preset

    # The vocabulary makes the last product wider, and nothing else; the three periods of six layers have the same shapes.
    whole = preset("gemma3-270m")
    one_period = {"num_hidden_layers": 6, "layer_types": whole.layer_types[:6]}
    config = whole.model_copy(update={"vocab_size": 4096, **one_period})
    model = CausalLM(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    ids = token_ids(config, config.sliding_window + 64)
    assert difference(model(ids), reference(model)(ids).logits) < TOLERANCE
