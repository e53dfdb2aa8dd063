"""Metrics of texts: exact match, F1 of words, ROUGE-1 and ROUGE-L. Every score is between 0 and 1."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A run of letters and digits, or one character of a script that is written without spaces (kana, Han).
_SPACELESS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


def exact(expected: str, reply: str) -> bool:
    """Returns whether two texts are equal up to white space and Unicode's composition (NFC). Case and punctuation count."""
    return _plain(expected) == _plain(reply)


def squad_exact(expected: str, reply: str) -> bool:
    """Returns whether two texts have the same words in SQuAD's normalization (see `squad_words`), in the same order."""
    return squad_words(expected) == squad_words(reply)


def f1(expected: str, reply: str) -> float:
    """Returns the F1 of the words that two texts share, as in SQuAD (Rajpurkar et al. 2016)."""
    return _overlap(squad_words(expected), squad_words(reply))


def squad_words(text: str) -> list[str]:
    """Returns the words of a text in SQuAD's normalization: lower case, without ASCII punctuation and English articles.

    Unlike SQuAD, a text of which nothing would be left keeps its articles, and one of punctuation alone its punctuation:
    otherwise, an empty reply would equal the expected "A".
    """
    plain = text.lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split() or plain.split() or text.split()


def rouge_1(expected: str, reply: str) -> float:
    """Returns the F1 of ROUGE-1 (Lin 2004): shared words, without stemming."""
    return _overlap(rouge_words(expected), rouge_words(reply))


def rouge_l(expected: str, reply: str) -> float:
    """Returns the F1 of ROUGE-L (Lin 2004): the longest common subsequence of words, without stemming.

    The whole texts are compared, not line by line.
    """
    ours, theirs = rouge_words(expected), rouge_words(reply)
    return _f1(longest_common(ours, theirs), len(ours), len(theirs))


def rouge_words(text: str) -> list[str]:
    """Returns the words of a text for ROUGE: lower-case runs of letters and digits. Each Han or kana character is a word."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, by the bit-parallel method of Hyyrö (2004)."""
    short, long = sorted((first, second), key=len)
    places: dict[str, int] = {}
    for number, word in enumerate(short):
        places[word] = places.get(word, 0) | 1 << number
    every = (1 << len(short)) - 1
    row = every
    for word in long:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(short) - row.bit_count()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _overlap(expected: Sequence[str], reply: Sequence[str]) -> float:
    return _f1(sum((Counter(expected) & Counter(reply)).values()), len(expected), len(reply))


def _f1(common: int, expected: int, reply: int) -> float:
    """Returns 2 P R / (P + R) with P = common / reply and R = common / expected; 1 for two empty texts."""
    return 2 * common / (expected + reply) if expected + reply else 1.0
