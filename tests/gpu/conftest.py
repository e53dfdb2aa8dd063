"""What the GPU checks share: the place where they run, figures, and the report at the end."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.machine import usable_cores
from slm.core.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer
from tests.gpu.report import Figure, write_report
from tests.gpu.rig import Rig

_FIGURE = "gpu figure"
Record = Callable[..., None]


class Results:
    """Collects what every test of this directory did and measured."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes a phase of a test: its call, or a setup that skipped or failed."""
        if "tests/gpu/" not in report.nodeid or not (report.when == "call" or report.outcome != "passed"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else _last_line(report.longreprtext)
        test = {"name": report.nodeid.partition("tests/gpu/")[2], "outcome": report.outcome, "seconds": report.duration}
        self.tests.append(test if report.outcome == "passed" else test | {"reason": reason})
        self.figures += [value for name, value in report.user_properties if name == _FIGURE]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines() or [""]
    return lines[0].removeprefix("E").strip()[:200]


def pytest_configure(config: pytest.Config) -> None:
    """Collects results in the process that prints them, which with several workers is none of the workers."""
    if not hasattr(config, "workerinput") and not config.pluginmanager.has_plugin("gpu-results"):
        config.pluginmanager.register(Results(), "gpu-results")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Writes the report, where anything ran."""
    results, rehearsal = config.pluginmanager.get_plugin("gpu-results"), config.getoption("--rehearse")
    if results is None or not results.tests or not (rehearsal or torch.cuda.is_available()):
        return
    directory = config.rootpath / "build" / ("gpu-rehearsal" if rehearsal else "gpu")
    files = write_report(directory, Rig(rehearsal).about(), results.figures, results.tests)
    terminalreporter.write_line(f"wrote {files[0]} and {files[1]}")


@pytest.fixture(scope="session")
def rig(request: pytest.FixtureRequest) -> Rig:
    """Where the checks run; without a GPU they are skipped unless rehearsed."""
    if request.config.getoption("--rehearse"):
        return Rig(rehearsal=True)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; --rehearse runs the same checks on the CPU")
    torch.set_num_threads(usable_cores())  # which `tests/conftest.py` limits to one
    return Rig(rehearsal=False)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Puts a figure into the report: (what, value, limit=None, unit="")."""

    def put(what: str, value: float | str, limit: float | None = None, unit: str = "") -> None:
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no such numbers
        check = request.node.path.stem.removeprefix("test_")
        figure = {"check": check, "what": what, "value": value, "limit": limit, "unit": unit}
        request.node.user_properties.append((_FIGURE, figure))

    return put


@pytest.fixture(scope="session")
def text(stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories to train on."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("".join(f"{story.strip()}\n{END_OF_TEXT}\n" for story in stories), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of 320 tokens as a file."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory / TOKENIZER_FILE
