"""Trimmed vocabularies: covered text is split as before, ids agree everywhere, and the models compute the same."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from slm.core.chat import chat_ids
from slm.core.checkpoint import read_config, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import EMBEDDING, HEAD, Weights
from slm.export.trimmed import compare_trimmed
from slm.interchange.trim import checkpoint as trim_module
from slm.interchange.trim.checkpoint import Trimmed, ranges, trim_checkpoint
from slm.interchange.trim.choice import Wanted, choose, required_tokens
from slm.interchange.trim.needs import Needs
from slm.interchange.trim.texts import Texts
from slm.interchange.trim.tokenizer import trim_tokenizer, trimmed_generation

# Characters that the tokenizer `gemma_like` has and the stories do not.
FOREIGN = "Übergröße 東京 🦊 naïve"


def word_model(model: str, texts: Sequence[str]) -> Tokenizer:
    """A tokenizer of another kind of model."""
    if model == "Unigram":
        made = Backend(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
        )
    elif model == "WordPiece":
        made = Backend(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False)
    elif model == "WordLevel":
        made = Backend(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False)
    else:
        made = Backend(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(made, {"bos_token": "<s>", "unk_token": "<unk>"})


def with_kept(tokenizer: Tokenizer, used: set[int], size: int) -> tuple[Tokenizer, np.ndarray[Any, Any]]:
    """The tokenizer with these tokens, all that they need, and others up to the size."""
    document = json.loads(tokenizer.backend.to_str())
    needs = Needs(document["model"])
    total = tokenizer.vocab_size
    counts = np.zeros(total, np.int64)
    counts[list(used)] = 1
    required = required_tokens(tokenizer, document, needs, (), total)
    kept = choose(needs, counts, required, Wanted(keep=size), total).ids
    return trim_tokenizer(tokenizer, document, kept), kept


def texts(*documents: str) -> Texts:
    return Texts(lambda: iter(documents), "test", len(documents))


@pytest.fixture
def small(config: ModelConfig, make_model: Callable[..., CausalLM], gemma_like: Tokenizer) -> Callable[..., Path]:
    """Saves a checkpoint with the Gemma-like tokenizer."""

    def make(**changes: Any) -> Path:
        shape = {"vocab_size": gemma_like.vocab_size, "bos_token_id": 2, "eos_token_id": (1, 5), "pad_token_id": 0}
        save_checkpoint(Path("c"), make_model(config.model_copy(update=shape | changes)), gemma_like, {})
        return Path("c")

    return make


def trimmed(source: Path, stories: Sequence[str], wanted: Wanted | None = None, **options: Any) -> Trimmed:
    data, held_out = texts(*stories[:20]), texts(*stories[20:30])
    return trim_checkpoint(source, Path("t"), data, held_out, wanted or Wanted(keep=1408), **options)


def proved(source: Path, directory: Path, tokenizers: Any, kept: Any, sample: list[str]) -> dict[str, Any]:
    return vars(compare_trimmed(source, directory, tokenizers, kept, sample, Silent()))


def test_covered_text_keeps_its_pieces_and_other_text_its_characters(
    small: Callable[..., Path], gemma_like: Tokenizer, stories: list[str]
) -> None:
    done = trimmed(small(), stories)
    after, kept = Tokenizer.load(Path("t")), done.choice.ids
    assert after.vocab_size == len(kept) == 1408 < gemma_like.vocab_size
    stays = set(kept.tolist())
    covered = 0
    for story in stories[:60]:
        before = gemma_like.encode(story)
        now = after.encode(story)
        assert after.decode(now) == gemma_like.decode(before)
        if stays.issuperset(before):
            covered += 1
            assert kept[now].tolist() == before
    assert covered >= 20
    assert after.decode(after.encode(FOREIGN)) == FOREIGN and done.data_compared.changed == 0
    # Characters that left the vocabulary are spelled in bytes.
    assert "東" in gemma_like.backend.get_vocab() and "<0xE6>" in after.backend.encode("東").tokens


def test_a_token_without_the_tokens_that_it_is_made_of_is_noticed(
    small: Callable[..., Path], stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of every comparison of pieces."""
    source = small()
    monkeypatch.setattr(Needs, "of", lambda self, token: frozenset((token,)))
    with pytest.raises(SlmError, match="splits a text differently although all of its tokens stay"):
        trimmed(source, stories)
    assert not Path("t").exists()


