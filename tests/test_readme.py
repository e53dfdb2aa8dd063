"""The README's commands, exactly as they stand there, on a little text and with a training that is cut short."""

import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from slm.cli.main import cli
from slm.core import sample
from slm.finetune import settings
from slm.train import closing, recipe, review, run  # noqa: F401  # import what `cut_short` patches before it does

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SHORT = (
    "schedule.micro_steps=6",
    "schedule.warmup_micro_steps=2",
    "evaluation.every_micro_steps=3",
    "evaluation.windows=4",
)


def block(heading: str) -> str:
    """The first indented block under a heading."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"(?:^    .*\n)+", section, flags=re.MULTILINE)
    assert found is not None
    return found[0]


def commands_under(heading: str) -> list[list[str]]:
    """The arguments of each `slm` in the first block under a heading."""
    lines = block(heading).replace(" && ", "\n    ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    assert all(command[0] == "slm" for command in commands)
    return [command[1:] for command in commands]


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run makes a few updates; without `--epochs`, fine-tuning takes three, not fifty as with so few rows."""
    load = recipe.load_recipe
    monkeypatch.setattr(recipe, "load_recipe", lambda name, overrides=(): load("tiny", [*SHORT, *overrides]))
    monkeypatch.setattr(settings, "default_epochs", lambda *_: 3)


