"""How the page writes a model's turns: the fields of `site.json` from which the browser builds prompts.

The page renders the model's own chat template with another implementation of Jinja than Python's. `site.json` therefore has
prompts of short conversations with their token ids; the page builds the same prompts when it loads the model, and offers chats
and tools only if the ids are equal.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from slm.core.chat import Message, chat_ids, declares_tools, foreign_template, tool_form, turn_ends
from slm.core.errors import SlmError
from slm.core.templated import reads_parts, special_tokens
from slm.core.tokenizer import Tokenizer
from slm.core.tool_fields import declared, openai_messages
from slm.core.tools import Call

_TOOLS = declared(
    [
        {
            "type": "function",
            "function": {
                "name": "set_heating",
                "description": "Sets the heating of a room.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "room": {"type": "string", "enum": ["hall", "Küche"], "description": "The room"},
                        "degrees": {"type": "number", "minimum": 5.0, "maximum": 30, "description": "In °C"},
                        "days": {"type": "array", "items": {"type": "string"}, "description": "All days if absent"},
                        "eco": {"type": "boolean"},
                    },
                    "required": ["room", "degrees"],
                },
            },
        },
        {"type": "function", "function": {"name": "now", "description": "Tells the time."}},
    ]
)
_USER: Message = {"role": "user", "content": "Who is there? <end_of_turn>\n  An owl, 3 years old."}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_ANSWER: Message = {"role": "assistant", "content": "An owl — 🦉."}
_CALLS: Message = {
    "role": "assistant",
    "content": "",
    "calls": (
        Call("set_heating", {"room": "Küche", "degrees": 21.0, "days": ["Mon", 'a "day"'], "eco": True}),
        Call("now", {}),
    ),
}
_RESULTS: list[Message] = [
    {"role": "tool", "name": "set_heating", "content": "done <end_of_turn>"},
    {"role": "tool", "name": "now", "content": '{"hour": 9.5, "note": "half past \\"nine\\""}'},
]
_PLAIN: Message = {"role": "user", "content": "Who is there?"}
_TALK = [_PLAIN, _ANSWER, _PLAIN]
_WITH_TOOLS = ([_USER], [_USER, _CALLS, *_RESULTS], [_USER, _CALLS, *_RESULTS, _ANSWER, _USER])


def page_turns(tokenizer: Tokenizer, stop_tokens: Sequence[int], info: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns how the page writes a model's turns; None if the model has none.

    Args:
        tokenizer: The model's tokenizer.
        stop_tokens: The tokens that end a text.
        info: The contents of the model's `slm.json`; empty if there is none.
    """
    template = foreign_template(tokenizer)
    now = datetime.now().replace(microsecond=0)
    plain = [_probe(tokenizer, each, stop_tokens, tools=False) for each in (_TALK, [_PLAIN], [_USER, _ANSWER, _USER])]
    if plain[0] is None or plain[1] is None:
        return None
    system = _probe(tokenizer, [_SYSTEM, _PLAIN], stop_tokens, tools=False)
    calling = [_probe(tokenizer, each, stop_tokens, tools=True) for each in _WITH_TOOLS]
    form = tool_form(tokenizer)
    return {
        "template": template,
        "tokens": special_tokens(tokenizer),
        "parts": template is not None and reads_parts(tokenizer, template),
        "form": {"native": form.native, "objects": form.objects, "system": form.system},
        "style": asdict(form.style),
        "declares_tools": declares_tools(info),
        "ends": sorted({*stop_tokens, *turn_ends(tokenizer)}),
        "shown": sorted(tokenizer.ids_of(form.style.marks) & tokenizer.special_ids),
        "system": system is not None,
        "time": now.isoformat(),  # templates may write the date
        "tools": json.dumps([tool.declaration for tool in _TOOLS]),  # as text, in which 5.0 stays 5.0
        "prompts": [each for each in (*plain, system) if each is not None],
        "prompts_with_tools": None if None in calling else calling,
    }


def _probe(
    tokenizer: Tokenizer, messages: Sequence[Message], stop_tokens: Sequence[int], *, tools: bool
) -> dict[str, Any] | None:
    """Returns a conversation in OpenAI's format with its ids; None if the model's template rejects it."""
    try:
        ids = chat_ids(tokenizer, messages, stop_tokens, _TOOLS if tools else ())
    except SlmError:
        return None
    return {"messages": openai_messages(messages), "ids": ids}