def test_ids_agree_everywhere(
    config: ModelConfig, make_model: Callable[..., CausalLM], gemma_like: Tokenizer, stories: list[str]
) -> None:
    # The first six tokens, which are special, come last here, so that every one of them gets another id.
    document = json.loads(gemma_like.backend.to_str())
    size = gemma_like.vocab_size
    order = {i: (i - 6) % size for i in range(size)}
    document["model"]["vocab"] = {token: order[i] for token, i in document["model"]["vocab"].items()}
    for token in document["added_tokens"]:
        token["id"] = order[token["id"]]
    document["added_tokens"].sort(key=lambda token: token["id"])
    for token in document["post_processor"]["special_tokens"].values():
        token["ids"] = [order[i] for i in token["ids"]]
    added = {str(t["id"]): {name: v for name, v in t.items() if name != "id"} for t in document["added_tokens"]}
    settings = gemma_like.config | {
        "added_tokens_decoder": added,
        "extra_special_tokens": {"image_token": "<image>", "turn": "<end_of_turn>"},
        "image_token": "<image>",
        "image_token_id": size + 5,
    }
    tokenizer = Tokenizer(Backend.from_str(json.dumps(document)), settings)
    ids = {name: tokenizer.token_id(f"<{name}>") for name in ("bos", "eos", "pad", "end_of_turn")}
    shape = {
        "vocab_size": size,
        "bos_token_id": ids["bos"],
        "eos_token_id": (ids["eos"], ids["end_of_turn"]),
        "pad_token_id": ids["pad"],
    }
    save_checkpoint(Path("c"), make_model(config.model_copy(update=shape)), tokenizer, {})
    file = Path("c/generation_config.json")
    more = {"suppress_tokens": [ids["pad"], tokenizer.token_id("<unused3>")], "temperature": 0.7}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))

    done = trimmed(Path("c"), stories, prove=proved)
    after = Tokenizer.load(Path("t"))
    named = {name: after.token_id(f"<{name}>") for name in ids}
    assert None not in named.values() and named != ids
    config = read_config(Path("t"))
    assert (config.bos_token_id, config.pad_token_id) == (named["bos"], named["pad"])
    assert config.eos_token_id == (named["eos"], named["end_of_turn"])
    assert after.prefix_ids == (named["bos"],) and after.encode("")[0] == named["bos"]
    generation = json.loads(Path("t/generation_config.json").read_text())
    assert generation["suppress_tokens"] == [named["pad"]] and generation["temperature"] == 0.7
    assert generation["eos_token_id"] == [named["eos"], named["end_of_turn"]]
    decoder = after.config["added_tokens_decoder"]
    assert all(after.token_id(token["content"]) == int(i) for i, token in decoder.items())
    assert not {"image_token", "image_token_id"} & after.config.keys()
    assert after.config["extra_special_tokens"] == {"turn": "<end_of_turn>"}
    # Reserved tokens leave; the others and the turns of a conversation stay, with the same pieces.
    assert after.token_id("<unused3>") is None and after.token_id("\n\n") is not None
    messages: Any = [{"role": "user", "content": "Once upon a time"}]
    assert done.choice.ids[chat_ids(after, messages)].tolist() == chat_ids(tokenizer, messages)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_compute_the_same(small: Callable[..., Path], stories: list[str], tied: bool) -> None:
    source = small(tie_word_embeddings=tied)
    done = trimmed(source, stories, prove=proved)
    assert done.proof["positions"] == 16 + 64 and 0 <= done.proof["limit_share"] <= 1
    before, after = done.proof["bits_per_byte"]
    assert 0 < after < before * 1.2
    ours, theirs, kept = Weights(Path("t")), Weights(source), done.choice.ids
    for name in (EMBEDDING, *([] if tied else [HEAD])):
        np.testing.assert_array_equal(ours.read(name), theirs.read(name)[kept])
    info = read_info(Path("t"))["trimmed"]
    assert info["proof"]["bits_per_byte"] == [before, after] and info["kept_ids"] == ranges(kept)
    assert info["vocab_size"] == [theirs.shapes[EMBEDDING][0], 1408]


def test_a_row_of_another_token_is_noticed(small: Callable[..., Path], stories: list[str]) -> None:
    """The control of the comparison of models: two tokens that the text does not have are swapped."""
    source = small()
    done = trimmed(source, stories)
    wrong = done.choice.ids.copy()
    byte = np.flatnonzero(wrong == Tokenizer.load(source).token_id("<0xF4>"))[0]
    wrong[[byte, byte + 1]] = wrong[[byte + 1, byte]]
    both = Tokenizer.load(source), Tokenizer.load(Path("t"))
    proved(source, Path("t"), both, done.choice.ids, list(stories[:2]))
    with pytest.raises(SlmError, match=r"logits of kept tokens differ .* times the limit"):
        proved(source, Path("t"), both, wrong, list(stories[:2]))


