"""Has Linux keep what a session reads at every step in huge pages.

A step reads each weight once, so nearly every page of 4 KiB is one that the processor has no translation for any more; a
translation of a huge page (2 MiB on x86) serves 512 times as much. glibc's malloc asks for none unless told by
GLIBC_TUNABLES before the process starts, so what it took is moved afterwards.
"""

import ctypes
import errno
import mmap
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS = Path("/proc/self/maps")
_PAGEMAP = Path("/proc/self/pagemap")
# Private memory that is no file's: the heap and what malloc maps beside it. The last column is a name, if any.
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(\[heap\])?$", re.MULTILINE)
# Of /proc/self/pagemap's entries, 64 bits a page: present in memory.
_PRESENT = np.uint64(1 << 63)
# A block with fewer pages than this share is left alone: filling it up would take memory that nothing uses.
_RESIDENT = 0.875
# asm-generic/mman-common.h: mark for huge pages; move into them now (Linux 6.1 on).
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_huge_pages() -> int:
    """Moves this process's large resident blocks of memory into huge pages, where Linux lets it.

    Before Linux 6.1 the blocks are marked only, and the kernel moves them in its own time.

    Returns:
        Bytes moved; 0 on other systems.
    """
    if sys.platform != "linux":
        return 0
    try:
        size = int(_HUGE_PAGE_SIZE.read_text(encoding="ascii"))
        runs = list(_resident(size))
    except (OSError, ValueError):  # a kernel or a sandbox without
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, length in runs:
        libc.madvise(start, length, _MADV_HUGEPAGE)
        if libc.madvise(start, length, _MADV_COLLAPSE) == 0:
            moved += length
        elif ctypes.get_errno() != errno.EAGAIN:  # which says that a page was busy; anything else, that it cannot be
            break
    return moved


def _resident(size: int) -> Iterator[tuple[int, int]]:
    """Yields address and length of each run of blocks of `size` bytes, aligned to it, that are in memory."""
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
