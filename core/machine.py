"""What this process takes of the machine."""

import resource
import sys


def peak_rss_mib() -> float:
    """Returns the most memory this process has had resident, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)  # bytes on macOS, KiB elsewhere
