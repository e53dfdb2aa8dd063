"""Several processes on the CPU learn what one process learns; `test_torchrun.py` has torchrun and the command line.

Run as a program, this module does the jobs of a file, in forks with the variables that torchrun sets.
"""

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.core.nn.fake_quant import round_weight
from slm.core.progress import Silent
from slm.core.qat import GRIDS
from slm.train import parallel, run
from slm.train.build import build_learner, build_model, with_special_tokens
from slm.train.data.dataset import open_dataset
from slm.train.evaluate import evaluate
from slm.train.parallel import Alone, Processes, by_first, collect, joined, share_of
from slm.train.precision import Precision
from slm.train.prepare import prepare
from slm.train.recipe import Recipe, load_recipe
from tests.forks import Forks
from tests.progress import Stopper
from tests.train.recipes import small

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
Jobs = list[dict[str, Any]]
Do = Callable[[dict[int, Jobs], Path], None]
Measured = dict[str, Tensor]

# Gradients in float32, as the norm of the difference over the norm: the processes' parts are summed in another order.
# Measured: up to 3e-7 at the first update, 2e-6 at the second.
GRADIENT_TOLERANCE = 1e-5
# Losses are means of float32 means: of other rows where the processes share them. Measured: up to 1.3e-7.
LOSS_TOLERANCE = 1e-6
# Products in bfloat16 keep 8 bits; other shapes of the same product round otherwise. Measured: up to 2.5e-3, losses 3e-5;
# at the second update 4e-2, for AdamW makes steps of full length where a gradient is nothing but rounding.
BFLOAT16_TOLERANCE = 1e-2
BFLOAT16_TOLERANCE_LATER = 0.1
BFLOAT16_LOSS_TOLERANCE = 3e-4
# Weights and loss after six updates in float32. Measured: up to 5e-7, and 3e-8.
WEIGHTS_TOLERANCE = 1e-5
RUN_LOSS_TOLERANCE = 1e-6

STOPPED_AT = 6

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "random-tied": {},
    "packed-untied": {"data": {"sampler": "packed"}, "model": {"tie_word_embeddings": False}},
    "checkpointing-tied": {"machine": {"gradient_checkpointing": True, "loss_chunk": 7}},
    "rounded-tied": {"qat": {"precision": "int8"}},
    "rounded-untied": {"qat": {"precision": "int4"}, "model": {"tie_word_embeddings": False}},
    # Rows with different numbers of targets, in micro-steps and processes; weights that decay outside of the optimizer.
    "documents-tied": {
        "data": {"sampler": "best_fit"},
        "batch": {"first_context": 12},
        "optimizer": {"cautious": True, "weight_decay": 1.0},
    },
    "bfloat16-tied": {"machine": {"precision": "bfloat16"}},
}
# What two processes do beyond one, four do too; one variant has the plain path, the other one everything else in float32.
FOUR = ("random-tied", "checkpointing-tied")
# Steps that are left out, to see that it is noticed.
BROKEN = (("ddp", "rows"), ("fsdp", "rows"), ("ddp", "average"))
EMA = {"optimizer": {"ema": 0.9}}
ROUNDED = EMA | {"qat": {"precision": "int4"}}


def measure(recipe: Recipe, data: Path, processes: Processes, broken: str | None = None) -> Measured:
    """Returns gradients of a micro-step and of an update, and losses, as one process after another computes them."""
    dataset = open_dataset(data)
    config = with_special_tokens(recipe.model.config(), dataset.tokenizer)
    device = torch.device("cpu")
    model = build_model(recipe, config, device, None)
    precision = Precision(torch.bfloat16 if recipe.machine.precision == "bfloat16" else None, scale_loss=False)
    if broken == "rows":  # everybody computes the first one's

        class Twins(Alone):
            rank, size = 0, processes.size

        mine = share_of(recipe.batch.batch_size, Twins())
        patch = pytest.MonkeyPatch()
        patch.setattr("slm.train.build.share_of", lambda *_: mine)
        learner = build_learner(recipe, model, dataset.train, device, precision, None, processes)
        patch.undo()
    else:
        learner = build_learner(recipe, model, dataset.train, device, precision, None, processes)
    objective = learner.objective
    measured: Measured = {}

    def keep(what: str) -> None:
        gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        measured.update({f"{what}/{name}": tensor.clone() for name, tensor in collect(gradients).items()})

    arguments = learner._batch(0)
    with processes.micro_step(objective, last=broken != "average"), learner._autocast():
        objective(*arguments).backward()
    keep("micro-step")
    if broken is not None:
        return measured
    learner.optimizers.zero_grad()
    for number in range(2):
        update = learner.update(number * learner.accumulation, lambda: None)
        keep(f"update-{number}")
        measured[f"loss/update-{number}"] = torch.tensor(update.loss, dtype=torch.float64)
        measured[f"norm/update-{number}"] = torch.tensor(update.grad_norm, dtype=torch.float64)
        evaluation = evaluate(
            objective,
            dataset.validation,
            windows=recipe.evaluation.windows,
            context=recipe.batch.context,
            batch_size=recipe.batch.batch_size // processes.size,
            check=lambda: None,
            processes=processes,
        )
        measured[f"loss/evaluation-{number}"] = torch.tensor(evaluation.loss, dtype=torch.float64)
    return measured


