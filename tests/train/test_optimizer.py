"""Optimizers: which of them has which parameters, Muon's steps against a plain reference, and the state as tensors.

Dimensions: M rows and N columns of a matrix.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM
from slm.train import optimizer as optimizer_module
from slm.train.estimate import GPUS
from slm.train.muon import Muon, orthogonalization_flops, orthogonalize
from slm.train.optimizer import Optimizers, make_optimizers
from slm.train.precision import CPU, Capability
from slm.train.sections import OptimizerRecipe

SETTINGS = OptimizerRecipe(name="muon", momentum=0.9)
RATE = 0.02
# Of the length of the way gone. Both round to bfloat16's 8 bits, but sum in another order: 5e-3 seen. Without Nesterov or
# with another momentum, decay or number of iterations it is 7e-2 or more.
MUON_TOLERANCE = 1.5e-2
# float32 throughout; 6e-8 seen.
ADAMW_TOLERANCE = 1e-6

MATRICES = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(4)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


def settings(**changes: Any) -> OptimizerRecipe:
    return SETTINGS.model_copy(update=changes)


def of_optimizer(model: CausalLM, member: torch.optim.Optimizer) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for group in member.param_groups for parameter in group["params"]}


def gradients(model: CausalLM, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def weights(model: CausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def step(model: CausalLM, optimizers: Optimizers, seed: int, rate: float = RATE) -> None:
    gradients(model, seed)
    optimizers.set_learning_rate(rate)
    for member in optimizers.members:
        member.step()


@pytest.fixture
def model(config: ModelConfig, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(config)


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else(model: CausalLM) -> None:
    muon, adamw = make_optimizers(model, SETTINGS).members
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert of_optimizer(model, muon) == MATRICES
    assert of_optimizer(model, adamw) == {name for name, _ in model.named_parameters()} - MATRICES


def test_a_head_of_its_own_goes_with_the_embedding(config: ModelConfig, make_model: Callable[..., CausalLM]) -> None:
    model = make_model(config.model_copy(update={"tie_word_embeddings": False}))
    optimizers = make_optimizers(model, settings(embedding_rate=3.0))
    assert of_optimizer(model, optimizers.members[0]) == MATRICES
    tables = {model.model.embed_tokens.weight, model.lm_head.weight}
    (group,) = (group for group in optimizers.groups if group["rate"] == 3.0)
    assert set(group["params"]) == tables


def test_adamw_has_every_parameter_once(model: CausalLM) -> None:
    optimizers = make_optimizers(model, settings(name="adamw"))
    (adamw,) = optimizers.members
    assert of_optimizer(model, adamw) == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizers.groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("decay", "norms_decayed"), [("matrices", False), ("all", True)])
def test_what_is_decayed(model: CausalLM, name: Any, decay: Any, norms_decayed: bool) -> None:
    optimizers = make_optimizers(model, settings(name=name, decay=decay, weight_decay=0.25))
    shares = {parameter: group["weight_decay"] for group in optimizers.groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        assert shares[parameter] == (0.25 if parameter.dim() > 1 or norms_decayed else 0.0), key
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.set_learning_rate(RATE)
    for member in optimizers.members:
        member.step()
    for key, after in weights(
        model
    ).items():  # without a gradient there is nothing but the decay, which knows no moments
        share = 1 - RATE * (0.25 if after.dim() > 1 or norms_decayed else 0.0)
        torch.testing.assert_close(after, before[key] * share, rtol=ADAMW_TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_are_multiples_of_the_schedules(model: CausalLM, name: Any) -> None:
    optimizers = make_optimizers(model, settings(name=name, matrix_rate=0.5, embedding_rate=4.0))
    for rate in (1e-3, 2e-4):
        optimizers.set_learning_rate(rate)
        of = {parameter: group["lr"] for group in optimizers.groups for parameter in group["params"]}
        assert of[model.model.embed_tokens.weight] == pytest.approx(4 * rate)
        assert of[model.model.layers[1].mlp.up_proj.weight] == pytest.approx(rate / 2)
        assert of[model.model.layers[1].input_layernorm.weight] == pytest.approx(rate)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Newton and Schulz's iteration with Keller Jordan's coefficients, the short side first, rounded to bfloat16."""

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    tall = matrix.shape[0] > matrix.shape[1]
    x = rounded(matrix.T if tall else matrix)
    x = rounded(x / rounded(x.norm()))
    for _ in range(iterations):
        gram = rounded(x @ x.T)
        x = rounded(3.4445 * x + rounded(-4.7750 * gram + 2.0315 * gram @ gram) @ x)
    return x.T if tall else x


