"""Copies of a tokenizer, which share its vocabulary."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from slm.core.tokenizer_library import copied

LETTERS = {each: i for i, each in enumerate(["[UNK]", "a", "b", "ab", "▁"])}
MODELS = {
    "BPE": models.BPE(LETTERS, [("a", "b")], unk_token="[UNK]"),
    "Unigram": models.Unigram([(each, -1.0 - i) for each, i in LETTERS.items()], 0, False),
    "WordPiece": models.WordPiece(LETTERS, unk_token="[UNK]"),
    "WordLevel": models.WordLevel(LETTERS, unk_token="[UNK]"),
}
TEXT = "ab <s> abba <i>a  [UNK]b"


@pytest.fixture(params=MODELS)
def whole(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = Tokenizer(MODELS[request.param])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["[UNK]", "<s>"])  # one of the vocabulary, and a new one
    tokenizer.add_tokens([AddedToken("<i>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    return tokenizer


def test_a_copy_is_equal(whole: Tokenizer) -> None:
    copy = copied(whole)
    assert json.loads(copy.to_str()) == json.loads(whole.to_str())
    assert copy.encode(TEXT).ids == whole.encode(TEXT).ids
    assert copy.decode([1, 2, 6]) == whole.decode([1, 2, 6])


def test_changes_of_a_copy_stay_in_it(whole: Tokenizer) -> None:
    before, ids = whole.to_str(), whole.encode(TEXT).ids
    copy = copied(whole)
    copy.add_special_tokens([AddedToken("<i>", special=True), "<new>"])
    copy.encode_special_tokens = True
    assert copy.encode(TEXT).ids != ids
    assert whole.to_str() == before and whole.encode(TEXT).ids == ids


def test_a_copy_with_other_ids_is_made_through_json(whole: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "add_tokens", lambda self, tokens: 0)
    assert json.loads(copied(whole).to_str()) == json.loads(whole.to_str())
