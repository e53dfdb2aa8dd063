"""The Python interface: loading, several prompts, checks of options, seeds, conversations, errors."""

import copy
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.manifest import Bundle
from slm.export.bundle import ExportOptions, export_bundle
from slm.runtime import shipped

BOLD: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
PROMPTS = ["Once upon a time", "The", "A dog and a cat", "One day", "x"]


@pytest.fixture
def model(shared_bundle: Bundle) -> slm.Model:
    return slm.load(shared_bundle.path, threads=1)


def test_an_error_says_its_hint_wherever_it_is_printed() -> None:
    error = slm.SlmError("no such file: a", "name another")
    assert (str(error), error.message, error.hint) == (
        "no such file: a (hint: name another)",
        "no such file: a",
        "name another",
    )
    assert str(slm.SlmError("no such file: a")) == "no such file: a"
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301  # what was just made
        assert (type(again), again.message, again.hint) == (slm.SlmError, error.message, error.hint)


def test_the_command_line_prints_a_hint_once(slm: Callable[..., Any]) -> None:
    result = slm("generate", "runs/none")
    assert result.code == 1 and result.err.count("hint") == 1


# --- several prompts ---


@pytest.mark.parametrize("kind", ["fused", "portable", "checkpoint", "drafts", "chat"])
@pytest.mark.parametrize("stop", [None, ["e", "and"]])
def test_a_list_answers_with_each_prompt_s_own_text(
    kind: str, stop: Any, shared_bundle: Bundle, shared_checkpoint: Path, tmp_path: Path
) -> None:
    if kind == "portable":
        path = export_bundle(shared_checkpoint, tmp_path / "portable", ExportOptions(target="portable")).path
    else:
        path = shared_checkpoint if kind == "checkpoint" else shared_bundle.path
    model = slm.load(path, threads=1, draft_tokens=4 if kind == "drafts" else None)
    if kind == "chat":
        model.chat()  # whose decoder stands around the model's
    several = model.complete(PROMPTS, seed=3, stop=stop, **BOLD)
    texts = model.generate(PROMPTS, seed=3, stop=stop, **BOLD)
    assert isinstance(texts, list) and texts == [each.text for each in several]
    for number, prompt in enumerate(PROMPTS):
        assert texts[number] == model.generate(prompt, seed=3 + number, stop=stop, **BOLD)
        alone = model.complete(prompt, seed=3 + number, stop=stop, **BOLD)
        assert several[number].seed == alone.seed == 3 + number
        assert (several[number].tokens, several[number].stopped) == (alone.tokens, alone.stopped)
        assert several[number].ttft_ms > 0
    assert len(set(texts)) > 1
    assert texts != model.generate(PROMPTS, seed=4, stop=stop, **BOLD)  # the control


def test_a_list_of_ids_and_an_array_are_prompts_too(model: slm.Model) -> None:
    ids = [model.tokenizer.encode(text) for text in PROMPTS[:2]]
    wanted = model.generate(PROMPTS[:2], seed=1, **BOLD)
    assert model.generate(ids, seed=1, **BOLD) == wanted
    assert model.generate(tuple(PROMPTS[:2]), seed=1, **BOLD) == wanted
    assert model.generate(np.array(ids[0]), seed=1, **BOLD) == wanted[0]
    assert model.generate(np.array([ids[0]]), seed=1, **BOLD) == wanted[:1]  # type: ignore[arg-type]  # rows of an array
    assert model.generate(["The"], seed=1, **BOLD) == [model.generate("The", seed=1, **BOLD)]


def test_a_full_context_ends_each_of_several(model: slm.Model) -> None:
    ends = {token: -np.inf for token in model.stop_token_ids}
    prompts = ["x" * 240, "The"]
    made = model.complete(prompts, max_new_tokens=50, temperature=0, logit_bias=ends)
    assert [each.stopped for each in made] == ["context", "length"]
    assert made[0].text == model.generate(prompts[0], max_new_tokens=50, temperature=0, logit_bias=ends)
    slid = model.complete(prompts, max_new_tokens=50, temperature=0, logit_bias=ends, on_full="slide")
    assert [each.stopped for each in slid] == ["length", "length"] and slid[0].text.startswith(made[0].text)


