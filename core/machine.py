"""The machine's processors, memory and limits, and this process's use of them."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slm.core import child
from slm.core.errors import SlmError
from slm.core.processes import allowed_processors, main_memory, physical_cores

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_MEMORY_V2 = Path("/sys/fs/cgroup/memory.max")
_MEMORY_V1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CPU_V2 = Path("/sys/fs/cgroup/cpu.max")
_CPU_V1 = Path("/sys/fs/cgroup/cpu")
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest values to which glibc raises its thresholds by itself, on 64-bit systems.
_RAISED_MMAP, _RAISED_TRIM = 32 << 20, 64 << 20
# The largest threshold that mallopt takes, and the value that switches returning off (mallopt(3)).
_LARGEST, _NEVER = (1 << 31) - 1, -1
_TOPOLOGY = Path("/sys/devices/system/cpu")
# cgroup v1 represents "no limit" as the largest multiple of a page below 2^63.
_UNLIMITED = 1 << 60

# Instruction sets that speed up inference or training, and Linux's names for each.
_X86 = {
    "AVX2": ("avx2",),
    "AVX-512F": ("avx512f",),
    "AVX-512 VNNI": ("avx512_vnni",),
    "AVX-VNNI": ("avx_vnni",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX tile": ("amx_tile",),
    "AMX INT8": ("amx_int8",),
    "AMX BF16": ("amx_bf16",),
}
_ARM = {"NEON": ("asimd", "neon"), "dot product": ("asimddp",), "i8mm": ("i8mm",), "BF16": ("bf16",)}
# The same as bits of the auxiliary vector of 64-bit ARM: the type of the entry and the bit (asm/hwcap.h).
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_HWCAPS = {"NEON": (_AT_HWCAP, 1), "dot product": (_AT_HWCAP, 20), "i8mm": (_AT_HWCAP2, 13), "BF16": (_AT_HWCAP2, 14)}
# macOS reports them one by one on ARM, and as a list of words on Intel.
_MAC_ARM = {
    "NEON": ("hw.optional.AdvSIMD", "hw.optional.neon"),
    "dot product": ("hw.optional.arm.FEAT_DotProd",),
    "i8mm": ("hw.optional.arm.FEAT_I8MM",),
    "BF16": ("hw.optional.arm.FEAT_BF16",),
}
_MAC_X86 = {"AVX2": ("AVX2",), "AVX-512F": ("AVX512F",), "AVX-512 VNNI": ("AVX512VNNI",)}
_MAC_FEATURES = "machdep.cpu.leaf7_features"
_MAC_NAME = "machdep.cpu.brand_string"
_WINDOWS_PROCESSOR = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"

# The most threads of one operator; it exceeds the cores of the largest machines.
MAX_THREADS = 512


def check_threads(threads: int) -> int:
    """Returns `threads`, after a check.

    Raises:
        SlmError: If it is not an integer from 1 to MAX_THREADS.
    """
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise SlmError(f"threads is {threads}; it must be from 1 to {MAX_THREADS}")
    return threads


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes; None if the system does not report it.

    Attributes:
        total: Installed memory.
        available: Memory that can be used without swapping.
        container_limit: The container's limit; None also if there is no limit.
        container_used: What the container's processes use of it, without cached files.
    """

    total: int | None
    available: int | None
    container_limit: int | None
    container_used: int | None = None

    @property
    def free(self) -> int | None:
        """The most memory that can still be allocated without swapping, in the container if there is one."""
        left = None
        if self.container_limit is not None:
            left = max(0, self.container_limit - (self.container_used or 0))
        return min((size for size in (self.total, self.available, left) if size is not None), default=None)

    @property
    def usable(self) -> int | None:
        """The most memory this process can use: the smallest known value."""
        return min(
            (size for size in (self.total, self.available, self.container_limit) if size is not None), default=None
        )


def usable_cores() -> int:
    """Returns the number of physical cores that this process may run on, within the container's CPU quota; at least 1.

    Two threads on the hyperthreads of one core slow down matrix products, and threads beyond the quota are suspended during
    one. Both are frequent reasons for slow inference in containers.
    """
    quota = cpu_quota()
    return max(1, _cores() if quota is None else min(_cores(), int(quota)))


