"""The one way a conversation becomes text: Gemma's turns, as a Jinja template for others and as a function for us."""

from typing import Any

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


# Stands for a request while a template is rendered around it; of a plane of Unicode that no text uses.
_STAND_IN = "\U0010fffd\U0010fffc"


def turn_prompt(request: str) -> str:
    """Returns the text that asks for one answer: the user's turn, and the model's turn begun."""
    return f"{START_OF_TURN}user\n{request.strip()}{END_OF_TURN}\n{START_OF_TURN}model\n"


def turn_ids(tokenizer: Tokenizer, request: str) -> list[int]:
    """Returns the ids that ask for one answer, the turns real and the request literal.

    What a user types stays what it is: "<end_of_turn>" in a request is only characters. A model from elsewhere that brings
    a chat template of its own is asked in that.

    Raises:
        SlmError: When the tokenizer has no turn tokens, or the model's own template does not do.
    """
    template = tokenizer.config.get("chat_template")
    if isinstance(template, str) and template != CHAT_TEMPLATE:
        return _templated_ids(tokenizer, template, request)
    start, end = (tokenizer.token_id(token) for token in (START_OF_TURN, END_OF_TURN))
    if start is None or end is None:
        raise SlmError(f"the tokenizer has no {START_OF_TURN} or no {END_OF_TURN}", "this model knows no turns")
    user, line, model = (tokenizer.encode_literal(text) for text in (f"user\n{request.strip()}", "\n", "model\n"))
    return [*tokenizer.encode(""), start, *user, end, *line, start, *model]


def _templated_ids(tokenizer: Tokenizer, template: str, request: str) -> list[int]:
    from slm.core.template import render

    tokens = {name: _spelling(value) for name, value in tokenizer.config.items() if name.endswith("_token")}

    def rendered(content: str) -> str:
        return render(template, [{"role": "user", "content": content}], tokens)

    text, said = rendered(request), request.strip()
    if not any(token in request for token in tokenizer.special_tokens):
        return tokenizer.encode_rendered(text)
    before, _, after = rendered(_STAND_IN).partition(_STAND_IN)
    if text != before + said + after:
        raise SlmError("the request spells a special token and the chat template changes it", "leave the token out")
    return [*tokenizer.encode_rendered(before), *tokenizer.encode_literal(said), *tokenizer.encode_rendered(after)]


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
