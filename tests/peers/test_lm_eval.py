"""lm-evaluation-harness: our adapter answers as its own model for transformers does, and tasks run from the shell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slm
from slm.core.manifest import Bundle
from slm.core.progress import Silent
from slm.runtime.evaluate import evaluate_documents

pytestmark = pytest.mark.peer

Ask = Callable[..., Any]

# Sums of some hundred log-probabilities between two implementations in float32, relative; 2e-6 seen.
SAME = 2e-5

PAIRS = [
    ("The fox", " ran away"),
    ("The fox ", "ran away"),  # the space moves to the continuation
    ("", "Once"),
    ("", " 🦊"),
    ("It rained. " * 3, "é"),
    ("<|endoftext|>The", " end"),  # begun already
    ("so long " * 100, " that it is cut on the left"),
]
TEXTS = ["Once upon a time, a naïve fox ran. 🦊", "a", "The end. " * 150]  # the last is longer than the context
UNTIL = [
    ("The fox", {"until": ["zz"], "max_gen_toks": 30}),
    ("The fox", {"until": ["is", "s"], "max_gen_toks": 30}),
    ("so long " * 100, {"until": [], "max_gen_toks": 10, "do_sample": False}),
]


def test_answers_are_those_of_its_own_model(lm_eval: Ask, shared_checkpoint: Path, shared_bundle: Bundle) -> None:
    requests = json.dumps({"loglikelihood": PAIRS, "generate_until": UNTIL})
    wanted = lm_eval("theirs", shared_checkpoint, "bos", requests)
    assert wanted["generate_until"][0] != wanted["generate_until"][1]  # a stop sequence was met
    for path in (shared_checkpoint, shared_bundle.path):
        ours = lm_eval("ours", path, "bos", requests)
        for (mine, greedy), (theirs, theirs_greedy) in zip(ours["loglikelihood"], wanted["loglikelihood"], strict=True):
            assert mine == pytest.approx(theirs, rel=SAME) and greedy == theirs_greedy
        assert ours["generate_until"] == wanted["generate_until"]


def test_greedy_is_noticed(lm_eval: Ask, shared_checkpoint: Path, stories: list[str]) -> None:
    """What the model itself would write is greedy; something else is not, nor the same with something else after it."""
    model = slm.load(shared_checkpoint)
    words = sorted({word for story in stories[:40] for word in story.split() if word.isalpha()})
    # One after which the model would write something that is text by itself: many of its tokens are half a character.
    prompt = next(word for word in words if model.generate(word, max_new_tokens=1, temperature=0).strip().isascii())
    written = model.generate(prompt, max_new_tokens=1, temperature=0)
    assert written
    pairs = [(prompt, written), (prompt, "~"), (prompt, written + "~~")]
    requests = json.dumps({"loglikelihood": pairs})
    ours, theirs = (lm_eval(whose, shared_checkpoint, "bos", requests)["loglikelihood"] for whose in ("ours", "theirs"))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] == [True, False, False]


def test_sampled_texts_differ_and_come_again(lm_eval: Ask, shared_checkpoint: Path) -> None:
    sampled = ("The fox", {"until": ["zz"], "max_gen_toks": 10, "do_sample": True, "temperature": 1.2})
    requests = json.dumps({"generate_until": [sampled, sampled]})
    texts = [lm_eval("ours", shared_checkpoint, "bos", requests)["generate_until"] for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_rolling_is_its_own_and_ours_without_the_ends(
    lm_eval: Ask, shared_checkpoint: Path, shared_bundle: Bundle
) -> None:
    """Its model for transformers is told to add no token, or it predicts the one that begins a text after itself."""
    requests = json.dumps({"loglikelihood_rolling": [[text] for text in TEXTS]})
    wanted = lm_eval("theirs", shared_checkpoint, "plain", requests)["loglikelihood_rolling"]
    for path in (shared_checkpoint, shared_bundle.path):
        ours = lm_eval("ours", path, "bos", requests)["loglikelihood_rolling"]
        assert ours == pytest.approx(wanted, rel=SAME)
        measured = evaluate_documents(slm.load(path), TEXTS[:2], Silent())
        assert measured.end_of_text_nats - measured.nats == pytest.approx(sum(ours[:2]), rel=1e-4)


def test_an_altered_model_answers_otherwise(lm_eval: Ask, shared_checkpoint: Path) -> None:
    """The control: a wrong rotary base in the config is far outside the tolerance."""
    import shutil

    altered = Path(shutil.copytree(shared_checkpoint, "altered"))
    fields = json.loads((altered / "config.json").read_text())
    fields["rope_parameters"]["sliding_attention"]["rope_theta"] = fields["rope_local_base_freq"] = 130.0
    (altered / "config.json").write_text(json.dumps(fields))
    requests = json.dumps({"loglikelihood": PAIRS[:1]})
    answers = [lm_eval("ours", path, "bos", requests)["loglikelihood"][0][0] for path in (shared_checkpoint, altered)]
    assert answers[0] != pytest.approx(answers[1], rel=10 * SAME)


ROWS = [
    {"question": "The fox", "choices": [" ran", " flew to the moon", " é 🦊"], "answer": 0, "text": TEXTS[0]},
    {"question": "It was raining and", "choices": [" wet", " dry", "z"], "answer": 1, "text": "The end. The end."},
    {"question": "", "choices": ["Once", "Upon", "x"], "answer": 2, "text": "a"},
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
metadata: {{version: 1.0}}
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{question}}."
doc_to_target: "{{written}}"
generation_kwargs: {until: ["~"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_checkpoint: Path) -> str:
    """Three tasks over three rows in a file; the text to be written is what the model writes, but for one row."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model = slm.load(shared_checkpoint)
    for row in ROWS:
        row["written"] = model.generate(f"{row['question']}.", max_new_tokens=8, temperature=0).split("~")[0]
    ROWS[1]["written"] = "something else"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for kind, fields in KINDS.items():
        Path(f"{kind}.yaml").write_text(TASK.format(name=f"local_{kind}") + fields, encoding="utf-8")
    return ",".join(f"{kind}.yaml" for kind in KINDS)


