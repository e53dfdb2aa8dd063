"""Conversations: prompts have the ids of training, every turn contains the whole conversation, and no turn is read twice."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from slm.core.chat import Message, chat_ids
from slm.core.checkpoint import read_config
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.finetune.examples import Renderer
from slm.finetune.rows import ChatRow
from slm.loading import load
from slm.runtime.chat import Chat
from slm.runtime.model import Model
from slm.runtime.prefix import PrefixDecoder

SHORT: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0}


@pytest.fixture(params=["bundle", "checkpoint"])
def model(request: pytest.FixtureRequest, shared_bundle: Bundle, shared_checkpoint: Path) -> Model:
    return load(shared_bundle.path if request.param == "bundle" else shared_checkpoint, threads=1)


@pytest.fixture
def asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Records the prompts of the model."""
    prompts: list[list[int]] = []
    pieces = model.pieces

    def remembering(ids: Any, **options: Any) -> Any:
        prompts.append(list(ids))
        return pieces(ids, **options)

    monkeypatch.setattr(model, "pieces", remembering)
    return prompts


def said(pieces: Any) -> str:
    return "".join(piece.text for piece in pieces)


def test_every_turn_asks_with_all_that_was_said_as_it_is_trained(
    model: Model, asked: list[list[int]], shared_checkpoint: Path
) -> None:
    chat = Chat(model, "Be <end_of_turn> brief.")
    answers = [
        said(chat.pieces(request, **SHORT)).strip() for request in ("Tell me of the sea.", "More <start_of_turn>?")
    ]
    assert all(answers)
    assert [message["role"] for message in chat.messages] == ["system", *("user", "assistant") * 2]
    assert [message["content"] for message in chat.messages[2::2]] == answers
    # The ids before each answer in training equal the prompt.
    renderer = Renderer(Tokenizer.load(shared_checkpoint), read_config(shared_checkpoint))
    example = renderer.example(ChatRow(tuple(chat.messages)))
    assert [list(example.ids[:start]) for start, _ in example.spans] == asked


def test_what_was_read_is_not_read_again(model: Model) -> None:
    chat = Chat(model)
    decoder = model.decoder
    assert isinstance(decoder, PrefixDecoder)
    said(chat.pieces("Tell me of the sea and of the ships that sail on it.", **SHORT))
    first = len(chat_ids(model.tokenizer, chat.messages[:1])) - 1  # a snapshot ends before the last token
    said(chat.pieces("And then?", **SHORT))
    assert decoder.reused >= first
    said(chat.retry_pieces(**SHORT))
    assert decoder.reused >= first


def test_it_is_as_if_everything_was_read_anew(shared_bundle: Bundle) -> None:
    chat = Chat(load(shared_bundle.path, threads=1))
    said(chat.pieces("Tell me of the sea.", **SHORT))
    messages: list[Message] = [*chat.messages, {"role": "user", "content": "And then?"}]
    fresh = load(shared_bundle.path, threads=1)
    wanted = fresh.generate(chat_ids(fresh.tokenizer, messages), **SHORT)
    assert said(chat.pieces("And then?", **SHORT)) == wanted
    assert wanted != said(
        Chat(fresh).pieces("And then?", **SHORT)
    )  # negative control: a prompt without the conversation


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full(model: Model, asked: list[list[int]]) -> None:
    chat = Chat(model, "Be brief.")
    for number in range(12):
        said(chat.pieces(f"This is question number {number}.", max_new_tokens=20, temperature=0.0))
    assert chat.forgotten > 0
    assert chat.messages[0]["role"] == "system" and chat.messages[1]["role"] == "user"
    assert chat.messages[-2]["content"] == "This is question number 11."
    assert all(len(ids) + 20 <= model.decoder.context for ids in asked)
    with pytest.raises(SlmError, match="context"):
        chat.pieces("word " * 500, **SHORT)
    assert chat.messages[-2]["content"] == "This is question number 11."  # equals a conversation that starts here


def test_answers_draw_anew_and_the_same_seed_is_the_same_conversation(shared_bundle: Bundle) -> None:
    bold: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 1.0}

    def talk(seed: int) -> list[str]:
        chat = Chat(load(shared_bundle.path, threads=1))
        return [said(chat.pieces("Tell me of the sea.", seed=seed, **bold)), said(chat.retry_pieces(seed=seed, **bold))]

    first = talk(0)
    assert first[0] != first[1] and first == talk(0) != talk(7)


def test_an_answer_that_is_broken_off_is_remembered_as_far_as_it_came(model: Model) -> None:
    bold: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.5, "top_p": 1.0, "top_k": 0, "seed": 0}
    whole = model.generate(chat_ids(model.tokenizer, [{"role": "user", "content": "Hi."}]), **bold)
    chat = Chat(model)
    with closing(chat.pieces("Hi.", **bold)) as pieces:  # type: ignore[type-var]
        some = "".join(next(pieces).text for _ in range(12))
    assert some.strip() and whole.startswith(some) and len(some) < len(whole)
    assert chat.messages[-1] == {"role": "assistant", "content": some.strip()}


def test_a_question_without_an_answer_is_forgotten(model: Model) -> None:
    chat = Chat(model)
    assert said(chat.pieces("Tell me of the sea.", max_new_tokens=1, logit_bias={model.stop_token_ids[0]: 1e9})) == ""
    assert chat.messages == []


def test_what_is_told_first_can_be_changed(model: Model) -> None:
    chat = Chat(model, "a")
    said(chat.pieces("Tell me of the sea.", **SHORT))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "a"}] and chat.system == "a"
    chat.reset("b")
    assert chat.system == "b"
    chat.reset("")
    assert chat.messages == []
    for wrong in (lambda: chat.pieces(" \n"), chat.retry_pieces):
        with pytest.raises(SlmError):
            wrong()


def test_drafts_change_nothing(shared_bundle: Bundle) -> None:
    def talk(draft: int | None) -> list[str]:
        chat = Chat(load(shared_bundle.path, threads=1), draft_tokens=draft)
        return [said(chat.pieces("Tell me of the sea.", max_new_tokens=40, temperature=0.0)) for _ in range(2)]

    assert talk(8) == talk(None)


def test_a_model_without_turns_is_refused(model: Model, make_bare: Callable[[], Tokenizer]) -> None:
    model.tokenizer = make_bare()
    with pytest.raises(SlmError, match="has no <start_of_turn>"):
        Chat(model)


@pytest.fixture
def make_bare() -> Callable[[], Tokenizer]:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    return lambda: Tokenizer(Backend(models.BPE(vocab={"a": 0}, merges=[])), {})
