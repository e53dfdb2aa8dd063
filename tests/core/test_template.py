"""Chat templates of other people's models: rendered as transformers does, and refused when they would cost too much."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from slm.core import template
from slm.core.chat import CHAT_TEMPLATE, turn_ids
from slm.core.errors import SlmError
from slm.core.template import render
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
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
{{ m.content }}{{ '<end>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- generation -%} {% set x = 1 %}{{ x }}{%- endgeneration -%}{{ x }}
{%- for m in messages %}{% generation %}{% endgeneration %}{% break %}{% endfor %}""",
    "what is defined": """{{ tools is none }}{{ documents is none }}{{ date_string is defined }}
{{- add_generation_prompt }}{{ eos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string | length }}
{{- {'b': '<é>', 'a': [1]} | tojson(indent=1, sort_keys=true, separators=(',', ' : ')) }}{{ 'é' | tojson(ensure_ascii=true) }}
{%- set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(a=1) }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages[0].content.split(' ')[-1].strip('.').startswith('b') }}{{ messages[::-1][0]['role'] }}{{ 'a' in 'abc' }}""",
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


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> float:
    """A limit of processor time, in seconds, that is reached sooner than the one of the product."""
    monkeypatch.setattr(template, "MAX_SECONDS", 0.5)
    return 0.5


@pytest.mark.parametrize("name", BAD)
def test_what_would_cost_too_much_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(SlmError, match="chat template") as caught:
        render(BAD[name], CONVERSATION, {})
    assert time.monotonic() - started < template._MAX_WAIT_SECONDS + 2
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


def pid_of(process: Any) -> int:
    pid: int = process._process.pid
    return pid


HELLO = [{"role": "user", "content": "hello"}]
ECHO = "{{ messages[0].content }}"


def test_one_process_renders_everything_and_is_replaced_when_it_is_stopped() -> None:
    assert render(ECHO, HELLO, {}) == "hello"
    (first,) = template._PROCESSES._all
    for number in range(20):
        assert render(ECHO + str(number), HELLO, {}) == f"hello{number}"
    assert template._PROCESSES._all == {first}
    with pytest.raises(SlmError, match="failed: 'nothing'"):  # which costs it nothing
        render("{{ nothing.at.all }}", HELLO, {})
    assert template._PROCESSES._all == {first}
    os.kill(pid_of(first), signal.SIGKILL)
    first._process.wait()
    assert render(ECHO, HELLO, {}) == "hello"
    (second,) = template._PROCESSES._all
    assert second is not first


def test_rendering_an_ordinary_chat_takes_about_a_millisecond() -> None:
    render(SAME_TURNS, HELLO, {})
    times = []
    for _ in range(100):
        started = time.perf_counter()
        render(SAME_TURNS, HELLO, {})
        times.append(time.perf_counter() - started)
    assert sorted(times)[20] < 0.005  # measured 0.0003 on an idle machine; starting a process takes 0.08 and more


SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_the_limit_of_the_product_is_kept() -> None:
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(SlmError, match="it takes "):
        render(SLOW, HELLO, {})
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used < template.MAX_SECONDS + 1


def test_a_slow_template_does_not_hold_others_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 1)
    with ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(render, SLOW, HELLO, {}) for _ in range(2)]
        time.sleep(0.3)
        quick = [threads.submit(render, ECHO, [{"role": "user", "content": str(i)}], {}) for i in range(40)]
        assert [each.result() for each in quick] == [str(i) for i in range(40)]
        assert not any(each.done() for each in slow)
        for each in slow:
            with pytest.raises(SlmError, match="it takes "):
                each.result()
    assert len(template._PROCESSES._all) <= 1


def test_time_counts_for_each_conversation_alone(limit: float) -> None:
    """The process has used more than the limit by the end."""
    third = "{% for a in range(99999) %}{% if loop.index0 < n %}{% for b in range(99999) %}{% endfor %}{% endif %}{% endfor %}x"
    loops = next(n for n in (5, 10, 20, 50, 100, 200, 400, 800) if _seconds(f"{{% set n = {n} %}}{third}") > 0.12)
    found = template.render_all(f"{{% set n = {loops} %}}{third}", [(HELLO, True, None)] * 7, {})
    assert found == ["x"] * 7


