"""Block quantization: the numpy code against a plain loop, and onnxruntime's kernels against the numpy code."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from slm.core.grid import PAIR_LIMIT, fitted, pair_sums
from slm.core.manifest import Scheme
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, dequantize, pack, unpack
from slm.quantize.blocks import quantize_nearest, searched
from slm.quantize.rounding import restored

INT8, INT8_DYNAMIC = Scheme(bits=8, block_size=32), Scheme(bits=8, block_size=128, dynamic=True)
INT4, INT4_POINTS = Scheme(bits=4, block_size=32), Scheme(bits=4, block_size=32, zero_points=True)
LIMITED = INT8_DYNAMIC.model_copy(update={"reduced": True})
INT8_POINTS = Scheme(bits=8, block_size=32, zero_points=True)
SCHEMES = [INT8, INT8_POINTS, INT4, INT4_POINTS, INT8_DYNAMIC]
BLOCKS = [each for each in SCHEMES if not each.dynamic]
# Normally distributed weights. Measured: 47 to 50 dB with 8 bits, 19 to 21 dB with 4 bits.
SIGNAL_TO_NOISE_DB = {8: 40.0, 4: 17.0}
# The kernel and numpy sum 128 products of numbers around 1 in different orders, in float32.
PRODUCT_TOLERANCE = 1e-4


def name_of(scheme: Scheme) -> str:
    return f"{scheme.name}{', zero points' * scheme.zero_points}"


def weight(rows: int = 24, columns: int = 128, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    values[3, :64] = 0
    values[4] += 2  # almost no negative weights
    return values


def plain_loop(values: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Returns the dequantized weight by the definition, value by value, in double precision."""
    size = values.shape[1] if scheme.dynamic else scheme.block_size
    found = np.zeros_like(values)
    for n in range(len(values)):
        for start in range(0, values.shape[1], size):
            block = [float(value) for value in values[n, start : start + size]]
            low, high = min(block), max(block)
            if scheme.zero_points:
                low, high = min(low, 0.0), max(high, 0.0)
                lowest, highest = 0, 2**scheme.bits - 1
                step = (high - low) / highest
                zero = round(-low / step) if step else 0
            elif scheme.bits == 8:
                step, zero, lowest, highest = max(-low, high) / 127, 0, -127, 127
            else:  # the largest weight is at -8 steps
                step, zero, lowest, highest = (low if -low >= high else high) / -8, 0, -8, 7
            for k, value in enumerate(block):
                integer = min(max(round(value / step) + zero, lowest), highest) if step else zero
                found[n, start + k] = (integer - zero) * step
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_against_a_plain_loop(scheme: Scheme) -> None:
    values = weight()
    found, wanted = restored(quantize_nearest(values, scheme), scheme), plain_loop(values, scheme)
    # float32 and double can round a value half way between two integers differently; no other value may differ.
    step = np.abs(values).max() / (1 << (scheme.bits - 1))
    off = np.abs(found - wanted)
    assert (off > 1e-5).sum() <= 1 and off.max() <= 2 * step
    assert (np.abs(np.roll(found, 1, axis=1) - wanted) > 1e-5).mean() > 0.9  # the control


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_the_error_is_small(scheme: Scheme) -> None:
    values = weight()
    error = restored(quantize_nearest(values, scheme), scheme) - values
    assert 10 * np.log10((values**2).mean() / (error**2).mean()) > SIGNAL_TO_NOISE_DB[scheme.bits]
    size = values.shape[1] if scheme.dynamic else scheme.block_size
    grid = fitted(values.reshape(24, -1, size), scheme)
    # The error is within half a step. If the range has one more integer at one end, the other end is clipped by less than
    # another half step.
    reach = 0.5 if scheme.bits == 8 or scheme.zero_points else 1.0
    if scheme.zero_points:
        reach = 1.0  # the zero point is also rounded
    assert (np.abs(error.reshape(24, -1, size)) <= np.abs(grid.scale[..., None]) * reach * (1 + 1e-4)).all()


def test_zero_blocks_and_extremes() -> None:
    values = np.zeros((2, 32), np.float32)
    values[1, 3], values[1, 7] = -5.0, 5.0
    scheme = Scheme(bits=8, block_size=16)
    arrays = quantize_nearest(values, scheme)
    assert (arrays[QUANTIZED][0] == 128).all() and arrays[SCALE][0].tolist() == [0, 0]
    assert (arrays[QUANTIZED][1, 0, 3], arrays[QUANTIZED][1, 0, 7]) == (1, 255)
    np.testing.assert_array_equal(restored(arrays, scheme), values)
    for each in SCHEMES:  # every scheme keeps zeros exactly
        zeros = np.zeros((2, 128), np.float32)
        for search in (False, True):
            np.testing.assert_array_equal(restored(quantize_nearest(zeros, each, search), each), zeros)


