"""Preparation on a cluster: how jobs are scheduled, and how the text is divided among them."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.progress import Silent
from slm.train.data.cluster import layout
from slm.train.data.cluster.jobs import Job, run_jobs
from slm.train.data.cluster.layout import Slice, packed, parts_of, shards_of, unpacked
from slm.train.data.sources import FileRange, LocalFile
from tests.progress import Notes
from tests.train.test_cluster import small_parts  # noqa: F401  # a fixture for every test


class Names:
    """A cluster that only counts."""

    def __init__(self, slots: list[int], results: list[Any]) -> None:
        self.free, self.results, self.started, self.ended = slots, results, 0, 0
        self.most, self.cancelled = 0, 0

    def slots(self) -> int:
        return self.free[min(self.ended, len(self.free) - 1)]

    def submit(self, task: str, spec: dict[str, Any]) -> int:
        self.started += 1
        self.most = max(self.most, self.started - self.ended)
        return self.started

    def wait(self, handles: list[int]) -> int | None:
        return self.results[0] if self.results and self.results[0] is None and self.results.pop(0) else handles[0]

    def result(self, handle: int) -> bytes:
        self.ended += 1
        return b""

    def cancel(self, handles: list[int]) -> None:
        self.cancelled += len(handles)


def some_jobs(number: int) -> Iterator[Job]:
    return (Job(f"job {index}", "none", {}) for index in range(number))


def test_jobs_in_flight_follow_the_cluster_and_the_limit() -> None:
    small, growing, limited = Names([1], []), Names([1, 1, 1, 5], []), Names([9], [])
    assert len(list(run_jobs(some_jobs(30), small, Silent()))) == 30 and small.most == 2
    assert len(list(run_jobs(some_jobs(30), growing, Silent()))) == 30 and growing.most == 10
    assert len(list(run_jobs(some_jobs(30), limited, Silent(), 3))) == 30 and limited.most == 3


def test_a_cluster_without_machines_is_waited_for() -> None:
    class Empty(Names):
        quiet = 5

        def wait(self, handles: list[int]) -> int | None:
            self.quiet -= 1
            return None if self.quiet > 0 else handles[0]

    notes = Notes()
    assert len(list(run_jobs(some_jobs(3), Empty([0], []), notes))) == 3
    assert notes.lines == ["no machine is left in the cluster: waiting for one to join"]


def test_what_is_left_running_is_cancelled() -> None:
    cluster = Names([4], [])
    ended = run_jobs(some_jobs(30), cluster, Silent())
    next(ended)
    ended.close()
    assert cluster.cancelled == 7


def test_shards_end_with_the_document_that_reaches_the_tokens() -> None:
    random = np.random.default_rng(0)
    parts = [
        (f"p{number}", random.integers(1, 60, size).astype(np.uint64), random.integers(1, 300, size).astype(np.uint64))
        for number, size in enumerate((5, 0, 40, 1, 17))
    ]
    for limit in (1, 30, 59, 100, 10**6):
        expected: list[list[tuple[str, int, int]]] = [[]]
        filled = 0
        for name, tokens, sizes in parts:
            for token, size in zip(tokens.tolist(), sizes.tolist(), strict=True):
                expected[-1].append((name, token, size))
                filled += token
                if filled >= limit:
                    expected.append([])
                    filled = 0
        expected = [shard for shard in expected if shard]
        found = list(shards_of(parts, limit))
        assert len(found) == len(expected)
        for shard, documents in zip(found, expected, strict=True):
            assert sum(one.tokens[1] - one.tokens[0] for one in shard) == sum(token for _, token, _ in documents)
            assert sum(one.text[1] - one.text[0] for one in shard) == sum(size for _, _, size in documents)
            assert sum(one.documents for one in shard) == len(documents)
            assert [one.part for one in shard] == list(dict.fromkeys(name for name, _, _ in documents))
    assert next(shards_of(parts, 1)) == [Slice("p0", (0, int(parts[0][1][0])), (0, int(parts[0][2][0])), 1)]


def test_parts_cover_every_document_once() -> None:
    sizes = ((10, 900), (1, 50_000), (400, 90_000), (3, 10), (3, 10), (2, 3_990))
    sources = [LocalFile(Path(f"{number}.txt")) for number in range(len(sizes))]
    ranges = [FileRange(source, 7, documents, size) for source, (documents, size) in zip(sources, sizes, strict=True)]
    parts = parts_of("train", ranges)
    assert [part.number for part in parts] == list(range(len(parts)))
    pieces = [piece for part in parts for piece in part.ranges]
    for whole in ranges:
        mine = [piece for piece in pieces if piece.source is whole.source]
        assert mine[0].first == 7 and sum(piece.documents for piece in mine) == whole.documents
        assert all(one.first + one.documents == other.first for one, other in itertools.pairwise(mine))
        assert len(mine) <= layout.MOST_PER_FILE
    assert all(sum(piece.bytes for piece in part.ranges) <= 4000 or len(part.ranges) == 1 for part in parts)


class Counted(int):
    """A number of bytes that counts how often it is added."""

    additions = 0

    def __add__(self, other: int) -> int:
        Counted.additions += 1
        return int(self) + int(other)

    __radd__ = __add__

    def __floordiv__(self, other: int) -> "Counted":
        return Counted(int(self) // other)


def test_the_work_of_the_division_is_linear_in_the_number_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "additions", 0)
    ranges = [FileRange(LocalFile(Path(f"{number}.txt")), 0, 1, Counted(1)) for number in range(3_000)]
    (part,) = parts_of("train", ranges)
    assert len(part.ranges) == 3_000 and 0 < Counted.additions <= 3 * 3_000


def test_bits_of_kept_documents() -> None:
    kept = [True, False, True, True, False, False, False, True, True, False]
    assert unpacked(packed(kept), len(kept)).tolist() == kept
