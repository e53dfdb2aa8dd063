"""The common options of commands that generate text, with the same names and headings."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import say
from slm.cli.options import (
    Loading,
    Real,
    Whole,
    adapter_type,
    allow_slow_option,
    collects_loading,
    cuda_graph_option,
    threads_option,
    trust_option,
)
from slm.core.arguments import MAX_COUNT
from slm.core.errors import SlmError
from slm.steps.arguments import MAX_SEED

if TYPE_CHECKING:
    from slm.runtime.backend import Decoder
    from slm.runtime.generation import Piece
    from slm.runtime.options import GenerationOptions

CHOOSING = (
    "logit_bias",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "greedy",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "seed",
)
ENDING = ("max_new_tokens", "stop", "on_full", "keep")


class Sections(click.Command):
    """Shows the options of `--help` under three headings; sampling options are in the order in which they are applied."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        lines = {each.name or "": line for each in options if (line := each.get_help_record(ctx))}
        others = [name for name in lines if name not in CHOOSING + ENDING]
        for title, names in (
            ("Options", others),
            ("End of the text", ENDING),
            ("Sampling, applied in this order", CHOOSING),
        ):
            with formatter.section(title):
                formatter.write_dl([lines[name] for name in names])


def _biases(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[int, float]:
    """Parses biases and returns them by token id."""
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            number, added = int(token), float(bias)
        except ValueError:
            number, added = -1, math.nan
        if not 0 <= number <= MAX_COUNT or not added < math.inf:  # rejects NaN
            raise click.BadParameter(f"{value!r} is not ID=VALUE, such as 42=-1.5, or 42=-inf to exclude a token")
        biases[number] = added
    return biases


_SHARE = Real(0, 1, min_open=True)


# In the order of `slm generate --help`.
_OPTIONS = (
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    cuda_graph_option,
    threads_option,
    click.option(
        "--draft",
        type=Whole(1, 1024),
        metavar="N",
        help="Read up to N tokens ahead where the text repeats: faster there, same tokens except for rounding.",
    ),
    click.option(
        "--adapter",
        type=adapter_type,
        metavar="ADAPTER",
        help="LoRA adapter: a PEFT directory, or an .onnx_adapter file; a bundle needs adapter slots.",
    ),
    trust_option,
    allow_slow_option,
    click.option("--max-new-tokens", type=Whole(1), default=256, show_default=True, metavar="N"),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End before this text (repeatable). In bash $'\\n' is a new line.",
    ),
    click.option(
        "--on-full",
        type=click.Choice(["stop", "slide"]),
        default="stop",
        show_default=True,
        help="When the context is full: stop, or drop its older half and continue.",
    ),
    click.option(
        "--keep",
        type=Whole(0),
        metavar="N",
        help="With --on-full slide: never drop the first N tokens. [default: the tokenizer's prefix, such as <bos>]",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        callback=_biases,
        metavar="ID=VALUE",
        help="Add VALUE to a token's logit (repeatable); -inf excludes the token.",
    ),
    click.option(
        "--repetition-penalty",
        type=Real(0, 100, min_open=True),
        default=1.0,
        show_default=True,
        metavar="R",
        help="Above 1 makes tokens of the prompt and the text less likely.",
    ),
    click.option(
        "--presence-penalty",
        type=Real(-100, 100),
        default=0.0,
        show_default=True,
        metavar="A",
        help="Subtracted once from the logit of each new token used so far.",
    ),
    click.option(
        "--frequency-penalty",
        type=Real(-100, 100),
        default=0.0,
        show_default=True,
        metavar="A",
        help="Subtracted from the logit of a new token for each use so far.",
    ),
    click.option("--greedy", is_flag=True, help="Take the most likely token; the options below have no effect then."),
    click.option(
        "--temperature",
        type=Real(0, 100),
        default=0.8,
        show_default=True,
        metavar="T",
        help="Divides the logits: below 1 favours likely tokens, above 1 unlikely ones; 0 is --greedy.",
    ),
    click.option(
        "--top-k",
        type=Whole(0),
        default=40,
        show_default=True,
        metavar="K",
        help="Keep the K most likely tokens; 0 keeps all.",
    ),
    click.option(
        "--top-p",
        type=_SHARE,
        default=0.95,
        show_default=True,
        metavar="P",
        help="Keep the most likely tokens whose total probability reaches P.",
    ),
    click.option(
        "--min-p",
        type=Real(0, 1),
        default=0.0,
        show_default=True,
        metavar="P",
        help="Keep tokens at least P times as likely as the most likely one.",
    ),
    click.option(
        "--typical-p",
        type=_SHARE,
        default=1.0,
        show_default=True,
        metavar="P",
        help="Keep the tokens closest to the expected surprise whose total probability reaches P.",
    ),
    click.option(
        "--seed",
        type=Whole(0, MAX_SEED),
        metavar="N",
        help="Random seed; the same seed gives the same text. [default: random, and printed]",
    ),
)


