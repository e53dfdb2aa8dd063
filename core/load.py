"""What keeps this machine from computing at its usual speed: other programs, swapping, throttling, a quota."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slm.core.machine import usable_cores
from slm.core.processes import clock_mhz, stolen_seconds, swapped_bytes

_THROTTLED = "devices/system/cpu/cpu*/thermal_throttle/package_throttle_count"
_SYS = Path("/sys")
_QUOTA = Path("/sys/fs/cgroup/cpu.stat")
_MIB = 1 << 20
# From where each is named as a likely cause.
_LOAD_PER_CORE = 1.5
_SWAPPED = 64 * _MIB
_CLOCK = 0.7
_SHARE = 0.1


@dataclass(frozen=True)
class Load:
    """The load of the machine at a moment; None for what the system does not report.

    Attributes:
        at: `time.monotonic()`, in seconds.
        average: Processes that ran or waited for a processor, in the mean of the last minute.
        swapped: Bytes that were moved to swap or back since the start of the system.
        clock: Clock of the processors over their highest clock.
        heat: How often processors lowered their clock because of heat.
        waited_s: Seconds for which the container's quota stopped its processes.
        stolen_s: Seconds, over all processors, that the host of a virtual machine gave to others.
    """

    at: float
    average: float | None
    swapped: int | None
    clock: float | None
    heat: int | None
    waited_s: float | None
    stolen_s: float | None

    @classmethod
    def now(cls) -> Self:
        """Returns the present load."""
        clock = clock_mhz()
        return cls(
            at=time.monotonic(),
            average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            swapped=swapped_bytes(),
            clock=None if clock is None or not clock[1] else clock[0] / clock[1],
            heat=_heat(),
            waited_s=_waited_s(),
            stolen_s=stolen_seconds(),
        )


def causes(before: Load, now: Load, cores: int | None = None) -> list[str]:
    """Returns what happened between two moments that makes programs slow, as phrases.

    Args:
        before: The earlier moment.
        now: The later one.
        cores: Cores of this process; None asks the system.
    """
    cores, seconds = cores or usable_cores(), max(1e-3, now.at - before.at)
    found = []
    if now.average is not None and now.average > _LOAD_PER_CORE * cores:
        found.append(
            f"other programs compete for the processor: the load average is {now.average:.1f} on {cores} cores"
        )
    if (swapped := _grown(before.swapped, now.swapped)) > _SWAPPED:
        found.append(f"memory is short: {swapped / _MIB:,.0f} MiB were swapped")
    if (heat := _grown(before.heat, now.heat)) > 0:
        found.append(f"the processor lowered its clock because of heat {heat:,.0f} times")
    elif now.clock is not None and now.clock < _CLOCK:
        found.append(f"the processor runs at {now.clock:.0%} of its highest clock")
    if (waited := _grown(before.waited_s, now.waited_s)) > _SHARE * seconds:
        found.append(f"the container's CPU quota stopped its processes for {waited:,.0f} s")
    if (stolen := _grown(before.stolen_s, now.stolen_s)) > _SHARE * seconds * cores:
        found.append(f"the host gave {stolen:,.0f} s of processor time to other virtual machines")
    return found


def _grown(before: float | None, now: float | None) -> float:
    return 0.0 if before is None or now is None else now - before


def _heat(sys: Path = _SYS) -> int | None:
    try:
        counts = [int(file.read_text(encoding="ascii")) for file in sys.glob(_THROTTLED)]
    except (OSError, ValueError):  # a sandbox without /sys
        return None
    return sum(counts) if counts else None


def _waited_s(stat: Path = _QUOTA) -> float | None:
    try:
        lines = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
        return int(lines["throttled_usec"]) / 1e6
    except (OSError, ValueError, KeyError):
        return None