def _seconds(source: str) -> float:
    started = time.monotonic()
    render(source, HELLO, {})
    return time.monotonic() - started


def test_a_long_text_is_refused_and_a_long_conversation_is_not() -> None:
    long = [{"role": "user", "content": "é" * 1_000_000}]
    assert render(ECHO, long, {}) == "é" * 1_000_000
    with pytest.raises(SlmError, match="more than 4,194,304 characters"):
        render(ECHO * 5, long, {})


def test_a_process_that_took_much_memory_is_replaced() -> None:
    render(ECHO, HELLO, {})
    (first,) = template._PROCESSES._all
    assert render("{{ (('x' * 220000000) | length) }}", HELLO, {}) == "220000000"
    assert first not in template._PROCESSES._all


def test_nothing_of_one_conversation_reaches_another() -> None:
    keeps = "{% macro m(x=[]) %}{{ x.append(messages[0].content) }}{{ x }}{% endmacro %}{{ m() }}"
    with pytest.raises(SlmError):
        render(keeps, [{"role": "user", "content": "secret"}], {})
    for source in (
        "{% set ns = namespace() %}{{ ns.x }}{% set ns.x = messages[0].content %}",
        "{{ x }}{% set x = messages[0].content %}",
    ):
        assert render(source, [{"role": "user", "content": "secret"}], {}) == ""
        assert render(source, HELLO, {}) == ""


def test_the_process_ends_with_its_parent_and_leaves_nothing_open() -> None:
    """Killed, the parent tidies nothing up; nor does a fork of it, which keeps its own copies of what is open."""
    program = (
        "import os, sys, time; from slm.core import template; render = template.render\n"
        "def hello(): return render('{{ messages[0].content }}', [{'role': 'user', 'content': 'hello'}], {})\n"
        "hello(); (process,) = template._PROCESSES._all; mine = process._process.pid\n"
        "if not os.fork():\n"
        "    assert hello() == 'hello' and process not in template._PROCESSES._all\n"
        "    print('forked', flush=True); time.sleep(60); os._exit(0)\n"
        "assert hello() == 'hello' and template._PROCESSES._all == {process}\n"
        "print(mine, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = (int(each) for each in said - {"forked"})
        assert "forked" in said and Path(f"/proc/{pid}").exists()
        parent.kill()
        until = time.monotonic() + 10
        while _runs(pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert not _runs(pid)
        os.killpg(parent.pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_no_files_stay_open() -> None:
    render(ECHO, HELLO, {})
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        (process,) = template._PROCESSES._all
        os.kill(pid_of(process), signal.SIGKILL)
        process._process.wait()
        render(ECHO, HELLO, {})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_it_is_not_started_until_a_template_is_rendered() -> None:
    program = "import slm.core.chat, slm.core.template as t, slm.runtime.chat; print(len(t._PROCESSES._all))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n" and done.stderr == ""


def test_a_template_beside_the_tokenizer_is_read(shared_checkpoint: Path, tmp_path: Path) -> None:
    Tokenizer.load(shared_checkpoint).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(tmp_path).config["chat_template"] == "{{ messages[0].content }}!"


@pytest.mark.parametrize(
    "template",
    [
        "{% set n = namespace() %}{% set n.__class__ = 3 %}x",
        "{{ namespace(__init__=1) }}",
        "{{ namespace({'_x': 1})._x }}",
        "{{ dict.__mro__[0] }}",
        "{{ (dict | attr('__subclasses__'))() }}",
    ],
)
def test_names_of_python_internals_cannot_be_set_or_read(template: str) -> None:
    with pytest.raises(SlmError, match="the chat template failed"):
        render(template, [], {})


def test_namespaces_and_objects_are_those_of_transformers() -> None:
    template = (
        "{% set n = namespace({'a': 1}, self=2) %}{% set n.a = n.a + n.self %}{{ n.a }}"
        "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['b'], 2) | tojson }}"
    )
    assert render(template, [], {}) == '3{"a": 1}{"b": 2}'
