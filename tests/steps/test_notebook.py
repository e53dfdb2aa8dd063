"""examples/assistant.ipynb: its cells run on a few rows, and its stored outputs are those of a clean run."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "assistant.ipynb"
# Parts of paths and names of a machine that nobody else has.
OF_A_MACHINE = ("/home/", "/root/", "/tmp/", "/work/", "/Users/", "site-packages", "localhost")


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def text(cell: dict[str, Any]) -> str:
    """What a cell printed."""
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(stream["text"]) for stream in streams if stream["name"] == "stdout")


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


@pytest.fixture
def rows() -> None:
    for name in ("rows", "reworded"):
        lines = (EXAMPLES / "faq" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:4]), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("rows", "short_answers")
def test_every_cell_runs() -> None:
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for cell in cells():
            code = source(cell).replace("max_tokens=32", "max_tokens=4")
            exec(code, names)
            if is_parameters(cell):
                names |= {"epochs": 1, "rows": "rows.jsonl", "reworded": "reworded.jsonl"}
    shown = printed.getvalue()
    assert "rows.jsonl: 4 rows" in shown and "runs/stories/adapters/rows: loss" in shown
    assert names["small"].path == Path("runs/stories/onnx-rows-int8") and len(names["scores"].results) == 4
    assert Path("runs/eval-reworded/report.html").is_file()


def test_what_the_notebook_prints_about_its_rows_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    names: dict[str, Any] = {}
    first, second = cells()[:2]
    assert is_parameters(first)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(source(first), names)
        exec(source(second), names)
    assert printed.getvalue() == text(second) and "60 rows" in text(second)


def test_the_stored_outputs_are_of_one_clean_run() -> None:
    found = cells()
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    stored = NOTEBOOK.read_text(encoding="utf-8")
    assert [part for part in OF_A_MACHINE if part in stored] == [] and len(stored) < 60_000


def test_the_stored_figures_are_those_of_a_tuned_model() -> None:
    """Most of the 60 learned answers are exact, with the adapter, in float32 and in INT8, and none is with the base."""
    tables = [cell for cell in cells() if any("text/html" in output.get("data", ()) for output in cell["outputs"])]
    assert len(tables) == 2
    learned = next(output for output in tables[0]["outputs"] if "text/html" in output.get("data", ()))
    scores = re.search(r"scores=\{(.*)\}", "".join(learned["data"]["text/plain"]))
    assert scores is not None
    values = [float(pair.rpartition(": ")[2]) for pair in scores[1].split(", ")]
    assert len(values) == 4 and values[0] < 0.1 and min(values[1:]) >= 0.95  # 57 of 60
