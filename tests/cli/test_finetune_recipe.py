"""`slm finetune --recipe`, `--set` and `--dry-run`: what overrides what, the same result again, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from slm.cli.commands.finetune import finetune
from slm.core.checkpoint import read_info
from slm.finetune.preparation import RowFiles
from slm.finetune.recipe import FinetuneRecipe, load_recipe
from slm.finetune.run import finetune as train
from slm.finetune.settings import FinetuneSettings
from slm.steps.choosing import default_base
from tests.progress import Stopper

pytestmark = pytest.mark.usefixtures("short_answers")

Slm = Callable[..., Any]
ROWS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "red", "blue", "cat")]
RECIPE = """
base: tiny
data: {train: pairs.jsonl}
samples: 1
training: {epochs: 1, rank: 2, dropout: 0.1}
"""


@pytest.fixture(autouse=True)
def run(shared_checkpoint: Path) -> Path:
    """A run with a checkpoint under ./runs, rows and a recipe."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return Path("runs/tiny")


def files() -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def options() -> dict[str, click.Option]:
    return {each.name or "": each for each in finetune.params if isinstance(each, click.Option)}


def test_the_same_recipe_gives_the_same_bytes_and_so_does_the_resolved_one(slm: Slm, run: Path) -> None:
    first = slm("finetune", "--recipe", "recipe.yaml", "--set", "training.seed=7", "--alpha", "9")
    assert first.code == 0, first.err
    made = run / "adapters" / "pairs"
    resolved = load_recipe(made / "config.yaml")
    assert (resolved.training.seed, resolved.training.alpha, resolved.training.rank) == (7, 9, 2)
    assert resolved.training.learning_rate is not None and resolved.training.batch_size == 4
    assert resolved.training.model_dump(mode="json") == read_info(made)["settings"]
    again = slm("finetune", "--recipe", made / "config.yaml", "--name", "again")
    assert again.code == 0, again.err
    other = run / "adapters" / "again"
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (made / name).read_bytes() == (other / name).read_bytes()
    assert load_recipe(other / "config.yaml") == resolved
    # Without another name, it would replace the adapter that it came from.
    refused = slm("finetune", "--recipe", made / "config.yaml")
    assert refused.code == 1 and "there is already an adapter" in refused.err


