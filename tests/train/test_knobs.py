"""Research knobs: an effect of every value that docs/experiments.md sets. `test_experiments.py` holds the page itself.

Knobs are spelt here as on the command line, and go through `load_recipe`.
"""

import json
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from slm.core.checkpoint import read_config
from slm.core.config import FULL, SLIDING, ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.export.parity import TOLERANCE
from slm.train.build import build_learner, build_model, schedule_of, with_special_tokens
from slm.train.data.dataset import open_dataset
from slm.train.data.tokens import Tokens
from slm.train.memory import training_bytes
from slm.train.parallel import Alone
from slm.train.precision import Precision, capability, choose_precision
from slm.train.prepare import DATA, prepare
from slm.train.recipe import load_recipe
from slm.train.run import train

MakeModel = Callable[..., CausalLM]

# Two float32 implementations that add in another order, in units of the largest logit where that passes 1.
HF_TOLERANCE = 3e-5
# What a knob must change in logits of about 1: GELU and its approximation are the closest, 7e-4; rounding is 1e-6.
EFFECT = 3e-4
FLOAT32 = Precision(None, scale_loss=False)

# tiny's recipe with a model as small as the other tests': two query heads a kv head, a window that 48 tokens pass.
SHAPE = (
    "model.vocab_size=320",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_key_value_heads=2",
    "model.head_dim=32",
    "model.query_pre_attn_scalar=32",
    "model.sliding_window=16",
    "model.max_position_embeddings=256",
)
LENGTH = 48


def pattern(*kinds: str) -> str:
    return f"model.layer_types=[{', '.join(kinds)}]"


def rope(local: str = "10000", full: str = "1000000", more: str = "") -> str:
    return (
        f"model.rope_parameters={{sliding_attention: {{rope_theta: {local}}}, "
        f"full_attention: {{rope_theta: {full}{more}}}}}"
    )


# What is set, and the parameters that it adds; where none, what the same weights compute is another thing.
SHAPES: dict[str, tuple[tuple[str, ...], int]] = {
    "multi-head": (("model.num_key_value_heads=4",), 6 * 64 * 32 * 2 * 2),
    "multi-query": (("model.num_key_value_heads=1",), -6 * 64 * 32 * 2),
    "all sliding": ((pattern(*[SLIDING] * 6),), 0),
    "all global": ((pattern(*[FULL] * 6),), 0),
    "one to one": ((pattern(*[SLIDING, FULL] * 3),), 0),
    "one to one, two layers": (("model.num_hidden_layers=2", pattern(SLIDING, FULL)), -4 * 43_328),
    "eight layers": (("model.num_hidden_layers=8",), 2 * 43_328),
    "window": (("model.sliding_window=8",), 0),
    "global base": ((rope(full="500000"),), 0),
    "local base": ((rope(local="1000"),), 0),
    "stretched": ((rope(more=", rope_type: linear, factor: 8"),), 0),
    "silu": (("model.hidden_activation=silu",), 0),
    "gelu": (("model.hidden_activation=gelu",), 0),
    "relu": (("model.hidden_activation=relu",), 0),
    "head of its own": (("model.tie_word_embeddings=false",), 320 * 64),
    "scale": (("model.query_pre_attn_scalar=128",), 0),
    "epsilon": (("model.rms_norm_eps=1e-2",), 0),
    "narrow heads": (("model.head_dim=16", "model.query_pre_attn_scalar=16"), -6 * (64 * 16 * 2 * 6 + 2 * 16)),
    "two heads": (("model.num_attention_heads=2",), -6 * 64 * 32 * 2 * 2),
    "wider": (("model.hidden_size=96",), 32 * (320 + 6 * (32 * 2 * 6 + 3 * 96 + 4) + 1)),
    "wider MLP": (("model.intermediate_size=128",), 6 * 3 * 64 * 32),
    "spare rows": (("model.vocab_size=384",), 64 * 64),
    "longer": (("model.max_position_embeddings=32768",), 0),
}

