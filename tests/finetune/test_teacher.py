"""Distillation: the divergence and its gradients, rows that a teacher answers, and what a student learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.checkpoint import read_config, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune import writing
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE
from slm.finetune.batches import alone, collate
from slm.finetune.divergence import TeacherTargets
from slm.finetune.examples import Example, Renderer
from slm.finetune.merge import merge
from slm.finetune.rows import ChatRow, CompletionRow, read_rows
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from slm.finetune.teacher import Distilled, Teacher
from slm.train import loss as loss_module
from slm.train.loss import linear_loss
from tests.gradients import TOLERANCE, N, assert_same, drawn
from tests.progress import Notes, Stopper

pytestmark = pytest.mark.usefixtures("short_answers")

WriteRows = Callable[..., Path]
BF16_TOLERANCE = 3e-2
WORDS = ("one", "two", "red", "blue", "cat", "dog", "sun", "sea", "cup", "hat")
PROMPTS = [{"prompt": f"Say {word}"} for word in WORDS]
ANSWERED = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in WORDS]
QUICK = FinetuneSettings.checked(rank=4, epochs=2, batch_size=4, max_length=24, patience=None)


@pytest.fixture(scope="module")
def teacher_path(shared_checkpoint: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper model with the same tokenizer and a padded vocabulary."""
    config = read_config(shared_checkpoint)
    torch.manual_seed(3)
    layers = {"num_hidden_layers": 2, "layer_types": config.layer_types[:1] * 2}
    wider = {"vocab_size": config.vocab_size + 12, "intermediate_size": 2 * config.intermediate_size}
    model = CausalLM(config.model_copy(update=layers | wider))
    model.init_weights()
    model.model.embed_tokens.weight.data *= 20
    path = tmp_path_factory.mktemp("teacher") / "t"
    save_checkpoint(path, model, tokenizer, {"made_by": "tests"})
    return path


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The definition, from whole logits."""
    shared = min(student.shape[-1], teacher.shape[-1])
    p = teacher[:, :shared].log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1)[:, :shared])).sum(-1).mean()


@pytest.mark.parametrize("shared", [101, 90])
@pytest.mark.parametrize("chunk", [1, 8, None])
def test_the_divergence_is_that_of_the_whole_logits(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, shared: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weights = drawn(draw)
    theirs, head = torch.randn(N, 40, generator=draw), torch.randn(shared, 40, generator=draw)

    def definition(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return divergence(hidden @ weights.T, theirs @ head.T)

    def found(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return linear_loss(hidden, weights, TeacherTargets(theirs, head), chunk)

    wanted = assert_same(monkeypatch, found, definition, hidden, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = found(hidden, weights).item()
    assert TOLERANCE < abs(rounded / wanted - 1) < BF16_TOLERANCE


def test_rows_that_replace_rows_of_a_frozen_head_get_their_gradient() -> None:
    """As with an adapter that trains turn tokens."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(9, 8, generator=draw, requires_grad=True), torch.randn(31, 8, generator=draw)
    rows, ids = torch.randn(2, 8, generator=draw, requires_grad=True), [7, 3]
    theirs, their_head = torch.randn(9, 5, generator=draw), torch.randn(31, 5, generator=draw)
    wanted = divergence(hidden @ head.index_copy(0, torch.tensor(ids), rows).T, theirs @ their_head.T)
    found = linear_loss(hidden, head, TeacherTargets(theirs, their_head), 4, (ids, rows))
    pairs = zip(torch.autograd.grad(found, (hidden, rows)), torch.autograd.grad(wanted, (hidden, rows)), strict=True)
    for a, b in pairs:
        assert (a - b).abs().max() < TOLERANCE * b.abs().max()


