"""`slm generate`: every option changes something, wrong values get one line, Ctrl-C ends the text and not the command."""

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.cli.commands.generate import generate
from slm.cli.sampling import CHOOSING, ENDING
from slm.core.manifest import Bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.sampling import Sampling

# Runs slm and says when a text has begun.
COUNTING = Path(__file__).parent / "scripts" / "slm_counting.py"

Slm = Callable[..., Any]
# Sampling bold enough for every option to matter.
BOLD = ("-p", "The", "--max-new-tokens", "30", "--temperature", "1.5", "--top-p", "1", "--seed", "0")


@pytest.fixture
def ask(slm: Slm, shared_bundle: Bundle) -> Callable[..., Any]:
    """Generates with --json on a random model."""

    def run(*options: object) -> Any:
        result = slm("generate", shared_bundle.path, *BOLD, "--json", *options)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "1"),
        ("--temperature", "0.5"),
        ("--top-k", "3"),
        ("--top-p", "0.3"),
        ("--min-p", "0.9"),
        ("--typical-p", "0.3"),
        ("--repetition-penalty", "2"),
        ("--presence-penalty", "3"),
        ("--frequency-penalty", "3"),
        ("--greedy",),
    ],
)
def test_what_chooses_changes_the_tokens(ask: Callable[..., Any], options: tuple[str, ...]) -> None:
    assert ask(*options)["tokens"] != ask()["tokens"]


def test_a_bias_rules_tokens_in_and_out(ask: Callable[..., Any]) -> None:
    assert set(ask("--logit-bias", "70=1000")["tokens"]) == {70}
    first = ask("--greedy")["tokens"][0]
    assert first not in ask("--greedy", "--logit-bias", f"{first}=-inf")["tokens"]
    assert set(ask("--logit-bias", "70=1000", "--logit-bias", "71=2000")["tokens"]) == {71}


def test_penalties_make_greedy_texts_less_repetitive(ask: Callable[..., Any]) -> None:
    plain = len(set(ask("--greedy")["tokens"]))
    for name in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert len(set(ask("--greedy", name, "50")["tokens"])) == 30 > plain


def test_a_stop_text_ends_the_answer(ask: Callable[..., Any]) -> None:
    free = ask()["text"]
    stop = free[len(free) // 2 :][:2]
    told = ask("--stop", "never there", "--stop", stop)
    assert told["text"] == free[: free.index(stop)] and told["stopped"] == "stop"


def test_a_stop_text_is_not_shown_as_it_streams(slm: Slm, shared_bundle: Bundle, ask: Callable[..., Any]) -> None:
    free = ask()["text"]
    stop = free[len(free) // 2 :][:2]
    result = slm("generate", shared_bundle.path, *BOLD, "--stop", stop)
    assert result.out == f"The{free[: free.index(stop)]}\n" and "stopped at a stop text" in result.err


def test_logprobs_of_each_token(ask: Callable[..., Any]) -> None:
    assert "logprobs" not in ask()
    told = ask("--logprobs", "2")
    assert [each["token"] for each in told["logprobs"]] == told["tokens"]
    for each in told["logprobs"]:
        assert each["logprob"] <= each["top"][0]["logprob"] <= 0 and len(each["top"]) == 2
        assert math.exp(each["top"][0]["logprob"]) + math.exp(each["top"][1]["logprob"]) <= 1
        assert isinstance(each["text"], str)
    assert all(each["top"] == [] for each in ask("--logprobs", "0")["logprobs"])


def test_a_full_context_stops_or_slides(slm: Slm, shared_bundle: Bundle) -> None:
    common = ("generate", shared_bundle.path, "-p", "x" * 240, "--max-new-tokens", "200", "--greedy")
    common += ("--logit-bias", "0=-inf", "--logit-bias", "2=-inf")  # what ends a text
    stopped, slid, kept = (
        json.loads(slm(*common, "--json", *more).out)
        for more in ((), ("--on-full", "slide"), ("--on-full", "slide", "--keep", "100"))
    )
    assert stopped["stopped"] == "context" and stopped["slides"] == 0 and len(stopped["tokens"]) < 200
    assert slid["stopped"] == "length" and slid["slides"] == 2 and len(slid["tokens"]) == 200
    assert slid["tokens"][: len(stopped["tokens"])] == stopped["tokens"]
    assert kept["slides"] > slid["slides"]
    assert "stopped at a full context (--on-full slide continues)" in slm(*common).err
    assert "the older half of the full context dropped 2 times" in slm(*common, "--on-full", "slide").err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--logit-bias", "5"), 2, "'5' is not ID=VALUE, such as 42=-1.5"),
        (("--logit-bias", "x=1"), 2, "'x=1' is not ID=VALUE"),
        (("--logit-bias", "5=nan"), 2, "'5=nan' is not ID=VALUE"),
        (("--logit-bias", "320=1"), 1, "logit_bias has token id 320; ids are from 0 to 319"),
        (("--min-p", "2"), 2, "--min-p"),
        (("--typical-p", "0"), 2, "--typical-p"),
        (("--repetition-penalty", "0"), 2, "--repetition-penalty"),
        (("--presence-penalty", "nan"), 2, "'nan' is not a number"),
        (("--frequency-penalty", "x"), 2, "--frequency-penalty"),
        (("--stop", ""), 1, "a stop text is empty"),
        (("--stop", "\udcff"), 1, "the stop text is not UTF-8"),
        (("--logprobs", "1"), 2, "--logprobs requires --json"),
        (("--logprobs", "999", "--json"), 1, "logprobs is 999; it must be from 0 to 320"),
        (("--on-full", "wrap"), 2, "--on-full"),
        (("--keep", "3"), 2, "--keep requires --on-full slide"),
        (("--keep", "255", "--on-full", "slide"), 1, "keep is 255"),
        (tuple(each for i in range(320) for each in ("--logit-bias", f"{i}=-inf")), 1, "no token can be chosen"),
    ],
)
def test_wrong_values_get_one_line(
    slm: Slm, shared_bundle: Bundle, options: tuple[str, ...], code: int, said: str
) -> None:
    result = slm("generate", shared_bundle.path, "-p", "The", *options)
    assert result.code == code and result.out in ("", "The"), result
    lines = result.err.strip().split("\n")
    assert sum(line.startswith("error: ") for line in lines) == 1 and said in result.err
    assert "unexpected" not in result.err and lines[-1].startswith(("error: ", "hint: "))