def test_a_tensor_that_is_not_written_as_it_was_read_is_noticed(
    small: Callable[..., Path], stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, fill = small(), trim_module.fill_checkpoint

    def damaged(directory: Path, config: Any, tensors: dict[str, Any], *rest: Any) -> None:
        fill(directory, config, tensors | {EMBEDDING: tensors[EMBEDDING] * np.float32(1.0000002)}, *rest)

    monkeypatch.setattr(trim_module, "fill_checkpoint", damaged)
    with pytest.raises(SlmError, match=r"embed_tokens\.weight was not written as it was read"):
        trimmed(source, stories)
    assert not Path("t").exists()


def test_our_own_byte_level_tokenizer(shared_checkpoint: Path, tokenizer: Tokenizer) -> None:
    story = "Once upon a time"
    done = trim_checkpoint(shared_checkpoint, Path("t"), texts(story), texts(story + FOREIGN), Wanted(coverage=1.0))
    after = Tokenizer.load(Path("t"))
    assert done.choice.ids[after.encode(story)].tolist() == tokenizer.encode(story)
    assert done.data_compared.covered == 1 and after.vocab_size < tokenizer.vocab_size
    assert after.decode(after.encode(FOREIGN)) == FOREIGN  # all 256 bytes stay
    assert read_config(Path("t")).eos_token_id == (0, 2)


@pytest.mark.parametrize("model", ["Unigram", "WordPiece", "WordLevel", "BPE"])
def test_other_kinds_of_models(model: str, stories: list[str]) -> None:
    tokenizer = word_model(model, stories[:100])
    rng = random.Random(model)
    for _ in range(20):
        sample = rng.sample(stories[:100], 3)
        used = {i for story in sample for i in tokenizer.encode(story)}
        after, kept = with_kept(tokenizer, used, min(tokenizer.vocab_size - 1, 340))
        stays = set(kept.tolist())
        for story in rng.sample(stories, 10) + sample:
            before, now = tokenizer.encode(story), after.encode(story)
            if stays.issuperset(before) and tokenizer.token_id("<unk>") not in before:
                assert kept[now].tolist() == before
        for story in sample:
            assert kept[after.encode(story)].tolist() == tokenizer.encode(story)


def test_the_worst_score_of_a_unigram_stays() -> None:
    """Unknown characters score 10 below it: with a better worst score, "d" would win over the characters of a token."""
    vocabulary = [("<unk>", 0.0), ("ab", -1.0), ("d", -40.0), ("dd", -30.0), ("c", -2.0)]
    needs = Needs({"type": "Unigram", "vocab": [list(each) for each in vocabulary], "unk_id": 0})
    assert {0, 2, 4} <= needs.basic and 1 not in needs.basic


@pytest.mark.examples(few=20, many=2_000)
def test_drawn_merges(examples: int) -> None:
    """Random merges over few characters: ambiguous, with several ways to make a token."""
    for seed in range(examples):
        rng = random.Random(seed)
        vocabulary = {character: i for i, character in enumerate("abc")}
        merges: list[tuple[str, str]] = []
        for _ in range(rng.randint(3, 25)):
            left, right = rng.choice([*vocabulary]), rng.choice([*vocabulary])
            if (left, right) not in merges and len(left + right) < 9:
                merges.append((left, right))
                vocabulary.setdefault(left + right, len(vocabulary))
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rng.random() < 0.3))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = Tokenizer(backend, {})
        document = json.loads(backend.to_str())
        needs = Needs(document["model"])
        lines = [" ".join("".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(4)) for _ in range(12)]
        used = {i for line in lines[:4] for i in tokenizer.encode(line)}
        kept = sorted(needs.basic.union(*(needs.of(i) for i in used)))
        after = trim_tokenizer(tokenizer, document, np.array(kept))
        for line in lines:
            before = tokenizer.encode(line)
            paths = needs.basic.union(*(needs.of(i) for i in before))
            if paths.issubset(kept):
                assert [kept[i] for i in after.encode(line)] == before, (seed, line)