def _cores() -> int:
    """Returns the number of physical cores that this process may run on."""
    siblings: set[str | None] = {None}
    if hasattr(os, "sched_getaffinity"):
        siblings = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    if None not in siblings:
        return len(siblings)
    allowed = allowed_processors()
    return min(allowed, physical_cores() or allowed)


def cpu_quota(v2: Path = _CPU_V2, v1: Path = _CPU_V1) -> float | None:
    """Returns the container's CPU quota in cores; None if there is no quota."""
    try:
        quota, period = v2.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (v1 / name).read_text(encoding="ascii").strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)


def return_freed_memory() -> None:
    """Makes glibc return freed blocks of a megabyte and more to the system; does nothing on other C libraries.

    By default glibc keeps ever larger blocks for reuse: memory for the prefill of a long prompt, and buffers that were
    replaced by longer ones, would stay resident. Only inference calls this: training frees and allocates such blocks all the
    time, and would become slower.
    """
    _set_malloc(mmap_threshold=1 << 20)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Makes glibc keep freed memory within the block, for training; does nothing on other C libraries.

    An update frees and allocates the same large blocks each time. By default glibc returns blocks above 32 MiB, and free memory
    at the end of its heap, to the system, which clears each page again when it is next used. At the end of the block,
    all unused memory is returned. Settings of the user's have precedence.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        yield
        return
    # glibc before 2.35 refuses a threshold above 32 MiB, so the smaller value is set first.
    _set_malloc(mmap_threshold=_RAISED_MMAP, trim_threshold=_NEVER)
    _set_malloc(mmap_threshold=_LARGEST)
    try:
        yield
    finally:
        _set_malloc(mmap_threshold=_RAISED_MMAP, trim_threshold=_RAISED_TRIM)
        _return_all_freed_memory()


def _set_malloc(*, mmap_threshold: int, trim_threshold: int | None = None) -> None:
    """Sets glibc's malloc parameters, in bytes; does nothing on other C libraries."""
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        if trim_threshold is not None:
            mallopt(_M_TRIM_THRESHOLD, trim_threshold)


def _return_all_freed_memory() -> None:
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """Returns a function of glibc; None where the C library does not have it (musl, macOS, Windows)."""
    found: Callable[..., int] | None = None
    if sys.platform == "linux":
        import ctypes

        found = getattr(ctypes.CDLL(None), name, None)
    return found


def memory(meminfo: Path = _MEMINFO, v2: Path = _MEMORY_V2, v1: Path = _MEMORY_V1) -> Memory:
    """Returns the machine's memory and the container's limit."""
    try:
        lines = _colon_lines(meminfo.read_text(encoding="ascii"))
        total, available = (_kib(lines.get(name)) for name in ("MemTotal", "MemAvailable"))
    except OSError:
        total, available = main_memory()
    return Memory(total, available, memory_limit(v2, v1), _container_used(v2, v1))


