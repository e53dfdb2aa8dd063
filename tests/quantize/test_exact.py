"""Weights on a quantization grid keep their values with every method. Other weights are rounded as usual."""

from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from slm.core.checkpoint import read_config
from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Silent
from slm.core.weights import Weights
from slm.export.bundle import export_bundle
from slm.export.graph import checkpoint_tensors, float_tensors, graph_tensors
from slm.interchange.gguf import write_gguf
from slm.interchange.importing import import_model
from slm.quantize.blocks import quantize_nearest, searched
from slm.quantize.decide import exact_products
from slm.quantize.exact import rows_on_grid
from slm.quantize.gptq import quantize_gptq
from slm.quantize.linears import linears_of
from slm.quantize.make import quantize_bundle
from slm.quantize.moments import InputMoments
from slm.quantize.plan import INT4 as INT4_PREFERRED
from slm.quantize.plan import INT8 as INT8_PREFERRED
from slm.quantize.plan import PreferredSchemes, schemes_of
from slm.quantize.rounding import restored
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows

INT4, INT4_POINTS = Scheme(bits=4, block_size=32), Scheme(bits=4, block_size=32, zero_points=True)
INT8 = Scheme(bits=8, block_size=32)
SIZE = 32
# The step and its multiples are both rounded to the eight bits of bfloat16.
BFLOAT16_DB = 45.0


def ordinary(rows: int = 24, columns: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def q4_0(weight: np.ndarray, half: bool = True) -> np.ndarray:
    """Rounds as llama.cpp's Q4_0: blocks of 32, d * (q - 8), where d is the value furthest from 0 divided by -8."""
    blocks = weight.reshape(-1, SIZE)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    step = (furthest / -8).astype(np.float16 if half else np.float32).astype(np.float32)
    return (np.clip(np.rint(blocks / step), -8, 7) * step).reshape(weight.shape)


def inner(weight: np.ndarray) -> np.ndarray:
    """Rounds to multiples from -5 to 6 of a step, so that no block spans all 16 values."""
    blocks = weight.reshape(-1, SIZE)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 6
    return (np.clip(np.rint(blocks / step), -5, 6) * step.astype(np.float16).astype(np.float32)).reshape(weight.shape)


def with_zero_points(weight: np.ndarray) -> np.ndarray:
    """Rounds as AWQ: scale * (q - zero), with a zero for each block."""
    blocks = weight.reshape(-1, SIZE)
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)[:, None]
    zero = np.rint(-low[:, None] / scale)
    return ((np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale).reshape(weight.shape)


def by_channel(weight: np.ndarray) -> np.ndarray:
    """Rounds to multiples from -7 to 7 of one step for each output channel."""
    step = np.abs(weight).max(axis=1, keepdims=True) / np.float32(7)
    return np.rint(weight / step) * step


def q8_0(weight: np.ndarray) -> np.ndarray:
    blocks = weight.reshape(-1, SIZE)
    step = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    return (np.rint(blocks / step).clip(-127, 127) * step).reshape(weight.shape)


GRIDS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[Scheme, ...]]] = {
    "Q4_0": (q4_0, (INT4, INT4_POINTS, INT8)),
    "Q4_0, a float32 step": (lambda w: q4_0(w, half=False), (INT4, INT4_POINTS, INT8)),
    "inner values": (inner, (INT4, INT4_POINTS, INT8)),
    "zero points": (with_zero_points, (INT4_POINTS,)),
    "by channel": (by_channel, (INT4, INT4_POINTS, INT8)),
    "Q8_0": (q8_0, (INT8,)),
}


def decibels(before: np.ndarray, after: np.ndarray) -> float:
    noise = float(((after - before) ** 2).sum())
    return 10 * np.log10(float((before**2).sum()) / noise) if noise else np.inf


