"""Preferences: the loss and gradients of DPO, the rows of other tools, and what training on pairs changes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.checkpoint import read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import attach, load_adapter
from slm.finetune.batches import alone, collate
from slm.finetune.examples import Example, Renderer
from slm.finetune.preference import Pair, Preferences, margins, preference_loss, referred
from slm.finetune.preparation import RowFiles
from slm.finetune.rows import ChatRow, CompletionRow, PreferenceRow, read_rows
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from tests.progress import Notes, Stopper

WriteRows = Callable[..., Path]
# float32 sums in another order.
ROUNDING = 1e-5

PAIRS = [
    {"prompt": f"Is {n} a number?", "chosen": f" No, {n} is not.", "rejected": f" Yes, {n} is."} for n in range(40)
]
QUICK = FinetuneSettings.checked(epochs=3, batch_size=4, rank=4, learning_rate=2e-3, keep="last")


def nothing() -> None:
    """Does not stop a measurement."""


def log_probability(model: CausalLM, example: Example) -> torch.Tensor:
    """The definition: the sum of the logarithms of the probabilities of the answer's tokens."""
    ids = torch.tensor([example.ids])
    probabilities = model.lm_head(model.model(ids[:, :-1])).log_softmax(-1)[0]
    return sum(
        (probabilities[place - 1, example.ids[place]] for start, end in example.spans for place in range(start, end)),
        start=torch.zeros(()),
    )


@pytest.fixture
def pairs(shared_checkpoint: Path, write_rows: WriteRows) -> list[Pair]:
    renderer = Renderer(Tokenizer.load(shared_checkpoint), load_checkpoint(shared_checkpoint).config)
    _, found = renderer.pairs(read_rows(write_rows(PAIRS[:5])), 64)  # type: ignore[arg-type]  # all are preferences
    return [Pair(*each) for each in found]


def test_loss_and_gradients_are_those_of_the_definition(shared_checkpoint: Path, pairs: list[Pair]) -> None:
    beta, model = 0.3, load_checkpoint(shared_checkpoint)
    with torch.no_grad():
        wanted = [(float(log_probability(model, p.chosen)), float(log_probability(model, p.rejected))) for p in pairs]
    adapter = attach(model, QUICK, shared_checkpoint)
    tunable = adapter.get_base_model()
    found = referred(tunable, pairs, 2, None, nothing)
    for pair, both in zip(found, wanted, strict=True):
        assert pair.reference == pytest.approx(both, abs=1e-4)
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for parameter in trained:  # an adapter that changes the output
        parameter.data.normal_(std=0.05, generator=generator)

    material = Preferences(found, found, beta, "loss")
    (batch,) = material.batches(8, random.Random(0))
    loss = material.loss(tunable, batch)
    gradients = torch.autograd.grad(loss, trained)

    terms = []
    for pair, (chosen, rejected) in zip(found, wanted, strict=True):
        margin = log_probability(tunable, pair.chosen) - chosen - log_probability(tunable, pair.rejected) + rejected
        terms.append(-torch.log(torch.sigmoid(beta * margin)))
    plain = torch.stack(terms).mean()
    assert float(loss) == pytest.approx(float(plain), abs=ROUNDING)
    for mine, theirs in zip(gradients, torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(mine, theirs, atol=ROUNDING, rtol=1e-3)
    assert material.measure(tunable, 2, None, nothing) == pytest.approx(float(plain), abs=ROUNDING)


def test_before_the_first_update_no_answer_is_preferred_over_the_reference(
    shared_checkpoint: Path, pairs: list[Pair]
) -> None:
    model = load_checkpoint(shared_checkpoint).eval()
    found = referred(model, pairs, 3, None, nothing)
    material = Preferences(found, found, 0.1, "loss")
    (batch,) = material.batches(8, random.Random(0))
    assert margins(model, batch).abs().max() < 1e-4  # type: ignore[arg-type]  # a batch of pairs
    assert material.measure(model, 2, None, nothing) == pytest.approx(0.6931, abs=1e-4)
    assert preference_loss(torch.tensor([1.0]), 1.0) < preference_loss(torch.tensor([-1.0]), 1.0)  # the sign


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Hi."}], "chosen": [{"role": "assistant", "content": "Hello."}],
         "rejected": [{"role": "assistant", "content": "No."}]},
        {"chosen": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}],
         "rejected": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "No."}]},
        {"instruction": "Hi.", "chosen": "Hello.", "rejected": "No."},
        {"conversations": [{"from": "human", "value": "Hi."}], "chosen": {"from": "gpt", "value": "Hello."},
         "rejected": {"from": "gpt", "value": "No."}},
    ],
    ids=["TRL", "TRL without a prompt", "instruction", "LLaMA-Factory"],
)  # fmt: skip
def test_rows_of_other_tools(write_rows: WriteRows, row: dict[str, Any]) -> None:
    asked = {"role": "user", "content": "Hi."}
    wanted = [ChatRow((asked, {"role": "assistant", "content": text})) for text in ("Hello.", "No.")]  # type: ignore[arg-type]
    assert read_rows(write_rows([row])) == [PreferenceRow(*wanted)]


