"""Drafts change only the time of a text, whether they are right or wrong."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.backend import Decoder
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.sampling import GREEDY, Sampling
from slm.runtime.speculative import Lookup, SpeculativeDecoder, Trust
from tests.runtime.texts import completed

NEW = 160  # tokens, of windows of 16
PROMPT = [5, 6, 7, 8]

# Steps of several tokens add in another order than single steps: measured 3e-6 on logits of standard deviation 0.4.
TOLERANCE = 2e-5

# Texts of a random model: one that soon repeats, one that hardly does, one in between.
SAMPLINGS = {
    "repeats": GREEDY,
    "does not": Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=1),
    "now and then": Sampling(temperature=0.2, seed=1),
}


@pytest.fixture(scope="module")
def checkpoint(shared_checkpoint: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same random model with a longer context."""
    model = load_checkpoint(shared_checkpoint)
    longer = CausalLM(model.config.model_copy(update={"max_position_embeddings": 1024}))
    longer.load_state_dict(model.state_dict())
    path = tmp_path_factory.mktemp("longer") / "checkpoint"
    save_checkpoint(path, longer, tokenizer, {})
    return path


@pytest.fixture(scope="module")
def float_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(checkpoint, tmp_path_factory.mktemp("fused") / "onnx")


@pytest.fixture(scope="module")
def portable_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(checkpoint, tmp_path_factory.mktemp("portable") / "onnx", ExportOptions(target="portable"))


