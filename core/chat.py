"""Converts conversations to token ids: Gemma's turns, as a Jinja template for other tools and as functions for slm.

Training and inference use the same functions. `dialogues` divides a conversation into prompts and answers; the ids before
each answer are those that `chat_ids` returns for the messages before it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.templated import Rendered, encoded, rendered, special_tokens
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, PAD, START_OF_TURN, Tokenizer
from slm.core.tool_templates import ToolForm, for_template, form_of
from slm.core.tool_text import HEAD, MACRO, with_tools
from slm.core.tools import JSON_STYLE, STYLES, Call, Tool

# Stored in tokenizer_config.json for transformers and transformers.js. `turn_prompt` below gives the same text.
CHAT_TEMPLATE = (
    "{{- bos_token -}}" + MACRO + "{%- if tools -%}"
    "{{- '" + START_OF_TURN + "system\\n' -}}"
    "{%- if messages and messages[0]['role'] == 'system' and messages[0]['content'] | trim -%}"
    "{{- (messages[0]['content'] | trim) + '\\n\\n' -}}"
    "{%- endif -%}"
    "{{- '" + HEAD.replace("\n", "\\n") + "' -}}"
    "{%- for tool in tools -%}"
    "{%- set function = tool['function'] -%}"
    "{{- '\\n' + function['name'] + signature(function['parameters']) -}}"
    "{%- if function['description'] | trim -%}{{- ': ' + (function['description'] | trim) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '" + END_OF_TURN + "\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not (tools and loop.first and message['role'] == 'system') -%}"
    "{%- set content = (message['content'] | trim) if message['content'] else '' -%}"
    "{{- '"
    + START_OF_TURN
    + "' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + content -}}"
    "{%- if message['tool_calls'] -%}"
    "{%- for call in message['tool_calls'] -%}"
    "{%- set function = call['function'] -%}"
    "{{- ('\\n' if content or not loop.first else '') + '" + JSON_STYLE.opening + '\\n{"name": \' -}}'
    "{{- (function['name'] | tojson) + ', \"arguments\": ' -}}"
    "{{- function['arguments'] if function['arguments'] is string else (function['arguments'] | tojson) -}}"
    "{{- '}\\n" + JSON_STYLE.closing + "' -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '" + END_OF_TURN + "\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + START_OF_TURN + "model\\n' -}}{%- endif -%}"
)
# The template of earlier versions, which gives the same text for conversations without tools.
_EARLIER_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '" + START_OF_TURN + "' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    " + message['content'] | trim + '" + END_OF_TURN + "\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + START_OF_TURN + "model\\n' }}{%- endif -%}"
)

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """A message of a conversation.

    A message of the assistant may have calls of tools besides its text, and a message of the role "tool" has the result of
    one call; `name` is then the name of the tool, and `tool_call_id` the id of the call.
    """

    role: Role
    content: str
    calls: NotRequired[Sequence[Call]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True)
class Dialogue:
    """A conversation in tokens.

    Attributes:
        ids: The token ids, up to the token that ends the last answer.
        answers: The range (half-open) of each of the model's answers, including the token that ends it.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


# The number of conversations that are held as text at a time.
_AT_ONCE = 50


def turn_prompt(request: str) -> str:
    """Returns the prompt for one answer: the user's turn, and the start of the model's turn."""
    return f"{START_OF_TURN}user\n{request.strip()}{END_OF_TURN}\n{START_OF_TURN}model\n"