def test_a_teacher_computes_in_the_run_s_precision(shared_checkpoint: Path, teacher_path: Path) -> None:
    model, examples = load_checkpoint(shared_checkpoint), [Example.ending(range(4, 40), 6)]
    measured = []
    for autocast in (None, torch.bfloat16):
        teacher = Teacher(teacher_path, torch.device("cpu"), autocast)
        material = Distilled(alone(examples), examples, teacher)
        measured.append(material.measure(model, 2, autocast, lambda: None))
        wanted = torch.float32 if autocast is None else autocast
        assert teacher.model.model.layers[0].self_attn.q_proj.weight.dtype == wanted
    assert 0 < abs(measured[1] / measured[0] - 1) < BF16_TOLERANCE


def test_at_most_a_chunk_of_logits_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the reference, which holds the logits of all positions."""
    seen: list[int] = []
    compare = TeacherTargets.compare

    def noted(self: TeacherTargets, logits: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        seen.append(logits.numel())
        return compare(self, logits, rows, dtype)

    monkeypatch.setattr(TeacherTargets, "compare", noted)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 262_144 * 2)
    hidden = torch.randn(5, 2, requires_grad=True)
    linear_loss(hidden, torch.randn(262_144, 2), TeacherTargets(torch.randn(5, 3), torch.randn(262_144, 3))).backward()
    assert seen == [2 * 262_144, 2 * 262_144, 262_144]


def test_the_gradient_of_a_batch_is_that_of_the_definition(shared_checkpoint: Path, teacher_path: Path) -> None:
    model = load_checkpoint(shared_checkpoint)
    examples = [Example(tuple(range(4, 30)), ((2, 5), (9, 26))), Example.ending(range(40, 50), 3)]
    batch = collate(alone(examples))
    material = Distilled(alone(examples), examples, Teacher(teacher_path, torch.device("cpu"), None))
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(material.loss(model, batch), list(model.parameters()))
    teacher, parts = load_checkpoint(teacher_path), []
    for example in examples:
        ids = torch.tensor([example.ids[:-1]])
        places = [place - 1 for start, end in example.spans for place in range(start, end)]
        parts.append(divergence(model(ids)[0, places], teacher(ids)[0, places].detach()) * len(places))
    wanted = torch.autograd.grad(sum(parts) / batch.trained, list(model.parameters()))  # type: ignore[arg-type]
    for name, a, b in zip(names, found, wanted, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * max(1.0, float(b.abs().max())), name
    measured = material.measure(model, 2, None, lambda: None)
    assert measured == pytest.approx(float(sum(parts).detach()) / batch.trained, rel=TOLERANCE)  # type: ignore[union-attr]


def mean_divergence(model: CausalLM, teacher: Path, examples: list[Example]) -> float:
    material = Distilled(alone(examples), examples, Teacher(teacher, torch.device("cpu"), None))
    return material.measure(model, 4, None, lambda: None)


@pytest.mark.parametrize(
    "how", [{}, {"method": "full"}, {"qat": "int8"}, {"method": "full", "qat": "int8"}, {"pack": True}], ids=str
)
def test_the_student_gets_nearer_to_the_teacher(
    shared_checkpoint: Path, teacher_path: Path, write_rows: WriteRows, how: dict[str, Any]
) -> None:
    settings = QUICK.model_copy(update={"learning_rate": 1e-2 if "method" not in how else 1e-3, "epochs": 4} | how)
    result = finetune(shared_checkpoint, write_rows(ANSWERED), Path("out"), settings, teacher=teacher_path)
    assert result.loss_after < result.loss_before
    renderer = Renderer(Tokenizer.load(shared_checkpoint), read_config(shared_checkpoint))
    examples = [renderer.example(row).cut(24) for row in read_rows(Path("rows.jsonl"))]
    before = mean_divergence(load_checkpoint(shared_checkpoint), teacher_path, examples)
    merged = load_checkpoint(result.made) if "method" in how else merge(shared_checkpoint, result.made)
    assert mean_divergence(merged, teacher_path, examples) < before
    if not how:
        assert mean_divergence(merged, teacher_path, examples) == pytest.approx(result.loss_after, rel=1e-3)
        info = read_info(Path("out"))
        assert info["teacher"]["path"] == str(teacher_path) and info["teacher"]["weights_sha256"]
        assert sorted(path.name for path in Path("out").iterdir()) == sorted(
            ["adapter_config.json", "adapter_model.safetensors", "config.yaml", "loss.png", "metrics.jsonl", "slm.json"]
        )


MESSAGES = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello.", "weight": 0},
    {"role": "user", "content": "Name a colour."},
]
UNANSWERED: list[dict[str, Any]] = [
    {"prompt": "Say one"},
    {"prompt": [{"role": "user", "content": "Say one."}]},
    {"instruction": "Say one.", "output": None},
    {"messages": MESSAGES},
    {"conversations": [{"from": "human", "value": "Say one."}]},
]


def test_rows_that_end_with_a_request(write_rows: WriteRows) -> None:
    answered = [{"prompt": "a", "completion": " b"}, {"text": "a"}, {"messages": MESSAGES[:2] + MESSAGES[:2]}]
    answered[2]["messages"][1] = {"role": "assistant", "content": "Hello."}
    unanswered: list[int] = []
    rows = read_rows(write_rows([*UNANSWERED, *answered[:2]]), unanswered=unanswered)
    assert unanswered == [0, 1, 2, 3, 4] and len(rows) == 7
    assert isinstance(rows[0], CompletionRow) and all(isinstance(row, ChatRow) for row in rows[1:5])
    with pytest.raises(SlmError, match=r"line 1: unknown kind of row \(fields: prompt\)") as caught:
        read_rows(write_rows(UNANSWERED[:1]))  # negative control: without a teacher
    assert caught.value.hint and "--teacher" in caught.value.hint


def test_the_teacher_answers_prompts_and_the_student_learns_its_predictions(
    shared_checkpoint: Path, teacher_path: Path, write_rows: WriteRows
) -> None:
    heard = Notes()
    data = write_rows([*UNANSWERED, *ANSWERED[:3]])
    settings = QUICK.model_copy(update={"max_length": 96})
    result = finetune(shared_checkpoint, data, Path("out"), settings, heard, teacher=teacher_path)
    assert "answers written by the teacher: 5" in heard.lines
    assert result.rows + result.skipped == 8  # an answer of a random model may be empty when it is cut
    assert not any("|-<|endoftext|>" in line for line in heard.lines)  # no placeholder is learned
    # The first row's answer is the teacher's greedy continuation, cut at 96 tokens without an end of its own.
    model, tokenizer = load_checkpoint(teacher_path), Tokenizer.load(shared_checkpoint)
    ids = [*tokenizer.prefix_ids, *tokenizer.encode_literal("Say one")]
    prompt = len(ids)
    while len(ids) < 96:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    shown = next(line for line in heard.lines if line.startswith("row 1, learned:"))
    answer = tokenizer.decode(ids[prompt:])
    renderer = Renderer(tokenizer, read_config(shared_checkpoint))
    row = CompletionRow("Say one", answer, unended=True)
    example = renderer.example(row).cut(96)
    assert renderer.preview(example)[-1] == (True, shown.removeprefix("row 1, learned:   "))
    assert renderer.end_of_text not in example.ids[prompt:]


def test_an_answer_that_was_cut_has_no_end(shared_checkpoint: Path) -> None:
    renderer = Renderer(Tokenizer.load(shared_checkpoint), read_config(shared_checkpoint))
    for kind in (
        lambda unended: CompletionRow("Say", " one", unended=unended),
        lambda unended: ChatRow(
            ({"role": "user", "content": "Say"}, {"role": "assistant", "content": "one"}), unended=unended
        ),
    ):
        whole, cut = renderer.example(kind(False)), renderer.example(kind(True))
        assert whole.ids[-1] == renderer.end_of_text and whole.ids[: len(cut.ids)] == cut.ids
        assert cut.ids[-1] not in renderer.ends and cut.trained > 0
        assert set(whole.ids[len(cut.ids) :]) <= renderer.ends
    assert renderer.example(CompletionRow("Say", "", unended=True)).trained == 0


def test_an_interrupted_run_does_not_write_answers_again(
    shared_checkpoint: Path, teacher_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(PROMPTS)
    finetune(shared_checkpoint, data, Path("whole"), QUICK, teacher=teacher_path)
    # Stopped while the teacher answers, and then while the student learns.
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("parts"), QUICK, Stopper(4), teacher=teacher_path)
    assert [path.name for path in Path("parts").iterdir()] == ["teacher"]
    stored = json.loads(Path("parts/teacher/answers.json").read_text(encoding="utf-8"))["answers"]
    assert 0 < len(stored) < len(PROMPTS)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            shared_checkpoint, data, Path("parts"), QUICK, Stopper(len(PROMPTS) - len(stored) + 2), teacher=teacher_path
        )
    assert sorted(path.name for path in Path("parts").iterdir()) == ["teacher", "trainer"]

    def generate(*_: object) -> None:
        raise AssertionError("the answers were written before")

    monkeypatch.setattr(writing, "generate", generate)
    heard = Notes()
    finetune(shared_checkpoint, data, Path("parts"), QUICK, heard, teacher=teacher_path)
    assert any("going on after update" in line for line in heard.lines)
    for name in (ADAPTER_WEIGHTS_FILE, "metrics.jsonl"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    assert not Path("parts/teacher").exists()


def test_answers_of_another_teacher_are_not_used(
    shared_checkpoint: Path, teacher_path: Path, write_rows: WriteRows
) -> None:
    data = write_rows(PROMPTS)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), QUICK, Stopper(4), teacher=teacher_path)
    with pytest.raises(SlmError, match="written by another teacher"):
        finetune(shared_checkpoint, data, Path("out"), QUICK, teacher=shared_checkpoint)
    file = Path("out/teacher/answers.json")
    file.write_text('{"teacher": 1}', encoding="utf-8")
    with pytest.raises(SlmError, match="the teacher's answers are damaged"):
        finetune(shared_checkpoint, data, Path("out"), QUICK, teacher=teacher_path)
    finetune(shared_checkpoint, data, Path("out"), QUICK, teacher=shared_checkpoint, overwrite=True)


def test_teachers_that_do_not_fit(
    shared_checkpoint: Path, gemma_like: Tokenizer, config: ModelConfig, make_model: Any, write_rows: WriteRows
) -> None:
    data = write_rows(ANSWERED)
    save_checkpoint(Path("other"), make_model(config), gemma_like, {})
    with pytest.raises(SlmError, match="the teacher other has another tokenizer than the base"):
        finetune(shared_checkpoint, data, Path("out"), QUICK, teacher=Path("other"))
    tokenizer = Tokenizer.load(shared_checkpoint)
    short = config.model_copy(update={"max_position_embeddings": 20})
    save_checkpoint(Path("short"), make_model(short), tokenizer, {})
    with pytest.raises(SlmError, match="rows have up to 24 tokens, and the context of the teacher short is 20"):
        finetune(shared_checkpoint, data, Path("out"), QUICK, teacher=Path("short"))
    pairs = write_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(SlmError, match="preferences are learned against the base"):
        finetune(shared_checkpoint, pairs, Path("out"), QUICK, teacher=shared_checkpoint)
    assert not Path("out").exists()


def test_a_teacher_without_turns_is_named(shared_checkpoint: Path, teacher_path: Path, write_rows: WriteRows) -> None:
    heard = Notes()
    finetune(shared_checkpoint, write_rows(ANSWERED), Path("out"), QUICK, heard, teacher=teacher_path)
    assert any("was not tuned on conversations" in line for line in heard.lines)
