"""`slm eval --task`: models side by side, the report, the check with --min, and rows that cannot be used."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from slm.core.manifest import Bundle
from tests.html_pages import checked

Slm = Callable[..., Any]

WORDS = ("one", "two", "red", "blue", "cat", "dog", "sun", "sea", "cup", "hat", "tree", "fox", "bear", "fish", "moon",
         "star", "rain", "snow", "cake", "ball")  # fmt: skip
PAIRS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in WORDS]


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def exported(shared_checkpoint: Path, shared_bundle: Bundle) -> Path:
    """A run with a checkpoint and its bundle, and a file of rows."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    shutil.copytree(shared_bundle.path, "runs/tiny/onnx")
    write("rows.jsonl", PAIRS[:6])
    return Path("runs/tiny")


@pytest.fixture(scope="session")
def tuned(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with larger embeddings, which can learn, and the base after it learned 20 rows."""
    from slm.core.nn import load_checkpoint, save_checkpoint
    from slm.core.tokenizer import Tokenizer
    from slm.finetune.run import finetune
    from slm.finetune.settings import FinetuneSettings

    home = tmp_path_factory.mktemp("tuned")
    model = load_checkpoint(shared_checkpoint)
    model.model.embed_tokens.weight.data *= 20
    save_checkpoint(home / "base", model, Tokenizer.load(shared_checkpoint), {})
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    settings = FinetuneSettings(method="full", epochs=25, batch_size=4, learning_rate=1e-2, keep="last")
    with pytest.MonkeyPatch.context() as patch:
        figure = MagicMock()
        figure.savefig.side_effect = lambda file, **_: Path(file).write_bytes(b"placeholder")
        patch.setattr("slm.train.metrics.new_figure", lambda *_: figure)
        finetune(home / "base", rows, home / "tuned", settings)
    return home / "base", home / "tuned" / "checkpoint" / "best"


def compared(slm: Slm, *arguments: object) -> Any:
    result = slm("eval", "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_tuned_model_scores_higher_than_its_base(slm: Slm, tuned: tuple[Path, Path]) -> None:
    base, learned = tuned
    rows = base.parent / "rows.jsonl"
    result = slm("eval", base, learned, "--task", rows, "--max-tokens", "8", "--json")
    assert f"note: {learned} was tuned on this file" in result.err and f"note: {base} was" not in result.err
    both = json.loads(result.out)
    assert both["metric"] == "exact" and both["rows"] == 20
    first, second = both["models"]
    assert first["difference"] is None and first["score"] <= 0.1 and second["score"] >= 0.6
    assert second["difference"]["score"] == pytest.approx(second["score"] - first["score"])
    assert second["difference"]["low"] > 0.3
    assert [each["model"] for each in both["models"]] == [str(base), str(learned)]
    assert both["next"] == f"slm export --onnx {learned}"  # of the best


def test_an_adapter_by_its_name_and_by_its_option(
    slm: Slm, exported: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = exported / "checkpoint/best", make_adapter(tmp_path / "adapter", exported / "checkpoint/best")
    arguments = ("--adapter", adapter, "--task", "rows.jsonl", "--max-tokens", "8", "--metric", "rouge", "--json")
    result = slm("eval", base, adapter, *arguments)
    plain, named, applied = json.loads(result.out)["models"]
    assert applied["model"] == f"{base} + {adapter}" and named["model"] == str(adapter)
    assert named["worst"] == applied["worst"] != plain["worst"]
    assert named["bytes"] == plain["bytes"] + (adapter / "adapter_model.safetensors").stat().st_size
    twice = slm("eval", adapter, *arguments)
    assert twice.code == 1 and "is an adapter, to which --adapter cannot be applied" in twice.err


def test_the_report(slm: Slm, exported: Path) -> None:
    figures = compared(slm, exported / "checkpoint/best", exported / "onnx", "--task", "rows.jsonl", "--metric", "f1")
    assert figures["report"] == "runs/eval-rows/report.html" and figures["passed"] and figures["minimum"] is None
    assert sorted(path.name for path in Path("runs/eval-rows").iterdir()) == ["report.html", "report.json"]
    for model in figures["models"]:
        assert {"seconds_per_row", "tokens_s", "new_tokens", "bytes", "batch", "cut", "max_tokens"} <= model.keys()
        assert model["low"] <= model["score"] <= model["high"] and model["further"].keys() == {"squad_exact"}
        assert len(model["worst"]) == 6 and model["worst"][0].keys() >= {
            "place",
            "prompt",
            "expected",
            "reply",
            "scores",
        }
    assert figures["models"][1]["bytes"] == Bundle.open(exported / "onnx").model_bytes
    stored = json.loads(Path("runs/eval-rows/report.json").read_text())
    assert len(stored["replies"]) == 6 and stored["metric_chosen_because"] is None
    assert [each["expected"] for each in stored["replies"]] == [pair["output"] for pair in PAIRS[:6]]
    assert all(len(each["replies"]) == 2 for each in stored["replies"])
    page = checked(Path("runs/eval-rows/report.html").read_text())
    for words in ("rows.jsonl: F1 of words, 6 rows", "Say one.", "one!", "line 1", "runs/tiny/onnx", "bootstrap"):
        assert words in page.text


def test_the_same_command_gives_the_same_scores(slm: Slm, exported: Path) -> None:
    def scores() -> list[Any]:
        found = compared(slm, "--task", "rows.jsonl", "--metric", "rouge")["models"]
        return [(each["score"], each["low"], each["high"], each["worst"]) for each in found]

    assert scores() == scores()


def test_the_table(slm: Slm, exported: Path) -> None:
    result = slm("eval", "--task", "rows.jsonl")
    assert result.code == 0, result.err
    assert "Using runs/tiny/onnx (newest bundle)." in result.err
    assert "metric: exact (the median reply has 1 word); --metric chooses another" in result.err
    assert "6 of 6 replies end at the limit of 32 tokens (--max-tokens) or of the context" in result.err
    assert "report: runs/eval-rows/report.html\nnext: slm quantize --int8 runs/tiny/onnx" in result.err
    for words in (
        "exact match, 6 rows",
        "score (95 %)",
        "0.0% (0.0 to 39.0)",
        "s per row",
        "tokens/s",
        "MB",
        "Say one.",
    ):
        assert words in result.out
    assert "difference" not in result.out
    few = slm(
        "eval", "onnx", "--task", "rows.jsonl", "--limit", "2", "--max-tokens", "3", "--batch", "1", "--out", "here"
    )
    assert "2 rows of 6" in few.out and "limit of 3 tokens" in few.err and Path("here/report.html").is_file()


def test_min_fails_after_the_report_is_written(slm: Slm, exported: Path) -> None:
    arguments = ("eval", "--task", "rows.jsonl", "--metric", "f1", "--json", "--min")
    failed = slm(*arguments, "50%")
    assert failed.code == 1
    assert "error: the score is below --min 50.0%: runs/tiny/onnx has 0.0%" in failed.err
    assert json.loads(failed.out)["passed"] is False  # one object, also if the check fails
    assert "next" not in json.loads(failed.out)
    page = Path("runs/eval-rows/report.html").read_text()
    assert "Required score: 50.0%; not reached by runs/tiny/onnx." in page
    passed = slm(*arguments, "0")
    assert passed.code == 0 and json.loads(passed.out)["passed"] is True
    assert "Required score: 0.0%; reached." in Path("runs/eval-rows/report.html").read_text()


def test_a_score_that_equals_the_limit_passes(slm: Slm, tuned: tuple[Path, Path]) -> None:
    base, learned = tuned
    write("rows.jsonl", PAIRS[:10])
    arguments = ("--task", "rows.jsonl", "--max-tokens", "8", "--metric", "f1")
    score = compared(slm, learned, *arguments)["models"][0]["score"]
    assert slm("eval", learned, *arguments, "--min", f"{100 * score}%").code == 0
    both = slm("eval", base, learned, *arguments, "--min", str(score))
    assert both.code == 1 and f"{base} has" in both.err and f"{learned} has" not in both.err


def test_the_report_escapes_what_rows_say(slm: Slm, exported: Path) -> None:
    evil = '<script>alert("1")</script>&amp;</pre>\x1b[31m\u202e'
    write("<b>.jsonl", [{"prompt": evil, "completion": f"{evil}{i}"} for i in range(2)])
    result = slm("eval", "--task", "<b>.jsonl", "--out", "out")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out and "\u202e" not in result.out
    page = Path("out/report.html").read_text()
    found = checked(page)  # without scripts, and with every tag closed
    assert '<script>alert("1")</script>&amp;</pre>\\x1b[31m\\u202e0' in found.text
    assert "\x1b" not in page and "\u202e" not in page
    stored = json.loads(Path("out/report.json").read_text())
    assert stored["replies"][1]["expected"] == f"{evil}1"


def test_choices(slm: Slm, exported: Path) -> None:
    rows = [{"prompt": f"{word} is", "completion": " big", "choices": ["big", "small"]} for word in WORDS[:4]]
    write("rows.jsonl", rows)
    both = compared(slm, exported / "checkpoint/best", exported / "onnx", "--task", "rows.jsonl")
    assert both["metric"] == "choice" and both["models"][0]["score"] == both["models"][1]["score"]
    assert all(each["reply"] == "small" for each in both["models"][0]["worst"])
    stored = json.loads(Path("runs/eval-rows/report.json").read_text())
    assert stored["replies"][0]["choices"] == ["big", "small"]


def test_tool_calls(slm: Slm, exported: Path) -> None:
    function = {"name": "set_light", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}}}
    calls = [{"function": {"name": "set_light", "arguments": {"on": True}}}]
    answers = [{"content": None, "tool_calls": calls}, {"content": "I cannot do that."}]
    rows = [
        {
            "tools": [{"type": "function", "function": function}],
            "messages": [{"role": "user", "content": "Do it."}, {"role": "assistant"} | answer],
        }
        for answer in answers
    ]
    write("rows.jsonl", rows)
    both = compared(slm, exported / "checkpoint/best", exported / "onnx", "--task", "rows.jsonl", "--max-tokens", "8")
    assert (both["metric"], both["metric_chosen_because"]) == ("tool-call", "replies call tools")
    for model in both["models"]:  # it makes no calls, which is right for the second row only
        assert model["score"] == 0.5 and model["further"] == {"names": 0.5, "valid": 1.0}
        (wrong,) = model["worst"]
        assert wrong["expected"] == '<tool_call>\n{"name": "set_light", "arguments": {"on": true}}\n</tool_call>'
    assert "&lt;tool_call&gt;" in Path("runs/eval-rows/report.html").read_text()
    options = ("--task", "rows.jsonl", "--max-tokens", "60", "--tool-choice", "required")
    forced = compared(slm, exported / "onnx", *options)
    (model,) = forced["models"]
    assert (both["models"][0]["tool_choice"], model["tool_choice"]) == (None, "required")
    report = json.loads(Path("runs/eval-rows/report.json").read_text())
    replies = [reply["reply"] for row in report["replies"] for reply in row["replies"]]
    assert len(replies) == 2 and all(each.startswith('<tool_call>\n{"name": "set_light", "') for each in replies)
    assert "--tool-choice required" in Path("runs/eval-rows/report.html").read_text()
    for row in rows:
        del row["tools"]
    write("undeclared.jsonl", rows)
    refused = slm("eval", exported / "onnx", "--task", "undeclared.jsonl", "--tool-choice", "auto")
    assert refused.code == 1 and "requires rows that declare tools" in refused.err
    refused = slm("eval", exported / "onnx", "--task", "rows.jsonl", "--metric", "exact", "--tool-choice", "auto")
    assert refused.code == 1 and "the metric is exact" in refused.err


def test_a_text_is_evaluated_with_an_adapter(
    slm: Slm, exported: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", exported / "checkpoint/best")
    Path("text.txt").write_text("Say one.")
    models = (adapter, exported / "checkpoint/best")
    with_it, without = (json.loads(slm("eval", each, "--data", "text.txt", "--json").out) for each in models)
    assert with_it["loss"] != without["loss"] and with_it["tokens"] == without["tokens"]
    assert with_it["next"] == f"slm export --onnx --adapter {adapter}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--metric", "f1"), "--metric requires --task"),
        (("--min", "0.5"), "--min requires --task"),
        (("--max-tokens", "5"), "--max-tokens requires --task"),
        (("--batch", "1"), "--batch requires --task"),
        (("--out", "x"), "--out requires --task"),
        (("runs/tiny/onnx", "runs/tiny/checkpoint/best"), "several models require --task"),
        (("--task", "rows.jsonl", "--data", "x.txt"), "--task is evaluated alone"),
        (("--task", "rows.jsonl", "--tasks", "piqa"), "--task is evaluated alone"),
        (("--task", "rows.jsonl", "--protocol", "windows"), "--task is evaluated alone"),
        (("--task", "rows.jsonl", "--tokens", "5"), "--task is evaluated alone"),
        (("--task", "rows.jsonl", "--metric", "bleu"), "'bleu' is not one of"),
        (("--task", "rows.jsonl", "--min", "90"), "'90' is not a share from 0 to 100%, such as 2% or 0.02"),
        (("--task", "rows.jsonl", "--min", "nan"), "'nan' is not a share"),
        (("--task", "rows.jsonl", "--min", "-1%"), "is not a share"),
        (("--task", "rows.jsonl", "--min", "90%%"), "is not a share"),
        (("--task", "rows.jsonl", "--batch", "0"), "--batch"),
        (("--task", ""), "the path is empty"),
    ],
)
def test_wrong_usage(slm: Slm, exported: Path, options: tuple[str, ...], said: str) -> None:
    result = slm("eval", *options)
    assert result.code == 2 and said in result.err and result.out == ""
    assert not Path("runs/eval-rows").exists()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "missing": (b"", "not found"),
    "empty": (b"\n \n", "there is no row in"),
    "broken": (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: not JSON"),
    "no-reply": (b'{"prompt": "a"}\n', "line 1: unknown kind of row (fields: prompt)"),
    "null-reply": (b'{"prompt": "a", "completion": null}\n', "line 1: unknown kind of row"),
    "blank-reply": (b'{"prompt": "a", "completion": " "}\n', "line 1: 'completion' is empty"),
    "number": (b'{"prompt": "a", "completion": 7}\n', "line 1: 'completion' is a number instead of text"),
    "array": (b"[1, 2]", "row 1: a number instead of an object"),
    "deep": (b"[" * 100_000, "not JSON"),
    "latin": (b'{"prompt": "caf\xe9", "completion": "b"}\n', "is not UTF-8 text"),
    "surrogate": (b'{"prompt": "\\ud800", "completion": "b"}\n', "half of a surrogate pair"),
    "unanswered": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "no message of the assistant's"),
    "large": (b'{"prompt": "' + b"a" * 9000 + b'", "completion": "b"}\n', "is longer than 8 KiB"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_rows_that_cannot_be_used_end_with_one_line(slm: Slm, exported: Path, kind: str) -> None:
    content, said = HOSTILE[kind]
    if content:
        Path(f"{kind}.jsonl").write_bytes(content)
    result = slm("eval", "--task", f"{kind}.jsonl", "--max-document-bytes", "8KiB")
    assert result.code == 1 and said in result.err and result.out == "", result.err
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err and "unexpected" not in result.err
    assert not [path for path in Path("runs").iterdir() if path.name.startswith((".", "eval"))]


def test_a_row_that_is_longer_than_the_context_scores_0(slm: Slm, exported: Path) -> None:
    write("rows.jsonl", [PAIRS[0], {"instruction": "word " * 2000, "output": "no"}])
    result = slm("eval", "--task", "rows.jsonl", "--json")
    (model,) = json.loads(result.out)["models"]
    assert result.code == 0 and model["too_long"] == 1
    page = Path("runs/eval-rows/report.html").read_text()
    assert "1 of 2 rows do not fit the context and score 0" in page and "(the row does not fit the context)" in page


def test_a_bundle_is_measured_without_torch(exported: Path) -> None:
    """As on an edge device, where neither torch nor onnx nor the training packages are installed."""
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors', 'datasets', 'pyarrow', 'yaml', 'gguf', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "from slm.cli.main import main\n"
        "main(['eval', 'runs/tiny/onnx', '--task', 'rows.jsonl', '--threads', '1', '--limit', '2', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2


def test_other_files_are_not_replaced(slm: Slm, exported: Path) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    result = slm("eval", "--task", "rows.jsonl", "--out", "mine")
    assert result.code == 1 and "mine exists and contains other files: notes.txt" in result.err
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_a_model_without_turns_takes_rows_without_turns(slm: Slm, exported: Path) -> None:
    """A conversation needs turn tokens; prompt and completion do not."""
    from slm.core.tokenizer import Tokenizer

    place = exported / "checkpoint/best"
    text = (place / "tokenizer.json").read_text().replace("<start_of_turn>", "<unused>")
    (place / "tokenizer.json").write_text(text)
    assert Tokenizer.load(place).token_id("<start_of_turn>") is None
    result = slm("eval", place, "--task", "rows.jsonl")
    assert result.code == 1 and "the tokenizer has no <start_of_turn>" in result.err
    write("plain.jsonl", [{"prompt": "Say one.", "completion": " one"}])
    assert slm("eval", place, "--task", "plain.jsonl").code == 0
