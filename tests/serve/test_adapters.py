"""Adapters as models: each request uses the adapter that it names, whichever requests run beside it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import slm
from slm.export.bundle import ExportOptions, export_bundle

MakeAdapter = Callable[..., Path]

NAME = "random"
PROMPT = "The fox"


def test_a_request_names_its_adapter(
    serve: Callable[..., Any], shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    bundle = export_bundle(shared_checkpoint, tmp_path / "onnx", ExportOptions(adapter_slots=True))
    adapters = {
        name: make_adapter(tmp_path / name, shared_checkpoint, seed) for seed, name in enumerate(("one", "two"))
    }
    wanted = {
        name: slm.load(bundle.path, adapter=adapters.get(name)).generate(PROMPT, max_new_tokens=12, temperature=0)
        for name in (NAME, "one", "two")
    }
    assert len(set(wanted.values())) == 3
    running = serve(bundle=bundle.path, adapters=adapters)
    client = running.client()
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == [NAME, "one", "two"] and listed["one"].model_extra == {"parent": NAME}

    def ask(name: str) -> str:
        return client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text

    names = [NAME, "one", "two", "two", "one", NAME] * 3
    with ThreadPoolExecutor(6) as pool:
        for name, text in zip(names, pool.map(ask, names), strict=True):
            assert wanted[name].endswith(text) and text, name
    assert running.service.engine.figures.rows > running.service.engine.figures.steps  # some were stepped together
    with pytest.raises(openai.NotFoundError, match="'three'"):
        ask("three")
