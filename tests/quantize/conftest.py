"""Fixtures of several files: a small trained model, whose hidden states have the few strong directions of real models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slm.core.config import FULL
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.quantize.texts import TokenRows

_ROWS, _TOKENS, _UPDATES = 48, 64, 60


@pytest.fixture(scope="session")
def story_rows(stories: list[str], tokenizer: Tokenizer) -> TokenRows:
    """Rows of 64 tokens of stories."""
    ids = [token for story in stories for token in tokenizer.encode(story)][: _ROWS * _TOKENS]
    return TokenRows("stories", np.array(ids, np.int64).reshape(_ROWS, _TOKENS))


@pytest.fixture(scope="session")
def trained_checkpoint(
    shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, story_rows: TokenRows, tokenizer: Tokenizer
) -> Path:
    """A model of two layers with a tied head, trained for some updates."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "layer_types": (FULL, FULL), "tie_word_embeddings": True}
    model = CausalLM(shared_bundle.config.model_copy(update=layers))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = torch.from_numpy(story_rows.rows)
    for i in range(_UPDATES):
        batch = rows[8 * i % _ROWS :][:8]
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4  # 5.8 before
    path = tmp_path_factory.mktemp("trained") / "c"
    save_checkpoint(path, model.eval(), tokenizer, {})
    return path


@pytest.fixture(scope="session")
def trained_bundle(trained_checkpoint: Path) -> Bundle:
    """The trained model as a float32 bundle; tests must not change it."""
    return export_bundle(trained_checkpoint, trained_checkpoint.with_name("onnx"))