def test_what_cannot_be_exact_is_refused(shared_checkpoint: Path, tokenizer: Tokenizer) -> None:
    document = json.loads(tokenizer.backend.to_str())
    document["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(SlmError, match="a BPE with end_of_word_suffix is not supported"):
        Needs(document["model"])


def test_sizes(small: Callable[..., Path], gemma_like: Tokenizer, stories: list[str]) -> None:
    source = small()
    with pytest.raises(SlmError, match=r"100 tokens are too few: \d+ always stay") as few:
        trimmed(source, stories, Wanted(keep=100))
    least = int(str(few.value.hint).split()[1])
    assert trimmed(source, stories, Wanted(keep=least)).vocab_size[1] == least
    with pytest.raises(SlmError, match="there is nothing to trim"):
        trimmed(source, stories, Wanted(keep=gemma_like.vocab_size))
    assert trimmed(source, stories, Wanted(keep=601)).vocab_size[1] == 640
    half, most = (trimmed(source, stories, Wanted(coverage=share)) for share in (0.9, 1.0))
    assert half.vocab_size[1] < most.vocab_size[1] and half.data_compared.covered >= 0.9
    assert most.data_compared.covered == 1 and most.data_compared.changed == 0 < half.data_compared.changed
    assert half.data_compared.tokens > half.data.tokens == most.data_compared.tokens
    kept = trimmed(source, stories, Wanted(keep=640, also=("<unused5>",))).choice.ids
    assert gemma_like.token_id("<unused5>") in kept and gemma_like.token_id("<unused4>") not in kept
    with pytest.raises(SlmError, match="no token '<unused99>'"):
        trimmed(source, stories, Wanted(keep=640, also=("<unused99>",)))


def test_a_text_that_changes_meanwhile_is_noticed(small: Callable[..., Path], stories: list[str]) -> None:
    readings = iter([stories[:5], stories[1:6]])

    def read() -> Iterator[str]:
        return iter(next(readings))

    with pytest.raises(SlmError, match="the text changed while it was read"):
        trim_checkpoint(small(), Path("t"), Texts(read, "test"), texts(stories[9]), Wanted(keep=640))


def test_fields_of_generation() -> None:
    fields = {
        "eos_token_id": [5, 9],
        "forced_bos_token_id": 9,
        "decoder_start_token_id": 5,
        "bad_words_ids": [[5], [5, 9]],
        "sequence_bias": {"(5,)": 1.0},
        "max_new_tokens": 9,
        "pad_token_id": None,
    }
    assert trimmed_generation(fields, {5: 0}) == {
        "eos_token_id": [0],
        "decoder_start_token_id": 0,
        "bad_words_ids": [[0]],
        "max_new_tokens": 9,
        "pad_token_id": None,
    }


def test_notices_pass_on(small: Callable[..., Path], stories: list[str]) -> None:
    source = small()
    info = read_info(source) | {"notices": ["Some terms"], "finetuned": {"turns": True}}
    (source / "slm.json").write_text(json.dumps(info))
    done = trimmed(source, stories)
    assert done.notices[0] == "Some terms" and "vocabulary trimmed from" in done.notices[1]
    assert Path("t/NOTICE").read_text().splitlines() == list(done.notices)
    assert read_info(Path("t"))["finetuned"] == {"turns": True}  # a model of conversations stays one
    assert load_checkpoint(Path("t")).config.vocab_size == 1408


def test_an_added_token_that_the_embedding_does_not_have_leaves(
    config: ModelConfig, make_model: Callable[..., CausalLM], gemma_like: Tokenizer, stories: list[str]
) -> None:
    """A multimodal tokenizer has a token for images beyond the rows of the text model."""
    backend = Backend.from_str(gemma_like.backend.to_str())
    backend.add_special_tokens([AddedToken("<image_soft_token>", special=True, normalized=False)])
    shape = {"vocab_size": gemma_like.vocab_size, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    settings = gemma_like.config | {"image_token": "<image_soft_token>"}
    save_checkpoint(Path("c"), make_model(config.model_copy(update=shape)), Tokenizer(backend, settings), {})
    trimmed(Path("c"), stories)
    after = Tokenizer.load(Path("t"))
    assert after.token_id("<image_soft_token>") is None and "image_token" not in after.config


def test_normalizers_stay() -> None:
    tokenizer = word_model("WordPiece", ["the fox ran"] * 3)
    tokenizer.backend.normalizer = normalizers.Lowercase()
    after, _ = with_kept(tokenizer, set(), tokenizer.vocab_size - 1)
    assert after.encode("The FOX") == after.encode("the fox")
