"""Logs of metrics besides the file, with stand-ins for the packages: what they receive, failures, and resumed runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.train.logs import logs as module
from slm.train.logs.log import About, flat, scalars
from slm.train.logs.logs import Logs, check_packages
from slm.train.logs.weights_and_biases import has_key
from tests.progress import Notes

RECIPE = {"seed": 3, "training": {"rank": 2, "target_modules": ["q_proj"]}}
ROWS: list[dict[str, Any]] = [
    {"type": "eval", "epoch": 0, "updates": 0, "tokens": 0, "loss": 5.0},
    {"type": "train", "epoch": 1, "updates": 1, "tokens": 9, "loss": 4.0, "learning_rate": 1e-3, "grad_norm": None},
    {"type": "eval", "epoch": 1, "updates": 1, "tokens": 9, "loss": 3.0, "preferred": 0.5},
    {"type": "sample", "epoch": 1, "updates": 1, "tokens": 9, "prompt": "Who?", "text": "Me."},
]


def about() -> About:
    return About(Path("runs/tiny/adapters/pairs"), RECIPE, lambda row: row["updates"])


class Wandb(ModuleType):
    """A stand-in for the package: keeps the runs."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[SimpleNamespace] = []
        self.unreachable = False

    def Settings(self, **fields: Any) -> dict[str, Any]:
        return fields

    def Table(self, columns: list[str], data: list[Any]) -> list[Any]:
        return [columns, *data]

    def teardown(self) -> None:
        self.unreachable = False

    def init(self, **fields: Any) -> Any:
        if fields["mode"] == "online" and self.unreachable:
            raise ConnectionError("no route\nto the host")
        logged: list[tuple[int, dict[str, Any]]] = []
        run = SimpleNamespace(fields=fields, logged=logged, ended=None, dir="wandb/offline-1/files", url="https://w/1")
        run.log = lambda values, step: logged.append((step, values))
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        self.runs.append(run)
        return run


