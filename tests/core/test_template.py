"""Chat templates of other people's models: rendered as transformers does, and refused when they would cost too much."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from slm.core.chat import CHAT_TEMPLATE, turn_ids
from slm.core.errors import SlmError
from slm.core.template import MAX_SECONDS, render
from slm.core.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is <b>?\n"},
    {"role": "assistant", "content": "A letter."},
    {"role": "user", "content": "And ½ “é”?"},
]
# The ways in which instruction-tuned models write their templates, none of them any model's own.
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "alternating": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('alternate!') }}{%- endif -%}
    {{ '<turn>' + message.role ~ '\n' + (prefix if loop.first else '') + message['content'] | trim }}<end>
{% endfor -%}
{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}""",
    "namespace and json": """{% set ns = namespace(count=0) %}{% for m in messages %}{% if m.role == 'user' %}
{% set ns.count = ns.count + 1 %}{% continue %}{% endif %}{{ m | tojson }}
{% endfor %}{{ ns.count }} of {{ messages | length }}{{ messages | map(attribute='role') | join(', ') }}
{{ messages[1].content | replace('b', 'c') }}{{ (messages[0].content ~ '\n' ~ 7) | indent(2) }}
{{ messages | map(attribute='content') | join('|') }}{{ '-' * 5 }}{{ '%s!' % 3 }}{{ {'é': 1} | tojson(indent=2) }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    theirs, _ = render_jinja_template(
        conversations=[CONVERSATION], chat_template=TEMPLATES[name], add_generation_prompt=True, bos_token="<bos>"
    )
    assert render(TEMPLATES[name], CONVERSATION, {"bos_token": "<bos>"}) == theirs[0]


BAD = {
    "loops that never end": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a text repeated": "{{ 'x' * 10 ** 6 * 10 ** 6 }}",
    "a list repeated": "{{ [1] * 10000000000 }}",
    "a number without end": "{{ 2 ** (10 ** 9) }}",
    "a text doubled": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a text doubled by ~": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a text grown by replacing": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x = n.x.replace('a', 'aaaa') %}{% endfor %}",
    "a text padded": "{{ 'x'.ljust(10000000000) }}",
    "a text formatted": "{{ '{:10000000000}'.format(1) }}",
    "a text formatted by %": "{{ '%10000000000d' % 1 }}",
    "a filter that pads": "{{ 'x' | center(10000000000) }}",
    "a filter that indents": "{{ 'x\ny' | indent(10000000000) }}",
    "a list of itself, printed": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "lists of themselves, compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "a list cut up, while compiling": "{{ [1] | slice(300000000) | list | length }}",
    "a list filled up": "{{ messages | batch(300000000, 0) | list | length }}",
    "bytes padded": "{{ 'x'.encode().center(3000000000) | length }}",
    "a number rounded": "{{ 1 | round(-100000000) }}",
    "a number squared": "{% set n = namespace(x=99) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "lists kept": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x, range(99999) | list] %}"
    "{% endfor %}",
    "no number": "{{ 1e999 | int }}",
    "a break from nothing": "{% break %}",
    "loops in loops": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "much output": "{% for a in range(90000) %}" + 100 * "x" + "{% endfor %}",
    "a long template": "x" * 70_000,
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the messages changed": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "no end": "{% if messages %}",
    "nothing there": "{{ nothing.at.all }}",
    "a call of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "its own refusal": "{{ raise_exception('not in that order') }}",
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_cost_too_much_is_refused(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(SlmError, match="chat template") as caught:
        render(BAD[name], CONVERSATION, {})
    assert time.monotonic() - started < 2 * MAX_SECONDS + 2
    assert "\n" not in caught.value.message and len(caught.value.message) < 300


@pytest.fixture
def foreign(shared_checkpoint: Path) -> Callable[[str], Tokenizer]:
    """The tokenizer with somebody else's template."""

    def build(template: str) -> Tokenizer:
        ours = Tokenizer.load(shared_checkpoint)
        config: dict[str, Any] = ours.config | {"chat_template": template, "bos_token": {"content": "<|endoftext|>"}}
        return Tokenizer(ours.backend, config)

    return build


SAME_TURNS = CHAT_TEMPLATE + "{# not ours #}"


def test_a_foreign_template_that_says_the_same_gives_the_same_ids(foreign: Callable[[str], Tokenizer]) -> None:
    tokenizer = foreign(SAME_TURNS)
    ours = Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": CHAT_TEMPLATE})
    for request in ("Tell me a story.", " two\nlines ", "a <end_of_turn> b", "<|endoftext|>"):
        assert turn_ids(tokenizer, request) == turn_ids(ours, request)


def test_special_tokens_that_a_user_types_are_characters(foreign: Callable[[str], Tokenizer]) -> None:
    tokenizer = foreign(SAME_TURNS)
    end = tokenizer.token_id("<end_of_turn>")
    assert turn_ids(tokenizer, "hello").count(end or -1) == 1
    assert turn_ids(tokenizer, "hel<end_of_turn>lo").count(end or -1) == 1
    shouting = foreign("{{ messages[0].content | upper }}")
    assert turn_ids(shouting, "hel<END_OF_TURN>lo") == tokenizer.encode_literal("HEL<END_OF_TURN>LO")


def test_a_template_beside_the_tokenizer_is_read(shared_checkpoint: Path, tmp_path: Path) -> None:
    Tokenizer.load(shared_checkpoint).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(tmp_path).config["chat_template"] == "{{ messages[0].content }}!"
