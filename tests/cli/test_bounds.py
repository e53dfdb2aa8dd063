"""Every number that a command takes has bounds: what is out of range, endless or no number ends with a usage error."""

from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

import slm as package
from slm.cli.main import cli
from slm.cli.options import MAX_SEED, Real, Whole
from slm.core.errors import SlmError
from slm.core.machine import MAX_THREADS
from slm.core.manifest import Bundle
from slm.finetune.settings import FinetuneSettings
from slm.runtime.sampling import Sampling


def options(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Parameter]]:
    """Yields every parameter of every command, with the command's words."""
    yield from ((path, parameter) for parameter in command.params)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from options(inner, (*path, name))


def unbounded(command: click.Command) -> list[str]:
    """Returns the numeric options that have no bounds, or take NaN."""
    found = []
    for path, parameter in options(command):
        kind = parameter.type
        if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
            bounded = getattr(kind, "min", None) is not None and getattr(kind, "max", None) is not None
            if not bounded or (isinstance(kind, click.types.FloatParamType) and not isinstance(kind, Real)):
                found.append(" ".join((*path, parameter.opts[0])))
    return found


def test_every_numeric_option_has_both_bounds() -> None:
    # The server's are bounded where they are declared.
    assert [each for each in unbounded(cli) if not each.startswith("serve ")] == []


def test_the_test_notices() -> None:
    @click.command()
    @click.option("--a", type=int)
    @click.option("--b", type=click.IntRange(min=1))
    @click.option("--c", type=click.FloatRange(0, 1))
    @click.option("--d", type=Whole(1, 5))
    @click.option("--e", type=Real(0, 5))
    def command(**_: Any) -> None: ...

    assert unbounded(command) == ["--a", "--b", "--c"]


NUMERIC = [
    (path, parameter.opts[-1])
    for path, parameter in options(cli)
    if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType) and path != ("serve",)
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", str(10**30), str(-(10**30)), "", "x"])
def test_no_numeric_option_takes_nonsense(slm: Callable[..., Any], value: str) -> None:
    for path, option in NUMERIC:
        result = slm(*path, f"{option}={value}")
        assert result.code == 2 and option in result.err and "Traceback" not in result.err, (path, option)


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "--target-size", "nan"], ["quantize", "--target-size", "inf"], ["quantize", "--target-size", "1e30"],
        ["quantize", "--target-size", "-5MB"], ["quantize", "--max-ppl-increase", "nan%"],
        ["quantize", "--max-ppl-increase", "1e30"], ["bench", "--prompt", str(10**18)], ["bench", "--batch", "nan"],
        ["generate", "--logit-bias", "5=nan"], ["generate", "--logit-bias", "5=inf"],
        ["generate", "--logit-bias", f"{10**30}=1"], ["generate", "--threads", "100000"],
    ],
)  # fmt: skip
def test_numbers_that_are_written_otherwise_are_bounded_too(slm: Callable[..., Any], words: list[str]) -> None:
    result = slm(*words)
    assert result.code == 2 and words[-2] in result.err and "Traceback" not in result.err


def test_what_is_usual_is_taken(slm: Callable[..., Any], shared_bundle: Bundle) -> None:
    words = ["-p", "One", "--max-new-tokens", 3, "--threads", 1, "--temperature", 2, "--top-k", 0, "--seed", MAX_SEED]
    result = slm("generate", shared_bundle.path, *words, "--presence-penalty", -2, "--logit-bias", "5=-inf")
    assert result.code == 0, result.err


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 10**18, float("nan"), True])
def test_threads_are_bounded_in_python(shared_bundle: Bundle, shared_checkpoint: Any, threads: Any) -> None:
    for path in (shared_bundle.path, shared_checkpoint):
        with pytest.raises(SlmError, match="threads"):
            package.load(path, threads=threads)


NOT_NUMBERS = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "seed",
    ],
)
def test_sampling_takes_only_numbers(name: str, value: float) -> None:
    with pytest.raises(SlmError, match=name):
        Sampling(**{name: value})


def test_seeds_and_counts_have_a_largest_value(shared_bundle: Bundle) -> None:
    Sampling(seed=MAX_SEED)
    for changes in ({"seed": 2**64}, {"seed": -1}, {"top_k": 2**31}, {"logit_bias": {5: float("nan")}}):
        with pytest.raises(SlmError):
            Sampling(**changes)
    model = package.load(shared_bundle.path, threads=1)
    for count in (0, -1, 2**31, 1.5, float("nan")):
        with pytest.raises(SlmError, match="max_new_tokens"):
            model.generate("One", max_new_tokens=count)


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("name", ["learning_rate", "dropout", "max_grad_norm"])
def test_settings_take_only_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        FinetuneSettings(**{name: value})


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", ".inf", "1e400"])
def test_recipes_take_only_numbers(slm: Callable[..., Any], value: str) -> None:
    result = slm("train", "--data", "nosuch.txt", "--set", f"schedule.learning_rate={value}")
    assert result.code != 0 and "learning_rate" in result.err and "Traceback" not in result.err