def test_a_plain_row(write_rows: WriteRows) -> None:
    (row,) = read_rows(write_rows(PAIRS[:1]))
    assert row == PreferenceRow(
        CompletionRow("Is 0 a number?", " No, 0 is not."), CompletionRow("Is 0 a number?", " Yes, 0 is.")
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"chosen": "b", "rejected": "c"}, "chosen and rejected without a prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "completion"),
        ({"prompt": "a", "chosen": {"role": "assistant"}, "rejected": "c"}, "completion"),
    ],
)
def test_rows_that_are_no_preference(write_rows: WriteRows, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SlmError, match=message):
        read_rows(write_rows([row]))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([*PAIRS, {"text": "a"}], {}, "line 41: a file with chosen and rejected has no other rows"),
        (PAIRS, {"method": "full"}, "preferences train an adapter"),
        (PAIRS, {"pack": True}, "preferences cannot be packed"),
    ],
    ids=["mixed", "full", "packed"],
)
def test_what_is_not_supported(
    shared_checkpoint: Path, write_rows: WriteRows, rows: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SlmError, match=message):
        finetune(shared_checkpoint, write_rows(rows), Path("out"), QUICK.model_copy(update=settings))
    assert not Path("out").exists()


def test_held_out_preferences_are_learned(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(PAIRS[:30])
    files, heard = RowFiles(data, write_rows(PAIRS[30:], "held-out.jsonl")), Notes()
    result = finetune(shared_checkpoint, files, Path("out"), QUICK, heard, samples=1)
    assert result.preferred_before is not None and result.preferred_after is not None
    assert result.preferred_after >= result.preferred_before + 0.2
    assert result.loss_before == pytest.approx(0.6931, abs=1e-3) and result.loss_after < 0.5
    assert read_info(Path("out"))["metrics"]["preferred_after"] == result.preferred_after
    # The file's adapter prefers what the report says.
    model = load_adapter(load_checkpoint(shared_checkpoint), Path("out")).get_base_model().eval()
    renderer = Renderer(Tokenizer.load(shared_checkpoint), load_checkpoint(shared_checkpoint).config)
    _, found = renderer.pairs(read_rows(Path("held-out.jsonl")), 64)  # type: ignore[arg-type]  # all are preferences
    with torch.no_grad():
        likelier = [log_probability(model, a) > log_probability(model, b) for a, b in found]
    assert sum(likelier) / len(likelier) == pytest.approx(result.preferred_after)


def test_interrupted_and_resumed_is_uninterrupted(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(PAIRS[:12])
    finetune(shared_checkpoint, data, Path("whole"), QUICK, samples=0)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("parts"), QUICK, Stopper(4), samples=0)
    finetune(shared_checkpoint, data, Path("parts"), QUICK, samples=0)
    name = "adapter_model.safetensors"
    assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()


def test_pairs_that_are_cut(config: ModelConfig, shared_checkpoint: Path, write_rows: WriteRows) -> None:
    renderer = Renderer(Tokenizer.load(shared_checkpoint), config)
    long = {"prompt": "a", "chosen": " b", "rejected": " " + "c" * 60}
    beyond = {"prompt": "p" * 60, "chosen": " b", "rejected": " c"}
    examples, found = renderer.pairs(read_rows(write_rows([PAIRS[0], long, beyond])), 30)  # type: ignore[arg-type]
    assert len(found) == len(examples.kept) == 2 and examples.skipped == 1
    assert len(found[1][1].ids) == 30
    batch = collate(alone([found[0][0], found[0][1]]))
    assert batch.input_ids.shape[0] == 2
