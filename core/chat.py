"""The one way a conversation becomes text: Gemma's turns, as a Jinja template for others and as functions for us.

Training and answering take their ids from here. `dialogues` divides a whole conversation into what is read and what is
answered; before each answer stand the ids that `chat_ids` gives for the messages up to it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from slm.core.errors import SlmError
from slm.core.templated import Rendered, encoded, rendered
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


# Conversations that are held as text at a time.
_AT_ONCE = 50


def turn_prompt(request: str) -> str:
    """Returns the text that asks for one answer: the user's turn, and the model's turn begun."""
    return f"{START_OF_TURN}user\n{request.strip()}{END_OF_TURN}\n{START_OF_TURN}model\n"


def turn_ids(tokenizer: Tokenizer, request: str, stops: Collection[int] = ()) -> list[int]:
    """Returns the ids that ask for one answer; see `chat_ids`."""
    return chat_ids(tokenizer, [{"role": "user", "content": request}], stops)


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], stops: Collection[int] = ()) -> list[int]:
    """Returns the ids that ask for the next answer of a conversation, in which only the template places control tokens.

    "<end_of_turn>" in a message is only characters, however it is spelled. A model from elsewhere that brings a chat template
    of its own is asked in that. Not for an event loop: a template may take seconds.

    Args:
        tokenizer: The model's.
        messages: The conversation.
        stops: The model's stop tokens, which a message must not form either.

    Raises:
        SlmError: When the tokenizer has no turn tokens, or the model's own template fails or refuses the conversation.
    """
    template = foreign_template(tokenizer)
    if template is not None:
        (found,) = rendered(tokenizer, template, [(messages, True)])
        ids = found if isinstance(found, SlmError) else encoded(tokenizer, found, stops)
        if isinstance(ids, SlmError):
            raise ids
        return ids
    start, _ = _turn_tokens(tokenizer)
    return [*_turns(tokenizer, messages, stops)[0], start, *tokenizer.encode_literal("model\n")]


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
            ids, answers = _turns(tokenizer, messages, ends)
            yield Dialogue(tuple(ids[: answers[-1][1]]), tuple(answers))
        return
    for first in range(0, len(trimmed), _AT_ONCE):
        some = trimmed[first : first + _AT_ONCE]
        asked = [
            request
            for messages in some
            for request in (*((messages[:i], True) for i in _answers(messages)), (messages, False))
        ]
        found = iter(rendered(tokenizer, template, asked))
        for messages in some:
            yield _divided(tokenizer, [next(found) for _ in range(len(_answers(messages)) + 1)], ends)


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


def _turns(
    tokenizer: Tokenizer, messages: Sequence[Message], stops: Collection[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of whole turns, and where the answers among them stand."""
    start, end = _turn_tokens(tokenizer)
    besides = tokenizer.lengthy(stops) - tokenizer.control_ids
    line, model = (tokenizer.encode_literal(text) for text in ("\n", "model\n"))
    ids, answers = list(tokenizer.prefix_ids), []
    for message in messages:
        said = message["content"].strip()
        if message["role"] == "assistant":
            ids += [start, *model]
            begins = len(ids)
            ids += [*tokenizer.encode_literal(said, besides), end]
            answers.append((begins, len(ids)))
        else:
            ids += [start, *tokenizer.encode_literal(f"{message['role']}\n{said}", besides), end]
        ids += line
    return ids, answers


def _answers(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _up_to_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[: _answers(messages)[-1] + 1]


def _divided(tokenizer: Tokenizer, found: list[Rendered | SlmError], ends: Collection[int]) -> Dialogue | SlmError:
    """Returns what a foreign template made of a conversation, divided at what it made of each question in it."""
    *asked, last = found
    questions = [question for question in asked if isinstance(question, Rendered)]
    for each in (last, *asked):  # what is wrong with the whole conversation says more
        if isinstance(each, SlmError):
            return each
    assert isinstance(last, Rendered)
    ids = _divided_ids(tokenizer, last, questions, ends)
    if isinstance(ids, SlmError):
        return ids
    whole, begins = ids
    answers = []
    for begin, limit in zip(begins, (*begins[1:], len(whole)), strict=True):
        stop = next((place for place in range(begin, limit) if whole[place] in ends), None)
        if stop is None:
            return SlmError("the model's chat template ends an answer with none of the model's stop tokens")
        answers.append((begin, stop + 1))
    return Dialogue(tuple(whole[: answers[-1][1]]), tuple(answers))


def _divided_ids(
    tokenizer: Tokenizer, last: Rendered, questions: Sequence[Rendered], ends: Collection[int]
) -> tuple[list[int], list[int]] | SlmError:
    """Returns the ids of a conversation, and where each answer in it begins."""
    whole = encoded(tokenizer, last, ends)
    asked = [encoded(tokenizer, question, ends) for question in questions]
    for each in (whole, *asked):
        if isinstance(each, SlmError):
            return each
    assert not isinstance(whole, SlmError)
    prompts = [prompt for prompt in asked if not isinstance(prompt, SlmError)]
    if all(whole[: len(prompt)] == prompt for prompt in prompts):
        return whole, [len(prompt) for prompt in prompts]
    # Tokens that would span the beginning of an answer are cut there, as they are when the model answers.
    ids: list[int] = []
    begins: list[int] = []
    before: Rendered | None = None
    for view in (*questions, last):
        part = view.after(before)
        if part is None or last.after(view) is None:
            return SlmError("the model's chat template writes the conversation otherwise than it asks for the answer")
        tokens = encoded(tokenizer, part, ends)
        if isinstance(tokens, SlmError):
            return tokens
        ids += tokens
        begins.append(len(ids))
        before = view
    return ids, begins[:-1]


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