def turn_ids(tokenizer: Tokenizer, request: str, stops: Collection[int] = ()) -> list[int]:
    """Returns the ids of the prompt for one answer; see `chat_ids`."""
    return chat_ids(tokenizer, [{"role": "user", "content": request}], stops)


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], stops: Collection[int] = (), tools: Sequence[Tool] = ()
) -> list[int]:
    """Returns the ids of the prompt for a conversation's next answer; only the template places control tokens in it.

    "<end_of_turn>" in a message is encoded as plain characters, in every spelling. A model from another source uses its own
    chat template, if it has one. Do not call this in an event loop: a template may take seconds.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation.
        stops: The model's stop tokens; messages are encoded without them too.
        tools: The tools that the model may call.

    Raises:
        SlmError: If the tokenizer has no turn tokens, or the model's own template fails or rejects the conversation.
    """
    template = foreign_template(tokenizer)
    if template is not None:
        asked, declarations = _for_template(tokenizer, template, messages, tools)
        (found,) = rendered(tokenizer, template, [(asked, True, declarations)])
        ids = found if isinstance(found, SlmError) else encoded(tokenizer, found, stops)
        if isinstance(ids, SlmError):
            raise ids
        return ids
    start, _ = _turn_tokens(tokenizer)
    return [*_turns(tokenizer, with_tools(messages, tools), stops)[0], start, *tokenizer.encode_literal("model\n")]


def dialogues(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    ends: Collection[int],
    tools: Sequence[Sequence[Tool]] | None = None,
) -> Iterator[Dialogue | SlmError]:
    """Yields each conversation in tokens, or an error if the model's template rejects it.

    Args:
        tokenizer: The model's tokenizer.
        conversations: Each has at least one answer; messages after the last answer are ignored.
        ends: The tokens that end an answer.
        tools: The declared tools of each conversation; None for none.

    Raises:
        SlmError: If the tokenizer has no turn tokens, or the model's own template fails for all conversations.
    """
    template = foreign_template(tokenizer)
    declared: Sequence[Sequence[Tool]] = [()] * len(conversations) if tools is None else tools
    trimmed = [(_up_to_last_answer(each), some) for each, some in zip(conversations, declared, strict=True)]
    if template is None:
        for messages, known in trimmed:
            ids, answers = _turns(tokenizer, with_tools(messages, known), ends)
            yield Dialogue(tuple(ids[: answers[-1][1]]), tuple(answers))
        return
    for first in range(0, len(trimmed), _AT_ONCE):
        some = [_for_template(tokenizer, template, *each) for each in trimmed[first : first + _AT_ONCE]]
        asked = [
            request
            for each, declarations in some
            for request in (*((each[:i], True, declarations) for i in _answers(each)), (each, False, declarations))
        ]
        found = iter(rendered(tokenizer, template, asked))
        for each, _ in some:
            yield _divided(tokenizer, [next(found) for _ in range(len(_answers(each)) + 1)], ends)