# Together they have every value above. To export a shape takes half a second.
EXPORTED = (
    ("multi-head", "all sliding", "gelu", "wider MLP"),
    ("multi-query", "all global", "silu", "head of its own", "longer"),
    ("one to one", "window", "relu", "epsilon", "wider"),
    ("one to one, two layers", "narrow heads", "spare rows", "local base"),
    ("eight layers", "global base", "scale"),
    ("two heads", "stretched"),
)

# Training cut short. The knob, and what it is set on top of.
SHORT = (
    *SHAPE,
    "batch.batch_size=4",
    "batch.context=24",
    "batch.accumulation=2",
    "schedule.micro_steps=12",
    "schedule.warmup_micro_steps=2",
    "evaluation.every_micro_steps=6",
    "evaluation.windows=4",
    "machine.device=cpu",
    "machine.precision=float32",
)
MUON, WSD = "optimizer.name=muon", "schedule.shape=wsd"
LEARNED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "muon": ((MUON,), ()),
    "momentum": (("optimizer.momentum=0.5",), (MUON,)),
    "matrix rate": (("optimizer.matrix_rate=2",), ()),
    "embedding rate": (("optimizer.embedding_rate=0.5",), ()),
    "betas": (("optimizer.betas=[0.9, 0.99]",), ()),
    "epsilon": (("optimizer.eps=1e-3",), ()),
    "weight decay": (("optimizer.weight_decay=0.01",), ()),
    "cautious": (("optimizer.cautious=true",), ()),
    "shape of the decay": (("optimizer.decay_shape=linear",), ()),
    "normuon": (("optimizer.name=normuon",), (MUON,)),
    "row beta": (("optimizer.row_beta=0.5",), ("optimizer.name=normuon",)),
    "momentum warm-up": (("optimizer.momentum_warmup=0.5",), (MUON,)),
    "momentum start": (("optimizer.momentum_start=0.5",), (MUON, "optimizer.momentum_warmup=0.5")),
    "betas of the embedding": (("optimizer.embedding_betas=[0.8, 0.95]",), ()),
    "betas of the norms": (("optimizer.norm_betas=[0.8, 0.95]",), ()),
    "what is decayed": (("optimizer.decay=all",), ()),
    "clipping": (("optimizer.max_grad_norm=0.1",), ()),
    "peak": (("schedule.learning_rate=2e-3",), ()),
    "final rate": (("schedule.final_learning_rate=0",), ()),
    "warm-up": (("schedule.warmup_micro_steps=6",), ()),
    "start": (("schedule.start=0.1",), ("schedule.warmup_micro_steps=6",)),
    "wsd": ((WSD,), ()),
    "decay": (("schedule.decay=0.3",), (WSD,)),
    "constant": (("schedule.shape=constant",), ()),
    "length": (("schedule.micro_steps=8",), ()),
    "passes": (("schedule.epochs=0.1", "schedule.micro_steps=null"), ()),
    "batch": (("batch.batch_size=2",), ()),
    "accumulation": (("batch.accumulation=3",), ()),
    "context": (("batch.context=48",), ()),
    "shorter rows at first": (("batch.first_context=12",), ()),
    "their end": (("batch.context_warmup=0.8",), ("batch.first_context=12",)),
    "whole documents": (("data.sampler=best_fit",), ()),
    "packed": (("data.sampler=packed",), ()),
    "dropout": (("regularization.dropout=0.1",), ()),
    "bfloat16": (("machine.precision=bfloat16",), ()),
    "seed": (("seed=1",), ()),
    "first weights": (("model.initializer_range=0.01",), ()),
}
# Trade time for memory, and change nothing but rounding.
SAME = ("machine.gradient_checkpointing=true", "machine.loss_chunk=5")
# Values with a test of their own below.
ELSEWHERE = {
    *("model.preset", "optimizer.ema", "optimizer.tail", "evaluation.context"),
    *("distillation.teachers", "distillation.weight"),
}


def shape(*overrides: str) -> ModelConfig:
    return load_recipe("tiny", [*SHAPE, *overrides]).model.config()


def path_of(override: str) -> str:
    return override.partition("=")[0]