@pytest.fixture(scope="module")
def int8_bundle(float_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """INT8 weights in blocks of 32 and INT8 caches."""
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
    settings = Settings(gate=Gate(1), cache="int8", block_size=32)
    return quantize_bundle(float_bundle, tmp_path_factory.mktemp("int8") / "onnx", text, settings)[0]


@pytest.fixture(params=["fused", "int8", "torch", "portable"])
def plain(request: pytest.FixtureRequest, checkpoint: Path) -> Decoder:
    """A decoder of each kind on the same model."""
    if request.param == "torch":
        return slm.load(checkpoint).decoder
    fixture = {"fused": "float_bundle", "int8": "int8_bundle", "portable": "portable_bundle"}[request.param]
    return OnnxDecoder(request.getfixturevalue(fixture), threads=1)


def text_of(decoder: Decoder, sampling: Sampling, new: int = NEW) -> list[int]:
    return completed(decoder, PROMPT, sampling, new).tokens


def needs_equal_rows(bundle: Bundle) -> None:
    """Skips the test if this processor's steps of several tokens differ in bits from single-token steps."""
    ones, several = OnnxDecoder(bundle, threads=1), OnnxDecoder(bundle, threads=1)
    if not np.array_equal([ones.read([token]) for token in PROMPT], several.read_each(PROMPT)):
        pytest.skip("the INT8 kernels of this processor add a row by itself in another order")


@pytest.mark.parametrize("draft_tokens", [1, 12])
@pytest.mark.parametrize("text", SAMPLINGS)
def test_the_text_is_that_of_plain_decoding(plain: Decoder, text: str, draft_tokens: int) -> None:
    if isinstance(plain, OnnxDecoder) and plain.bundle.manifest.precision == "int8":
        needs_equal_rows(plain.bundle)
    wanted = text_of(plain, SAMPLINGS[text])
    drafting = SpeculativeDecoder(plain, draft_tokens)
    assert text_of(drafting, SAMPLINGS[text]) == wanted
    assert len(set(wanted)) > 10
    portable = isinstance(plain, OnnxDecoder) and plain.bundle.manifest.target == "portable"
    if text == "repeats" and not portable:  # whose caches let nothing go back once the window is full
        assert drafting.accepted > NEW // 4
        assert drafting.steps == NEW - 1 - drafting.accepted


def test_int8_logits_are_the_same_bits(int8_bundle: Bundle) -> None:
    """With INT8 caches and blocks of 32: compares every row of logits, not only the chosen tokens."""
    needs_equal_rows(int8_bundle)
    plain = OnnxDecoder(int8_bundle, threads=1)
    drafting = SpeculativeDecoder(OnnxDecoder(int8_bundle, threads=1), 15)
    text = [*PROMPT, *text_of(plain, GREEDY)]
    plain.reset()
    for token in text:
        np.testing.assert_array_equal(drafting.read([token]), plain.read([token]))
    assert drafting.accepted > NEW // 4


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """Replaces drafts by a known text, alternately right and wrong, and always trusts them."""

    def plant(text: Sequence[int]) -> None:
        chance = np.random.default_rng(2)

        def draft(self: Lookup, count: int) -> tuple[list[int], int]:
            true = int(chance.integers(0, count + 1))
            wrong = chance.integers(0, 320, count).tolist()
            return [*text[self.length : self.length + true], *wrong][:count], 1

        monkeypatch.setattr(Lookup, "draft", draft)
        monkeypatch.setattr(Trust, "length", lambda self, matched, longest: max(0, longest))

    return plant


@pytest.mark.parametrize("text", ["does not", "now and then"])
def test_drafts_right_and_wrong_of_every_length(
    plain: Decoder, text: str, drafts: Callable[[Sequence[int]], None]
) -> None:
    """Compares logits too, across every position where the buffers move up."""
    tokens = [*PROMPT, *text_of(plain, SAMPLINGS[text], 200)]
    exact = isinstance(plain, OnnxDecoder) and plain.bundle.manifest.precision == "int8"
    if exact:
        needs_equal_rows(plain.bundle)  # type: ignore[attr-defined]
    plain.reset()
    wanted = [plain.read([token]) for token in tokens]
    drafts(tokens)
    drafting = SpeculativeDecoder(plain, 12)
    drafting.reset()
    for token, logits in zip(tokens, wanted, strict=True):
        np.testing.assert_allclose(drafting.read([token]), logits, rtol=0, atol=0 if exact else TOLERANCE)
    assert drafting.length == len(tokens)
    portable = isinstance(plain, OnnxDecoder) and plain.bundle.manifest.target == "portable"
    assert 0 < drafting.accepted < drafting.drafted and (portable or drafting.drafted > 200)


def test_what_did_not_come_true_must_be_forgotten(
    float_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, drafts: Callable[[Sequence[int]], None]
) -> None:
    """Negative control: with wrong tokens left in the caches, the text differs."""
    decoder = OnnxDecoder(float_bundle, threads=1)
    wanted = text_of(decoder, GREEDY, 60)
    drafts([*PROMPT, *wanted])
    assert text_of(SpeculativeDecoder(decoder, 4), GREEDY, 60) == wanted
    monkeypatch.setattr(OnnxDecoder, "rewind", lambda *_: None)
    assert text_of(SpeculativeDecoder(decoder, 4), GREEDY, 60) != wanted


def test_the_context_ends_a_text_where_it_would_end_anyway(float_bundle: Bundle) -> None:
    decoder = OnnxDecoder(float_bundle, threads=1)
    texts = []
    for each in (decoder, SpeculativeDecoder(decoder, 15)):
        result = completed(each, [9] * (decoder.context - 40), GREEDY, 100)
        texts.append(result.tokens)
        assert result.stopped == "context" and len(texts[-1]) == 41
        with pytest.raises(SlmError, match="do not fit into the context"):
            each.read([1])
        assert each.length == decoder.context  # and nothing was lost by asking
    assert texts[0] == texts[1]


class Scripted:
    """A decoder that computes nothing and records its calls."""

    context, vocab_size, description = 4096, 8, "a script"

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.sizes: list[int] = []
        self.revocable = 64

    length = property(lambda self: len(self.ids))

    def reset(self) -> None:
        self.ids = []

    def read(self, ids: Sequence[int]) -> np.ndarray:
        return self.read_each(ids)[-1]

    def read_each(self, ids: Sequence[int]) -> np.ndarray:
        assert len(ids) == 1 or len(ids) <= self.revocable or not self.ids
        self.ids += ids
        self.sizes.append(len(ids))
        return np.eye(self.vocab_size)[[token % self.vocab_size for token in ids]]

    def rewind(self, length: int) -> None:
        self.ids = self.ids[:length]


def test_logits_are_those_of_the_token_read() -> None:
    """Holds for every token, drafted or not; at the end the decoder has read exactly the text."""
    script = Scripted()
    drafting = SpeculativeDecoder(script, 6)  # type: ignore[arg-type]
    text = [1, 2, 3, 4] * 10 + [5, 6] * 10 + [1, 2, 3, 4] * 3
    for token in text:
        assert int(drafting.read([token]).argmax()) == token
    drafting.rewind(drafting.length)
    assert script.ids == text
    assert drafting.accepted > 40


def test_drafts_that_never_come_true_are_given_up() -> None:
    """The odds that 1,000 random tokens of 100 repeat three of their last nine: tiny, but single tokens do at once."""
    script = Scripted()
    drafting = SpeculativeDecoder(script, 15)  # type: ignore[arg-type]
    text = np.random.default_rng(0).integers(0, 100, 1000)
    for token in text.tolist():
        drafting.read([token])
    assert 0 < drafting.drafted < 30
    assert len(script.sizes) == 1000 - drafting.accepted


def test_drafts_come_back_when_the_text_begins_to_repeat() -> None:
    """Tokens that were drafted but not read ahead count too."""
    script = Scripted()
    drafting = SpeculativeDecoder(script, 15)  # type: ignore[arg-type]
    for token in [*np.random.default_rng(0).integers(0, 100, 500).tolist(), *([1, 2, 3, 4, 5] * 40)]:
        drafting.read([token])
    assert max(script.sizes[-6:]) == 16 and drafting.accepted > 150


@pytest.mark.parametrize("revocable", [0, 1, 2, 5])
def test_drafts_stay_within_what_can_be_forgotten(revocable: int) -> None:
    script = Scripted()
    script.revocable = revocable
    drafting = SpeculativeDecoder(script, 15)  # type: ignore[arg-type]
    for token in [1, 2] * 50:
        drafting.read([token])
    assert max(script.sizes) == max(1, revocable)


def test_a_prompt_after_drafts(float_bundle: Bundle) -> None:
    """Reads of several tokens, rewinds and snapshots, while tokens are read ahead."""
    drafting = SpeculativeDecoder(OnnxDecoder(float_bundle, threads=1), 10)
    plain = OnnxDecoder(float_bundle, threads=1)
    for decoder in (drafting, plain):
        decoder.read([1, 2, 3, 4, 5] * 4)
        for token in (1, 2, 3):
            decoder.read([token])
    assert drafting._ahead
    np.testing.assert_allclose(drafting.read([30, 31]), plain.read([30, 31]), atol=TOLERANCE)
    assert drafting.length == plain.length == 25
    for decoder in (drafting, plain):
        decoder.rewind(24)
    snapshots = drafting.snapshot(), plain.snapshot()
    assert snapshots[0].length == 24 and snapshots[0].bytes > snapshots[1].bytes
    for _ in range(2):
        np.testing.assert_allclose(drafting.read([7]), plain.read([7]), atol=TOLERANCE)
        np.testing.assert_allclose(drafting.read_each([8, 9]), plain.read_each([8, 9]), atol=TOLERANCE)
        for decoder, snapshot in zip((drafting, plain), snapshots, strict=True):
            decoder.restore(snapshot)
        assert drafting.length == 24 and drafting._text.ids.tolist() == [*[1, 2, 3, 4, 5] * 4, 1, 2, 3, 30]
    with pytest.raises(SlmError, match="not of this decoder"):
        drafting.restore(snapshots[1])


def test_the_same_prompt_gets_the_same_drafts(float_bundle: Bundle) -> None:
    drafting = SpeculativeDecoder(OnnxDecoder(float_bundle, threads=1), 8)
    counts = []
    for _ in range(2):
        before = drafting.drafted, drafting.accepted, drafting.steps
        text_of(drafting, SAMPLINGS["now and then"], 150)
        counts.append(np.subtract((drafting.drafted, drafting.accepted, drafting.steps), before).tolist())
    assert counts[0] == counts[1] and counts[0][0] > 0


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes the next step of a bundle end in Ctrl-C."""

    def arm() -> None:
        run = OnnxDecoder.run

        def cut(self: OnnxDecoder, *args: Any) -> None:
            run(self, *args)
            monkeypatch.setattr(OnnxDecoder, "run", run)
            raise KeyboardInterrupt

        monkeypatch.setattr(OnnxDecoder, "run", cut)

    yield arm


def test_a_step_that_was_cut_off_leaves_nothing_read(float_bundle: Bundle, interrupted: Callable[[], None]) -> None:
    drafting = SpeculativeDecoder(OnnxDecoder(float_bundle, threads=1), 8)
    wanted = text_of(drafting, GREEDY, 30)
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        drafting.read([9])
    assert drafting.length == drafting.decoder.length == 0
    assert text_of(drafting, GREEDY, 30) == wanted


def test_at_least_one_token_is_drafted(float_bundle: Bundle) -> None:
    with pytest.raises(SlmError, match="draft_tokens is 0"):
        SpeculativeDecoder(OnnxDecoder(float_bundle), 0)
    assert "drafts of up to 3" in SpeculativeDecoder(OnnxDecoder(float_bundle), 3).description


LOOKUPS = [
    ([], 3, [], 0),
    ([4], 3, [], 0),
    ([1, 2, 3], 3, [], 0),
    ([1, 2, 3, 1], 2, [2, 3], 1),
    ([1, 2, 3, 1], 4, [2, 3, 1, 2], 1),  # repeats at a distance of three
    ([7, 7], 3, [7, 7, 7], 1),
    ([1, 2, 9, 5, 1, 2, 8, 5, 1, 2], 2, [8, 5], 3),  # not 9: two tokens match there
    ([5, 1, 2, 9, 5, 1, 2, 8, 1, 2], 1, [8], 2),  # the more recent of two equally long matches
    ([3, 1, 2, 9, 4, 1, 2, 8, 3, 1, 2], 1, [9], 3),  # the longer match before the more recent one
]


@pytest.mark.parametrize(("text", "count", "draft", "matched"), LOOKUPS)
def test_lookup(text: list[int], count: int, draft: list[int], matched: int) -> None:
    lookup = Lookup(64)
    lookup.extend(text)
    assert lookup.draft(count) == (draft, matched)


def test_lookup_against_a_plain_search() -> None:
    chance = np.random.default_rng(3)
    for _ in range(300):
        text = chance.integers(0, 4, chance.integers(1, 40)).tolist()
        lookup = Lookup(64)
        lookup.extend([*text, 1, 2, 3])
        lookup.rewind(len(text))
        best, where = 0, 0
        for end in range(len(text) - 1):
            length = 0
            while length < 8 and length <= end and text[end - length] == text[-1 - length]:
                length += 1
            if length and length >= best:
                best, where = length, end + 1
        follows = text[where:]
        wanted = [follows[i % len(follows)] for i in range(5)] if best else []
        assert lookup.draft(5) == (wanted, best)


def test_trust_follows_what_comes_true() -> None:
    trust = Trust()
    assert trust.length(1, 15) <= trust.length(3, 15) <= trust.length(8, 15) > 0
    for _ in range(80):
        trust.learn(3, False)
        trust.learn(4, True)
    assert trust.length(3, 15) == 0 and trust.length(4, 15) == 15
    assert trust.length(4, 6) == 6 and trust.length(4, 0) == trust.length(4, -1) == 0
    for _ in range(80):
        trust.learn(3, True)
    assert trust.length(3, 15) == 15
