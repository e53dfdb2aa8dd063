"""`slm generate`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.choosing import default_model
from slm.cli.console import print_json, say
from slm.cli.options import Artifact, Whole, json_option
from slm.cli.sampling import Sections, TextOptions, generation_options, listen, say_backend, utf8
from slm.core.chat import turn_ids
from slm.core.machine import return_freed_memory
from slm.core.processes import peak_rss_mib

if TYPE_CHECKING:
    from slm.core.tokenizer import Tokenizer
    from slm.runtime.ensemble import Average
    from slm.runtime.generation import Piece, Result
    from slm.runtime.model import Model
    from slm.runtime.options import GenerationOptions
    from slm.runtime.speculative import SpeculativeDecoder

# The exit code that shells use for a command ended by Ctrl-C.
_INTERRUPTED = 130


@click.command(cls=Sections)
@click.argument("models", metavar="[MODEL]...", type=Artifact(), nargs=-1)
@click.option("-p", "--prompt", default="", help='The text to continue; "-" reads standard input.')
@click.option("--instruct", is_flag=True, help="Send the prompt as a user turn, for a model tuned on instructions.")
@click.option(
    "--ensemble",
    type=click.Choice(["mean", "geometric"]),
    help="Average the predictions of several models that share a tokenizer.",
)
@json_option
@click.option(
    "--logprobs",
    type=Whole(0, 1_000_000),
    metavar="N",
    help="With --json: each token's log-probability and the N most likely tokens, in the model's own distribution, before "
    "any option changes it.",
)
@generation_options
def generate(
    models: tuple[Path, ...],
    prompt: str,
    instruct: bool,
    ensemble: "Average | None",
    as_json: bool,
    logprobs: int | None,
    options: TextOptions,
) -> None:
    """Continue a text with a bundle (onnxruntime) or a checkpoint (PyTorch).

    Without MODEL, uses the newest finished model under ./runs, or the bundled demo model if there is none.
    Ctrl-C ends the text.

    \b
      slm generate -p "Once upon a time"
      slm generate runs/tiny/onnx-int8 -p "The fox" --greedy --max-new-tokens 40
      slm generate -p "One day" --stop . --repetition-penalty 1.2 --seed 7
      slm generate --json -p "One day" | jq .decode_tok_s
      slm generate runs/a/onnx-int8 runs/b/onnx-int8 --ensemble mean -p "One day"
    """
    if (len(models) > 1) != (ensemble is not None):
        raise click.UsageError("--ensemble requires several models, and several models require --ensemble")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs requires --json")
    if ensemble is not None and options.adapter is not None:
        raise click.UsageError("--adapter cannot be combined with --ensemble")
    text = utf8(sys.stdin.read() if prompt == "-" else prompt, "prompt")
    return_freed_memory()
    path, loaded = _load(models, ensemble, options)
    say_backend(path, loaded.decoder, options.loading)
    drafting = _drafting(loaded)
    if drafting is not None and drafting.caveat:
        say(drafting.caveat)
    if not instruct and ensemble is None and chat_model(Path(path), options.adapter, loaded.tokenizer):
        say("note: this model was tuned on conversations; use --instruct for one user turn, or slm chat")
    if loaded.tokenizer.suffix_ids and not instruct:
        say("the tokenizer appends tokens to the prompt, as in transformers; the text continues after them")
    ids = turn_ids(loaded.tokenizer, text, loaded.stop_token_ids) if instruct else text
    generation: GenerationOptions = {**options.generation, "logprobs": logprobs}
    pieces = loaded.pieces(ids, **generation)
    if not as_json:
        click.echo("" if instruct else text, nl=False)
    made, interrupted = listen(pieces, show=not as_json)
    result = pieces.result
    if as_json:
        answer = {"text": "".join(piece.text for piece in made), "model": path}
        scores = {} if logprobs is None else {"logprobs": _logprobs(made, loaded.tokenizer)}
        drafts = {} if drafting is None else {"drafted": drafting.drafted, "accepted": drafting.accepted}
        print_json(answer | {"backend": loaded.decoder.description} | figures(result) | drafts | scores)
    else:
        click.echo()
        _summarize(result)
        if drafting is not None:
            say(f"{drafting.accepted:,} of {drafting.drafted:,} drafted tokens accepted")
    if interrupted:
        sys.exit(_INTERRUPTED)


def _load(models: Sequence[Path], ensemble: "Average | None", options: TextOptions) -> "tuple[str, Model]":
    """Returns the model, or the ensemble of several models, and its path or paths."""
    from slm.loading import load, load_ensemble

    if ensemble is None:
        path = str(models[0] if models else default_model())
        return path, load(path, draft_tokens=options.draft, adapter=options.adapter, **options.loading)
    return ", ".join(map(str, models)), load_ensemble(models, ensemble, draft_tokens=options.draft, **options.loading)


def _drafting(model: "Model") -> "SpeculativeDecoder | None":
    from slm.runtime.speculative import SpeculativeDecoder

    return model.decoder if isinstance(model.decoder, SpeculativeDecoder) else None


def figures(result: "Result") -> dict[str, Any]:
    """Returns the figures of a generated text for --json."""
    return {
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "stopped": result.stopped,
        "slides": result.slides,
        "seed": result.seed,
        "ttft_ms": round(result.ttft_ms, 2),
        "prefill_tok_s": round(result.prefill_tok_s, 1),
        "decode_tok_s": None if result.decode_tok_s is None else round(result.decode_tok_s, 1),
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }


def _logprobs(pieces: "Sequence[Piece]", tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    """Returns each token's id, text, bytes and log-probability, and those of the most likely tokens."""
    from slm.runtime.token_bytes import token_bytes

    own = token_bytes(tokenizer)

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "text": tokenizer.text_of(token), "bytes": list(own[token]), "logprob": logprob}

    return [
        entry(piece.token, piece.logprob) | {"top": [entry(*likely) for likely in piece.top]}
        for piece in pieces
        if piece.token is not None
    ]


def _summarize(result: "Result") -> None:
    reasons: Mapping[str, str] = {
        "end": "the end-of-text token",
        "stop": "a stop text",
        "length": f"{len(result.tokens)} tokens",
        "context": "a full context (--on-full slide continues)",
        "interrupted": "Ctrl-C",
    }
    times = "once" if result.slides == 1 else f"{result.slides} times"
    slid = f", the older half of the full context dropped {times}" if result.slides else ""
    rate = f", {result.decode_tok_s:.0f} tokens/s" if result.decode_tok_s else ""
    say(f"stopped at {reasons[result.stopped]}{slid}; first token after {result.ttft_ms:.0f} ms{rate}")
    if result.seed is not None:
        say(f"seed: {result.seed} (--seed {result.seed} generates the same text)")


def chat_model(path: Path, adapter: Path | None, tokenizer: "Tokenizer") -> bool:
    """Returns whether a model, with its adapter, was fine-tuned on conversations."""
    from slm.core.artifacts import read_artifact
    from slm.core.chat import knows_turns
    from slm.core.checkpoint import INFO_FILE, read_info

    if adapter is not None:
        return knows_turns({"finetuned": read_info(adapter)}, tokenizer)
    found = read_artifact(path)
    record = {} if found is None else found.record
    info = (record.get("provenance") or {}).get(INFO_FILE) if found is not None and found.kind == "bundle" else record
    return knows_turns(info if isinstance(info, dict) else {}, tokenizer)
