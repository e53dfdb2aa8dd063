"""What a tokenizer.json may contain: real kinds load and agree with the library, what expands or hangs is rejected."""

import base64
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.tokenizer_components import charsmap_growth
from slm.core.tokenizer_fields import Unsupported
from slm.core.tokenizer_rules import Rules

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = 'Once upon a time, 12345 foxes didn\'t\n\n say   <s> "żółw" 漢字 to   the cat.\t'


def document(**changes: Any) -> dict[str, Any]:
    """A small byte-level BPE, with some fields replaced."""
    letters = {character: i for i, character in enumerate("abcdefgh ▁")}
    model = {"type": "BPE", "vocab": letters | {"ab": 10, "abc": 11}, "merges": [["a", "b"], ["ab", "c"]]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": model,
    } | changes  # fmt: skip


def load(tmp_path: Path, content: Any) -> Tokenizer:
    file = tmp_path / "tokenizer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return Tokenizer.load(file)


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def chain(kind: str, name: str, members: list[Any]) -> dict[str, Any]:
    return {"type": kind, name: members}


def normalizer(*members: Any) -> dict[str, Any]:
    return {"normalizer": chain("Sequence", "normalizers", list(members))}


def decoder(*members: Any) -> dict[str, Any]:
    return {"decoder": chain("Sequence", "decoders", list(members))}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def charsmap(texts: bytes) -> str:
    """A map of characters that replaces "a" by the first of the texts."""
    units = [0] * 512
    units[0] = 1 << 10  # children are at 1 ^ label
    units[1 ^ 97] = 97 | 1 << 8 | 200 << 10
    units[(1 ^ 97) ^ 200] = 1 << 31  # the value of the leaf: where its text begins
    return base64.b64encode(struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + texts).decode()


