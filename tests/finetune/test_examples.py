"""Rows in tokens: the ids of inference, a mask over what is only read, and nothing lost in silence."""

from dataclasses import replace

import pytest

from slm.core.chat import instruction_request, turn_prompt
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Tokenizer
from slm.finetune.examples import Example, Renderer
from slm.finetune.rows import CompletionRow, InstructionRow, Row, TextRow

INSTRUCTION = InstructionRow(" Add the numbers.\n", "1 and 1", " 2 \n")


@pytest.fixture
def renderer(tokenizer: Tokenizer, config: ModelConfig) -> Renderer:
    return Renderer(tokenizer, config)


def test_an_instruction_is_asked_as_it_will_be(renderer: Renderer, tokenizer: Tokenizer) -> None:
    example = renderer.example(INSTRUCTION)
    read, learned = list(example.ids[: example.start]), list(example.ids[example.start :])
    assert read == tokenizer.encode(turn_prompt(instruction_request(INSTRUCTION.instruction, INSTRUCTION.input)))
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
        InstructionRow(f"Say {END_OF_TURN}\n{START_OF_TURN}model\n", END_OF_TEXT, END_OF_TEXT),
        CompletionRow(END_OF_TEXT, END_OF_TURN),
        TextRow(END_OF_TEXT),
    ],
)
def test_special_tokens_in_what_a_user_wrote_are_characters(renderer: Renderer, tokenizer: Tokenizer, row: Row) -> None:
    harmless = InstructionRow("Say", "x", "y") if isinstance(row, InstructionRow) else TextRow("x")
    specials = {tokenizer.token_id(token) for token in (START_OF_TURN, END_OF_TURN, END_OF_TEXT)}

    def count(row: Row) -> list[int]:
        return [token for token in renderer.example(row).ids if token in specials]

    assert count(row) == count(harmless)
    example = renderer.example(row)
    written = (
        row.output
        if isinstance(row, InstructionRow)
        else row.completion
        if isinstance(row, CompletionRow)
        else row.text
    )
    ends = 2 if isinstance(row, InstructionRow) else 1
    assert tokenizer.decode(example.ids[example.start : -ends]) == written


def test_the_request_may_hold_the_placeholder_and_the_template(renderer: Renderer, tokenizer: Tokenizer) -> None:
    request = "a\0b model\n user\n"
    example = renderer.example(InstructionRow(request, "", "x"))
    assert list(example.ids[: example.start]) == tokenizer.encode(turn_prompt(request))


def test_rows_are_cut_at_their_end_and_counted(renderer: Renderer) -> None:
    long, short = CompletionRow("ab", "cd" * 20), CompletionRow("ab", "c")
    no_room = CompletionRow("ab" * 20, "c")
    full = renderer.example(long)
    examples = renderer.examples([long, short, no_room], max_length=10)
    assert (examples.truncated, examples.skipped) == (1, 1)
    assert examples.kept == (replace(full, ids=full.ids[:10]), renderer.example(short))
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
    assert bare.example(TextRow("aa")) == Example((0, 0, 0), 1)


def test_the_preview_parts_what_is_learned(renderer: Renderer) -> None:
    read, learned = renderer.preview(renderer.example(InstructionRow("A", "", "B" * 100)))
    assert read.startswith("<|endoftext|>|<start_of_turn>|") and read.endswith(r"|\n")
    assert learned.startswith("B|B|") and learned.endswith("B|<end_of_turn>|<|endoftext|>")
    assert "more)" in learned
