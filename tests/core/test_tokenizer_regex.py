"""Which regular expressions of tokenizers pass: those of real models, and none that takes more than linear time."""

import random
import time
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from slm.core.tokenizer_regex import Slow, linear_regex

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
NOT_WORD = r"[^\r\n\p{L}\p{N}]"
REAL = {
    "tiktoken's gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "llama3": rf"{CONTRACTIONS}|{NOT_WORD}?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "qwen2": rf"{CONTRACTIONS}|{NOT_WORD}?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "o200k": rf"{NOT_WORD}?{UPPER}*{LOWER}+{CONTRACTIONS}?|{NOT_WORD}?{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    "tekken": rf"{NOT_WORD}?{UPPER}*{LOWER}+|{NOT_WORD}?{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    "deepseek v3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|"
    + SPACES,
    "deepseek cjk": "[一-龥぀-ゟ゠-ヿ]+",
    "deepseek letters": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ]+",
    "deepseek trailing": r"\s+$",
    "kimi": rf"[\p{{Han}}]+|{NOT_WORD}?{UPPER[:-1]}&&[^\p{{Han}}]]*{LOWER[:-1]}&&[^\p{{Han}}]]+{CONTRACTIONS}?|"
    rf"{NOT_WORD}?{UPPER[:-1]}&&[^\p{{Han}}]]+{LOWER[:-1]}&&[^\p{{Han}}]]*{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SPACES}",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "xlm-roberta": r" {2,}",
    "digits": r"[0-9][0-9][0-9]",
    "line": r"[\r\n]",
    "grouped": r"(\s+(?!\S)|\s+)",
    "pairs": r"(?:ab)+|\S",
}  # fmt: skip
SLOW = [
    "(a+)+$", "(a+)+$|(x+x+)+y", "a+[bc]|a", "a*a*a*b", "(a|a)+b", "(a?a)*b", r"(\w+)\1", "(?<n>a+)b", r"\d(?=(\d{3})*\b)",
    "(a{1,500}){1,500}", "a{0,60}a{0,60}a{0,60}b", "((a{9}){9}){9}{9}", "(?~ab)", r"\g<0>a", "a+b|x|a+", "(?x) a ", "(?#c)a",
    "a{1,3}+", "(?:a*)*b", "xa++b", "(?>a+)+b", "(?:a|b)+c", ".*x|y", r"\Xa", "a+(?=a*b)", "a" * 5000, "a{100000}",
    "(ab|a)*c", "x*(?:a?){99}y", "a+b|a+?", "a+b|a+?|a+", "(a+|b)*c", r"\p{L}+\s*\p{L}+x",
]  # fmt: skip
MALFORMED = ["", "[", "a)", "(", "*", "[]a]", "[[:x]", "a{2,1}", "(?<", "\\", "[a\\", "[\\b]", "+", "{1}"]


@pytest.mark.parametrize("name", REAL)
def test_real_ones_pass_and_split_the_same(name: str) -> None:
    expression = linear_regex(REAL[name]).expression
    assert (expression == REAL[name]) == (name != "deepseek trailing")
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choice("aAbB 1\n\r\t'sdé漢.,!?/") * generator.randint(1, 4) for _ in range(40))
        assert _split(expression, text) == _split(REAL[name], text)


@pytest.mark.parametrize("expression", [*SLOW, *MALFORMED])
def test_slow_and_malformed_ones_are_rejected(expression: str) -> None:
    with pytest.raises(Slow):
        linear_regex(expression)


def test_what_it_matches_at_least() -> None:
    assert [linear_regex(each).shortest for each in ("abc|ab", "a*", "a{3}b?", " {2,}", "(?:ab)+")] == [2, 0, 3, 2, 2]


def _split(expression: str, text: str) -> list[Any]:
    return pre_tokenizers.Split(Regex(expression), "isolated").pre_tokenize_str(text)


def _drawn(generator: random.Random, depth: int = 0) -> str:
    """Returns an expression composed at random: what is nested and chained amplifies."""
    pieces = []
    for _ in range(generator.randint(1, 3)):
        kind = generator.randint(0, 7)
        if kind < 4 or depth > 2:
            piece = generator.choice(["a", "b", "[ab]", r"\s", r"\w", r"\p{L}", ".", "[^b]", r"\b", "$", "ab"])
        elif kind < 6:
            piece = f"({_drawn(generator, depth + 1)})"
        elif kind == 6:
            piece = f"(?:{_drawn(generator, depth + 1)}|{_drawn(generator, depth + 1)})"
        else:
            piece = f"({generator.choice(['?=', '?!', '?<=', '?>'])}{_drawn(generator, depth + 1)})"
        pieces.append(piece + generator.choice(["", "", "*", "+", "?", "{2,}", "{1,3}", "+?", "++"]))
    return "".join(pieces) + (f"|{_drawn(generator, depth + 1)}" if depth == 0 and generator.random() < 0.6 else "")


ADVERSARIAL = ("a", "b", "ab", " ", "a ", "aab", "\n", " \n")


def _seconds(expression: str, length: int) -> float:
    worst = 0.0
    for unit in ADVERSARIAL:
        text = (unit * length)[:length] + "!"
        before = time.process_time()
        _split(expression, text)
        worst = max(worst, time.process_time() - before)
    return worst


@pytest.mark.examples(few=100, many=6000)
def test_drawn_expressions_that_pass_run_in_linear_time(examples: int) -> None:
    generator = random.Random(examples)
    passed = 0
    for _ in range(examples):
        expression = _drawn(generator)
        try:
            made = linear_regex(expression).expression
        except Slow:
            continue
        try:
            _split(made, "x")
        except Exception:  # Oniguruma does not take it: a lookbehind of another length
            continue
        passed += 1
        # Quadratic time at 16,384 characters is 0.4 s and more; exponential never ends at 64.
        assert _seconds(made, 64) < 0.2, expression
        assert _seconds(made, 16_384) < 0.2 or _seconds(made, 16_384) < 0.2, expression
    assert passed > examples / 20


def test_the_test_notices() -> None:
    """The negative control: an expression in quadratic time, which is rejected, takes longer than the limit above."""
    assert _seconds("a+[bc]|a", 16_384) > 0.2
    with pytest.raises(Slow, match="quadratic"):
        linear_regex("a+[bc]|a")
