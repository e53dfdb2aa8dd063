"""Other people's chat templates, rendered so that a bad one costs no more than its own answer.

A template is a program in Jinja that comes with a model. It runs in Jinja's sandbox, which keeps it from Python's insides,
and in a process of its own, which the system stops when it takes too long or too much memory: nothing inside one process
can interrupt a single long call, and Jinja offers many. `python -m slm.core.template` is that process.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from slm.core.errors import SlmError

MAX_TEMPLATE_CHARACTERS = 64 << 10
# Of what it makes; a conversation that long fits into no context.
MAX_TEXT_CHARACTERS = 4 << 20
MAX_SECONDS = 4
# Of address space, of which Python and Jinja take a tenth.
MAX_BYTES = 512 << 20
# Of what a template says when it refuses.
_MAX_REASON = 200
_HINT = "the chat template came with the model; without --instruct it is not used"


class _Refused(Exception):
    """What a template says of a conversation that it does not take."""


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> str:
    """Renders a conversation and the beginning of the model's turn.

    Args:
        template: The template, as transformers understands it.
        messages: What was said: "role" and "content".
        tokens: Special tokens by the names that templates use, such as "bos_token".

    Raises:
        SlmError: When the template is wrong, refuses the conversation or passes a limit.
    """
    (text,) = render_all(template, [(messages, True)], tokens)
    if isinstance(text, SlmError):
        raise text
    return text


def render_all(
    template: str, conversations: Sequence[tuple[Sequence[Mapping[str, Any]], bool]], tokens: Mapping[str, Any]
) -> list[str | SlmError]:
    """Renders several conversations in one process; what the template makes of one costs the others nothing.

    Args:
        template: The template.
        conversations: What was said in each, and whether the model's turn is begun after it.
        tokens: As for `render`.

    Returns:
        A text for each, or why there is none.

    Raises:
        SlmError: When all of them together pass a limit.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise SlmError(
            f"the chat template has {len(template):,} characters, at most {MAX_TEMPLATE_CHARACTERS:,}", _HINT
        )
    asked = [(list(messages), begins) for messages, begins in conversations]
    request = json.dumps({"template": template, "conversations": asked, "tokens": dict(tokens)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=request,
            capture_output=True,
            encoding="utf-8",
            timeout=2 * MAX_SECONDS,  # of the clock; the process itself is bounded in time of the processor
            check=False,
        )
        answers = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise SlmError(f"the chat template failed: it takes longer than {2 * MAX_SECONDS} s", _HINT) from None
    except json.JSONDecodeError:
        raise SlmError(
            f"the chat template failed: it takes more than {MAX_SECONDS} s or too much memory", _HINT
        ) from None
    return [
        answer["text"] if "text" in answer else SlmError(f"the chat template failed: {answer['reason']}", _HINT)
        for answer in answers
    ]


def _rendered(template: Any, messages: Sequence[Mapping[str, Any]], begins: bool, tokens: Mapping[str, Any]) -> str:
    text: str = template.render(messages=messages, add_generation_prompt=begins, tools=None, documents=None, **tokens)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise _Refused(f"it makes a text of more than {MAX_TEXT_CHARACTERS:,} characters")
    return text


def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON as transformers' templates have it, where Jinja would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _main() -> None:
    for what, limit in (
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_AS, MAX_BYTES),
        (resource.RLIMIT_FSIZE, 0),
    ):
        try:
            resource.setrlimit(what, (limit, limit))
        except (ValueError, OSError):  # macOS has no limit of address space
            continue
    request = json.loads(sys.stdin.buffer.read())
    compiled: Any = None
    answers = []
    for messages, begins in request["conversations"]:
        try:
            compiled = compiled or _compiled(request["template"])
            answers.append({"text": _rendered(compiled, messages, begins, request["tokens"])})
        except Exception as error:  # a template can provoke any
            reason = " ".join(str(error).split()) or type(error).__name__
            answers.append({"reason": reason[:_MAX_REASON]})
    sys.stdout.buffer.write(json.dumps(answers).encode())


if __name__ == "__main__":
    _main()
