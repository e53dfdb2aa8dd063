"""`slm generate`."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import print_json, say, say_if_not_exported
from slm.cli.options import Artifact, json_option, seed_option
from slm.core.chat import turn_ids
from slm.core.errors import SlmError
from slm.core.machine import peak_rss_mib, return_freed_memory
from slm.core.runs import newest_bundle

if TYPE_CHECKING:
    from slm.core.tokenizer import Tokenizer
    from slm.runtime.generate import Run
    from slm.runtime.streaming import Piece

# What a shell says of a command that Ctrl-C ended.
_INTERRUPTED = 130

_CHOOSING = (
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
_ENDING = ("max_new_tokens", "stop", "on_full", "keep")


class _Sections(click.Command):
    """Shows the options under three headings; what chooses a token stands in the order in which it is applied."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        lines = {each.name or "": line for each in options if (line := each.get_help_record(ctx))}
        others = [name for name in lines if name not in _CHOOSING + _ENDING]
        for title, names in (
            ("Options", others),
            ("Where it ends", _ENDING),
            ("Which token comes next, applied in this order", _CHOOSING),
        ):
            with formatter.section(title):
                formatter.write_dl([lines[name] for name in names])


def _biases(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[int, float]:
    """Returns what is added to the logits of which tokens."""
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is not ID=VALUE, such as 42=-1.5, or 42=-inf to rule a token out"
            ) from None
    return biases


_SHARE = click.FloatRange(min=0, min_open=True, max=1)


@click.command(cls=_Sections)
@click.argument("model", type=Artifact(), required=False)
@click.option("-p", "--prompt", default="", help='The text to continue; "-" reads standard input.')
@click.option("--instruct", is_flag=True, help="Ask as a user's turn, for a model tuned on instructions.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: usable physical cores]")
@click.option(
    "--draft",
    type=click.IntRange(min=1),
    metavar="N",
    help="Read up to N tokens ahead where the text repeats: faster there, the same tokens but for rounding.",
)
@json_option
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --json: each token's log-probability and the N likeliest there, as the model has them, before any option "
    "changes them.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated. In bash $'\\n' is a new line."
)
@click.option(
    "--on-full",
    type=click.Choice(["stop", "slide"]),
    default="stop",
    show_default=True,
    help="When the context is full: stop, or forget its older half and go on.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --on-full slide: never forget the first N tokens. [default: what begins a text, such as <bos>]",
)
@click.option(
    "--logit-bias",
    multiple=True,
    callback=_biases,
    metavar="ID=VALUE",
    help="Add to a token's logit; may be repeated. -inf rules it out.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="R",
    help="Above 1 makes tokens of the prompt and the text less likely.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    metavar="A",
    help="Subtracted from the logit of each token that the text has used.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    metavar="A",
    help="Subtracted once for each time that the text has used it.",
)
@click.option("--greedy", is_flag=True, help="Take the likeliest token; what follows has no effect then.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    metavar="T",
    help="Below 1 prefers what is likely; above 1 evens it out; 0 is --greedy.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    metavar="K",
    help="Keep the K likeliest tokens; 0 keeps all.",
)
@click.option(
    "--top-p",
    type=_SHARE,
    default=0.95,
    show_default=True,
    metavar="P",
    help="Keep the likeliest whose probabilities reach P together.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    show_default=True,
    metavar="P",
    help="Keep those at least P times as likely as the likeliest.",
)
@click.option(
    "--typical-p",
    type=_SHARE,
    default=1.0,
    show_default=True,
    metavar="P",
    help="Keep those that surprise about as much as expected, until they reach P together.",
)
@seed_option
def generate(
    model: Path | None,
    prompt: str,
    instruct: bool,
    device: str,
    threads: int | None,
    draft: int | None,
    as_json: bool,
    logprobs: int | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    on_full: str,
    keep: int | None,
    greedy: bool,
    **sampling: Any,
) -> None:
    """Continue a text with a bundle (onnxruntime) or a checkpoint (PyTorch).

    Without MODEL, the newest bundle under ./runs, or the small model that ships inside. Ctrl-C ends the text.

    \b
      slm generate -p "Once upon a time"
      slm generate runs/tiny/onnx-int8 -p "The fox" --greedy --max-new-tokens 40
      slm generate -p "One day" --stop . --repetition-penalty 1.2 --seed 7
      slm generate --json -p "One day" | jq .decode_tok_s
    """
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs is shown with --json")
    if keep is not None and on_full != "slide":
        raise click.UsageError("--keep says what stays with --on-full slide")
    from slm.loading import load
    from slm.runtime.speculative import SpeculativeDecoder

    return_freed_memory()
    path = model or default_model()
    loaded = load(path, device=device, threads=threads, draft_tokens=draft)  # type: ignore[arg-type]  # click checked
    say(f"{path}: {loaded.decoder.description}")
    drafting = loaded.decoder if isinstance(loaded.decoder, SpeculativeDecoder) else None
    if drafting is not None and drafting.caveat:
        say(drafting.caveat)
    text = _utf8(sys.stdin.read() if prompt == "-" else prompt, "prompt")
    pieces = loaded.pieces(
        turn_ids(loaded.tokenizer, text) if instruct else text,
        max_new_tokens=max_new_tokens,
        stop=[_utf8(each, "stop text") for each in stop],
        logprobs=logprobs,
        on_full=on_full,  # type: ignore[arg-type]  # click checked the choice
        keep=keep,
        **sampling | ({"temperature": 0.0} if greedy else {}),
    )
    run = loaded.last_run
    assert run is not None
    if not as_json:
        click.echo("" if instruct else text, nl=False)
    made, interrupted = _listen(pieces, show=not as_json)
    if as_json:
        answer = {"text": "".join(piece.text for piece in made), "model": str(path)}
        scores = {} if logprobs is None else {"logprobs": _logprobs(made, loaded.tokenizer)}
        drafts = {} if drafting is None else {"drafted": drafting.drafted, "accepted": drafting.accepted}
        print_json(answer | {"backend": loaded.decoder.description} | _figures(run) | drafts | scores)
    else:
        click.echo()
        _summarize(run)
        if drafting is not None:
            say(f"{drafting.accepted:,} of {drafting.drafted:,} drafted tokens came true")
    if interrupted:
        sys.exit(_INTERRUPTED)


