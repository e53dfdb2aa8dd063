"""Generation: every backend generates the same tokens, texts end correctly, and streamed texts are complete."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime.backend import Decoder
from slm.runtime.generation import what_stays
from slm.runtime.sampling import GREEDY
from tests.runtime.texts import completed, started

# Tolerance of float32 logits of one position after reading its past in two different portions.
LOGITS_TOLERANCE = 1e-4


class Watched:
    """A decoder with only reset, read and length; it records the tokens read since the last reset."""

    def __init__(self, decoder: Decoder, fail_at: int | None = None) -> None:
        self.decoder = decoder
        self.fail_at = fail_at
        self.since_reset: list[int] = []
        self.reads: list[tuple[list[int], np.ndarray[Any, Any]]] = []

    @property
    def context(self) -> int:
        return self.decoder.context

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def length(self) -> int:
        return len(self.since_reset)

    def reset(self) -> None:
        self.decoder.reset()
        self.since_reset = []

    def read(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        if len(self.reads) == self.fail_at:
            raise KeyboardInterrupt
        logits = self.decoder.read(ids)
        self.since_reset += ids
        self.reads.append((list(self.since_reset), logits))
        return logits


def watched(bundle: Bundle, fail_at: int | None = None) -> Any:
    return Watched(slm.load(bundle.path).decoder, fail_at)


def test_greedy_tokens_are_the_same_on_both_backends(shared_bundle: Bundle, shared_checkpoint: Path) -> None:
    texts = []
    for path in (shared_bundle.path, shared_checkpoint):
        model = slm.load(path)
        result = completed(model.decoder, [5, 6, 7, 8], GREEDY, 60)
        texts.append(result.tokens)
        assert result.stopped == "length" and result.steps == 59
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5  # a text of two or three tokens would prove little


def test_logits_are_the_same_on_both_backends(shared_bundle: Bundle, shared_checkpoint: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 320, (2, 40))
    onnx, torch = slm.load(shared_bundle.path).logits(ids), slm.load(shared_checkpoint).logits(ids)
    assert onnx.shape == (2, 40, 320) and onnx.dtype == np.float32
    np.testing.assert_allclose(onnx, torch, atol=1e-4)


def test_same_seed_same_text(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    texts = [model.generate("The", max_new_tokens=30, seed=seed, temperature=1.5) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    free = completed(model.decoder, [5, 6], GREEDY, 20).tokens
    result = completed(model.decoder, [5, 6], GREEDY, 20, stop=[free[4]])
    assert result.tokens == free[: free.index(free[4])]
    assert result.stopped == "end"


def test_the_context_limit_ends_the_text(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    context = model.decoder.context
    result = completed(model.decoder, [5] * (context - 3), GREEDY, 99)
    assert len(result.tokens) == 4 and result.stopped == "context"


def test_a_prompt_that_fills_the_context_is_refused(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    with pytest.raises(SlmError, match="the prompt has 256 tokens"):
        started(model.decoder, [5] * model.decoder.context, GREEDY, 1)
    with pytest.raises(SlmError, match="no tokens"):
        started(model.decoder, [], GREEDY, 1)


def test_the_stream_is_the_text(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    sampling = {"temperature": 1.0, "seed": 3}
    stream = model.stream("Once", max_new_tokens=40, **sampling)
    streamed = "".join(stream)
    result = stream.result
    assert streamed == result.text == model.tokenizer.decode(result.tokens)
    assert result.prompt_tokens == len(model.tokenizer.encode("Once"))
    assert result.ttft_ms > 0 and (result.decode_tok_s or 0) > 0 and result.took_s >= result.ttft_ms / 1e3
    assert model.complete("Once", max_new_tokens=40, **sampling).tokens == result.tokens


def test_logits_of_something_else_are_refused(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    for ids, said in (
        ([1, 2], "shape"),
        ([[]], "shape"),
        ([[1] * 257], "257 tokens"),
        ([[320]], "0 to 319"),
        ([[-1]], "0 to"),
    ):
        with pytest.raises(ValueError, match=said):
            model.logits(ids)  # type: ignore[arg-type]


def test_the_loop_needs_the_protocol_alone(shared_bundle: Bundle) -> None:
    """A wrapping decoder needs only the methods of the protocol."""
    decoder = watched(shared_bundle)
    assert completed(decoder, [5, 6], GREEDY, 20).tokens == completed(decoder.decoder, [5, 6], GREEDY, 20).tokens


@pytest.mark.parametrize(
    ("read", "keep", "stays"),
    [
        ([0, 1, 2, 3, 4, 5], 0, [3, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 2, [0, 1, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 1, [0, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 4, [0, 1, 2, 3, 5]),
    ],
)
def test_what_stays_of_a_full_context(read: list[int], keep: int, stays: list[int]) -> None:
    assert what_stays(read, keep) == stays


@pytest.mark.parametrize("keep", [0, 3, 254])
def test_after_sliding_the_logits_are_those_of_what_stays(shared_bundle: Bundle, keep: int) -> None:
    decoder = watched(shared_bundle)
    context, count = decoder.context, 300
    prompt = np.random.default_rng(0).integers(4, 320, 200).tolist()
    result = completed(decoder, prompt, GREEDY, count, on_full="slide", keep=keep)
    made = result.tokens
    assert len(made) == count and result.stopped == "length" and result.steps == count - 1
    slides = [i for i in range(1, len(decoder.reads)) if len(decoder.reads[i][0]) <= len(decoder.reads[i - 1][0])]
    # Each slide keeps the later half, so that the dropped half, rounded, is filled again.
    assert result.slides == len(slides) == -(-(len(prompt) + count - 1 - context) // -(-(context - keep) // 2))
    full, after = decoder.reads[slides[0] - 1][0], decoder.reads[slides[0]][0]
    text = prompt + made
    assert full == text[:context]
    assert after == text[:keep] + text[context - (context - keep) // 2 : context + 1]
    fresh = slm.load(shared_bundle.path).decoder
    for i in (slides[0], min(slides[0] + 40, len(decoder.reads) - 1)):
        read, logits = decoder.reads[i]
        assert len(read) <= context
        np.testing.assert_allclose(logits, fresh.logits(np.array([read]))[0, -1], atol=LOGITS_TOLERANCE)


def test_before_it_slides_the_text_is_the_same(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    prompt = [5] * (model.decoder.context - 3)
    stopped = completed(model.decoder, prompt, GREEDY, 9).tokens
    result = completed(model.decoder, prompt, GREEDY, 9, on_full="slide")
    assert result.tokens[:4] == stopped and len(result.tokens) == 9 and result.slides == 1


def test_logprobs_are_those_of_the_raw_distribution(shared_bundle: Bundle) -> None:
    """Log-probabilities do not depend on sampling."""
    decoder = watched(shared_bundle)
    model = slm.load(shared_bundle.path)
    model.decoder, model.stop_token_ids = decoder, ()
    options = {"temperature": 1.7, "top_k": 5, "repetition_penalty": 1.5, "logit_bias": {9: 3.0}, "seed": 4}
    stream = model.pieces("Once", max_new_tokens=20, logprobs=3, **options)
    pieces = list(stream)
    assert [piece.token for piece in pieces if piece.token is not None] == stream.result.tokens
    assert [(each.chosen, each.top) for each in stream.result.logprobs] == [
        (piece.logprob, piece.top) for piece in pieces if piece.token is not None
    ]
    for piece, (_, logits) in zip(pieces, decoder.reads, strict=False):
        assert piece.token is not None
        expected = torch.from_numpy(logits).log_softmax(-1)
        assert piece.logprob == pytest.approx(expected[piece.token].item(), abs=1e-5)
        top = expected.topk(3)
        assert [i for i, _ in piece.top] == top.indices.tolist()
        assert [value for _, value in piece.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert any(piece.token != piece.top[0][0] for piece in pieces if piece.token is not None)
    with_none = list(model.pieces("Once", max_new_tokens=20, logprobs=0, **options))
    assert [piece.logprob for piece in with_none] == [piece.logprob for piece in pieces]
    assert not any(piece.top for piece in with_none)
    stream = model.pieces("Once", max_new_tokens=20, **options)
    silent = list(stream)
    assert [piece.text for piece in silent] == [piece.text for piece in pieces]
    assert all(piece.logprob is None for piece in silent) and not stream.result.logprobs


def test_a_stop_text_ends_the_text_and_is_not_part_of_it(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    model.stop_token_ids = ()
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3}
    free = model.generate("Once", **options)
    stop = free[len(free) // 2 :][:3]  # three characters: it will lie across tokens
    cut = model.complete("Once", stop=stop, **options)
    assert cut.text == free[: free.index(stop)] and cut.stopped == "stop"
    assert stop in model.tokenizer.decode(cut.tokens)
    assert "".join(model.stream("Once", stop=["never", stop], **options)) == free[: free.index(stop)]
    uncut = model.complete("Once", stop=["never"], **options)
    assert uncut.text == free and uncut.stopped == "length"


def test_ctrl_c_leaves_what_there_is(shared_bundle: Bundle) -> None:
    decoder = watched(shared_bundle)
    model = slm.load(shared_bundle.path)
    model.stop_token_ids = ()
    whole = model.complete("Once", max_new_tokens=30, temperature=0)
    decoder.fail_at = 6
    model.decoder = decoder
    shown = ""
    stream = model.stream("Once", max_new_tokens=30, temperature=0)
    with pytest.raises(KeyboardInterrupt):
        for text in stream:
            shown += text
    result = stream.result
    assert result.stopped == "interrupted"
    assert result.tokens == whole.tokens[:6] and result.steps == 5 and (result.decode_tok_s or 0) > 0
    assert shown == model.tokenizer.decode(result.tokens) and whole.text.startswith(shown.rstrip("�"))
    decoder.fail_at = len(decoder.reads)
    stream = model.stream("Once")
    with pytest.raises(KeyboardInterrupt):
        stream.finish()
    assert stream.result.tokens == [] and stream.result.prefill_tok_s == 0


def test_nobody_listening_is_an_interruption(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    stream = model.pieces("Once", max_new_tokens=9)
    next(stream)
    assert stream.result.stopped == "interrupted" and len(stream.result.tokens) == 1
    stream.close()
    assert list(stream) == [] and stream.result.stopped == "interrupted"


@pytest.mark.parametrize(
    ("prompt", "keep", "kept"), [("x" * 90, None, 1), ([8] * 90, None, 0), ("x" * 90, 5, 5), ("x" * 90, 0, 0)]
)
def test_sliding_keeps_what_begins_a_text(
    shared_bundle: Bundle, prompt: str | list[int], keep: int | None, kept: int
) -> None:
    """By default, sliding keeps the tokenizer's prefix if the prompt begins with it."""
    model = slm.load(shared_bundle.path)
    model.decoder = decoder = watched(shared_bundle)
    model.stop_token_ids = ()
    assert model.complete(prompt, max_new_tokens=200, temperature=0, on_full="slide", keep=keep).slides == 1
    reads = [read for read, _ in decoder.reads]
    full, after = next(pair for pair in pairwise(reads) if len(pair[1]) < len(pair[0]))
    stayed = (decoder.context - kept) // 2
    assert after[:-1] == full[:kept] + full[-stayed:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"logprobs": -1}, "logprobs is -1; it must be from 0 to 320"),
        ({"logprobs": 321}, "logprobs is 321"),
        ({"on_full": "wrap"}, "on_full is 'wrap'"),
        ({"keep": 255}, "keep is 255; it must be from 0 to 254"),
        ({"keep": -1}, "keep is -1"),
        ({"stop": ""}, "stop text is empty"),
        ({"stop": ["a", ""]}, "stop text is empty"),
        ({"logit_bias": {320: 1.0}}, "logit_bias has token id 320"),
        ({"min_p": 2}, "min_p is 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_values_that_will_not_do_are_refused_at_once(shared_bundle: Bundle, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SlmError, match=said):
        slm.load(shared_bundle.path).stream("Once", **options)
