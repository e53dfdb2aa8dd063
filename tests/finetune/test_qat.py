"""Quantization-aware fine-tuning: gradients, the loss of the merged model, records, and what is not supported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from slm.core.checkpoint import read_info
from slm.core.errors import SlmError
from slm.core.grid import distance
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.nn.fake_quant import fake_quantize, round_activations, round_weight
from slm.core.qat import GRIDS, QatPrecision, recorded_grid
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import adapter_state, attach, load_state
from slm.finetune.batches import alone, batch_loss, collate, mean_loss
from slm.finetune.examples import Example, Renderer
from slm.finetune.frozen import lighten
from slm.finetune.merge import merge, merged_checkpoint
from slm.finetune.preparation import RowFiles
from slm.finetune.rows import read_rows
from slm.finetune.run import FinetuneResult, finetune
from slm.finetune.settings import FinetuneSettings
from tests.progress import Notes, Stopper

WriteRows = Callable[..., Path]

WORDS = ("one", "two", "red", "blue", "cat", "dog", "sun", "sea")
PAIRS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in WORDS]
QUICK = FinetuneSettings(rank=4, epochs=2, batch_size=4, learning_rate=7e-3)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "few targets": {"target_modules": ("q_proj", "down_proj")},
    "full": {"method": "full", "learning_rate": 7e-4},
}
# The distance of weights from their grid, in steps.
ON_GRID, OFF_GRID = 1e-5, 0.1
# Sums in another order flip single roundings, and a flip changes the roundings after it. Measured on this random model: up to
# 1e-3 nats, and 1e-7 where nothing flips.
MERGED = 3e-3
# Sums in another order, as a share of the largest gradient. Measured: 2e-6.
GRADIENT_TOLERANCE = 2e-5


def examples(base: Path, data: Path) -> list[Example]:
    model, tokenizer = load_checkpoint(base), Tokenizer.load(base)
    return [Renderer(tokenizer, model.config).example(row) for row in read_rows(data)]


def result_of(base: Path, result: FinetuneResult, method: str) -> CausalLM:
    return load_checkpoint(result.made) if method == "full" else merge(base, result.made)


def farthest(model: CausalLM, precision: QatPrecision) -> float:
    weights = model.state_dict()
    return max(distance(weights[name].numpy(), scheme) for name, scheme in GRIDS[precision].schemes(model.config))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", GRIDS)
def test_the_result_is_on_the_grid_and_has_the_loss_of_training(
    shared_checkpoint: Path, write_rows: WriteRows, method: str, precision: QatPrecision
) -> None:
    data = write_rows(PAIRS)
    files = RowFiles(data, hold_out=0.1)
    settings = QUICK.model_copy(update=METHODS[method] | {"qat": precision})
    notes = Notes()
    result = finetune(shared_checkpoint, files, Path("out"), settings, notes, samples=1)
    assert any(
        note.startswith(f"quantization-aware training for {precision.upper()}: layers in int") for note in notes.lines
    )
    model = result_of(shared_checkpoint, result, method)
    assert farthest(model, precision) < ON_GRID
    assert recorded_grid(read_info(result.made)) == GRIDS[precision]

    plain = finetune(shared_checkpoint, files, Path("plain"), QUICK.model_copy(update=METHODS[method]), samples=0)
    assert farthest(result_of(shared_checkpoint, plain, method), precision) > OFF_GRID
    assert recorded_grid(read_info(plain.made)) is None
    assert plain.loss_after != result.loss_after

    numbers = read_info(result.made).get("finetuned", read_info(result.made))["held_out_rows"]
    rows = examples(shared_checkpoint, data)
    held_out = [rows[number - 1] for number in numbers] or rows
    as_quantized = mean_loss(fake_quantize(model, GRIDS[precision]), held_out, 4)
    assert as_quantized == pytest.approx(result.loss_after, abs=MERGED)
    if precision == "int4":  # the control: the weights before rounding
        unrounded = result_of(shared_checkpoint, plain, method)
        assert abs(mean_loss(unrounded, held_out, 4) - result.loss_after) > 2 * MERGED


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_uninterrupted(shared_checkpoint: Path, write_rows: WriteRows, method: str) -> None:
    data, settings = write_rows(PAIRS), QUICK.model_copy(update=METHODS[method] | {"qat": "int4"})
    finetune(shared_checkpoint, data, Path("whole"), settings, samples=0)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("parts"), settings, Stopper(3), samples=0)
    finetune(shared_checkpoint, data, Path("parts"), settings, samples=0)
    weights = sorted(path.relative_to("whole") for path in Path("whole").rglob("*.safetensors"))
    assert weights and all(
        (Path("parts") / name).read_bytes() == (Path("whole") / name).read_bytes() for name in weights
    )


def reference_forward(module: LoraLinear, precision: QatPrecision, path: str) -> Callable[[Tensor], Tensor]:
    """The product of the rounded sum, by PyTorch's own gradients."""
    base, a, b = (
        module.get_base_layer().weight.detach(),
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
    )
    scheme, dora = GRIDS[precision].scheme(path, base.shape[1]), dict(module.lora_magnitude_vector).get("default")

    def forward(x: Tensor) -> Tensor:
        weight = base + module.scaling["default"] * (b @ a)
        if dora is not None:
            weight = weight * (dora.weight / torch.linalg.vector_norm(weight, dim=1).detach())[:, None]
        return nn.functional.linear(round_activations(x, scheme), round_weight(weight, scheme))

    return forward


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("tokens", [[], [1, 2]], ids=["no rows", "rows"])
def test_gradients_are_those_of_the_rounded_sum(
    shared_checkpoint: Path, write_rows: WriteRows, method: str, tokens: list[int]
) -> None:
    batch = collate(alone(examples(shared_checkpoint, write_rows(PAIRS))[:4]))
    settings = QUICK.model_copy(update=METHODS[method] | {"qat": "int4"})

    def gradients(replace: bool) -> dict[str, Tensor]:
        adapter = attach(load_checkpoint(shared_checkpoint), settings, shared_checkpoint, tokens)
        generator = torch.Generator().manual_seed(1)
        drawn = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in adapter_state(adapter).items()}
        load_state(adapter, {n: t.abs() + 0.5 if "magnitude" in n else t for n, t in drawn.items()})
        model = adapter.get_base_model().train()
        products = {name: each for name, each in model.model.named_modules() if isinstance(each, LoraLinear)}
        forwards = {name: reference_forward(each, "int4", f"model.{name}") for name, each in products.items()}
        lighten(model, None, GRIDS["int4"])
        for name, each in products.items():
            if replace:
                each.forward = forwards[name]
        batch_loss(model, batch).backward()
        return {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}

    ours, theirs = gradients(replace=False), gradients(replace=True)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    assert bool(tokens) == any("trainable_tokens" in name for name in ours)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < GRADIENT_TOLERANCE * gradient.abs().max(), name


