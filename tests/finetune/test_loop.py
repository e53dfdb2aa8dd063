"""Fine-tuning in the loop that it shares with training: errors, requests to save or to stop, and early stopping."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune import material as module
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE
from slm.finetune.batches import alone
from slm.finetune.examples import Renderer
from slm.finetune.fit import Fit, Trainable
from slm.finetune.material import Answers
from slm.finetune.rows import read_rows
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import Standing
from slm.train.precision import FLOAT32, Precision
from tests.progress import Stopper

pytestmark = pytest.mark.usefixtures("short_answers")

WriteRows = Callable[..., Path]
ROWS = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(30)]
SETTINGS = FinetuneSettings(rank=4, epochs=2, batch_size=4)


def make_fit(base: Path, data: Path, precision: Precision = FLOAT32) -> tuple[Fit, dict[str, nn.Parameter]]:
    model = load_checkpoint(base)
    renderer = Renderer(Tokenizer.load(base), model.config)
    examples = [renderer.example(row) for row in read_rows(data)]
    settings = SETTINGS.model_copy(update={"method": "full", "learning_rate": 1e-3})
    parameters = dict(model.named_parameters())
    material = Answers(alone(examples), examples[:4])
    return Fit(
        Trainable(model, parameters), material, settings, precision, Standing(course={"settings": {}})
    ), parameters


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(
    shared_checkpoint: Path, write_rows: WriteRows, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, parameters = make_fit(shared_checkpoint, write_rows(ROWS))
    fit.update(lambda: None)
    before = copies(parameters)
    if what == "loss":
        loss = module.batch_loss
        monkeypatch.setattr(module, "batch_loss", lambda *rest: loss(*rest) * float("nan"))
    else:
        parameters["model.norm.weight"].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=what):
        fit.update(lambda: None)
    assert fit.standing.updates == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in copies(parameters).items())


def test_an_overflow_in_float16_skips_the_update(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    fit, parameters = make_fit(shared_checkpoint, write_rows(ROWS), Precision(torch.float16, scale_loss=True))
    before = copies(parameters)
    hook = parameters["model.norm.weight"].register_hook(lambda gradient: gradient * float("inf"))
    fit.update(lambda: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in copies(parameters).items())
    hook.remove()
    fit.update(lambda: None)
    assert not any(torch.equal(before[name], tensor) for name, tensor in copies(parameters).items())


def test_a_gradient_that_is_not_finite_ends_the_run(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss alone does not tell: of the update after it, whose weights would be NaN, it would."""
    loss = module.batch_loss

    def steep(model: Any, batch: Any) -> torch.Tensor:
        value = loss(model, batch)
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient * float("nan"))
        return value

    monkeypatch.setattr(module, "batch_loss", steep)
    with pytest.raises(SlmError, match=r"^update 1: the gradient's norm is nan") as caught:
        finetune(shared_checkpoint, write_rows(ROWS), Path("out"), SETTINGS)
    assert caught.value.hint == "try a lower --learning-rate"
    assert not Path("out").exists()


def test_a_base_whose_loss_is_not_finite(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mean_loss", lambda *_: float("nan"))
    with pytest.raises(SlmError, match=r"^update 0: the loss on the training rows is nan") as caught:
        finetune(shared_checkpoint, write_rows(ROWS), Path("out"), SETTINGS)
    assert caught.value.hint == "slm eval measures the base"


def test_memory_that_runs_out(shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(module, "batch_loss", full)
    with pytest.raises(SlmError, match=r"^out of memory at update 1") as caught:
        finetune(shared_checkpoint, write_rows(ROWS), Path("out"), SETTINGS)
    assert caught.value.hint == "lower --batch-size or --max-length; nothing was saved yet"


def test_a_checkpoint_on_request(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    heard = Stopper(3, signal.SIGUSR1)
    finetune(shared_checkpoint, write_rows(ROWS), Path("out"), SETTINGS, heard)
    (note,) = (note for note in heard.lines if note.startswith("checkpoint after"))
    assert note.startswith("checkpoint after 3 updates, as asked: the run is saved in out/trainer")
    assert not Path("out/trainer").exists()  # the result took its place


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_a_run_that_is_stopped_while_it_evaluates(
    shared_checkpoint: Path, write_rows: WriteRows, evaluation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, left = write_rows(ROWS), iter(range(evaluation))
    finetune(shared_checkpoint, data, Path("whole"), SETTINGS)
    measure = module.mean_loss

    def interrupted(*rest: Any) -> float:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "mean_loss", interrupted)
        finetune(shared_checkpoint, data, Path("parts"), SETTINGS)
    state = json.loads(Path("parts/trainer/state.json").read_text(encoding="utf-8"))
    assert state["updates"] == evaluation * 8
    assert sum(kind == "eval" for kind, _ in state["history"]) == evaluation
    finetune(shared_checkpoint, data, Path("parts"), SETTINGS)
    for name in (ADAPTER_WEIGHTS_FILE, "metrics.jsonl"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"updates": 99}, {"updates": 12}, {"loss": None}, {"updates": 2}, {"loss_before": None}],
    ids=["too many updates", "later in the epoch", "no loss", "before the first epoch", "nothing measured before"],
)
def test_a_state_that_contradicts_itself(
    shared_checkpoint: Path, write_rows: WriteRows, changes: dict[str, Any]
) -> None:
    data = write_rows(ROWS)
    settings = SETTINGS.model_copy(update={"epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), settings, Stopper(10))
    file = Path("out/trainer/state.json")
    state = json.loads(file.read_text(encoding="utf-8"))
    assert state["updates"] == 10
    file.write_text(json.dumps(state | changes), encoding="utf-8")
    fits = changes == {"updates": 12}  # the control: still within the second epoch
    if fits:
        finetune(shared_checkpoint, data, Path("out"), settings)
        return
    with pytest.raises(SlmError, match=r"the saved state (contradicts itself|is damaged)") as caught:
        finetune(shared_checkpoint, data, Path("out"), settings)
    assert "--overwrite starts over" in (caught.value.hint or "")
