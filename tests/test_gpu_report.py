"""The report of `make test-gpu`; needs no GPU."""

import json
from pathlib import Path

from tests.gpu.report import write_report


def test_it_names_what_failed_and_has_a_row_for_each_figure(tmp_path: Path) -> None:
    figures = [
        {"check": "answering", "what": "prefill | chunk", "value": 0.00321, "limit": 0.05, "unit": "σ"},
        {"check": "doctor", "what": "problems", "value": 0, "limit": None, "unit": ""},
    ]
    tests = [
        {"name": "test_a.py::test_one", "outcome": "passed", "seconds": 1.5},
        {"name": "test_a.py::test_two", "outcome": "failed", "seconds": 2.0, "reason": "assert 1 == 2"},
        {"name": "test_b.py::test_three", "outcome": "skipped", "seconds": 0.0, "reason": "the GPU emulates it"},
    ]
    data, table = write_report(tmp_path / "out", {"device": "Tesla T4", "driver": "580.65"}, figures, tests)
    report = json.loads(data.read_text(encoding="utf-8"))
    assert report["figures"] == figures and report["tests"] == tests and report["machine"]["device"] == "Tesla T4"
    text = table.read_text(encoding="utf-8")
    assert "1 passed, 1 failed, 1 skipped in 4 s" in text and "device Tesla T4, driver 580.65" in text
    assert "- failed: test_a.py::test_two: assert 1 == 2" in text and "test_one" not in text
    assert "| answering | prefill \\| chunk | 0.00321 σ | 0.05 σ |" in text
    assert "| doctor | problems | 0 |  |" in text
