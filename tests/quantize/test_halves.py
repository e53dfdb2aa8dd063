"""A tied table in halves: its rounding, and the same choices as from the whole table."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.contract import SIDES, head_candidates, past_name
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Silent
from slm.export import parity_head
from slm.export.graph.blocks import LOWER, SCALE, SHIFT, UPPER, dequantize_halves, relative_error, unpack
from slm.export.parity_head import check_head
from slm.quantize.blocks import quantize_nearest
from slm.quantize.halves import quantize_halves
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import streaming
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Generation, Request
from slm.runtime.head import both_ways
from slm.runtime.sampling import Sampling
from slm.runtime.scheduler import run_batch
from slm.runtime.streaming import run

# Candidates round activations as the kernel of AVX-512 VNNI does; other kernels differ by 1/16 of the rounding in other layers.
SAME = 0.02
EMBEDDING = "model.embed_tokens"


def text_of(bundle: Bundle, seed: int, rows: int) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (rows, 60)))


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
    ((fast, whole),) = both_ways(decoder, ids[-1:])
    return fast.copy(), whole


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
    assert (
        sum(array.nbytes for array in found.values())
        == scheme.bytes(40, 64)
        == sum(a.nbytes for a in usual.values()) + 160
    )


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
        likely = np.argsort(-whole)[: head_candidates(vocab) // 4]
        assert same[likely].all()
        assert not same.all()  # otherwise this test compares the whole table with itself
        assert np.abs(fast - whole).std() < 0.3 * whole.std()
        assert fast.argmax() == whole.argmax()


def test_all_positions_and_several_rows_read_the_whole_table(halves: Bundle) -> None:
    decoder = OnnxDecoder(halves, threads=1)
    ids = np.random.default_rng(2).integers(0, halves.config.vocab_size, (1, 40))
    everything = decoder.logits(ids)[0]
    for whole_head in (True, False):
        decoder.whole_head = whole_head
        decoder.reset()
        decoder.read(ids[0, :-1].tolist())
        before = decoder.snapshot()
        alone = decoder.read_each(ids[0, -1:].tolist())[-1]  # all positions of a step of one token
        decoder.restore(before)
        np.testing.assert_allclose(alone, everything[-1], atol=0.3 * everything.std())
        assert (np.abs(alone - decoder.read(ids[0, -1:].tolist())).max() == 0) == whole_head
    decoder.whole_head = False
    batch = decoder.caches(2)
    batch.reserve(8)
    rows = np.repeat(ids[:, :8], 2, axis=0)
    together = decoder.run(rows, np.ones((2, 8), np.int64), batch, keep=1)
    np.testing.assert_allclose(together[0, 0], decoder.logits(ids[:, :8])[0, -1], atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 5}, {"top_k": 20, "top_p": 0.5}]
)
def test_choices_equal_those_of_the_whole_table(halves: Bundle, options: dict[str, Any]) -> None:
    decoder = OnnxDecoder(halves, threads=1)
    request = Request([3, 1, 4, 1, 5], Sampling(**{"seed": 7} | options), 40)

    def text() -> list[int]:
        return run(decoder, Generation(request, decoder.context, decoder.vocab_size)).finish().tokens

    read: list[bool] = []
    step = decoder.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        read.append(decoder.whole_head)
        return step(*args, **kwargs)

    decoder.run = watched  # type: ignore[method-assign]
    fast = text()
    assert len(fast) == 40 and not any(read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "read_whole", lambda decoder, whole: None)
        read.clear()
        assert text() == fast
        assert all(read)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, False),
        ({"logprobs": 0}, True),
        ({"sampling": Sampling(logit_bias={3: 5.0})}, True),
        ({"sampling": Sampling(repetition_penalty=1.1)}, True),
        ({"sampling": Sampling(temperature=1.5, top_k=0)}, True),
        ({"sampling": Sampling(temperature=1.5, top_k=5)}, False),
        ({"sampling": Sampling(temperature=0.7, top_k=0)}, True),
        ({"sampling": Sampling(temperature=0.7, top_k=257)}, True),
        ({"sampling": Sampling(temperature=0)}, False),
    ],
)
def test_requests_that_look_at_unlikely_tokens_read_the_whole_table(options: dict[str, Any], whole: bool) -> None:
    assert Generation(Request([1], **options), 64, 4096).needs_whole == whole


def test_log_probabilities_are_those_of_the_whole_table(halves: Bundle) -> None:
    decoder = OnnxDecoder(halves, threads=1)
    request = Request([3, 1, 4], Sampling(temperature=0), 6, logprobs=0)
    result = run(decoder, Generation(request, decoder.context, decoder.vocab_size)).finish()
    likely, _ = decoder.score(np.array([[*request.prompt, *result.tokens]]))
    found = [each.chosen for each in result.logprobs]
    np.testing.assert_allclose(found, likely[0, len(request.prompt) - 1 :], atol=0.05)


def test_texts_of_a_batch(halves: Bundle) -> None:
    decoder = OnnxDecoder(halves, threads=1)
    generations = [
        Generation(Request(prompt, Sampling(temperature=0), new), decoder.context, decoder.vocab_size)
        for prompt, new in (([5, 6, 7], 4), ([9, 8], 9))  # the second one is alone at the end
    ]
    results = run_batch(decoder, generations)
    assert [len(result.tokens) for result in results] == [4, 9]
    alone = [
        run(decoder, Generation(each.request, decoder.context, decoder.vocab_size)).finish().tokens
        for each in generations
    ]
    assert [result.tokens for result in results] == alone


def test_other_clients_read_halves_at_a_step_of_one_token(halves: Bundle) -> None:
    """They do not pass `num_logits_to_keep`; its default asks for all positions."""
    decoder = OnnxDecoder(halves, threads=1)
    fast, whole = both(halves, [3, 1, 4, 1])
    feeds = {"input_ids": np.array([[3, 1, 4, 1]]), "attention_mask": np.ones((1, 4), np.int64)}
    for layer in halves.manifest.cache:
        shape = (1, layer.kv_heads, layer.capacity(16), layer.head_dim)
        feeds |= {past_name(layer.layer, side): np.zeros(shape, np.float32) for side in SIDES}
    prompt = decoder.session.run(
        None, feeds | {"input_ids": feeds["input_ids"][:, :3], "attention_mask": np.ones((1, 3), np.int64)}
    )
    assert prompt[0].shape == (1, 3, halves.config.vocab_size)
    names = [each.name.replace("present", "past_key_values") for each in decoder.session.get_outputs()][1:]
    feeds |= dict(zip(names, prompt[1:], strict=True)) | {"input_ids": np.array([[1]])}
    (logits,) = decoder.session.run(["logits"], feeds)
    np.testing.assert_allclose(logits[0, 0], fast, atol=1e-3)
    assert np.abs(logits[0, 0] - whole).max() > 1e-2


def test_the_table_takes_no_more_space(shared_bundle: Bundle, halves: Bundle, tmp_path: Path) -> None:
    whole = make(shared_bundle, tmp_path / "whole", head="whole")
    after, before = (each.model_path.with_suffix(".onnx_data").stat().st_size for each in (halves, whole))
    assert after - before <= 4 * halves.config.vocab_size + 3 * 4096  # the shift, and padding to pages
    assert halves.manifest.quantization is not None
    assert halves.manifest.quantization.schemes[EMBEDDING].halves


def test_verify_compares_both_ways_to_read_the_head(halves: Bundle, tmp_path: Path) -> None:
    check_head(halves, Silent())
    broken = ir.load(halves.model_path)
    shift = broken.graph.initializers[f"{EMBEDDING}.{SHIFT}"]
    assert shift.const_value is not None
    values = np.random.default_rng(0).standard_normal(shift.const_value.shape.numpy()).astype(np.float32)
    shift.const_value = ir.tensor(values * 3, name=shift.name)
    shutil.copytree(halves.path, tmp_path / "bundle")
    path = tmp_path / "bundle" / halves.manifest.model
    path.unlink()
    ir.save(broken, path)
    with pytest.raises(SlmError, match="does not match the whole head"):
        check_head(Bundle(tmp_path / "bundle", halves.manifest, halves.config), Silent())


def test_verify_finds_wrong_candidates(halves: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parity_head.both_ways

    def off_by_a_tenth(decoder: Any, ids: Any) -> Iterator[Any]:
        for found, whole in real(decoder, ids):
            yield found + 0.1 * whole.std(), whole

    monkeypatch.setattr(parity_head, "both_ways", off_by_a_tenth)
    with pytest.raises(SlmError, match="candidates"):
        check_head(halves, Silent())


def test_bundles_that_cannot_have_halves(shared_bundle: Bundle, tmp_path: Path) -> None:
    for field, value in (("target", "portable"), ("device", "cuda")):
        manifest = shared_bundle.manifest.model_copy(update={field: value})
        with pytest.raises(SlmError, match="fused bundles for the CPU"):
            make(Bundle(shared_bundle.path, manifest, shared_bundle.config), tmp_path / "out")
    untied = shared_bundle.config.model_copy(update={"tie_word_embeddings": False})
    with pytest.raises(SlmError, match="tied head"):
        make(Bundle(shared_bundle.path, shared_bundle.manifest, untied), tmp_path / "out")
    assert not (tmp_path / "out").exists()
