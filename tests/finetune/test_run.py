"""A fine-tuning run: it learns, reports what it drops, is reproducible, and leaves all or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from slm.core.checkpoint import read_config, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.nn import load_checkpoint, save_checkpoint
from slm.core.tokenizer import END_OF_TURN, Tokenizer
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE, load_adapter
from slm.finetune.batches import mean_loss
from slm.finetune.examples import Example, Renderer
from slm.finetune.merge import merge, merged_checkpoint
from slm.finetune.preparation import RowFiles
from slm.finetune.rows import ChatRow, read_rows
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings, default_epochs, default_learning_rate
from tests.finetune.runs import FILES, PAIRS, QUICK
from tests.progress import Notes, Stopper

pytestmark = pytest.mark.usefixtures("short_answers", "nothing_half_written")

WriteRows = Callable[..., Path]


def held_out_examples(base: Path, data: Path) -> list[Example]:
    renderer = Renderer(Tokenizer.load(base), read_config(base))
    return [renderer.example(row) for row in read_rows(data)]


def test_what_is_written_and_what_is_reported(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data, out = write_rows(PAIRS), Path("deep/er/out")
    before = sha256_file(shared_checkpoint / "model.safetensors")
    result = finetune(shared_checkpoint, RowFiles(data, hold_out=0.1), out, QUICK)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (result.rows, result.validation_rows, result.epochs, result.updates) == (9, 1, 2, 6)
    assert (result.truncated, result.skipped) == (0, 0)
    assert result.loss_after < result.loss_before

    info = read_info(out)
    assert info["base"]["weights_sha256"] == before == sha256_file(shared_checkpoint / "model.safetensors")
    assert info["data"] == {"path": str(data), "sha256": sha256_file(data)}
    assert info["metrics"]["loss_after"] == result.loss_after
    (number,) = info["held_out_rows"]
    assert info["held_out"]["rows"] == 1
    assert FinetuneSettings.model_validate(info["settings"]) == QUICK.resolved(
        load_checkpoint(shared_checkpoint).config, 9
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["type"] for row in rows] == ["eval", *["train"] * 3, "eval", "sample", *["train"] * 3, "eval", "sample"]
    assert rows[-1]["tokens"] == 2 * result.trained_tokens

    # The reported loss is that of the file, read again, on the row that is named.
    again = load_adapter(load_checkpoint(shared_checkpoint), out).get_base_model()
    held_out = held_out_examples(shared_checkpoint, data)[number - 1 : number]
    assert mean_loss(again, held_out, 1) == pytest.approx(result.loss_after, abs=1e-5)
    merge(shared_checkpoint, out)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    shared_checkpoint: Path, write_rows: WriteRows
) -> None:
    data = write_rows(PAIRS)
    settings = QUICK.model_copy(update={"dropout": 0.1})

    def weights(name: str, seed: int) -> bytes:
        torch.rand(3)  # what else the process draws does not matter
        finetune(shared_checkpoint, data, Path(name), settings.model_copy(update={"seed": seed}))
        return Path(name, ADAPTER_WEIGHTS_FILE).read_bytes()

    first = weights("a", 0)
    assert first == weights("b", 0)
    assert first != weights("c", 1)


def test_turn_tokens_are_trained_with_instructions_alone(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    plain = [{"prompt": "Say", "completion": " one"}]
    sizes = [
        finetune(shared_checkpoint, write_rows(rows), Path(name), QUICK).trainable_parameters
        for name, rows in (("plain", plain), ("turns", PAIRS[:1]))
    ]
    assert sizes[1] - sizes[0] == 2 * 64
    base, tuned = (merge(shared_checkpoint, Path("turns")), load_checkpoint(shared_checkpoint))
    assert not torch.equal(base.lm_head.weight[1:3], tuned.lm_head.weight[1:3])


def test_a_validation_file_leaves_all_rows_to_training(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    held_out = write_rows(PAIRS[:3], "held-out.jsonl")
    result = finetune(shared_checkpoint, RowFiles(write_rows(PAIRS), held_out), Path("out"), QUICK)
    assert (result.rows, result.validation_rows) == (10, 3)
    assert read_info(Path("out"))["validation"]["sha256"] == sha256_file(held_out)


def test_rows_that_are_cut_or_left_out_are_reported(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 99},
        {"prompt": "a" * 99, "completion": "b"},
    ]
    heard = Notes()
    settings = QUICK.model_copy(update={"max_length": 20})
    result = finetune(shared_checkpoint, write_rows(rows), Path("out"), settings, heard)
    assert (result.rows, result.truncated, result.skipped) == (2, 1, 1)
    assert "warning: rows cut at 20 tokens, which lose their end-of-text: 1" in heard.lines
    assert "warning: rows left out, whose prompt alone has 20 tokens or more: 1" in heard.lines
    assert heard.lines[:2] == ["row 1, read only: <|endoftext|>|a", "row 1, learned:   b|<|endoftext|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a" * 99, "completion": "b"}, "nothing to learn"),
        ({"text": "b" * 99}, "every row is cut before its end"),
    ],
)
def test_rows_that_teach_nothing_or_no_end_are_refused(
    shared_checkpoint: Path, write_rows: WriteRows, row: dict[str, str], message: str
) -> None:
    with pytest.raises(SlmError, match=message):
        finetune(shared_checkpoint, write_rows([row]), Path("out"), QUICK.model_copy(update={"max_length": 20}))
    assert not Path("out").exists()


def test_a_row_may_not_be_longer_than_the_context(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    with pytest.raises(SlmError, match="max_length 257 is longer than the base's context of 256"):
        finetune(shared_checkpoint, write_rows(PAIRS), Path("out"), FinetuneSettings(max_length=257))


def test_an_adapter_is_replaced_only_on_request(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data, out = write_rows(PAIRS), Path("out")
    finetune(shared_checkpoint, data, out, QUICK)
    before = (out / ADAPTER_WEIGHTS_FILE).read_bytes()
    other = QUICK.model_copy(update={"seed": 5})
    with pytest.raises(SlmError, match="there is already an adapter: out"):
        finetune(shared_checkpoint, data, out, other)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, out, other, Stopper(3), overwrite=True)
    assert (out / ADAPTER_WEIGHTS_FILE).read_bytes() == before
    finetune(shared_checkpoint, data, out, other, overwrite=True)
    assert (out / ADAPTER_WEIGHTS_FILE).read_bytes() != before
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_what_is_no_adapter_is_never_replaced(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(PAIRS)
    for out in (shared_checkpoint, data):
        with pytest.raises(SlmError, match=r"contains other files|is not a directory"):
            finetune(shared_checkpoint, data, out, QUICK, overwrite=True)
    assert data.is_file() and (shared_checkpoint / "model.safetensors").is_file()


def test_every_weight_is_trained_in_full(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    settings = QUICK.model_copy(update={"method": "full", "learning_rate": 1e-3})
    result = finetune(shared_checkpoint, RowFiles(write_rows(PAIRS), hold_out=0.1), Path("out"), settings)
    assert result.made == Path("out/checkpoint/best") and result.loss_after < result.loss_before
    before, after = (load_checkpoint(path) for path in (shared_checkpoint, result.made))
    assert result.trainable_parameters == sum(p.numel() for p in before.parameters())
    changed = {n: not torch.equal(p, after.state_dict()[n]) for n, p in before.state_dict().items()}
    assert all(changed.values())
    # The reported loss is that of the file, read again.
    info = read_info(result.made)
    (number,) = info["finetuned"]["held_out_rows"]
    held_out = held_out_examples(shared_checkpoint, Path("rows.jsonl"))[number - 1 : number]
    assert mean_loss(after, held_out, 1) == pytest.approx(result.loss_after, abs=1e-5)
    assert info["made_by"] == "tests" and info["finetuned"]["turns"] is True
    with pytest.raises(SlmError, match="there is already a fine-tuned checkpoint"):
        finetune(shared_checkpoint, write_rows(PAIRS), Path("out"), settings)


def test_the_rate_for_all_weights_is_a_tenth(config: ModelConfig) -> None:
    rates = [FinetuneSettings.checked(method=method).resolved(config, 8).learning_rate for method in ("lora", "full")]
    assert rates[0] is not None and rates[1] == pytest.approx(rates[0] / 10)


def test_turn_tokens_that_the_base_knows_are_left_alone(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(PAIRS)
    settings = QUICK.model_copy(update={"method": "full"})
    tuned = finetune(shared_checkpoint, data, Path("tuned"), settings).made
    finetune(shared_checkpoint, data, Path("adapter"), QUICK)
    merged_checkpoint(shared_checkpoint, Path("adapter"), Path("merged"))
    sizes = [
        finetune(base, data, Path(f"on-{base.name}"), QUICK).trainable_parameters
        for base in (shared_checkpoint, tuned, Path("merged"))
    ]
    assert sizes[1] == sizes[2] == sizes[0] - 2 * 64


def test_patience_ends_a_run_that_has_no_more_to_gain(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    learned = write_rows([{"prompt": "a", "completion": "b" * 20}])
    unlikely = write_rows([{"prompt": "a", "completion": "z" * 20}], "held-out.jsonl")
    results = {}
    for patience in (2, None):
        heard = Notes()
        settings = FinetuneSettings(epochs=20, learning_rate=2e-2, patience=patience)
        result = finetune(shared_checkpoint, RowFiles(learned, unlikely), Path(f"out-{patience}"), settings, heard)
        results[patience] = result
        assert ("stopping early: no new best in 2 epochs" in heard.lines) == (patience == 2)
    assert results[2].updates == results[2].best_epoch + 2 < 20 == results[None].updates


def test_packed_rows_are_fewer_and_are_learned(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    settings = QUICK.model_copy(update={"pack": True, "max_length": 100, "batch_size": 1})
    heard = Notes()
    result = finetune(shared_checkpoint, write_rows(PAIRS), Path("out"), settings, heard)
    assert result.rows == 10 and result.updates < 2 * 10
    assert f"packed into {result.updates // 2} rows of at most 100 tokens" in heard.lines
    assert result.loss_after < result.loss_before


def test_bad_rows_are_left_out_on_request(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    rows = [*PAIRS[:3], {"txt": "a"}, *PAIRS[3:6], {"text": 7}]
    with pytest.raises(SlmError, match=r"line 4: unknown kind of row \(fields: txt\)"):
        finetune(shared_checkpoint, write_rows(rows), Path("out"), QUICK)
    heard = Notes()
    result = finetune(shared_checkpoint, RowFiles(write_rows(rows), skip_bad=True), Path("out"), QUICK, heard)
    assert (result.rows, result.bad) == (6, 2)
    assert any("bad rows left out: 2; the first: " in note and "line 4" in note for note in heard.lines)
    with pytest.raises(SlmError, match="there is no good row"):
        finetune(shared_checkpoint, RowFiles(write_rows([{"txt": "a"}]), skip_bad=True), Path("none"), QUICK)


def test_two_rows_are_shown_before_they_are_learned(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    heard = Notes()
    finetune(shared_checkpoint, write_rows([{"messages": chat}, *PAIRS]), Path("out"), QUICK, heard)
    shown = [note for note in heard.lines if note.startswith("row ")]
    assert [note[:16] for note in shown] == [
        *("row 1, read only", "row 1, learned: ") * 2,
        *("row 2, read only", "row 2, learned: "),
    ]
    assert shown[1] == "row 1, learned:   b|<end_of_turn>"
    assert shown[3] == "row 1, learned:   d|<end_of_turn>|<|endoftext|>"


def test_every_setting_changes_the_adapter(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows([{"instruction": "Count.", "output": "x y " * 20}, *PAIRS])
    plain = finetune(shared_checkpoint, data, Path("plain"), QUICK, samples=0)
    knobs: tuple[dict[str, Any], ...] = (
        *({"rank": 2}, {"alpha": 4}, {"dropout": 0.5}, {"target_modules": ("q_proj",)}),
        *({"rslora": True}, {"dora": True}, {"method": "full"}, {"pack": True}),
        *({"learning_rate": 1e-5}, {"max_grad_norm": 1e-3}, {"batch_size": 3}, {"max_length": 50}),
    )
    for knob in knobs:
        (name,) = knob
        turned = finetune(shared_checkpoint, data, Path(name), QUICK.model_copy(update=knob), samples=0)
        assert turned.loss_after != plain.loss_after, name


def test_defaults_follow_the_model_and_the_data() -> None:
    assert default_learning_rate(2000, 200) == 5e-4 and default_learning_rate(2000, 199) == 1e-3
    assert default_learning_rate(640, 1000) == pytest.approx(1.2e-3, rel=0.02)
    assert default_learning_rate(128, 1000) == pytest.approx(4.3e-3, rel=0.02)
    assert [default_epochs(rows, 8, rows) for rows in (1, 5, 87, 199, 200, 990, 100_000)] == [100, 100, 36, 16, 6, 3, 3]
    assert default_epochs(60, 4, 60) == 27 and default_epochs(10, 8, 500) == 50  # ten packed rows


def test_measuring_uses_no_dropout(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    """The reported loss is that of the merged model, in which nothing is left to drop."""
    data = write_rows(PAIRS)
    settings = QUICK.model_copy(update={"dropout": 0.5, "learning_rate": 1e-2})
    result = finetune(shared_checkpoint, RowFiles(data, validation=data), Path("out"), settings)
    merged = mean_loss(merge(shared_checkpoint, Path("out")), held_out_examples(shared_checkpoint, data), 4)
    assert result.loss_after == pytest.approx(merged, abs=1e-4)  # merging sums in another order; dropout adds 1e-2
    assert result.loss_after < result.loss_before - 0.1  # what dropout would drop is large


def test_a_rate_that_is_far_too_high_is_a_failure(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    with pytest.raises(SlmError, match="the loss is nan") as caught:
        finetune(shared_checkpoint, write_rows(PAIRS), Path("out"), QUICK.model_copy(update={"learning_rate": 1e30}))
    assert caught.value.hint == "try a lower --learning-rate"
    assert not Path("out").exists()


# As in Gemma's template, the system message begins the user's first turn, and user and assistant alternate.
GEMMA_LIKE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('they take turns') }}{%- endif -%}
    {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') }}
    {{- m['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""


def test_a_model_from_elsewhere_is_tuned_in_its_own_turns(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shared_checkpoint, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_checkpoint)
    tokenizer.chat_template = GEMMA_LIKE
    base = Path("from-elsewhere")
    theirs.save_pretrained(base)
    tokenizer.save_pretrained(base)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another?"},
        {"role": "assistant", "content": "Red."},
    ]
    data = write_rows([{"messages": talk}, {"messages": talk[1:]}, {"messages": talk[1:3]}])
    result = finetune(base, data, Path("out"), QUICK)
    assert result.loss_after < result.loss_before
    # The rows of the turn tokens, which it knows, are no part of the adapter.
    names = safetensors.torch.load_file(Path("out", ADAPTER_WEIGHTS_FILE)).keys()
    assert names and all("lora_" in name for name in names)
    renderer = Renderer(Tokenizer.load(base), read_config(base))
    for row in read_rows(data):
        example = renderer.example(row)
        assert isinstance(row, ChatRow)
        answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
        for number, (start, _) in zip(answers, example.spans, strict=True):
            before = list(row.messages[:number])
            asked = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert list(example.ids[:start]) == asked
    on_theirs = peft.PeftModel.from_pretrained(theirs.float(), Path("out"))
    ids = torch.tensor([renderer.example(read_rows(data)[0]).ids])
    with torch.no_grad():
        ours = load_adapter(load_checkpoint(base), Path("out"))(ids)
        assert (on_theirs(ids).logits - ours).abs().max() < 1e-4


def test_a_conversation_that_the_model_s_template_refuses_is_named(
    shared_checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(shared_checkpoint, base)
    (base / "chat_template.jinja").write_text(GEMMA_LIKE)
    answer = [{"role": "assistant", "content": "Unasked."}]
    data = write_rows([*PAIRS[:3], {"messages": answer}])
    with pytest.raises(SlmError, match=r"rows\.jsonl, line 4: the chat template failed: they take turns"):
        finetune(base, data, Path("out"), QUICK)
    assert finetune(base, RowFiles(data, skip_bad=True), Path("out"), QUICK).bad == 1


@pytest.mark.parametrize("turns", [True, False])
def test_the_end_of_a_turn_becomes_a_stop_token(shared_checkpoint: Path, write_rows: WriteRows, turns: bool) -> None:
    """Other clients stop where the configuration says so. The control has learned no turns."""
    model, tokenizer = load_checkpoint(shared_checkpoint), Tokenizer.load(shared_checkpoint)
    end = tokenizer.token_id(END_OF_TURN)
    stops = tuple(token for token in model.config.stop_token_ids if token != end)
    model.config = model.config.model_copy(update={"eos_token_id": stops})
    save_checkpoint(Path("base"), model, tokenizer, {})
    data = write_rows(PAIRS if turns else [{"prompt": "A", "completion": " b"}] * 8)
    full = finetune(Path("base"), data, Path("full"), QUICK.model_copy(update={"method": "full"})).made
    finetune(Path("base"), data, Path("adapter"), QUICK)
    merged_checkpoint(Path("base"), Path("adapter"), Path("merged"))
    for checkpoint in (full, Path("merged")):
        assert read_config(checkpoint).stop_token_ids == ((*stops, end) if turns else stops)
    assert read_config(Path("base")).stop_token_ids == stops
