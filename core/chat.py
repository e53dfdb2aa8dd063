"""The one way a conversation becomes text: Gemma's turns, as a Jinja template for others and as functions for us.

Training and answering take their ids from here. `dialogues` divides a whole conversation into what is read and what is
answered; before each answer stand the ids that `chat_ids` gives for the messages up to it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, PAD, START_OF_TURN, Tokenizer

# Stored in tokenizer_config.json; transformers and transformers.js render it. `turn_prompt` below says the same.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '" + START_OF_TURN + "' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    " + message['content'] | trim + '" + END_OF_TURN + "\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + START_OF_TURN + "model\\n' }}{%- endif -%}"
)

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """What somebody said."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation in tokens.

    Attributes:
        ids: All of it, up to the token that ends the last answer.
        answers: From where to where (half-open) each of the model's answers goes, the token that ends it included.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


# Stand for what was said while a template is rendered around it; of a plane of Unicode that no text uses.
_OPEN, _CLOSE = "\U0010fffd", "\U0010fffc"
# Conversations that a foreign template renders in one process, which takes a fifth of a second to start.
_AT_ONCE = 50


def turn_prompt(request: str) -> str:
    """Returns the text that asks for one answer: the user's turn, and the model's turn begun."""
    return f"{START_OF_TURN}user\n{request.strip()}{END_OF_TURN}\n{START_OF_TURN}model\n"


def turn_ids(tokenizer: Tokenizer, request: str) -> list[int]:
    """Returns the ids that ask for one answer; see `chat_ids`."""
    return chat_ids(tokenizer, [{"role": "user", "content": request}])


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns the ids that ask for the next answer of a conversation, the turns real and what was said literal.

    What a user types stays what it is: "<end_of_turn>" in a request is only characters. A model from elsewhere that brings
    a chat template of its own is asked in that.

    Raises:
        SlmError: When the tokenizer has no turn tokens, or the model's own template does not do.
    """
    template = foreign_template(tokenizer)
    if template is not None:
        (ids,) = _templated(tokenizer, template, [(messages, True)])
        if isinstance(ids, SlmError):
            raise ids
        return ids
    start, _ = _turn_tokens(tokenizer)
    return [*_turns(tokenizer, messages)[0], start, *tokenizer.encode_literal("model\n")]


def dialogues(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], ends: Collection[int]
) -> Iterator[Dialogue | SlmError]:
    """Yields conversations in tokens, one after the other; an error in place of one that the model's template refuses.

    Args:
        tokenizer: Text to ids.
        conversations: Each has an answer; what is said after the last one is left out.
        ends: The tokens that end an answer.

    Raises:
        SlmError: When the tokenizer has no turn tokens, or the model's own template does not do at all.
    """
    template = foreign_template(tokenizer)
    trimmed = [_up_to_last_answer(messages) for messages in conversations]
    if template is None:
        for messages in trimmed:
            ids, answers = _turns(tokenizer, messages)
            yield Dialogue(tuple(ids[: answers[-1][1]]), tuple(answers))
        return
    for first in range(0, len(trimmed), _AT_ONCE):
        some = trimmed[first : first + _AT_ONCE]
        asked = [
            request
            for messages in some
            for request in (*((messages[:i], True) for i in _answers(messages)), (messages, False))
        ]
        rendered = iter(_templated(tokenizer, template, asked))
        for messages in some:
            yield _divided([next(rendered) for _ in range(len(_answers(messages)) + 1)], ends)


def foreign_template(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template that a model from elsewhere brings; None where it is ours, or there is none."""
    template = tokenizer.config.get("chat_template")
    return template if isinstance(template, str) and template != CHAT_TEMPLATE else None


