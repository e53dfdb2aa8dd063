"""Metrics of replies by values computed by hand, and confidence intervals by published and closed-form values."""

import json
import math
import random
from functools import lru_cache

import pytest

from slm.core.metrics.intervals import Interval, bootstrap_mean, paired_means, paired_shares, wilson
from slm.core.metrics.objects import NotJson, fields_f1, parsed_json
from slm.core.metrics.scoring import METRICS, choice_scores, difference, interval, reply_scores
from slm.core.metrics.words import exact, f1, longest_common, rouge_1, rouge_l, rouge_words, squad_exact, squad_words
from slm.core.task import METRICS as NAMES
from slm.core.task import MetricName, TaskRow
from slm.core.tools import FUNCTION_GEMMA, STYLES, Call, written


@pytest.mark.parametrize(
    ("expected", "reply", "plain", "squad"),
    [
        ("Paris", "Paris", True, True),
        ("Paris", " Paris\n", True, True),
        ("two  words", "two words", True, True),
        ("é", "e\u0301", True, False),  # composed and decomposed; SQuAD compares code points
        ("Paris", "paris.", False, True),
        ("The Cat", "cat", False, True),
        ("Paris", "London", False, False),
        ("Paris", "", False, False),
        ("A", "", False, False),  # nothing would be left of "A" in SQuAD's normalization
        ("A", "the", False, False),
        ("A", "a.", False, True),
        ("?", "!", False, False),
        ("3.5", "35", False, True),  # as SQuAD defines it; the reason why exact match does not normalize
        ("C#", "C", False, True),
    ],
)
def test_exact_match(expected: str, reply: str, plain: bool, squad: bool) -> None:
    assert exact(expected, reply) is plain and squad_exact(expected, reply) is squad


def test_words_of_squad() -> None:
    assert squad_words("The U.S. Army, an army of a nation") == ["us", "army", "army", "of", "nation"]
    assert squad_words("") == [] and squad_words("the") == ["the"] and squad_words("--") == ["--"]


