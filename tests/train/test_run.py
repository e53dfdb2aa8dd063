"""Whole runs: what they leave, and that one cut in two is the one in one piece, bit for bit."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.core.progress import Silent
from slm.train import keep, learner
from slm.train import run as module
from slm.train.build import build_model
from slm.train.data.dataset import open_dataset
from slm.train.evaluate import Evaluation, evaluate
from slm.train.learner import Objective
from slm.train.recipe import Recipe
from slm.train.run import resume, train

MakeRecipe = Callable[..., Recipe]
OUT = Path("runs/small")
TIMES = ("elapsed_s", "tokens_s")

# Everything that could be forgotten when a run goes on: two optimizers, dice, an average, a place in an epoch.
PLAIN: dict[str, Any] = {}
EVERYTHING: dict[str, Any] = {
    "data": {"sampler": "packed"},
    "optimizer": {"name": "muon", "ema": 0.9},
    "regularization": {"dropout": 0.1},
    "schedule": {"shape": "wsd"},
    "evaluation": {"prompts": ["Once upon a time"], "sample_tokens": 5},
    "checkpoints": {"every_updates": 2, "keep": 2},
}
VARIANTS = pytest.mark.parametrize("sections", [PLAIN, EVERYTHING], ids=["plain", "everything"])
# Our logits and transformers', two float32 implementations that add in another order.
LOGITS_TOLERANCE = 3e-5


class Stopper(Silent):
    """Sends this process a signal after so many micro-steps."""

    def __init__(self, micro_steps: int, signum: int = signal.SIGINT) -> None:
        self.left, self.signum = micro_steps, signum

    def advance(self, amount: int = 1, **fields: str) -> None:
        if amount == 1 and not fields:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signum)


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything a run leaves but times: bytes of both checkpoints and of the optimizer, rows of the metrics."""
    files = [
        *run.glob("checkpoint/*/*"),
        *run.glob("data/*"),
        *run.glob("trainer/*.safetensors"),
        run / "config.yaml",
    ]
    hashes: dict[str, Any] = {
        str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)
    }
    return hashes | {"rows": [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]


def test_what_a_run_leaves(small_recipe: MakeRecipe) -> None:
    notes = Notes()
    result = train(small_recipe(), OUT, notes)
    assert sorted(path.name for path in OUT.iterdir()) == [
        "checkpoint", "config.yaml", "data", "loss.png", "metrics.jsonl", "tensorboard", "trainer"
    ]  # fmt: skip
    assert result.checkpoint == OUT / "checkpoint/best"
    assert result.loss < result.loss_before
    assert (result.micro_steps, result.updates, result.tokens) == (12, 6, 12 * 4 * 24)
    assert (OUT / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0, 4, 8, 12]
    for row in rows(OUT):
        expected = {"train": {"learning_rate", "grad_norm", "tokens_s"}, "eval": {"perplexity", "bits_per_byte"}}
        assert row.keys() == {"type", "micro_steps", "updates", "tokens", "elapsed_s", "loss"} | expected[row["type"]]
    said = "\n".join(notes.lines)
    assert f"{result.parameters:,} parameters" in said
    assert "MiB" in said
    assert "device: CPU" in said


@VARIANTS
def test_the_checkpoint_is_what_was_measured(small_recipe: MakeRecipe, sections: dict[str, Any]) -> None:
    result = train(small_recipe(**sections), OUT)
    model = load_checkpoint(result.checkpoint)
    dataset = open_dataset(OUT / "data")
    tokenizer, tokens = dataset.tokenizer, dataset.validation
    measured = evaluate(Objective(model), tokens, windows=8, context=24, batch_size=4, check=lambda: None)
    assert measured.loss == result.loss
    assert measured.bits_per_byte == result.bits_per_byte
    header = tokens.header
    nats = measured.loss * header.tokens
    assert measured.bits_per_byte == pytest.approx(nats / header.text_bytes / 0.6931471805599453)
    assert model.config.bos_token_id == tokenizer.token_id("<|endoftext|>")
    assert model.config.stop_token_ids == (tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<end_of_turn>"))
    assert model.config.pad_token_id == tokenizer.token_id("<pad>")


def test_how_it_was_made_is_written_down(small_recipe: MakeRecipe) -> None:
    recipe = small_recipe()
    result = train(recipe, OUT)
    info = json.loads((result.checkpoint / "slm.json").read_text(encoding="utf-8"))
    assert info["metrics"]["loss"] == result.loss
    assert info["recipe"]["batch"] == recipe.model_dump(mode="json")["batch"]
    assert (
        info["parameters"]
        == result.parameters
        == sum(p.numel() for p in load_checkpoint(result.checkpoint).parameters())
    )
    assert info["torch_version"] == torch.__version__
    assert info["data"]["train"]["text_sha256"] != info["data"]["validation"]["text_sha256"]
    assert info["data"]["train"]["tokenizer_sha256"] == info["tokenizer_sha256"]


def test_the_seed_decides(small_recipe: MakeRecipe) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_recipe().model_copy(update={"seed": seed}), Path(name))
    weights = [(Path(name) / "checkpoint/last/model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.fixture
def uncut(small_recipe: MakeRecipe) -> dict[str, Any]:
    """What the run in one piece leaves."""
    train(small_recipe(), Path("uncut"))
    return fingerprint(Path("uncut"))


# Micro-step 5 is the first of an update, 8 the last before an evaluation, 1 before anything was saved.
@pytest.mark.parametrize(
    "sections", [PLAIN, EVERYTHING, {"machine": {"precision": "float16"}}], ids=["plain", "everything", "float16"]
)
def test_a_run_cut_in_two_is_the_run_in_one_piece(small_recipe: MakeRecipe, sections: dict[str, Any]) -> None:
    recipe = small_recipe(**sections)
    train(recipe, Path("uncut"))
    for micro_steps in (1, 5, 8):
        cut = Path(f"cut-{micro_steps}")
        with pytest.raises(KeyboardInterrupt):
            train(recipe, cut, Stopper(micro_steps))
        assert leftovers(Path()) == []
        assert load_checkpoint(cut / "checkpoint/last")
        resume(cut)
        assert fingerprint(cut) == fingerprint(Path("uncut")), micro_steps


def nudge(file: Path, tensor: str) -> None:
    """Makes one value of a saved tensor a hundredth larger."""
    tensors = safetensors.torch.load_file(file)
    (name,) = (name for name in tensors if name.endswith(tensor))
    values = tensors[name].flatten()
    values[values.abs().argmax()] *= 1.01
    safetensors.torch.save_file(tensors, file)


def miscount(file: Path, micro_steps: str) -> None:
    state = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(state | {"micro_steps": int(micro_steps)}), encoding="utf-8")


@pytest.mark.parametrize(
    ("sections", "alter", "file", "what"),
    [
        (PLAIN, nudge, "optimizer.safetensors", "layers.1.mlp.up_proj.weight/exp_avg"),
        (PLAIN, nudge, "optimizer.safetensors", "layers.0.mlp.up_proj.weight/exp_avg_sq"),
        (PLAIN, miscount, "state.json", "4"),
        (EVERYTHING, nudge, "optimizer.safetensors", "layers.1.mlp.up_proj.weight/momentum_buffer"),
        (EVERYTHING, nudge, "optimizer.safetensors", "embed_tokens.weight/exp_avg"),
        (EVERYTHING, nudge, "average.safetensors", "layers.1.mlp.up_proj.weight"),
        (EVERYTHING, nudge, "model.safetensors", "layers.1.mlp.up_proj.weight"),
        (EVERYTHING, miscount, "state.json", "4"),
    ],
    ids=["first-moment", "second-moment", "counter", "momentum", "embedding", "average", "weights", "counter-of-all"],
)
def test_what_is_saved_is_what_the_run_goes_on_from(
    small_recipe: MakeRecipe, sections: dict[str, Any], alter: Callable[[Path, str], None], file: str, what: str
) -> None:
    """The control of the test above: with any of it altered the end is another."""
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(**sections), OUT, Stopper(7))  # after three updates
    shutil.copytree(OUT, "altered")
    # in the copy alone: files of a run may be links to each other
    altered = Path("altered/trainer", file)
    alter(altered, what)
    for run in (OUT, Path("altered")):
        resume(run)
    ends = [(run / "checkpoint/last/model.safetensors").read_bytes() for run in (OUT, Path("altered"))]
    assert ends[0] != ends[1]


def test_a_run_with_an_average_stopped_while_it_is_measured(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the average is in the place of the weights: it must not be saved as them."""
    recipe = small_recipe(**EVERYTHING)
    train(recipe, Path("uncut"))
    calls = iter(range(100))

    def stopped(*arguments: Any, **settings: Any) -> Evaluation:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(module, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, OUT)
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0]
    resume(OUT)
    assert fingerprint(OUT) == fingerprint(Path("uncut"))


def test_a_run_cut_twice_and_terminated(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    with pytest.raises(SystemExit) as done:
        train(small_recipe(), OUT, Stopper(3, signal.SIGTERM))
    assert done.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        resume(OUT, Stopper(4))
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_a_run_killed_between_two_files(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    # What `kill -9` can leave: a newer last checkpoint and newer metrics than trainer/, and half a line.
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(5))
    shutil.rmtree(OUT / "checkpoint/last")
    shutil.copytree("uncut/checkpoint/last", OUT / "checkpoint/last")
    metrics = OUT / "metrics.jsonl"
    newer = (Path("uncut") / "metrics.jsonl").read_text(encoding="utf-8")
    metrics.write_text(newer + '{"type": "tra', encoding="utf-8")
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_a_run_killed_while_its_state_was_replaced(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(5))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (OUT / "trainer").rename(OUT / f".trainer.replaced-{gone.stdout.strip()}")
    notes = Notes()
    resume(OUT, notes)
    assert any("going on after" in line for line in notes.lines)  # starting over would end the same, only later
    assert fingerprint(OUT) == uncut


def test_a_run_killed_before_it_saved_anything(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(1))
    for name in ("trainer", "checkpoint"):
        shutil.rmtree(OUT / name)
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_resuming_a_finished_run_changes_nothing(uncut: dict[str, Any]) -> None:
    resume(Path("uncut"))
    assert fingerprint(Path("uncut")) == uncut


def test_the_saved_weights_outlive_the_checkpoint_they_were_linked_to(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), OUT)
    trainer, last = (OUT / part / "model.safetensors" for part in ("trainer", "checkpoint/last"))
    assert trainer.samefile(last)
    tensors = safetensors.torch.load_file(trainer)
    shutil.rmtree(OUT / "checkpoint")
    assert safetensors.torch.load_file(trainer).keys() == tensors.keys()


def test_the_state_is_saved_while_it_runs(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save_state = keep.save_state
    monkeypatch.setattr("slm.train.loop._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(keep, "save_state", lambda run, counters, *rest: (
        saved.append(counters.micro_steps), save_state(run, counters, *rest)
    ))  # fmt: skip
    train(small_recipe(), OUT)
    assert saved == [2, 4, 6, 8, 10, 12, 12]


def test_an_interval_that_no_update_meets_exactly(small_recipe: MakeRecipe) -> None:
    train(
        small_recipe(batch={"accumulation": 4}, evaluation={"every_micro_steps": 5}, schedule={"micro_steps": 15}), OUT
    )
    # Measured after the update that reaches 5 and 10, and at the end; 3 micro-steps are left over and fill no update.
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0, 8, 12]
    assert rows(OUT)[-1]["updates"] == 3


@pytest.mark.parametrize("saved", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(small_recipe: MakeRecipe, saved: bool) -> None:
    recipe = small_recipe(
        schedule={"learning_rate": 1e30},
        optimizer={"weight_decay": 0.0},
        checkpoints={"every_updates": 1 if saved else None},
    )
    with pytest.raises(
        SlmError, match=r"^update 2, micro-step 3: the (loss|gradient's norm) is (nan|inf) \(hint: "
    ) as error:
        train(recipe, OUT)
    hint = error.value.hint or ""
    assert (f"checkpoint is {OUT / 'checkpoint/last'};" in hint) is saved
    assert ("no checkpoint was saved yet" in hint) is not saved
    assert "schedule.learning_rate" in hint
    assert leftovers(OUT) == []


def test_a_validation_loss_that_is_not_finite_is_no_best(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, float("nan")])
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(losses), bits_per_byte=1.0, tokens=1))
    with pytest.raises(SlmError, match=r"^update 4, micro-step 8: the validation loss is nan \(hint: ") as error:
        train(small_recipe(), OUT)
    assert "schedule.learning_rate" in (error.value.hint or "")
    best = json.loads((OUT / "checkpoint/best/slm.json").read_text(encoding="utf-8"))
    assert best["metrics"]["loss"] == 4.0
    assert [row["loss"] for row in rows(OUT) if row["type"] == "eval"] == [5.0, 4.0]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    MemoryError(),
]


def fail_after(monkeypatch: pytest.MonkeyPatch, losses: int, error: Exception) -> None:
    """Lets so many losses be computed and raises from then on."""
    left = iter(range(losses))
    cross_entropy = learner.linear_cross_entropy

    def failing(*arguments: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise error
        return cross_entropy(*arguments)

    monkeypatch.setattr(learner, "linear_cross_entropy", failing)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_says_what_to_lower(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_after(monkeypatch, 2 + 4, error)  # 8 windows are measured first, 4 at a time
    with pytest.raises(SlmError, match=r"^out of memory at micro-step 5 \(hint: ") as raised:
        train(small_recipe(), OUT)
    hint = raised.value.hint or ""
    assert "--set batch.batch_size=2 --set batch.accumulation=4 saves about" in hint
    assert "--set machine.gradient_checkpointing=true saves about" in hint
    assert "no checkpoint was saved yet" in hint
    assert leftovers(OUT) == []


def test_another_error_stays_what_it_is(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, 6, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        train(small_recipe(), OUT)


def test_the_best_is_kept_when_the_loss_rises_again(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 4.0, 3.0, 5.0])  # the one before the first update is no candidate
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(losses), bits_per_byte=1.0, tokens=1))
    result = train(small_recipe(), OUT)
    assert (result.loss_before, result.loss) == (1.0, 3.0)
    made = {name: json.loads((OUT / f"checkpoint/{name}/slm.json").read_text("utf-8")) for name in ("best", "last")}
    assert made["best"]["micro_steps"] == 8
    assert made["best"]["metrics"]["loss"] == 3.0
    assert made["last"]["micro_steps"] == 12
    assert made["last"]["metrics"]["loss"] == 5.0


def test_the_average_is_what_is_measured_and_kept_and_the_weights_are_what_is_trained(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), Path("plain"))
    train(small_recipe(optimizer={"ema": 0.9}), OUT)

    def weights(*parts: str) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(Path(*parts))

    def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    average, raw = weights(str(OUT), "trainer/average.safetensors"), weights(str(OUT), "trainer/model.safetensors")
    assert same(weights(str(OUT), "checkpoint/last/model.safetensors"), average)
    assert not same(average, raw)
    assert same(raw, weights("plain", "trainer/model.safetensors"))  # it takes no part in the training
    assert not Path("plain/trainer/average.safetensors").exists()
    losses = [[row["loss"] for row in rows(run) if row["type"] == "eval"] for run in (OUT, Path("plain"))]
    assert losses[0][0] == losses[1][0]  # before the first update there is nothing to average
    assert not set(losses[0][1:]) & set(losses[1][1:])


def test_samples_are_written_at_every_evaluation_and_disturb_nothing(small_recipe: MakeRecipe) -> None:
    prompts = ["Once upon a time", "The dog"]
    sections = {"regularization": {"dropout": 0.1}}  # which throws dice
    train(small_recipe(**sections), Path("quiet"))
    notes = Notes()
    for run, tokens in ((OUT, 12), (Path("again"), 12), (Path("shorter"), 2)):
        train(small_recipe(**sections, evaluation={"prompts": prompts, "sample_tokens": tokens}), run, notes)
    samples = [[row for row in rows(run) if row["type"] == "sample"] for run in (OUT, Path("again"), Path("shorter"))]
    assert [(row["micro_steps"], row["prompt"]) for row in samples[0]] == [
        (step, prompt) for step in (0, 4, 8, 12) for prompt in prompts
    ]
    texts = [[row["text"] for row in each] for each in samples]
    assert texts[0] == texts[1]
    assert all(longer.startswith(row["prompt"]) for longer, row in zip(texts[0], samples[0], strict=True))
    assert len(set(texts[0])) > len(prompts)  # the model has changed
    assert sum(map(len, texts[2])) < sum(map(len, texts[0]))
    assert sum("sample: " in line for line in notes.lines) == 3 * 8
    weights = [(run / "trainer/model.safetensors").read_bytes() for run in (OUT, Path("quiet"))]
    assert weights[0] == weights[1]


def test_tensorboard_shows_a_resumed_run_as_its_rows_do(small_recipe: MakeRecipe) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(7))
    resume(OUT)
    events = EventAccumulator(str(OUT / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for kind, heading in (("train", "train"), ("eval", "validation")):
        shown = [event.value for event in events.Scalars(f"{heading}/loss")]
        losses = [row["loss"] for row in rows(OUT) if row["type"] == kind]
        assert shown == pytest.approx(losses, rel=1e-6)  # float32
        assert len(shown) == {"train": 6, "eval": 4}[kind]
    assert (OUT / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_numbered_checkpoints(small_recipe: MakeRecipe) -> None:
    transformers = pytest.importorskip("transformers")
    train(small_recipe(checkpoints={"every_updates": 2, "keep": 2}), OUT)
    numbered = sorted(path.name for path in (OUT / "checkpoint").iterdir())
    assert numbered == ["best", "last", "update-0000004", "update-0000006"]
    kept, last = OUT / "checkpoint/update-0000004", OUT / "checkpoint/last"
    assert json.loads((kept / "slm.json").read_text(encoding="utf-8"))["updates"] == 4
    assert sorted(path.name for path in kept.iterdir()) == sorted(path.name for path in last.iterdir())
    ids = torch.arange(20)[None]
    ours = load_checkpoint(kept)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(kept, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < LOGITS_TOLERANCE
        assert (
            load_checkpoint(last)(ids) - theirs(ids).logits
        ).abs().max() > 100 * LOGITS_TOLERANCE  # it is the older one
    assert transformers.AutoTokenizer.from_pretrained(kept)("The dog").input_ids
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(checkpoints={"every_updates": 2, "keep": 2}), Path("cut"), Stopper(9))
    resume(Path("cut"))
    assert fingerprint(Path("cut")) == fingerprint(OUT)


def test_no_numbered_checkpoints_by_default(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), OUT)
    assert sorted(path.name for path in (OUT / "checkpoint").iterdir()) == ["best", "last"]


@pytest.mark.parametrize(
    ("patience", "losses", "stops_at"),
    [
        (1, [5.0, 4.0, 4.5], 8),
        (2, [5.0, 4.0, 4.5, 3.5], 12),  # a new best in time
        (1, [5.0, 4.0, 4.0], 8),  # equal is not better
        (2, [1.0, 4.0, 3.0, 2.0], 12),  # what was there before the first update is no best to wait for
        (1, [1.0, 4.0, 5.0], 8),
        (None, [5.0, 4.0, 4.5, 4.6], 12),
    ],
    ids=["out", "in-time", "equal", "before-training", "worse-than-before", "none"],
)
def test_patience(
    small_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    patience: int | None,
    losses: list[float],
    stops_at: int,
) -> None:
    left = iter(losses)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(left), bits_per_byte=1.0, tokens=1))
    notes = Notes()
    result = train(small_recipe(evaluation={"patience": patience}), OUT, notes)
    assert result.micro_steps == stops_at
    assert result.loss == min(losses[1:])
    assert list(left) == []
    assert json.loads((OUT / "trainer/state.json").read_text(encoding="utf-8"))["micro_steps"] == stops_at
    assert any("stopping early" in line for line in notes.lines) is (stops_at < 12)
    assert resume(OUT).micro_steps == stops_at  # which measures nothing anew and goes no further


def test_a_checkpoint_on_demand_and_the_run_goes_on(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    class Asker(Stopper, Notes):
        def __init__(self) -> None:
            Stopper.__init__(self, 5, signal.SIGUSR1)
            self.lines: list[str] = []
            self.saved: list[int] = []

        def note(self, text: str) -> None:
            self.lines.append(text)
            if "as asked" in text:
                state = json.loads((OUT / "trainer/state.json").read_text(encoding="utf-8"))
                assert load_checkpoint(OUT / "checkpoint/last")
                self.saved.append(state["micro_steps"])

    asker = Asker()
    train(small_recipe(), OUT, asker)
    assert asker.saved == [6]  # the end of the update in which it was asked for, once
    assert any("checkpoint after 3 updates, as asked" in line for line in asker.lines)
    assert fingerprint(OUT) == uncut


def test_what_the_machine_trades_reaches_the_model(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    cpu = torch.device("cpu")

    def body(**machine: Any) -> Any:
        recipe = small_recipe(machine=machine)
        return build_model(recipe, recipe.model.config(), cpu, None).model

    assert not body().gradient_checkpointing
    assert body(gradient_checkpointing=True).gradient_checkpointing
    assert not body().flex  # where there is no kernel for it
    train(small_recipe(), OUT)
    assert compiled == []
    train(small_recipe(machine={"compile": True}), Path("compiled"))
    assert len(compiled) == 1
    weights = [(run / "trainer/model.safetensors").read_bytes() for run in (OUT, Path("compiled"))]
    assert weights[0] == weights[1]  # compiled into itself


def test_windows_of_the_evaluation_may_have_a_length_of_their_own(small_recipe: MakeRecipe) -> None:
    train(small_recipe(evaluation={"context": 48}), OUT)
    train(small_recipe(), Path("same"))
    losses = [[row["loss"] for row in rows(run) if row["type"] == "eval"] for run in (OUT, Path("same"))]
    assert not set(losses[0]) & set(losses[1])
    weights = [(run / "trainer/model.safetensors").read_bytes() for run in (OUT, Path("same"))]
    assert weights[0] == weights[1]


def test_epochs_become_micro_steps(small_recipe: MakeRecipe) -> None:
    result = train(
        small_recipe(
            schedule={"epochs": 0.2, "micro_steps": None, "warmup_micro_steps": 1}, data={"sampler": "packed"}
        ),
        OUT,
    )
    config, dataset = module.load_recipe(OUT / "config.yaml"), open_dataset(OUT / "data")
    wanted = round(0.2 * len(dataset.train.ids) / (4 * 24))
    assert (config.schedule.micro_steps, config.schedule.epochs) == (wanted, None)
    assert result.micro_steps == wanted // 2 * 2


@pytest.mark.parametrize(
    ("data", "batch", "message"),
    [
        ({"train": ["missing.txt"]}, {}, "data not found: missing.txt"),
        ({"tokenizer": "missing.json"}, {}, "tokenizer not found"),
        ({"validation": "short.txt"}, {}, "the validation text is too short"),
        ({"train": ["short.txt"], "validation": "stories.txt"}, {}, "the training text is too short"),
    ],
)
def test_a_failed_preparation_leaves_nothing(
    small_recipe: MakeRecipe, data: dict[str, Any], batch: dict[str, Any], message: str
) -> None:
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(SlmError, match=message):
        train(small_recipe(data=data, batch=batch), OUT)
    assert not OUT.parent.exists()


def test_an_interrupted_preparation_leaves_nothing(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slm.train.prepare.check_lengths", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT)
    assert not OUT.parent.exists()


def test_a_directory_that_is_taken_is_left_alone(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    (OUT / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SlmError, match="not empty") as error:
        train(small_recipe(), OUT)
    assert error.value.hint == "name another with --out"  # there is nothing to --resume
    assert [path.name for path in OUT.iterdir()] == ["mine.txt"]


def test_a_run_that_saved_something_is_left_alone(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), OUT)
    before = fingerprint(OUT)
    for gone in (
        (),
        ("trainer",),
        ("checkpoint/last", "checkpoint/best"),
    ):  # what there is of it may be all that is left
        for path in gone:
            shutil.move(OUT / path, Path(path.replace("/", "-")))
        with pytest.raises(SlmError, match="not empty") as error:
            train(small_recipe(), OUT)
        assert f"slm train --resume --out {OUT} goes on with the run" in (error.value.hint or "")
        for path in gone:
            shutil.move(Path(path.replace("/", "-")), OUT / path)
    assert fingerprint(OUT) == before


def test_an_empty_directory_will_do(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    assert train(small_recipe(), OUT).checkpoint.is_dir()


@pytest.fixture
def diverged(small_recipe: MakeRecipe) -> None:
    """A run that ended before it saved anything."""
    with pytest.raises(SlmError, match="update 2"):
        train(small_recipe(schedule={"learning_rate": 1e30}, optimizer={"weight_decay": 0.0}), OUT)
    assert (OUT / "metrics.jsonl").is_file() and not (OUT / "trainer").exists()


def test_a_run_that_saved_nothing_gives_way(small_recipe: MakeRecipe, uncut: dict[str, Any], diverged: None) -> None:
    for name in (
        ".data.partial-1/train.bin",
        "checkpoint/.best.partial-1/config.json",
        ".trainer.partial-1/state.json",
    ):
        (OUT / name).parent.mkdir(parents=True)  # as killed runs leave them
        (OUT / name).touch()
    notes = Notes()
    train(small_recipe(), OUT, notes)
    assert fingerprint(OUT) == uncut
    assert any("saved nothing: starting anew there" in line for line in notes.lines)


def test_a_preparation_that_was_killed_gives_way(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    (OUT / ".data.partial-1").mkdir(parents=True)
    train(small_recipe(), OUT)
    assert fingerprint(OUT) == uncut


@pytest.mark.parametrize(
    "add",
    [
        lambda: (OUT / "notes.txt").touch(),
        lambda: (OUT / "data/notes.txt").touch(),
        lambda: (OUT / "mine").mkdir(),
        lambda: (OUT / "data/train-00000.bin").touch(),  # of slm data prepare, which may have taken hours
        lambda: (OUT / "loss.png").unlink() or (OUT / "loss.png").symlink_to("/dev/null"),
        lambda: (OUT / "config.yaml").unlink(),  # then it may be anybody's
    ],
    ids=["file", "file-in-data", "directory", "dataset", "link", "no-recipe"],
)
def test_what_a_run_did_not_make_does_not(small_recipe: MakeRecipe, diverged: None, add: Callable[[], object]) -> None:
    add()
    before = sorted(OUT.rglob("*"))
    with pytest.raises(SlmError, match="not empty"):
        train(small_recipe(), OUT)
    assert sorted(OUT.rglob("*")) == before


def test_nothing_gives_way_to_a_run_that_cannot_be_prepared(small_recipe: MakeRecipe, diverged: None) -> None:
    before = sorted(OUT.rglob("*"))
    with pytest.raises(SlmError, match="data not found"):
        train(small_recipe(data={"train": ["missing.txt"]}), OUT)
    assert sorted(OUT.rglob("*")) == before


def test_a_directory_that_another_process_works_in(small_recipe: MakeRecipe, diverged: None) -> None:
    before = sorted(OUT.rglob("*"))
    hold = (
        "import sys, time; from pathlib import Path; from slm.train.prepare import held\nwith held(Path(sys.argv[1])):"
    )
    program = f"{hold}\n    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(OUT)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for work in (lambda: train(small_recipe(), OUT), lambda: resume(OUT)):
            with pytest.raises(SlmError, match=r"another process \(\d+\) is at work in"):
                work()
        assert sorted(OUT.rglob("*")) == before
    finally:
        process.kill()
        process.wait()
    assert train(small_recipe(), OUT).checkpoint.is_dir()  # the system let go of it


def test_a_run_is_held_while_it_trains(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(*arguments: Any, **settings: Any) -> Evaluation:
        with pytest.raises(SlmError, match=r"another process \(\d+\) is at work in"):
            train(small_recipe(), OUT)
        seen.append(OUT)
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(module, "evaluate", measured)
    assert train(small_recipe(), OUT).updates == 6
    assert len(seen) == 4


def test_without_locks_a_run_can_be_made_and_none_gives_way(
    small_recipe: MakeRecipe, diverged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.raises(SlmError, match="not empty"):
        train(small_recipe(), OUT)
    assert train(small_recipe(), Path("another")).checkpoint.is_dir()


def test_what_a_failed_preparation_made_in_a_directory_is_removed(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(SlmError, match="too short"):
        train(small_recipe(data={"validation": "short.txt"}), OUT)
    assert list(OUT.iterdir()) == []


def test_resuming_what_is_no_run_or_damaged(small_recipe: MakeRecipe) -> None:
    with pytest.raises(SlmError, match="no run to go on with"):
        resume(OUT)
    train(small_recipe(), OUT)
    (OUT / "trainer/optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(SlmError, match="damaged"):
        resume(OUT)
    train(small_recipe(optimizer={"ema": 0.9}), Path("averaged"))
    Path("averaged/trainer/average.safetensors").unlink()
    with pytest.raises(SlmError, match="the saved moving average lacks"):
        resume(Path("averaged"))
    tokens = OUT / "data/train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(SlmError, match=r"train.bin"):
        resume(OUT)


def test_cuda_that_is_not_there(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SlmError, match="no CUDA device"):
        train(small_recipe(machine={"device": "cuda"}), OUT)
    assert not OUT.parent.exists()


def edit(**values: Any) -> None:
    """Changes values of the run's recipe, as people do."""
    fields = yaml.safe_load((OUT / "config.yaml").read_text(encoding="utf-8"))
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            fields[section][key] = value
        else:
            fields[name] = value
    (OUT / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")


def test_a_run_goes_on_with_its_updates_cut_into_other_micro_steps(small_recipe: MakeRecipe) -> None:
    """What the advice on memory says: half the batch, twice the accumulation, twice the micro-steps."""
    done = train(small_recipe(), OUT)
    edit(batch__batch_size=2, batch__accumulation=4, schedule__micro_steps=32, schedule__warmup_micro_steps=4)
    more = resume(OUT)
    assert (done.updates, more.updates) == (6, 8)
    assert more.tokens == done.tokens * 8 // 6
    rows = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["updates"] for row in rows if row["type"] == "train"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 5}, "was saved with seed = 0, and config.yaml says 5"),
        ({"batch__batch_size": 8}, "batch.batch_size × accumulation = 8"),
        ({"data__sampler": "packed"}, "data.sampler = random"),
        ({"optimizer__name": "muon"}, "optimizer.name = adamw"),
        ({"model__hidden_size": 64}, "the saved weights are not those of this model"),
        ({"evaluation__context": 60, "evaluation__windows": 10**6}, None),
    ],
)
def test_what_a_run_cannot_change_on_its_way_is_refused(
    small_recipe: MakeRecipe, change: dict[str, Any], said: str | None
) -> None:
    train(small_recipe(), OUT)
    before = (OUT / "trainer" / "model.safetensors").read_bytes()
    edit(**change)
    if said is None:  # how it is measured may change
        assert resume(OUT).updates == 6
        return
    with pytest.raises(SlmError, match=re.escape(said)):
        resume(OUT)
    assert (OUT / "trainer" / "model.safetensors").read_bytes() == before


def test_a_run_whose_state_is_gone_does_not_start_over(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), OUT)
    shutil.rmtree(OUT / "trainer")
    with pytest.raises(SlmError, match="the state to go on from is gone"):
        resume(OUT)


@pytest.mark.parametrize(("first", "then"), [("float32", "float16"), ("float16", "float32")])
def test_a_run_may_go_on_in_another_precision(small_recipe: MakeRecipe, first: str, then: str) -> None:
    train(small_recipe(machine={"precision": first}), OUT)
    edit(machine__precision=then, schedule__micro_steps=16)
    assert resume(OUT).updates == 8
