"""Recipes: the ones that ship, overrides, and what is refused."""

from pathlib import Path

import pytest
import yaml

from slm.core.errors import SlmError
from slm.train.recipe import Recipe, load_recipe, recipe_names

# Tokens of TinyStories under GPT-2's tokenizer, about: for the recipes whose length is in epochs.
TOKENS = 470_000_000


def test_the_recipes_that_ship() -> None:
    assert recipe_names() == ["documented", "modern", "stories-4m", "tiny"]


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    recipe = recipe.for_tokens(TOKENS)
    assert recipe.schedule.warmup_micro_steps < recipe.micro_steps
    assert recipe.updates > 0
    if name != "documented":  # which has its leftover on purpose
        assert recipe.micro_steps % recipe.batch.accumulation == 0


@pytest.mark.parametrize(("micro_steps", "epochs"), [(100, 2), (None, None)], ids=["both", "neither"])
def test_the_length_is_micro_steps_or_epochs(tmp_path: Path, micro_steps: int | None, epochs: int | None) -> None:
    message = r"either schedule.micro_steps or schedule.epochs; set the other to null"
    fields = load_recipe("tiny").model_dump(mode="json")
    fields["schedule"] |= {"micro_steps": micro_steps, "epochs": epochs}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(SlmError, match=message):
        load_recipe(file)
    given = [f"schedule.{name}={value or 'null'}" for name, value in (("micro_steps", micro_steps), ("epochs", epochs))]
    with pytest.raises(SlmError, match=message):
        load_recipe("tiny", given)


def test_a_length_that_is_set_takes_the_place_of_the_recipes_own(tmp_path: Path) -> None:
    in_epochs = load_recipe("tiny", ["schedule.epochs=2"])
    assert (in_epochs.schedule.micro_steps, in_epochs.schedule.epochs) == (None, 2)
    file = tmp_path / "mine.yaml"
    file.write_text(in_epochs.to_yaml(), encoding="utf-8")
    in_micro_steps = load_recipe(file, ["schedule.micro_steps=30"])
    assert (in_micro_steps.schedule.micro_steps, in_micro_steps.schedule.epochs) == (30, None)


@pytest.mark.parametrize(
    ("epochs", "accumulation", "tokens", "micro_steps"),
    [
        (1, 1, 102_400, 100),
        (2.5, 1, 102_400, 250),
        (1, 1, 102_400 + 511, 100),  # to the nearest
        (1, 1, 102_400 + 513, 101),
        (0.001, 1, 102_400, 1),  # one update at least
        (0.001, 8, 102_400, 8),
        (1, 8, 109 * 1024, 112),  # 13.6 updates
        (1, 8, 107 * 1024, 104),
    ],
)
def test_epochs_become_micro_steps(epochs: float, accumulation: int, tokens: int, micro_steps: int) -> None:
    recipe = load_recipe("tiny", [f"schedule.epochs={epochs}", f"batch.accumulation={accumulation}"])
    assert recipe.tokens_per_micro_step == 1024
    known = recipe.for_tokens(tokens)
    assert (known.schedule.micro_steps, known.schedule.epochs) == (micro_steps, None)
    assert known.updates == micro_steps // accumulation
    assert known.for_tokens(999_999_999) == known  # once known it stays


def test_a_recipe_in_micro_steps_does_not_ask_for_tokens() -> None:
    recipe = load_recipe("tiny")
    assert recipe.for_tokens(3) == recipe


def test_modern_differs_from_documented_in_how_it_learns_not_in_the_model() -> None:
    modern, documented = load_recipe("modern"), load_recipe("documented")
    assert modern.model == documented.model
    assert modern.data.tokenizer == documented.data.tokenizer
    assert (modern.optimizer.name, modern.schedule.shape, modern.data.sampler) == ("normuon", "wsd", "packed")
    # measured alike, so that the losses compare
    assert modern.evaluation.context == documented.batch.context
    assert modern.evaluation.windows == documented.evaluation.windows


