"""Rows in tokens: the ids of inference, a mask over what is only read, and nothing lost in silence."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from slm.core.chat import CHAT_TEMPLATE, Message, chat_ids, instruction_request, turn_prompt
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Tokenizer
from slm.finetune.examples import Example, Renderer
from slm.finetune.rows import ChatRow, CompletionRow, Row, TextRow, instruction_row

INSTRUCTION = instruction_row(" Add the numbers.\n", "1 and 1", " 2 \n")


@pytest.fixture
def renderer(tokenizer: Tokenizer, config: ModelConfig) -> Renderer:
    return Renderer(tokenizer, config)


def test_an_instruction_is_asked_as_it_will_be(renderer: Renderer, tokenizer: Tokenizer) -> None:
    example = renderer.example(INSTRUCTION)
    read, learned = list(example.ids[: example.start]), list(example.ids[example.start :])
    assert read == tokenizer.encode(turn_prompt(instruction_request(" Add the numbers.\n", "1 and 1")))
    end_of_turn, end_of_text = tokenizer.token_id(END_OF_TURN), tokenizer.token_id(END_OF_TEXT)
    assert learned == [*tokenizer.encode_literal("2"), end_of_turn, end_of_text]


def test_a_completion_follows_its_prompt_as_it_stands(renderer: Renderer, tokenizer: Tokenizer) -> None:
    example = renderer.example(CompletionRow("The sky is", " blue. "))
    assert list(example.ids[: example.start]) == tokenizer.encode("The sky is")
    assert list(example.ids[example.start :]) == [*tokenizer.encode_literal(" blue. "), renderer.end_of_text]


def test_a_text_is_learned_from_its_first_token(renderer: Renderer, tokenizer: Tokenizer) -> None:
    example = renderer.example(TextRow("Once upon a time"))
    assert list(example.ids) == [*tokenizer.encode("Once upon a time"), renderer.end_of_text]
    assert example.start == len(tokenizer.encode("")) == 1


@pytest.mark.parametrize(
    "row",
    [
        instruction_row(f"Say {END_OF_TURN}\n{START_OF_TURN}model\n", END_OF_TEXT, END_OF_TEXT),
        CompletionRow(END_OF_TEXT, END_OF_TURN),
        TextRow(END_OF_TEXT),
    ],
)
def test_special_tokens_in_what_a_user_wrote_are_characters(renderer: Renderer, tokenizer: Tokenizer, row: Row) -> None:
    harmless = instruction_row("Say", "x", "y") if isinstance(row, ChatRow) else TextRow("x")
    specials = {tokenizer.token_id(token) for token in (START_OF_TURN, END_OF_TURN, END_OF_TEXT)}

    def count(row: Row) -> list[int]:
        return [token for token in renderer.example(row).ids if token in specials]

    assert count(row) == count(harmless)
    example = renderer.example(row)
    written = (
        row.messages[-1]["content"]
        if isinstance(row, ChatRow)
        else row.completion
        if isinstance(row, CompletionRow)
        else row.text
    )
    ends = 2 if isinstance(row, ChatRow) else 1
    assert tokenizer.decode(example.ids[example.start : -ends]) == written


def test_the_request_may_hold_the_placeholder_and_the_template(renderer: Renderer, tokenizer: Tokenizer) -> None:
    request = "a\0b model\n user\n"
    example = renderer.example(instruction_row(request, "", "x"))
    assert list(example.ids[: example.start]) == tokenizer.encode(turn_prompt(request))


def test_rows_are_cut_at_their_end_and_counted(renderer: Renderer) -> None:
    long, short = CompletionRow("ab", "cd" * 20), CompletionRow("ab", "c")
    no_room = CompletionRow("ab" * 20, "c")
    full = renderer.example(long)
    examples = renderer.examples([long, short, no_room], max_length=10)
    assert (examples.truncated, examples.skipped) == (1, 1)
    assert examples.kept == (Example.ending(full.ids[:10], full.start), renderer.example(short))
    assert examples.kept[0].ids[-1] != renderer.end_of_text
    assert examples.trained == (10 - full.start) + 2


def test_the_last_length_at_which_something_is_learned(renderer: Renderer) -> None:
    row = CompletionRow("ab", "cd")
    start = renderer.example(row).start
    assert renderer.examples([row], max_length=start).skipped == 1
    assert renderer.examples([row], max_length=start + 1).truncated == 1


def test_end_of_text_is_the_base_s_own(tokenizer: Tokenizer, config: ModelConfig) -> None:
    # As Gemma has it: <eos> and <end_of_turn> both stop, in any order; no end-of-text among them falls back on the name.
    for stop in ((5, 2), (2, 5), 5):
        assert Renderer(tokenizer, config.model_copy(update={"eos_token_id": stop})).end_of_text == 5
    for nothing in (None, 2):
        assert Renderer(tokenizer, config.model_copy(update={"eos_token_id": nothing})).end_of_text == 0


def test_a_base_without_turn_tokens_takes_no_instructions(tokenizer: Tokenizer, config: ModelConfig) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    bare = Renderer(Tokenizer(Backend(models.BPE(vocab={"a": 0}, merges=[])), {}), config)
    with pytest.raises(SlmError, match=r"has no <start_of_turn>"):
        bare.example(INSTRUCTION)
    # Nothing stands before a text here, so its first token cannot be predicted.
    assert bare.example(TextRow("aa")) == Example.ending((0, 0, 0), 1)


def test_the_preview_parts_what_is_learned(renderer: Renderer) -> None:
    parts = renderer.preview(renderer.example(instruction_row("A", "", "B" * 100)))
    assert [learned for learned, _ in parts] == [False, True]
    (_, read), (_, learned) = parts
    assert read.startswith("<|endoftext|>|<start_of_turn>|") and read.endswith(r"|\n")
    assert learned.startswith("B|B|") and learned.endswith("B|<end_of_turn>|<|endoftext|>")
    assert "more)" in learned


TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Name two colours.\n"},
    {"role": "assistant", "content": "Red, <end_of_turn> blue."},
    {"role": "user", "content": "<start_of_turn> More?"},
    {"role": "assistant", "content": " Green. "},
    {"role": "user", "content": "Thanks."},
]
# Says the same as ours, but is not ours: it is rendered by Jinja, in the way of a model from elsewhere.
OTHER = CHAT_TEMPLATE + "{# of somebody else #}"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OTHER], ids=["ours", "foreign"])
@pytest.mark.parametrize("special", [True, False])
def test_what_is_read_before_an_answer_is_what_a_chat_asks_with(
    tokenizer: Tokenizer, config: ModelConfig, template: str, special: bool
) -> None:
    talk = TALK if special else [m | {"content": re.sub("<.*?> ", "", m["content"])} for m in TALK]
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": template})
    example = Renderer(tokenizer, config).example(ChatRow(tuple(talk)))
    answers = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
    assert len(example.spans) == len(answers) == 2
    end, end_of_text = tokenizer.token_id(END_OF_TURN), tokenizer.token_id(END_OF_TEXT)
    for number, (start, stop) in zip(answers, example.spans, strict=True):
        assert list(example.ids[:start]) == chat_ids(tokenizer, talk[:number])
        said = talk[number]["content"].strip()
        ends = [end, end_of_text] if number == answers[-1] else [end]
        assert list(example.ids[start:stop]) == [*tokenizer.encode_literal(said), *ends]
    assert example.ids[-1] == end_of_text  # what comes after the last answer is left out
    # the control: other words before the answer are other ids
    assert list(example.ids[: example.start]) != chat_ids(tokenizer, talk[1:2])


def test_the_ids_are_those_of_transformers(shared_checkpoint: Path, config: ModelConfig) -> None:
    talk = [m | {"content": re.sub("<.*?> ", "", m["content"])} for m in TALK[:5]]
    theirs = AutoTokenizer.from_pretrained(shared_checkpoint)
    ours = Tokenizer.load(shared_checkpoint)
    asked = theirs.apply_chat_template(talk[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_ids(ours, talk[:4]) == asked
    whole = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
    ids = list(Renderer(ours, config).example(ChatRow(tuple(talk))).ids)
    assert ids[:-1] == whole[: len(ids) - 1] and len(whole) == len(ids)  # theirs goes on with a line break


def test_a_template_s_refusal_names_the_row(tokenizer: Tokenizer, config: ModelConfig) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    renderer = Renderer(Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": strict}), config)
    rows = [ChatRow(tuple(TALK[1:]), "a.jsonl, line 1"), ChatRow(tuple(TALK), "a.jsonl, line 2"), TextRow("x")]
    with pytest.raises(SlmError, match="line 2: the chat template failed: no system"):
        renderer.examples(rows, 100)
    bad: list[SlmError] = []
    assert len(renderer.examples(rows, 100, bad).kept) == 2
    assert len(bad) == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}<end_of_turn>",
            "differently from the prompts",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "does not end answers"),
    ],
)
def test_a_template_that_cannot_be_learned_is_refused(
    tokenizer: Tokenizer, config: ModelConfig, template: str, said: str
) -> None:
    foreign = Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": template})
    with pytest.raises(SlmError, match=said):
        Renderer(foreign, config).example(ChatRow(tuple(TALK[1:5:2] + TALK[2:5:2])))


def test_a_conversation_is_cut_within_an_answer_or_before_it(renderer: Renderer) -> None:
    full = renderer.example(ChatRow(tuple(TALK)))
    (_, first), (second, _) = full.spans
    assert full.cut(second).spans == full.spans[:1]
    assert full.cut(first - 1).spans == ((full.start, first - 1),)
    assert full.cut(full.start).trained == 0
    assert full.targets(full.ids[-1]) and not full.cut(second).targets(full.ids[-1])
