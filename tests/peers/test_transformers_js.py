"""transformers.js in Node opens portable bundles as they are, and fused ones with caches that they can write into."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.peer

PROGRAM = (Path(__file__).parent / "scripts" / "transformers_js.mjs").read_text(encoding="utf-8")


def greedy(
    in_node: Callable[..., str], bundles: Any, name: str, batches: list[list[list[int]]], positions: int = 0
) -> list[list[list[int]]]:
    printed = in_node(PROGRAM, bundles.path(name), bundles.count, json.dumps(batches), positions)
    found = json.loads(printed.splitlines()[-1])
    assert found["version"] == "4.3.1"
    return [bundles.cut(texts) for texts in found["answers"]]


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("portable", 0),
        ("portable int8", 0),
        ("portable int4", 0),
        ("float32", 16),
        ("float32", 32),
        ("int8", 16),
        ("int8 caches", 32),
        ("halves", 16),
    ],
)
def test_the_same_greedy_tokens(in_node: Callable[..., str], bundles: Any, name: str, positions: int) -> None:
    found = greedy(in_node, bundles, name, [[prompt] for prompt in bundles.prompts], positions)
    assert [texts[0] for texts in found] == bundles.greedy(name, growing="int8 caches" in name)


def test_a_batch_padded_on_the_left(in_node: Callable[..., str], bundles: Any) -> None:
    found = greedy(in_node, bundles, "portable", [bundles.prompts])
    assert found[0] == bundles.greedy("portable")


def test_another_window_is_noticed(in_node: Callable[..., str], bundles: Any) -> None:
    """The control: the same weights with a window of 12."""
    found = greedy(in_node, bundles, "other portable", [bundles.prompts])[0]
    assert sum(ours != theirs for ours, theirs in zip(bundles.greedy("portable"), found, strict=True)) >= 4


def test_a_fused_bundle_without_caches_is_refused(in_node: Callable[..., str], bundles: Any) -> None:
    with pytest.raises(AssertionError, match=r"KV cache capacity \(0\) must be at least local_window_size \(16\)"):
        greedy(in_node, bundles, "int8", [bundles.prompts[:1]])


@pytest.mark.parametrize(("number", "name"), [(0, "portable"), (1, "int8")])
def test_the_examples(
    in_node: Callable[..., str], bundles: Any, example: Callable[[str, int], str], number: int, name: str
) -> None:
    printed = in_node(example("transformers.js", number))
    assert printed.strip() == bundles.text(name, "Once upon a time", 50).strip()