def real(name: str) -> Backend:
    """Returns a small tokenizer of a real kind."""
    bpe = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    if name in ("gpt2", "llama3", "qwen"):
        made = Backend(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if name != "gpt2":
            made.normalizer = normalizers.NFC() if name == "qwen" else None
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(pattern(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        made.decoder = decoders.ByteLevel()
        made.train_from_iterator([TEXT] * 3, bpe)
        template = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        return made
    if name in ("gemma", "llama2"):
        made = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        steps = [normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence([*[normalizers.Prepend("▁")] * (name == "llama2"), *steps])
        if name == "gemma":
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.train_from_iterator([TEXT] * 3, bpe)
        ends: list[Any] = [decoders.Strip(" ", 1, 0)] if name == "llama2" else []
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
        made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
        return made
    if name == "t5":
        made = Backend(models.Unigram())
        made.normalizer = normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(pattern(" {2,}"), " ")]
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        unigram = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator([TEXT, "a cat and a fox", "the river and the house"] * 3, unigram)
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
        return made
    made = Backend(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    words = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    made.train_from_iterator([TEXT] * 3, words)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def pattern(expression: str) -> Any:
    from tokenizers import Regex

    return Regex(expression)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "gemma", "llama2", "t5", "bert"])
def test_real_kinds_load_unchanged(tmp_path: Path, name: str) -> None:
    backend = real(name)
    found = load(tmp_path, backend.to_str())
    assert found.backend.to_str() == backend.to_str() and found.dropped == ()
    for text in (TEXT, "", " ", "a" * 300):
        ids = backend.encode(text).ids
        assert found.encode(text) == ids
        assert found.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize(
    ("name", "before", "after"), [("llama3", (0,), ()), ("gemma", (0,), ()), ("t5", (), (1,)), ("bert", (1,), (2,))]
)
def test_what_comes_before_a_text_is_told_from_what_comes_after(
    tmp_path: Path, name: str, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    found = load(tmp_path, real(name).to_str())
    assert (found.prefix_ids, found.suffix_ids) == (before, after)
    assert found.encode("fox") == [*before, *found.encode_rendered("fox"), *after]


def test_two_templates_are_rejected(tmp_path: Path) -> None:
    """The library panics over them."""
    backend = real("gemma")
    template = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    backend.post_processor = processors.Sequence([template, template])
    with pytest.raises(SlmError, match=r"(unsupported|invalid) tokenizer.json"):
        load(tmp_path, backend.to_str())


def test_state_is_reset_as_transformers_resets_it(tmp_path: Path) -> None:
    backend = real("gemma")
    plain = backend.encode(TEXT).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=200)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert backend.encode(TEXT).ids != plain
    found = Tokenizer.load(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert found.encode(TEXT) == plain == theirs(TEXT)["input_ids"]
    assert found.encode_documents([TEXT]) == [found.encode_literal(TEXT)] and found.dropped == ("truncation", "padding")
    assert found.sha256 == load(tmp_path, real("gemma").to_str()).sha256


def test_encoding_is_not_random(tmp_path: Path) -> None:
    content = document()
    content["model"]["dropout"] = 0.5
    assert len({tuple(Backend.from_str(json.dumps(content)).encode("abc" * 20).ids) for _ in range(9)}) > 1
    found = load(tmp_path, content)
    assert found.encode("abc" * 20) == [11] * 20 and found.dropped == ("dropout",)


def test_tokens_that_the_configuration_alone_calls_special(tmp_path: Path) -> None:
    """As transformers adds them, where the vocabulary has them."""
    letters = {character: i for i, character in enumerate("abcdefgh ▁</s>x")}
    model = {"type": "BPE", "vocab": letters | {"</s>": 20, "<x>": 21}, "merges": []}
    x = {"content": "<x>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    named = {
        "eos_token": "</s>",
        "bos_token": "<none>",
        "added_tokens_decoder": {"21": x, "22": x | {"content": "<y>"}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    found = load(tmp_path, document(model=model))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("ab </s> c  <x> d", "<x></s>"):
        assert found.encode(text) == theirs(text)["input_ids"]
    assert found.encode("ab </s>") == [0, 1, 8, 20]
    assert found.decode([0, 20, 21]) == theirs.decode([0, 20, 21], skip_special_tokens=True) == "a"
    assert found.encode_literal("</s>") == [letters[character] for character in "</s>"]
    (tmp_path / "copy").mkdir()
    found.copy(tmp_path, tmp_path / "copy")  # other clients read this file alone
    assert Tokenizer.load(tmp_path / "copy").encode("ab </s>") == [0, 1, 8, 20]


def test_several_chat_templates(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    for several in (
        {"default": "A", "tool_use": "B"},
        [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}],
    ):
        config.write_text(json.dumps({"chat_template": several}))
        assert load(tmp_path, document()).config["chat_template"] == "A"
    for wrong in ({"tool_use": "B"}, [{"name": "rag", "template": "B"}], 3, {"default": 3}, []):
        config.write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(SlmError, match=r"chat.template"):
            load(tmp_path, document())


def test_state_does_not_travel_on(tmp_path: Path) -> None:
    content = document(truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"})
    found = load(tmp_path, content)
    (tmp_path / "copy").mkdir()
    found.copy(tmp_path, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer.json").read_text())["truncation"] is None
    (tmp_path / "plain").mkdir()
    load(tmp_path / "plain", document()).copy(tmp_path / "plain", tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tmp_path / "plain" / "tokenizer.json").read_bytes()


TEMPLATE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"x": {"id": "x", "ids": [1], "tokens": ["b"]}},
}
WORDPIECE = document()["model"] | {
    "type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}, "max_input_chars_per_word": 10**12,
    "continuing_subword_prefix": "##",
}  # fmt: skip
ADDED = {"content": "x", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
BOMBS: dict[str, dict[str, Any]] = {
    "replace doubles": normalizer(*[replace("a", "aa")] * 40),
    "replace doubles in nested sequences": normalizer(*[normalizer(*[replace("a", "aaaa")] * 3)["normalizer"]] * 3),
    "replace with much": {"normalizer": replace("a", "b" * 10**6)},
    "replace of nothing": {"normalizer": replace("", "ab")},
    "replace of an empty match": normalizer(*[{"type": "Replace", "pattern": {"Regex": "x*"}, "content": "yy"}] * 6),
    "prepends": normalizer(*[{"type": "Prepend", "prepend": "x" * 200}] * 2),
    "nfkd after ligatures": normalizer(*[replace("ا", "ﷺ"), {"type": "NFKD"}] * 4),
    "byte level again and again": normalizer(*[{"type": "ByteLevel"}] * 40),
    "pre-tokenizers that double": {
        "pre_tokenizer": chain("Sequence", "pretokenizers", [{"type": "ByteLevel", "use_regex": False}] * 40)
    },
    "metaspaces": {
        "pre_tokenizer": chain("Sequence", "pretokenizers", [{"type": "Metaspace", "replacement": "▁"}] * 20)
    },
    "both": normalizer(*[replace("a", "aa")] * 6)
    | {"pre_tokenizer": chain("Sequence", "pretokenizers", [{"type": "ByteLevel"}] * 6)},
    "a map of characters": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 4000 + b"\0")}
    },
    "a map of characters without an end": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 4000)}
    },
    "nested": {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 20 + '{"type":"NFC"}' + "]}" * 20)},
    "many": normalizer(*[{"type": "NFC"}] * 10**4),
    "decoder doubles": decoder(*[replace("e", "ee")] * 40),
    "decoder replaces with much": {"decoder": replace("e", "x" * 10**6)},
    "strip": {"decoder": {"type": "Strip", "content": " ", "start": 2**62, "stop": 0}},
    "template repeats the text": {"post_processor": TEMPLATE | {"single": TEMPLATE["single"] + TEMPLATE["single"][1:]}},
    "template of a million tokens": {"post_processor": TEMPLATE | {"single": TEMPLATE["single"][:1] * 10**5}},
    "a token of many ids": {
        "post_processor": TEMPLATE | {"special_tokens": {"x": {"id": "x", "ids": [1] * 10**5, "tokens": ["b"] * 10**5}}}
    },
    "many templates": {"post_processor": chain("Sequence", "processors", [TEMPLATE] * 100)},
    "template without a text": {"post_processor": TEMPLATE | {"single": TEMPLATE["single"][:1]}},
    "nested quantifiers": {"pre_tokenizer": split("(a+)+$|(x+x+)+y")},
    "quadratic": {"pre_tokenizer": split("a+[bc]|a")},
    "many regular expressions": {"pre_tokenizer": chain("Sequence", "pretokenizers", [split("[a-f]{1,30}x")] * 100)},
    "fixed length": {"pre_tokenizer": {"type": "FixedLength", "length": -1}},
    "an unknown type": {"normalizer": {"type": "Bomb"}},
    "no type": {"normalizer": {"prepend": "x"}},
    "a long word": {"model": WORDPIECE},
    "a long prefix": {"model": document()["model"] | {"continuing_subword_prefix": "#" * 10**5}},
    "a long token": {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b" * 10**6: 1}}},
    "a long unigram": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b" * 10**6, -1.0]]}},
    "a long added token": {"added_tokens": [ADDED | {"id": 12, "content": "x" * 10**6}]},
    "an id of billions": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 4 * 10**9}, "merges": []}},
    "an added id of billions": {"added_tokens": [ADDED | {"id": 4 * 10**9, "content": "<x>"}]},
    "a large unigram": {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"{i:05d}" + "z" * 245, -1.0] for i in range(17_000)]}
    },
    "nested tokens of a unigram": {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * (1 + i), -1.0] for i in range(300)]}
    },
    "white space that takes white space": {
        "added_tokens": [ADDED | {"id": 12, "content": " ", "lstrip": True, "rstrip": True, "normalized": False}]
    },
    "templates of which one is left out": {"post_processor": chain("Sequence", "processors", [TEMPLATE] * 3)},
    "strip at the end": {"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 1}},
    "a map of characters that leads out of itself": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(struct.pack("<I", 4096) + b"\xff" * 4096 + b"x\0").decode(),
        }
    },
    "many added tokens": {"added_tokens": [ADDED | {"id": i, "content": f"<{i:016d}>"} for i in range(70_000)]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_expands_or_hangs_is_rejected(tmp_path: Path, name: str) -> None:
    before = time.process_time()
    with pytest.raises(SlmError, match=r"(unsupported|invalid) tokenizer.json") as caught:
        load(tmp_path, document(**BOMBS[name]))
    assert time.process_time() - before < 5
    assert len(caught.value.message) < 1000 and caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        normalizer(*[replace("a", "b")] * 60),
        normalizer(replace("``", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}),
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"xyz\0" + b"x" * 9000 + b"\0")}},
        {"post_processor": TEMPLATE},
        {"decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}},
        {"pre_tokenizer": {"type": "Punctuation", "behavior": "Contiguous"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},  # up to tokenizers 0.14
        {"added_tokens": [ADDED | {"id": 12, "content": "<|x|>"}]},
        {"model": WORDPIECE | {"max_input_chars_per_word": 100}},
        {"padding": {"strategy": {"Fixed": 10**11}, "direction": "Right", "pad_to_multiple_of": 2**40, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "a"}},
        {"truncation": {"max_length": 2**63, "strategy": "LongestFirst", "stride": 2**63, "direction": "Right"}},
    ],
)  # fmt: skip
def test_what_is_bounded_loads(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = load(tmp_path, document(**changes))
    assert len(found.encode("abc" * 1000)) < 10_000


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(document())[:-1] + ', "normalizer": null}',
        json.dumps(document()).replace('"type": "BPE"', '"type": "BPE", "type": "BPE"'),
        json.dumps(document()) + "{}",
        '{"a":' * 100_000,
        "[]",
        "",
    ],
)
def test_json_that_two_readers_read_differently_is_rejected(tmp_path: Path, content: str) -> None:
    with pytest.raises(SlmError, match=r"(unsupported|invalid) tokenizer.json"):
        load(tmp_path, content)