@pytest.mark.slow
@pytest.mark.usefixtures("cut_short")
def test_own_text_and_own_assistant(slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("train.txt").write_text(sample.stories_path().read_text(encoding="utf-8")[:60_000])
    Path("valid.txt").write_text(sample.validation_path().read_text(encoding="utf-8")[:20_000])
    Path("chats.jsonl").write_text("".join(sample.pairs_path().read_text(encoding="utf-8").splitlines(True)[:24]))
    text, assistant = commands_under("Your own text"), commands_under("Your own assistant")
    assert [each[0] for each in text] == ["train", "eval", "export", "quantize", "verify", "generate"]
    assert [each[0] for each in assistant] == ["finetune", "export", "quantize", "chat", "serve", "web"]
    # The last two serve a page or write one, which tests/serve and tests/web cover.
    for command in (*text, *assistant[:4]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Name a colour.\n")))
        result = slm(*command)
        assert result.code == 0, (command, result.err)
    assert {command[1] for command in assistant[2:]} == {"--int8", "runs/tiny/onnx-chats-int8"}
    figures = json.loads(slm("eval", "--data", "valid.txt", "--json").out)
    assert figures["model"] == "runs/tiny/onnx-chats-int8"  # the reader's own model, not the one that ships
    made = {path.parent.relative_to("runs/tiny").as_posix() for path in Path("runs/tiny").rglob("slm.json")}
    assert made == {"checkpoint/best", "checkpoint/last", "adapters/chats"}
    bundles = {path.parent.name for path in Path("runs/tiny").rglob("manifest.json")}
    assert bundles == {"onnx", "onnx-int8", "onnx-chats", "onnx-chats-int8"}
    tuned = json.loads(Path("runs/tiny/onnx-chats/manifest.json").read_text())["provenance"]
    assert (tuned["checkpoint"], tuned["adapter"]) == ("runs/tiny/checkpoint/best", "runs/tiny/adapters/chats")
    assert slm("train", "--out", "runs/later").code == 0  # a later run does not take the adapter's base away
    result = slm("export", "--onnx", "--adapter", "runs/tiny/adapters/chats")
    assert (
        result.code == 0
        and "Using runs/tiny/checkpoint/best (the checkpoint that the adapter was trained on)." in result.err
    )
    program = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {}
    exec(program[1], names)
    assert names["logits"].shape == (1, 3, 1024)


def test_own_gemma(slm: Callable[..., Any], shared_checkpoint: Path) -> None:
    """With a small checkpoint in the place of the hub's."""
    imported, *others = commands_under("Your own Gemma")
    assert imported == ["import", "google/gemma-3-270m"]
    assert slm("import", shared_checkpoint).code == 0
    assert [command[0] for command in others] == ["trim", "export", "quantize", "export", "quantize"]
    assert others[0][-2:] == ["--keep", "32768"]
    others[0][-1] = "300"
    Path("text.txt").write_text("Once upon a time there was a small dog.\n" * 60)
    for command in others[:4]:  # the sweep is in tests/quantize
        result = slm(*command)
        assert result.code == 0, (command, result.err)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_failure_it_shows(slm: Callable[..., Any]) -> None:
    shown = re.search(r"    \$ slm (.*)\n    (error: .*)\n    (hint: .*)\n", README)
    assert shown is not None
    bundle = Path("runs/tiny/onnx-int8")
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text('{"precision": "int8"}')
    assert slm(*shown[1].split()).err == f"{shown[2]}\n{shown[3]}\n"


def test_the_parameter_counts_of_the_documents() -> None:
    from slm.core.presets import PRESETS

    docs = Path(__file__).parent.parent / "docs"
    model, sizes = ((docs / name).read_text(encoding="utf-8") for name in ("model.md", "experiments.md"))
    for name, config in PRESETS.items():
        assert f"{config.parameter_count():,}" in sizes
        if f"`{name}`" in model:
            assert f"{config.parameter_count():,}" in model
    assert f"{PRESETS['gemma3-270m'].parameter_count():,}" in model


@pytest.mark.slow
@pytest.mark.usefixtures("cut_short")
def test_the_demo_from_end_to_end(slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's figures, in a table and as JSON."""
    few = Path("pairs.jsonl")
    few.write_text("".join(sample.pairs_path().read_text(encoding="utf-8").splitlines(True)[:24]))
    monkeypatch.setattr(sample, "pairs_path", lambda: few)
    result = slm("demo", "--json", "--out", "runs/mine")
    assert result.code == 0, result.err
    shown = json.loads(result.out)
    steps = shown["steps"]
    assert steps["train"]["loss"] < steps["train"]["loss_before"]
    assert steps["finetune"]["loss_after"] < steps["finetune"]["loss_before"]
    assert 0 < steps["export"]["parity"] < 1e-4 and 0 < steps["export tuned"]["parity"] < 1e-4
    assert 0 < steps["quantize"]["kl_nats"] < 0.02
    assert shown["texts"]["bundle (float32)"] == shown["texts"]["checkpoint (PyTorch)"]
    assert slm("demo", "--out", "runs/mine").code == 1


def commands_of(text: str) -> list[list[str]]:
    """The arguments of each `slm` that stands in an indented block, comments, pipes and what starts it left out."""
    found = []
    for block in re.findall(r"(?:^ {4}.*\n)+", text.replace("\\\n", " "), flags=re.MULTILINE):
        for line in re.split(r"\n|&&|;", block):
            shown = re.match(r" *(?:\$ )?(?:torchrun .*-m )?slm (.*)", line)
            if shown is not None:
                found.append(shlex.split(re.split(r" [|>] ", shown[1])[0], comments=True))
    return found


@pytest.fixture
def nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of artifacts and files are taken as they stand: what documents name is not there."""
    monkeypatch.setattr("slm.core.names.resolve", lambda name, kinds, others=(): (Path(name), ()))
    monkeypatch.setattr("slm.cli.options.check_input", lambda *_, **__: None)


def parsed(arguments: list[str]) -> click.Context:
    """What the command line makes of arguments before anything is done."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        context = click.Context(command, info_name=name)
        inner = command.get_command(context, name)
        assert inner is not None, name
        command = inner
    return command.make_context(name, arguments)


def helps(command: click.Command, context: click.Context) -> Iterator[str]:
    """The help of a command and of those in it; what stands far behind an example is about it."""
    yield re.sub("^", "  ", re.sub(r"(?<=\S) {2,}", " # ", command.help or ""), flags=re.MULTILINE)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from helps(inner, context)


@pytest.mark.usefixtures("nothing_is_looked_for")
def test_every_command_of_the_documents_is_accepted() -> None:
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *(path for path in (root / "docs").glob("*.md") if path.name != "LOG.md")]
    found = {path.relative_to(root).as_posix(): commands_of(path.read_text(encoding="utf-8")) for path in pages}
    for name, count in (("README.md", 12), ("docs/bundles.md", 5), ("docs/experiments.md", 50)):
        assert len(found[name]) >= count, name
    found["--help"] = [command for text in helps(cli, click.Context(cli)) for command in commands_of(text)]
    assert len(found["--help"]) >= 30
    refused = []
    for name, commands in found.items():
        for command in commands:
            try:
                parsed(command)
            except click.UsageError as error:
                refused.append(f"{name}: slm {' '.join(command)}: {error.format_message()}")
    assert refused == []


@pytest.mark.usefixtures("nothing_is_looked_for")
@pytest.mark.parametrize(
    "line", ["slm info of a model", "slm export --int8", "slm data info", "torchrun -m slm train --lora"]
)
def test_what_is_no_command_is_noticed(line: str) -> None:
    """The control."""
    (command,) = commands_of(f"    {line} | jq\n")
    with pytest.raises(click.UsageError):
        parsed(command)


def unknown_in_text(text: str) -> list[str]:
    """Commands in backticks, which may be fragments, that name a command or an option that does not exist."""
    found = []
    for shown in re.findall(r"`slm ([a-z][^`|]*)`", text):
        words = shlex.split(shown)
        command: click.Command = cli
        while isinstance(command, click.Group) and words and command.get_command(click.Context(command), words[0]):
            command = command.get_command(click.Context(command), words.pop(0)) or command
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        named = [word.partition("=")[0].rstrip(",") for word in words if re.match(r"--?[a-z]", word)]
        if command is cli or not set(named) <= options | {"--help"}:
            found.append(shown)
    return found


def test_commands_in_sentences_exist() -> None:
    root = Path(__file__).parent.parent
    pages = [*root.glob("*.md"), *(path for path in (root / "docs").glob("*.md") if path.name != "LOG.md")]
    assert {page.name: found for page in pages if (found := unknown_in_text(page.read_text(encoding="utf-8")))} == {}


def test_an_unknown_option_in_a_sentence_is_noticed() -> None:
    """The control."""
    text = "`slm finetune rows --data rows.jsonl`, `slm quantize --int8`, `slm answer`, `slm data info --check DIR`"
    assert unknown_in_text(text) == ["finetune rows --data rows.jsonl", "answer"]


def test_no_document_has_a_place_left_to_fill() -> None:
    root = Path(__file__).parent.parent
    for document in (root / "README.md", root / "CHANGELOG.md", *(root / "docs").glob("*.md")):
        prose = re.sub(r"```.*?```|`[^`]*`|^    .*$", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
        assert not re.findall(r"\{[a-z_]+\}", prose), document.name
