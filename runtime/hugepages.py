"""Moves the memory that a session reads at every step into Linux's huge pages.

A step reads each weight once, so most 4 KiB pages miss the processor's translation cache. A translation of a huge page (2 MiB
on x86) covers 512 times as much memory. glibc's malloc requests huge pages only if GLIBC_TUNABLES was set before the process
started, so the memory is moved after its allocation.
"""

import ctypes
import errno
import mmap
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS = Path("/proc/self/maps")
_PAGEMAP = Path("/proc/self/pagemap")
# Private anonymous memory: the heap, and the mappings that malloc creates. The last column is an optional name.
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(\[heap\])?$", re.MULTILINE)
# A bit of the 64-bit entries in /proc/self/pagemap: the page is present in memory.
_PRESENT = np.uint64(1 << 63)
# Blocks with a smaller share of present pages are left alone: filling them up would take memory that nothing uses.
_RESIDENT = 0.875
# asm-generic/mman-common.h: mark for huge pages; move into them now (since Linux 6.1).
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_huge_pages() -> int:
    """Moves this process's large resident blocks of memory into huge pages, if Linux allows it.

    Before Linux 6.1 the blocks are only marked, and the kernel moves them later.

    Returns:
        Bytes moved; 0 on other systems.
    """
    try:
        size = int(_HUGE_PAGE_SIZE.read_text(encoding="ascii"))
        runs = list(_resident(size))
    except (OSError, ValueError):  # a kernel or a sandbox without huge pages
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, length in runs:
        libc.madvise(start, length, _MADV_HUGEPAGE)
        if libc.madvise(start, length, _MADV_COLLAPSE) == 0:
            moved += length
        elif (
            ctypes.get_errno() != errno.EAGAIN
        ):  # EAGAIN reports a busy page; any other error, that the block cannot be moved
            break
    return moved


def _resident(size: int) -> Iterator[tuple[int, int]]:
    """Yields address and length of each run of resident blocks of `size` bytes, aligned to `size`."""
    pages = size // mmap.PAGESIZE
    with _PAGEMAP.open("rb", buffering=0) as pagemap:
        for found in _ANONYMOUS.finditer(_MAPS.read_text(encoding="utf-8", errors="replace")):
            first, end = -(-int(found[1], 16) // size), int(found[2], 16) // size
            blocks = range(first, end)
            if not blocks:
                continue
            pagemap.seek(first * pages * 8)
            entries = np.frombuffer(pagemap.read(len(blocks) * pages * 8), np.uint64)
            whole = entries[: len(entries) // pages * pages].reshape(-1, pages)
            full = (np.count_nonzero(whole >= _PRESENT, axis=1) >= _RESIDENT * pages).tolist()
            for resident, run in groupby(range(len(full)), full.__getitem__):
                if resident:
                    indices = list(run)
                    yield (first + indices[0]) * size, len(indices) * size
