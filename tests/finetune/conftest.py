"""Fixtures of the fine-tuning tests: files of rows, adapters whose weights are far from zero, and a check for leftovers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM

TURN_TOKEN_IDS = [1, 2]  # train_bpe assigns these ids to <start_of_turn> and <end_of_turn>


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def random_adapter(tmp_path: Path, make_adapter: Callable[..., Path]) -> Callable[..., Path]:
    """Creates a random adapter for a base."""

    def make(base: Path, token_ids: list[int], **settings: Any) -> Path:
        return make_adapter(tmp_path / "adapter", base, token_ids=token_ids, **settings)

    return make


@pytest.fixture(params=["tied", "untied"])
def either_head(request: pytest.FixtureRequest, config: ModelConfig, make_model: Callable[..., CausalLM]) -> CausalLM:
    """A random model whose head is the embedding, and one with a head of its own."""
    return make_model(config.model_copy(update={"tie_word_embeddings": request.param == "tied"}))


@pytest.fixture
def nothing_half_written(tmp_path: Path) -> Iterator[None]:
    """Fails a test that leaves a file or directory with the name of an unfinished one."""
    yield
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.fixture(autouse=True)
def one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixes the creation time that artifacts record, so that runs can be compared byte by byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