def test_a_long_text_is_rejected_where_rules_expand_it(tmp_path: Path) -> None:
    found = load(tmp_path, document(**normalizer(*[replace("a", "aaaa")] * 3)))
    assert len(found.encode("a" * 1000)) == 64_000
    with pytest.raises(SlmError, match="rules expand too much"):
        found.encode("a" * 40_000)
    assert len(found.encode("b" * 40_000)) == 40_000  # which the rules leave as it is


def test_what_follows_the_normalizer_counts(tmp_path: Path) -> None:
    """One split a character, and a space put before each, again and again, takes a kilobyte for each byte."""
    level = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False, "trim_offsets": True}
    steps = [{"type": "FixedLength", "length": 1}, level]
    found = load(tmp_path, document(pre_tokenizer=chain("Sequence", "pretokenizers", steps * 4)))
    assert found.encode("abc")
    with pytest.raises(SlmError, match="rules expand too much"):
        found.encode("abc " * 40_000)
    with pytest.raises(SlmError, match="its pre-tokenizers can make"):
        load(tmp_path, document(pre_tokenizer=chain("Sequence", "pretokenizers", steps * 5)))


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "unk_token": "no", "vocab": {"a": 0}},
        {"type": "WordPiece", "unk_token": "no", "vocab": {"a": 0}, "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
        {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]},
    ],
)  # fmt: skip
def test_text_that_a_vocabulary_does_not_cover(tmp_path: Path, model: dict[str, Any]) -> None:
    found = load(tmp_path, document(model=model))
    assert found.encode("a") == [0]
    for encode in (found.encode, found.encode_literal, lambda text: found.encode_documents([text])):
        with pytest.raises(SlmError, match="the tokenizer failed"):
            encode("z")


