"""Rules for the quality of a document's text: Gopher's (Rae et al. 2021, arXiv:2112.11446, table A1) and two of C4's.

They are made for running text in languages that separate words by white space. They remove source code, tables and lists.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

FEWEST_WORDS, MOST_WORDS = 50, 100_000
SHORTEST_MEAN, LONGEST_MEAN = 3.0, 10.0  # mean length of a word, in characters
MOST_SYMBOLS = 0.1  # number of "#" and of ellipses, per word
MOST_BULLETS = 0.9  # share of lines that begin with a bullet
MOST_ELLIPSES = 0.3  # share of lines that end with an ellipsis
FEWEST_ALPHABETIC = 0.8  # share of words with a letter
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
FEWEST_STOP_WORDS = 2  # in English text only
MOST_REPEATED_LINES = 0.3  # share of lines, and of paragraphs, that occurred before in the document
MOST_REPEATED_LINE_CHARACTERS = 0.2  # share of characters in such lines, and in such paragraphs
# Share of characters in the most frequent sequence of n words, and in all sequences of n words that occurred before.
MOST_IN_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
MOST_IN_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_BULLETS = ("•", "‣", "◦", "*", "-")
_ELLIPSES = ("...", "…")
_PARAGRAPHS = re.compile(r"\n\s*\n")


def fault(text: str, *, english: bool = False) -> str | None:
    """Returns the name of the first rule that a document breaks; None if it breaks none.

    Args:
        text: The document.
        english: Whether the document is known to be English, so that the rule on stop words applies.
    """
    words = text.split()
    if len(words) < FEWEST_WORDS:
        return "too short"
    if len(words) > MOST_WORDS:
        return "too long"
    if not SHORTEST_MEAN <= sum(map(len, words)) / len(words) <= LONGEST_MEAN:
        return "word length"
    if max(text.count("#"), text.count("...") + text.count("…")) / len(words) > MOST_SYMBOLS:
        return "symbols"
    lines = [line for each in text.split("\n") if (line := each.strip())]
    if sum(line.startswith(_BULLETS) for line in lines) / len(lines) > MOST_BULLETS:
        return "bullets"
    if sum(line.endswith(_ELLIPSES) for line in lines) / len(lines) > MOST_ELLIPSES:
        return "ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < FEWEST_ALPHABETIC:
        return "few words"
    if english and len(STOP_WORDS.intersection(map(str.lower, words))) < FEWEST_STOP_WORDS:
        return "stop words"
    lower = text.lower()
    if "lorem ipsum" in lower or "{" in text:
        return "placeholder or code"
    if _repeats(lines) or _repeats([part for part in map(str.strip, _PARAGRAPHS.split(text)) if part]):
        return "repeated lines"
    if _repeats_words(lower.split()):
        return "repeated words"
    return None


def _repeats(parts: Sequence[str]) -> bool:
    seen: set[str] = set()
    repeated = characters = 0
    for part in parts:
        if part in seen:
            repeated, characters = repeated + 1, characters + len(part)
        seen.add(part)
    total = sum(map(len, parts))
    return repeated / len(parts) > MOST_REPEATED_LINES or characters / total > MOST_REPEATED_LINE_CHARACTERS


def _repeats_words(words: Sequence[str]) -> bool:
    total = sum(map(len, words))
    rules: tuple[tuple[dict[int, float], Callable[[Sequence[str], int], int]], ...] = (
        (MOST_IN_TOP, _in_top),
        (MOST_IN_REPEATED, _in_repeated),
    )
    return any(count(words, n) / total > most for mosts, count in rules for n, most in mosts.items())


def _in_top(words: Sequence[str], n: int) -> int:
    """Returns the characters in the most frequent sequence of n words, if it occurs more than once."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    most = max(counts.values())
    if most == 1:
        return 0
    return most * max(sum(map(len, sequence)) for sequence, count in counts.items() if count == most)


def _in_repeated(words: Sequence[str], n: int) -> int:
    """Returns the characters in sequences of n words that occurred before, each character once."""
    seen: set[tuple[str, ...]] = set()
    characters = end = 0
    for start, sequence in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
        if sequence in seen:
            characters += sum(map(len, words[max(start, end) : start + n]))
            end = start + n
        seen.add(sequence)
    return characters
