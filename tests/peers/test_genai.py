"""onnxruntime-genai opens fused bundles as they are and writes what slm writes."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from slm.core.chat import turn_ids
from slm.core.tokenizer import Tokenizer

pytestmark = pytest.mark.peer

Ask = Callable[..., Any]

TEXTS = ["Once upon a time", " two  spaces\n\n and\ttabs", "naïve 東京 🦊", "x" * 40]


def ask(genai: Ask, path: object, *requests: dict[str, Any], texts: list[str] | None = None) -> Any:
    return genai(path, json.dumps(requests), json.dumps(texts or []))


def continued(genai: Ask, bundles: Any, name: str) -> list[list[int]]:
    """Its greedy tokens after each prompt."""
    requests = [{"prompts": [prompt], "count": bundles.count} for prompt in bundles.prompts]
    found = ask(genai, bundles.path(name), *requests)
    assert found["version"] == "0.18.0"
    return [rows[0][len(prompt) :] for rows, prompt in zip(found["answers"], bundles.prompts, strict=True)]


@pytest.mark.parametrize("name", ["float32", "int8", "int8 caches", "halves"])
def test_the_same_greedy_tokens(genai: Ask, bundles: Any, name: str) -> None:
    assert bundles.cut(continued(genai, bundles, name)) == bundles.greedy(name)


def test_another_window_is_noticed(genai: Ask, bundles: Any) -> None:
    """The control: the same weights with a window of 12."""
    found, wanted = bundles.cut(continued(genai, bundles, "other")), bundles.greedy("float32")
    assert sum(ours != theirs for ours, theirs in zip(wanted, found, strict=True)) >= 4


def test_what_it_is_asked_besides(genai: Ask, bundles: Any) -> None:
    """Chunks, a batch, a further turn past the window, a turn taken back."""
    short, long = bundles.prompts[0], bundles.prompts[-1]
    rows = [long[:20], long[20:40]]
    first = bundles.greedy("float32", [short])[0][:5]
    turn = {"prompts": [short], "count": 5, "rewind": len(short) + 4, "then": [first[4], *long]}
    found = ask(
        genai,
        bundles.path("float32"),
        {"prompts": [long], "count": 40, "options": {"chunk_size": 8}},
        {"prompts": rows, "count": 10},
        turn,
        {"prompts": [long[:10]], "count": 5, "rewind": 10, "then": short},
        {"prompts": [short], "count": 17, "options": {"max_length": 20}},
    )["answers"]
    read = [[long], rows, [[*short, *first, *long]], [[*long[:10], *short]], [short]]
    for answer, prompts in zip(found, read, strict=True):
        for row, prompt, wanted in zip(answer, prompts, bundles.greedy("float32", prompts), strict=True):
            written = bundles.cut([row[len(prompt) :]])[0]
            assert row[: len(prompt)] == prompt and written and written == wanted[: len(written)]


def test_it_forgets_the_last_token_of_a_text_cut_off(genai: Ask, bundles: Any) -> None:
    """Where docs/clients.md asks for a detour: the day this fails the detour can go."""
    short, long = bundles.prompts[0], bundles.prompts[-1][:5]
    row = ask(genai, bundles.path("float32"), {"prompts": [short], "count": 5, "then": long})["answers"][0][0]
    read = len(short) + 5 + len(long)
    assert row[read:] != bundles.greedy("float32", [row[:read]])[0][: len(row) - read]


def test_what_it_refuses(genai: Ask, bundles: Any) -> None:
    """The messages that docs/clients.md shows."""
    long, padded = bundles.prompts[-1][:8], [*bundles.prompts[-1][10:15], 3, 3, 3]
    found = ask(
        genai,
        bundles.path("float32"),
        {"prompts": [long], "count": 2, "options": {"max_length": 10}},
        {"prompts": [long, padded], "count": 2},
        {"prompts": [long], "count": 2, "options": {"num_beams": 2}},
    )["answers"]
    assert "KV cache capacity (10) must be at least local_window_size (16)" in found[0]
    assert "seqlens_k[1] = 4 is too small for sequence_length 8" in found[1]
    assert "KV cache capacity (0) must be at least local_window_size (16)" in found[2]


@pytest.mark.parametrize("name", ["portable", "portable int8", "portable int4"])
def test_a_portable_bundle_up_to_the_window(genai: Ask, bundles: Any, name: str) -> None:
    prompt = bundles.prompts[0]
    request = {"prompts": [prompt], "count": 60}
    found = ask(genai, bundles.path(name), request, request | {"options": {"max_length": 40}})["answers"]
    assert len(found[0][0]) == 16
    assert found[0][0][len(prompt) :] == bundles.greedy(name, [prompt])[0][: 16 - len(prompt)]
    assert "has shape {1,2,16,32} but the computed output shape for this run is {1,2,15,32}" in found[1]


def test_its_tokenizer(genai: Ask, bundles: Any, tokenizer: Tokenizer) -> None:
    found = ask(genai, bundles.path("int8"), texts=TEXTS)
    assert found["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["texts"] == TEXTS
    assert found["chats"] == [turn_ids(tokenizer, text.strip()) for text in TEXTS]


def test_the_example(in_python: Callable[..., str], bundles: Any, example: Callable[[str, int], str]) -> None:
    printed = in_python(example("onnxruntime-genai", 0), "genai")
    assert bundles.text("int8", "Once upon a time", 40) in printed
