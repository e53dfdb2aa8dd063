"""Which rows are held out: a shuffled tenth, the same for the same seed, no prompt on both sides."""

from collections import Counter

import pytest

from slm.finetune.rows import ChatRow, CompletionRow, Row, TextRow, instruction_row
from slm.finetune.split import learned_before, split_rows


def test_rows_sorted_by_topic_are_held_out_of_every_topic() -> None:
    rows: list[Row] = [CompletionRow(f"{topic} {n}", "x") for topic in "abcd" for n in range(100)]
    split = split_rows(rows, 0)
    assert len(split.held_out) == 40 and len(split.train) == 360
    topics = Counter(row.prompt[0] for row in split.held_out if isinstance(row, CompletionRow))
    # The last tenth would be 40 of "d"; fewer than 3 or more than 20 of a topic: less than one draw in 10,000.
    assert set(topics) == set("abcd") and all(3 <= count <= 20 for count in topics.values())


def test_the_seed_decides() -> None:
    rows: list[Row] = [TextRow(f"text {n}") for n in range(50)]
    first, again, other = (split_rows(rows, seed) for seed in (1, 1, 2))
    assert first == again and first.numbers != other.numbers and first.record != other.record
    assert [rows[number - 1] for number in first.numbers] == first.held_out
    assert sorted(map(repr, first.train + first.held_out)) == sorted(map(repr, rows))
    assert first.train == [row for row in rows if row in first.train]  # in the order of the file


@pytest.mark.parametrize("kind", ["completion", "instruction", "chat", "text"])
def test_no_prompt_is_on_both_sides(kind: str) -> None:
    def row(prompt: int, answer: int) -> Row:
        match kind:
            case "completion":
                return CompletionRow(f"p{prompt} ", f"a{answer}")
            case "instruction":
                return instruction_row(f"p{prompt}", "", f"a{answer}")
            case "text":
                return TextRow(f"p{prompt}")
        asked = ({"role": "system", "content": "s"}, {"role": "user", "content": f"p{prompt}"})
        return ChatRow((*asked, {"role": "assistant", "content": f"a{answer}"}))  # type: ignore[arg-type]  # roles

    rows = [row(number % 40, number) for number in range(200)]
    for seed in range(20):
        split = split_rows(rows, seed)
        assert len(split.held_out) == 20
        held = set(split.numbers)
        assert {n % 40 for n in range(200) if n + 1 in held}.isdisjoint(n % 40 for n in range(200) if n + 1 not in held)


def test_a_prompt_that_most_rows_share_is_no_reason_to_hold_out_nothing() -> None:
    rows: list[Row] = [CompletionRow("Write a story.", f"story {n // 2}") for n in range(100)]
    split = split_rows(rows, 0)
    assert len(split.held_out) == 10
    assert learned_before(split.train, split.held_out) == 0  # equal rows stay together
    assert learned_before(rows, split.held_out) == 10  # the control


@pytest.mark.parametrize("rows", [[], [TextRow("a")] * 9, [TextRow("same")] * 40])
def test_nothing_is_held_out_of_too_little(rows: list[Row]) -> None:
    split = split_rows(rows, 0)
    assert (split.train, split.held_out, split.numbers, split.record) == (rows, [], (), None)
