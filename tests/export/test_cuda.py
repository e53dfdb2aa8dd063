"""The differences of the graph for CUDA, run on the CPU, which computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.config import FULL, ModelConfig
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.runtime.cache import KVBuffers
from slm.runtime.decoder import OnnxDecoder

# The same step in the same kernels. Only the float16 rounding of sums in another order may differ.
SAME_LOGITS = 2e-3


@pytest.fixture(scope="module")
def bundle(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(shared_checkpoint, tmp_path_factory.mktemp("cuda") / "onnx", ExportOptions(device="cuda"))


@pytest.mark.parametrize(("keep", "positions"), [(0, 5), (1, 1), (3, 3), (5, 5), (9, 5)])
@pytest.mark.parametrize("past", [0, 4, 20])
def test_the_last_positions_are_kept(bundle: Bundle, keep: int, positions: int, past: int) -> None:
    decoder = OnnxDecoder(bundle)
    ids = np.array([[5, 9, 2, 7, 11]])
    found = []
    for each in (0, keep):
        decoder.reset()
        if past:
            decoder.step(np.arange(past)[None])
        found.append(decoder.step(ids, keep=each))
    assert found[1].shape == (1, positions, bundle.config.vocab_size)
    np.testing.assert_array_equal(found[1], found[0][:, -positions:])


def test_rows_padded_on_the_right_keep_their_own_last_positions(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    everywhere = config.model_copy(update={"layer_types": (FULL,) * config.num_hidden_layers})
    save_checkpoint(tmp_path / "c", make_model(everywhere), tokenizer, {})
    bundle = export_bundle(tmp_path / "c", tmp_path / "onnx", ExportOptions(device="cuda"))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (3, 12))
    lengths = (12, 5, 1)
    mask = (np.arange(12) < np.array(lengths)[:, None]).astype(np.int64)

    def run(keep: int) -> Any:
        return OnnxDecoder(bundle).run(ids, mask, KVBuffers(bundle.manifest.cache, 64, batch=3), keep=keep)

    everything, kept = run(0), run(2)
    assert everything.shape[1] == 12 and kept.shape[1] == 2
    for row, length in enumerate(lengths):
        first = max(length - 2, 0)
        np.testing.assert_array_equal(kept[row], everything[row, first : first + 2])


def test_a_mask_may_be_longer_than_the_sequence(bundle: Bundle) -> None:
    """A recorded step has a mask as long as the buffers' capacity, for any length of the sequence."""
    decoder = OnnxDecoder(bundle)
    for length in (2, 15, 16, 17, 40):
        found = []
        for columns in (length, 64):
            buffers = decoder.caches()
            decoder.run(np.arange(length - 1)[None], np.ones((1, length - 1), np.int64), buffers, 1)
            mask = np.zeros((1, columns), np.int64)
            mask[:, :length] = 1
            found.append(decoder.run(np.array([[7]]), mask, buffers, 1))
        np.testing.assert_allclose(found[0], found[1], atol=SAME_LOGITS, err_msg=str(length))
    # Negative control: one more position in the mask changes the step.
    mask[:, length] = 1
    other = decoder.run(np.array([[7]]), mask, buffers, 1)
    assert np.abs(other - found[0]).max() > 10 * SAME_LOGITS


def test_norms_take_float16_products(bundle: Bundle, shared_bundle: Bundle) -> None:
    """The norms after attention and MLP need no cast. The graph for the CPU is unchanged."""

    def casts(path: Path) -> int:
        return sum(node.op_type == "Cast" for node in ir.load(path).graph)

    layers, kinds = bundle.config.num_hidden_layers, 2
    # Casts in each layer: before qkv and gate_up. Other casts: lookup and head, the tables, and the two lengths.
    assert casts(bundle.model_path) == 2 * layers + 3 + 2 * kinds + 3
    assert casts(shared_bundle.model_path) == 3
