"""What training may switch on in the model: layers computed anew, windows by FlexAttention, dropout, compiled kernels.

Dimensions: B batch, T positions.
"""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM, KVCache, attention
from slm.core.nn import model as module
from slm.core.nn.attention import SHORT, attend_in_products
from slm.core.nn.fake_quant import round_activations, round_weight
from slm.core.nn.flex import window_mask
from slm.core.nn.layers import gelu_tanh
from slm.core.qat import GRIDS
from slm.train.learner import Objective

# The same sums of float32 in another order; 2e-6 seen of logits up to 10. A window that is one longer moves them by 1e-2.
FLEX_TOLERANCE = 1e-4
# Fused kernels add and round in another order: 5e-7 seen of a loss near 6, and 1e-5 after five updates.
COMPILED_TOLERANCE = 1e-4
# Products and the fused kernel: 2e-6 seen of outputs and gradients near 1.
TOLERANCE = 2e-5

# Without a compiled kernel it says that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

MakeModel = Callable[..., CausalLM]
WINDOW = 16  # of the awkward config


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(length))


def with_dropout(model: CausalLM, share: float) -> CausalLM:
    for part in (model.model, *model.model.layers):
        part.dropout = share
    return model


def gradients(model: CausalLM, *, seed: int = 0, autocast: bool = False) -> tuple[dict[str, Tensor], int]:
    """The gradients of a batch, and the bytes that its forward pass kept beside the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = ids_of(40)
    torch.manual_seed(seed)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        hidden = model.model(ids)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    model.zero_grad()
    hidden.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_layers_computed_anew_give_the_same_gradients_and_keep_less(
    config: ModelConfig, make_model: MakeModel, dropout: float, autocast: bool
) -> None:
    model = with_dropout(make_model(config).train(), dropout)
    plain, kept = gradients(model, autocast=autocast)
    model.model.gradient_checkpointing = True
    anew, kept_anew = gradients(model, autocast=autocast)
    assert plain.keys() == anew.keys()
    assert len(plain) == len(list(model.parameters()))
    assert all(torch.equal(plain[name], anew[name]) for name in plain)  # the same products in the same order
    # What goes into 4 layers, against some thirty tensors as large in each.
    assert kept_anew < kept / 8
    if dropout:  # the control: other dice
        other, _ = gradients(model, seed=1, autocast=autocast)
        assert not any(torch.equal(anew[name], other[name]) for name in anew if "layers" in name)


def test_a_layer_is_computed_anew_in_training_alone(
    config: ModelConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    checkpoint = module.checkpoint

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return checkpoint(*arguments, **settings)

    monkeypatch.setattr(module, "checkpoint", counted)
    model = make_model(config)
    model.model.gradient_checkpointing = True
    wanted = model(ids_of(40))
    model(ids_of(40), cache=KVCache(config))
    assert calls == []
    assert (model.train()(ids_of(40)) - wanted).abs().max() < TOLERANCE  # short contexts train by plain products
    assert len(calls) == config.num_hidden_layers


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Lengths and windows that FlexAttention was asked for."""
    asked: list[tuple[int, int]] = []

    def remembered(length: int, window: int, device: torch.device) -> Any:
        asked.append((length, window))
        return window_mask(length, window, device)

    monkeypatch.setattr(module, "window_mask", remembered)
    yield asked
    window_mask.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 150])
def test_flex_is_attention_with_a_mask(
    config: ModelConfig, make_model: MakeModel, masks: list[tuple[int, int]], length: int
) -> None:
    model, wider = make_model(config), make_model(config.model_copy(update={"sliding_window": WINDOW + 1}))
    ids = ids_of(length)
    wanted = model(ids)
    assert masks == []
    for each in (model, wider):
        each.model.flex = True
    assert torch.equal(model(ids), wanted) and masks == []  # evaluation masks scores
    for each in (model, wider):
        each.train()
    assert (model(ids) - wanted).abs().max() < FLEX_TOLERANCE
    slides = length > WINDOW
    assert masks == ([(length, WINDOW)] if slides else [])  # no longer than the window it is plain causal attention
    if slides:  # the control
        assert (wider(ids) - wanted).abs().max() > 100 * FLEX_TOLERANCE


@torch.no_grad()
def test_flex_leaves_caches_and_padding_to_the_mask(
    config: ModelConfig, make_model: MakeModel, masks: list[tuple[int, int]]
) -> None:
    model = make_model(config)
    ids = ids_of(40)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    wanted = model(ids), model(ids, attention_mask=padding)
    model.train().model.flex = True
    cache = KVCache(config)
    in_two = torch.cat([model(ids[:, :20], cache=cache), model(ids[:, 20:], cache=cache)], 1)
    assert masks == [(20, WINDOW)]
    assert (in_two - wanted[0]).abs().max() < FLEX_TOLERANCE
    assert torch.equal(model(ids, attention_mask=padding), wanted[1])
    assert masks == [(20, WINDOW)]


