"""A model's replies to a task: the same alone and together, from every backend, with the likelihoods of a plain reference."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.progress import Silent
from slm.core.task import MetricName, Question, TaskRow
from slm.core.tools import Call, Style
from slm.runtime.model import Model
from slm.runtime.task import likelihoods, measure_task, shared_beginning

# Sums of float32 log-probabilities in steps of other lengths.
SAME = 1e-4
TEXTS = (
    "Once upon a time",
    "The fox",
    "One day a bear",
    "It rained",
    "Tom and Mia",
    "A big red ball",
    "She",
    "He said",
)


@pytest.fixture(scope="session")
def checkpoint(shared_checkpoint: Path) -> Model:
    return slm.load(shared_checkpoint)


@pytest.fixture(scope="session")
def bundle(shared_bundle: Bundle) -> Model:
    return slm.load(shared_bundle.path)


def asked(model: Model, expected: Sequence[str], texts: Sequence[str] = TEXTS) -> list[Question]:
    return [
        Question(TaskRow(text, reply, f"row {i}"), tuple(model.tokenizer.encode(text)), (5,) * 10)
        for i, (text, reply) in enumerate(zip(texts, expected, strict=False))
    ]


def own_replies(model: Model, tokens: int) -> list[str]:
    return [model.generate(text, temperature=0, max_new_tokens=tokens) for text in TEXTS]


def test_its_own_greedy_texts_score_1_and_others_0(bundle: Model) -> None:
    replies = own_replies(bundle, 20)
    measured = measure_task(bundle, asked(bundle, replies), "exact", Silent(), max_tokens=20)
    assert measured.scores == [1.0] * 8 and measured.others == {"squad_exact": 1.0} and measured.batch == 8
    assert [answer.reply for answer in measured.answers] == [reply.strip() for reply in replies]
    assert measured.worst(3) == [] and measured.interval.low > 0.6 and measured.interval.high == 1.0
    assert measured.tokens == sum(answer.tokens for answer in measured.answers) > 20 and measured.seconds > 0
    # Negative control: the replies of other rows.
    other = measure_task(bundle, asked(bundle, replies[1:] + replies[:1]), "exact", Silent(), max_tokens=20)
    assert other.score < 0.5 and len(other.worst(3)) == 3 and other.worst(3)[0].score == 0.0


def test_rows_together_and_alone_and_in_pytorch_have_the_same_scores(bundle: Model, checkpoint: Model) -> None:
    questions = asked(bundle, own_replies(bundle, 12))
    together, alone, again = (
        measure_task(bundle, questions, "rouge", Silent(), max_tokens=16, batch=batch) for batch in (3, 1, 3)
    )
    assert (together.batch, alone.batch) == (3, 1)
    assert [a.reply for a in together.answers] == [a.reply for a in alone.answers] == [a.reply for a in again.answers]
    assert together.interval == again.interval and together.scores == again.scores
    torch = measure_task(checkpoint, questions, "rouge", Silent(), max_tokens=16)
    assert torch.batch == 1 and torch.scores == together.scores


@pytest.mark.parametrize("backend", ["bundle", "checkpoint"])
@pytest.mark.parametrize("metric", ["rouge", "choice"])
def test_what_all_requests_begin_with_is_read_once(
    backend: str, metric: MetricName, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(backend)
    shared = tuple(map(int, np.random.default_rng(2).integers(4, 320, 80)))
    questions = [
        replace(
            each,
            ids=(*shared, *each.ids),
            row=replace(each.row, choices=(each.row.expected, "no")),
            choices=((5, 6, 7), (8,)),
        )
        for each in asked(model, own_replies(model, 12))
    ]
    read: list[int] = []
    steps = {"bundle": (type(model.decoder), "run"), "checkpoint": (type(model.decoder), "_step")}
    owner, name = steps[backend]
    plain = getattr(owner, name)

    def counted(self: Any, ids: Any, *rest: Any, **more: Any) -> Any:
        read.append(np.asarray(ids).size)
        return plain(self, ids, *rest, **more)

    monkeypatch.setattr(owner, name, counted)
    once = measure_task(model, questions, metric, Silent(), max_tokens=16)
    tokens_once = sum(read)
    read.clear()
    monkeypatch.setattr("slm.runtime.task._LEAST_SHARED", 1000)
    each = measure_task(model, questions, metric, Silent(), max_tokens=16)
    assert [a.reply for a in once.answers] == [a.reply for a in each.answers] and once.scores == each.scores
    assert sum(read) - tokens_once == 7 * 81  # with the token that begins a text


def test_the_shared_beginning() -> None:
    long = list(range(100))
    assert shared_beginning([long, [*long[:80], 7]]) == long[:80]
    assert shared_beginning([long, long]) == long[:99]  # one token is left to read
    assert shared_beginning([long, long[:65]]) == long[:64] and shared_beginning([long, long[:64]]) == []
    assert shared_beginning([long]) == [] == shared_beginning([])


def test_the_default_limit_of_new_tokens(bundle: Model) -> None:
    questions = asked(bundle, [""], TEXTS[:1])
    for length, limit in ((1, 32), (16, 32), (17, 34), (5000, 1024)):
        long = [replace(questions[0], reply=(5,) * length)]
        assert measure_task(bundle, long, "exact", Silent()).max_tokens == limit


def test_a_request_that_fills_the_context_scores_0(bundle: Model) -> None:
    questions = asked(bundle, own_replies(bundle, 5), TEXTS[:2])
    longest = bundle.decoder.context
    questions[0] = replace(questions[0], ids=(7,) * longest)
    measured = measure_task(bundle, questions, "json", Silent(), max_tokens=5)
    first = measured.answers[0]
    assert (first.score, first.reply, first.stopped, measured.too_long) == (0.0, "", "error", 1)
    assert set(first.scores) == {"score", "valid", "fields_f1"}
    questions[0] = replace(questions[0], ids=(7,) * (longest - 1))  # negative control: one token fits
    found = measure_task(bundle, questions, "json", Silent(), max_tokens=5)
    assert found.too_long == 0 and found.answers[0].stopped == "context" and found.cut == 2


def test_a_reply_ends_with_its_turn_and_with_the_text(bundle: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model's configuration does not list the end of a turn."""
    ids = bundle.complete(TEXTS[0], temperature=0, max_new_tokens=6).tokens
    monkeypatch.setattr(bundle, "stop_token_ids", (319,))
    questions = asked(bundle, [""], TEXTS[:1])
    plain = measure_task(bundle, questions, "exact", Silent(), max_tokens=6).answers[0]
    assert plain.tokens == 6 and plain.stopped == "length"
    for token in ("<end_of_turn>", "<|endoftext|>"):
        monkeypatch.setattr(bundle.tokenizer, "token_id", lambda text, token=token: ids[2] if text == token else None)
        ended = measure_task(bundle, questions, "exact", Silent(), max_tokens=6).answers[0]
        assert ended.stopped == "end" and ended.tokens == ids.index(ids[2])