def muon_reference(
    weight: Tensor,
    gradients: list[Tensor],
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    decay: float = 0.1,
    iterations: int = 5,
) -> Tensor:
    """Returns the weight after a step with each gradient."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = momentum * velocity + (1 - momentum) * gradient
        ahead = momentum * velocity + (1 - momentum) * gradient if nesterov else velocity
        weight = weight * (1 - RATE * decay)  # decoupled: by the rate alone
        size = 0.2 * max(weight.shape) ** 0.5  # the root mean square that AdamW's steps have
        weight = weight - RATE * size * orthogonal(ahead, iterations)
    return weight


# Wide, tall and square ones.
SOME = [f"model.layers.0.{name}.weight" for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj")]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "other",
    [{}, {"momentum": 0.8}, {"nesterov": False}, {"decay": 0.3}, {"iterations": 4}],
    ids=["same", "momentum", "nesterov", "decay", "iterations"],
)
def test_muons_steps_are_those_of_a_plain_reference(model: CausalLM, name: str, other: dict[str, Any]) -> None:
    optimizers = make_optimizers(model, SETTINGS)
    start, seen = model.get_parameter(name).detach().clone(), []
    for seed in range(3):
        step(model, optimizers, seed)
        seen.append(model.get_parameter(name).grad.clone())
    moved = model.get_parameter(name).detach() - start
    difference = ((muon_reference(start, seen, **other) - start - moved).norm() / moved.norm()).item()
    if other:  # the controls
        assert difference > 3 * MUON_TOLERANCE
    else:
        assert difference < MUON_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_without_native_bfloat16_muon_takes_the_same_steps(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """On such a GPU Muon orthogonalizes in another type; nothing else differs, the size of the gradient included."""
    name = SOME[0]
    monkeypatch.setattr(optimizer_module, "_emulates_bfloat16", lambda device: True)
    optimizers = make_optimizers(model, SETTINGS)
    (muon, _) = optimizers.members
    assert isinstance(muon, Muon) and muon.dtype == torch.float16
    muon.dtype = dtype
    start, seen = model.get_parameter(name).detach().clone(), []
    for seed in range(3):
        gradients(model, seed)
        for parameter in model.parameters():
            parameter.grad.mul_(1e6)  # beyond float16's largest number when squared and summed
        seen.append(model.get_parameter(name).grad.clone())
        optimizers.set_learning_rate(RATE)
        optimizers.members[0].step()
    moved = model.get_parameter(name).detach() - start
    difference = (muon_reference(start, seen) - start - moved).norm() / moved.norm()
    assert difference < MUON_TOLERANCE
    assert (muon_reference(start, seen, momentum=0.8) - start - moved).norm() / moved.norm() > 3 * MUON_TOLERANCE


@pytest.mark.parametrize(
    ("able", "own"),
    [
        (GPUS["t4"].able, True),
        (GPUS["v100"].able, True),
        (GPUS["a100"].able, False),
        (GPUS["h200"].able, False),
        (CPU, False),
    ],
)
def test_which_gpus_take_muon_in_float16(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, able: Capability, own: bool
) -> None:
    """Those that emulate bfloat16; on a CPU and on newer GPUs it is PyTorch's own, whose results recipes were tuned with."""
    monkeypatch.setattr(optimizer_module, "capability", lambda device: able)
    muon = make_optimizers(model, SETTINGS).members[0]
    assert type(muon) is (Muon if own else torch.optim.Muon)


def test_the_operations_of_muon_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((24, 64), (64, 24), (32, 32)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(shape), torch.float32)
        assert counter.get_total_flops() == orthogonalization_flops(*shape)


def test_a_step_of_muon_is_as_large_as_one_of_adamw(model: CausalLM) -> None:
    before = weights(model)
    step(model, make_optimizers(model, settings(weight_decay=0.0)), 0)
    for name in MATRICES:
        size = (model.get_parameter(name) - before[name]).square().mean().sqrt().item() / RATE
        # 0.2 to 0.4 is what AdamW's have (arXiv:2502.16982); singular values near 1 of M by N make 1 / sqrt(max(M, N)).
        assert 0.1 < size < 0.3, name


def normuon_reference(weight: Tensor, gradients: list[Tensor], *, row_beta: float = 0.95, rows: bool = True) -> Tensor:
    """Returns the weight after a step with each gradient, as algorithm 1 of arXiv:2510.05491 has it."""
    velocity, moment = torch.zeros_like(weight), torch.zeros(len(weight), 1)
    for gradient in gradients:
        velocity = 0.9 * velocity + 0.1 * gradient
        ahead = orthogonal(0.9 * velocity + 0.1 * gradient)
        moment = row_beta * moment + (1 - row_beta) * (ahead**2).mean(1, keepdim=True)
        ahead = ahead / (moment.sqrt() + 1e-7) if rows else ahead
        size = 0.2 * (weight.shape[0] * weight.shape[1]) ** 0.5 / ahead.norm()
        weight = weight * (1 - RATE * 0.1) - RATE * size * ahead
    return weight