def copy_run(source: Path, out: Path, kind: str) -> None:
    """Copies a stopped run, to be gone on with in another way."""
    shutil.copytree(source, out)
    recipe = load_recipe(out / "config.yaml")
    (out / "config.yaml").write_text(Recipe.model_validate(fields(recipe, kind)).to_yaml(), encoding="utf-8")


def train_for(job: dict[str, Any], processes: Processes) -> None:
    """Trains or goes on; stops early where the job says so."""
    out, stop = Path(job["out"]), job.get("stop")
    if "source" in job:
        by_first(processes, lambda: copy_run(Path(job["source"]), out, job["parallel"]))
    progress = Stopper(stop, signal.SIGTERM) if stop else None
    try:
        if "recipe" in job:
            run.train(Recipe.model_validate(job["recipe"]), out, progress, processes)
        else:
            run.resume(out, progress, processes)
        assert stop is None
    except SystemExit:
        assert stop is not None


def tell(processes: Processes) -> None:
    """Checks that all hear what the first process says, complaints too, and that nobody else is listened to."""
    said = {"text": "naïve 🦊" * 10_000, "numbers": [0.1, 1 << 60, -1e-300], "nothing": None, "rank": processes.rank}
    assert processes.from_first(said) == said | {"rank": 0}
    assert processes.from_first("" if processes.rank == 0 else "longer") == ""
    assert by_first(processes, lambda: [processes.rank]) == [0]
    with pytest.raises(SlmError, match=r"^no: 0 \(hint: why\)$") as error:
        by_first(processes, lambda: (_ for _ in ()).throw(SlmError(f"no: {processes.rank}", "why")))
    assert error.value.hint == "why"


def work(jobs: Jobs) -> None:
    """Does the jobs as one of the processes."""
    torch.set_num_threads(1)
    with joined() as processes:
        for job in jobs:
            if job["kind"] == "train":
                train_for(job, processes)
                continue
            if job["kind"] == "tell":
                tell(processes)
                continue
            measured = measure(Recipe.model_validate(job["recipe"]), Path(job["data"]), processes, job.get("broken"))
            if processes.rank == 0:
                safetensors.torch.save_file(measured, job["file"])