def test_there_is_no_value_without_a_test() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("    slm train ")]
    set_there = {path_of(word) for words in commands for option, word in pairwise(words) if option == "--set"}
    tested = {path_of(knob) for knobs, _ in (*SHAPES.values(), *LEARNED.values()) for knob in knobs}
    assert len(set_there) > 30
    assert sorted(knob for knobs in EXPORTED for knob in knobs) == sorted(SHAPES)
    assert set_there <= tested | {path_of(knob) for knob in SAME} | ELSEWHERE


# The shape


@pytest.mark.parametrize("knob", [knob for knob in SHAPES if knob != "longer"])
@torch.no_grad()
def test_a_knob_of_the_shape_changes_the_model(make_model: MakeModel, knob: str) -> None:
    overrides, added = SHAPES[knob]
    before, after = make_model(shape()), make_model(shape(*overrides))
    numbers = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
    assert numbers[1] - numbers[0] == added
    if not added:
        after.load_state_dict(before.state_dict())
        ids = tokens_of(shape())
        assert (after(ids) - before(ids)).abs().max() > EFFECT


@torch.no_grad()
def test_the_same_shape_computes_the_same(make_model: MakeModel) -> None:
    """The control: spelt anew without a change. Nor does the limit of positions change what is computed below it."""
    ids, logits = tokens_of(shape()), make_model(shape())(tokens_of(shape()))
    for overrides in ((rope(),), (pattern(*[SLIDING] * 5, FULL),), ("model.num_hidden_layers=6",), SHAPES["longer"][0]):
        assert torch.equal(make_model(shape(*overrides))(ids), logits)


@pytest.mark.parametrize("knobs", EXPORTED, ids=" + ".join)
@torch.no_grad()
def test_changed_shapes_export_and_load_elsewhere(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, knobs: tuple[str, ...]
) -> None:
    config = with_special_tokens(shape(*(override for knob in knobs for override in SHAPES[knob][0])), tokenizer)
    save_checkpoint(tmp_path / "c", make_model(config), tokenizer, {})
    assert read_config(tmp_path / "c") == config
    bundle = export_bundle(tmp_path / "c", tmp_path / "onnx")
    assert bundle.config == config
    parity = bundle.manifest.parity
    assert parity is not None and parity.tokens == 3 * config.sliding_window and parity.largest < TOLERANCE
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")(tokens_of(config)).logits
    ours = load_checkpoint(tmp_path / "c")(tokens_of(config))
    torch.testing.assert_close(ours, theirs, atol=HF_TOLERANCE * max(1.0, theirs.abs().max().item()), rtol=0)


@torch.no_grad()
def test_the_window_matters_where_it_is_passed(make_model: MakeModel) -> None:
    ids = tokens_of(shape())
    long, short = (make_model(shape(f"model.sliding_window={window}"))(ids) for window in (16, 8))
    torch.testing.assert_close(long[:, :8], short[:, :8], atol=HF_TOLERANCE, rtol=0)
    assert (long - short)[:, 8:].abs().amax(-1).min() > EFFECT


@torch.no_grad()
def test_within_the_window_the_pattern_is_a_matter_of_bases(make_model: MakeModel) -> None:
    ids = tokens_of(shape())[:, :16]
    for bases, alike in ((rope("10000", "10000"), True), (rope(), False)):
        one, other = (make_model(shape(bases, pattern(*[kind] * 6)))(ids) for kind in (SLIDING, FULL))
        assert ((one - other).abs().max() < HF_TOLERANCE) == alike


@pytest.mark.parametrize(("kind", "other"), [(SLIDING, rope(full="500000")), (FULL, rope(local="1000"))])
@torch.no_grad()
def test_a_base_turns_its_own_layers_alone(make_model: MakeModel, kind: str, other: str) -> None:
    ids, alone = tokens_of(shape()), pattern(*[kind] * 6)
    assert torch.equal(make_model(shape(alone))(ids), make_model(shape(alone, other))(ids))


def test_a_depth_below_six_has_no_global_layer() -> None:
    assert FULL not in shape("model.num_hidden_layers=5").layer_types
    assert shape("model.num_hidden_layers=12").layer_types.count(FULL) == 2


def test_the_scale_follows_the_heads_width_unless_it_is_set() -> None:
    assert load_recipe("tiny", ["model.head_dim=32"]).model.config().query_pre_attn_scalar == 32
    both = ["model.head_dim=32", "model.query_pre_attn_scalar=64"]
    assert load_recipe("tiny", both).model.config().query_pre_attn_scalar == 64