def _listen(pieces: "Iterable[Piece]", *, show: bool) -> "tuple[list[Piece], bool]":
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


def _utf8(text: str, what: str) -> str:
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


def _figures(run: "Run") -> dict[str, Any]:
    return {
        "tokens": run.tokens,
        "prompt_tokens": run.prompt_tokens,
        "stopped": run.stopped,
        "slides": run.slides,
        "ttft_ms": round(run.ttft_ms, 2),
        "prefill_tok_s": round(run.prefill_tok_s, 1),
        "decode_tok_s": None if run.decode_tok_s is None else round(run.decode_tok_s, 1),
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }


def _logprobs(pieces: "Sequence[Piece]", tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    """Returns what is known of each token: its id, its text, its log-probability, and the same of the likeliest."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "text": tokenizer.text_of(token), "logprob": logprob}

    return [
        entry(piece.token, piece.logprob) | {"top": [entry(*likely) for likely in piece.top]}
        for piece in pieces
        if piece.token is not None
    ]


def _summarize(run: "Run") -> None:
    reasons: Mapping[str, str] = {
        "end": "the end of the text",
        "stop": "a stop text",
        "length": f"{len(run.tokens)} tokens",
        "context": "a full context (--on-full slide goes on)",
        "interrupted": "Ctrl-C",
    }
    times = "once" if run.slides == 1 else f"{run.slides} times"
    slid = f", the context full and its older half forgotten {times}" if run.slides else ""
    rate = f", {run.decode_tok_s:.0f} tokens/s" if run.decode_tok_s else ""
    say(f"stopped at {reasons[run.stopped]}{slid}; first token after {run.ttft_ms:.0f} ms{rate}")


def default_model() -> Path:
    """Returns the newest bundle under ./runs, or the small model that ships inside, and says which."""
    try:
        path = newest_bundle()
        say("no MODEL named: the newest bundle under ./runs")
        say_if_not_exported(path)
    except SlmError:
        from slm.runtime import shipped

        path = shipped.model_path()
        say("no MODEL named and no bundle under ./runs: the small model that ships with slm")
    return path
