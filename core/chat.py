"""The one way a conversation becomes text: Gemma's turns, as a Jinja template for others and as a function for us."""

from typing import Any

from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, PAD, START_OF_TURN

# Stored in tokenizer_config.json; transformers and transformers.js render it. `turn` below says the same.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '" + START_OF_TURN + "' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    " + message['content'] | trim + '" + END_OF_TURN + "\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + START_OF_TURN + "model\\n' }}{%- endif -%}"
)


def turn_prompt(request: str) -> str:
    """Returns the text that asks for one answer: the user's turn, and the model's turn begun."""
    return f"{START_OF_TURN}user\n{request.strip()}{END_OF_TURN}\n{START_OF_TURN}model\n"


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Returns the prompt for an instruction with optional further input, which follows it after an empty line."""
    request = f"{instruction.strip()}\n\n{context.strip()}" if context.strip() else instruction
    return turn_prompt(request)


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
