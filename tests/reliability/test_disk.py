"""A disk that is full or read-only: one line, a code, nothing half written, and what was there before stays."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).parent / "scripts" / "full_disk.py"
_ROOM = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]
COMMANDS = ("export", "gguf", "quantize", "import", "merge", "trim", "web", "finetune", "adapter", "train", "data")


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_ROOM, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def runs(
    shared_checkpoint: Path, stories: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What every command did, by its name."""
    if not can_mount():
        pytest.skip("a file system of one's own needs root, or user namespaces")
    path = tmp_path_factory.mktemp("disk")
    (path / "disk").mkdir()
    text, rows = path / "text.txt", path / "rows.jsonl"
    text.write_text("\n<|endoftext|>\n".join(stories[:40]), encoding="utf-8")
    rows.write_text("".join(json.dumps({"prompt": "One day", "completion": f" {i}"}) + "\n" for i in range(40)))
    done = subprocess.run(
        [*_ROOM, sys.executable, str(_SCRIPT), *map(str, (path / "disk", shared_checkpoint, text, rows))],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        cwd=path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        run = json.loads(line)
        found.setdefault(run.pop("name"), []).append(run)
    assert {*found} - {"web"} == {*COMMANDS} - {"web"}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_full_and_read_only_disks(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    if name not in runs:
        pytest.skip("what `make web` fetches is not there")
    whole, *failed = runs[name]
    assert whole["code"] == 0, whole["said"]
    assert [run["disk"] for run in failed] == ["0% free", "30% free", "90% free", "read-only"]
    for run in failed:
        wanted = "Read-only file system" if run["disk"] == "read-only" else "no space left on the disk"
        errors = [line for line in run["said"].splitlines() if line.startswith("error: ")]
        assert run["code"] == 1, run
        assert len(errors) == 1 and wanted in errors[0] and "Traceback" not in run["said"], run
        assert run["kept"], run
        half = [file for file in run["added"] if not file.startswith(MAY_STAY.get(name, " "))]
        assert half == [], run


# What may be gone on with: whole files of a dataset, and a run that has been prepared.
MAY_STAY = {"data": ".dataset.unfinished/", "train": "run/"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", [("info", "tiny"), ("info", "tiny", "--json"), ("--help",)])
def test_standard_output_that_takes_nothing(command: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "slm", *command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no space left on the disk\nhint: ")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
