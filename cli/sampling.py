"""What a command that generates text has in common with another: its options, under the same names and headings."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slm.cli.console import say
from slm.cli.options import (
    MAX_SEED,
    Real,
    Whole,
    adapter_type,
    allow_slow_option,
    cuda_graph_option,
    threads_option,
    trust_option,
)
from slm.core.arguments import MAX_COUNT
from slm.core.errors import SlmError

if TYPE_CHECKING:
    from slm.runtime.generation import Piece

Command = TypeVar("Command", bound=Callable[..., Any])

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
    """Shows the options under three headings; what chooses a token stands in the order in which it is applied."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes them."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        lines = {each.name or "": line for each in options if (line := each.get_help_record(ctx))}
        others = [name for name in lines if name not in CHOOSING + ENDING]
        for title, names in (
            ("Options", others),
            ("Where it ends", ENDING),
            ("Which token comes next, applied in this order", CHOOSING),
        ):
            with formatter.section(title):
                formatter.write_dl([lines[name] for name in names])


def _biases(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[int, float]:
    """Returns what is added to the logits of which tokens."""
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            number, added = int(token), float(bias)
        except ValueError:
            number, added = -1, math.nan
        if not 0 <= number <= MAX_COUNT or not added < math.inf:  # NaN is not
            raise click.BadParameter(f"{value!r} is not ID=VALUE, such as 42=-1.5, or 42=-inf to rule a token out")
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
        help="Read up to N tokens ahead where the text repeats: faster there, the same tokens but for rounding.",
    ),
    click.option(
        "--adapter",
        type=adapter_type,
        metavar="ADAPTER",
        help="Answer with this LoRA adapter: PEFT's directory, or an .onnx_adapter file; a bundle needs slots for it.",
    ),
    trust_option,
    allow_slow_option,
    click.option("--max-new-tokens", type=Whole(1), default=256, show_default=True, metavar="N"),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End before this text; may be repeated. In bash $'\\n' is a new line.",
    ),
    click.option(
        "--on-full",
        type=click.Choice(["stop", "slide"]),
        default="stop",
        show_default=True,
        help="When the context is full: stop, or forget its older half and go on.",
    ),
    click.option(
        "--keep",
        type=Whole(0),
        metavar="N",
        help="With --on-full slide: never forget the first N tokens. [default: what begins a text, such as <bos>]",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        callback=_biases,
        metavar="ID=VALUE",
        help="Add to a token's logit; may be repeated. -inf rules it out.",
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
        help="Subtracted from the logit of each token that the text has used.",
    ),
    click.option(
        "--frequency-penalty",
        type=Real(-100, 100),
        default=0.0,
        show_default=True,
        metavar="A",
        help="Subtracted once for each time that the text has used it.",
    ),
    click.option("--greedy", is_flag=True, help="Take the likeliest token; what follows has no effect then."),
    click.option(
        "--temperature",
        type=Real(0, 100),
        default=0.8,
        show_default=True,
        metavar="T",
        help="Below 1 prefers what is likely; above 1 evens it out; 0 is --greedy.",
    ),
    click.option(
        "--top-k",
        type=Whole(0),
        default=40,
        show_default=True,
        metavar="K",
        help="Keep the K likeliest tokens; 0 keeps all.",
    ),
    click.option(
        "--top-p",
        type=_SHARE,
        default=0.95,
        show_default=True,
        metavar="P",
        help="Keep the likeliest whose probabilities reach P together.",
    ),
    click.option(
        "--min-p",
        type=Real(0, 1),
        default=0.0,
        show_default=True,
        metavar="P",
        help="Keep those at least P times as likely as the likeliest.",
    ),
    click.option(
        "--typical-p",
        type=_SHARE,
        default=1.0,
        show_default=True,
        metavar="P",
        help="Keep those that surprise about as much as expected, until they reach P together.",
    ),
    click.option(
        "--seed",
        type=Whole(0, MAX_SEED),
        metavar="N",
        help="Same seed, same output. [default: one is drawn and printed]",
    ),
)


def generation_options(command: Command) -> Command:
    """Adds the options that say where a model runs, where a text ends and which token comes next."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def listen(pieces: "Iterable[Piece]", *, show: bool) -> "tuple[list[Piece], bool]":
    """Returns the pieces and whether Ctrl-C ended them; shows their text as it comes.

    Raises:
        KeyboardInterrupt: When it came before the first.
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
    """Returns the text; bytes that are no UTF-8 come from the shell as lone surrogates.

    Raises:
        SlmError: When there are such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SlmError(
            f"the {what} is not UTF-8 text (character {error.start})", "convert it, for example with iconv"
        ) from None
    return text


def warn_of_saturation(decoder: object) -> None:
    """Says when a bundle's products come out wrong on this CPU."""
    from slm.core.machine import instruction_sets, products_saturate
    from slm.runtime.decoder import OnnxDecoder

    if not isinstance(decoder, OnnxDecoder):
        return
    quantization = decoder.bundle.manifest.quantization
    schemes = [] if quantization is None else quantization.schemes.values()
    if any(scheme.dynamic and not scheme.reduced for scheme in schemes) and products_saturate(instruction_sets()):
        say("warning: no VNNI here, so products of 8-bit integers saturate: slm quantize --int8-dynamic --reduce-range")


def warn_of_conversions(decoder: object, device: str) -> None:
    """Says when a bundle is slow on a device because it was exported for another one."""
    from slm.runtime.backend import DecoderAround
    from slm.runtime.decoder import OnnxDecoder
    from slm.runtime.ensemble import EnsembleDecoder
    from slm.runtime.placement import conversion_note

    while isinstance(decoder, DecoderAround):
        decoder = decoder.decoder
    for each in decoder.decoders if isinstance(decoder, EnsembleDecoder) else (decoder,):
        if isinstance(each, OnnxDecoder) and (
            note := conversion_note(each.bundle, "cuda" if device == "cuda" else "cpu")
        ):
            say(note)
