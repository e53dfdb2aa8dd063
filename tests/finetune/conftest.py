"""What the fine-tuning tests share: files of rows and adapters whose weights are far from zero."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.nn import load_checkpoint
from slm.finetune.adapter import adapter_state, attach, save_adapter
from slm.finetune.settings import FinetuneSettings

TURN_TOKEN_IDS = [1, 2]  # where train_bpe puts <start_of_turn> and <end_of_turn>


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def random_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter with random weights for a base, so that each of its tensors matters."""

    def make(base: Path, token_ids: list[int], **settings: Any) -> Path:
        adapter = attach(load_checkpoint(base), FinetuneSettings(**settings), base, token_ids)
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)
        path = tmp_path / "adapter"
        path.mkdir()
        save_adapter(path, adapter, adapter_state(adapter))
        return path

    return make
