"""`slm.train` and the other steps have the options of their commands: names, defaults, choices and ranges."""

import inspect
import re
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_overloads

import click
import pytest

import slm
from slm.cli.main import cli
from slm.steps.arguments import Range
from slm.steps.evaluating import evaluate
from slm.steps.exporting import export
from slm.steps.finetuning import finetune
from slm.steps.quantizing import quantize
from slm.steps.training import train

ONE_CHOICE = "the flags of one choice are one argument"
COMMANDS: dict[Callable[..., Any], str] = {
    train: "train",
    finetune: "finetune",
    export: "export",
    quantize: "quantize",
    evaluate: "eval",
}
# Options without an argument, and arguments without an option, with the reason.
ONLY_IN_THE_COMMAND = {
    train: {"dry_run": "prints an estimate, and trains nothing", "on": "belongs to --dry-run"},
    finetune: {"dry_run": "prints an estimate, and trains nothing"},
    export: dict.fromkeys(("onnx", "gguf", "onnx_adapter"), ONE_CHOICE),
    quantize: dict.fromkeys(("int8", "int8_dynamic", "int4"), ONE_CHOICE) | {"sweep": "a study, which makes no bundle"},
    evaluate: {},
}
ONLY_IN_PYTHON = {
    export: {"format": ONE_CHOICE},
    quantize: {"precision": ONE_CHOICE},
}


def command_of(step: Callable[..., Any]) -> click.Command:
    command = cli.get_command(click.Context(cli), COMMANDS[step])
    assert command is not None
    return command


def options_of(step: Callable[..., Any]) -> dict[str, click.Parameter]:
    """The options and arguments of a step's command by their names, --json left out."""
    found = {}
    for each in command_of(step).params:
        longest = max((option for option in each.opts), key=len).lstrip("-").replace("-", "_")
        assert isinstance(each, click.Argument) or longest == each.name or longest == "json"
        found[longest] = each
    assert found.pop("json").name == "as_json"
    return found


def arguments_of(step: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(step).parameters)
    assert found.pop("progress").default is True
    return found


def differences(step: Callable[..., Any], options: set[str], arguments: set[str]) -> set[str]:
    """The names that only one of the two has, without the listed ones."""
    listed = ONLY_IN_THE_COMMAND[step].keys() | ONLY_IN_PYTHON.get(step, {}).keys()
    return (options ^ arguments) - listed


@pytest.mark.parametrize("step", COMMANDS, ids=COMMANDS.get)
def test_names_are_the_command_s(step: Callable[..., Any]) -> None:
    options, arguments = set(options_of(step)), set(arguments_of(step))
    assert differences(step, options, arguments) == set()
    assert ONLY_IN_THE_COMMAND[step].keys() == options - arguments  # none is listed in vain
    assert ONLY_IN_PYTHON.get(step, {}).keys() == arguments - options
    assert differences(step, options | {"new"}, arguments) == {"new"} == differences(step, options, arguments | {"new"})


@pytest.mark.parametrize("step", COMMANDS, ids=COMMANDS.get)
def test_defaults_are_the_command_s(step: Callable[..., Any]) -> None:
    given = command_of(step).make_context("slm", [], resilient_parsing=True).params
    arguments = arguments_of(step)
    shared = arguments.keys() & given.keys()
    assert len(shared) >= 9
    assert {name: arguments[name].default for name in shared} == {name: given[name] for name in shared}


def accepted(annotation: Any) -> list[Any]:
    """The types that an annotation consists of, None left out."""
    if get_origin(annotation) in (Union, UnionType):
        return [each for part in get_args(annotation) for each in accepted(part)]
    return [] if annotation is NoneType else [annotation]


@pytest.mark.parametrize("step", COMMANDS, ids=COMMANDS.get)
def test_choices_and_ranges_are_the_command_s(step: Callable[..., Any]) -> None:
    arguments, checked = arguments_of(step), 0
    for name, option in options_of(step).items():
        if name not in arguments:
            continue
        kinds = accepted(arguments[name].annotation)
        if getattr(option, "multiple", False) and isinstance(option.type, click.Choice):
            kinds = [inner for kind in kinds for inner in get_args(kind)]
        if isinstance(option.type, click.Choice):
            assert all(get_origin(kind) is Literal for kind in kinds), name
            assert [str(value) for kind in kinds for value in get_args(kind)] == list(option.type.choices), name
            checked += 1
        if isinstance(option.type, click.IntRange | click.FloatRange):
            (kind,) = kinds
            assert get_origin(kind) is Annotated, name
            number, within = get_args(kind)
            assert number is (int if isinstance(option.type, click.IntRange) else float), name
            shown = option.type.min, option.type.max, option.type.min_open, option.type.max_open
            assert shown == (within.least, within.most, within.least_open, within.most_open), name
            checked += 1
    assert checked >= 2


def test_types_for_type_checkers_are_those_of_the_function() -> None:
    """The overloads of `evaluate` name its arguments again."""
    of_rows, of_text = (
        get_args(inspect.signature(each).parameters["options"].annotation)[0]
        for each in get_overloads(inspect.unwrap(evaluate))
    )
    either = of_rows.__annotations__.keys() | of_text.__annotations__.keys()
    assert either | {"models", "task"} == arguments_of(evaluate).keys() | {"progress"}


@pytest.mark.parametrize("step", COMMANDS, ids=COMMANDS.get)
def test_every_argument_is_documented(step: Callable[..., Any]) -> None:
    text = inspect.getdoc(step) or ""
    documented = [
        line.strip().partition(":")[0] for line in text.partition("Args:")[2].partition("\n\n")[0].splitlines()
    ]
    assert [name for name in inspect.signature(step).parameters if name not in documented] == []


def shown(name: str) -> str:
    """A function's signature without types, as docs/python.md has it."""
    parts: list[str] = []
    for each in inspect.signature(getattr(slm, name)).parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(each.name if each.default is each.empty else f"{each.name}={each.default!r}")
    return "\n".join(textwrap.wrap(f"slm.{name}({', '.join(parts)})", 120, subsequent_indent="    "))


def test_the_document_has_every_signature() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    names = ("train", "finetune", "export", "quantize", "evaluate", "load", "load_ensemble")
    block = re.search(r"```text\n(.*?)\n```", page, flags=re.DOTALL)
    assert block is not None and block[1] == "\n".join(map(shown, names))


def test_the_document_says_which_options_are_commands_only() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    for listed in ONLY_IN_THE_COMMAND.values():
        assert all(f"--{name.replace('_', '-')}`" in page for name in listed)


def test_the_packages_of_the_same_names_are_the_functions() -> None:
    import_module("slm.train.recipe")  # which makes `slm.train` a package
    for step, name in ((train, "train"), (finetune, "finetune"), (export, "export"), (quantize, "quantize")):
        package = getattr(slm, name)
        assert callable(package) and inspect.signature(package) == inspect.signature(step)
        assert package is import_module(f"slm.{name}")
    assert slm.evaluate is evaluate
    assert repr(Range(1, 4)) == "at least 1 and at most 4"