@pytest.mark.parametrize("count", [6, 7])
def test_packing_and_back(count: int) -> None:
    integers = np.random.default_rng(0).integers(0, 16, (3, 5, count)).astype(np.uint8)
    packed = pack(integers, 4)
    assert packed.shape == (3, 5, (count + 1) // 2)
    assert packed[0, 0, 0] == integers[0, 0, 0] + 16 * integers[0, 0, 1]  # low bits first
    np.testing.assert_array_equal(unpack(packed, 4, count), integers)
    np.testing.assert_array_equal(unpack(pack(integers, 8), 8, count), integers)
    assert (unpack((packed >> 4) | (packed << 4), 4, count) != integers).any()  # negative control: high bits first


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_in_parts_as_in_one(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    values = weight()
    whole = quantize_nearest(values, scheme)
    monkeypatch.setattr("slm.quantize.blocks._CHUNK_VALUES", 5 * 128)
    for name, array in quantize_nearest(values, scheme).items():
        np.testing.assert_array_equal(array, whole[name])
        assert array.flags.c_contiguous


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("weighed", [False, True])
def test_searching_is_never_worse(scheme: Scheme, weighed: bool) -> None:
    values = weight()
    size = values.shape[1] if scheme.dynamic else scheme.block_size
    importance = np.random.default_rng(1).lognormal(sigma=2, size=128).astype(np.float32) if weighed else None
    weighs = np.ones(128) if importance is None else importance
    blocks = values.reshape(24, -1, size)
    grids = (
        fitted(blocks, scheme),
        searched(blocks, scheme, None if importance is None else importance.reshape(-1, size)),
    )
    plain, better = (
        (((grid.values(grid.round(blocks)) - blocks) ** 2) * weighs.reshape(-1, size)).sum(-1) for grid in grids
    )
    assert (better <= plain * (1 + 1e-5)).all()
    if scheme.bits == 4:
        assert better.sum() < 0.97 * plain.sum()
    # the search uses the stored scales
    arrays = quantize_nearest(values, scheme, True, importance)
    error = (((restored(arrays, scheme) - values) ** 2) * weighs).sum()
    assert error == pytest.approx(better.sum(), rel=1e-4)


def session_of(
    scheme: Scheme, arrays: dict[str, np.ndarray], columns: int, level: int = 0, threads: int = 1
) -> ort.InferenceSession:
    """Returns a session with one product of the graph, with a weight (N, columns)."""
    constants = dict(arrays)
    if scheme.dynamic:
        rows = arrays[QUANTIZED].shape[1]
        constants |= {
            "axes": np.array([-1], np.int64),
            "least": np.array(1e-9, np.float32),
            "step": np.array(1 / 127, np.float32),
            "middle": np.array(128, np.uint8),
        }
        nodes = [
            helper.make_node("Abs", ["x"], ["abs"]),
            helper.make_node("ReduceMax", ["abs", "axes"], ["max"], keepdims=1),
            helper.make_node("Max", ["max", "least"], ["largest"]),
            helper.make_node("Div", ["x", "largest"], ["scaled"]),
            helper.make_node("QuantizeLinear", ["scaled", "step", "middle"], ["rounded"]),
            helper.make_node(
                "MatMulIntegerToFloat",
                ["rounded", QUANTIZED, "step", SCALE, "middle"],
                ["product"],
                domain="com.microsoft",
            ),
            helper.make_node("Mul", ["product", "largest"], ["y"]),
        ]
    else:
        rows = arrays[QUANTIZED].shape[0]
        attributes = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": scheme.block_size}
        inputs = ["x", QUANTIZED, SCALE, *[ZERO_POINTS] * scheme.zero_points]
        nodes = [
            helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes, accuracy_level=level)
        ]
    return open_graph(nodes, constants, ("x", TensorProto.FLOAT, [1, None, columns]), threads)


def open_graph(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    fed: tuple[str, int, list[int | None]],
    threads: int = 1,
) -> ort.InferenceSession:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(*fed)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(rows: int = 9, columns: int = 128) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(1, rows, columns)).astype(np.float32)