def test_a_merged_adapter_records_the_grid_and_fine_tuning_in_floats_drops_it(
    shared_checkpoint: Path, write_rows: WriteRows
) -> None:
    data = write_rows(PAIRS)
    result = finetune(shared_checkpoint, data, Path("adapter"), QUICK.model_copy(update={"qat": "int8"}), samples=0)
    merged_checkpoint(shared_checkpoint, result.made, Path("merged"))
    assert recorded_grid(read_info(Path("merged"))) == GRIDS["int8"]
    for method in ("full", "lora"):
        again = finetune(Path("merged"), data, Path(method), QUICK.model_copy(update={"method": method}), samples=0)
        made = again.made
        if method == "lora":
            merged_checkpoint(Path("merged"), made, Path("merged-again"))
            made = Path("merged-again")
        assert recorded_grid(read_info(made)) is None


def test_bfloat16_products_train_too(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm.finetune import start
    from slm.train.precision import Precision

    data, losses = write_rows(PAIRS), {}
    for method in ("lora", "full"):
        settings = QUICK.model_copy(update={"qat": "int8", "method": method})
        for precision in (Precision(None, scale_loss=False), Precision(torch.bfloat16, scale_loss=False)):
            monkeypatch.setattr(start, "choose_precision", lambda *_, precision=precision: precision)
            out = Path(f"{method}-{precision.name}".replace(" ", "-"))
            losses[method, precision.autocast] = finetune(shared_checkpoint, data, out, settings, samples=1).loss_after
        assert losses[method, torch.bfloat16] == pytest.approx(losses[method, None], rel=0.02)


def test_dropout_is_rejected(shared_checkpoint: Path, write_rows: WriteRows, slm: Any) -> None:
    with pytest.raises(SlmError, match="dropout is not supported with qat"):
        FinetuneSettings.checked(qat="int8", dropout=0.1)
    result = slm(
        "finetune", "--lora", write_rows(PAIRS), "--base", shared_checkpoint, "--qat", "int8", "--dropout", "0.1"
    )
    assert result.code == 1 and "dropout is not supported with qat" in result.err


def test_the_option_of_the_command(shared_checkpoint: Path, write_rows: WriteRows, slm: Any) -> None:
    options = ("--base", shared_checkpoint, "--out", "out", "--epochs", 1, "--samples", 0, "--json")
    result = slm("finetune", "--lora", write_rows(PAIRS), *options, "--qat", "int4")
    assert result.code == 0, result.err
    assert json.loads(result.out)["adapter"] == "out"
    assert recorded_grid(read_info(Path("out"))) == GRIDS["int4"]
    assert "--qat [int8|int4]" in slm("finetune", "--help").out