def test_one_prompt_at_fault_is_named_before_anything_is_read(
    model: slm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.decoder), "run", lambda *_a, **_k: pytest.fail("computed"))
    for prompts, said in (
        (["The", "word " * 500], "prompt 2 of 2: the prompt has"),
        (["The", b"x"], "prompt 2 of 2: the prompt is bytes"),
        ([[1], [999]], "prompt 2 of 2: the prompt has token id 999"),
        ([["a"]], "prompt 1 of 1: the prompt is a list of prompts"),
    ):
        with pytest.raises(slm.SlmError, match=said):
            model.generate(prompts)  # type: ignore[call-overload]  # wrong on purpose


# --- wrong calls ---


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", "did you mean max_new_tokens?"),
        ("max_length", "did you mean max_new_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("topk", "did you mean top_k?"),
        ("stop_sequences", "did you mean stop?"),
        ("do_sample", "temperature=0 is greedy"),
        ("qqqqq", "the arguments are frequency_penalty, keep"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream", "pieces"])
def test_a_wrong_keyword_names_the_right_one(model: slm.Model, method: str, name: str, meant: str) -> None:
    with pytest.raises(TypeError) as caught:
        getattr(model, method)("The", **{name: 1})
    assert isinstance(caught.value, slm.ArgumentError)
    assert caught.value.message == f"{method}() has no argument {name!r}"
    assert caught.value.hint is not None and meant in caught.value.hint


def test_load_and_chat_name_the_right_one_too(model: slm.Model) -> None:
    load: Any = slm.load
    for wrong, meant in (
        ("devise", "device"),
        ("n_threads", "threads"),
        ("draft", "draft_tokens"),
        ("lora", "adapter"),
    ):
        with pytest.raises(
            TypeError, match=f"load\\(\\) has no argument '{wrong}' \\(hint: did you mean {meant}\\?\\)"
        ):
            load("x", **{wrong: 1})
    chat: Any = model.chat
    with pytest.raises(TypeError, match="did you mean system"):
        chat(system_prompt="x")
    with pytest.raises(TypeError, match="did you mean max_new_tokens"):
        model.chat().ask("Hi.", max_tokens=3)  # type: ignore[call-arg]  # wrong on purpose


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "the prompt is None"),
        (b"The", "the prompt is bytes"),
        (7, "the prompt is int 7"),
        ({"a": 1}, "the prompt is a dict"),
        (iter(["The"]), "the prompt is a list_iterator"),
        ([], "the prompt has no tokens"),
        ([1.0], "the prompt is a list with float in it"),
        ([True], "the prompt is a list with bool in it"),
        ([1, "a"], "the prompt is a list with str in it"),
        ([-1], "the prompt has token id -1"),
        ([320], "the prompt has token id 320"),
        (np.array([1.5]), "the prompt is an array of float64"),
        (np.zeros((1, 1, 1), int), "the prompt is an array of int64 with 3 dimensions"),
        ("half \udcff", "surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused(model: slm.Model, prompt: Any, said: str) -> None:
    for method in (model.generate, model.stream, model.pieces):
        with pytest.raises(slm.SlmError, match=said) as caught:
            method(prompt)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": "hot"}, "temperature is str 'hot'; it must be a number"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": float("inf")}, "top_p is inf"),
        ({"top_k": 1.5}, "top_k is float 1.5; it must be a whole number"),
        ({"top_k": True}, "top_k is bool True"),
        ({"seed": 1.5}, "seed is float 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"logit_bias": [1]}, "logit_bias is a list"),
        ({"logit_bias": {"a": 1}}, "a key of logit_bias is str 'a'"),
        ({"logit_bias": {1: "a"}}, "logit_bias of token 1 is str 'a'"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is float 2.0"),
        ({"max_new_tokens": "9"}, "max_new_tokens is str '9'"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"stop": 3}, "stop is int 3"),
        ({"stop": [3]}, "a stop text is int 3"),
        ({"stop": b"x"}, "stop is bytes"),
        ({"keep": 1.5}, "keep is float"),
        ({"logprobs": "3"}, "logprobs is str"),
        ({"on_full": None}, "on_full is None"),
    ],
)
def test_wrong_values_are_refused(model: slm.Model, options: dict[str, Any], said: str) -> None:
    for prompt in ("The", ["The", "A"]):
        with pytest.raises(slm.SlmError, match=said):
            model.generate(prompt, **options)  # type: ignore[call-overload]  # wrong on purpose


