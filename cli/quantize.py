"""`slm quantize`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.console import RichProgress, print_json, print_table, say, say_if_not_exported
from slm.cli.options import Artifact, json_option, out_option
from slm.core.manifest import Bundle
from slm.core.runs import newest_bundle

if TYPE_CHECKING:
    from slm.core.contract import CacheType


@click.command()
@click.argument("bundle", type=Artifact(checkpoints=False), required=False)
@click.option("--int8", is_flag=True, help="Weights in 8 bits, by block.")
@click.option(
    "--block-size",
    type=click.Choice(["128", "64", "32", "16"]),
    help="Weights that share a scale: smaller is more exact and slower. [default: the largest that fits]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="How keys and values are cached; int8 pays in long contexts.",
)
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="Text to measure the quality on.")
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="How much of it to read.")
@click.option("--max-kl", type=click.FloatRange(min=0), default=0.02, show_default=True, metavar="NATS",
              help="Refuse a bundle whose predictions moved by more, on average.")  # fmt: skip
@out_option
@json_option
def quantize(
    bundle: Path | None,
    int8: bool,
    block_size: str | None,
    kv_cache: "CacheType",
    data: Path | None,
    tokens: int,
    max_kl: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Quantize a float32 bundle and measure what that changed.

    Without BUNDLE, the newest float32 bundle under ./runs. Both bundles read the same text; if the predictions moved by
    more than --max-kl, nothing is written.

    \b
      slm quantize --int8
      slm quantize --int8 --kv-cache int8 --out runs/tiny/onnx-int8-long
      slm quantize --int8 runs/tiny/onnx --data valid.txt --max-kl 0.01
    """
    from slm.quantize.int8 import Int8Settings, quantize_int8
    from slm.quantize.quality import measuring_text

    if not int8:
        raise click.UsageError("name the precision: --int8")
    started = time.perf_counter()
    if bundle is None:
        bundle = newest_bundle(quantized=False)
        say_if_not_exported(bundle)
        say(f"no BUNDLE named: the newest, {bundle}")
    source = Bundle.open(bundle)
    text = measuring_text(source, data, tokens)
    if text.rows.shape[1] <= source.config.sliding_window:
        say(f"warning: {text.rows.shape[1]} tokens of text do not pass the window of {source.config.sliding_window}")
    settings = Int8Settings(None if block_size is None else int(block_size), max_kl, kv_cache)
    made = quantize_int8(source, out or bundle.with_name(f"{bundle.name}-int8"), text, settings, RichProgress())
    _report(source, made, time.perf_counter() - started, as_json)


def _report(source: Bundle, made: Bundle, seconds: float, as_json: bool) -> None:
    quality, quantization = made.manifest.quality, made.manifest.quantization
    assert quality is not None and quantization is not None
    if as_json:
        sizes = {"bytes_before": source.bytes, "bytes": made.bytes}
        report = {"quantization": quantization.model_dump(), "quality": quality.model_dump()}
        print_json({"bundle": str(made.path), "seconds": round(seconds, 2)} | sizes | report)
        return
    rows = [
        ("size", f"{source.bytes / 1e6:,.1f} MB", f"{made.bytes / 1e6:,.1f} MB"),
        ("perplexity", f"{quality.perplexity_before:.3f}", f"{quality.perplexity_after:.3f}"),
        ("same top-1", "", f"{quality.same_top1:.1%}"),
        ("KL divergence", "", f"{quality.kl_nats:.5f} nats (allowed {quality.max_kl_nats:g})"),
    ]
    title = f"{made.path}: INT8 in blocks of {quantization.block_size}"
    print_table(title, ("", "float32", "int8"), rows)
    say(f"measured over {quality.tokens:,} tokens of {quality.text}; {seconds:.1f} s")
