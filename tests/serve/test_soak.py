"""A few seconds of `benchmarks/soak.py`: its comparisons, and that they detect errors."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slm.core.manifest import Bundle
from tests.scripts import script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = 12


@pytest.fixture(scope="module")
def soaking() -> Iterator[ModuleType]:
    """The benchmark as a module; it finds the one beside it as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield script(BENCHMARKS / "soak.py", patch)


@pytest.fixture
def server(soaking: ModuleType, shared_bundle: Bundle, tmp_path: Path) -> Iterator[Any]:
    server = soaking.Server(str(shared_bundle.path), [], tmp_path / "log", threads=1)
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def test_mixed_requests_for_seconds(soaking: ModuleType, server: Any) -> None:
    known = asyncio.run(soaking.answers_alone(server.port, soaking.questions([soaking.MODEL])))
    assert len({tuple(texts) for texts in known.values()}) > 0.6 * len(known)  # mixed-up ones would differ
    found = asyncio.run(soaking.soak(server, known, SECONDS))
    metrics = asyncio.run(soaking.settled(server))
    found.rss_mib = [1.0]  # so few seconds say nothing of memory
    soaking.judged(found, metrics)
    assert not found.wrong
    assert all(found.counts[what] for what in ("stream", "whole", "gone", "killed", "slow", "429"))
    assert server.stop() == 128 + 15
    # Negative control: a completion of another request, or a text that never ended.
    question, other = next(iter(known)), list(known.values())[1]
    reply = soaking.Reply(200, events=[{"choices": [{"index": 0, "text": known[question][0]}]}], complete=True)
    assert soaking.difference(reply, "stream", known[question]) is None
    assert "wanted" in soaking.difference(reply, "stream", other)
    reply.complete = False
    assert "not whole" in soaking.difference(reply, "stream", known[question])
    soaking.judged(found, metrics | {"slm_requests_total": metrics["slm_requests_total"] + 1, "slm_running": 1})
    assert found.wrong == ["1 texts still under way", "1 texts that never ended"]


def test_memory_that_grows_is_told(soaking: ModuleType) -> None:
    assert soaking.growth([50.0] * 20 + [100.0] * 80)[2] == 0
    assert soaking.growth([100.0 + second / 10 for second in range(100)])[2] > soaking.FLAT


def test_a_server_that_mixes_answers_up_is_found_out(soaking: ModuleType, server: Any) -> None:
    """Negative control of the whole benchmark: the expected text is that of another request."""
    asked = soaking.questions([soaking.MODEL])[:5]
    known = asyncio.run(soaking.answers_alone(server.port, asked))
    swapped = dict(zip(known, [*list(known.values())[1:], next(iter(known.values()))], strict=True))
    found = asyncio.run(soaking.soak(server, swapped, 1.5))
    assert any("wanted" in line for line in found.wrong)
