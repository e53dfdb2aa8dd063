"""A tied table in halves: its rounding, and the same choices as from the whole table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.contract import head_candidates
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme
from slm.export.graph.blocks import LOWER, SCALE, SHIFT, UPPER, dequantize_halves, relative_error, unpack
from slm.quantize.blocks import quantize_nearest
from slm.quantize.decide import Gate, Settings
from slm.quantize.halves import quantize_halves
from slm.quantize.make import quantize_bundle
from slm.quantize.quality import Text
from slm.runtime.decoder import OnnxDecoder

# The whole head rounds activations to 8 bits, and the exact logits of candidates do not, in their lower halves only. The
# difference is 1/16 of the rounding in other layers.
SAME = 0.02
EMBEDDING = "model.embed_tokens"


def text_of(bundle: Bundle, seed: int, rows: int) -> Text:
    return Text("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (rows, 60)))


def make(source: Bundle, out: Path, **settings: Any) -> Bundle:
    settings = {"gate": Gate(None), "head": "halves"} | settings
    return quantize_bundle(source, out, text_of(source, 5, 4), Settings(**settings), None, text_of(source, 6, 8))[0]


@pytest.fixture(scope="module")
def halves(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(shared_bundle, tmp_path_factory.mktemp("made") / "halves")


def both(bundle: Bundle, ids: list[int]) -> tuple[Any, Any]:
    """Returns the next logits (V,) after some tokens, from halves and from the whole table."""
    decoder = OnnxDecoder(bundle, threads=1)
    decoder.read(ids[:-1])
    before = decoder.snapshot()
    decoder.whole_head = False
    fast = decoder.read(ids[-1:]).copy()
    decoder.restore(before)
    decoder.whole_head = True
    return fast, decoder.read(ids[-1:])


def test_256_integers_represent_each_weight() -> None:
    scheme = Scheme(bits=8, block_size=32, halves=True)
    weight = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    weight[3] = 0
    weight[4, :32] = np.abs(weight[4, :32])
    found = quantize_halves(weight, scheme, np.zeros(64, np.float32))
    restored = dequantize_halves(found[UPPER], found[LOWER], found[SCALE], scheme)
    steps = np.abs(np.repeat(found[SCALE], 32, axis=1)) / 16
    assert (np.abs(restored - weight) <= steps / 2 + 1e-6).all()
    usual = quantize_nearest(weight, Scheme(bits=8, block_size=32))
    error = relative_error(weight, restored)
    assert error < 0.0065
    assert sum(array.nbytes for array in found.values()) == scheme.bytes(40, 64) == sum(a.nbytes for a in usual.values()) + 160


def test_the_shift_is_the_mean_error_of_the_upper_halves() -> None:
    scheme = Scheme(bits=8, block_size=32, halves=True)
    rng = np.random.default_rng(0)
    weight, mean = rng.standard_normal((40, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    found = quantize_halves(weight, scheme, mean)
    upper = (unpack(found[UPPER], 4, 32).astype(np.float32) - 8) * found[SCALE][..., None]
    whole = dequantize_halves(found[UPPER], found[LOWER], found[SCALE], scheme)
    np.testing.assert_allclose(found[SHIFT], (whole - upper.reshape(40, 64)) @ mean, rtol=1e-3, atol=1e-4)


def test_the_candidates_are_exact_and_the_others_are_close(halves: Bundle) -> None:
    rng, vocab = np.random.default_rng(1), halves.config.vocab_size
    for length in (2, 15, 16, 17, 50):  # around the sliding window
        fast, whole = both(halves, rng.integers(0, vocab, length).tolist())
        same = np.abs(fast - whole) < SAME * whole.std()
        likely = np.argsort(-whole)[: head_candidates(vocab) // 2]
        assert same[likely].all()
        assert not same.all()  # otherwise this test compares the whole table with itself
        assert np.abs(fast - whole).std() < 0.3 * whole.std()
        assert fast.argmax() == whole.argmax()