def foreign_template(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template of a model from another source; None for slm's template, or if there is none."""
    template = tokenizer.config.get("chat_template")
    return template if isinstance(template, str) and template not in (CHAT_TEMPLATE, _EARLIER_TEMPLATE) else None


def tool_form(tokenizer: Tokenizer) -> ToolForm:
    """Returns how the model writes tools and calls.

    Raises:
        SlmError: If the model's own template exceeds a limit of time or memory.
    """
    template = foreign_template(tokenizer)
    return ToolForm() if template is None else form_of(template, tuple(sorted(special_tokens(tokenizer).items())))


def call_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that end a reply with calls, besides those that end a turn: the mark of the result that follows."""
    template = foreign_template(tokenizer) or ""
    return tokenizer.ids_of(style.result for style in STYLES if style.result is not None and style.result in template)


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that end a reply: the end of a turn, which the configuration of a base may lack, and `call_ends`."""
    end = tokenizer.token_id(END_OF_TURN)
    return call_ends(tokenizer) | (frozenset() if end is None else {end})


def ending_turns(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the configuration of a model that has learned turns: the end of a turn is one of its stop tokens."""
    end = tokenizer.token_id(END_OF_TURN)
    if end is None or end in config.stop_token_ids:
        return config
    return config.model_copy(update={"eos_token_id": (*config.stop_token_ids, end)})


def knows_turns(info: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Returns whether a model was trained on turn tokens.

    This holds for models from another source with their own chat template, and for models that slm fine-tuned on
    conversations.

    Args:
        info: The contents of the model's `slm.json`; empty if there is none.
        tokenizer: The model's tokenizer.
    """
    merged = info.get("merged")
    tuned = (info.get("finetuned"), merged.get("finetune") if isinstance(merged, dict) else None)
    # Adapters from another source do not record "turns".
    learned = any(isinstance(each, dict) and each.get("turns", True) for each in tuned)
    return learned or foreign_template(tokenizer) is not None


def declares_tools(info: Mapping[str, Any]) -> bool:
    """Returns whether prompts for a model declare tools: not if it was fine-tuned on calls of undeclared tools.

    Args:
        info: The contents of the model's `slm.json`; empty if there is none.
    """
    merged = info.get("merged")
    for each in (info.get("finetuned"), merged.get("finetune") if isinstance(merged, dict) else None):
        if isinstance(each, dict) and isinstance(each.get("declares_tools"), bool):
            return bool(each["declares_tools"])
    return True


def _turn_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    start, end = (tokenizer.token_id(token) for token in (START_OF_TURN, END_OF_TURN))
    if start is None or end is None:
        raise SlmError(f"the tokenizer has no {START_OF_TURN} or no {END_OF_TURN}", "this model does not support turns")
    return start, end


def _turns(
    tokenizer: Tokenizer, messages: Sequence[Message], stops: Collection[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of complete turns, and the ranges of the answers among them."""
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


def _for_template(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]:
    """Returns what a foreign template renders: the messages and declarations. Templates without tools are not probed."""
    if not tools and not any(message["role"] == "tool" or message.get("calls") for message in messages):
        return messages, None
    return for_template(tool_form(tokenizer), messages, tools)


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _up_to_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[: _answers(messages)[-1] + 1]


def _divided(tokenizer: Tokenizer, found: list[Rendered | SlmError], ends: Collection[int]) -> Dialogue | SlmError:
    """Returns a conversation rendered by a foreign template, divided at the end of each rendered prompt."""
    *asked, last = found
    questions = [question for question in asked if isinstance(question, Rendered)]
    for each in (last, *asked):  # the error of the whole conversation is the most helpful, so it comes first
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
            return SlmError("the model's chat template does not end answers with one of the model's stop tokens")
        answers.append((begin, stop + 1))
    return Dialogue(tuple(whole[: answers[-1][1]]), tuple(answers))


def _divided_ids(
    tokenizer: Tokenizer, last: Rendered, questions: Sequence[Rendered], ends: Collection[int]
) -> tuple[list[int], list[int]] | SlmError:
    """Returns the ids of a conversation, and the start of each answer."""
    whole = encoded(tokenizer, last, ends)
    asked = [encoded(tokenizer, question, ends) for question in questions]
    for each in (whole, *asked):
        if isinstance(each, SlmError):
            return each
    assert not isinstance(whole, SlmError)
    prompts = [prompt for prompt in asked if not isinstance(prompt, SlmError)]
    if all(whole[: len(prompt)] == prompt for prompt in prompts):
        return whole, [len(prompt) for prompt in prompts]
    # Tokens that span the start of an answer are split there, because generation starts there too.
    ids: list[int] = []
    begins: list[int] = []
    before: Rendered | None = None
    for view in (*questions, last):
        part = view.after(before)
        if part is None or last.after(view) is None:
            return SlmError("the model's chat template renders a conversation differently from the prompts within it")
        tokens = encoded(tokenizer, part, ends)
        if isinstance(tokens, SlmError):
            return tokens
        ids += tokens
        begins.append(len(ids))
        before = view
    return ids, begins[:-1]


def instruction_request(instruction: str, context: str = "") -> str:
    """Returns the user's message for an instruction; optional further input follows after an empty line."""
    return f"{instruction.strip()}\n\n{context.strip()}" if context.strip() else instruction.strip()


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """Returns the contents of `tokenizer_config.json` for a tokenizer with slm's special tokens.

    Args:
        max_length: The model's longest context, in tokens.
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