def forked(processes: int, jobs: Jobs) -> None:
    """Has a number of new processes do the jobs together.

    Raises:
        AssertionError: When one of them fails.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = []
    for rank in map(str, range(processes)):
        if not (child := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            code = 1
            try:
                work(jobs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * processes, codes


@pytest.fixture(scope="module")
def do(trainers: Forks) -> Do:
    """Has so many processes do jobs, one number of processes after the other, with a directory to write the jobs to."""
    program = f"import runpy; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({__file__!r}, run_name='__main__')"

    def start(jobs: dict[int, Jobs], at: Path) -> None:
        file = at / f"jobs-{max(jobs)}.json"
        file.write_text(json.dumps(list(jobs.items())), encoding="utf-8")
        ended = trainers(program, str(file))
        assert ended.returncode == 0, ended.stderr

    return start


def fields(recipe: Recipe, parallel_kind: str) -> dict[str, Any]:
    machine = recipe.machine.model_copy(update={"parallel": parallel_kind})
    return recipe.model_copy(update={"machine": machine}).model_dump(mode="json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


# The clipping is at work, and the 11 windows divide neither by the batch nor by the processes.
SECTIONS: dict[str, dict[str, Any]] = {
    "batch": {"batch_size": 8},
    "optimizer": {"max_grad_norm": 0.5},
    "schedule": {"final_learning_rate": 0.0},
    "evaluation": {"windows": 11, "prompts": ["Once upon"], "sample_tokens": 5},
}


@pytest.fixture(scope="module")
def recipes(story_file: Path) -> MakeRecipe:
    """Small recipes."""
    return lambda **sections: small(story_file, SECTIONS, sections)


@pytest.fixture(scope="module")
def data(place: Path, recipes: MakeRecipe) -> Path:
    prepare(recipes(), place / "prepared", Silent())
    return place / "prepared/data"


def measuring(recipes: MakeRecipe, data: Path, processes: int, at: Path, variants: Iterable[str]) -> Jobs:
    return [
        {
            "kind": "measure",
            "recipe": fields(recipes(**VARIANTS[name]), kind),
            "data": str(data),
            "file": str(at / f"{processes}-{kind}-{name}.safetensors"),
        }
        for kind in ("ddp", "fsdp")
        for name in variants
    ]


def stopped(recipes: MakeRecipe, kind: str, out: Path) -> dict[str, Any]:
    return {"kind": "train", "recipe": fields(recipes(**EMA), kind), "out": str(out), "stop": STOPPED_AT}


def going_on(place: Path, source: str, kind: str, out: str) -> dict[str, Any]:
    return {"kind": "train", "source": str(place / source), "parallel": kind, "out": str(place / out)}


@pytest.fixture(scope="module")
def alone(place: Path, recipes: MakeRecipe, data: Path) -> dict[str, Measured]:
    """One process: what it measures, a run in one piece (`1`) and one that was stopped (`1-stopped`)."""
    torch.set_num_threads(1)
    run.train(recipes(**EMA), place / "1")
    train_for(stopped(recipes, "ddp", place / "1-stopped"), Alone())
    return {name: measure(recipes(**sections), data, Alone()) for name, sections in VARIANTS.items()}


@pytest.fixture(scope="module")
def two(place: Path, recipes: MakeRecipe, data: Path, alone: dict[str, Measured], do: Do) -> Path:
    """Two processes: measurements, runs in one piece, stopped runs, and those gone on with."""
    jobs = measuring(recipes, data, 2, place, VARIANTS)
    for kind, broken in BROKEN:
        file = str(place / f"2-{kind}-without-{broken}.safetensors")
        jobs.append({**jobs[0], "recipe": fields(recipes(), kind), "broken": broken, "file": file})
    for kind in ("ddp", "fsdp"):
        jobs.append({"kind": "train", "recipe": fields(recipes(**EMA), kind), "out": str(place / f"2-{kind}")})
        jobs.append(
            {"kind": "train", "recipe": fields(recipes(**ROUNDED), kind), "out": str(place / f"2-{kind}-rounded")}
        )
        jobs.append(stopped(recipes, kind, place / f"2-{kind}-stopped"))
        jobs.append(going_on(place, "1-stopped", kind, f"1-to-2-{kind}"))
    for before in ("ddp", "fsdp"):
        for kind in ("ddp", "fsdp"):
            jobs.append(going_on(place, f"2-{before}-stopped", kind, f"2-{before}-to-2-{kind}"))
    do({2: [*jobs, {"kind": "tell"}]}, place)
    return place


@pytest.fixture(scope="module")
def four(place: Path, recipes: MakeRecipe, data: Path, alone: dict[str, Measured], do: Do) -> Path:
    """Four processes, which two go on from."""
    as_four = [*measuring(recipes, data, 4, place, FOUR), stopped(recipes, "fsdp", place / "4-stopped")]
    as_two = [going_on(place, "4-stopped", kind, f"4-to-2-{kind}") for kind in ("ddp", "fsdp")]
    do({4: as_four, 2: as_two}, place)
    return place


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference as a share of the norm."""
    return ((found - expected).norm() / expected.norm()).item()


def gradients_differ(found: Measured, expected: Measured, what: str) -> float:
    names = [name for name in expected if name.startswith(what)]
    assert names
    return max(difference(found[name], expected[name]) for name in names)


def check_measured(found: Measured, expected: Measured, variant: str) -> None:
    rough = variant.startswith("bfloat16")
    assert found.keys() == expected.keys()
    first, later = (BFLOAT16_TOLERANCE, BFLOAT16_TOLERANCE_LATER) if rough else (GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)
    for what, tolerance in (("micro-step/", first), ("update-0/", first), ("update-1/", later)):
        assert gradients_differ(found, expected, what) < tolerance, what
    losses = BFLOAT16_LOSS_TOLERANCE if rough else LOSS_TOLERANCE
    for name in (name for name in expected if name.startswith("loss/")):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=losses), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_learn_what_one_does(two: Path, alone: dict[str, Measured], variant: str, kind: str) -> None:
    check_measured(safetensors.torch.load_file(two / f"2-{kind}-{variant}.safetensors"), alone[variant], variant)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", FOUR)
def test_four_processes_learn_what_one_does(four: Path, alone: dict[str, Measured], variant: str, kind: str) -> None:
    check_measured(safetensors.torch.load_file(four / f"4-{kind}-{variant}.safetensors"), alone[variant], variant)