def test_tasks_from_the_shell(lm_eval: Ask, tasks: str, shared_checkpoint: Path, shared_bundle: Bundle) -> None:
    pairs = [(row["question"], choice) for row in ROWS for choice in row["choices"]]
    requests = {"loglikelihood": pairs, "loglikelihood_rolling": [[row["text"]] for row in ROWS]}
    wanted = lm_eval("theirs", shared_checkpoint, "bos", json.dumps({"loglikelihood": pairs}))["loglikelihood"]
    rolling = lm_eval("ours", shared_checkpoint, "bos", json.dumps(requests))["loglikelihood_rolling"]
    best = [max(range(3), key=lambda j: wanted[3 * i + j][0]) for i in range(3)]
    accuracy = sum(choice == row["answer"] for choice, row in zip(best, ROWS, strict=True)) / 3
    nats_a_byte = -sum(rolling) / sum(len(row["text"].encode()) for row in ROWS)
    for path in (shared_checkpoint, shared_bundle.path):
        report = lm_eval("cli", path, "--tasks", tasks, "--json")
        assert report["model"] == str(path) and "loss" not in report  # no text was named
        found = {name: figures["metrics"] for name, figures in report["tasks"].items()}
        assert found["local_choice"]["acc"] == pytest.approx(accuracy)
        assert found["local_rolling"]["bits_per_byte"] == pytest.approx(nats_a_byte / 0.6931471805599453, rel=1e-4)
        assert found["local_until"]["exact_match"] == pytest.approx(2 / 3)
        assert {figures["examples"] for figures in report["tasks"].values()} == {3}
        assert report["tasks"]["local_choice"]["stderr"]["acc"] >= 0
    limited = lm_eval("cli", shared_bundle.path, "--tasks", "choice.yaml", "--limit", "2", "--json", "--tokens", "40")
    assert limited["tasks"]["local_choice"]["examples"] == 2
