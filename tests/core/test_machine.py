"""What a machine says about itself, read from texts and files of other machines; and how many cores are used of it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from slm.core import machine

ICE_LAKE = """\
processor\t: 0
vendor_id\t: GenuineIntel
flags\t\t: fpu vme sse2 ssse3 fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_vpopcntdq
bogomips\t: 5199.99

processor\t: 1
flags\t\t: fpu
"""
SAPPHIRE_RAPIDS = "flags\t\t: avx2 avx_vnni avx512f avx512_vnni amx_bf16 amx_tile amx_int8\n"
SANDY_BRIDGE = "model name\t: Intel(R) Core(TM) i5-2520M\nflags\t\t: fpu vme sse2 ssse3 sse4_1 sse4_2 avx aes\n"
NEOVERSE_N1 = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp lrcpc asimddp\n"
)
CORTEX_A53 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"
CORTEX_A7 = "Features\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt\n"
RISC_V = "processor\t: 0\nisa\t\t: rv64imafdcv\n"

M1 = """\
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 0
hw.optional.AdvSIMD: 1
hw.optional.neon: 1
"""
OLD_MACOS_ON_M1 = "hw.optional.neon: 1\nhw.optional.floatingpoint: 1\n"
INTEL_MAC = "hw.optional.avx2_0: 1\nmachdep.cpu.leaf7_features: RDWRFSGS BMI1 AVX2 SMEP AVX512F AVX512VNNI\n"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (ICE_LAKE, {"AVX2", "AVX-512F", "AVX-512 VNNI"}),
        (SAPPHIRE_RAPIDS, {"AVX2", "AVX-512F", "AVX-512 VNNI", "AVX-VNNI", "AMX tile", "AMX INT8", "AMX BF16"}),
        (SANDY_BRIDGE, set()),
        (NEOVERSE_N1, {"NEON", "dot product"}),
        (CORTEX_A53, {"NEON"}),
        (CORTEX_A7, {"NEON"}),
    ],
)
def test_instruction_sets_of_linux(text: str, has: set[str]) -> None:
    found = machine.instruction_sets_of_linux(text)
    assert {name for name, there in found.items() if there} == has
    assert set(found) == (set(machine._ARM) if "Features" in text else set(machine._X86))


@pytest.mark.parametrize("text", ["", RISC_V, "flags without a colon"])
def test_a_cpu_of_another_kind_is_unknown_not_lacking(text: str) -> None:
    assert machine.instruction_sets_of_linux(text) == {}


@pytest.mark.parametrize(
    ("text", "architecture", "found"),
    [
        (M1, "arm64", {"NEON": True, "dot product": True, "i8mm": False}),
        (OLD_MACOS_ON_M1, "arm64", {"NEON": True}),
        (INTEL_MAC, "x86_64", {"AVX2": True, "AVX-512F": True, "AVX-512 VNNI": True}),
        ("", "x86_64", {}),
    ],
)
def test_instruction_sets_of_mac(text: str, architecture: str, found: dict[str, bool]) -> None:
    assert machine.instruction_sets_of_mac(text, architecture) == found


def test_no_cpuinfo_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert machine.instruction_sets(tmp_path / "nothing") == {}


@pytest.mark.parametrize(("said", "limit"), [("max\n", None), ("536870912\n", 512 << 20), ("nonsense\n", None)])
def test_memory_limit_of_cgroup_v2(tmp_path: Path, said: str, limit: int | None) -> None:
    (tmp_path / "memory.max").write_text(said)
    (tmp_path / "v1").write_text("1024\n")
    assert machine.memory_limit(tmp_path / "memory.max", tmp_path / "v1") == limit


@pytest.mark.parametrize(("said", "limit"), [("9223372036854771712\n", None), ("2147483648\n", 2 << 30)])
def test_memory_limit_of_cgroup_v1(tmp_path: Path, said: str, limit: int | None) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text(said)
    assert machine.memory_limit(tmp_path / "nothing", tmp_path / "memory.limit_in_bytes") == limit


def test_no_memory_limit(tmp_path: Path) -> None:
    assert machine.memory_limit(tmp_path / "nothing", tmp_path / "nothing") is None


def test_memory_is_in_bytes_and_the_smallest_counts(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       24684000 kB\nMemFree:        18488000 kB\nMemAvailable:   23958592 kB\n")
    found = machine.memory(meminfo, limit, tmp_path / "nothing")
    assert found == machine.Memory(24684000 << 10, 23958592 << 10, None) and found.usable == 23958592 << 10
    limit.write_text("1073741824")
    assert machine.memory(meminfo, limit, tmp_path / "nothing").usable == 1 << 30
    meminfo.write_text("MemTotal:       512000 kB\n")  # Linux before 3.14 does not say what is available
    assert machine.memory(meminfo, limit, tmp_path / "nothing") == machine.Memory(512000 << 10, None, 1 << 30)


def test_memory_without_proc(tmp_path: Path) -> None:
    found = machine.memory(tmp_path / "nothing", tmp_path / "nothing", tmp_path / "nothing")
    assert found.total is not None and found.available is not None
    assert 1 << 20 < found.available <= found.total
    assert machine.Memory(None, None, None).usable is None


@pytest.mark.parametrize(("content", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("400000 100000", 4.0)])
def test_quota_of_cgroup_v2(tmp_path: Path, content: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert machine.cpu_quota(tmp_path / "cpu.max", tmp_path) == cores


def test_quota_of_cgroup_v1(tmp_path: Path) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(tmp_path / "nothing", tmp_path) == 2.0


def test_no_quota(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path / "nothing", tmp_path) is None


def test_the_quota_and_hyperthreads_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_siblings", lambda cpu: str(cpu // 2))
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.usable_cores() == 4
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    assert machine.usable_cores() == 2
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    assert machine.usable_cores() == 1


# A large block freed raises what glibc keeps; then one is freed below another that stays.
KEEPS = """
import numpy as np, sys
from slm.core.machine import return_freed_memory
if sys.argv[1] == "returned":
    return_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [np.ones(30 << 17) for _ in range(2)]
