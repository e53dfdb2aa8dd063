"""Memory that a process does not use goes back to the system, and every value stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slm.core.manifest import Bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import session, unused
from slm.runtime.decoder import PREFILL_CHUNK, OnnxDecoder

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Maps a file of 8 MiB twice, reads both, and changes one private page.
_MAPPED = """
import json, mmap, sys
from pathlib import Path
from slm.runtime.unused import page_out

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

path, other = map(Path, sys.argv[1:])
files = [file.open("rb") for file in (path, other)]
maps = [mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) for file in files]
maps[0][5] = 77
sums = [sum(each[::4096]) for each in maps]
before = rss()
mapped = page_out(path)
after = rss()
same = [sum(each[::4096]) for each in maps] == sums and maps[0][5] == 77
print(json.dumps({"mapped": mapped, "freed": before - after, "same": same, "none": page_out(path.with_name("absent"))}))
"""


@LINUX
def test_a_mapped_file_leaves_the_resident_memory_and_keeps_its_values(tmp_path: Path) -> None:
    paths = tmp_path / "weights with spaces", tmp_path / "other"
    for path in paths:
        path.write_bytes(bytes(range(256)) * (8 << 12))
    run = subprocess.run([sys.executable, "-c", _MAPPED, *map(str, paths)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["mapped"] == 8 << 20 and found["same"] and found["none"] == 0
    assert 4 << 20 < found["freed"] < 12 << 20  # of the one file alone


# Maps a file of 8 MiB, reads it, takes it out of memory, and reads it again.
_READ_AGAIN = """
import json, mmap, resource, sys
from pathlib import Path
from slm.runtime import unused

if sys.argv[2] == "evict":
    unused._MADV_DONTNEED = unused._MADV_PAGEOUT
path = Path(sys.argv[1])
with path.open("rb") as file:
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
first = sum(memory[::4096])
unused.page_out(path)
before = resource.getrusage(resource.RUSAGE_SELF)
same = sum(memory[::4096]) == first
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([same, after.ru_minflt - before.ru_minflt, after.ru_majflt - before.ru_majflt]))
"""


def faults(path: Path, advice: str) -> tuple[bool, int, int]:
    """Returns whether the values are the same, and the faults of the second reading: from memory, and from the disk."""
    run = subprocess.run(
        [sys.executable, "-c", _READ_AGAIN, str(path), advice], capture_output=True, text=True, check=True
    )
    same, minor, major = json.loads(run.stdout)
    return same, minor, major


@LINUX
def test_unchanged_pages_stay_in_the_system_s_cache(tmp_path: Path) -> None:
    """Otherwise the first steps after a long prompt would read the embedding from the disk."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (8 << 12))
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # only clean pages can be evicted
    same, minor, major = faults(path, "keep")
    assert same and minor > 0 and major == 0  # the pages were unmapped, and mapped again
    same, _, major = faults(path, "evict")
    assert same
    if not major:
        pytest.skip("this file system is in memory")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_returned() -> None:
    script = """
import ctypes, json
from pathlib import Path
from slm.runtime.unused import trim_freed_memory
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(1000) for _ in range(40_000)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, 1000)
for block in blocks[:-1]:  # the last one keeps the top of the heap
    libc.free(ctypes.c_void_p(block))
before = rss()
trim_freed_memory()
print(json.dumps([hasattr(libc, "malloc_trim"), before - rss()]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    glibc, freed = json.loads(run.stdout)
    assert not glibc or freed > 20 << 20


@LINUX
def test_the_embedding_stays_in_its_file(
    shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime does not copy the reshaped table, and the logits are those of a session that does."""
    monkeypatch.setattr(session, "_LARGEST_FOLDED", 1024)
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
    settings = Settings(smooth=False, cache="float32", gate=Gate(None))
    bundle, _ = quantize_bundle(shared_bundle, tmp_path / "made", text, settings, None, text)
    limited = OnnxDecoder(bundle, threads=1)
    assert limited.session.get_session_options().get_session_config_entry(session._FOLDING_LIMIT) == "1024"
    monkeypatch.setattr(session, "_LARGEST_FOLDED", 1 << 40)
    folded = OnnxDecoder(bundle, threads=1)
    for token in (5, 300, 17):
        np.testing.assert_array_equal(limited.read([token]), folded.read([token]))
    monkeypatch.setattr(unused, "_SMAPS", Path("/proc/self/smaps"))
    assert unused.page_out(session.weights_file(bundle)) > 0  # the table is mapped


def test_long_prompts_return_their_memory(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("slm.runtime.decoder.trim_freed_memory", lambda: calls.append("freed"))
    decoder = OnnxDecoder(shared_bundle, threads=1)
    decoder.read([1, 2, 3])
    assert not calls
    decoder.after_prompt(PREFILL_CHUNK)
    assert calls == ["freed"]
