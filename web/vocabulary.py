"""The page's tokenizer file `tokenizer.bin`: the rules of a `tokenizer.json`, and the tables of its BPE model.

The page reads the tables where they lie (`static/vocabulary.js`). `tokenizer.json` would become strings, objects and maps: six
times the file in the browser's memory while it is parsed, and a second set of maps for plain text.

All numbers are unsigned, of 32 bits, little-endian. The N tokens are numbered in the order of their ids. The M merges are
sorted by their left token, then by their right one. Texts are UTF-8.

| part | length |
|---|---|
| mark, bytes of the rules, N, bytes of all tokens, M | 5 |
| ids | N |
| starts of the tokens in their bytes, and the end of the last | N + 1 |
| tokens, sorted by their bytes | N |
| starts of the merges by their left token, and the end of the last | N + 1 |
| right tokens, ranks and results of the merges | M each |
| the bytes of all tokens, then the rules: `tokenizer.json` without vocabulary and merges | bytes |
"""

import json

import numpy as np
from numpy.typing import ArrayLike

from slm.core.tokenizer import Tokenizer

TABLES_FILE = "tokenizer.bin"
# "slm1" in bytes: the mark and the version of the format.
_MARK = int.from_bytes(b"slm1", "little")


def tokenizer_tables(tokenizer: Tokenizer) -> bytes | None:
    """Returns the contents of `tokenizer.bin`; None for another model than BPE, whose `tokenizer.json` the page reads."""
    rules = json.loads(tokenizer.backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        return None
    vocabulary, merges = model.pop("vocab"), model.pop("merges")
    spelled = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens = [token.encode() for token in spelled]
    number = {token: i for i, token in enumerate(spelled)}
    # A prefix of parts within a word is not part of a result, as in the tokenizers library.
    prefix = len(model["continuing_subword_prefix"] or "")
    pairs = [(number[left], number[right], number[left + right[prefix:]]) for left, right in merges]
    left, right, results = np.array(pairs, np.uint32).reshape(-1, 3).T
    order = np.lexsort((right, left))
    text = b"".join(tokens)
    head = json.dumps(rules, ensure_ascii=False, separators=(",", ":")).encode()
    parts: list[ArrayLike] = [
        [_MARK, len(head), len(tokens), len(text), len(pairs)],
        [vocabulary[token] for token in spelled],
        np.cumsum([0, *map(len, tokens)]),
        sorted(range(len(tokens)), key=tokens.__getitem__),
        np.searchsorted(left[order], np.arange(len(tokens) + 1)),
        *(column[order] for column in (right, np.arange(len(pairs)), results)),
    ]
    return b"".join([*(np.asarray(part).astype("<u4").tobytes() for part in parts), text, head])