def test_the_documented_numbers() -> None:
    recipe = load_recipe("documented")
    config = recipe.model.config()
    assert (recipe.batch.batch_size, recipe.batch.context, recipe.batch.accumulation) == (32, 128, 32)
    assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.weight_decay) == ((0.9, 0.95), 1e-9, 0.1)
    assert recipe.optimizer.max_grad_norm == 0.5
    assert (recipe.schedule.micro_steps, recipe.schedule.warmup_micro_steps) == (150_000, 10_000)
    assert (recipe.schedule.learning_rate, recipe.schedule.final_learning_rate) == (1e-4, 5e-4)
    assert recipe.evaluation.every_micro_steps == 500
    assert recipe.data.tokenizer == "gpt2"
    assert recipe.updates == 4_687
    assert recipe.schedule.micro_steps * recipe.tokens_per_micro_step == 614_400_000
    assert config.parameter_count() == 132_490_496 + (50_304 - 50_257) * 640


def test_the_windows_of_tiny_pass_its_sliding_window() -> None:
    recipe = load_recipe("tiny")
    assert recipe.batch.context > recipe.model.config().sliding_window


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ["model.hidden_size=96", "batch.accumulation=2", "data.validation=a b.txt"])
    file = tmp_path / "config.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert recipe.model.config().hidden_size == 96


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("batch.accumulation=3", "batch", "accumulation", 3),
        ("schedule.learning_rate=1e-3", "schedule", "learning_rate", 1e-3),  # to YAML 1.1 text, to pydantic a number
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("data.train=[a.txt, b.txt]", "data", "train", ("a.txt", "b.txt")),
        ("data.train=a.txt", "data", "train", ("a.txt",)),
        ("machine.precision=float32", "machine", "precision", "float32"),
        ("evaluation.prompts=[Once upon a time, The dog]", "evaluation", "prompts", ("Once upon a time", "The dog")),
        ("checkpoints.every_updates=null", "checkpoints", "every_updates", None),
        ("regularization.dropout=0.1", "regularization", "dropout", 0.1),
    ],
)
def test_set(override: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(load_recipe("tiny", [override]), section), field) == value


def test_set_fills_a_section_that_is_empty_in_the_file(tmp_path: Path) -> None:
    fields = load_recipe("tiny").model_dump(mode="json") | {"optimizer": None}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert load_recipe(file, ["optimizer.eps=1e-8"]).optimizer.eps == 1e-8


def test_another_depth_brings_its_layer_types() -> None:
    assert len(load_recipe("tiny", ["model.num_hidden_layers=8"]).model.config().layer_types) == 8


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("batch.size=3", "no value 'batch.size'", "batch.batch_size, batch.context, batch.accumulation"),
        ("btch.batch_size=3", "no value 'btch.batch_size'", "batch.batch_size"),
        ("batch=3", "no value 'batch'", "batch.context"),
        ("model.hidden=3", "no value 'model.hidden'", "model.hidden_size"),
        ("model.eos_token_id=3", "no value", "model.vocab_size"),  # comes with the tokenizer
        ("batch.context", "there is no '='", "--set"),
        ("batch.context=0", r"batch.context: .*greater than 1", None),
        ("batch.context=9999", "max_position_embeddings", None),
        ("batch.accumulation=9999999", "there would be no update", None),
        ("model.preset=giant", "no preset is called 'giant'", "tiny"),
        ("model.head_dim=63", "head_dim", None),
        ("seed=-1", "seed", None),
        ("data.sampler=shuffled", r"data.sampler: .*'random', 'packed' or 'best_fit'", None),
        ("optimizer.name=lion", r"optimizer.name: .*'adamw', 'muon' or 'normuon'", None),
        ("optimizer.momentum=1", r"optimizer.momentum: .*less than 1", None),
        ("optimizer.ema=1", r"optimizer.ema: .*less than 1", None),
        ("optimizer.tail=1", r"optimizer.tail: .*less than 1", None),
        ("optimizer.row_beta=1", r"optimizer.row_beta: .*less than 1", None),
        ("optimizer.embedding_betas=[0.9]", r"optimizer.embedding_betas", None),
        ("optimizer.decay_shape=cosine", r"optimizer.decay_shape: .*'constant' or 'linear'", None),
        ("optimizer.momentum_warmup=1", r"optimizer.momentum_warmup: .*less than 1", None),
        ("batch.first_context=48", "batch.context of 128 is not batch.first_context of 48 times 2, 4, 8", None),
        ("batch.first_context=256", "batch.context of 128 is not batch.first_context of 256 times 2, 4, 8", None),
        ("batch.context_warmup=0", r"batch.context_warmup: .*greater than 0", None),
        ("distillation.weight=0", r"distillation.weight: .*greater than 0", None),
        ("optimizer.matrix_rate=0", r"optimizer.matrix_rate: .*greater than 0", None),
        ("schedule.shape=linear", r"schedule.shape: .*'cosine', 'wsd' or 'constant'", None),
        ("schedule.decay=1.5", r"schedule.decay: .*less than or equal to 1", None),
        ("schedule.epochs=-1", r"schedule.epochs: .*greater than 0", None),
        ("regularization.dropout=1", r"regularization.dropout: .*less than 1", None),
        ("regularisation.dropout=0.1", "no value 'regularisation.dropout'", "regularization.dropout"),
        ("evaluation.patience=0", r"evaluation.patience: .*greater than 0", None),
        ("evaluation.prompt=x", "no value 'evaluation.prompt'", "evaluation.prompts, evaluation.sample_tokens"),
        ("evaluation.context=9999", r"evaluation.context is 9999, the model's max_position_embeddings", None),
        ("checkpoints.every=2", "no value 'checkpoints.every'", "checkpoints.every_updates, checkpoints.keep"),
        ("checkpoints.keep=0", r"checkpoints.keep: .*greater than 0", None),
        ("machine.attention=fast", r"machine.attention: .*'auto', 'sdpa' or 'flex'", None),
        ("machine.parallel=dp", r"machine.parallel: .*'ddp' or 'fsdp'", None),
        ("machine.loss_chunk=0", r"machine.loss_chunk: .*greater than 0", None),
    ],
)
def test_overrides_that_are_refused(override: str, message: str, hint: str | None) -> None:
    with pytest.raises(SlmError, match=message) as error:
        load_recipe("tiny", [override])
    if hint is not None:
        assert error.value.hint is not None
        assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not YAML"),
        ("- a", "not a mapping"),
        ("{}", "name: Field required"),
        ("optimizer: {momentum: 1}", "momentum|name"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SlmError, match=message):
        load_recipe(file)


