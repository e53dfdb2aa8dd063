"""Tokenizers composed at random: what is chained and nested amplifies. Each loads and answers in bounds, or is refused."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle


def _replace(draw: random.Random) -> dict[str, Any]:
    texts = ["a", "e", " ", "aa", "ee", "▁", "x" * 50, "ﷺ", "", "x" * 10_000]
    kinds = [
        {"String": draw.choice(texts)},
        {"Regex": draw.choice(["a", "e*", "(a+)+$", r"\s+", "[a-z]", "a+b|a", r"\s+$"])},
    ]
    return {"type": "Replace", "pattern": draw.choice(kinds), "content": draw.choice(texts)}


def _normalizer(draw: random.Random) -> dict[str, Any]:
    plain = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"]
    made = [{"type": draw.choice(plain)}, _replace(draw), {"type": "Prepend", "prepend": draw.choice(["▁", "x" * 100])}]
    return draw.choice(made)


def _pre_tokenizer(draw: random.Random) -> dict[str, Any]:
    split = {
        "type": "Split",
        "pattern": _replace(draw)["pattern"],
        "behavior": "Isolated",
        "invert": draw.random() < 0.5,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": draw.random() < 0.5,
        "use_regex": draw.random() < 0.5,
        "trim_offsets": True,
    }
    space = {"type": "Metaspace", "replacement": draw.choice("▁漢"), "prepend_scheme": "always", "split": False}
    level |= {"trim_offsets": True}
    return draw.choice([split, level, space, {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}])


def _decoder(draw: random.Random) -> dict[str, Any]:
    strip = {"type": "Strip", "content": " ", "start": draw.choice([0, 1, 2**40]), "stop": draw.choice([0, 1, 2**40])}
    pieces = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return draw.choice(
        [_replace(draw), strip, pieces, {"type": "Fuse"}, {"type": "ByteFallback"}, {"type": "ByteLevel"}]
    )


def _template(draw: random.Random) -> dict[str, Any]:
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    mark: dict[str, Any] = {"SpecialToken": {"id": "x", "type_id": 0}}
    many = draw.choice([1, 1, 2, 100, 10_000])
    tokens = {"x": {"id": "x", "ids": [1] * many, "tokens": ["a"] * many}}
    single = draw.choices([text, mark], k=draw.choice([1, 2, 3, 1000])) if draw.random() < 0.7 else [mark, text]
    return {"type": "TemplateProcessing", "single": single, "pair": [text], "special_tokens": tokens}


SEQUENCES = {
    "normalizer": ("normalizers", _normalizer),
    "pre_tokenizer": ("pretokenizers", _pre_tokenizer),
    "decoder": ("decoders", _decoder),
    "post_processor": ("processors", _template),
}


def composed(draw: random.Random, document: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer with some of its parts in place of others, chained and nested."""
    made = dict(document)
    for part, (members, make) in SEQUENCES.items():
        if draw.random() < 0.5:
            continue
        chain = [make(draw) for _ in range(draw.choice([1, 1, 2, 3, 40]))]
        if draw.random() < 0.3:  # the same one again and again
            chain = chain[:1] * draw.choice([2, 10, 60])
        if part != "post_processor" and made[part] is not None and draw.random() < 0.5:
            chain.append(made[part])
        value: dict[str, Any] = {"type": "Sequence", members: chain}
        for _ in range(draw.choice([0, 0, 1, 20])):
            value = {"type": "Sequence", members: [value] * draw.choice([1, 2])}
            if len(json.dumps(value)) > 1 << 20:
                break
        made[part] = value if len(chain) > 1 or draw.random() < 0.5 else chain[0]
    if draw.random() < 0.2:
        made["padding"] = {"strategy": {"Fixed": 10**11}, "direction": "Right", "pad_to_multiple_of": 2**40, "pad_id": 0,
                           "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    return made


@pytest.mark.examples(few=20, many=2000)
def test_compositions_are_bounded(worker: Any, shared_bundle: Bundle, tmp_path: Path, examples: int) -> None:
    draw = random.Random(examples)
    document = json.loads((shared_bundle.path / "tokenizer.json").read_bytes())
    shutil.copy(shared_bundle.path / "tokenizer_config.json", tmp_path)
    seen: Counter[str] = Counter()
    for _ in range(examples):
        content = json.dumps(composed(draw, document))
        (tmp_path / "tokenizer.json").write_text(content)
        outcome, what = worker.ask("expansion", tmp_path)
        seen[outcome] += 1
        assert outcome != "wrong", (what, content[:3000])
    assert seen["works"] > examples / 20 and seen["refused"] > examples / 20, seen