# Orthogonalized rows of a wide matrix are of nearly equal size already; only a tall one shows the moment's decay.
@pytest.mark.parametrize(
    ("name", "other"),
    [*((name, other) for name in SOME for other in ({}, {"rows": False})), (SOME[0], {"row_beta": 0.2})],
)
def test_normuons_steps_are_those_of_a_plain_reference(model: CausalLM, name: str, other: dict[str, Any]) -> None:
    optimizers = make_optimizers(model, settings(name="normuon"))
    assert of_optimizer(model, optimizers.members[0]) == MATRICES
    start, seen = model.get_parameter(name).detach().clone(), []
    for seed in range(3):
        gradients(model, seed)
        rows = torch.arange(1, len(start) + 1)[:, None] * (seed + 1)  # rows of sizes that change
        model.get_parameter(name).grad.mul_(rows.sin())
        seen.append(model.get_parameter(name).grad.clone())
        optimizers.set_learning_rate(RATE)
        optimizers.step()
    moved = model.get_parameter(name).detach() - start
    difference = ((normuon_reference(start, seen, **other) - start - moved).norm() / moved.norm()).item()
    assert difference < MUON_TOLERANCE if not other else difference > 2 * MUON_TOLERANCE


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
def test_a_cautious_weight_decays_where_the_step_moves_it_towards_zero(model: CausalLM, name: Any) -> None:
    """The step itself is that without decay; a step of 0 lets a weight decay."""
    start, after = weights(model), {}
    for decay in (0.0, 5.0):
        model.load_state_dict(start, strict=False)
        optimizers = make_optimizers(model, settings(name=name, weight_decay=decay, cautious=True))
        for seed in (11, 12):  # the seed of the weights would draw them again
            before = weights(model)
            gradients(model, seed)
            model.model.embed_tokens.weight.grad[:3] = 0
            optimizers.set_learning_rate(RATE)
            optimizers.step()
            if decay and seed == 11:
                for key, parameter in model.named_parameters():
                    step = before[key] - after[0.0, key]
                    towards = (step * before[key] >= 0) & (parameter.dim() > 1)
                    wanted = after[0.0, key] - RATE * decay * before[key] * towards
                    torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=ADAMW_TOLERANCE)
                    if parameter.dim() > 1:
                        assert 0.3 < towards.float().mean() < 0.7 or "embed" in key
                assert model.model.embed_tokens.weight[:3].norm() < 0.95 * start[EMBEDDING][:3].norm()
            elif seed == 11:
                after |= {(decay, key): tensor for key, tensor in weights(model).items()}


@pytest.mark.parametrize("cautious", [False, True])
def test_the_decay_follows_its_share(model: CausalLM, cautious: bool) -> None:
    optimizers = make_optimizers(model, settings(name="muon", cautious=cautious, weight_decay=0.4))
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.set_learning_rate(RATE)
    optimizers.set_decay(0.25)
    optimizers.step()
    for key, after in weights(model).items():
        share = 1 - RATE * 0.4 * 0.25 * (after.dim() > 1)
        torch.testing.assert_close(after, before[key] * share, rtol=ADAMW_TOLERANCE, atol=0)


def test_betas_of_each_kind_of_parameter(model: CausalLM) -> None:
    chosen = settings(embedding_betas=(0.8, 0.9), norm_betas=(0.7, 0.99))
    for name, of_matrix in (("muon", None), ("adamw", (0.9, 0.95))):
        optimizers = make_optimizers(model, chosen.model_copy(update={"name": name}))
        betas = {parameter: group.get("betas") for group in optimizers.groups for parameter in group["params"]}
        assert betas[model.model.embed_tokens.weight] == (0.8, 0.9)
        assert betas[model.model.layers[1].input_layernorm.weight] == (0.7, 0.99)
        assert betas[model.model.layers[1].mlp.up_proj.weight] == of_matrix


def test_momentum_is_set_for_the_matrices(model: CausalLM) -> None:
    for name in ("muon", "normuon"):
        optimizers = make_optimizers(model, settings(name=name))
        optimizers.set_momentum(0.5)
        assert [group["momentum"] for group in optimizers.groups if "momentum" in group] == [0.5]