def test_marks_of_calls_may_be_special_tokens(bundle: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text leaves special tokens out; the calls of a reply are read with them."""
    written = '<|endoftext|>{"name": "a", "arguments": {}}<pad>'
    ids = bundle.tokenizer.backend.encode(written).ids[1:]
    style = Style("<|endoftext|>", "<pad>")
    assert "<pad>" not in bundle.tokenizer.decode(ids)
    question = Question(TaskRow("", "", "row 1", calls=(Call("a", {}),)), (5, 6), (5,), style=style)
    generated = iter(ids)

    class Speaking:
        context, vocab_size = 256, 320

        def reset(self) -> None: ...

        def read(self, _: Sequence[int]) -> Any:
            return np.eye(320, dtype=np.float32)[next(generated, 2)]

    monkeypatch.setattr(bundle, "decoder", Speaking())
    monkeypatch.setattr(bundle, "stop_token_ids", (2,))
    monkeypatch.setattr("slm.runtime.answers.end_of_text", lambda *_: None)
    measured = measure_task(bundle, [question], "tool-call", Silent())
    assert measured.answers[0].reply == written and measured.score == 1.0
    assert measured.others == {"names": 1.0, "valid": 1.0}


@pytest.mark.parametrize("backend", ["bundle", "checkpoint"])
def test_likelihoods_are_those_of_whole_rows(backend: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(backend)
    random = np.random.default_rng(1)
    choices = tuple(tuple(map(int, random.integers(4, 320, size))) for size in (1, 2, 15, 16, 17, 40))
    question = Question(TaskRow("", "", ""), tuple(map(int, random.integers(4, 320, 40))), (), choices)
    found = likelihoods(model.decoder, question)
    for choice, value in zip(choices, found, strict=True):
        ids = [*question.ids, *choice]
        logits = model.logits([ids])[0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = sum(logits[i - 1, ids[i]] for i in range(40, len(ids)))
        assert value == pytest.approx(wanted, rel=SAME)


def test_the_most_likely_choice(bundle: Model, checkpoint: Model) -> None:
    prompt = tuple(bundle.tokenizer.encode(TEXTS[0]))
    likely = int(bundle.logits([prompt])[0, -1].argmax())
    unlikely = int(bundle.logits([prompt])[0, -1].argmin())
    for choices in ((likely, unlikely), (unlikely, likely)):
        names = tuple("right" if each == likely else "wrong" for each in choices)
        row = TaskRow("", "right", "row 1", names)
        question = Question(row, prompt, (), tuple((each,) for each in choices))
        for model in (bundle, checkpoint):
            measured = measure_task(model, [question], "choice", Silent())
            assert measured.scores == [1.0] and measured.others == {"per_byte": 1.0}
            assert measured.answers[0].reply == "right" and measured.answers[0].stopped is None
        wrong = replace(question, row=replace(row, expected="wrong"))
        assert measure_task(bundle, [wrong], "choice", Silent()).score == 0.0
    too_long = replace(question, choices=((4,) * 250, (5,)))
    assert measure_task(bundle, [too_long], "choice", Silent()).too_long == 1


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_a_token_that_the_model_lacks_names_the_row(bundle: Model, metric: MetricName) -> None:
    question = Question(TaskRow("", "a", "rows.jsonl, line 7", ("a", "b")), (1, 320), (1,), ((4,), (5,)))
    with pytest.raises(SlmError, match=r"line 7: .*320"):
        measure_task(bundle, [question], metric, Silent())


def test_progress_counts_rows_and_shows_the_score(bundle: Model) -> None:
    class Shown(Silent):
        def __init__(self) -> None:
            self.events: list[Any] = []

        def start(self, name: str, total: int | None, unit: str) -> None:
            self.events.append((name, total, unit))

        def advance(self, amount: int = 1, **fields: str) -> None:
            self.events.append((amount, fields))

    shown = Shown()
    measure_task(bundle, asked(bundle, own_replies(bundle, 4)), "exact", shown, max_tokens=4)
    assert shown.events == [("answering", 8, "rows"), *[(1, {"score": "100.0%"})] * 8]


def test_differences_are_paired(bundle: Model) -> None:
    replies = own_replies(bundle, 8)
    right = measure_task(bundle, asked(bundle, replies), "exact", Silent(), max_tokens=8)
    worse = measure_task(bundle, asked(bundle, replies[:1] + ["no"] * 7), "exact", Silent(), max_tokens=8)
    between = worse.difference(right)
    assert worse.score - right.score == -0.875 and -1.0 <= between.low < -0.875 and between.high < 0.0
    assert right.difference(right).holds(0.0)
