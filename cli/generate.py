"""`slm generate`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import print_json, say, say_if_not_exported
from slm.cli.options import json_option, seed_option
from slm.core.chat import turn_ids
from slm.core.errors import SlmError
from slm.core.machine import peak_rss_mib
from slm.core.runs import newest_bundle

if TYPE_CHECKING:
    from slm.runtime.generate import Run


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("-p", "--prompt", default="", help='The text to continue; "-" reads standard input.')
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N")
@click.option("--greedy", is_flag=True, help="Always take the likeliest token.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=40, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), default=0.95, show_default=True)
@seed_option
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: usable physical cores]")
@click.option("--instruct", is_flag=True, help="Ask as a user's turn, for a model tuned on instructions.")
@json_option
def generate(
    model: Path | None,
    prompt: str,
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    device: str,
    threads: int | None,
    instruct: bool,
    as_json: bool,
) -> None:
    """Continue a text with a bundle (onnxruntime) or a checkpoint (PyTorch).

    Without MODEL, the newest bundle under ./runs, or the small model that ships inside.

    \b
      slm generate -p "Once upon a time"
      slm generate runs/tiny/onnx-int8 -p "The fox" --greedy --max-new-tokens 40
      slm generate --json -p "One day" | jq .decode_tok_s
    """
    from slm.loading import load

    path = model or default_model()
    loaded = load(path, device=device, threads=threads)  # type: ignore[arg-type]  # click checked the choice
    say(f"{path}: {loaded.decoder.description}")
    text = _utf8(sys.stdin.read() if prompt == "-" else prompt)
    stream = loaded.stream(
        turn_ids(loaded.tokenizer, text) if instruct else text,
        max_new_tokens=max_new_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        answer = "".join(stream)
        assert loaded.last_run is not None
        print_json(
            {"text": answer, "model": str(path), "backend": loaded.decoder.description} | _figures(loaded.last_run)
        )
        return
    click.echo("" if instruct else text, nl=False)
    for piece in stream:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    assert loaded.last_run is not None
    _summarize(loaded.last_run)


def _utf8(text: str) -> str:
    """Returns the text; bytes that are no UTF-8 come from the shell as lone surrogates.

    Raises:
        SlmError: When there are such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SlmError(
            f"the prompt is not UTF-8 text (character {error.start})", "convert it, for example with iconv"
        ) from None
    return text


def _figures(run: "Run") -> dict[str, Any]:
    return {
        "tokens": run.tokens,
        "prompt_tokens": run.prompt_tokens,
        "stopped": run.stopped,
        "ttft_ms": round(run.ttft_ms, 2),
        "prefill_tok_s": round(run.prefill_tok_s, 1),
        "decode_tok_s": None if run.decode_tok_s is None else round(run.decode_tok_s, 1),
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }


def _summarize(run: "Run") -> None:
    why = {"end": "the end of the text", "length": f"{len(run.tokens)} tokens", "context": "a full context"}[
        run.stopped
    ]
    rate = f", {run.decode_tok_s:.0f} tokens/s" if run.decode_tok_s else ""
    say(f"stopped at {why}; first token after {run.ttft_ms:.0f} ms{rate}")


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