@pytest.mark.parametrize("scheme", BLOCKS, ids=name_of)
def test_the_product_multiplies_with_what_was_rounded(scheme: Scheme) -> None:
    """With float activations, MatMulNBits computes the product with the weights that numpy dequantizes."""
    x, arrays = inputs(), quantize_nearest(weight(), scheme)
    wanted = x @ restored(arrays, scheme).T
    (found,) = session_of(scheme, arrays, 128).run(None, {"x": x})
    np.testing.assert_allclose(found, wanted, atol=PRODUCT_TOLERANCE)
    wrong = arrays | {SCALE: np.roll(arrays[SCALE], 1, axis=1)}
    (found,) = session_of(scheme, wrong, 128).run(None, {"x": x})
    assert np.abs(found - wanted).max() > 100 * PRODUCT_TOLERANCE
    if scheme.zero_points:
        wrong = arrays | {ZERO_POINTS: arrays[ZERO_POINTS] + 1}
        (found,) = session_of(scheme, wrong, 128).run(None, {"x": x})
        assert np.abs(found - wanted).max() > 100 * PRODUCT_TOLERANCE


@pytest.mark.parametrize("scheme", BLOCKS, ids=name_of)
def test_the_lookup_gives_what_was_rounded(scheme: Scheme) -> None:
    arrays = quantize_nearest(weight(), scheme)
    attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            [QUANTIZED, "ids", SCALE, *[ZERO_POINTS] * scheme.zero_points],
            ["y"],
            domain="com.microsoft",
            **attributes,
        )
    ]
    constants = arrays | {QUANTIZED: arrays[QUANTIZED].reshape(24, -1)}
    ids = np.array([[5, 0, 4, 23]])
    (found,) = open_graph(nodes, constants, ("ids", TensorProto.INT64, [1, None])).run(None, {"ids": ids})
    wanted = restored(arrays, scheme)[ids]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.allclose(found, np.roll(wanted, 1, axis=1))
    constants[SCALE] = np.roll(constants[SCALE], 1, axis=1)
    (found,) = open_graph(nodes, constants, ("ids", TensorProto.INT64, [1, None])).run(None, {"ids": ids})
    assert not np.allclose(found, wanted)


def dynamic_product(x: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the product of 8-bit integers with a dynamic scale for each token."""
    found = np.zeros((1, x.shape[1], arrays[SCALE].size))
    for t, row in enumerate(x[0].astype(np.float64)):
        largest = np.abs(row).max()
        integers = np.rint(row / largest * 127)
        found[0, t] = integers @ arrays[QUANTIZED].astype(np.float64) * arrays[SCALE] * largest / 127
    return found


def test_the_dynamic_product_rounds_each_token_by_itself() -> None:
    scheme, x = INT8_DYNAMIC, inputs()
    x[0, 2] *= 1000  # an outlier, which must not reduce the precision of other tokens
    arrays = quantize_nearest(weight(), scheme)
    session = session_of(scheme, arrays, 128)
    (found,) = session.run(None, {"x": x})
    wanted = dynamic_product(x, arrays)
    # A value half way between two integers can round to either: one step of 127, times the largest weight.
    one_step = np.abs(x).max(axis=-1, keepdims=True) / 127 * np.abs(weight()).max()
    assert (np.abs(found - wanted) <= one_step + PRODUCT_TOLERANCE).all()
    assert (np.abs(found - wanted) <= PRODUCT_TOLERANCE * np.abs(wanted).max(axis=-1, keepdims=True)).mean() > 0.8
    wrong = arrays | {SCALE: np.roll(arrays[SCALE], 1)}
    (found,) = session_of(scheme, wrong, 128).run(None, {"x": x})
    assert not (np.abs(found - wanted) <= one_step + PRODUCT_TOLERANCE).all()
    (zeros,) = session.run(None, {"x": np.zeros_like(x)})
    assert (zeros == 0).all()


def adds_alike(scheme: Scheme) -> bool:
    """Returns whether rows have the same bits alone and in a batch, with products as large as the 270M shape's."""
    columns, x = 2048, inputs(20, 2048)
    arrays = quantize_nearest(weight(320, columns), scheme)
    same = True
    for threads in (1, 2):
        session = session_of(scheme, arrays, columns, level=4, threads=threads)

        def run(size: int, session: ort.InferenceSession = session) -> np.ndarray:
            parts = [session.run(None, {"x": x[:, i : i + size]})[0] for i in range(0, 20, size)]
            return np.concatenate(parts, axis=1)

        alone = run(1)
        same &= all((run(size) == alone).all() for size in (2, 3, 4, 5, 7, 20))
    return bool(same)


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file() or "avx512_vnni" not in Path("/proc/cpuinfo").read_text(),
    reason="kernels for AVX-512 VNNI add alike; others were not measured",
)
@pytest.mark.parametrize(
    ("bits", "block", "alike"),
    [(8, 16, True), (8, 64, True), (8, 128, False), (4, 32, True), (4, 64, False), (4, 128, False)],
)
@pytest.mark.parametrize("zero_points", [False, True])
def test_which_blocks_add_alike(bits: int, block: int, alike: bool, zero_points: bool) -> None:
    from slm.runtime.decoder import _alike

    scheme = Scheme(bits=bits, block_size=block, zero_points=zero_points)  # type: ignore[arg-type]
    assert adds_alike(scheme) == alike == _alike(scheme)