@pytest.mark.parametrize(
    ("expected", "reply", "wanted"),
    [
        ("the cat sat on the mat", "a cat on a mat!", 6 / 7),  # precision 3/3, recall 3/4
        ("red red blue", "red", 1 / 2),  # precision 1/1, recall 1/3
        ("red", "red red blue", 1 / 2),
        ("one two", "one two", 1.0),
        ("one two", "two one", 1.0),  # the order does not count
        ("one two", "three", 0.0),
        ("one", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_f1_of_words(expected: str, reply: str, wanted: float) -> None:
    assert f1(expected, reply) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("expected", "reply", "unigrams", "subsequence"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4, 3 / 4),  # the example of Lin 2004
        ("police killed the gunman", "the gunman kill police", 3 / 4, 2 / 4),
        ("a b c d", "a c", 2 / 3, 2 / 3),
        ("Don't stop!", "don t stop", 1.0, 1.0),
        ("one two", "three", 0.0, 0.0),
        ("one two", "", 0.0, 0.0),
        ("東京タワー", "東京", 4 / 7, 4 / 7),  # five words and two
    ],
)
def test_rouge(expected: str, reply: str, unigrams: float, subsequence: float) -> None:
    assert rouge_1(expected, reply) == pytest.approx(unigrams)
    assert rouge_l(expected, reply) == pytest.approx(subsequence)


def test_words_of_rouge() -> None:
    assert rouge_words("It's 3.5 %, naïve_and 東京v2") == ["it", "s", "3", "5", "naïve", "and", "東", "京", "v2"]


def test_the_longest_common_subsequence_is_that_of_the_textbook() -> None:
    def plain(first: tuple[str, ...], second: tuple[str, ...]) -> int:
        @lru_cache(None)
        def length(i: int, j: int) -> int:
            if not i or not j:
                return 0
            if first[i - 1] == second[j - 1]:
                return length(i - 1, j - 1) + 1
            return max(length(i - 1, j), length(i, j - 1))

        return length(len(first), len(second))

    drawn = random.Random(3)
    for _ in range(200):
        pair = [tuple(drawn.choices("abcd", k=drawn.randrange(30))) for _ in range(2)]
        assert longest_common(*pair) == plain(*pair)


def test_a_long_reference_takes_little_time() -> None:
    """With the table of the textbook, this comparison has 10 billion cells."""
    words = [str(i % 1000) for i in range(1_000_000)]
    assert longest_common(words, words[:10_000]) == 10_000


@pytest.mark.parametrize(
    ("expected", "reply", "equal", "valid", "fields"),
    [
        ('{"a": 1, "b": "x"}', ' {"b": "x", "a": 1.0}\n', 1, 1, 1.0),
        ('{"a": 1, "b": "x"}', '{"a": 1, "b": "y"}', 0, 1, 1 / 2),
        ('{"a": 1, "b": "x"}', '{"a": 1}', 0, 1, 2 / 3),
        ('{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 0, 1, 1 / 2),
        ('{"a": 1}', '{"a": true}', 0, 1, 0.0),
        ('{"a": 0}', '{"a": false}', 0, 1, 0.0),
        ('{"a": "1"}', '{"a": 1}', 0, 1, 0.0),
        ('{"a": null}', "{}", 0, 1, 0.0),
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0, 1, 1 / 2),
        ("[1, 2]", "[2, 1]", 0, 1, 0.0),
        ('{"a": 0.1}', '{"a": 0.10}', 1, 1, 1.0),
        ('{"a": 1e999}', '{"a": 1e998}', 0, 1, 0.0),  # both are infinite as floating-point numbers
        ("{}", "{}", 1, 1, 1.0),
        ("{}", "[]", 0, 1, 0.0),
        ('{"a": 1}', '```json\n{"a": 1}\n```', 0, 0, 0.0),
        ('{"a": 1}', '{"a": 1} and more', 0, 0, 0.0),
        ('{"a": 1}', '{"a": 2, "a": 1}', 0, 0, 0.0),
        ('{"a": 1}', "{'a': 1}", 0, 0, 0.0),
        ('{"a": 1}', '{"a": NaN}', 0, 0, 0.0),
        ('{"a": 1}', "", 0, 0, 0.0),
        ('{"a": 1}', "[" * 100_000, 0, 0, 0.0),
        ('{"a": 1}', "[" * 300 + "]" * 300, 0, 0, 0.0),
        ('{"a": 1}', '{"a": ' + "9" * 5000 + "}", 0, 0, 0.0),
        ('{"a": 1}', '{"a": 1e' + "9" * 30 + "}", 0, 0, 0.0),
    ],
)
def test_json(expected: str, reply: str, equal: int, valid: int, fields: float) -> None:
    found = reply_scores("json", TaskRow("", expected, ""), reply)
    assert found == {"score": equal, "valid": valid, "fields_f1": pytest.approx(fields)}


def test_json_that_is_too_deep_is_named() -> None:
    with pytest.raises(NotJson, match="nested too deep"):
        parsed_json("[" * 300 + "]" * 300)
    deep = parsed_json("[" * 150 + "]" * 150)  # negative control
    assert fields_f1(deep, deep) == 1.0


ON, OFF = Call("set_light", {"room": "kitchen", "on": True}), Call("set_light", {"room": "kitchen", "on": False})
WARM = Call("set_heat", {"degrees": 21})
OPEN = "<tool_call>"


@pytest.mark.parametrize(
    ("expected", "reply", "score", "names", "valid"),
    [
        ([ON], written([ON]), 1, 1, 1),
        (
            [ON],
            'Sure.\n<tool_call>{"name": "set_light", "arguments": {"on": true, "room": "kitchen"}}</tool_call>',
            1,
            1,
            1,
        ),
        ([WARM], '<tool_call>{"name": "set_heat", "arguments": {"degrees": 21.0}}</tool_call>', 1, 1, 1),
        ([ON], written([OFF]), 0, 1, 1),
        ([ON], '<tool_call>{"name": "set_light", "arguments": {"room": "kitchen", "on": 1}}</tool_call>', 0, 1, 1),
        ([ON], '<tool_call>{"name": "set_light", "arguments": {"room": "kitchen"}}</tool_call>', 0, 1, 1),
        ([ON], written([Call("set_light", {**ON.arguments, "level": 5})]), 0, 1, 1),
        ([ON], written([WARM]), 0, 0, 1),
        ([ON], "The light is on.", 0, 0, 1),
        ([ON], f'{OPEN}{{"name": "set_light", "arguments": {{"room": "kitchen"', 0, 0, 0),
        ([ON, WARM], written([WARM, ON]), 1, 1, 1),  # the order does not count
        ([ON, ON], written([ON]), 0, 0, 1),  # but the number does
        ([ON], written([ON, ON]), 0, 0, 1),
        ([ON, WARM], written([ON]), 0, 0, 1),
        ([], "I cannot do that.", 1, 1, 1),
        ([], written([ON]), 0, 0, 1),
        ([], f"{OPEN} set_light", 0, 0, 0),  # no call, but an attempt
    ],
)
def test_calls_of_tools(expected: list[Call], reply: str, score: int, names: int, valid: int) -> None:
    row = TaskRow("", "", "", calls=tuple(expected))
    assert reply_scores("tool-call", row, reply) == {"score": score, "names": names, "valid": valid}


def test_calls_in_the_format_of_the_model() -> None:
    row = TaskRow("", "", "", calls=(ON,))
    for style in STYLES:
        assert reply_scores("tool-call", row, written([ON], style), style)["score"] == 1
    assert reply_scores("tool-call", row, written([ON]), FUNCTION_GEMMA)["score"] == 0  # it does not speak that format


def test_choices() -> None:
    row = TaskRow("", "yes", "", ("no", "yes", "maybe not"))
    assert choice_scores(row, [-2.0, -1.0, -1.5]) == ("yes", {"score": 1.0, "per_byte": 0.0})  # -1.5 / 9 bytes
    assert choice_scores(row, [-1.0, -2.0, -30.0]) == ("no", {"score": 0.0, "per_byte": 0.0})
    assert choice_scores(row, [math.nan, -2.0, math.nan]) == ("yes", {"score": 1.0, "per_byte": 1.0})
    assert choice_scores(row, [math.nan] * 3)[1]["score"] == 0.0


@pytest.mark.parametrize("metric", [name for name in NAMES if name not in ("choice", "tool-call")])
def test_every_metric_gives_1_to_the_expected_reply_and_0_to_another(metric: MetricName) -> None:
    expected = json.dumps({"name": "right", "n": 1})
    row = TaskRow("", expected, "")
    right, wrong = (reply_scores(metric, row, reply) for reply in (expected, "false"))
    assert set(right.values()) == {1.0} and wrong["score"] == 0.0
    assert [*right] == ["score", *METRICS[metric].others] == [*wrong]


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == Interval(pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson(count - hits, count)
    assert mirrored == Interval(pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))
    assert wilson(hits, count).holds(hits / count)


def test_the_difference_of_shares() -> None:
    before = [True] * 5 + [False] * 5
    after = [True] * 4 + [False] + [True] * 4 + [False]  # one row lost, four won
    # (4 + 1 - 1 - 1) / 12, and a variance of (7/12 - (3/12)²) / 12 = (5/24)².
    half = 1.959963984540054 * 5 / 24
    assert paired_shares(before, after) == Interval(pytest.approx(0.25 - half), pytest.approx(0.25 + half))
    assert paired_shares(after, before) == Interval(pytest.approx(-0.25 - half), pytest.approx(half - 0.25))
    same = paired_shares(before, before)
    assert same.low == -same.high and 0 < same.high < 0.3
    all_won = paired_shares([False] * 50, [True] * 50)
    assert all_won.low > 0.85 and all_won.high == 1.0


def test_the_bootstrap() -> None:
    values = [0.0] * 50 + [1.0] * 50
    found = bootstrap_mean(values)
    assert found == bootstrap_mean(values) == bootstrap_mean(values[::-1])
    # The mean of a resample has the standard deviation 0.5 / 10.
    assert found == Interval(pytest.approx(0.402, abs=0.015), pytest.approx(0.598, abs=0.015))
    many = bootstrap_mean([i / 999 for i in range(1000)])
    half = 1.959963984540054 * math.sqrt((1 / 12) / 1000)
    assert many == Interval(pytest.approx(0.5 - half, abs=0.002), pytest.approx(0.5 + half, abs=0.002))
    assert bootstrap_mean([0.25, 0.25]) == Interval(0.25, 0.25)


def test_the_difference_of_means_is_that_of_rows() -> None:
    """Rows differ much from each other, and each by the same amount from its pair: the difference is certain."""
    before = [i / 8 for i in range(8)]
    after = [value + 0.125 for value in before]
    assert paired_means(before, after) == Interval(0.125, 0.125)
    assert bootstrap_mean(after).high - bootstrap_mean(after).low > 0.3  # negative control: unpaired, it is not


def test_shares_and_means_have_their_own_intervals() -> None:
    scores = [1.0] * 15 + [0.0] * 133
    assert interval("exact", scores) == wilson(15, 148) != interval("f1", scores) == bootstrap_mean(scores)
    assert difference("json", scores, scores) == paired_shares([True] * 148, [True] * 148)
    assert difference("rouge", scores, scores) == Interval(0.0, 0.0)
