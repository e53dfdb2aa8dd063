"""Returns memory that a process holds and does not use to the system.

Reading a large tokenizer frees hundreds of megabytes that malloc keeps, and opening a graph reads every weight from its mapped
file once, to store it in another order. Afterwards a step reads only rows of the embedding from the file.
"""

import ctypes
import os
import re
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MAPPED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(\S.*)$", re.MULTILINE)
# asm-generic/mman-common.h, since Linux 5.4: pages are written back if they changed, and read again when they are used.
_MADV_PAGEOUT = 21


def return_freed_memory() -> None:
    """Returns freed memory to the system, with glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def page_out(file: Path) -> int:
    """Takes the pages of a mapped file out of this process's resident memory. They are read again when they are used.

    Returns:
        The bytes of the file that are mapped; 0 on other systems.
    """
    if sys.platform != "linux":
        return 0
    try:
        maps, name = _MAPS.read_text(encoding="utf-8", errors="replace"), os.path.realpath(file)
    except OSError:  # a sandbox without /proc
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    mapped = 0
    for found in _MAPPED.finditer(maps):
        if found[3] == name:
            first, end = int(found[1], 16), int(found[2], 16)
            libc.madvise(first, end - first, _MADV_PAGEOUT)  # advice: nothing depends on its success
            mapped += end - first
    return mapped