@dataclass(frozen=True)
class TextOptions:
    """The options of `slm generate` and `slm chat` for running a model, ending a text and sampling.

    Attributes:
        loading: How the model is loaded.
        draft: The longest draft of prompt-lookup decoding; None disables drafts.
        adapter: The LoRA adapter.
        generation: The options of `Model.pieces`.
    """

    loading: Loading
    draft: int | None
    adapter: Path | None
    generation: "GenerationOptions"


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options for running a model, ending a text and sampling. The command gets them as one argument, `options`."""

    @collects_loading
    @wraps(command)
    def collected(loading: Loading, draft: int | None, adapter: Path | None, greedy: bool, **others: Any) -> Any:
        generation: Any = {name: others.pop(name) for name in (*CHOOSING, *ENDING) if name != "greedy"}
        if generation["keep"] is not None and generation["on_full"] != "slide":
            raise click.UsageError("--keep requires --on-full slide")
        generation["stop"] = [utf8(each, "stop text") for each in generation["stop"]]
        if greedy:
            generation["temperature"] = 0.0
        return command(options=TextOptions(loading, draft, adapter, generation), **others)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    return collected


def say_backend(path: object, decoder: "Decoder", loading: Loading) -> None:
    """Prints how a model is run, and what makes it slow or less accurate on this machine."""
    say(f"{path}: {decoder.description}")
    warn_of_saturation(decoder)
    warn_of_conversions(decoder, loading["device"])


def listen(pieces: "Iterable[Piece]", *, show: bool) -> "tuple[list[Piece], bool]":
    """Shows the text as it is generated. Returns the pieces, and whether Ctrl-C ended them.

    Raises:
        KeyboardInterrupt: If Ctrl-C comes before the first piece.
    """
    made: list[Piece] = []
    try:
        for piece in pieces:
            made.append(piece)
            if show:
                click.echo(piece.text, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not made:
            raise
        return made, True
    return made, False


def utf8(text: str, what: str) -> str:
    """Returns the text. Bytes that are not UTF-8 arrive from the shell as lone surrogates.

    Raises:
        SlmError: If there are such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SlmError(
            f"the {what} is not UTF-8 text (character {error.start})", "convert it, for example with iconv"
        ) from None
    return text


def warn_of_saturation(decoder: object) -> None:
    """Warns if a bundle's weights were rounded again because its 8-bit products would saturate on this CPU."""
    from slm.runtime.decoder import OnnxDecoder
    from slm.runtime.products import saturates

    if isinstance(decoder, OnnxDecoder) and saturates(decoder.bundle):
        say(
            "warning: the 8-bit products of this bundle would saturate on this CPU, which has no VNNI. slm rounded the weights "
            "again in memory; to do this once, run slm quantize --int8-dynamic again."
        )


def warn_of_conversions(decoder: object, device: str) -> None:
    """Prints a note if a bundle is slow on a device because it was exported for another one."""
    from slm.runtime.placement import conversion_notes

    for note in conversion_notes(decoder, "cuda" if device == "cuda" else "cpu"):
        say(note)
