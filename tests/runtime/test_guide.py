"""The examples of docs/generation.md, unchanged, on the bundled demo model."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.runtime import shipped

GUIDE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def run() -> None:
    """Runs an example in a directory where the demo model is at the path of the guide."""
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/onnx-int8").symlink_to(shipped.model_path())


def test_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    printed = []
    for block in blocks:
        exec(block, names)
        printed.append(capsys.readouterr().out)
    assert " sad 506 " in printed[0].splitlines()[2]
    assert printed[1] == "20 length None\nTrue\n" and "# 20 length None" in blocks[1]
    roles = printed[2].splitlines()[-1][printed[2].splitlines()[-1].index("[") :]
    assert roles in blocks[2] and names["again"].messages == names["chat"].messages
    assert names["answer"] == names["chat"].messages[2]["content"]
    model = names["model"]
    assert names["first"].text == model.generate("Once upon a time", max_new_tokens=20, temperature=0)
    assert names["second"].text == model.generate("The fox", max_new_tokens=40, seed=1, stop=".")
    text, stopped = printed[3].splitlines()
    assert text in blocks[3] and stopped == "stop"
    assert printed[4] == "18 0\n18 16\n" and "# 18 0, then 18 16" in blocks[4]
    assert printed[5] == "5 15360\n" and "# 5 15360" in blocks[5]
    drafted, accepted, steps = map(int, printed[6].split())
    assert 0 < accepted <= drafted and steps > 0


def test_the_commands(slm: Callable[..., Any]) -> None:
    lines = [line for line in re.findall(r"^    slm (generate .*)$", GUIDE, flags=re.MULTILINE) if "cuda" not in line]
    assert len(lines) == 4
    for line in lines:
        result = slm(*shlex.split(line.split(" | ")[0]))
        assert result.code == 0 and result.out, result.err
    assert re.search(r"\d+ of \d+ drafted tokens accepted", result.err)
