"""Rows as a task: requests, expected replies and choices, the metric that fits them, and the ids that a model reads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slm.core.chat import Message, chat_ids
from slm.core.checkpoint import read_config
from slm.core.errors import SlmError
from slm.core.metrics.scoring import reply_scores
from slm.core.task import MetricName
from slm.core.tokenizer import Tokenizer
from slm.core.tools import FUNCTION_GEMMA, GEMMA_4, JSON_STYLE, Call, Style, written
from slm.finetune.examples import Renderer
from slm.finetune.rows import Limits
from slm.finetune.task import questions, read_task
from tests.core.tool_chat_templates import ANSWER_ENDS, NATIVE, tool_tokenizer

WriteRows = Callable[..., Path]

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": " red "},
    ]
}


@pytest.fixture
def renderer(shared_checkpoint: Path) -> Renderer:
    return Renderer(Tokenizer.load(shared_checkpoint), read_config(shared_checkpoint))


def pair(completion: str, prompt: str = "Q:", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion} | more


def test_requests_and_replies_of_every_kind_of_row(write_rows: WriteRows) -> None:
    rows = [CHAT, pair(" blue"), {"instruction": "Add.", "input": "1 2", "output": "3"}]
    file = read_task(write_rows(rows))
    assert [(row.prompt, row.expected) for row in file.task.rows] == [
        ("Name a colour.", "red"),
        ("Q:", "blue"),
        ("Add.\n\n1 2", "3"),
    ]
    assert file.task.rows[1].place.endswith("rows.jsonl, line 2") and file.total == 3


def test_the_ids_are_those_of_training_and_of_chats(write_rows: WriteRows, renderer: Renderer) -> None:
    file = read_task(write_rows([CHAT, pair(" blue")]))
    chat, plain = questions(file, renderer)
    tokenizer = renderer.tokenizer
    assert list(chat.ids) == chat_ids(tokenizer, CHAT["messages"][:-1], renderer.ends)  # type: ignore[arg-type]
    assert list(plain.ids) == tokenizer.encode("Q:")
    for question, row in zip((chat, plain), file.rows, strict=True):
        example = renderer.example(row)
        assert question.ids == example.ids[: example.spans[-1][0]]
        assert example.ids[len(question.ids) :][: len(question.reply)] == question.reply
    # The end of the turn ends the reply; training also learns end-of-text after it.
    assert tokenizer.decode(chat.reply) == "red" and chat.reply[-1] == tokenizer.token_id("<end_of_turn>")
    assert tokenizer.decode(plain.reply) == " blue" and plain.reply[-1] == renderer.end_of_text


@pytest.mark.parametrize(
    ("rows", "metric", "why"),
    [
        ([pair("yes"), pair("no")], "exact", "the median reply has 1 word"),
        ([pair("It is on the table near the door."), pair("no")], "f1", "the median reply has 4.5 words"),
        ([pair("word " * 21)], "rouge", "the median reply has 21 words"),
        ([pair('{"a": 1}'), pair("[]")], "json", "all replies are JSON"),
        ([pair('{"a": 1}'), pair("no")], "exact", "the median reply has 1.5 words"),
        ([pair("3"), pair("true")], "exact", "the median reply has 1 word"),  # JSON, but no structure
        ([pair("yes", choices=["yes", "no"])], "choice", "rows have choices"),
    ],
)
def test_the_default_metric(write_rows: WriteRows, rows: list[Any], metric: str, why: str) -> None:
    task = read_task(write_rows(rows)).task
    assert (task.metric, task.why) == (metric, why)
    chosen = read_task(write_rows(rows), "f1").task
    assert (chosen.metric, chosen.why) == ("f1", "")


TOOL = {
    "type": "function",
    "function": {"name": "set_light", "parameters": {"properties": {"on": {"type": "boolean"}}}},
}
CALL = {"function": {"name": "set_light", "arguments": '{"on": true}'}}


def calling(*after: dict[str, Any], text: str = "") -> dict[str, Any]:
    asked = [{"role": "user", "content": "Light!"}, {"role": "assistant", "content": text, "tool_calls": [CALL]}]
    return {"tools": [TOOL], "messages": [*asked, *after]}


def test_a_conversation_with_tools_is_measured_at_its_last_call(write_rows: WriteRows, renderer: Renderer) -> None:
    result, done = {"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."}
    refused = {
        "tools": [TOOL],
        "messages": [{"role": "user", "content": "Sing!"}, {"role": "assistant", "content": "I cannot."}],
    }
    path = write_rows([calling(), calling(result, done), refused])
    file = read_task(path)
    assert (file.task.metric, file.task.why) == ("tool-call", "replies call tools")
    expected = Call("set_light", {"on": True})
    assert [row.calls for row in file.task.rows] == [(expected,), (expected,), ()]
    assert [row.prompt for row in file.task.rows] == ["Light!", "Light!", "Sing!"]
    assert file.task.rows[0].expected == written([expected])
    first, second, _ = questions(file, renderer)
    assert first.ids == second.ids and first.style == JSON_STYLE
    messages: list[Message] = [{"role": "user", "content": "Light!"}]
    assert list(first.ids) == chat_ids(renderer.tokenizer, messages, renderer.ends, file.rows[0].tools)  # type: ignore[union-attr]
    assert list(first.ids) != chat_ids(renderer.tokenizer, messages, renderer.ends)  # negative control: without tools
    assert reply_scores("tool-call", first.row, renderer.tokenizer.decode(first.reply))["score"] == 1
    # Another metric measures the last answer, whatever it is.
    texts = read_task(path, "exact").task.rows
    assert [row.expected for row in texts] == [written([expected]), "Done.", "I cannot."]


def test_a_call_that_is_only_read_is_not_measured(write_rows: WriteRows) -> None:
    row = calling({"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."})
    row["messages"][1]["weight"] = 0
    file = read_task(write_rows([row, calling()]), "tool-call")
    assert (file.task.rows[0].expected, file.task.rows[0].calls) == ("Done.", ())


@pytest.mark.parametrize(
    ("name", "style"), [("functiongemma", FUNCTION_GEMMA), ("gemma 4", GEMMA_4), ("qwen", JSON_STYLE)]
)
def test_a_reply_is_read_in_the_format_of_the_models_own_template(
    write_rows: WriteRows, name: str, style: Style
) -> None:
    tokenizer = tool_tokenizer(NATIVE[name])
    ends = tuple(i for token in ANSWER_ENDS if (i := tokenizer.token_id(token)) is not None)
    own = Renderer(tokenizer, Stops(ends))
    (question,) = questions(read_task(write_rows([calling()])), own)
    assert question.style == style
    spelled = tokenizer.backend.decode(question.reply[:-1], skip_special_tokens=False)
    assert reply_scores("tool-call", question.row, spelled, style)["score"] == 1.0
    wrong = spelled.replace("true", "false")  # negative control
    assert reply_scores("tool-call", question.row, wrong, style) == {"score": 0.0, "names": 1.0, "valid": 1.0}


def test_calls_in_plain_rows(write_rows: WriteRows) -> None:
    call = Call("set_light", {"on": True})
    file = read_task(write_rows([pair(" " + written([call])), pair("no")]))
    assert file.task.metric == "tool-call" and [row.calls for row in file.task.rows] == [(call,), ()]


def test_choices_in_tokens(write_rows: WriteRows, renderer: Renderer) -> None:
    options = ["yes", "no", "not at all"]
    chat = {"messages": [*CHAT["messages"][:-1], {"role": "assistant", "content": "no"}], "choices": options}
    plain, turns = questions(read_task(write_rows([pair(" yes", choices=options), chat])), renderer)
    for question, before, end in ((plain, " ", renderer.end_of_text), (turns, "", 2)):
        assert [renderer.tokenizer.decode(ids) for ids in question.choices] == [before + each for each in options]
        assert all(ids[-1] == end for ids in question.choices)
        assert question.reply == question.choices[options.index(question.row.expected)]


def test_the_replies_of_all_rows_are_the_choices_without_a_column(write_rows: WriteRows) -> None:
    rows = [pair(each) for each in ("b", "a", "b", "c")]
    task = read_task(write_rows(rows), "choice", limit=1).task
    assert [row.choices for row in task.rows] == [("a", "b", "c")]


def test_choices_in_a_table(tmp_path: Path) -> None:
    Path("rows.csv").write_text('prompt,completion,choices\nQ,yes,"[""yes"", ""no""]"\n')
    assert read_task(Path("rows.csv")).task.rows[0].choices == ("yes", "no")


def test_a_limit_takes_rows_that_are_evenly_spread(write_rows: WriteRows) -> None:
    path = write_rows([pair(str(i)) for i in range(10)])
    file = read_task(path, limit=4)
    assert [row.expected for row in file.task.rows] == ["0", "2", "5", "7"] and file.total == 10
    assert [row.completion for row in file.rows] == ["0", "2", "5", "7"]  # type: ignore[union-attr]
    assert len(read_task(path, limit=99).task.rows) == 10


@pytest.mark.parametrize(
    ("row", "metric", "said"),
    [
        ({"text": "only text"}, None, "a row of text has no request and no reply"),
        (pair("x", " "), None, "the prompt is empty"),
        (pair("not json"), "json", "the expected reply is not JSON"),
        (pair('{"a": NaN}'), "json", "the expected reply is not JSON: NaN is not JSON"),
        (pair("maybe", choices=["yes", "no"]), None, "the expected reply 'maybe' is not among the choices"),
        (pair("yes", choices="yes or no"), None, "'choices' is missing or is not an array of texts"),
        (pair("yes", choices=["yes", 2]), None, "'choices' is missing or is not an array of texts"),
        (pair("yes", choices=["yes", " "]), None, "'choices' is missing or is not an array of texts"),
        (pair("yes", choices=["yes", "yes"]), None, "2 texts, 1 of them different"),
        (pair("yes", choices=["yes"]), None, "1 texts, 1 of them different"),
        (pair("yes", choices=["yes", "\ud800"]), None, "half of a surrogate pair"),
        (pair("yes"), "choice", "rows have no 'choices'"),
        (pair("yes"), "tool-call", "calls a tool"),
    ],
)
def test_rows_that_are_refused(write_rows: WriteRows, row: Any, metric: MetricName | None, said: str) -> None:
    with pytest.raises(SlmError) as error:
        read_task(write_rows([row]), metric)
    assert said in error.value.message and error.value.hint
    if metric not in ("choice", "tool-call"):
        assert "rows.jsonl, line 1: " in error.value.message


def test_one_row_without_choices_among_others_is_refused(write_rows: WriteRows) -> None:
    with pytest.raises(SlmError, match="line 2: 'choices' is missing"):
        read_task(write_rows([pair("yes", choices=["yes", "no"]), pair("no")]))


def test_choices_count_in_the_limit_of_memory(write_rows: WriteRows) -> None:
    path = write_rows([pair("yes", choices=["yes", "no" * 5000])])
    with pytest.raises(SlmError, match="the rows take more than"):
        read_task(path, limits=Limits(data=5000))
    read_task(write_rows([pair("yes", choices=["yes", "no"])]), limits=Limits(data=5000))


def test_a_template_that_rejects_a_row_names_it(write_rows: WriteRows, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    refusing = "{{ raise_exception('no turns today') }}"
    config = json.loads(json.dumps(tokenizer.config)) | {"chat_template": refusing}
    own = Renderer(Tokenizer(tokenizer.backend, config), Stops(sorted(renderer.ends)))
    with pytest.raises(SlmError, match=r"rows.jsonl, line 1: .*no turns today"):
        questions(read_task(write_rows([CHAT])), own)


class Stops:
    """A model of which only the stop tokens are known."""

    def __init__(self, stop_token_ids: Sequence[int]) -> None:
        self.stop_token_ids = stop_token_ids
