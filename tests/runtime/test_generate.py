"""Generation: the same tokens from every backend, the right end, streamed text whole."""

from pathlib import Path

import numpy as np
import pytest

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime.generate import generate
from slm.runtime.sampling import GREEDY


def test_greedy_tokens_are_the_same_on_both_backends(shared_bundle: Bundle, shared_checkpoint: Path) -> None:
    texts = []
    for path in (shared_bundle.path, shared_checkpoint):
        model = slm.load(path)
        run, tokens = generate(model.decoder, [5, 6, 7, 8], GREEDY, 60, stop=())
        texts.append(list(tokens))
        assert run.stopped == "length" and run.steps == 59
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
    free = list(generate(model.decoder, [5, 6], GREEDY, 20, stop=())[1])
    run, tokens = generate(model.decoder, [5, 6], GREEDY, 20, stop=[free[4]])
    assert list(tokens) == free[: free.index(free[4])]
    assert run.stopped == "end"


def test_the_context_limit_ends_the_text(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    context = model.decoder.context
    run, tokens = generate(model.decoder, [5] * (context - 3), GREEDY, 99, stop=())
    assert len(list(tokens)) == 4 and run.stopped == "context"


def test_a_prompt_that_fills_the_context_is_refused(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    with pytest.raises(SlmError, match="the prompt has 256 tokens"):
        generate(model.decoder, [5] * model.decoder.context, GREEDY, 1, stop=())
    with pytest.raises(SlmError, match="no tokens"):
        generate(model.decoder, [], GREEDY, 1, stop=())


def test_streamed_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    text = "naïve café — 東京 🦊 end"
    ids = tokenizer.encode_literal(text)
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert len(pieces) < len(ids)  # bytes of one character came as several tokens
    assert not any("�" in piece for piece in pieces)


def test_a_character_cut_off_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_literal("a🦊")[:-1]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids) == "a�"


def test_the_stream_is_the_text(shared_bundle: Bundle) -> None:
    model = slm.load(shared_bundle.path)
    sampling = {"temperature": 1.0, "seed": 3}
    streamed = "".join(model.stream("Once", max_new_tokens=40, **sampling))
    assert model.last_run is not None
    assert streamed == model.tokenizer.decode(model.last_run.tokens)
    assert model.last_run.prompt_tokens == len(model.tokenizer.encode("Once"))
    assert model.last_run.ttft_ms > 0 and (model.last_run.decode_tok_s or 0) > 0


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
