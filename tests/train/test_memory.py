"""The memory estimate against what torch really holds, and the advice against the estimate."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slm.core.nn import CausalLM
from slm.train.estimate import GPUS
from slm.train.learner import Objective
from slm.train.memory import advise, training_bytes
from slm.train.optimizer import make_optimizers
from slm.train.precision import Precision
from slm.train.recipe import Recipe, load_recipe

FLOAT32 = Precision(None, scale_loss=False)
BF16 = Precision(torch.bfloat16, scale_loss=False)
FLOAT16 = Precision(torch.float16, scale_loss=True)
# Beside the tensors that are counted, kernels keep means, sums, masks and cosines: 3 % seen.
ACTIVATIONS_TOLERANCE = 0.1


def recipe(*overrides: str, name: str = "tiny") -> Recipe:
    return load_recipe(name, ["batch.batch_size=4", *overrides])


def build(recipe: Recipe) -> CausalLM:
    model = CausalLM(recipe.model.config())
    model.init_weights(torch.Generator().manual_seed(0))
    model.model.gradient_checkpointing = recipe.machine.gradient_checkpointing
    return model.train()


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def kept(module: nn.Module, run: Callable[[], Any], precision: Precision) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted and every storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    tensors: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.autocast is not None),
    ):
        run()
    return size(tensors.values())


def kept_at_most(recipe: Recipe, precision: Precision) -> int:
    """What all layers keep; where each is computed anew, what goes into them and then what one of them keeps."""
    model, config = build(recipe), recipe.model.config()
    ids = torch.arange(recipe.tokens_per_micro_step).remainder(config.vocab_size).view(-1, recipe.batch.context)
    total = kept(model, lambda: model.model(ids), precision)
    total += ids.numel() * config.hidden_size * 4  # the gradient that the loss makes in the forward pass
    if recipe.machine.gradient_checkpointing:
        hidden = torch.randn(*ids.shape, config.hidden_size, requires_grad=True)
        total += max(
            kept(model.model.layers[i], partial(model.model.layers[i], hidden, positions, None), precision)
            for kind, positions in model.model.positions(ids, None, past=0).items()
            for i in [config.layer_types.index(kind)]
        )
    return total


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "two-tables"])
def test_weights_gradients_and_moments_to_the_byte(optimizer: str, tied: bool) -> None:
    chosen = recipe(f"optimizer.name={optimizer}", f"model.tie_word_embeddings={str(tied).lower()}")
    model, config = build(chosen), chosen.model.config()
    optimizers = make_optimizers(model, chosen.optimizer)
    ids = torch.arange(256).view(2, 128)
    Objective(model)(ids, ids).backward()
    for member in optimizers.members:
        member.step()
    estimate = training_bytes(chosen, config, FLOAT32)
    assert estimate.weights == size(model.parameters())
    assert estimate.gradients == size(p.grad for p in model.parameters() if p.grad is not None)
    state = optimizers.state_tensors(model)
    assert estimate.moments == size(tensor for name, tensor in state.items() if not name.endswith("/step"))
    for average in ("optimizer.ema=0.9", "optimizer.tail=0.1"):
        assert training_bytes(recipe(average), config, FLOAT32).average == estimate.weights
    assert estimate.average == 0


def test_a_cautious_update_has_a_copy_of_the_weights_while_activations_are_free() -> None:
    config = recipe().model.config()
    plain, cautious = (training_bytes(recipe(*more), config, FLOAT32) for more in ((), ("optimizer.cautious=true",)))
    assert (plain.update, cautious.update) == (0, plain.weights)
    assert plain.total == cautious.total  # at this batch activations are larger
    least = ("batch.batch_size=1", "batch.context=2", "machine.loss_chunk=1")
    few, fewer = (training_bytes(recipe(*least, *more), config, FLOAT32) for more in ((), ("optimizer.cautious=true",)))
    assert few.activations + few.loss < few.weights
    assert fewer.total - few.total == few.weights - few.activations - few.loss


def test_rows_of_documents_keep_masks() -> None:
    chosen = recipe("data.sampler=best_fit")
    model, config = build(chosen), chosen.model.config()
    ids = torch.arange(chosen.tokens_per_micro_step).remainder(config.vocab_size).view(-1, chosen.batch.context)
    segments = torch.arange(chosen.batch.context).div(30, rounding_mode="floor").expand_as(ids)
    measured = kept(model, lambda: model.model(ids, segments=segments), FLOAT32)
    measured += ids.numel() * config.hidden_size * 4  # the gradient that the loss makes in the forward pass
    estimate = training_bytes(chosen, config, FLOAT32).activations
    assert estimate == pytest.approx(measured, rel=ACTIVATIONS_TOLERANCE)


def test_shorter_rows_count_where_they_need_more_memory() -> None:
    """Rows of up to 128 tokens keep all their scores on a CPU, longer ones do not."""
    config = recipe("batch.context=512").model.config()
    long, short, both = (
        training_bytes(recipe(*overrides), config, FLOAT32).activations
        for overrides in (
            ("batch.context=512",),
            ("batch.context=128", "batch.batch_size=16"),
            ("batch.context=512", "batch.first_context=128"),
        )
    )
    assert both == max(long, short) != min(long, short)


def test_muon_has_one_moment_where_adamw_has_two() -> None:
    adamw, muon = (
        training_bytes(chosen, chosen.model.config(), FLOAT32)
        for chosen in (recipe("optimizer.name=adamw"), recipe("optimizer.name=muon"))
    )
    assert adamw.moments == 2 * adamw.weights
    assert adamw.weights < muon.moments < adamw.moments


@pytest.mark.parametrize(
    "shape",
    [
        (),
        ("batch.context=48",),
        ("model.num_attention_heads=8", "model.num_key_value_heads=4", "model.intermediate_size=128"),
        ("model.hidden_size=256", "model.num_hidden_layers=2", "model.vocab_size=4096"),
    ],
    ids=["tiny", "within-the-window", "many-heads", "wide"],
)
@pytest.mark.parametrize("precision", [FLOAT32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("anew", [False, True], ids=["kept", "checkpointed"])
def test_activations(shape: tuple[str, ...], precision: Precision, anew: bool) -> None:
    chosen = recipe(f"machine.gradient_checkpointing={str(anew).lower()}", *shape)
    estimate = training_bytes(chosen, chosen.model.config(), precision).activations
    measured = kept_at_most(chosen, precision)
    assert estimate == pytest.approx(measured, rel=ACTIVATIONS_TOLERANCE)


def test_a_gpu_without_flash_keeps_expanded_keys_and_values() -> None:
    """Where flash does not apply, each query head has keys and values of its own; flash keeps a copy of its output."""
    for name, positions in (("documented", 32 * 128 * 18), ("modern", 16 * 512 * 18)):
        chosen = load_recipe(name)
        config = chosen.model.config()
        t4, a100 = (training_bytes(chosen, config, FLOAT16, able=GPUS[card].able) for card in ("t4", "a100"))
        expanded = 2 * (config.num_attention_heads - config.num_key_value_heads)
        assert t4.activations - a100.activations == positions * (expanded - config.num_attention_heads) * 2 * 256
        assert t4.total < GPUS["t4"].memory_gib * 2**30


def test_activations_grow_with_the_batch_and_shrink_where_layers_are_computed_anew() -> None:
    """The control of the test above: each of its settings moves the estimate by more than its tolerance."""

    def activations(precision: Precision, *overrides: str) -> int:
        chosen = recipe(*overrides)
        return training_bytes(chosen, chosen.model.config(), precision).activations

    base = activations(FLOAT32)
    assert activations(FLOAT32, "batch.batch_size=8") == 2 * base
    # Up to 128 tokens a CPU keeps the scores, so that four times 128 tokens take less than four times as much.
    assert activations(FLOAT32, "batch.context=512") == 2 * activations(FLOAT32, "batch.context=256") < 4 * base
    assert activations(BF16, "batch.context=256") < 0.8 * activations(FLOAT32, "batch.context=256")
    assert activations(FLOAT32, "machine.gradient_checkpointing=true") < 0.3 * base


def test_the_loss_takes_a_chunk() -> None:
    config = recipe().model.config()
    whole, chunked = (
        training_bytes(chosen, config, FLOAT32).loss for chosen in (recipe(), recipe("machine.loss_chunk=32"))
    )
    assert whole - chunked == (4 * 128 - 32) * config.vocab_size * 4


def test_processes_share_the_batch_and_with_fsdp_everything() -> None:
    for parallel, shared in (("ddp", 1), ("fsdp", 4)):
        chosen = recipe(f"machine.parallel={parallel}")
        alone, four = (training_bytes(chosen, chosen.model.config(), FLOAT32, processes=n) for n in (1, 4))
        assert alone.activations == 4 * four.activations
        assert alone.weights == shared * four.weights
        assert alone.moments == shared * four.moments


def followed(chosen: Recipe, advice: str) -> Recipe:
    """The recipe with what the advice says to --set."""
    fields = chosen.model_dump(mode="json")
    for section, key, value in re.findall(r"--set (\w+)\.(\w+)=(\w+)", advice):
        assert key in fields[section], key
        fields[section][key] = {"true": True}.get(value) or int(value)
    return Recipe.model_validate(fields)


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (5, 1), (9, 1), (6, 2), (8, 4)])
def test_advice_lowers_the_estimate_by_what_it_says_and_learns_from_as_much(batch_size: int, processes: int) -> None:
    chosen = recipe(f"batch.batch_size={batch_size}", "batch.accumulation=3")
    config = chosen.model.config()
    now = training_bytes(chosen, config, FLOAT32, processes).total
    advice = advise(chosen, config, FLOAT32, processes).split("; or ")
    assert len(advice) == 2  # sentences
    for sentence in advice:
        (saved,) = (int(mib.replace(",", "")) for mib in re.findall(r"saves about ([\d,]+)", sentence))
        then = training_bytes(followed(chosen, sentence), config, FLOAT32, processes).total
        assert saved > 0
        assert now - then == pytest.approx(saved * 2**20, abs=2**20)
    fewer = followed(chosen, advice[0]).batch
    assert fewer.batch_size % processes == 0
    assert fewer.batch_size * fewer.accumulation == batch_size * 3
    (times,) = re.findall(r"with (\d+) times as many micro-steps", advice[0])
    assert fewer.accumulation == 3 * int(times)


@pytest.mark.parametrize(
    "overrides",
    [["machine.gradient_checkpointing=true"], ["model.num_hidden_layers=1"]],
    ids=["checkpointed", "one-layer"],
)
def test_advice_when_there_is_little_left_to_lower(overrides: list[str]) -> None:
    """To compute a single layer anew would keep more, not less."""
    chosen = recipe("batch.batch_size=1", *overrides)
    config = chosen.model.config()
    advice = advise(chosen, config, FLOAT32, 1)
    now, then = (training_bytes(each, config, FLOAT32).total for each in (chosen, followed(chosen, advice)))
    assert then < now
    assert "smaller model" in advice


def least(chosen: Recipe) -> int:
    """What the estimate comes to with a window a micro-step and each layer computed anew."""
    lowered = ("batch.batch_size=1", "machine.gradient_checkpointing=true")
    return training_bytes(recipe(*lowered), chosen.model.config(), FLOAT32).total


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4, 0.2, 0.05])
def test_advice_goes_as_far_as_it_takes_to_fit(share: float) -> None:
    chosen = recipe("batch.batch_size=32")
    config = chosen.model.config()
    now, end = training_bytes(chosen, config, FLOAT32).total, least(chosen)
    available = round(end + share * (now - end))
    for sentence in advise(chosen, config, FLOAT32, 1, available).split("; or "):
        lowered = followed(chosen, sentence)
        assert training_bytes(lowered, config, FLOAT32).total < available
        if lowered.batch.batch_size < chosen.batch.batch_size:  # and no further: twice the batch would not
            parts = lowered.batch.accumulation
            twice = {"batch_size": 2 * lowered.batch.batch_size, "accumulation": parts // 2}
            larger = lowered.model_copy(update={"batch": lowered.batch.model_copy(update=twice)})
            assert training_bytes(larger, config, FLOAT32).total >= available
    assert len({advise(chosen, config, FLOAT32, 1, round(end + s * (now - end))) for s in (0.9, 0.4, 0.05)}) == 3


def test_advice_shortens_the_context_when_nothing_else_is_left() -> None:
    chosen = recipe("batch.batch_size=4")
    config, end = chosen.model.config(), least(chosen)
    (shorter, smaller) = advise(chosen, config, FLOAT32, 1, end - (1 << 19)).split("; or ")
    assert "--set batch.context=" in shorter and smaller == "a smaller model"
    assert "times as many micro-steps" not in shorter  # for it does not learn as much
    assert training_bytes(followed(chosen, shorter), config, FLOAT32).total < end - (1 << 19)
    assert advise(chosen, config, FLOAT32, 1, 1 << 20).startswith("a smaller model: this one takes")