def knows_turns(info: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Says whether a model has learned what the tokens of turns mean.

    One from elsewhere with a chat template of its own has; one that slm made has where conversations were among what it was
    fine-tuned on.

    Args:
        info: What its `slm.json` says; empty where there is none.
        tokenizer: Its tokenizer.
    """
    merged = info.get("merged")
    tuned = (info.get("finetuned"), merged.get("finetune") if isinstance(merged, dict) else None)
    # An adapter from elsewhere does not say.
    learned = any(isinstance(each, dict) and each.get("turns", True) for each in tuned)
    return learned or foreign_template(tokenizer) is not None


def _turn_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    start, end = (tokenizer.token_id(token) for token in (START_OF_TURN, END_OF_TURN))
    if start is None or end is None:
        raise SlmError(f"the tokenizer has no {START_OF_TURN} or no {END_OF_TURN}", "this model knows no turns")
    return start, end


def _turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of whole turns, and where the answers among them stand."""
    start, end = _turn_tokens(tokenizer)
    line, model = (tokenizer.encode_literal(text) for text in ("\n", "model\n"))
    ids, answers = list(tokenizer.prefix_ids), []
    for message in messages:
        said = message["content"].strip()
        if message["role"] == "assistant":
            ids += [start, *model]
            begins = len(ids)
            ids += [*tokenizer.encode_literal(said), end]
            answers.append((begins, len(ids)))
        else:
            ids += [start, *tokenizer.encode_literal(f"{message['role']}\n{said}"), end]
        ids += line
    return ids, answers


def _answers(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _up_to_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[: _answers(messages)[-1] + 1]


def _divided(rendered: list[list[int] | SlmError], ends: Collection[int]) -> Dialogue | SlmError:
    """Returns what a foreign template made of a conversation, divided at what it made of each question in it."""
    *questions, whole = rendered
    answers = []
    for ids in (whole, *questions):  # what is wrong with all of it says more
        if isinstance(ids, SlmError):
            return ids
    assert not isinstance(whole, SlmError)
    for question in questions:
        assert not isinstance(question, SlmError)
        begins = len(question)
        if whole[:begins] != question:
            return SlmError("the model's chat template writes the conversation otherwise than it asks for the answer")
        stop = next((place for place in range(begins, len(whole)) if whole[place] in ends), None)
        if stop is None:
            return SlmError("the model's chat template ends an answer with none of the model's stop tokens")
        answers.append((begins, stop + 1))
    return Dialogue(tuple(whole[: answers[-1][1]]), tuple(answers))


def _templated(
    tokenizer: Tokenizer, template: str, asked: Sequence[tuple[Sequence[Message], bool]]
) -> list[list[int] | SlmError]:
    """Returns the ids of conversations in a template of the model's own, or why there are none.

    Where something said spells a special token, the template is rendered around stand-ins and what was said encoded
    literally; elsewhere the text is encoded in one, as transformers does.
    """
    from slm.core.template import render_all

    tokens = {name: _spelling(value) for name, value in tokenizer.config.items() if name.endswith("_token")}
    spelt = [
        any(token in m["content"] for m in messages for token in tokenizer.special_tokens) for messages, _ in asked
    ]
    plain = [([m | {"content": m["content"].strip()} for m in messages], begins) for messages, begins in asked]
    stood_in = [
        ([m | {"content": f"{_OPEN}{number}{_CLOSE}"} for number, m in enumerate(messages)], begins)
        for (messages, begins), literal in zip(plain, spelt, strict=True)
        if literal
    ]
    texts = render_all(template, [*plain, *stood_in], tokens)
    around = iter(texts[len(plain) :])
    found: list[list[int] | SlmError] = []
    for (messages, _), text, literal in zip(plain, texts, spelt, strict=False):
        if isinstance(text, SlmError) or not literal:
            found.append(text if isinstance(text, SlmError) else tokenizer.encode_rendered(text))
        else:
            found.append(_literal_ids(tokenizer, text, next(around), [m["content"] for m in messages]))
    return found


def _literal_ids(tokenizer: Tokenizer, text: str, around: str | SlmError, said: Sequence[str]) -> list[int] | SlmError:
    """Returns the ids of a text whose template was rendered around stand-ins, what was said encoded literally."""
    if isinstance(around, SlmError):
        return around
    parts = re.split(f"{_OPEN}(\\d+){_CLOSE}", around)  # what the template wrote, and numbers of messages between
    contents = [said[int(part)] if odd % 2 else part for odd, part in enumerate(parts)]
    if text != "".join(contents):
        return SlmError("the request spells a special token and the chat template changes it", "leave the token out")
    encode = (tokenizer.encode_rendered, tokenizer.encode_literal)
    return [token for odd, content in enumerate(contents) for token in encode[odd % 2](content)]


def _spelling(token: object) -> object:
    """Returns how a special token is spelt, which tokenizer_config.json says plainly or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def instruction_request(instruction: str, context: str = "") -> str:
    """Returns what the user's turn says for an instruction with optional further input, after an empty line."""
    return f"{instruction.strip()}\n\n{context.strip()}" if context.strip() else instruction.strip()


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json` for a tokenizer with slm's special tokens.

    Args:
        max_length: The longest context the model takes, in tokens.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