def test_values_of_numpy_are_numbers(model: slm.Model) -> None:
    wanted = model.generate("The", temperature=0.5, top_k=5, seed=3, max_new_tokens=8, logit_bias={5: 1.0}, stop=None)
    options: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(5), "seed": np.int32(3)}
    options |= {"max_new_tokens": np.int8(8), "logit_bias": {np.int64(5): np.float64(1)}}
    assert model.generate("The", **options) == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": 3}, "path is int 3; it must be a path"),
        ({"path": b"x"}, "path is bytes b'x'"),
        ({"path": " "}, "path is empty"),
        ({"path": "none"}, "not found: none"),
        ({"device": "gpu"}, "device is 'gpu' .hint: one of 'cpu', 'cuda'"),
        ({"threads": "2"}, "threads is str '2'"),
        ({"threads": 0}, "threads is 0"),
        ({"draft_tokens": 0}, "draft_tokens is 0"),
        ({"adapter": ["a"]}, "adapter is a list"),
    ],
)
def test_load_refuses_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(slm.SlmError, match=said):
        slm.load(**arguments)


def test_ids_of_logits_are_whole_numbers_in_a_rectangle(model: slm.Model) -> None:
    assert model.logits(np.array([[1, 2]], np.int8)).shape == (1, 2, 320)
    wrong: tuple[Any, ...] = ([[1.5, 2]], [[1], [1, 2]], [["a"]], [[]], [1], [[True]])
    for ids in wrong:
        with pytest.raises(ValueError, match="ids must"):
            model.logits(ids)


# --- seeds ---


def test_a_seed_is_drawn_and_can_be_had(model: slm.Model) -> None:
    texts, seeds = [], []
    for _ in range(3):
        result = model.complete("The", **BOLD)
        assert result.seed is not None
        texts.append(result.text)
        seeds.append(result.seed)
    assert len(set(seeds)) == 3 and max(seeds) < 2**32
    assert [model.generate("The", seed=seed, **BOLD) for seed in seeds] == texts
    first, second = (each.seed for each in model.complete(["The", "The"], **BOLD))
    assert first is not None and second == first + 1


def test_greedy_needs_no_seed(model: slm.Model) -> None:
    assert model.generate("The", temperature=0, max_new_tokens=8) == model.generate(
        "The", temperature=0, seed=9, max_new_tokens=8
    )
    assert model.complete("The", temperature=0, seed=9, max_new_tokens=8).seed is None


# --- what is loaded ---


def test_the_newest_is_loaded_when_nothing_is_named(shared_checkpoint: Path, shared_bundle: Bundle) -> None:
    assert slm.load().about == slm.load(shipped.model_path()).about
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    found = slm.load().about
    assert found is not None and found.path == Path("runs/tiny/checkpoint/best")
    assert (found.precision, found.device, found.parameters) == (
        "float32",
        "cpu",
        shared_bundle.config.parameter_count(),
    )
    shutil.copytree(shared_bundle.path, "runs/tiny/onnx")
    found = slm.load().about
    assert found is not None and found.path == Path("runs/tiny/onnx")
    assert slm.load("tiny/onnx").about == found


def test_a_model_shows_what_it_is(model: slm.Model, shared_bundle: Bundle) -> None:
    count = f"{shared_bundle.config.parameter_count():,}"
    assert repr(model) == f"<slm.Model {shared_bundle.path}: {count} parameters, float32, cpu>"
    bare = slm.Model(model.tokenizer, model.decoder, model.stop_token_ids)
    assert repr(bare).startswith("<slm.Model on onnxruntime ")
    assert repr(model.chat()) == f"<slm.Chat of 0 messages with {model!r}>"


def test_every_public_name_is_there_and_explained() -> None:
    import pydoc

    for name in slm.__all__:
        assert name in dir(slm)
        found = getattr(slm, name)
        assert isinstance(found, str) or found.__doc__
    shown = re.sub(r"\(\s+", "(", pydoc.plain(pydoc.render_doc(slm)))  # from Python 3.13 on, an argument a line
    for name in ("load(path", "class Model", "class Chat", "class GenerationOptions", "class SlmError"):
        assert name in shown
    with pytest.raises(AttributeError, match="did you mean load"):
        slm.lod  # type: ignore[attr-defined]  # noqa: B018  # wrong on purpose