def test_a_length_takes_the_place_of_the_other() -> None:
    schedule = load_recipe("tiny", ["schedule.epochs=3"]).schedule
    assert (schedule.micro_steps, schedule.epochs) == (None, 3)
    schedule = load_recipe("stories-4m", ["schedule.micro_steps=7"]).schedule
    assert (schedule.micro_steps, schedule.epochs) == (7, None)
    with pytest.raises(SlmError, match="either"):
        load_recipe("tiny", ["schedule.epochs=3", "schedule.micro_steps=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (pattern(SLIDING, FULL), "layer_types has 2 entries for 6 layers"),
        ("model.rope_parameters={full_attention: {rope_theta: 500000}}", "rope_parameters lacks sliding_attention"),
        ("model.num_key_value_heads=3", "a multiple of num_key_value_heads"),
        ("model.num_attention_heads=3", "hidden_size must be a multiple"),
    ],
)
def test_what_the_page_says_goes_together(override: str, message: str) -> None:
    with pytest.raises(SlmError, match=message):
        load_recipe("tiny", [override])


# Context


def test_32k_tokens_pass_through_the_shape() -> None:
    config = load_recipe("modern", ["batch.context=32768", "model.preset=270m-wide"]).model.config()
    with torch.device("meta"):
        logits = CausalLM(config)(torch.zeros(1, 32_768, dtype=torch.int64), num_logits_to_keep=1)
    assert logits.shape == (1, 1, config.vocab_size)
    with pytest.raises(SlmError, match="32769, the model's max_position_embeddings 32768"):
        load_recipe("modern", ["batch.context=32769"])


@torch.no_grad()
def test_a_longer_text_begins_alike(make_model: MakeModel) -> None:
    config = load_recipe("tiny", ["model.preset=1m", "batch.context=1024"]).model.config()
    model, ids = make_model(config), tokens_of(config, 1024)
    long, short = model(ids), model(ids[:, :128])
    assert long.shape == (1, 1024, config.vocab_size)
    torch.testing.assert_close(long[:, :128], short, atol=HF_TOLERANCE * short.abs().max().item(), rtol=0)


def test_a_longer_context_takes_more_memory_and_checkpointing_less() -> None:
    def needed(*overrides: str) -> Any:
        recipe = load_recipe("modern", ["batch.batch_size=1", *overrides])
        return training_bytes(recipe, recipe.model.config(), FLOAT32)

    short, long = needed("batch.context=128"), needed("batch.context=32768")
    anew = needed("batch.context=32768", "machine.gradient_checkpointing=true")
    assert long.activations > 100 * short.activations
    assert anew.activations < long.activations / 4
    assert long.weights == short.weights == anew.weights
    assert long.loss < 100 * short.loss  # logits come in chunks


# Training


