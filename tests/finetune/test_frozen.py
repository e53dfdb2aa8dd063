"""What stands in for peft's arithmetic while training: the same losses and gradients, and less work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import adapter_state, load_adapter
from slm.finetune.batches import alone, batch_loss, casting, collate, mean_loss
from slm.finetune.examples import Example
from slm.finetune.frozen import lighten
from slm.finetune.settings import PROJECTIONS
from tests.finetune.conftest import TURN_TOKEN_IDS

MakeAdapter = Callable[..., Path]

# Float32 sums in another order, of the largest gradient of each tensor.
TOLERANCE = 2e-4
# bfloat16 keeps 8 bits, through four layers: 0.05 seen, between two orders of rounding.
BF16_TOLERANCE = 0.15

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "rank": 4},
    "dora": {"dora": True},
    "some": {"target_modules": ("q_proj", "down_proj")},
}
EXAMPLES = [
    Example((0, 1, 9, 2, 1, 30, 31, 2, 0), ((5, 9),)),
    Example(tuple(range(40)), ((3, 6), (20, 40))),
    Example((0, 1, 50, 1, 2, 7), ((1, 6),)),
]


@pytest.fixture
def base(either_head: CausalLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A checkpoint with random weights that bfloat16 can hold, as Gemma's are."""
    for parameter in either_head.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_checkpoint(tmp_path / "base", either_head, tokenizer, {})
    return tmp_path / "base"


def learned(base: Path, adapter: Path, products: torch.dtype | None, *, light: bool) -> dict[str, torch.Tensor]:
    """Returns the loss and the gradients of an adapter, by the names of its file."""
    model = load_adapter(load_checkpoint(base), adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "trainable_tokens" in name)
    tunable = model.get_base_model()
    if light:
        lighten(tunable, products)
    tunable.train()
    with casting(tunable, products):
        loss = batch_loss(tunable, collate(alone(EXAMPLES)))
    loss.backward()
    by_place = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    found = {name: by_place[tensor.data_ptr()].grad for name, tensor in adapter_state(model).items()}
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in found.values())
    assert sum(p.grad is not None for p in model.parameters()) == len(found)
    return {"loss": loss.detach(), **{name: gradient for name, gradient in found.items() if gradient is not None}}


def furthest(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(((got[name] - value).abs().max() / value.abs().max()).item() for name, value in wanted.items())


@pytest.mark.parametrize("tokens", [[], TURN_TOKEN_IDS], ids=["projections", "with-tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_peft_s(base: Path, random_adapter: MakeAdapter, kind: str, tokens: list[int]) -> None:
    adapter = random_adapter(base, tokens, **KINDS[kind])
    wanted = learned(base, adapter, None, light=False)
    assert furthest(learned(base, adapter, None, light=True), wanted) < TOLERANCE
    rounded = furthest(learned(base, adapter, torch.bfloat16, light=True), wanted)
    assert TOLERANCE < rounded < BF16_TOLERANCE


def test_another_adapter_has_other_gradients(base: Path, random_adapter: MakeAdapter) -> None:
    wanted = learned(base, random_adapter(base, TURN_TOKEN_IDS), None, light=True)
    config = base.parent / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    assert furthest(learned(base, base.parent / "adapter", None, light=True), wanted) > 100 * TOLERANCE


def test_measuring_too_is_the_same(base: Path, random_adapter: MakeAdapter) -> None:
    adapter = random_adapter(base, TURN_TOKEN_IDS, dora=True)
    models = [load_adapter(load_checkpoint(base), adapter).get_base_model() for _ in range(2)]
    lighten(models[1], None)
    plain, light = (mean_loss(model, EXAMPLES, 2) for model in models)
    assert light == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_frozen_weights_are_stored_as_the_products_take_them(
    base: Path, random_adapter: MakeAdapter, exact: bool
) -> None:
    loaded = load_checkpoint(base)
    if not exact:
        loaded.model.embed_tokens.weight.data += 1e-4
    model = load_adapter(loaded, random_adapter(base, TURN_TOKEN_IDS)).get_base_model()
    lighten(model, torch.bfloat16)
    for layer in model.model.layers:
        for name in PROJECTIONS:
            part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            assert getattr(part, name).base_layer.weight.dtype == torch.bfloat16
    table = model.model.embed_tokens.original_module.weight
    assert model.head_weight is not None and model.head_weight.dtype == torch.bfloat16
    # What begins the residual stream is looked up as it is, in float32 where bfloat16 would round it.
    assert table.dtype == (torch.bfloat16 if exact else torch.float32)
    tied = loaded.config.tie_word_embeddings
    assert (table.data_ptr() == model.head_weight.data_ptr()) == (tied and exact)


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made, views of what was there left out."""

    def __init__(self, there: torch.nn.Module) -> None:
        super().__init__()
        self.size = 0
        self._there = {p.untyped_storage().data_ptr() for p in there.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self._there:
            self.size = max(self.size, made.numel())
        return made


def test_no_copy_of_the_table_is_made(base: Path, random_adapter: MakeAdapter) -> None:
    sizes = []
    for light in (True, False):
        model = load_adapter(load_checkpoint(base), random_adapter_again(base, random_adapter)).get_base_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "trainable_tokens" in name)
        if light:
            lighten(model, None)
        with _Largest(model) as largest:
            batch_loss(model, collate(alone(EXAMPLES[2:]))).backward()
        sizes.append(largest.size)
    table = model.model.embed_tokens.original_module.weight.numel()
    assert sizes[0] < table <= sizes[1]


def random_adapter_again(base: Path, random_adapter: MakeAdapter) -> Path:
    """Makes the adapter once."""
    path = base.parent / "adapter"
    return path if path.is_dir() else random_adapter(base, TURN_TOKEN_IDS)
