"""`slm quantize`."""

from typing import Any

import click

from slm.cli.calling import call
from slm.cli.options import (
    REPLACING,
    Artifact,
    ByteCount,
    FilePath,
    Real,
    Share,
    Whole,
    column_option,
    document_option,
    json_option,
    out_option_for,
)
from slm.cli.quantize_report import print_report, print_sweep
from slm.core.task import METRICS
from slm.quantize.defaults import CALIBRATION_TOKENS, MAX_DROP, MAX_KL_NATS, REFINE_TOKENS


@click.command(epilog=REPLACING)
@click.argument("bundle", type=Artifact(checkpoints=False), required=False)
@click.option("--int8", is_flag=True, help="Store weights in 8 bits, by block.")
@click.option(
    "--int8-dynamic", is_flag=True, help="Multiply 8-bit weights and activations: faster prefill of long prompts."
)
@click.option("--int4", is_flag=True, help="Store weights in 4 bits, by block; in 8 bits for sensitive layers.")
@click.option(
    "--sweep", is_flag=True, help="Try many settings and write a report of size, speed and quality; no bundle."
)
@click.option(
    "--prefer",
    type=click.Choice(["auto", "speed", "size", "quality"]),
    default="auto",
    show_default=True,
    help="Property to optimize.",
)
@click.option(
    "--block-size",
    type=click.Choice(["128", "64", "32", "16"]),
    help="Weights that share a scale; smaller blocks are more accurate and slower. [default: by --prefer]",
)
@click.option(
    "--method",
    type=click.Choice(["nearest", "searched", "gptq"]),
    help="Rounding method for 4 bits; 8 bits always use nearest. [default: gptq]",
)
@click.option("--smooth/--no-smooth", default=None, help="Smooth activations first. [default: if it measures better]")
@click.option("--head-bits", type=click.Choice(["4", "8"]),
              help="With --int4: bits of token embeddings and head; with 4, frequent tokens keep 8. [default: 8; 4 with "
                   "--prefer size; chosen with --target-size or --max-kl]")  # fmt: skip
@click.option(
    "--target-size", type=ByteCount("MB"), metavar="SIZE", help="With --int4: limit of the model's size, such as 110MB."
)
@click.option(
    "--kv-cache",
    type=click.Choice(["float32", "int8"]),
    help="Type of cached keys and values. [default: by --prefer; with auto, int8 if its attention is faster here]",
)
@click.option(
    "--head",
    type=click.Choice(["whole", "halves"]),
    default="whole",
    show_default=True,
    help="Storage of the tied table; with halves, a step of one text reads fewer bytes. Compare with slm bench.",
)
@click.option("--refine", is_flag=True,
              help="With --int4: train scales and norms afterwards to match the float model; takes minutes and needs "
                   "PyTorch.")  # fmt: skip
@click.option("--refine-tokens", type=Whole(2), metavar="N",
              help=f"Number of tokens of the calibration text to train on. [default: {REFINE_TOKENS}]")  # fmt: skip
@click.option(
    "--data",
    type=FilePath(),
    metavar="PATH",
    help="Held-out text for the quality check. [default: the held-out rows of the model's fine-tuning, or stories]",
)
@column_option
@document_option
@click.option("--tokens", type=Whole(2), default=2048, show_default=True, help="Number of tokens of --data to read.")
@click.option("--window", type=Whole(2), metavar="N",
              help="Tokens read at a time. [default: enough to pass the sliding window]")  # fmt: skip
@click.option("--calibration", type=FilePath(), metavar="PATH",
              help="Calibration text; must differ from --data. [default: the model's training rows, or stories]")  # fmt: skip
@click.option("--calibration-tokens", type=Whole(2), metavar="N",
              help=f"Number of calibration tokens. [default: {CALIBRATION_TOKENS['int8']}; "
                   f"{CALIBRATION_TOKENS['int4']} for --int4]")  # fmt: skip
@click.option("--max-kl", type=Real(0, 1000), metavar="NATS",
              help="Limit of the KL divergence; with --int4, layers get 8 bits to stay below it. "
                   f"[default: {MAX_KL_NATS['int8']}; {MAX_KL_NATS['int4']} for --int4]")  # fmt: skip
@click.option("--max-ppl-increase", type=Share(1000), metavar="SHARE",
              help="Limit of the increase of perplexity, such as 2%.")  # fmt: skip
@click.option("--task", type=FilePath(), metavar="ROWS",
              help="Held-out rows that slm finetune reads: also compare the replies to them.")  # fmt: skip
@click.option("--metric", type=click.Choice(METRICS), help="With --task: score of a reply. [default: by the rows]")
@click.option("--max-drop", type=Share(), metavar="SHARE",
              help=f"With --task: limit of the score's decrease, such as 1% (a point). [default: {MAX_DROP:.0%}]")  # fmt: skip
@click.option("--limit", type=Whole(1), metavar="N", help="With --task: number of rows to use. [default: all]")
@out_option_for("bundle", "BUNDLE-int8, BUNDLE-int4 and so on")
@json_option
def quantize(int8: bool, int8_dynamic: bool, int4: bool, sweep: bool, as_json: bool, **options: Any) -> None:
    """Quantize a float32 bundle, or a float16 bundle for CUDA, and check its quality.

    The default BUNDLE is the newest float32 bundle in ./runs. Settings are chosen on a calibration text, and quality is
    measured on a held-out text. If the KL divergence is above --max-kl, nothing is written. With --task, the same holds if
    the score of the replies falls by more than --max-drop. The bundle contains a report.json and a report.html. A model that
    was trained with --qat keeps its weights.

    \b
      slm quantize --int8
      slm quantize --int8 --prefer speed          # also caches in 8 bits
      slm quantize --int8 --head halves           # reads half of the table; try slm bench
      slm quantize --int4 --target-size 110MB
      slm quantize --int4 --target-size 110MB --refine --calibration train.txt
      slm quantize --int8 runs/tiny/onnx --data valid.txt --max-kl 0.01
      slm quantize --int8 --task rows.jsonl --max-drop 1%
      slm quantize --sweep runs/tiny/onnx         # runs/tiny/onnx-sweep/sweep.html
      slm quantize --int4 runs/tiny/onnx-cuda     # from slm export --onnx --device cuda

    docs/quantization.md compares the settings.
    """
    if int8 + int8_dynamic + int4 + sweep != 1:
        raise click.UsageError("choose one of --int8, --int8-dynamic, --int4 and --sweep")
    from slm.steps import quantizing

    options |= {name: None if options[name] is None else int(options[name]) for name in ("block_size", "head_bits")}
    if sweep:
        found = call(quantizing.sweep, given=options)
        print_sweep(found.sweep, found.path, found.source, as_json)
        return
    precision = "int4" if int4 else "int8-dynamic" if int8_dynamic else "int8"
    result = call(quantizing.quantize, precision=precision, **options)
    print_report(result.bundle, result.report, as_json)
