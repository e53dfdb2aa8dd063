"""Chat templates in the styles of well-known instruction-tuned models, and tokenizers that have their control tokens."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from slm.core.tokenizer import Tokenizer

_CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {
    "gemma 2": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "gemma 3": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}""",
    "chatml": _CHATML,
    "qwen": """{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == "assistant" %}
{%- set content = message.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>'
%}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}{% endfor %}""",
    "phi": """{% for message in messages %}{% if message['content'] %}
{{- '<|' ~ message['role'] ~ '|>' ~ '\n' ~ message['content'] ~ '<|end|>' ~ '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "alpaca": """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content ~ '\n\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\n' ~ message.content.strip() ~ '\n\n' }}
{%- else %}{{ '### Response:\n' ~ message.content.strip() ~ eos_token ~ '\n\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}""",
    "deepseek": """{% set ns = namespace(system_prompt='') %}{% for message in messages %}{% if message['role'] == 'system' %}
{%- set ns.system_prompt = message['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}
{%- set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}""",
    "smollm with generation": """{%- for message in messages %}{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}""",
    "parts alone": """{{ bos_token }}{% for message in messages %}
{{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\n' }}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
}
# What no well-known model does, but a template may.
ALTERING = {
    "lowercases": _CHATML.replace("message.content", "message.content | lower"),
    "uppercases": _CHATML.replace("message.content", "message.content | upper").replace("im_", "IM_"),
    "deletes": _CHATML.replace("message.content", "message.content | replace('-', '') | replace('  ', '')"),
    "rewrites": _CHATML.replace("message.content", "message.content | replace('(', '<') | replace(')', '>')"),
    "joins": "<|im_start|>{{ messages | map(attribute='content') | join }}<|im_end|>",
    "joins with spaces": "<|im_start|>{{ messages | map(attribute='content') | join(' ') }}<|im_end|>",
    "splits": _CHATML.replace("message.content", "message.content.split('#') | join"),
    "brackets": _CHATML.replace("message.content", "'<|' ~ message.content ~ '|>'"),
    "brackets lowered": _CHATML.replace("message.content", "'<|' ~ (message.content | lower) ~ '|>'"),
    "shortens": _CHATML.replace("message.content", "message.content[1:]"),
    "reverses": _CHATML.replace("message.content", "message.content[::-1]"),
    "writes json": "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}",
    "writes escapes": "{% for m in messages %}<|im_start|>{{ m | tojson(ensure_ascii=True) }}<|im_end|>{% endfor %}",
    "titles": _CHATML.replace("message.content", "message.content | title | lower"),
    "counts": _CHATML.replace("message.content", "(message.content | length) ~ message.content"),
    "ends what does not end": "{% for m in messages %}<|im_start|>{{ m.content }}"
    "{% if not m.content.endswith('<|im_end|>') %}<|im_end|>{% endif %}{% endfor %}",
}
CONTROLS = (
    *(
        "<s>",
        "</s>",
        "<pad>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|im_start|>",
        "<|im_end|>",
        "<|IM_START|>",
        "<|IM_END|>",
    ),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)
_TEXT = [
    "Once upon a time a cat said hello to a dog.\n\nWhat is 1 + 2? user model assistant system It is <b>3</b> | [x] & more.",
    '### Instruction: Tell me about it. ### Response: I do not know; "quoted" text, and (brackets).\n',
]


def chat_tokenizer(
    template: str,
    *,
    special: bool = True,
    normalizer: normalizers.Normalizer | None = None,
    controls: Sequence[str] = CONTROLS,
    kind: str = "bytes",
    **flags: bool,
) -> Tokenizer:
    """Returns a small tokenizer with control tokens.

    Args:
        template: The chat template beside it.
        special: Whether the control tokens are special.
        normalizer: Applied to text, and to control tokens with `normalized=True`.
        controls: The control tokens.
        kind: "bytes" for GPT-2's tokens, "spaces" for Gemma's, "merges" where the vocabulary forms the control tokens by
            merges and none is an added token, "words" where each word is a token.
        **flags: Of the added tokens: normalized, lstrip, rstrip, single_word.
    """
    trainer: Any
    if kind == "words":
        backend = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", *controls])
    else:
        backend = Backend(models.BPE(byte_fallback=kind == "spaces", unk_token="<unk>" if kind == "spaces" else None))
        if kind == "spaces":
            backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=\n)(?!\n)"), "isolated")
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
            fallback = [f"<0x{i:02X}>" for i in range(256)]
            trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *fallback], show_progress=False)
        else:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "merges")
            backend.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_TEXT, trainer)
    if kind == "merges":
        backend = _merging(backend, controls)
    else:
        if kind == "spaces":
            spaces = normalizers.Replace(" ", "▁")
            normalizer = spaces if normalizer is None else normalizers.Sequence([normalizer, spaces])
        flags.setdefault("normalized", False)
        backend.add_tokens([AddedToken(token, special=special, **flags) for token in controls])
        backend.add_tokens(
            [AddedToken("\n\n", special=False, normalized=False), AddedToken("<b>", special=False, normalized=False)]
        )
    if normalizer is not None:
        backend.normalizer = normalizer
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    return Tokenizer(backend, config)


def _merging(backend: Backend, tokens: Sequence[str]) -> Backend:
    """Returns a byte-level BPE whose merges come to whole control tokens before any other."""
    import json

    content = json.loads(backend.to_str())
    vocabulary, merges = content["model"]["vocab"], []
    for token in tokens:
        spelled = "".join(
            piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(token)
        )
        for end in range(2, len(spelled) + 1):
            vocabulary.setdefault(spelled[:end], len(vocabulary))
            merges.append([spelled[: end - 1], spelled[end - 1]])
    content["model"]["merges"] = merges + content["model"]["merges"]
    return Backend.from_str(json.dumps(content))
