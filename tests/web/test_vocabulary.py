"""The tables of a BPE model, as the page reads them, give the ids of the tokenizers library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from slm.core.tokenizer import Tokenizer
from slm.web.vocabulary import TABLES_FILE, tokenizer_tables
from tests.web.page_text import TEXT, save_for_page

Node = Callable[..., Any]

CHARACTERS = "ab cé中🦊x"
ADDED = ("<end>", "<b>", "aé")
# Returns the ids of texts, as a prompt and as plain text, for each pair of tables and texts.
IDS = """
import { Text } from "page/text.js";
import { unpacked } from "page/vocabulary.js";
const found = given.map(([tables, texts]) => {
  const text = new Text(unpacked(new Uint8Array(Buffer.from(tables, "hex")).slice()), {});
  return texts.map((each) => [text.encode(each), text.encodeLiteral(each)]);
});
console.log(JSON.stringify(found));
"""


def tables(tokenizer: Tokenizer) -> bytes:
    found = tokenizer_tables(tokenizer)
    assert found is not None
    return found


def drawn(seed: int, **options: Any) -> Tokenizer:
    """A random model: merges of random pairs in random order; ids with gaps, or added tokens beside the vocabulary."""
    rng = np.random.default_rng(seed)
    prefix, suffix = options.get("continuing_subword_prefix", ""), options.get("end_of_word_suffix", "")
    tokens = ["<unk>", *CHARACTERS[:-1], *(f"{prefix}{each}" for each in CHARACTERS[:-1] if prefix)]
    tokens += [f"{each}{suffix}" for each in tokens[1:] if suffix]
    if options.get("byte_fallback"):
        # Bytes that no character here has are missing: such characters are unknown.
        tokens += [f"<0x{byte:02X}>" for byte in range(256) if byte < 0x80 or byte > 0xE0 or byte % 3]
    merges = []
    for _ in range(150):
        short = [each for each in tokens[1:] if len(each.removeprefix(prefix).removesuffix(suffix)) < 3]
        left, right = (str(each) for each in rng.choice(short, 2))
        if right.startswith(prefix) and not (suffix and left.endswith(suffix)):
            made = left + right[len(prefix) :]
            if 0 < len(made) < 12 and (left, right) not in merges:
                merges.append((left, right))
                tokens += [] if made in tokens else [made]
    gaps = seed % 2 == 0
    if gaps:  # the library would give an added token an id that is in use
        tokens += [each for each in ADDED if each not in tokens]
    ids = sorted(rng.choice((3 if gaps else 1) * len(tokens), len(tokens), replace=False).tolist())
    vocab = dict(zip(rng.permutation(tokens).tolist(), ids, strict=True))
    backend = Backend(models.BPE(vocab=vocab, merges=merges, **options))
    backend.decoder = decoders.Fuse()
    if seed > 2:
        backend.pre_tokenizer = pre_tokenizers.Whitespace() if seed == 3 else pre_tokenizers.WhitespaceSplit()
    if seed == 3:
        backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([ADDED[0], str(tokens[6])])
    backend.add_tokens([AddedToken(ADDED[1], normalized=True), AddedToken(ADDED[2], normalized=False)])
    return Tokenizer(backend, {})


def texts(seed: int) -> list[str]:
    rng = np.random.default_rng(seed + 100)
    parts = [*CHARACTERS, *"abcabcabcabc", "ab", "<end>", "<b>", "<unk>", "zz", "\u00a0", "\ufeff", "\x85", "_", "-"]
    return ["", *("".join(rng.choice(parts, rng.integers(1, 30))) for _ in range(150))]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"unk_token": "<unk>"},
    "without unknown": {},
    "fused": {"unk_token": "<unk>", "fuse_unk": True},
    "bytes": {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    "bytes, not fused": {"unk_token": "<unk>", "byte_fallback": True},
    "whole words": {"unk_token": "<unk>", "ignore_merges": True},
    "prefix": {"unk_token": "<unk>", "continuing_subword_prefix": "##"},
    "suffix": {"unk_token": "<unk>", "end_of_word_suffix": "</w>"},
}


def test_the_same_ids(in_node: Node, vendor: None) -> None:
    cases = [(name, seed, drawn(seed, **options)) for name, options in OPTIONS.items() for seed in (1, 2, 3, 4)]
    given = [(tables(tokenizer).hex(), texts(seed)) for _, seed, tokenizer in cases]
    for (name, seed, tokenizer), found in zip(cases, in_node(IDS, given), strict=True):
        for each, (plain, literal) in zip(texts(seed), found, strict=True):
            assert plain == tokenizer.encode(each), (name, seed, each)
            assert literal == tokenizer.encode_literal(each), (name, seed, each)


def test_ids_depend_on_the_order_of_merges(in_node: Node, vendor: None) -> None:
    """The negative control of the comparison: with the ranks reversed, ids differ."""
    tokenizer = drawn(1, unk_token="<unk>")
    reversed_ = bytearray(tables(tokenizer))
    _, _, tokens, _, merges = np.frombuffer(reversed_, "<u4", 5).tolist()
    ranks = np.frombuffer(reversed_, "<u4", merges, offset=4 * (5 + 4 * tokens + 2 + merges))
    assert sorted(ranks) == list(range(merges))
    ranks[:] = ranks[::-1].copy()
    [found] = in_node(IDS, [(reversed_.hex(), texts(1))])
    assert sum(plain != tokenizer.encode(each) for each, (plain, _) in zip(texts(1), found, strict=True)) > 20


def test_ids_and_spellings(in_node: Node, vendor: None) -> None:
    tokenizer = drawn(2, unk_token="<unk>")
    save_for_page(tokenizer)
    wanted = list(range(tokenizer.vocab_size * 4))
    spelled = [tokenizer.backend.id_to_token(i) for i in wanted]
    program = (
        TEXT
        + """
    console.log(JSON.stringify(given.map(([id, token]) => [text.spelled(id), text.id(token ?? "") ?? null])));
    """
    )
    found = in_node(program, [list(each) for each in zip(wanted, spelled, strict=True)])
    assert found == [[token or "", i if token else None] for i, token in zip(wanted, spelled, strict=True)]
    assert sum(token is None for token in spelled) > 50  # gaps


def test_a_text_that_the_vocabulary_does_not_cover(in_node: Node, vendor: None) -> None:
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[], unk_token="gone"))
    save_for_page(Tokenizer(backend, {}))
    program = (
        TEXT
        + """
    let said;
    try { text.encode("ab"); } catch ({ message }) { said = message; }
    console.log(JSON.stringify([text.encode("aa"), said]));
    """
    )
    assert in_node(program) == [[0, 0], "the model's tokenizer does not cover this text"]


def test_files_of_another_version_or_length_are_refused(in_node: Node, vendor: None) -> None:
    right = tables(drawn(1, unk_token="<unk>"))
    program = """
    import { unpacked } from "page/vocabulary.js";
    const said = given.map((each) => {
      try {
        return unpacked(new Uint8Array(Buffer.from(each, "hex")).slice()).rules.version;
      } catch ({ message }) {
        return message;
      }
    });
    console.log(JSON.stringify(said));
    """
    other = "the tokenizer and the page are of different versions"
    given = [right, b"slm0" + right[4:], right[:-1], right + b" ", right[:12], b""]
    assert in_node(program, [each.hex() for each in given]) == ["1.0", *[other] * 5]


def test_other_models_keep_their_file(in_node: Node, vendor: None) -> None:
    vocab = {each: i for i, each in enumerate(["[UNK]", "a", "b", "##b", "##a", "ab", "##ab"])}
    backend = Backend(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend, {})
    save_for_page(tokenizer)
    assert not Path(TABLES_FILE).exists()
    given = ["ab abab ba", "x ab", ""]
    program = TEXT + "console.log(JSON.stringify(given.map((each) => [text.encode(each), text.encodeLiteral(each)])));"
    assert in_node(program, given) == [[tokenizer.encode(each), tokenizer.encode_literal(each)] for each in given]


def test_memory(in_node: Node, vendor: None) -> None:
    """The page takes little more than the file. The negative control is the library, which reads tokenizer.json."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b) for a in letters for b in letters]
    triples = [(a + b, c) for a, b in pairs for c in letters]
    longer = [(f"{a}{b}", c + d) for a, b in triples[:3000] for c, d in pairs[:10]]
    vocab = {token: i for i, token in enumerate([*letters, *("".join(each) for each in (*pairs, *triples, *longer))])}
    tokenizer = Tokenizer(Backend(models.BPE(vocab=vocab, merges=[*pairs, *triples, *longer])), {})
    save_for_page(tokenizer)
    size = Path(TABLES_FILE).stat().st_size
    program = (
        TEXT.replace("const text = readText();", "")
        + """
    const taken = (make) => {
      globalThis.gc?.();
      const { heapUsed, arrayBuffers } = process.memoryUsage();
      const made = make();
      made.encodeLiteral("abc");
      const after = process.memoryUsage();
      return after.heapUsed + after.arrayBuffers - heapUsed - arrayBuffers;
    };
    const ours = taken(readText);
    const library = taken(() => new Text({ rules: JSON.parse(given) }, {}));
    console.log(JSON.stringify([ours, library]));
    """
    )
    ours, library = in_node(program, tokenizer.backend.to_str())
    assert size <= ours < 3 * size < 8 * size < library, (size, ours, library)