def test_dropout_is_off_by_default_and_outside_of_training(config: ModelConfig, make_model: MakeModel) -> None:
    model, ids = make_model(config), ids_of(40)
    wanted = model(ids)
    assert (model.train()(ids) - wanted).abs().max() < TOLERANCE
    with_dropout(model, 0.3)
    torch.manual_seed(0)
    first = model(ids)
    assert not torch.equal(first, wanted)
    assert not torch.equal(model(ids), first)  # other dice
    torch.manual_seed(0)
    assert torch.equal(model(ids), first)
    assert torch.equal(model.eval()(ids), wanted)


def test_dropout_zeroes_its_share_of_embeddings_and_of_both_sub_layers(
    config: ModelConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    dropout = torch.nn.functional.dropout

    def counted(x: Tensor, *settings: Any) -> Tensor:
        out = dropout(x, *settings)
        shares.append((out == 0).float().mean().item())
        # what is left is scaled up, so that the sum is as large as before
        assert torch.allclose(out[out != 0], x[out != 0] / 0.75)
        return out

    monkeypatch.setattr(module.F, "dropout", counted)
    with_dropout(make_model(config).train(), 0.25)(ids_of(100, batch=4))
    assert len(shares) == 1 + 2 * config.num_hidden_layers
    # Of 25,600 values a quarter: a deviation of 0.02 is seven standard deviations.
    assert shares == pytest.approx([0.25] * len(shares), abs=0.02)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new directory for kernels: a killed process may have left half a kernel in the user's."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("kernels")
def test_compiled_kernels_give_the_same_losses(config: ModelConfig, make_model: MakeModel) -> None:
    few = config.model_copy(update={"num_hidden_layers": 2, "layer_types": config.layer_types[1:3]})  # one of each kind
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        model = make_model(few)
        objective = Objective(model, compiled=compiled).train()
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
        losses[compiled] = []
        for _ in range(5):
            rows = ids_of(41)
            loss = objective(rows[:, :-1], rows[:, 1:])
            losses[compiled].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[True] == pytest.approx(losses[False], abs=COMPILED_TOLERANCE)
    assert losses[False][-1] < losses[False][0] - 100 * COMPILED_TOLERANCE  # the updates do something


def test_compiled_kernels_are_for_training_alone(
    config: ModelConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def compile(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
        def body(ids: Tensor) -> Tensor:
            calls.append(True)
            return function(ids)

        return body

    monkeypatch.setattr(torch, "compile", compile)
    rows = ids_of(41)
    for compiled in (False, True):
        objective = Objective(make_model(config), compiled=compiled)
        for training in (False, True):
            objective.train(training)(rows[:, :-1], rows[:, 1:])
            assert calls == [True] * (compiled and training)


@pytest.mark.parametrize("length", [1, 2, 17, SHORT])
def test_attention_by_products_is_the_fused_one(length: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 16, generator=draw, requires_grad=True) for n in (6, 2, 2))
    out = torch.randn(2, 6, length, 16, generator=draw)
    plain = attend_in_products(q, k, v, 0.3)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert (plain - fused).abs().max() < TOLERANCE
    for mine, theirs in zip(
        torch.autograd.grad(plain, (q, k, v), out), torch.autograd.grad(fused, (q, k, v), out), strict=True
    ):
        assert (mine - theirs).abs().max() < TOLERANCE
    if length > 1:  # the control: another scale
        assert (attend_in_products(q, k, v, 0.4) - fused).abs().max() > 100 * TOLERANCE


def test_short_contexts_train_by_products_and_nothing_else_does(
    make_model: MakeModel, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(attention, "SHORT", 8)
    monkeypatch.setattr(
        attention, "attend_in_products", lambda *args: calls.append(args[0].shape[2]) or attend_in_products(*args)
    )
    model = make_model(config)
    model(torch.zeros(1, 8, dtype=torch.int64))
    model.train()
    model(torch.zeros(1, 9, dtype=torch.int64))
    assert calls == []
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert calls == [8] * config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_the_compiled_activation_is_the_same() -> None:
    x = torch.linspace(-30, 30, 4001, requires_grad=True)
    compiled, plain = torch.compile(gelu_tanh)(x), gelu_tanh(x)
    assert (compiled - plain).abs().max() < 1e-6
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (compiled, plain)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_compiled_rounding_is_the_same() -> None:
    scheme = GRIDS["int4"].scheme("model.layers.0.mlp.up_proj", 64)
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=draw, requires_grad=True) for rows in (5, 48))

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(round_activations(x, scheme), round_weight(weight, scheme))

    compiled, plain = torch.compile(product)(x, weight), product(x, weight)
    assert (compiled - plain).abs().max() < 1e-4
    assert (plain - F.linear(x, weight)).abs().max() > 0.01  # the control: without rounding
    gradients = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (compiled, plain)]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).abs().max() < 1e-3