def test_products_of_integers_add_alike() -> None:
    """Integer sums are exact, so their order does not matter."""
    from slm.runtime.decoder import _alike

    scheme = Scheme(bits=8, block_size=2048, dynamic=True)
    assert adds_alike(scheme) and _alike(scheme)


def test_restored_is_what_the_graph_is_read_as() -> None:
    for scheme in SCHEMES:
        arrays = quantize_nearest(weight(), scheme)
        read = dequantize(arrays[QUANTIZED], arrays[SCALE], arrays.get(ZERO_POINTS), scheme)
        np.testing.assert_array_equal(read, restored(arrays, scheme))


def added_in_16_bits(x: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """Returns x W, uint8 (M, K) by int8 (K, N), as x86 CPUs without VNNI compute it: sums of two products saturate."""
    products = x.astype(np.int32)[:, :, None] * integers.astype(np.int32)  # (M, K, N)
    sums = products.reshape(len(x), -1, 2, integers.shape[1]).sum(axis=2)
    return np.clip(sums, -(1 << 15), (1 << 15) - 1).sum(axis=1)


def worst_activations(integers: np.ndarray) -> list[np.ndarray]:
    """Returns activations, uint8 (N, K): the largest where the weights int8 (K, N) have one sign, the smallest elsewhere."""
    return [np.where(sign * integers.T > 0, 255, 0).astype(np.uint8) for sign in (1, -1)]


# Weights (N, K) that are hard to limit: outliers side by side, one sign, equal weights, tiny and zero ones.
HARD: dict[str, np.ndarray] = {
    "normal": weight(),
    "one sign": np.abs(weight()),
    "equal": np.full((2, 128), -0.3, np.float32),
    "two outliers in a pair": np.where(np.arange(128) < 2, 9, weight(8)).astype(np.float32),
    "two outliers in two pairs": np.where((np.arange(128) > 0) & (np.arange(128) < 3), 9, weight(8)).astype(np.float32),
    "both signs": np.tile(np.array([1, -1], np.float32), (3, 64)),
    "zeros": np.zeros((2, 128), np.float32),
    "tiny": weight() * np.float32(1e-38),
}


@pytest.mark.parametrize("name", HARD)
def test_sums_of_two_products_fit_in_16_bits(name: str) -> None:
    values = HARD[name]
    integers = quantize_nearest(values, LIMITED)[QUANTIZED]
    assert pair_sums(integers.T.astype(int)).max() <= PAIR_LIMIT and np.abs(integers.astype(int)).max() <= 127
    rng = np.random.default_rng(1)
    for x in (np.full((1, 128), 255), rng.integers(0, 256, (4, 128)), rng.choice([0, 255], (4, 128))):
        np.testing.assert_array_equal(added_in_16_bits(x.astype(np.uint8), integers), x @ integers.astype(int))
    for worst in worst_activations(integers):
        np.testing.assert_array_equal(added_in_16_bits(worst, integers), worst.astype(int) @ integers.astype(int))


@pytest.mark.parametrize("name", ["normal", "one sign", "equal", "two outliers in a pair"])
def test_without_the_limit_sums_of_two_products_saturate(name: str) -> None:
    """Negative control of the previous test."""
    integers = quantize_nearest(HARD[name], INT8_DYNAMIC)[QUANTIZED]
    exact = [
        (added_in_16_bits(worst, integers) == worst.astype(int) @ integers.astype(int)).all()
        for worst in worst_activations(integers)
    ]
    assert not all(exact)


def test_the_limit_costs_less_than_a_bit() -> None:
    """Seven bits, which fit as well, have twice the step: 6 dB."""

    def noise(values: np.ndarray, scheme: Scheme) -> float:
        off = restored(quantize_nearest(values, scheme), scheme) - values
        return float(10 * np.log10((off**2).sum()))

    values = np.random.default_rng(0).normal(size=(256, 640)).astype(np.float32)
    assert 0 < noise(values, LIMITED) - noise(values, INT8_DYNAMIC) < 2  # measured: 1.4
    for hard in (HARD["one sign"], HARD["two outliers in a pair"]):
        assert noise(hard, LIMITED) - noise(hard, INT8_DYNAMIC) < 7  # 6 dB, and the scatter of few weights
    both = HARD["both signs"] * np.random.default_rng(1).uniform(0.5, 1, (3, 128)).astype(np.float32)
    assert noise(both, LIMITED) == noise(both, INT8_DYNAMIC)  # no pair is above the limit