def test_the_clipping_was_at_work(alone: dict[str, Measured], recipes: MakeRecipe) -> None:
    for name, measured in alone.items():
        assert measured["norm/update-0"] > 2 * recipes().optimizer.max_grad_norm, name


@pytest.mark.parametrize(("kind", "broken"), BROKEN)
def test_what_is_left_out_is_noticed(two: Path, alone: dict[str, Measured], kind: str, broken: str) -> None:
    found = safetensors.torch.load_file(two / f"2-{kind}-without-{broken}.safetensors")
    assert gradients_differ(found, alone["random-tied"], "micro-step/") > 10 * BFLOAT16_TOLERANCE_LATER


def weights(directory: Path, file: str = "checkpoint/last/model.safetensors") -> Measured:
    return safetensors.torch.load_file(directory / file)


def last_loss(directory: Path) -> float:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["micro_steps"] for row in rows if row["type"] == "train"] == [2, 4, 6, 8, 10, 12]
    return float([row["loss"] for row in rows if row["type"] == "eval"][-1])


def check_run(found: Path, expected: Path) -> None:
    """Makes sure that two runs ended alike: weights, their average, and the loss."""
    for file in ("checkpoint/last/model.safetensors", "trainer/model.safetensors"):
        mine, theirs = weights(found, file), weights(expected, file)
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            # norms start at zero: as a share of what they are they differ more
            assert (mine[name] - tensor).norm() < WEIGHTS_TOLERANCE * max(1.0, tensor.norm().item()), (file, name)
    assert last_loss(found) == pytest.approx(last_loss(expected), rel=RUN_LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["2-ddp", "2-fsdp", "1-to-2-ddp", "1-to-2-fsdp", "2-ddp-to-2-fsdp", "2-fsdp-to-2-ddp"])
def test_a_run_ends_alike_whoever_trains_it(two: Path, name: str) -> None:
    check_run(two / name, two / "1")


def test_a_run_half_done_is_another(two: Path) -> None:
    half, done = weights(two / "1-stopped"), weights(two / "1")
    assert max((half[name] - done[name]).norm() for name in done) > 1000 * WEIGHTS_TOLERANCE


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_started_one_goes_on(two: Path, kind: str) -> None:
    train_for(going_on(two, f"2-{kind}-stopped", "ddp", f"2-{kind}-to-1"), Alone())
    check_run(two / f"2-{kind}-to-1", two / "1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_processes_started_two_go_on(four: Path, kind: str) -> None:
    check_run(four / f"4-to-2-{kind}", four / "1")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_same_processes_go_on_bit_for_bit(two: Path, kind: str) -> None:
    for file in ("checkpoint/last/model.safetensors", "checkpoint/best/model.safetensors", *(
        f"trainer/{name}.safetensors" for name in ("model", "optimizer", "average")
    )):  # fmt: skip
        mine, theirs = (weights(two / name, file) for name in (f"2-{kind}-to-2-{kind}", f"2-{kind}"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), file


def test_what_fsdp_saves_is_whole(two: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = two / "2-fsdp/checkpoint/best"
    ids = torch.arange(20).view(2, 10)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = load_checkpoint(path)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpoints_on_a_grid_are_the_rounded_average(two: Path, kind: str) -> None:
    run = two / f"2-{kind}-rounded"
    saved, average, trained = (
        weights(run, file)
        for file in ("checkpoint/last/model.safetensors", "trainer/average.safetensors", "trainer/model.safetensors")
    )
    for name, scheme in GRIDS["int4"].schemes(load_checkpoint(run / "checkpoint/last").config):
        assert torch.equal(saved[name], round_weight(average[name], scheme)), name
        assert not torch.equal(saved[name], round_weight(trained[name], scheme)), name
    assert last_loss(run) == pytest.approx(last_loss(two / "2-ddp-rounded"), rel=1e-3)


def test_both_kinds_write_the_same_samples(two: Path) -> None:
    texts = {}
    for name in ("1", "2-ddp", "2-fsdp"):
        rows = [json.loads(line) for line in (two / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        texts[name] = [row["text"] for row in rows if row["type"] == "sample"][:1]  # before the first update
    assert texts["1"]
    assert texts["1"] == texts["2-ddp"] == texts["2-fsdp"]


def test_the_first_does_it_and_alone_nothing_is_asked() -> None:
    assert by_first(Alone(), lambda: 3) == 3
    with pytest.raises(SlmError, match="no"):
        by_first(Alone(), lambda: (_ for _ in ()).throw(SlmError("no")))
    assert parallel._TOGETHER < timedelta(hours=1) < parallel._PATIENCE


if __name__ == "__main__":
    for number, some in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        forked(number, some)
