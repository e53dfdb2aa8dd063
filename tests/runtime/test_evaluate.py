"""Loss, perplexity and bits per byte: equal to a plain reference, with every token and every byte counted once."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as bpe

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.nn.decoder import TorchDecoder
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.core.windows import fixed_starts
from slm.runtime import decoder as decoders_of_bundles
from slm.runtime.answers import end_of_text
from slm.runtime.evaluate import cut, evaluate_documents, evaluate_windows, score
from slm.runtime.model import Model
from slm.runtime.token_bytes import bytes_of_tokens

# Sums of float32 log-probabilities, computed in other shapes: 1e-6 apart on the texts below.
SAME = 1e-5
# A bundle's float32 operators against PyTorch's, as export proves them.
BACKENDS = 1e-4

TEXTS = ["Once upon a time, a fox — naïve 🦊 — ran.\n\nIt rained. ", "é", "  two  spaces\t", "The end. " * 40]


@pytest.fixture(scope="session")
def checkpoint(shared_checkpoint: Path) -> Model:
    return slm.load(shared_checkpoint)


@pytest.fixture(scope="session")
def bundle(shared_bundle: Bundle) -> Model:
    return slm.load(shared_bundle.path)


def plain(model: Model, ids: Sequence[int]) -> list[float]:
    """Returns -log softmax of each token after the first, from the full logits in float64."""
    logits = model.logits([list(ids)])[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-float(logits[i, token]) for i, token in enumerate(ids[1:])]


def reference(model: Model, text: str, context: int, stride: int) -> list[float]:
    """Returns the nats of each token of a document and of its end, each from the first row that contains the token."""
    ids = [*model.tokenizer.encode_literal(text), 0]
    nats = plain(model, [0, *ids[:context]])
    while len(nats) < len(ids):
        reached = min(len(nats) + stride, len(ids))
        nats += plain(model, [0, *ids[reached - context : reached]])[len(nats) - reached :]
    return nats


@pytest.mark.parametrize(("context", "stride"), [(256, 128), (48, 48), (48, 20), (48, 1), (24, 7)])
def test_documents_equal_a_plain_reference(checkpoint: Model, context: int, stride: int) -> None:
    measured = evaluate_documents(checkpoint, TEXTS, Silent(), context=context, stride=stride)
    nats = [reference(checkpoint, text, context, stride) for text in TEXTS]
    tokens = [len(checkpoint.tokenizer.encode_literal(text)) + 1 for text in TEXTS]
    assert max(tokens) > 200  # several times the shorter contexts
    assert measured.tokens == sum(tokens) == sum(map(len, nats))
    assert measured.nats == pytest.approx(sum(map(sum, nats)), rel=SAME)
    assert measured.loss == pytest.approx(measured.nats / measured.tokens)
    assert measured.perplexity == pytest.approx(math.exp(measured.loss))
    assert measured.bytes == sum(len(text.encode()) for text in TEXTS)
    assert measured.bits_per_byte == pytest.approx(measured.nats / math.log(2) / measured.bytes)
    assert measured.documents == len(TEXTS) == measured.end_of_text_tokens and measured.end_of_text == 0
    assert measured.end_of_text_nats == pytest.approx(sum(each[-1] for each in nats), rel=SAME)


def test_context_and_stride_change_the_loss(checkpoint: Model) -> None:
    losses = {
        evaluate_documents(checkpoint, TEXTS, Silent(), context=context, stride=stride).loss
        for context, stride in ((256, 128), (48, 48), (48, 20))
    }
    assert len(losses) == 3


def test_an_altered_weight_changes_the_loss(config: Any, make_model: Callable[..., CausalLM], tokenizer: Any) -> None:
    """Negative control of every comparison here: changing one weight in one layer changes the loss."""
    torch_model = make_model(config)
    model = Model(tokenizer, TorchDecoder(torch_model), config.stop_token_ids)
    before = evaluate_documents(model, TEXTS, Silent()).loss
    torch_model.model.layers[1].mlp.up_proj.weight.data[3] += 0.5
    assert abs(evaluate_documents(model, TEXTS, Silent()).loss / before - 1) > 10 * BACKENDS


@pytest.mark.parametrize("options", [{}, {"context": 40, "stride": 9}])
def test_a_checkpoint_and_its_bundle_agree(checkpoint: Model, bundle: Model, options: dict[str, int]) -> None:
    ours, theirs = (evaluate_documents(model, TEXTS, Silent(), **options) for model in (checkpoint, bundle))
    assert theirs.nats == pytest.approx(ours.nats, rel=BACKENDS)
    assert (theirs.tokens, theirs.bytes, theirs.documents) == (ours.tokens, ours.bytes, ours.documents)
    ours, theirs = (evaluate_windows(model, TEXTS, Silent(), context=32) for model in (checkpoint, bundle))
    assert theirs.nats == pytest.approx(ours.nats, rel=BACKENDS)
    assert (theirs.tokens, theirs.bytes) == (ours.tokens, ours.bytes)


@pytest.mark.parametrize("positions", [1, 5, 40, 10_000])
def test_logits_in_pieces_are_the_same(
    bundle: Model, checkpoint: Model, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    """Limits on the memory of logits: chunks that end within, at and past the window, and single rows."""
    rows = [np.random.default_rng(i).integers(4, 320, length) for i, length in enumerate((3, 41, 90, 2, 17, 90))]
    wanted = [plain(checkpoint, row.tolist()) for row in rows]
    monkeypatch.setattr(decoders_of_bundles, "LOGITS_BYTES", positions * 4 * 320)
    monkeypatch.setattr("slm.core.nn.decoder._LOGITS_BYTES", positions * 4 * 320)
    monkeypatch.setattr("slm.core.nn.decoder._SCORE_CHUNK", max(positions, 7))
    for model in (bundle, checkpoint):
        for (likely, likeliest), nats, row in zip(score(model.decoder, rows), wanted, rows, strict=True):
            assert likely.dtype == np.float32 and likely.shape == likeliest.shape == (len(row) - 1,)
            np.testing.assert_allclose(-likely, nats, atol=BACKENDS)
            best = model.logits([row])[0, :-1].argmax(-1)
            assert (likeliest == (best == row[1:])).all()


def test_scoring_leaves_a_text_that_is_being_read_alone(bundle: Model, checkpoint: Model) -> None:
    for model in (bundle, checkpoint):
        model.decoder.reset()
        model.decoder.read([5, 6, 7])
        score(model.decoder, [np.arange(4, 60)])
        kept = model.decoder.read([8])
        np.testing.assert_allclose(kept, model.logits([[5, 6, 7, 8]])[0, -1], atol=BACKENDS)
        assert model.decoder.length == 4


@pytest.mark.parametrize("prefix", [[], [0], [0, 1]])
@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 12, 40])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_every_token_is_predicted_once_with_enough_before_it(prefix: list[int], length: int, stride: int) -> None:
    context = 10
    ids = np.arange(100, 100 + length)
    predicted: list[int] = []
    for row, new in cut(prefix, ids, context, stride):
        assert len(row) <= context + 1 and row[: len(prefix)].tolist() == prefix
        body = row[len(prefix) :]
        assert (np.diff(body) == 1).all()
        if predicted:
            assert len(row) - new >= context + 1 - stride  # tokens before the first new one
        predicted += body[len(body) - new :].tolist()
    assert predicted == ids[0 if prefix else 1 :].tolist()


@pytest.mark.parametrize("tokens", [1, 2, 3, 30, 77, 150, 10_000])
def test_bytes_of_a_part_are_those_of_its_tokens(checkpoint: Model, tokens: int) -> None:
    """Includes parts that end within a character: é, — and 🦊 are several tokens of this vocabulary."""
    tokenizer = checkpoint.tokenizer
    measured = evaluate_documents(checkpoint, TEXTS, Silent(), tokens=tokens)
    left, size = tokens, 0
    for text in TEXTS:
        ids = tokenizer.encode_literal(text)[:left]
        spelt = tokenizer.backend.decoder.decode
        # An independent reference of a token's bytes: each letter is mapped back to its byte.
        alphabet = {letter: spelt([letter]) for letter in pre_tokenizers.ByteLevel.alphabet()}
        size += sum(sum(letter in alphabet for letter in tokenizer.backend.id_to_token(i)) for i in ids)
        left = max(0, left - len(ids) - 1)
    assert measured.tokens == min(tokens, sum(len(tokenizer.encode_literal(text)) + 1 for text in TEXTS))
    assert measured.bytes == size
    if tokens == 10_000:
        assert size == len("".join(TEXTS).encode())


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    sizes = bytes_of_tokens(tokenizer)
    assert sizes is not None and sizes[:4].tolist() == [0, 0, 0, 0]  # special tokens
    for text in (*TEXTS, "\x00\x7f", "日本語", "e\u0301"):
        assert sizes[tokenizer.encode_literal(text)].sum() == len(text.encode())
    fox = tokenizer.encode_literal("🦊")
    assert len(fox) > 1 and sizes[fox].sum() == 4


def altered(tokenizer: Tokenizer, change: Callable[[Backend], None]) -> Tokenizer:
    backend = Backend.from_str(tokenizer.backend.to_str())
    change(backend)
    return Tokenizer(backend, {})


def respelt(tokenizer: Tokenizer, change: Callable[[Any], None]) -> Tokenizer:
    said = json.loads(tokenizer.backend.to_str())
    change(said)
    return Tokenizer(Backend.from_str(json.dumps(said)), {})


def _end_is_not_special(said: Any) -> None:
    (end,) = (added for added in said["added_tokens"] if added["content"] == "<|endoftext|>")
    end["special"] = False


def test_an_end_that_is_no_special_token_has_no_bytes(tokenizer: Tokenizer, checkpoint: Model) -> None:
    """The 13 letters of its spelling are not part of the text."""
    other = respelt(tokenizer, _end_is_not_special)
    sizes = bytes_of_tokens(other)
    assert sizes is not None and sizes[0] == 13
    model = Model(other, checkpoint.decoder, (0,))
    options: dict[str, int]
    for options in ({}, {"context": 48, "stride": 20}, {"tokens": 3}, {"tokens": 50}):
        ours, wanted = (evaluate_documents(each, TEXTS, Silent(), **options) for each in (model, checkpoint))
        assert (ours.bytes, ours.nats) == (wanted.bytes, wanted.nats)
    ours, wanted = (evaluate_windows(each, TEXTS, Silent(), context=32) for each in (model, checkpoint))
    assert (ours.bytes, ours.nats) == (wanted.bytes, wanted.nats)
    text = "a <|endoftext|> b"
    assert 0 not in other.encode_literal(text)  # written in a text it is characters all the same
    assert evaluate_documents(model, [text], Silent()).bytes == len(text)
    ours, wanted = (evaluate_windows(each, [text], Silent(), context=4) for each in (model, checkpoint))
    assert ours.bytes == wanted.bytes is not None


def _last_is_not_there(said: Any) -> None:
    """A model without a known end-of-text token."""
    vocabulary, end = said["model"]["vocab"], said["added_tokens"][0]
    del vocabulary[max(vocabulary, key=vocabulary.__getitem__)]
    del said["model"]["merges"][-1]
    end["content"] = "<|nothing|>"
    vocabulary[end["content"]] = vocabulary.pop("<|endoftext|>")
    said["post_processor"] = None


def test_an_end_that_the_tokenizer_does_not_have_has_no_bytes(tokenizer: Tokenizer, checkpoint: Model) -> None:
    other = respelt(tokenizer, _last_is_not_there)
    sizes = bytes_of_tokens(other)
    assert sizes is not None and len(sizes) == 319
    model = Model(other, checkpoint.decoder, (319,))
    measured = evaluate_documents(model, ["ab", "c"], Silent())
    assert (measured.end_of_text, measured.end_of_text_tokens, measured.tokens) == (319, 2, 3)
    assert measured.bytes == 1  # the first of each has nothing before it
    assert evaluate_windows(model, ["ab", "c"], Silent(), context=4).bytes == 2


def _composed(backend: Backend) -> None:
    backend.normalizer = normalizers.NFC()


def _space_first(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [_composed, _space_first])
def test_a_tokenizer_that_changes_text_has_no_bytes_for_its_tokens(
    tokenizer: Tokenizer, checkpoint: Model, change: Callable[[Backend], None]
) -> None:
    other = altered(tokenizer, change)
    assert bytes_of_tokens(other) is None
    model = Model(other, checkpoint.decoder, checkpoint.stop_token_ids)
    text = "cafe\u0301 " * 4
    measured = evaluate_documents(model, [text, text], Silent(), tokens=3)
    # The first document is finished, so that its bytes are those of the text.
    assert measured.documents == 1 and measured.tokens == len(other.encode_literal(text)) + 1
    assert measured.bytes == len(text.encode())
    windows = evaluate_windows(model, [text, text], Silent(), context=8)
    assert windows.bytes is None and windows.bits_per_byte is None and windows.loss > 0


@pytest.fixture
def sentencepiece(stories: list[str]) -> Tokenizer:
    """Like Gemma's vocabulary: "▁" for a space, single bytes for unknown characters, <bos> before a text."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = bpe.BpeTrainer(
        vocab_size=318, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    backend.train_from_iterator(stories, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return Tokenizer(backend, {})


def test_sentencepiece_counts_whole_documents(sentencepiece: Tokenizer, checkpoint: Model) -> None:
    model = Model(sentencepiece, checkpoint.decoder, (1, 106))
    assert bytes_of_tokens(sentencepiece) is None and end_of_text(model.tokenizer, model.stop_token_ids) == 1
    text = "a ▁ naïve 🦊 here"  # "▁" is one token and three bytes, here, and one elsewhere
    ids = sentencepiece.encode_literal(text)
    measured = evaluate_documents(model, [text], Silent(), context=12, stride=4, tokens=1)
    assert measured.tokens == len(ids) + 1 > 12 and measured.bytes == len(text.encode())
    assert measured.end_of_text_tokens == 1
    short = evaluate_documents(model, [text], Silent(), context=100)
    assert short.nats == pytest.approx(sum(plain(model, [2, *ids, 1])), rel=SAME)


def _nothing_first(backend: Backend) -> None:
    backend.post_processor = processors.ByteLevel(trim_offsets=False)


def test_a_first_token_that_nothing_comes_before_is_not_predicted(tokenizer: Tokenizer, checkpoint: Model) -> None:
    model = Model(altered(tokenizer, _nothing_first), checkpoint.decoder, checkpoint.stop_token_ids)
    assert model.tokenizer.encode("") == []
    ids = model.tokenizer.encode_literal("🦊 ran")
    measured = evaluate_documents(model, ["🦊 ran"], Silent())
    assert measured.tokens == len(ids) and measured.nats == pytest.approx(sum(plain(model, [*ids, 0])), rel=SAME)
    sizes = bytes_of_tokens(model.tokenizer)
    assert sizes is not None and measured.bytes == len("🦊 ran".encode()) - sizes[ids[0]]


def test_empty_and_shortest_documents(checkpoint: Model) -> None:
    with pytest.raises(SlmError, match="no text to predict"):
        evaluate_documents(checkpoint, [], Silent())
    with pytest.raises(SlmError, match="no text to predict"):
        evaluate_documents(checkpoint, ["", ""], Silent())
    (one,) = checkpoint.tokenizer.encode_literal("a")
    measured = evaluate_documents(checkpoint, ["", "a", ""], Silent())
    assert (measured.documents, measured.tokens, measured.bytes) == (1, 2, 1)
    assert measured.nats == pytest.approx(sum(plain(checkpoint, [0, one, 0])), rel=SAME)
    with pytest.raises(SlmError, match="2 tokens of text are too few for a window of 16"):
        evaluate_windows(checkpoint, ["a"], Silent(), context=16)


def test_special_tokens_in_a_text_are_characters(checkpoint: Model) -> None:
    measured = evaluate_documents(checkpoint, ["a<|endoftext|>b"], Silent())
    assert measured.end_of_text_tokens == 1 and measured.bytes == 15


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 257}, "takes 256 tokens, not 257"),
        ({"context": 1}, "takes 256 tokens, not 1"),
        ({"context": 32, "stride": 33}, "a stride of 33 does not fit a context of 32"),
        ({"stride": 0}, "a stride of 0"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint: Model, options: dict[str, int], said: str) -> None:
    with pytest.raises(SlmError, match=said):
        evaluate_documents(checkpoint, TEXTS, Silent(), **options)


