"""Huge pages: memory is moved with its content, and no absent page becomes resident."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from slm.runtime import hugepages

_COLLAPSE_SINCE = (6, 1)

# Sixteen MiB: the first half written, of the second half one page in each two MiB.
_SCRIPT = """
import json, mmap
from pathlib import Path
from slm.runtime.hugepages import use_huge_pages

def kib(name):
    return int(Path("/proc/self/smaps_rollup").read_text().split(name + ":")[1].split()[0])

half, page = 8 << 20, mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if hasattr(mmap, "MADV_NOHUGEPAGE"):
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # whatever the system's default is
pattern = bytes(range(256)) * (half // 256)
memory[:half] = pattern
for start in range(half, 2 * half, 2 << 20):
    memory[start : start + page] = b"x" * page
before, huge = kib("Rss"), kib("AnonHugePages")
moved = use_huge_pages()
print(json.dumps({
    "moved": moved, "rss": kib("Rss") - before, "huge": kib("AnonHugePages") - huge,
    "same": memory[:half] == pattern and memory[half : half + page] == b"x" * page,
}))
"""


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])


@pytest.mark.skipif(
    sys.platform != "linux" or not hugepages._HUGE_PAGE_SIZE.exists() or _release() < _COLLAPSE_SINCE,
    reason="Linux 6.1 or later, with transparent huge pages",
)
def test_full_blocks_move_and_sparse_ones_stay():
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["same"]
    # Alignment may cost a block at each end.
    assert found["moved"] >= found["huge"] << 10 >= 4 << 20
    assert found["rss"] < 2 << 10


def test_nothing_happens_without_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hugepages, "_HUGE_PAGE_SIZE", tmp_path / "none")
    assert hugepages.use_huge_pages() == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hugepages.use_huge_pages() == 0


def test_only_private_anonymous_memory_counts():
    maps = (
        "55d0c0a00000-55d0c1400000 rw-p 00000000 00:00 0                          [heap]\n"
        "7f0000000000-7f0000800000 rw-p 00000000 00:00 0 \n"
        "7f1000000000-7f1000800000 r--p 00000000 00:00 0 \n"
        "7f2000000000-7f2000800000 rw-s 00000000 00:01 7 /dev/zero (deleted)\n"
        "7f3000000000-7f3000800000 rw-p 00000000 fe:00 9 /usr/lib/libthing.so\n"
        "7ffc00000000-7ffc00800000 rw-p 00000000 00:00 0                          [stack]\n"
    )
    assert [found[1] for found in hugepages._ANONYMOUS.finditer(maps)] == ["55d0c0a00000", "7f0000000000"]