# --- one text at a time ---


def test_two_streams_of_one_model_are_not_mixed(model: slm.Model) -> None:
    def begun() -> Any:
        return model.pieces("Once", seed=1, **BOLD)

    wanted = [piece.token for piece in begun()]
    first, second = begun(), begun()
    next(first)
    assert [piece.token for piece in second] == wanted and len(wanted) > 3
    with pytest.raises(slm.SlmError, match="another text was begun"):
        list(first)
    third = begun()
    tokens = [next(third).token]
    model.logits([[1, 2]])  # which is independent of what was read
    model.stream("The")  # which has not begun
    assert tokens + [piece.token for piece in third] == wanted


def test_threads_wait_for_each_other(model: slm.Model) -> None:
    wanted = {prompt: model.generate(prompt, seed=1, **BOLD) for prompt in PROMPTS}
    found: list[tuple[str, str]] = []

    def ask(prompt: str) -> None:
        for _ in range(3):
            found.append((prompt, model.generate(prompt, seed=1, **BOLD)))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 * len(PROMPTS) and all(wanted[prompt] == text for prompt, text in found)


# --- conversations ---


def test_a_chat_answers_and_remembers(model: slm.Model) -> None:
    chat = model.chat(system="Be brief.", seed=4)
    first = chat.ask("Name a colour.", **BOLD)
    second = "".join(chat.stream("Another?", **BOLD)).strip()
    assert first and second
    assert [message["role"] for message in chat.messages] == ["system", *("user", "assistant") * 2]
    assert [message["content"] for message in chat.messages[2::2]] == [first, second]
    again = model.chat(system="Be brief.", seed=4)
    assert [again.ask(request, **BOLD) for request in ("Name a colour.", "Another?")] == [first, second]
    gone_on = model.chat(messages=chat.messages[:3], seed=5)
    assert gone_on.system == "Be brief." and gone_on.ask("Another?", seed=3, **BOLD) != ""
    assert gone_on.messages[:3] == chat.messages[:3]
    assert chat.retry(temperature=0, max_new_tokens=5) == chat.messages[-1]["content"]
    drawn = {model.chat().seed for _ in range(3)}
    assert len(drawn) == 3


def test_a_chat_and_single_texts_do_not_disturb_each_other(model: slm.Model) -> None:
    wanted = model.generate("The", temperature=0, max_new_tokens=8)
    chat, other = model.chat(), model.chat()
    first = chat.ask("Hi.", temperature=0, max_new_tokens=8)
    assert model.generate("The", temperature=0, max_new_tokens=8) == wanted
    assert other.ask("Hi.", temperature=0, max_new_tokens=8) == first
    assert model.generate(["The", "A"], temperature=0, max_new_tokens=8)[0] == wanted
    assert chat.ask("And?", temperature=0, max_new_tokens=8) == other.ask("And?", temperature=0, max_new_tokens=8)


def test_an_answer_that_is_not_read_does_not_stay_in_the_way(model: slm.Model) -> None:
    chat = model.chat(seed=1)  # other answers can be empty, and are then dropped
    chat.stream("Never begun.", **BOLD)
    half = chat.stream("Half.", **BOLD)
    begun = next(half)
    chat.ask("Whole.", **BOLD)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[0]["content"] == "Half." and begun.strip() in chat.messages[1]["content"]
    assert [chat.was_interrupted(message) for message in chat.messages] == [False, True, False, False]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi.", "messages is str 'Hi.'"),
        (["Hi."], "message 1 is not an object"),
        ([{"role": "user"}], "message 1 is not an object with text as 'content'"),
        ([{"role": "human", "content": "a"}], "message 1 has the role 'human'"),
        ([{"role": "assistant", "content": "a"}], "do not take turns"),
        ([{"role": "user", "content": "a"}] * 2, "do not take turns"),
        ([{"role": "user", "content": "a"}], "end with the user's"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "a"}], "a system message comes after"),
    ],
)
def test_what_is_no_conversation_is_refused(model: slm.Model, messages: Any, said: str) -> None:
    with pytest.raises(slm.SlmError, match=said):
        model.chat(messages=messages)
    with pytest.raises(slm.SlmError, match="system is"):
        model.chat(3)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(slm.SlmError, match="the request is"):
        model.chat().ask(None)  # type: ignore[arg-type]  # wrong on purpose