def test_an_unknown_key_in_a_file_lists_the_valid_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load_recipe("tiny").to_yaml().replace("  eps:", "  epsilon:"), encoding="utf-8")
    with pytest.raises(SlmError, match=r"optimizer.epsilon") as error:
        load_recipe(file)
    assert error.value.hint is not None
    assert "optimizer.eps" in error.value.hint


def test_unknown_names() -> None:
    with pytest.raises(SlmError, match="recipe not found: big") as error:
        load_recipe("big")
    assert "documented, modern, stories-4m, tiny" in (error.value.hint or "")
    with pytest.raises(SlmError, match="recipe not found"):
        load_recipe("missing.yaml")


def test_recipes_are_frozen() -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("value", ["x", "2.5", "[]"])
def test_a_number_of_layers_that_is_none(value: str) -> None:
    with pytest.raises(SlmError, match="num_hidden_layers"):
        load_recipe("tiny", [f"model.num_hidden_layers={value}"]).model.config()


def test_two_averages_are_refused() -> None:
    with pytest.raises(SlmError, match="two averages of the weights; set one of them to 0"):
        load_recipe("tiny", ["optimizer.ema=0.9", "optimizer.tail=0.1"])


def test_flex_attention_is_refused_for_rows_of_documents() -> None:
    with pytest.raises(SlmError, match="cannot keep the documents of a row apart"):
        load_recipe("tiny", ["data.sampler=best_fit", "machine.attention=flex"])
    load_recipe("tiny", ["data.sampler=packed", "machine.attention=flex"])


SHORTER = ("batch.first_context=32", "batch.context_warmup=0.5")


def test_rows_grow_in_equal_steps() -> None:
    recipe = load_recipe("tiny", [*SHORTER, "schedule.micro_steps=12"])
    lengths = [recipe.context_at(step) for step in range(12)]
    assert lengths == [32] * 3 + [64] * 3 + [128] * 6
    assert recipe.batch.contexts == (32, 64, 128)
    assert {load_recipe("tiny").context_at(step) for step in (0, 100, 559)} == {128}
    # They do not grow within an update.
    of_four = load_recipe("tiny", [*SHORTER, "schedule.micro_steps=24", "batch.accumulation=4"])
    assert [of_four.context_at(step) for step in range(24)] == [32] * 8 + [64] * 4 + [128] * 12


def test_one_teacher_needs_no_list() -> None:
    assert load_recipe("tiny", ["distillation.teachers=runs/a"]).distillation.teachers == ("runs/a",)
