"""Commands whose standard streams are closed, full, or read by somebody who has gone."""

import subprocess
import sys

import pytest

SLM = f"{sys.executable} -m slm"
ASK = f"{SLM} generate -p 'One day' --greedy --max-new-tokens"


def run(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "closed",
    ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>/dev/full >&-"],
)
def test_closed_streams_are_no_failure(closed: str) -> None:
    """And what is written to one that is open is all that is written there."""
    done = run(f"{ASK} 3 {closed}")
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout
    assert (done.stdout.strip() == "") == (">&- " in f" {closed} ".replace("2>&-", ""))
    assert "2>" in closed or "tokens/s" in done.stderr


@pytest.mark.parametrize("closed", ["", ">&- 2>&-", "2>/dev/full", "2>&1 | head -c 0"])
def test_a_failure_is_one_all_the_same(closed: str) -> None:
    done = run(f"{SLM} nonsense {closed}")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    done = run(f"{ASK} 500 | head -c 1")
    assert done.returncode == 1 and done.stdout and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_full_disk_is_said() -> None:
    done = run(f"{ASK} 3 >/dev/full")
    assert done.returncode == 1 and "error: no space left" in done.stderr and "Exception" not in done.stderr
