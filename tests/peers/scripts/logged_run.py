"""Fine-tunes with the packages wandb and mlflow, stops in between, resumes, and prints what both have of the run."""

import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from slm.core.progress import Silent
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings


class Stopper(Silent):
    """Stops the run after some updates."""

    left = 4

    def advance(self, amount: int = 1, **fields: str) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


def records(file: Path) -> list[Any]:
    """Returns the records of a run of wandb: blocks of 32 KiB, in the format of LevelDB's log, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def of_wandb() -> dict[str, Any]:
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    ids, tables = [], []
    for file in sorted(Path("wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        ids.append(file.stem.removeprefix("run-"))
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                history.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            if record.WhichOneof("record_type") == "run":
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    for file in Path("wandb").rglob("*.table.json"):
        tables += json.loads(file.read_text(encoding="utf-8"))["data"]
    return {"ids": ids, "history": history, "config": config, "samples": tables}


def of_mlflow() -> list[dict[str, Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("slm")
    assert experiment is not None
    return [
        {
            "status": run.info.status,
            "name": run.info.run_name,
            "params": run.data.params,
            "metrics": {
                tag: [[each.step, each.value] for each in client.get_metric_history(run.info.run_id, tag)]
                for tag in run.data.metrics
            },
            "files": sorted(file.path for file in client.list_artifacts(run.info.run_id, "samples")),
        }
        for run in client.search_runs([experiment.experiment_id])
    ]


def main() -> None:
    base, rows, logs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    settings = FinetuneSettings(epochs=2, rank=2, batch_size=4)
    for name, log in (("silent", []), ("logged", logs)):
        try:
            finetune(base, rows, Path(name), settings, Stopper(), log=log)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            finetune(base, rows, Path(name), settings, log=log)  # type: ignore[arg-type]
    weights = [Path(name, "adapter_model.safetensors").read_bytes() for name in ("silent", "logged")]
    written = Path("logged", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    report = {"same": weights[0] == weights[1], "rows": [json.loads(line) for line in written]}
    report |= {name: (of_wandb if name == "wandb" else of_mlflow)() for name in logs}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
