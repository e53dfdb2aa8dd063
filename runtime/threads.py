"""How many cores this process may really use."""

import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Returns the physical cores this process may run on, within the container's quota; at least 1.

    Two threads on one core's hyperthreads slow matrix products down, and threads beyond the quota are suspended in
    the middle of one: both are the usual reason for slow inference in a container.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    quota = cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def cpu_quota(v2: Path = _CGROUP_V2, v1: Path = _CGROUP_V1) -> float | None:
    """Returns the container's quota in cores, None when there is none."""
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


def _siblings(cpu: int) -> str:
    """Returns what the CPUs of one core have in common; the CPU itself where the system does not say."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)