class Mlflow(ModuleType):
    """A stand-in for the package and its client: keeps the runs."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, Any] = {}
        self.broken = False
        self.MlflowException = type("MlflowException", (Exception,), {"message": "no such run"})

    def client(self) -> Any:
        def new(experiment: str, run_name: str) -> Any:
            run_id = f"run{len(self.runs)}"
            info = SimpleNamespace(run_id=run_id, lifecycle_stage="active")
            self.runs[run_id] = SimpleNamespace(
                info=info, name=run_name, params={}, metrics=[], texts={}, status="RUNNING"
            )
            return self.runs[run_id]

        def get(run_id: str) -> Any:
            if run_id not in self.runs:
                raise self.MlflowException
            tags = {name: value for name, value, _ in self.runs[run_id].metrics}
            return SimpleNamespace(info=self.runs[run_id].info, data=SimpleNamespace(metrics=tags))

        def log(run_id: str, metrics: Any = (), params: Any = ()) -> None:
            if self.broken and metrics:
                raise OSError("the disk is full")
            self.runs[run_id].metrics += [(each[0], each[1], each[3]) for each in metrics]
            self.runs[run_id].params.update(params)

        return SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: name,
            create_run=new,
            get_run=get,
            get_metric_history=lambda run_id, tag: [
                SimpleNamespace(step=step) for name, _, step in self.runs[run_id].metrics if name == tag
            ],
            update_run=lambda run_id, status: setattr(self.runs[run_id], "status", status),
            log_batch=log,
            log_dict=lambda run_id, values, name: self.runs[run_id].texts.update({name: values}),
            log_text=lambda run_id, text, name: self.runs[run_id].texts.update({name: text}),
            set_terminated=lambda run_id, status: setattr(self.runs[run_id], "status", status),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(module, "check_packages", lambda names: None)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    return stand_in


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    stand_in = Mlflow()
    exceptions, tracking, entities = (ModuleType(f"mlflow.{name}") for name in ("exceptions", "tracking", "entities"))
    exceptions.MlflowException = stand_in.MlflowException  # type: ignore[attr-defined]
    tracking.MlflowClient = stand_in.client  # type: ignore[attr-defined]
    entities.Metric = lambda *fields: fields  # type: ignore[attr-defined]
    entities.Param = lambda *fields: fields  # type: ignore[attr-defined]
    for each in (stand_in, exceptions, tracking, entities):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setattr(module, "check_packages", lambda names: None)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return stand_in


def logged(
    names: list[Any], run_ids: dict[str, str] | None = None, before: int = 0, heard: Notes | None = None
) -> Logs:
    """Opens logs of a run that has some rows already, and sends them the rest."""
    logs = Logs(names, about(), run_ids, heard)
    logs.begin(ROWS[:before])
    for row in ROWS[before:]:
        logs.add(row)
    return logs


def test_what_a_row_becomes() -> None:
    assert [scalars(row) for row in ROWS] == [
        {"validation/loss": 5.0},
        {"train/loss": 4.0, "train/learning_rate": 1e-3},
        {"validation/loss": 3.0, "validation/preferred": 0.5},
        {},
    ]
    assert flat(RECIPE) == {"seed": 3, "training.rank": 2, "training.target_modules": ["q_proj"]}
    assert about().name == "tiny-pairs"


def test_w_and_b_receives_the_recipe_metrics_and_samples(wandb: Wandb) -> None:
    heard = Notes()
    with logged(["wandb"], heard=heard) as logs:
        pass
    (run,) = wandb.runs
    assert run.fields["config"] == RECIPE and run.fields["project"] == "slm" and run.fields["name"] == "tiny-pairs"
    assert run.fields["mode"] == "offline" and run.fields["settings"]["disable_git"]
    assert run.logged == [
        (0, {"validation/loss": 5.0, "tokens": 0, "epoch": 0}),
        (1, {"train/loss": 4.0, "train/learning_rate": 1e-3, "tokens": 9, "epoch": 1}),
        (1, {"validation/loss": 3.0, "validation/preferred": 0.5, "tokens": 9, "epoch": 1}),
        (1, {"samples": [["updates", "prompt", "text"], [1, "Who?", "Me."]]}),
    ]
    assert run.ended == 0 and logs.run_ids == {"wandb": run.fields["id"]}
    assert heard.lines == [f"W&B run {run.fields['id']}, offline: wandb sync wandb/offline-1 uploads it"]


def test_a_resumed_run_continues_the_run_of_w_and_b(wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    logged(["wandb"], {"wandb": "abc"}, before=2).close()
    logged(["wandb"], before=2).close()  # the log is new, the run is not
    continued, new = wandb.runs
    assert (continued.fields["id"], continued.fields["resume"], continued.fields["mode"]) == ("abc", "allow", "online")
    assert [step for step, _ in continued.logged] == [1, 1]
    assert [step for step, _ in new.logged] == [0, 1, 1, 1]


def test_without_a_network_w_and_b_is_offline(wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb.unreachable, heard = True, Notes()
    logged(["wandb"], heard=heard).close()
    (run,) = wandb.runs
    assert run.fields["mode"] == "offline" and len(run.logged) == 4
    assert heard.lines[0] == "warning: W&B is not reachable, so the run is logged offline (no route)"


def test_the_key_of_w_and_b(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example login user password key\n")
    assert not has_key({"NETRC": str(tmp_path / "none")})
    assert has_key({"WANDB_API_KEY": "key", "NETRC": str(tmp_path / "none")})
    assert has_key({"WANDB_BASE_URL": "https://wandb.example", "NETRC": str(netrc)})
    assert not has_key({"NETRC": str(netrc)})  # a key of another server


def test_mlflow_receives_the_recipe_metrics_and_samples(mlflow: Mlflow) -> None:
    with logged(["mlflow"]):
        pass
    (run,) = mlflow.runs.values()
    assert run.params == {"seed": "3", "training.rank": "2", "training.target_modules": "['q_proj']"}
    assert run.metrics == [
        ("validation/loss", 5.0, 0),
        ("train/loss", 4.0, 1),
        ("train/learning_rate", 1e-3, 1),
        ("validation/loss", 3.0, 1),
        ("validation/preferred", 0.5, 1),
    ]
    assert run.texts == {"config.yaml": RECIPE, "samples/00000001.txt": "Who?\n-> Me.\n"}
    assert run.status == "FINISHED" and run.name == "tiny-pairs"


def test_a_resumed_run_continues_the_run_of_mlflow(mlflow: Mlflow) -> None:
    with pytest.raises(KeyboardInterrupt), logged(["mlflow"]) as first:
        raise KeyboardInterrupt
    (run,) = mlflow.runs.values()
    assert run.status == "KILLED"
    before = list(run.metrics)
    # It was killed after its last save, so rows that the store has come again.
    again = logged(["mlflow"], first.run_ids, before=2)
    again.add({"type": "train", "epoch": 2, "updates": 2, "tokens": 18, "loss": 2.0})
    again.close()
    assert len(mlflow.runs) == 1 and run.status == "FINISHED"
    assert run.metrics == [*before, ("train/loss", 2.0, 2)]


def test_a_run_that_mlflow_lost_begins_anew_with_all_rows(mlflow: Mlflow) -> None:
    heard = Notes()
    logs = logged(["mlflow"], {"mlflow": "lost"}, before=3, heard=heard)
    logs.close()
    assert "MLflow has no run lost to continue" in heard.lines[0]
    (run,) = mlflow.runs.values()
    assert len(run.metrics) == 5 and logs.run_ids == {"mlflow": run.info.run_id}


def test_a_log_that_fails_does_not_end_the_run(mlflow: Mlflow, wandb: Wandb) -> None:
    mlflow.broken, heard = True, Notes()
    logs = logged(["mlflow", "wandb"], heard=heard)
    logs.close()
    assert "warning: --log mlflow failed, and training goes on without it: the disk is full" in heard.lines
    assert len(wandb.runs[0].logged) == 4 and wandb.runs[0].ended == 0
    assert logs.run_ids.keys() == {"mlflow", "wandb"}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_one_error(
    slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    Path(name).mkdir()  # a directory of that name is no package
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    with pytest.raises(SlmError, match=f"needs the package {name}") as error:
        check_packages([name])
    assert error.value.hint == f"pip install {name}"
    for command in (("train", "--data", "sample"), ("finetune", "--lora", "rows.jsonl")):
        Path("rows.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
        result = slm(*command, "--log", name)
        assert result.code == 1 and f"hint: pip install {name}" in result.err
        assert not Path("runs").exists()