def test_the_help_has_every_option_once(slm: Slm) -> None:
    shown = slm("generate", "--help").out
    names = [parameter.name for parameter in generate.params]
    assert set(CHOOSING) | set(ENDING) < set(names)
    for parameter in generate.params:
        if parameter.param_type_name == "option":
            assert (
                sum(line.split()[0].rstrip(",") in parameter.opts for line in shown.splitlines() if line.strip()) == 1
            )
    order = [shown.index("\n  --" + name.replace("_", "-")) for name in CHOOSING]
    assert order == sorted(order)


def test_the_defaults_are_those_of_python() -> None:
    """Written twice, so that the help waits for no numpy."""
    defaults = {parameter.name: parameter.default for parameter in generate.params}
    for field in fields(Sampling):
        if field.name not in ("logit_bias", "seed"):  # neither has one
            assert defaults[field.name] == field.default


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_the_text(as_json: bool, tmp_path: Path) -> None:
    command = ("generate", "-p", "Once upon a time", "--threads", "1", "--stop", "a text that never comes")
    command += ("--max-new-tokens", "1000000", "--on-full", "slide", "--logit-bias", "0=-inf")
    with subprocess.Popen(
        [sys.executable, str(COUNTING), *command, *(("--json",) if as_json else ())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        if as_json:
            while "token read" not in process.stderr.readline():
                pass
            begun = ""
        else:
            begun = process.stdout.read(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "error" not in err and "Traceback" not in err
    if as_json:
        told = json.loads(out)
        assert told["stopped"] == "interrupted" and len(told["tokens"]) > 20 and told["decode_tok_s"] > 0
    else:
        assert begun.startswith("Once upon a time") and out.endswith("\n") and "stopped at Ctrl-C" in err


def test_drafts_change_the_time_alone(ask: Callable[..., Any], slm: Slm, shared_bundle: Bundle) -> None:
    for options in (("--greedy", "--max-new-tokens", "100"), ("--seed", "2"), ("--repetition-penalty", "1.3")):
        plain, drafted = ask(*options), ask(*options, "--draft", "6")
        assert plain["tokens"] == drafted["tokens"]
        assert "drafted" not in plain and "drafts of up to 6" in drafted["backend"]
        if "--greedy" in options:
            assert drafted["drafted"] >= drafted["accepted"] > 0
    result = slm("generate", shared_bundle.path, "-p", "The", "--greedy", "--draft", "6")
    assert "drafted tokens accepted" in result.err and "almost equally likely" not in result.err
    assert slm("generate", shared_bundle.path, "--draft", "0").code == 2


def test_drafts_that_may_change_the_text_are_said_to(slm: Slm, shared_bundle: Bundle, tmp_path: Path) -> None:
    """Kernels add up a token by itself in another order; with INT8 caches and blocks of 64 and less they do not."""
    for cache, said in (("float32", True), ("int8", False)):
        out = tmp_path / cache
        text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
        quantize_bundle(shared_bundle, out, text, Settings(gate=Gate(1), cache=cache, block_size=32))[0]  # type: ignore[arg-type]
        for threads, alike in (("1", not said), ("5", False)):  # the model has four heads
            result = slm("generate", out, "-p", "The", "--draft", "6", "--threads", threads, "--max-new-tokens", "3")
            assert ("almost equally likely" not in result.err) == alike, result.err


def test_a_seed_is_drawn_and_printed_and_repeats_the_text(slm: Slm, shared_bundle: Bundle) -> None:
    command = ("generate", shared_bundle.path, "-p", "The", "--max-new-tokens", "20", "--temperature", "1.5")
    first, second = slm(*command), slm(*command)
    (seed,) = re.findall(r"^seed: (\d+) \(--seed \1 generates the same text\)$", first.err, flags=re.MULTILINE)
    assert (
        first.out != second.out == slm(*command, "--seed", re.findall(r"^seed: (\d+)", second.err, re.MULTILINE)[0]).out
    )
    assert slm(*command, "--seed", seed).out == first.out
    told = json.loads(slm(*command, "--json").out)
    assert json.loads(slm(*command, "--json", "--seed", told["seed"]).out)["tokens"] == told["tokens"]
    greedy = slm(*command, "--greedy")
    assert "seed" not in greedy.err and json.loads(slm(*command, "--greedy", "--json").out)["seed"] is None


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1.5", "nan"])
def test_a_seed_that_cannot_be_is_wrong_usage(slm: Slm, shared_bundle: Bundle, seed: str) -> None:
    result = slm("generate", shared_bundle.path, "-p", "The", "--seed", seed)
    assert result.code == 2 and "--seed" in result.err
    assert slm("generate", shared_bundle.path, "-p", "The", "--max-new-tokens", "1", "--seed", 2**63 - 1).code == 0