@pytest.mark.parametrize("method", ["nearest", "searched", "gptq"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_is_kept_by_every_method(grid: str, method: str) -> None:
    make, schemes = GRIDS[grid]
    weight = make(ordinary())
    x = np.random.default_rng(1).normal(size=(256, 128)).astype(np.float32)
    for scheme in schemes:
        rows = rows_on_grid(weight, scheme)
        assert rows is not None and rows.all()
        if method == "gptq":
            arrays = quantize_gptq(weight, InputMoments.of(x.T @ x), scheme)
        else:
            arrays = quantize_nearest(weight, scheme, search=method == "searched")
        # float32 steps are found up to the last one or two bits.
        assert decibels(weight, restored(arrays, scheme)) > 130


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_a_grid_that_was_rounded_to_half_precision(stored: str) -> None:
    plain = q4_0(ordinary())
    weight = plain.astype(stored if stored == "float16" else ml_dtypes.bfloat16).astype(np.float32)
    rows = rows_on_grid(weight, INT4_POINTS)
    assert rows is not None and rows.all()
    after = restored(quantize_nearest(weight, INT4_POINTS), INT4_POINTS)
    assert decibels(weight, after) > BFLOAT16_DB
    # The result is as close to the Q4_0 values as the stored weights, up to 1 dB.
    assert decibels(plain, after) > decibels(plain, weight) - 1


def test_ordinary_weights_lie_on_no_grid() -> None:
    for seed in range(20):
        for scheme in (INT4, INT4_POINTS, INT8):
            assert rows_on_grid(ordinary(64, 640, seed), scheme) is None
    assert rows_on_grid(np.zeros((8, 64), np.float32), INT4) is None
    # Values a quarter of a step away from the grid do not lie on it.
    weight = q4_0(ordinary())
    off = weight + 0.25 * np.abs(weight).max() / 8 * np.random.default_rng(2).uniform(-1, 1, weight.shape)
    assert rows_on_grid(off.astype(np.float32), INT4_POINTS) is None
    # Blocks of another size than those that share a step.
    assert rows_on_grid(weight, Scheme(bits=4, block_size=64, zero_points=True)) is None


def test_rows_on_a_grid_beside_ordinary_ones() -> None:
    """Each row is handled alone, as for a format that stores q and k with fewer bits than v."""
    weight = np.concatenate([q4_0(ordinary(16)), ordinary(8, seed=5)])
    x = np.random.default_rng(1).normal(size=(256, 128)).astype(np.float32)
    moments = x.T @ x
    rows = rows_on_grid(weight, INT4_POINTS)
    assert rows is not None and rows.tolist() == [True] * 16 + [False] * 8
    for both, alone in (
        (
            quantize_gptq(weight, InputMoments.of(moments), INT4_POINTS),
            quantize_gptq(weight[16:], InputMoments.of(moments), INT4_POINTS),
        ),
        (quantize_nearest(weight, INT4_POINTS, True), quantize_nearest(weight[16:], INT4_POINTS, True)),
    ):
        for name, array in alone.items():
            np.testing.assert_array_equal(both[name][16:], array)
        assert decibels(weight[:16], restored(both, INT4_POINTS)[:16]) > 130


def test_a_damaged_block_does_not_cost_the_others_their_grid() -> None:
    weight = q4_0(ordinary(4, 640))
    weight[2, :32] = ordinary(1, 32, seed=9)
    after = restored(quantize_nearest(weight, INT4_POINTS, search=True), INT4_POINTS)
    np.testing.assert_allclose(after[:, 32:], weight[:, 32:], rtol=1e-6)
    blocks = weight[2:3, None, :32]
    grid = searched(blocks, INT4_POINTS)
    np.testing.assert_array_equal(after[2, :32], grid.values(grid.round(blocks))[0, 0])


@pytest.fixture(scope="module")
def qat(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """Returns a checkpoint whose layers were stored as Q4_0 in a GGUF file, and its bundle. Tests must not change them."""
    place = tmp_path_factory.mktemp("qat")
    write_gguf(shared_checkpoint, place / "f32.gguf", "f32")
    reader, writer = GGUFReader(place / "f32.gguf"), GGUFWriter(place / "q4_0.gguf", "gemma3")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            last = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], last)
    for tensor in reader.tensors:
        array = np.array(tensor.data)
        if array.ndim == 2 and tensor.name.startswith("blk."):
            packed = gguf.quants.quantize(array, GGMLQuantizationType.Q4_0)
            writer.add_tensor(tensor.name, packed, raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(tensor.name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert import_model(str(place / "q4_0.gguf"), place / "imported").stored_as["Q4_0"] == 28
    return place / "imported", export_bundle(place / "imported", place / "onnx")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"smooth": True},
        {"method": "nearest"},
        {"target_bytes": 1 << 20},  # eight bits would be less exact
        {"precision": "int8", "block_size": 32},
    ],
    ids=["defaults", "smooth", "nearest", "target size", "int8"],
)
def test_from_q4_0_to_four_bits_and_nothing_lost(qat: tuple[Path, Bundle], settings: dict[str, object]) -> None:
    """From GGUF to float to INT4 with GPTQ, searched scales and smoothing, every layer's weight keeps its values."""
    imported, bundle = qat
    text = TokenRows("random", np.random.default_rng(3).integers(0, 320, (2, 40)))
    chosen = Settings(**({"precision": "int4"} | settings), gate=Gate(9))  # type: ignore[arg-type]
    made, report = quantize_bundle(bundle, Path("out"), text, chosen, calibration=text)
    assert made.manifest.quantization is not None
    schemes = made.manifest.quantization.schemes
    before = checkpoint_tensors(Weights(imported), read_config(imported))
    after = float_tensors(made.model_path, schemes)
    layers = [path for path in schemes if ".layers." in path]
    assert {schemes[path].bits for path in layers} == {8 if "precision" in settings else 4}
    for path in layers:
        np.testing.assert_array_equal(after[f"{path}.weight"], before[f"{path}.weight"])
        assert made.manifest.quantization.errors[path] == 0
    assert {each.path for each in report.tensors if each.snr_db is not None} == {"model.embed_tokens"}


def said_of_grids(
    bundle: Bundle, preferred: PreferredSchemes, block_size: int | None = None
) -> tuple[frozenset[str], str]:
    said: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    layers = [linear for linear in linears_of(bundle.config) if linear.layer is not None]
    schemes = schemes_of(layers, preferred, block_size)
    return exact_products(graph_tensors(bundle.model_path), layers, schemes, Listener()), "\n".join(said)


def test_notes_say_what_is_exact_and_what_would_be(qat: tuple[Path, Bundle], shared_bundle: Bundle) -> None:
    kept, said = said_of_grids(qat[1], INT4_PREFERRED)
    assert len(kept) == 16 and "16 of 16 products lie on a grid that int4 in blocks of 32 stores exactly" in said
    kept, said = said_of_grids(qat[1], INT8_PREFERRED["auto"])  # blocks of up to 128; 96 inputs allow blocks of 32
    assert kept == {f"model.layers.{i}.mlp.down_proj" for i in range(4)}
    assert "12 of 16 products lie on a 4-bit grid in blocks of 32" in said
    assert "--int4 --block-size 32 keeps their weights exactly" in said
    for preferred in (INT4_PREFERRED, INT8_PREFERRED["auto"]):
        assert said_of_grids(shared_bundle, preferred) == (frozenset(), "")