def test_a_full_run_keeps_its_recipe_beside_its_metrics(slm: Slm) -> None:
    result = slm(
        "finetune", "--recipe", "recipe.yaml", "--full", "pairs.jsonl", "--set", "training.dropout=0", "--json"
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["checkpoint"] == "runs/tiny-pairs/checkpoint/best"
    recipe = load_recipe(Path("runs/tiny-pairs/finetune/config.yaml"))
    assert recipe.training.method == "full" and recipe.out is None
    assert "warning: training.rank has no effect with training.method=full" in result.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--recipe", "none.yaml"), "none.yaml"),
        (("--recipe", "recipe.yaml", "--set", "training.rnak=1"), "the recipe has no value 'training.rnak'"),
        (
            ("--recipe", "recipe.yaml", "--set", "training.rank=none"),
            "recipe.yaml: training.rank: must be a whole number",
        ),
        (("--recipe", "recipe.yaml", "--set", "data.train=none.jsonl"), "fine-tuning data not found: none.jsonl"),
        (("--recipe", "recipe.yaml", "--set", "base=none"), "not found: none"),
        (("--recipe", "recipe.yaml", "--set", "data.train=null"), "the recipe has no data.train"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_mistake_is_one_error_and_changes_nothing(
    slm: Slm, arguments: tuple[str, ...], dry: tuple[str, ...], error: str
) -> None:
    before = files()
    result = slm("finetune", *arguments, *dry)
    assert result.code in (1, 2) and result.out == "" and "Traceback" not in result.err
    assert error in result.err
    assert files() == before


def test_rows_come_from_an_option_or_a_recipe(slm: Slm) -> None:
    result = slm("finetune", "--rank", "2")
    assert result.code == 2 and "give --lora FILE, --full FILE or --recipe FILE" in result.err


def test_every_option_of_training_has_its_value_in_the_recipe_with_the_same_default() -> None:
    named = {"targets": "target_modules", "qat": "qat"}
    training = FinetuneSettings()
    found = set()
    for name, option in options().items():
        field = named.get(name, name)
        if field not in FinetuneSettings.model_fields:
            continue
        found.add(field)
        default = None if option.default is None or "Sentinel" in repr(option.default) else option.default
        value = getattr(training, field)
        if name not in ("targets", "qat"):
            assert (default or None) == (value or None), name
        if isinstance(option.type, click.IntRange | click.FloatRange) and field != "seed" and field != "max_length":
            assert option.type.max is not None
            FinetuneSettings.checked(**{field: option.type.max} if not option.type.max_open else {})
    # These follow from --lora and --full, or have no option.
    assert FinetuneSettings.model_fields.keys() - found == {"method", "max_grad_norm", "skip_spikes"}
    samples = options()["samples"]
    assert samples.default == FinetuneRecipe().samples
    elsewhere = {"recipe", "set", "lora", "full", "overwrite", "dry_run", "as_json", "help"}
    rows = {"val", "hold_out", "skip_bad"}
    of_recipe = {"base", "teacher", "out", "name", "samples", "log", "max_document_bytes", "max_data_bytes", *rows}
    reverse = {"target_modules": "targets"}
    assert options().keys() - {reverse.get(field, field) for field in found} <= elsewhere | of_recipe


def test_a_dry_run_shows_what_would_be_trained_and_writes_nothing(slm: Slm) -> None:
    before = files()
    result = slm("finetune", "--recipe", "recipe.yaml", "--dry-run", "--learning-rate", "5", "--name", "mine")
    assert result.code == 0, result.err
    assert files() == before
    shown = result.out[: result.out.index("what would be trained")]
    recipe = FinetuneRecipe.model_validate(yaml.safe_load(shown))
    assert recipe.training.learning_rate == 5 and recipe.out is None
    flat = " ".join(result.out.replace("│", " ").split())
    for part in (
        "5 to train on, none held out",
        "2 updates of 4 rows",
        "rank 2 on 28 modules",
        "2 rows of the embedding",
    ):
        assert part in flat
    assert "row 1, read only: <|endoftext|>|<start_of_turn>" in result.out and "row 2, learned:   " in result.out
    assert "warning: the learning rate 5 is " in result.err and "warning: 5 training rows are few" in result.err


def test_a_dry_run_as_json_says_what_the_run_then_does(slm: Slm, run: Path) -> None:
    Path("long.jsonl").write_text(
        "".join(json.dumps({"prompt": "a", "completion": " b" * (5 * n + 1)}) + "\n" for n in range(12)),
        encoding="utf-8",
    )
    command = ("finetune", "--lora", "long.jsonl", "--epochs", "2", "--rank", "2", "--max-length", "40", "--json")
    dry = json.loads(slm(*command, "--dry-run").out)
    real = json.loads(slm(*command, "--samples", "0").out)
    for name in ("rows", "validation_rows", "truncated", "skipped", "bad", "trained_tokens", "epochs", "updates"):
        assert dry[name] == real[name], name
    assert dry["trainable_parameters"] == real["trainable_parameters"]
    assert dry["recipe"] == load_recipe(run / "adapters/long/config.yaml").model_copy(update={"samples": 3}).model_dump(
        mode="json"
    )
    assert any(warning.startswith("rows cut at 40 tokens") for warning in dry["warnings"])
    assert dry["measured"]["update_seconds"] > 0 and dry["seconds"] > dry["setup_seconds"] > 0
    assert dry["measured"]["memory"] > 50 << 20 and dry["measured"]["complete"]
    assert dry["rendered"][0][0]["learned"] is False and dry["rendered"][0][1]["learned"] is True


def test_a_dry_run_finds_what_would_stop_the_run(slm: Slm, run: Path) -> None:
    (run / "adapters" / "pairs").mkdir(parents=True)
    (run / "adapters" / "pairs" / "mine.txt").write_text("")
    result = slm("finetune", "--recipe", "recipe.yaml", "--dry-run")
    assert result.code == 1 and "contains other files: mine.txt" in result.err


def test_a_dry_run_finds_rows_that_do_not_fit_the_metric(slm: Slm) -> None:
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    Path("pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    command = ("finetune", "--recipe", "recipe.yaml", "--set", "training.dropout=0")
    for dry in ((), ("--dry-run",)):
        result = slm(*command, "--metric", "exact", *dry)
        assert result.code == 1 and "a metric does not choose the epoch of preferences" in result.err
        assert not Path("runs/tiny/adapters").exists()
    assert slm(*command, "--dry-run").code == 0


def test_a_dry_run_with_a_metric_names_what_its_estimate_leaves_out(slm: Slm) -> None:
    command, left_out = ("finetune", "--recipe", "recipe.yaml", "--dry-run"), "does not contain the replies"
    assert left_out in slm(*command, "--metric", "exact").err
    assert left_out not in slm(*command).err


def test_a_dry_run_resumes_what_the_run_would_resume(slm: Slm, run: Path) -> None:
    out, recipe = run / "adapters" / "pairs", load_recipe(Path("recipe.yaml"))
    command = ("finetune", "--recipe", "recipe.yaml", "--json")
    with pytest.raises(KeyboardInterrupt):
        train(run / "checkpoint/best", recipe.files(), out, recipe.training, Stopper(1))
    assert (out / "trainer").is_dir()
    before = files()
    assert json.loads(slm(*command, "--dry-run").out)["resumes"] is True
    for dry in ((), ("--dry-run",)):
        refused = slm(*command, "--rank", "3", *dry)
        assert refused.code == 1 and "holds an interrupted run that differs in rank" in refused.err
    assert json.loads(slm(*command, "--rank", "3", "--overwrite", "--dry-run").out)["resumes"] is False
    assert files() == before


def test_a_dry_run_on_the_demo_model_leaves_no_checkpoint(slm: Slm) -> None:
    shutil.rmtree("runs")
    result = slm("finetune", "--lora", "pairs.jsonl", "--dry-run", "--json", "--epochs", "1")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["base"] == "runs/stories/checkpoint/imported" and report["recipe"]["base"] is None
    assert not Path("runs").exists()


def test_a_dry_run_on_the_demo_model_sees_interrupted_runs(slm: Slm) -> None:
    """Also where the run would have to import the model again."""
    recipe, command = (
        load_recipe(Path("recipe.yaml")),
        ("finetune", "--lora", "pairs.jsonl", "--rank", "2", "--out", "out"),
    )
    command += ("--set", "training.epochs=1", "--set", "training.dropout=0.1", "--dry-run", "--json")
    with pytest.raises(KeyboardInterrupt):
        train(Path("runs/tiny/checkpoint/best"), recipe.files(), Path("out"), recipe.training, Stopper(1))
    shutil.rmtree("runs")
    refused = slm(*command)
    assert refused.code == 1 and "out holds an interrupted run that differs in base" in refused.err
    shutil.rmtree("out")
    base = default_base(lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train(base, recipe.files(), Path("out"), recipe.training, Stopper(1))
    for _ in range(2):
        assert json.loads(slm(*command).out)["resumes"] is True
        shutil.rmtree("runs", ignore_errors=True)


def test_a_dry_run_with_a_teacher(slm: Slm) -> None:
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} a"}) + "\n" for n in range(5)), encoding="utf-8"
    )
    before = files()
    command = ("finetune", "--lora", "prompts.jsonl", "--dry-run", "--json")
    result = slm(*command, "--teacher", "tiny")
    assert result.code == 0, result.err
    dry = json.loads(result.out)
    assert "answers written" not in result.err
    assert dry["recipe"]["teacher"] == str(Path("runs/tiny/checkpoint/best").absolute())
    assert any(warning.startswith("the teacher first answers 5 rows") for warning in dry["warnings"])
    refused = slm(*command)
    assert refused.code == 1 and "prompt" in refused.err  # without a teacher, a prompt alone is an error
    assert files() == before


def test_a_dry_run_uses_the_stored_answers_of_the_teacher(slm: Slm, run: Path) -> None:
    """And refuses those of another teacher or length, as the run does."""
    prompts = "".join(json.dumps({"prompt": f"{n} a"}) + "\n" for n in range(5))
    Path("prompts.jsonl").write_text(prompts, encoding="utf-8")
    out, recipe, best = run / "adapters" / "prompts", load_recipe(Path("recipe.yaml")), run / "checkpoint/best"
    rows = RowFiles(Path("prompts.jsonl"))
    # Stopped while the teacher answers, and then while the student learns.
    with pytest.raises(KeyboardInterrupt):
        train(best, rows, out, recipe.training, Stopper(2), teacher=best)
    stored = json.loads((out / "teacher/answers.json").read_text(encoding="utf-8"))["answers"]
    command = (
        "finetune",
        "--recipe",
        "recipe.yaml",
        "--lora",
        "prompts.jsonl",
        "--teacher",
        "tiny",
        "--dry-run",
        "--json",
    )
    dry = json.loads(slm(*command).out)
    assert 0 < len(stored) < 5 and not dry["resumes"]
    assert any(warning.startswith(f"the teacher first answers {5 - len(stored)} row") for warning in dry["warnings"])
    with pytest.raises(KeyboardInterrupt):
        train(best, rows, out, recipe.training, Stopper(5 - len(stored) + 1), teacher=best)
    assert (out / "trainer").is_dir()
    before = files()
    dry = json.loads(slm(*command).out)
    assert dry["resumes"] and not any(warning.startswith("the teacher first") for warning in dry["warnings"])
    refused = slm(*command, "--max-length", "20")
    assert refused.code == 1 and "another teacher, or with another --max-length" in refused.err
    assert files() == before