def test_texts_that_expand_are_not_encoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(tmp_path, document(**normalizer(*[replace("a", "aaaa")] * 3)))
    together: list[int] = []
    monkeypatch.setattr(type(found), "encode_literal", lambda self, text: together.append(len(text)) or [0])
    assert found.encode_documents(["a" * 20_000] * 3) == [[0]] * 3 and together == [20_000] * 3
    assert len(found.encode_documents(["a"] * 3)[0]) == 64 and len(together) == 3


def test_ordinary_rules_take_texts_of_any_length(tmp_path: Path) -> None:
    steps = [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]
    found = load(tmp_path, document(**normalizer(*steps)))
    assert found._growth > 100
    assert len(found.encode("abc " * 60_000)) == 120_001


def test_growth_of_maps_of_characters() -> None:
    assert charsmap_growth(charsmap(b"xyz\0")) == 3
    assert charsmap_growth(charsmap(b"\0")) == 1
    for damaged in (
        b"",
        b"\0\0\0\0x\0",
        struct.pack("<I", 7) + b"abcdefgx\0",
        struct.pack("<I", 4096) + b"\xff" * 4096 + b"x\0",
    ):
        with pytest.raises(Unsupported):  # over which the library panics, when it loads them or later
            charsmap_growth(base64.b64encode(damaged).decode())
    for texts in (b"\xff\xfe\0", b"\x80abc\0"):
        with pytest.raises(Unsupported):
            charsmap_growth(charsmap(texts))
    within = base64.b64decode(charsmap("漢".encode() + b"\0"))
    leaf = struct.pack("<I", 1 << 31)
    with pytest.raises(Unsupported, match="damaged"):  # which begins within the character
        charsmap_growth(base64.b64encode(within.replace(leaf, struct.pack("<I", 1 << 31 | 1))).decode())
    with pytest.raises(Unsupported):
        charsmap_growth("!!!")
    with pytest.raises(Unsupported):
        charsmap_growth(base64.b64encode(struct.pack("<I", 2**31) + b"\0" * 8).decode())


def test_only_what_was_checked_reaches_the_library() -> None:
    content = document(normalizer={"type": "NFC", "surprise": [1] * 10}, unknown={"a": 1})
    made = json.loads(Rules(json.dumps(content)).text)
    assert made["normalizer"] == {"type": "NFC"} and "unknown" not in made


def test_other_files_of_silly_size_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "x" * 10**6}))
    with pytest.raises(SlmError, match="bos_token has more than"):
        load(tmp_path, document())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"a": "x" * (17 << 20)}))
    with pytest.raises(SlmError, match="more than 16 MiB"):
        load(tmp_path, document())
