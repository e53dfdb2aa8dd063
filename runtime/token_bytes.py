"""How many bytes of text each token stands for, where that is certain."""

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders, pre_tokenizers

from slm.core.tokenizer import Tokenizer

# What tokenizers change: case, composed and wide characters, runs of spaces, a space put in front.
_PROBE = "Once  upon\n\n a\ttime, é e\u0301 Å ﬁ ＡＢ 🦊 ４２ \u00a0 end. "


def bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """Returns the UTF-8 bytes of text behind each token id, 0 for special tokens; None where tokens have none of their own.

    A byte-level vocabulary spells every token in bytes, half characters too. Others (SentencePiece's, with a mark for
    spaces) or one that changes text first do not say what was there before.
    """
    backend = tokenizer.backend
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    sizes = np.zeros(1 + max(backend.get_vocab(with_added_tokens=True).values()), np.int64)
    for token, i in backend.get_vocab(with_added_tokens=False).items():
        sizes[i] = len(token)  # one character stands for one byte
    for i, added in backend.get_added_tokens_decoder().items():
        sizes[i] = 0 if added.special else len(added.content.encode())
    return sizes if _spells(tokenizer) else None


def _spells(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text with all that is awkward spell its bytes, one after the other."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spelt = [tokenizer.backend.id_to_token(i) or "" for i in tokenizer.encode_literal(_PROBE)]
    return set("".join(spelt)) <= alphabet and decoders.ByteLevel().decode(spelt) == _PROBE
