"""Fake quantization: the values of the quantized bundle, straight-through gradients, and parameters that stay what they are."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.grid import BLOCK_SIZES, distance, fitting_block, rounded, rounded_activations
from slm.core.manifest import Scheme
from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import (
    GridEmbedding,
    GridLinear,
    fake_quantize,
    operands,
    round_activations,
    round_weight,
    round_weights,
    rounded_in_place,
    set_active,
)
from slm.core.qat import GRIDS, QatPrecision, recorded_grid, without_grid
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest
from slm.quantize.plan import INT4, INT8
from slm.quantize.rounding import restored

MakeModel = Callable[[ModelConfig], CausalLM]

SCHEMES = {
    "int4": Scheme(bits=4, block_size=32, zero_points=True),
    "int8": Scheme(bits=8, block_size=128),
    "int4 without zero points": Scheme(bits=4, block_size=16),
    "int8 with zero points": Scheme(bits=8, block_size=64, zero_points=True),
}
# Rounding a rounded weight again finds the scale from rounded ends: a float32 rounding error, in steps of the grid.
AGAIN = 1e-5
# The kernel sums in another order. Measured: up to 5e-7 of the norm; another block size differs by 6e-3.
KERNEL_TOLERANCE = 2e-6


def drawn(rows: int = 40, inputs: int = 256) -> Array:
    """Ordinary rows, and rows of zeros, of positive values, and with an outlier."""
    weight = np.random.default_rng(0).standard_normal((rows, inputs)).astype(np.float32)
    weight[0] = 0
    weight[1] = np.abs(weight[1])
    weight[2, 5] = 100
    return weight


@pytest.mark.parametrize("name", SCHEMES)
def test_the_values_are_those_that_quantization_writes(name: str) -> None:
    weight, scheme = drawn(), SCHEMES[name]
    values = rounded(weight, scheme)
    assert np.array_equal(values, restored(quantize_nearest(weight, scheme), scheme))
    assert np.array_equal(values, rounded(torch.from_numpy(weight), scheme, torch).numpy())
    assert not np.array_equal(values, weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_quantizing_rounded_weights_changes_nothing(name: str) -> None:
    weight, scheme = drawn(), SCHEMES[name]
    values = rounded(weight, scheme)
    again = restored(quantize_nearest(values, scheme), scheme)
    np.testing.assert_allclose(again, values, rtol=1e-6, atol=1e-6 * float(np.abs(values).max()))
    assert distance(values, scheme) < AGAIN < 0.2 < distance(weight, scheme) < 0.3
    other = scheme.model_copy(update={"block_size": scheme.block_size // 2, "zero_points": not scheme.zero_points})
    assert distance(values, other) > 0.05  # the control: another grid


def kernel_output(x: Array, weight: Array, scheme: Scheme) -> Array:
    """Returns x Wᵀ as MatMulNBits computes it."""
    arrays = quantize_nearest(weight, scheme)
    tensors = [
        helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(), raw=True)
        for name, array in arrays.items()
    ]
    (outputs, inputs), attributes = weight.shape, {"bits": scheme.bits, "block_size": scheme.block_size}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        accuracy_level=4,
        **attributes,
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "product", [value("x", TensorProto.FLOAT, [None, inputs])],
        [value("y", TensorProto.FLOAT, [None, outputs])], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y: Array = session.run(None, {"x": x})[0]
    return y


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", SCHEMES)
def test_activations_are_rounded_as_the_kernel_does(name: str, rows: int) -> None:
    scheme, weight = SCHEMES[name], drawn()[3:]
    x = np.random.default_rng(1).standard_normal((rows, 256)).astype(np.float32)
    x[0, :128] = 0
    y = kernel_output(x, weight, scheme)

    def off(block_size: int) -> float:
        return float(
            np.linalg.norm(rounded_activations(x, block_size) @ rounded(weight, scheme).T - y) / np.linalg.norm(y)
        )

    assert off(scheme.block_size) < KERNEL_TOLERANCE
    assert off(scheme.block_size // 2) > 1000 * KERNEL_TOLERANCE  # the control
    assert np.array_equal(rounded_activations(x, 32), rounded_activations(torch.from_numpy(x), 32, torch).numpy())


def test_the_grids_are_those_of_quantization() -> None:
    for precision, wish in (("int8", INT8["auto"]), ("int4", INT4)):
        grid = GRIDS[precision]  # type: ignore[index]
        assert (grid.layers, grid.vocabulary, grid.vocabulary) == (wish.layer, wish.head, wish.lookup)


def test_blocks_that_do_not_fit_are_smaller() -> None:
    assert [fitting_block(inputs, 128) for inputs in (256, 192, 96, 48, 40)] == [128, 64, 32, 16, None]
    assert fitting_block(96, 16) == 16 == BLOCK_SIZES[-1]
    assert fitting_block(64, 8) == 16
    grid = GRIDS["int8"]
    assert grid.scheme("model.layers.0.mlp.up_proj", 96).block_size == 32
    assert grid.scheme("lm_head", 128).block_size == 64
    with pytest.raises(SlmError, match="lm_head has 40 inputs, not a multiple of the block size 16"):
        grid.scheme("lm_head", 40)


def test_the_gradient_passes_straight_through() -> None:
    scheme = SCHEMES["int4"]
    weight = torch.from_numpy(drawn()).requires_grad_()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (round_activations(x, scheme) @ round_weight(weight, scheme).T).square().sum().backward()
    roundings = round_weight(weight, scheme), round_activations(x, scheme)
    values, inputs = (rounding.detach().clone().requires_grad_() for rounding in roundings)
    (inputs @ values.T).square().sum().backward()
    assert weight.grad is not None and x.grad is not None and values.grad is not None and inputs.grad is not None
    assert torch.equal(weight.grad, values.grad) and torch.equal(x.grad, inputs.grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", GRIDS)
def test_a_model_on_a_grid_computes_with_rounded_weights(
    config: ModelConfig, make_model: MakeModel, precision: QatPrecision, tied: bool
) -> None:
    config = config.model_copy(update={"tie_word_embeddings": tied})
    plain, model = make_model(config), make_model(config)
    before = dict(model.named_parameters())
    fake_quantize(model, GRIDS[precision])
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert isinstance(model.model.embed_tokens, GridEmbedding) and isinstance(model.lm_head, GridLinear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        off = (model(ids) - plain(ids)).abs().max()
        assert off > 1e-3
        round_weights(plain, GRIDS[precision])
        for module in model.modules():
            if isinstance(module, GridLinear):
                module.operands = lambda x, module=module: (x, module.values(module.weight))  # type: ignore[method-assign]
        # Without rounded activations, this is the model with rounded weights.
        torch.testing.assert_close(model(ids), plain(ids))


def test_training_rounds_from_when_it_is_switched_on_and_evaluation_always(
    config: ModelConfig, make_model: MakeModel
) -> None:
    plain, model = make_model(config), fake_quantize(make_model(config), GRIDS["int4"])
    ids = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        on = model.train()(ids)
        set_active(model, False)
        assert torch.equal(model.train()(ids), plain.train()(ids))
        assert not torch.equal(on, plain(ids))
        torch.testing.assert_close(model.eval()(ids), on, rtol=0, atol=0.5)
        assert not torch.equal(model(ids), plain.eval()(ids))


def test_rounded_weights_take_the_place_of_the_others_for_a_while(config: ModelConfig, make_model: MakeModel) -> None:
    model, expected = fake_quantize(make_model(config), GRIDS["int4"]), make_model(config)
    round_weights(expected, GRIDS["int4"])
    ids = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(1))
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        before = model(ids)
    with pytest.raises(KeyboardInterrupt), rounded_in_place(model):
        with torch.no_grad():
            assert torch.equal(model(ids), before)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
    plain = make_model(config)
    with rounded_in_place(plain):  # a model that is on no grid stays what it is
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), kept, strict=True))


def test_a_head_on_no_grid_is_left_alone(config: ModelConfig, make_model: MakeModel) -> None:
    model, x = make_model(config), torch.ones(2, config.hidden_size)
    assert operands(model.lm_head, x)[0] is x and operands(model.lm_head, x)[1] is model.lm_head.weight


def test_the_record_of_a_grid() -> None:
    info = {"made_by": "tests", "qat": GRIDS["int4"].model_dump(mode="json")}
    assert recorded_grid(info) == GRIDS["int4"]
    assert without_grid(info) == {"made_by": "tests"} and recorded_grid(without_grid(info)) is None
    with pytest.raises(SlmError, match=r"slm\.json is damaged: qat: "):
        recorded_grid({"qat": {"precision": "int3"}})
