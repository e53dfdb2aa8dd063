"""Mixed precision: budgets are kept, the choice is deterministic, and sensitivities equal a direct measurement."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from slm.core.config import FULL, ModelConfig
from slm.core.errors import SlmError
from slm.core.grid import BLOCK_SIZES
from slm.core.manifest import Bundle, Scheme
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.export.graph import FloatFormat, Fused, LazyTensors, build_graph, graph_tensors, save_graph
from slm.export.graph.builder import Array
from slm.quantize import plan as plan_module
from slm.quantize.blocks import quantize_nearest
from slm.quantize.linears import Linear, linears_of
from slm.quantize.make import quantize_bundle
from slm.quantize.plan import (
    INT4,
    INT8,
    INT8_DYNAMIC,
    PreferredSchemes,
    QuantizationPlan,
    Schemes,
    bytes_of,
    schemes_of,
)
from slm.quantize.quality import measure
from slm.quantize.quantizer import quantizer_of
from slm.quantize.rounding import restored
from slm.quantize.search import Budget, Candidates, Choice, sensitivities
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

LINEARS = [
    Linear("embed", "head", 1000, 128),
    *[Linear(f"l{i}", "layer", 128 * (i + 1), 128, i) for i in range(6)],
]
LAYERS = LINEARS[1:]
LOW, HIGH = schemes_of(LINEARS, INT4), schemes_of(LINEARS, INT4) | schemes_of(LAYERS, INT8["auto"])
HARM = {linear.path: harm for linear, harm in zip(LAYERS, (0.01, 0.08, 0.001, 0.02, 0.03, 0.0), strict=True)}
CHOICES = {path: (Choice(LOW[path], harm), Choice(HIGH[path], 0.0)) for path, harm in HARM.items()}
CANDIDATES = Candidates(LINEARS, LOW, CHOICES)


def high_ones(schemes: Schemes) -> set[str]:
    return {path for path in HARM if schemes[path] == HIGH[path]}


def test_bytes_are_kept() -> None:
    least, most = bytes_of(LINEARS, LOW), bytes_of(LINEARS, HIGH)
    left = []
    for budget in range(least, most + 1, 4001):
        schemes = CANDIDATES.choose(Budget(bytes=budget))
        assert bytes_of(LINEARS, schemes) <= budget
        assert schemes["embed"] == LOW["embed"]  # has no choice
        left.append(sum(HARM[path] for path in HARM if path not in high_ones(schemes)))
        # the rest of the budget is too small for another product
        cheapest = min(
            (
                bytes_of([linear], HIGH) - bytes_of([linear], LOW)
                for linear in LAYERS
                if linear.path not in high_ones(schemes)
            ),
            default=0,
        )
        assert not cheapest or bytes_of(LINEARS, schemes) + cheapest > budget
    assert left[0] == sum(HARM.values()) and left[-1] < 0.02 * left[0]
    assert high_ones(CANDIDATES.choose(Budget(bytes=most))) == set(HARM)


@pytest.mark.parametrize("together", [0.7, 1.0, 1.8])
def test_a_divergence_is_kept_although_harms_do_not_add_up(together: float) -> None:
    """If the expected divergence is wrong by a factor, the measured divergence decides."""
    asked: list[float] = []

    def moved(schemes: Schemes) -> float:
        asked.append(together * sum(HARM[path] for path in HARM if path not in high_ones(schemes)))
        return asked[-1]

    bits = []
    for target in (0.0, 0.004, 0.04, 0.08, 1.0):
        asked.clear()
        schemes = CANDIDATES.within_kl(target, moved)
        assert moved(schemes) <= target
        assert len(asked) <= 6
        bits.append(sum(scheme.bits for scheme in schemes.values()))
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]
    assert schemes == LOW and len(asked) == 2  # a sufficient first choice is measured once
    none = CANDIDATES.choose(Budget(kl_nats=0.0))
    assert CANDIDATES.within_kl(0.1, lambda schemes: 9.0) == none


def test_harm_is_kept_within() -> None:
    for budget in (0.0, 0.005, 0.02, 0.06, 0.2):
        high = high_ones(CANDIDATES.choose(Budget(kl_nats=budget)))
        left = sum(HARM[path] for path in HARM if path not in high)
        assert left <= budget + 1e-12
        # the last product was necessary
        assert not high or left + max(HARM[path] for path in high) > budget
    assert high_ones(CANDIDATES.choose(Budget(kl_nats=0.2))) == set()


def test_most_harm_for_its_bytes_goes_first() -> None:
    ratio = {linear.path: HARM[linear.path] / linear.size for linear in LAYERS}
    order = sorted(ratio, key=lambda path: -ratio[path])
    high = high_ones(CANDIDATES.choose(Budget(kl_nats=0.05)))
    assert high == set(order[: len(high)]) and high
    # does not depend on the order of the products
    for seed in range(5):
        mixed = [LINEARS[i] for i in np.random.default_rng(seed).permutation(len(LINEARS))]
        assert high_ones(Candidates(mixed, LOW, CHOICES).choose(Budget(kl_nats=0.05))) == high


def test_a_budget_that_cannot_be_kept() -> None:
    with pytest.raises(SlmError, match="the weights take at least") as caught:
        CANDIDATES.choose(Budget(bytes=bytes_of(LINEARS, LOW) - 1))
    assert caught.value.hint == "choose a larger --target-size"


@pytest.mark.parametrize("preferred", [INT8["auto"], INT8["quality"], INT4, INT8_DYNAMIC])
def test_schemes_fit(shared_bundle: Bundle, preferred: PreferredSchemes) -> None:
    linears = linears_of(shared_bundle.config)
    schemes = schemes_of(linears, preferred)
    for linear in linears:
        scheme = schemes[linear.path]
        assert linear.inputs % scheme.block_size == 0
        arrays = quantize_nearest(np.ones((linear.outputs, linear.inputs), np.float32), scheme)
        assert sum(array.nbytes for array in arrays.values()) == scheme.bytes(linear.outputs, linear.inputs)
        assert scheme.dynamic == (preferred is INT8_DYNAMIC and linear.role == "layer")
        if not scheme.dynamic:  # the largest block size that fits, up to the preferred one
            wanted = getattr(preferred, linear.role).block_size
            assert scheme.block_size == max(
                size for size in BLOCK_SIZES if size <= wanted and linear.inputs % size == 0
            )


def test_blocks_that_do_not_fit() -> None:
    odd = [Linear("odd", "layer", 8, 40, 0)]
    with pytest.raises(SlmError, match="odd has 40 inputs") as caught:
        schemes_of(odd, INT4)
    assert caught.value.hint == "quantization needs a multiple of 16 inputs"
    with pytest.raises(SlmError, match="the block size 128") as caught:
        schemes_of([Linear("small", "layer", 8, 96, 0)], INT4, 128)
    assert caught.value.hint == "use --block-size 32"


def test_a_weight_whose_scheme_changes_is_rounded_again() -> None:
    """A plan stays as it is; the new plan keeps the arrays of all other weights."""
    plan = QuantizationPlan(LOW, "gptq", rounded={path: {"weight_quantized": np.zeros(1)} for path in HARM})
    changed = plan.with_schemes({**LOW, "l1": HIGH["l1"]})
    assert set(changed.rounded) == set(HARM) - {"l1"} and changed.schemes["l1"] == HIGH["l1"]
    assert all(changed.rounded[path] is plan.rounded[path] for path in changed.rounded)
    assert set(plan.rounded) == set(HARM) and plan.schemes == LOW
    with pytest.raises(FrozenInstanceError):
        plan.schemes = HIGH  # type: ignore[misc]


def test_harm_is_what_a_measurement_gives(shared_bundle: Bundle, tmp_path: Path) -> None:
    layers = [linear for linear in linears_of(shared_bundle.config) if linear.layer in (0, 2)]
    text = TokenRows("random", np.random.default_rng(5).integers(0, 320, (2, 40)))
    stored = graph_tensors(shared_bundle.model_path)
    scheme = Scheme(bits=4, block_size=32, zero_points=True)

    plan = QuantizationPlan({linear.path: scheme for linear in linears_of(shared_bundle.config)}, "nearest")

    def rounded(linear: Linear) -> Array:
        return restored(quantize_nearest(stored[f"{linear.path}.weight"], scheme), scheme)

    with quantizer_of(shared_bundle, Settings(), text, text, Silent(), tmp_path) as quantizer:
        harm = sensitivities(quantizer, plan, layers, text)
    assert list(harm) == [linear.path for linear in layers]
    for i, linear in enumerate(layers):
        name, out = f"{linear.path}.weight", tmp_path / str(i)
        makers = {each: (lambda each=each: stored[each]) for each in stored}
        makers[name] = lambda linear=linear: rounded(linear)
        (out / "onnx").mkdir(parents=True)
        model = build_graph(
            shared_bundle.config, Fused(FloatFormat()), LazyTensors(makers), shared_bundle.manifest.context
        )
        save_graph(model, out / "onnx" / "model.onnx")
        changed = OnnxDecoder(Bundle(out, shared_bundle.manifest, shared_bundle.config))
        change = measure(OnnxDecoder(shared_bundle), changed, text, Silent())
        # The error of float32 logarithms is 1e-7; divergences are at least 1e-4.
        assert harm[linear.path] == pytest.approx(change.kl_nats, rel=0.02, abs=1e-6)
        assert change.kl_nats > 1e-5
    assert max(harm.values()) > 1.5 * min(harm.values())  # negative control: the values differ


@pytest.mark.parametrize("tied", [True, False])
def test_tables_with_four_bits_take_part(
    tied: bool,
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search treats a weight by its scheme, whatever its role: head, lookup or product of a layer."""
    four = INT4.layer
    monkeypatch.setattr(plan_module, "INT4", PreferredSchemes(layer=four, head=four, lookup=four))
    shape = config.model_copy(update={"tie_word_embeddings": tied, "num_hidden_layers": 1, "layer_types": (FULL,)})
    save_checkpoint(tmp_path / "c", make_model(shape), tokenizer, {})
    source = export_bundle(tmp_path / "c", tmp_path / "onnx")
    text = TokenRows("random", np.random.default_rng(5).integers(0, 320, (4, 40)))
    tables = [linear.path for linear in linears_of(shape) if linear.layer is None]
    assert len(tables) == (1 if tied else 2)
    settings = Settings(precision="int4", method="searched", smooth=False, gate=Gate(None), target_kl_nats=100.0)
    made, report = quantize_bundle(source, tmp_path / "low", text, settings, None, text)
    assert made.manifest.quantization is not None
    assert {made.manifest.quantization.schemes[path].bits for path in tables} == {4}
    assert all(each.harm_nats for each in report.tensors)
    exact = replace(settings, target_kl_nats=1e-4)
    made, report = quantize_bundle(source, tmp_path / "high", text, exact, None, text)
    assert made.manifest.quantization is not None
    assert {made.manifest.quantization.schemes[path].bits for path in tables} == {8}
