"""W&B and MLflow: their own packages receive a run that was interrupted, and show its metrics, recipe and samples."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import SCRIPTS, environment

pytestmark = pytest.mark.peer

ROWS = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(12)]
# The stores keep other digits than JSON.
CLOSE = 1e-9


def logged(base: Path, *names: str) -> Any:
    """Runs the script with the packages, without a key and a server, and returns what it prints."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    here = {name: value for name, value in environment(*names).items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    variables = here | {"NETRC": os.devnull, "MPLCONFIGDIR": str(Path.cwd() / "matplotlib"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / "logged_run.py"), str(base), "rows.jsonl", *names]
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"]  # a log does not change the result
    return found


def values(found: Any, kind: str, name: str) -> list[tuple[int, float]]:
    return [(row["updates"], pytest.approx(row[name], abs=CLOSE)) for row in found["rows"] if row["type"] == kind]


def test_wandb(shared_checkpoint: Path) -> None:
    found = logged(shared_checkpoint, "wandb")
    run = found["wandb"]
    assert len(run["ids"]) == 2 and len(set(run["ids"])) == 1  # two parts of one run
    for kind, group, name in (
        ("train", "train", "loss"),
        ("train", "train", "learning_rate"),
        ("eval", "validation", "loss"),
    ):
        tag = f"{group}/{name}"
        shown = {row["_step"]: row[tag] for row in run["history"] if tag in row}
        assert sorted(shown.items()) == values(found, kind, name), tag
    assert run["config"]["training"]["rank"] == 2 and run["config"]["data"]["train"].endswith("rows.jsonl")
    wanted = [[row["updates"], row["prompt"], row["text"]] for row in found["rows"] if row["type"] == "sample"]
    assert wanted and sorted(run["samples"]) == wanted


def test_mlflow(shared_checkpoint: Path) -> None:
    found = logged(shared_checkpoint, "mlflow")
    (run,) = found["mlflow"]  # the resumed run continues the first one
    assert run["status"] == "FINISHED" and run["name"] == "logged"
    assert sorted(map(tuple, run["metrics"]["train/loss"])) == values(found, "train", "loss")
    assert sorted(map(tuple, run["metrics"]["validation/loss"])) == values(found, "eval", "loss")
    assert run["params"]["training.rank"] == "2"
    steps = {row["updates"] for row in found["rows"] if row["type"] == "sample"}
    assert run["files"] == [f"samples/{step:08}.txt" for step in sorted(steps)]
