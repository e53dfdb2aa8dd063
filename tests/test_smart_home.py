"""The rows of examples/smart_home: what `rows.py` writes, and how it rejects wrong options."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slm.finetune.rows import ChatRow, read_rows

ROWS = Path(__file__).parents[1] / "examples" / "smart_home" / "rows.py"


def written(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", ROWS, *options], capture_output=True, encoding="utf-8")


def messages(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_third_of_the_training_rows_with_calls_has_results() -> None:
    """The rows of the test are requests and calls alone: `slm eval` measures the last message."""
    assert written("--train", "300", "--test", "60", "--out", "new/home").returncode == 0
    train, test = messages(Path("new/home/train.jsonl")), messages(Path("new/home/test.jsonl"))
    assert (len(train), len(test)) == (300, 60)
    assert {row[0]["content"].lower() for row in train}.isdisjoint(row[0]["content"].lower() for row in test)
    assert {len(row) for row in test} == {2}
    calling = [row for row in train if row[1].get("tool_calls")]
    answered = [row for row in train if len(row) > 2]
    assert all(row in calling for row in answered) and 0.25 < len(answered) / len(calling) < 0.42
    for row in answered:
        results = [each["content"] for each in row if each["role"] == "tool"]
        assert len(results) == len(row[1]["tool_calls"])
        assert all(each[1:] in row[-1]["content"] for each in results) and "None" not in row[-1]["content"]
    assert all(isinstance(row, ChatRow) for row in read_rows(Path("new/home/train.jsonl")))


@pytest.mark.parametrize(
    ("options", "message"), [(("--train", "-1"), "--train"), (("--test", "x"), "--test"), (("--out", "file"), "--out")]
)
def test_a_wrong_option_is_one_line(options: tuple[str, ...], message: str) -> None:
    Path("file").touch()
    done = written(*options)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not Path("train.jsonl").exists()
