"""Tokens that a base cannot tell apart: they are found, and an adapter learns them."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from slm.core.nn import load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.build import _rows_to_train
from slm.finetune.examples import Example, Renderer
from slm.finetune.indistinct import indistinct_tokens, near_another
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from tests.progress import Notes

WriteRows = Callable[..., Path]


def collapsed(table: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The table with nearly the same row for some tokens."""
    table = table.clone()
    noise = torch.randn(len(tokens), table.shape[1], generator=torch.Generator().manual_seed(1))
    table[tokens] = table[tokens[0]] + 0.005 * table[tokens[0]].norm() * noise / table.shape[1] ** 0.5
    return table


def test_nearly_equal_rows_are_found() -> None:
    table = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert near_another(table, list(range(2000))) == []
    assert near_another(collapsed(table, [7, 900, 1500]), [3, 7, 900, 1999]) == [7, 900]


def test_rare_tokens_do_not_matter() -> None:
    table = collapsed(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), [7, 8])
    often, seldom = Example((1, 2, 7, 3), ((1, 4),)), Example((1, *(2, 3) * 150, 7), ((1, 302),))
    read_only = Example((7, 8, 2, 3), ((2, 4),))
    assert indistinct_tokens(table, [often]) == [7]
    assert indistinct_tokens(table, [seldom]) == [] == indistinct_tokens(table, [read_only])


@pytest.mark.parametrize(
    ("tokens", "wanted"), [([7], "1 token of the answers from others"), ([7, 8], "2 tokens of the answers from others")]
)
def test_the_note_counts_them(
    shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tokens: list[int], wanted: str
) -> None:
    monkeypatch.setattr("slm.finetune.build.indistinct_tokens", lambda *_: tokens)
    model, heard, found = load_checkpoint(shared_checkpoint), Notes(), Mock()
    renderer = Renderer(Tokenizer.load(shared_checkpoint), model.config)
    assert _rows_to_train([3], model, found, renderer, heard) == [3, *tokens]
    assert [note for note in heard.lines if wanted in note] == heard.lines


@pytest.mark.parametrize("trained", [True, False])
def test_they_are_learned(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    """Only if their rows are trained: the control stays at the loss of a guess between them."""
    tokenizer, model = Tokenizer.load(shared_checkpoint), load_checkpoint(shared_checkpoint)
    tokens = [tokenizer.encode(text)[-1] for text in "{}<_"]
    model.model.embed_tokens.weight.data = collapsed(model.model.embed_tokens.weight.data, tokens)
    save_checkpoint(Path("base"), model, tokenizer, {"made_by": "tests"})
    if not trained:
        monkeypatch.setattr("slm.finetune.build.indistinct_tokens", lambda *_: [])
    data = write_rows([{"prompt": f"Say {n}:", "completion": "{<_}" * 3} for n in range(8)])
    settings = FinetuneSettings.checked(epochs=60, learning_rate=1e-2, batch_size=4, keep="last")
    heard = Notes()
    result = finetune(Path("base"), data, Path("out"), settings, heard, samples=0)
    assert result.loss_after < 0.3 if trained else result.loss_after > 1
    said = [
        note
        for note in heard.lines
        if note.startswith("the base cannot distinguish 4 tokens of the answers from others")
    ]
    assert bool(said) == trained
