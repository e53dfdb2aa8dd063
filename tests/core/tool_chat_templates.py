"""Chat templates that know tools, in the styles of well-known models, and tokenizers that have their tokens."""

from slm.core.tokenizer import Tokenizer
from tests.core.chat_templates import CONTROLS, TEMPLATES, chat_tokenizer

# Gemma's notation: strings between quote marks, keys sorted, types in capitals.
_NOTATION = """
{%- macro value(v, quoted) -%}
{%- if v is string -%}{{ '<escape>' + v + '<escape>' }}
{%- elif v is boolean -%}{{ 'true' if v else 'false' }}
{%- elif v is mapping -%}
{{- '{' -}}
{%- for k, each in v | dictsort -%}
{{- (',' if not loop.first else '') + (('<escape>' + k + '<escape>') if quoted else k) + ':' + value(each, quoted) -}}
{%- endfor -%}{{- '}' -}}
{%- elif v is sequence -%}
{{- '[' -}}{%- for each in v -%}{{- (',' if not loop.first else '') + value(each, quoted) -}}{%- endfor -%}{{- ']' -}}
{%- else -%}{{ v }}{%- endif -%}
{%- endmacro -%}
{%- macro properties(ps) -%}
{%- for k, p in ps | dictsort -%}
{{- (',' if not loop.first else '') + k + ':{description:<escape>' + (p['description'] or '') + '<escape>' -}}
{%- if p['type'] | upper == 'STRING' and p['enum'] -%}{{- ',enum:' + value(p['enum'], true) -}}{%- endif -%}
{%- if p['type'] | upper == 'OBJECT' and p['properties'] -%}
{{- ',properties:{' + properties(p['properties']) + '}' -}}
{%- endif -%}
{%- if p['type'] | upper == 'ARRAY' and p['items'] is mapping -%}
{{- ',items:{type:<escape>' + (p['items']['type'] | upper) + '<escape>}' -}}
{%- endif -%}
{{- ',type:<escape>' + (p['type'] | upper) + '<escape>}' -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro declaration(f) -%}
{{- 'declaration:' + f['name'] + '{description:<escape>' + f['description'] + '<escape>' -}}
{%- set ps = f['parameters'] -%}
{%- if ps -%}
{{- ',parameters:{' -}}
{%- if ps['properties'] -%}{{- 'properties:{' + properties(ps['properties']) + '},' -}}{%- endif -%}
{%- if ps['required'] -%}{{- 'required:' + value(ps['required'], true) + ',' -}}{%- endif -%}
{{- 'type:<escape>' + (ps['type'] | upper) + '<escape>}' -}}
{%- endif -%}
{{- '}' -}}
{%- endmacro -%}
"""

FUNCTION_GEMMA = (
    "{{ bos_token }}"
    + _NOTATION
    + """
{%- set ns = namespace(last=None) -%}
{%- set rest = messages -%}
{%- if tools or messages[0]['role'] in ['system', 'developer'] -%}
{{- '<start_of_turn>developer\\n' -}}
{%- if messages[0]['role'] in ['system', 'developer'] -%}
{{- messages[0]['content'] | trim -}}{%- set rest = messages[1:] -%}
{%- endif -%}
{%- for tool in tools or [] -%}
{{- '<start_function_declaration>' + declaration(tool['function']) + '<end_function_declaration>' -}}
{%- endfor -%}
{{- '<end_of_turn>\\n' -}}
{%- endif -%}
{%- for message in rest -%}
{%- if message['role'] != 'tool' -%}
{%- if ns.last != 'response' -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{%- endif -%}
{%- set ns.last = None -%}
{%- if message['content'] is string -%}{{- message['content'] | trim -}}{%- endif -%}
{%- if message['tool_calls'] -%}
{%- for call in message['tool_calls'] -%}
{%- set function = call['function'] -%}
{{- '<start_function_call>call:' + function['name'] + value(function['arguments'], false) + '<end_function_call>' -}}
{%- endfor -%}
{%- if loop.last -%}{{- '<start_function_response>' -}}{%- endif -%}
{%- set ns.last = 'call' -%}
{%- endif -%}
{%- else -%}
{%- if message['content'] is mapping -%}
{{- '<start_function_response>response:' + message['name'] + value(message['content'], false) + '<end_function_response>' -}}
{%- else -%}
{{- '<start_function_response>response:' + message['name'] + '{value:' + value(message['content'], false) -}}
{{- '}<end_function_response>' -}}
{%- endif -%}
{%- set ns.last = 'response' -%}
{%- endif -%}
{%- if ns.last is none -%}{{- '<end_of_turn>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last != 'response' -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
)

QWEN = """{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\nCall one or more functions. Their signatures are within <tools></tools>:\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" + (tool | tojson) }}{%- endfor %}
{{- "\\n</tools>\\n\\nFor each call return JSON within <tool_call></tool_call>:\\n<tool_call>\\n{\\"name\\": <name>, " }}
{{- "\\"arguments\\": <json>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for tool_call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' + (tool_call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Gemma 4's notation is FunctionGemma's with other marks.
GEMMA_4 = (
    FUNCTION_GEMMA.replace("<escape>", '<|"|>')
    .replace("<start_function_call>", "<|tool_call>")
    .replace("<end_function_call>", "<tool_call|>")
    .replace("<start_function_response>", "<|tool_response>")
    .replace("<end_function_response>", "<tool_response|>")
    .replace("<start_function_declaration>", "<|tool>")
    .replace("<end_function_declaration>", "<tool|>")
)

NATIVE = {"functiongemma": FUNCTION_GEMMA, "qwen": QWEN, "gemma 4": GEMMA_4}
# Templates without tools, and one that declares them but spells calls in an unknown format.
LOWERED = {
    "gemma 2": TEMPLATES["gemma 2"],
    "gemma 3": TEMPLATES["gemma 3"],
    "chatml": TEMPLATES["chatml"],
    "parts alone": TEMPLATES["parts alone"],
    "other": QWEN.replace("<tool_call>\\n{", "<call {").replace("}\\n</tool_call>", "}>"),
}
ANSWER_ENDS = ("<end_of_turn>", "<|im_end|>", "<start_function_response>", "<|tool_response>")
MARKS = (
    *("<start_function_declaration>", "<end_function_declaration>", "<start_function_call>", "<end_function_call>"),
    *(
        "<start_function_response>",
        "<end_function_response>",
        "<escape>",
        "<tool_call>",
        "</tool_call>",
        "<|tool_call>",
    ),
    *("<tool_call|>", "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", '<|"|>'),
)


def tool_tokenizer(template: str, *, special: bool = True) -> Tokenizer:
    """Returns a small tokenizer with the control tokens of turns and of tools."""
    return chat_tokenizer(template, special=special, controls=(*CONTROLS, *MARKS))
