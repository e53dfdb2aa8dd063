"""Prefix caching: a prompt's common prefix with earlier prompts is not read again, and the text stays the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.export.bundle import ExportOptions, export_bundle
from slm.runtime.backend import Decoder
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Generation, Request
from slm.runtime.prefix import SHORTEST, PrefixCache, PrefixDecoder, common_length
from slm.runtime.sampling import GREEDY
from slm.runtime.scheduler import Scheduler
from slm.runtime.shipped import model_path
from slm.runtime.speculative import SpeculativeDecoder
from tests.runtime.texts import completed

IDS = np.random.default_rng(9).integers(4, 320, 250).tolist()
# A prompt in two portions against one: float32 sums in another order, measured 3e-6 on logits of standard deviation 0.4.
TOLERANCE = 2e-5


@dataclass
class Sized:
    """A snapshot of a given size."""

    length: int
    bytes: int


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(10_000)
    for length in (2, 5, 9):
        assert cache.add(IDS[:length], Sized(length, 100))
    assert cache.add([*IDS[:5], 1], Sized(6, 100))
    for asked, found in ((IDS[:1], None), (IDS[:2], 2), (IDS[:4], 2), (IDS[:8], 5), (IDS[:9], 9), (IDS, 9)):
        snapshot = cache.longest(asked)
        assert (None if snapshot is None else snapshot.length) == found
    assert cache.longest([IDS[0] + 1, *IDS[1:]]) is None
    assert IDS[:5] in cache and IDS[:4] not in cache


def test_tokens_are_told_apart_whatever_their_bytes() -> None:
    """256 and 1 have a byte in common; a prefix must end between tokens."""
    cache = PrefixCache(1000)
    cache.add([1], Sized(1, 1))
    assert cache.longest([256, 1]) is None and cache.longest([1, 256]) is not None and cache.longest([257]) is None


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = PrefixCache(3 * 104)  # each of one token and 100 bytes
    for token in (1, 2, 3):
        cache.add([token], Sized(1, 100))
    assert cache.bytes == 312 and len(cache) == 3
    cache.longest([1, 7])
    cache.add([4], Sized(1, 100))
    assert [token for token in (1, 2, 3, 4) if [token] in cache] == [1, 3, 4]
    cache.add([5], Sized(1, 250))  # in place of all others
    assert [token for token in (1, 3, 4, 5) if [token] in cache] == [5] and cache.bytes == 254
    assert not cache.add([6], Sized(1, 309)) and [5] in cache  # too large for an empty cache
    cache.add([5], Sized(1, 10))
    assert cache.bytes == 14 and len(cache) == 1
    cache.clear()
    assert cache.bytes == len(cache) == 0
    with pytest.raises(SlmError, match="max_bytes is -1"):
        PrefixCache(-1)


@pytest.fixture(params=["fused", "torch", "portable"])
def plain(request: pytest.FixtureRequest, shared_bundle: Bundle, shared_checkpoint: Path, tmp_path: Path) -> Decoder:
    if request.param == "torch":
        return slm.load(shared_checkpoint).decoder
    if request.param == "portable":
        return OnnxDecoder(
            export_bundle(shared_checkpoint, tmp_path / "portable", ExportOptions(target="portable")), threads=1
        )
    return OnnxDecoder(shared_bundle, threads=1)


def kind(decoder: Decoder) -> str:
    return decoder.bundle.manifest.target if isinstance(decoder, OnnxDecoder) else "torch"


def test_prompts_that_begin_alike(plain: Decoder) -> None:
    """Turns of a chat, a repeated prompt, one that diverges early, and a new one: results always equal a fresh read."""
    fresh = OnnxDecoder(plain.bundle, threads=1) if isinstance(plain, OnnxDecoder) else type(plain)(plain.model)  # type: ignore[attr-defined, call-arg]
    decoder = PrefixDecoder(plain, PrefixCache(10 << 20))
    first, other = IDS[:60], [*IDS[:40], *IDS[200:220]]
    prompts = [first, IDS[:100], first, IDS[:100], other, IDS[120:140], [*IDS[:100], 9, 8], [5]]
    # A portable sliding layer keeps what the next token needs and no more: it cannot rewind to the end of the first prompt, and
    # continues from the snapshot before its last token. A prompt of 20 tokens gets no snapshot.
    reused = [0, 59 if kind(plain) == "portable" else 60, 59, 99, 0, 0, 99, 0]
    for prompt, known in zip(prompts, reused, strict=True):
        decoder.reset()
        assert decoder.length == 0
        fresh.reset()
        np.testing.assert_allclose(decoder.read(prompt), fresh.read(prompt), atol=TOLERANCE)
        assert decoder.reused == known
        for token in (3, 4, 5):
            np.testing.assert_allclose(decoder.read([token]), fresh.read([token]), atol=TOLERANCE)
        assert decoder.length == fresh.length == len(prompt) + 3


def test_a_chat_goes_on_where_it_is(shared_bundle: Bundle) -> None:
    """Generated tokens are known without a snapshot; short texts rewind even if the next question differs."""
    decoder = PrefixDecoder(OnnxDecoder(shared_bundle, threads=1), PrefixCache(0))
    plain = OnnxDecoder(shared_bundle, threads=1)
    said = IDS[:10]
    for turn in ([1, 2, 3], [4, 5], [6, 7, 8, 9]):
        said = [*said, *turn]
        texts = [completed(each, said, GREEDY, 6).tokens for each in (decoder, plain)]
        assert texts[0] == texts[1]
        said += texts[0]
    assert (
        decoder.reused == len(said) - 6 - 4 - 1
    )  # all but the turn and the last token, which was chosen and never read
    assert len(decoder.cache) == 0
    decoder.reset()
    decoder.read([*IDS[:10], 9, 9])
    assert decoder.reused == 0  # 38 tokens back: out of the windows
    decoder.reset()
    decoder.read([*IDS[:10], 9, 7, 7])
    assert decoder.reused == 11


def test_nothing_is_taken_from_a_text_that_was_cut_off(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PrefixDecoder(OnnxDecoder(shared_bundle, threads=1), PrefixCache(0))
    decoder.read(IDS[:20])
    run = OnnxDecoder.run

    def cut(self: OnnxDecoder, *args: Any) -> None:
        run(self, *args)
        monkeypatch.setattr(OnnxDecoder, "run", run)
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxDecoder, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        decoder.read([1])
    decoder.reset()
    fresh = OnnxDecoder(shared_bundle, threads=1)
    np.testing.assert_array_equal(decoder.read(IDS[:30]), fresh.read(IDS[:30]))
    assert decoder.reused == 0


def test_a_wrong_snapshot_shows(shared_bundle: Bundle) -> None:
    """Negative control: tokens stored with the snapshot of other tokens."""
    plain = OnnxDecoder(shared_bundle, threads=1)
    plain.read(IDS[100:130])
    cache = PrefixCache(10 << 20)
    cache.add(IDS[:30], plain.snapshot())
    decoder = PrefixDecoder(OnnxDecoder(shared_bundle, threads=1), cache)
    wrong = decoder.read(IDS[:40])
    assert decoder.reused == 30
    plain.reset()
    assert np.abs(wrong - plain.read(IDS[:40])).max() > 100 * TOLERANCE


def test_drafts_on_known_prompts(shared_bundle: Bundle) -> None:
    """Each of the two decoders around the other: the text is still that of plain decoding."""
    plain = OnnxDecoder(shared_bundle, threads=1)
    inner = PrefixDecoder(OnnxDecoder(shared_bundle, threads=1), PrefixCache(10 << 20))
    decoder = SpeculativeDecoder(inner, 8)
    for prompt in (IDS[:50], IDS[:90], IDS[:50]):
        texts = [completed(each, prompt, GREEDY, 60).tokens for each in (decoder, plain)]
        assert texts[0] == texts[1]
        assert (inner.reused > 0) == (prompt != IDS[:50] or inner.reused == 49)
    assert decoder.accepted > 20 and inner.reused == 49


def test_going_back_and_snapshots(shared_bundle: Bundle) -> None:
    decoder = PrefixDecoder(OnnxDecoder(shared_bundle, threads=1), PrefixCache(10 << 20))
    plain = OnnxDecoder(shared_bundle, threads=1)
    for each in (decoder, plain):
        each.read(IDS[:20])
        each.read_each([7, 8, 9])
        each.rewind(21)
    snapshot = decoder.snapshot()
    assert snapshot.length == 21 and snapshot.bytes > plain.snapshot().bytes
    np.testing.assert_array_equal(decoder.read([5]), plain.read([5]))
    decoder.reset()
    assert decoder.revocable > 0 and decoder.length == 0
    decoder.restore(snapshot)
    plain.rewind(21)
    np.testing.assert_array_equal(decoder.read([6]), plain.read([6]))
    decoder.reset()
    decoder.read([*IDS[:20], 7, 6, 1])
    assert decoder.reused == 22
    with pytest.raises(SlmError, match="not of this decoder"):
        decoder.restore(plain.snapshot())


@pytest.mark.parametrize("length", [SHORTEST + 1, 90])
def test_a_repeated_prompt_has_the_same_logits_bit_for_bit(length: int) -> None:
    """The first read pauses where a repeated read begins, so that both sum in the same order: INT8 products would amplify a
    difference."""
    plain = OnnxDecoder(Bundle.open(model_path()), threads=1)
    decoder = PrefixDecoder(plain, PrefixCache(10 << 20))
    first = decoder.read(IDS[:length])
    decoder.read([3, 4, 5])
    decoder.reset()
    np.testing.assert_array_equal(decoder.read(IDS[:length]), first)
    assert decoder.reused == length - 1
    plain.reset()
    assert (plain.read(IDS[:length]) != first).any()  # the control: read in one piece


def test_a_chat_and_a_server_take_snapshots_at_the_same_place(shared_bundle: Bundle) -> None:
    """Both ask the cache, and a server that reads prompts in pieces stores the same tokens."""
    caches = [PrefixCache(10 << 20), PrefixCache(10 << 20)]
    PrefixDecoder(OnnxDecoder(shared_bundle, threads=1), caches[0]).read(IDS[:70])
    scheduler = Scheduler(Batch(OnnxDecoder(shared_bundle, threads=1), 2), prefill_tokens=16, prefix_bytes=10 << 20)
    scheduler._prefixes[""] = caches[1]
    scheduler.admit(Generation(Request(IDS[:70], GREEDY, 1), 200, shared_bundle.config.vocab_size))
    while scheduler.running:
        for _ in scheduler.turn():
            pass
    for cache in caches:
        assert len(cache) == 1 and IDS[:69] in cache
    for cache in (PrefixCache(0), PrefixCache(1000, shortest=70)):  # the controls: no memory, and a prompt too short
        assert cache.pause(70, 0) == 70
    assert caches[0].pause(70, 0) == caches[0].pause(70, 68) == 69 and caches[0].pause(70, 69) == 70


@pytest.mark.parametrize(
    ("some", "others", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)]
)
def test_common_length(some: list[int], others: list[int], length: int) -> None:
    assert common_length(some, others) == common_length(others, some) == length