def _container_used(v2: Path, v1: Path) -> int | None:
    """Returns the memory of a container's processes in bytes. The kernel drops inactive cached files when memory is short."""
    for limit, usage, cached in (
        (v2, "memory.current", "inactive_file"),
        (v1, "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            used = int((limit.parent / usage).read_text(encoding="ascii"))
            stat = (limit.parent / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        inactive = next((line.split()[1] for line in stat.splitlines() if line.startswith(f"{cached} ")), "0")
        return max(0, used - int(inactive))
    return None


def memory_limit(v2: Path = _MEMORY_V2, v1: Path = _MEMORY_V1) -> int | None:
    """Returns the container's memory limit in bytes; None if there is no limit."""
    for path in (v2, v1):
        try:
            said = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(said) if said.isdecimal() and int(said) < _UNLIMITED else None
    return None


def instruction_sets(cpuinfo: Path = _CPUINFO) -> dict[str, bool]:
    """Returns which vector and matrix instructions the CPU has, without those that the system does not report."""
    try:
        is_mac = sys.platform == "darwin"
        if is_mac:
            return instruction_sets_of_mac(_sysctl("hw.optional", _MAC_FEATURES), platform.machine())
        if platform.machine() == "aarch64" and (vector := _auxiliary_vector()):
            return instruction_sets_of_hwcaps(vector)
        return instruction_sets_of_linux(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    except (OSError, subprocess.SubprocessError):
        return {}


def instruction_sets_of_hwcaps(vector: Mapping[int, int]) -> dict[str, bool]:
    """Returns the instruction sets of a 64-bit ARM CPU.

    Programs choose their kernels by these values. `/proc/cpuinfo` has those of the host in an emulated process.

    Args:
        vector: The entries AT_HWCAP and AT_HWCAP2 of the auxiliary vector.
    """
    return {name: bool(vector[entry] >> bit & 1) for name, (entry, bit) in _HWCAPS.items()}


def instruction_sets_of_linux(cpuinfo: str) -> dict[str, bool]:
    """Parses `/proc/cpuinfo`: the line `flags` on x86, the line `Features` on ARM."""
    lines = _colon_lines(cpuinfo)
    for line, names in (("flags", _X86), ("Features", _ARM)):
        if line in lines:
            return _named(names, set(lines[line].split()))
    return {}


def instruction_sets_of_mac(sysctl: str, machine: str) -> dict[str, bool]:
    """Parses the output of `sysctl hw.optional machdep.cpu.leaf7_features`; old versions of macOS omit new names."""
    lines = _colon_lines(sysctl)
    if machine == "arm64":
        known = {name: keys for name, keys in _MAC_ARM.items() if any(key in lines for key in keys)}
        return _named(known, {key for key, value in lines.items() if value == "1"})
    return _named(_MAC_X86, set(lines[_MAC_FEATURES].split())) if _MAC_FEATURES in lines else {}


def _siblings(cpu: int) -> str | None:
    """Returns the list of CPUs that share a core; None if the system does not report it."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _named(names: Mapping[str, tuple[str, ...]], found: set[str]) -> dict[str, bool]:
    return {name: any(alias in found for alias in aliases) for name, aliases in names.items()}


def _colon_lines(text: str) -> dict[str, str]:
    """Parses `name: value` lines; of repeated names, such as those for each CPU in `/proc/cpuinfo`, keeps the first."""
    lines: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            lines.setdefault(name.strip(), value.strip())
    return lines


def _kib(said: str | None) -> int | None:
    number = (said or "").partition(" ")[0]
    return int(number) << 10 if number.isdecimal() else None


def _auxiliary_vector() -> dict[int, int]:
    """Returns AT_HWCAP and AT_HWCAP2 of this process; nothing if the C library does not report them."""
    import ctypes

    read = getattr(ctypes.CDLL(None), "getauxval", None)
    if read is None:
        return {}
    read.argtypes, read.restype = [ctypes.c_ulong], ctypes.c_ulong
    return {entry: read(entry) for entry in (_AT_HWCAP, _AT_HWCAP2)}


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """Returns the name of the processor, as far as the system reports it; otherwise the architecture."""
    name = None
    try:
        if sys.platform == "win32":
            import winreg

            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _WINDOWS_PROCESSOR) as key:
                name = str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
        else:
            # Both have one line for each logical processor, or one line in all.
            lines = _colon_lines(
                _sysctl(_MAC_NAME)
                if sys.platform == "darwin"
                else cpuinfo.read_text(encoding="utf-8", errors="replace")
            )
            name = lines.get("model name") or lines.get(_MAC_NAME)
    except (OSError, subprocess.SubprocessError):
        pass
    return (name or "").strip() or platform.processor() or platform.machine()


def _sysctl(*names: str) -> str:
    # The exit status is ignored: sysctl fails if this machine lacks one of the names, but prints the others.
    return child.run_program(["/usr/sbin/sysctl", *names], timeout=10).stdout


def prepare_threads() -> None:
    """Sets how PyTorch's threads wait and how many there are, by environment variables that it reads when it is imported.

    By default, the threads spin while they wait for each other at the end of every matrix product. On a busy machine that costs
    more than half of the speed. 5,000 turns keep 98 % of the speed on an idle machine, and 84 % of the speed without spinning
    on a busy one (docs/LOG.md). PyTorch counts cores and ignores a container's CPU quota. Values that the user set have
    precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if cpu_quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