def test_what_is_no_matrix_of_a_block_steps_with_adamw(model: CausalLM) -> None:
    """The moments without bias are the gradient itself after one step: its sign is the step."""
    before = weights(model)
    optimizers = make_optimizers(model, settings(decay="all"))
    step(model, optimizers, 0)
    for name in before.keys() - MATRICES:
        wanted = before[name] * (1 - RATE * 0.1) - RATE * model.get_parameter(name).grad.sign()
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=0, atol=ADAMW_TOLERANCE)


@pytest.fixture(params=["adamw", "muon", "normuon"])
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def twins(
    config: ModelConfig, make_model: Callable[..., CausalLM], name: Any
) -> tuple[list[CausalLM], list[Optimizers]]:
    """Two models with the same weights, and optimizers of each."""
    models = [make_model(config), make_model(config)]
    return models, [make_optimizers(model, settings(name=name)) for model in models]


def test_the_state_is_named_by_parameter_and_comes_back_bit_by_bit(
    twins: tuple[list[CausalLM], list[Optimizers]], name: str
) -> None:
    models, (one, other) = twins
    assert one.state_tensors(models[0]) == {}
    for seed in range(3):
        step(models[0], one, seed)
    models[1].load_state_dict(models[0].state_dict())
    saved = {key: tensor.clone() for key, tensor in one.state_tensors(models[0]).items()}
    adamws = {"step", "exp_avg", "exp_avg_sq"}
    muons = {"momentum_buffer"}
    of_matrices = {"adamw": adamws, "muon": muons, "normuon": muons | {"row_moment"}}
    assert saved.keys() == {
        f"{key}/{moment}"
        for key, _ in models[0].named_parameters()
        for moment in (of_matrices[name] if key in MATRICES else adamws)
    }
    other.load_state_tensors(models[1], saved)
    for (key, tensor), (_, again) in zip(saved.items(), other.state_tensors(models[1]).items(), strict=True):
        assert torch.equal(tensor, again), key
    for seed in (3, 4):
        for model, optimizers in zip(models, (one, other), strict=True):
            step(model, optimizers, seed)
    assert all(torch.equal(weights(models[0])[key], tensor) for key, tensor in weights(models[1]).items())


def test_a_state_that_is_not_put_back_is_missed(twins: tuple[list[CausalLM], list[Optimizers]]) -> None:
    models, (one, other) = twins
    step(models[0], one, 0)
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizers in zip(models, (one, other), strict=True):
        step(model, optimizers, 1)
    assert not any(torch.equal(weights(models[0])[key], tensor) for key, tensor in weights(models[1]).items())


EMBEDDING = "model.embed_tokens.weight"


def _lost(state: dict[str, Tensor]) -> None:
    del state[f"{EMBEDDING}/exp_avg_sq"]


def _foreign(state: dict[str, Tensor]) -> None:
    state["model.layers.4.mlp.up_proj.weight/exp_avg"] = torch.zeros(96, 64)


def _narrower(state: dict[str, Tensor]) -> None:
    state[f"{EMBEDDING}/exp_avg"] = state[f"{EMBEDDING}/exp_avg"][:, :32]


def _renamed(state: dict[str, Tensor]) -> None:
    state[f"{EMBEDDING}/exp_average"] = state.pop(f"{EMBEDDING}/exp_avg")


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (_lost, f"{EMBEDDING}/exp_avg_sq is missing"),
        (_foreign, "layers.4.mlp.up_proj.weight/exp_avg is unknown"),
        (_narrower, f"{EMBEDDING}/exp_avg is of another shape"),
        (_renamed, f"{EMBEDDING}/exp_average is unknown|{EMBEDDING}/exp_avg is missing"),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_that_does_not_fit_is_refused(
    model: CausalLM, name: Any, alter: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    optimizers = make_optimizers(model, settings(name=name))
    step(model, optimizers, 0)
    saved = optimizers.state_tensors(model)
    optimizers.load_state_tensors(model, saved)
    alter(saved)
    with pytest.raises(SlmError, match=said) as error:
        optimizers.load_state_tensors(model, saved)
    assert "config.yaml" in (error.value.hint or "")


def test_the_state_of_the_other_optimizer_is_refused(model: CausalLM) -> None:
    adamw, muon = (make_optimizers(model, settings(name=name)) for name in ("adamw", "muon"))
    step(model, adamw, 0)
    with pytest.raises(SlmError, match="does not fit the model"):
        muon.load_state_tensors(model, adamw.state_tensors(model))


def test_no_state_is_that_before_the_first_update(model: CausalLM) -> None:
    optimizers = make_optimizers(model, SETTINGS)
    optimizers.load_state_tensors(model, {})
    assert optimizers.state_tensors(model) == {}