del blocks
before = resident()
freed, stays = np.ones(20 << 17), np.ones(1 << 14)
del freed
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep other blocks")
def test_freed_memory_is_returned() -> None:
    grown = {}
    for how in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", KEEPS, how], capture_output=True, text=True, check=True)
        grown[how] = int(done.stdout)
    assert grown["returned"] < 5 << 20 < grown["kept"]


# Allocates, fills and frees a block above glibc's highest threshold several times; prints the page faults of the later times,
# and the memory that is still resident after the end.
REUSES = """
import ctypes, resource, sys
from contextlib import nullcontext
from slm.core.machine import freed_memory_kept
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
size = 40 << 20
def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
with freed_memory_kept() if sys.argv[1] == "kept" else nullcontext():
    use()
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
    print(resident() - before)
print(resident() - before)
"""


def _reused(how: str, **environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", REUSES, how], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep other blocks")
def test_training_reuses_freed_memory_and_returns_it_at_its_end() -> None:
    usual, _, _ = _reused("usual")
    faults, within, after = _reused("kept")
    assert faults < 1_000 < usual
    assert after < 5 << 20 < within


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep other blocks")
def test_malloc_settings_of_the_user_have_precedence() -> None:
    faults, _, _ = _reused("kept", MALLOC_MMAP_THRESHOLD_="1000000")
    assert faults > 1_000


# getauxval(AT_HWCAP) and getauxval(AT_HWCAP2) of emulated CPUs: qemu-aarch64 7.2 -cpu cortex-a53, neoverse-n1, max.
HWCAPS = [
    ((0x8FB, 0), []),
    ((0x119FFB, 0), ["dot product"]),
    ((0xECFFFFFB, 0x7F877FFF), ["dot product", "i8mm", "BF16"]),
]


@pytest.mark.parametrize(("values", "more"), HWCAPS)
def test_instruction_sets_of_64_bit_arm(
    values: tuple[int, int], more: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = {"NEON": True} | {name: name in more for name in ("dot product", "i8mm", "BF16")}
    vector = dict(zip((16, 26), values, strict=True))
    assert machine.instruction_sets_of_hwcaps(vector) == wanted
    # An emulated process sees the host's /proc/cpuinfo, which is not used.
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_auxiliary_vector", lambda: vector)
    (tmp_path / "cpuinfo").write_text(SAPPHIRE_RAPIDS)
    assert machine.instruction_sets(tmp_path / "cpuinfo") == wanted
    monkeypatch.setattr(machine, "_auxiliary_vector", dict)  # a C library without getauxval
    (tmp_path / "cpuinfo").write_text(NEOVERSE_N1)
    assert machine.instruction_sets(tmp_path / "cpuinfo")["dot product"]