@pytest.fixture(scope="module")
def prepared(story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    run = tmp_path_factory.mktemp("knobs") / "run"
    prepare(load_recipe("tiny", [*SHORT, f"data.train={story_file}"]), run, Silent())
    return open_dataset(run / DATA).train


Trained = tuple[dict[str, Tensor], list[float]]


@pytest.fixture(scope="module")
def trained(prepared: Tokens) -> Callable[..., Trained]:
    """Trains with what is set; returns weights and losses. What was trained once is not trained again."""
    known: dict[tuple[str, ...], Trained] = {}

    def go(*overrides: str, again: bool = False) -> Trained:
        if again or overrides not in known:
            recipe = load_recipe("tiny", [*SHORT, *overrides]).for_tokens(len(prepared.ids))
            device, config = torch.device("cpu"), recipe.model.config()
            model = build_model(recipe, config, device, None)
            precision = choose_precision(recipe.machine.precision, capability(device), config)
            learner = build_learner(recipe, model, prepared, device, precision, None, Alone())
            per = recipe.batch.accumulation
            losses = [learner.update(i * per, lambda: None).loss for i in range(recipe.updates)]
            known[overrides] = {name: p.detach().clone() for name, p in model.named_parameters()}, losses
        return known[overrides]

    return go


@pytest.mark.parametrize("decaying", ["cosine", "wsd"])
@pytest.mark.parametrize("final", [0.0, 2e-4])
def test_the_rate_ends_where_it_is_to_and_no_update_is_made_at_0(prepared: Tokens, decaying: str, final: float) -> None:
    recipe = load_recipe("tiny", [*SHORT, f"schedule.shape={decaying}", f"schedule.final_learning_rate={final}"])
    model = build_model(recipe, recipe.model.config(), torch.device("cpu"), None)
    learner = build_learner(recipe, model, prepared, torch.device("cpu"), FLOAT32, None, Alone())
    rates = [learner.update(2 * i, lambda: None).learning_rate for i in range(recipe.updates - 1)]
    before = model.model.embed_tokens.weight.detach().clone()
    rates.append(learner.update(2 * len(rates), lambda: None).learning_rate)
    assert not torch.equal(model.model.embed_tokens.weight, before)
    assert rates[-2] > rates[-1] > 0
    assert (rates[-1] == pytest.approx(final)) == (final > 0)
    assert schedule_of(recipe).rate(12 + recipe.batch.accumulation) == pytest.approx(final)


def equal(one: Trained, other: Trained) -> bool:
    return all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


def test_the_same_recipe_trains_the_same(trained: Callable[..., Trained]) -> None:
    """The control of what follows: bit for bit, so that any difference is the knob's."""
    assert equal(trained(), trained(again=True))
    assert trained()[1][-1] < trained()[1][0]


@pytest.mark.parametrize("knob", LEARNED)
def test_a_knob_of_the_training_changes_what_is_learned(trained: Callable[..., Trained], knob: str) -> None:
    overrides, under = LEARNED[knob]
    assert not equal(trained(*under), trained(*under, *overrides))


@pytest.mark.parametrize("knob", SAME)
def test_what_saves_memory_changes_nothing_but_rounding(trained: Callable[..., Trained], knob: str) -> None:
    assert trained(knob)[1] == pytest.approx(trained()[1], rel=1e-4)


def test_dropout_acts_while_training_alone(tokenizer: Tokenizer) -> None:
    ids = tokens_of(shape())
    models = [
        build_model(load_recipe("tiny", [*SHAPE, f"regularization.dropout={p}"]), shape(), torch.device("cpu"), None)
        for p in (0, 0.1)
    ]
    assert torch.equal(*(model.eval()(ids) for model in models))
    assert not torch.equal(*(model.train()(ids) for model in models))


def test_the_average_and_the_measured_context(story_file: Path) -> None:
    """They change what is measured, averages what is kept as well, and none of them what trains."""
    runs = {
        "plain": (),
        "average": ("optimizer.ema=0.9",),
        "tail": ("optimizer.tail=0.5",),
        "longer": ("evaluation.context=48",),
    }
    rows, kept = {}, {}
    for name, overrides in runs.items():
        train(load_recipe("tiny", [*SHORT, f"data.train={story_file}", *overrides]), Path(name))
        found = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
        rows[name] = {kind: [row["loss"] for row in found if row["type"] == kind] for kind in ("train", "eval")}
        kept[name] = (Path(name) / "checkpoint/last/model.safetensors").read_bytes()
    assert all(row["train"] == rows["plain"]["train"] for row in rows.values())
    assert rows["tail"]["eval"][:2] == rows["plain"]["eval"][:2]  # the tail begins in the middle
    assert rows["tail"]["eval"][2] not in (rows["plain"]["eval"][2], rows["average"]["eval"][2])
    assert kept["tail"] not in (kept["plain"], kept["average"])
    assert rows["plain"]["eval"][0] == rows["average"]["eval"][0]  # nothing to average yet
    assert rows["plain"]["eval"][1:] != rows["average"]["eval"][1:]
    assert rows["plain"]["eval"] != rows["longer"]["eval"]
    assert kept["plain"] == kept["longer"] != kept["average"]


def tokens_of(config: ModelConfig, length: int = LENGTH) -> Tensor:
    return torch.randint(0, min(320, config.vocab_size), (1, length), generator=torch.Generator().manual_seed(length))
