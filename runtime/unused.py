"""Returns memory that a process holds and does not use to the system.

Reading a large tokenizer frees hundreds of megabytes that malloc keeps, and opening a graph reads every weight from its mapped
file once, to store it in another order. Afterwards a step reads only rows of the embedding from the file.
"""

import ctypes
import os
import re
import sys
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
# A mapped file, and the KiB of its pages that this process changed: in memory, and in swap space.
_MAPPED = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(\S.*)\n(?:[A-Z].*\n)*?Anonymous: +(\d+) kB\n(?:[A-Z].*\n)*?Swap: +(\d+) kB$",
    re.MULTILINE,
)
# asm-generic/mman-common.h. The first leaves pages in the system's cache of files, and forgets pages that the process changed.
# The second (since Linux 5.4) keeps changed pages, and takes the others out of the cache: they are read from the disk again.
_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21


def trim_freed_memory() -> None:
    """Returns freed memory to the system, with glibc or macOS; Windows returns it without being asked."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    elif sys.platform == "darwin":
        ctypes.CDLL(None).malloc_zone_pressure_relief(None, ctypes.c_size_t(0))


def page_out(file: Path) -> int:
    """Takes the pages of a mapped file out of this process's resident memory. They are mapped again when they are used.

    Returns:
        The bytes of the file that are mapped; 0 on other systems.
    """
    try:
        maps, name = _SMAPS.read_text(encoding="utf-8", errors="replace"), os.path.realpath(file)
    except OSError:  # a sandbox without /proc
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    mapped = 0
    for found in _MAPPED.finditer(maps):
        if found[3] == name:
            first, end = int(found[1], 16), int(found[2], 16)
            changed = int(found[4]) + int(found[5])
            # Advice: nothing depends on its success.
            libc.madvise(first, end - first, _MADV_PAGEOUT if changed else _MADV_DONTNEED)
            mapped += end - first
    return mapped