def test_tokens_without_rows_are_refused(
    config: Any, make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> None:
    small = make_model(config.model_copy(update={"vocab_size": 300}))
    model = Model(tokenizer, TorchDecoder(small), (0,))
    with pytest.raises(SlmError, match=r"id 3\d\d, and the model's vocabulary has 300"):
        evaluate_documents(model, TEXTS, Silent())


def test_windows_equal_trainings_evaluation(
    config: Any, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, stories: list[str]
) -> None:
    """The same windows of the same stream have the same mean cross-entropy as in training."""
    import torch
    import torch.nn.functional as F

    documents = [story.strip() for story in stories[:20]]
    stream = np.array([i for text in documents for i in [*tokenizer.encode_literal(text), 0]], np.uint16)
    torch_model = make_model(config)
    model = Model(tokenizer, TorchDecoder(torch_model), (0,))
    for context, count in ((24, 8), (100, 1_000)):
        starts = fixed_starts(len(stream), count, context)
        rows = torch.tensor(np.stack([stream[start : start + context + 1] for start in starts]).astype(np.int64))
        inputs, targets = rows[:, :-1], rows[:, 1:]
        with torch.inference_mode():
            wanted = F.cross_entropy(torch_model(inputs).flatten(0, 1), targets.flatten()).item()
        measured = evaluate_windows(model, documents, Silent(), context=context, windows=count)
        assert measured.loss == pytest.approx(wanted, rel=SAME)
        assert measured.windows == len(starts) and measured.tokens == targets.numel()
        assert measured.end_of_text_tokens == int((targets == 0).sum())
        text = [tokenizer.backend.id_to_token(int(i)) for i in targets.flatten() if i != 0]
        assert measured.bytes == len("".join(text))  # a letter for each byte
        other = evaluate_windows(model, documents, Silent(), context=context - 1, windows=count)
        assert other.loss != pytest.approx(wanted, rel=SAME)


def test_a_saved_model_measures_the_same(
    config: Any, make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> None:
    torch_model = make_model(config, seed=5)
    save_checkpoint(Path("c"), torch_model, tokenizer, {})
    live = evaluate_documents(Model(tokenizer, TorchDecoder(torch_model), (0,)), TEXTS, Silent())
    assert evaluate_documents(slm.load("c"), TEXTS, Silent()).nats == live.nats


@pytest.mark.parametrize("further", [4, 12])
def test_rows_that_predict_too_much_or_too_little_are_noticed(
    checkpoint: Model, monkeypatch: pytest.MonkeyPatch, further: int
) -> None:
    """Negative control of the counts: rows that advance by 8 tokens and count another number of tokens."""

    def wrong(prefix: Sequence[int], ids: Any, context: int, stride: int) -> Any:
        for number, (row, new) in enumerate(cut(prefix, ids, context, stride)):
            yield row, further if number and new == stride else new

    right = evaluate_documents(checkpoint, TEXTS, Silent(), context=32, stride=8)
    monkeypatch.setattr("slm.runtime.evaluate.cut", wrong)
    measured = evaluate_documents(checkpoint, TEXTS, Silent(), context=32, stride=8)
    assert (measured.tokens > right.tokens) == (measured.bytes > right.bytes) == (further > 8)  # type: ignore[operator]
    assert measured.tokens != right.tokens and measured.bytes != sum(len(text.encode()) for text in TEXTS)
