"""`slm quantize`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.choosing import default_bundle
from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import after_bundle, next_step
from slm.cli.options import (
    REPLACING,
    Artifact,
    ByteCount,
    FilePath,
    Real,
    Whole,
    check_input,
    column_option,
    document_option,
    json_option,
    out_option_for,
)
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, sealed_files
from slm.core.outputs import check_output
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.text.tokens import TextSource
from slm.quantize.defaults import CALIBRATION_TOKENS, MAX_KL_NATS

if TYPE_CHECKING:
    from slm.core.contract import CacheType
    from slm.quantize.plan import Prefer
    from slm.quantize.report import Report
    from slm.quantize.rounding import Method
    from slm.quantize.sweep import Sweep

# The number of least accurate layers in the table.
_WORST = 5
_MAX_SHARE = 1000.0


class Share(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    """A share such as "2%" or "0.02"."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the share, at least 0."""
        text = str(value).strip()
        try:
            share = float(text.rstrip("% ")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= _MAX_SHARE:
            self.fail(f"{value!r} is not a share such as 2% or 0.02, up to 100,000%", param, ctx)
        return share


@click.command(epilog=REPLACING)
@click.argument("bundle", type=Artifact(checkpoints=False), required=False)
@click.option("--int8", is_flag=True, help="Store weights in 8 bits, by block.")
@click.option(
    "--int8-dynamic", is_flag=True, help="Multiply 8-bit weights and activations: faster prefill of long prompts."
)
@click.option(
    "--reduce-range", is_flag=True, help="With --int8-dynamic: 7-bit weights for processors without VNNI (slm doctor)."
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
@click.option(
    "--target-size", type=ByteCount("MB"), metavar="SIZE", help="With --int4: limit of the model's size, such as 110MB."
)
@click.option(
    "--kv-cache",
    type=click.Choice(["float32", "int8"]),
    help="Type of cached keys and values. [default: by --prefer; with auto, int8 if its attention is faster here]",
)
@click.option("--data", type=FilePath(), metavar="PATH", help="Held-out text for the quality check.")
@column_option
@document_option
@click.option("--tokens", type=Whole(2), default=2048, show_default=True, help="Number of tokens of --data to read.")
@click.option("--window", type=Whole(2), metavar="N",
              help="Tokens read at a time. [default: enough to pass the sliding window]")  # fmt: skip
@click.option("--calibration", type=FilePath(), metavar="PATH",
              help="Calibration text; must differ from --data.")  # fmt: skip
@click.option("--calibration-tokens", type=Whole(2), metavar="N",
              help=f"Number of calibration tokens. [default: {CALIBRATION_TOKENS['int8']}; "
                   f"{CALIBRATION_TOKENS['int4']} for --int4]")  # fmt: skip
@click.option("--max-kl", type=Real(0, 1000), metavar="NATS",
              help="Limit of the KL divergence; with --int4, layers get 8 bits to stay below it. "
                   f"[default: {MAX_KL_NATS['int8']}; {MAX_KL_NATS['int4']} for --int4]")  # fmt: skip
@click.option("--max-ppl-increase", type=Share(), metavar="SHARE",
              help="Limit of the increase of perplexity, such as 2%.")  # fmt: skip
@out_option_for("bundle", "BUNDLE-int8, BUNDLE-int4 and so on")
@json_option
def quantize(
    bundle: Path | None,
    int8: bool,
    int8_dynamic: bool,
    reduce_range: bool,
    int4: bool,
    sweep: bool,
    prefer: "Prefer",
    block_size: str | None,
    method: "Method | None",
    smooth: bool | None,
    target_size: int | None,
    kv_cache: "CacheType | None",
    data: Path | None,
    column: str | None,
    max_document_bytes: int | None,
    tokens: int,
    window: int | None,
    calibration: Path | None,
    calibration_tokens: int | None,
    max_kl: float | None,
    max_ppl_increase: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Quantize a float32 bundle, or a float16 bundle for CUDA, and check its quality.

    The default BUNDLE is the newest float32 bundle in ./runs. Settings are chosen on a calibration text, and quality is
    measured on a held-out text. If the KL divergence is above --max-kl, nothing is written. The bundle contains a
    report.json and a report.html.

    \b
      slm quantize --int8
      slm quantize --int8 --prefer speed          # also caches in 8 bits
      slm quantize --int4 --target-size 110MB
      slm quantize --int8 runs/tiny/onnx --data valid.txt --max-kl 0.01
      slm quantize --sweep runs/tiny/onnx         # runs/tiny/onnx-sweep/sweep.html
      slm quantize --int4 runs/tiny/onnx-cuda     # from slm export --onnx --device cuda

    docs/quantization.md compares the settings.
    """
    if int8 + int8_dynamic + int4 + sweep != 1:
        raise click.UsageError("choose one of --int8, --int8-dynamic, --int4 and --sweep")
    chosen = [block_size, method, smooth, target_size, kv_cache, max_kl, max_ppl_increase]
    if sweep and (prefer != "auto" or any(value is not None for value in chosen)):
        raise SlmError("--sweep tries all settings and has no limits", "omit the other settings")
    precision = "int4" if int4 else "int8"
    if target_size is not None and not int4:
        raise SlmError(
            "--target-size requires --int4: it chooses between 4 and 8 bits for each layer",
            "use slm quantize --int4 --target-size SIZE",
        )
    if reduce_range and not int8_dynamic:
        raise SlmError("--reduce-range requires --int8-dynamic; other products do not overflow", "omit --reduce-range")
    if int8_dynamic and (block_size or method):
        raise SlmError("--int8-dynamic does not support --block-size or --method", "omit them, or use --int8")
    for each in (data, calibration):
        if each is not None:
            check_input(each, "text", directories=True)
    if bundle is None:
        bundle = default_bundle(to_quantize=True)
    ending = "sweep" if sweep else "int8-dynamic" if int8_dynamic else precision
    target = out or bundle.with_name(f"{bundle.name}-{ending}")
    if target.resolve() == bundle.resolve():
        raise SlmError(f"{target} is the bundle to quantize and cannot be overwritten", "choose another --out")
    check_output(target, {"sweep.json", "sweep.html"} if sweep else sealed_files(target))
    source = Bundle.open(bundle)
    from slm.quantize.decide import GATES, Gate, Settings
    from slm.quantize.make import check_source, quantize_bundle
    from slm.quantize.quality import calibration_text, measuring_text

    def given(path: Path | None) -> TextSource | None:
        if path is None:
            return None
        return TextSource(path.expanduser(), column or TEXT_COLUMN, max_document_bytes or DOCUMENT_BYTES)

    text = measuring_text(source, given(data), tokens, window)
    if text.rows.shape[1] <= source.config.sliding_window:
        say(
            f"warning: the text has rows of {text.rows.shape[1]} tokens, which do not exceed the sliding window of "
            f"{source.config.sliding_window}"
        )
    chosen_by = {
        name: calibration_text(source, given(calibration), calibration_tokens or usual, window)
        for name, usual in CALIBRATION_TOKENS.items()
        if sweep or name == precision
    }
    if sweep:
        from slm.quantize.sweep import run_sweep

        _report_sweep(run_sweep(source, target, text, chosen_by, RichProgress()), target, bundle, as_json)
        return
    usual = GATES[precision]
    settings = Settings(
        precision="int4" if int4 else "int8",
        prefer=prefer,
        dynamic=int8_dynamic,
        reduce_range=reduce_range,
        block_size=None if block_size is None else int(block_size),
        method=method,
        smooth=smooth,
        cache=kv_cache,
        target_bytes=target_size,
        target_kl_nats=max_kl if int4 and target_size is None and prefer != "size" else None,
        gate=Gate(usual.max_kl_nats if max_kl is None else max_kl, max_ppl_increase),
    )
    check_source(source, settings)
    if source.manifest.device != "cpu":
        say("Quality is measured on the CPU.")
    made, report = quantize_bundle(source, target, text, settings, RichProgress(), chosen_by[precision])
    _report(made, report, as_json)


def _report_sweep(sweep: "Sweep", directory: Path, bundle: Path, as_json: bool) -> None:
    from slm.quantize.page import SWEEP_COLUMNS, sweep_rows
    from slm.quantize.sweep import SWEEP_PAGE, as_dict

    following = _after_sweep(sweep, bundle)
    if as_json:
        print_json({"out": str(directory)} | as_dict(sweep) | ({"next": following} if following else {}))
        return
    # Enough for a narrow terminal; the page has the rest.
    kept = [SWEEP_COLUMNS.index(name) for name in ("slm quantize", "MB", "KL, nats", "decode ×", "frontier")]
    rows = [[row[i] for i in kept] for row in sweep_rows(sweep)]
    print_table(
        f"{sweep.bundle}: {sweep.bytes_before / 1e6:,.1f} MB in float32", [SWEEP_COLUMNS[i] for i in kept], rows
    )
    say(f"measured over {sweep.tokens:,} tokens of {sweep.text}; {directory / SWEEP_PAGE}")
    if following:
        next_step(following)


def _after_sweep(sweep: "Sweep", bundle: Path) -> str | None:
    """Returns the command for the smallest bundle of the sweep within the default limit of its precision."""
    good = [
        trial
        for trial in sweep.trials
        if trial.change.kl_nats <= MAX_KL_NATS["int4" if "--int4" in trial.options else "int8"]
    ]
    best = min(good, key=lambda trial: trial.bytes, default=None)
    return None if best is None else f"slm quantize {best.options} {shlex.quote(str(bundle))}"


def _report(made: Bundle, report: "Report", as_json: bool) -> None:
    from slm.quantize.page import figures
    from slm.quantize.report import PAGE_FILE, as_dict

    if as_json:
        print_json({"bundle": str(made.path)} | as_dict(report) | {"next": after_bundle(made)})
        return
    change, quality = report.change, made.manifest.quality
    assert quality is not None
    if quality.max_kl_nats is not None:
        say(f"Quality check passed: KL {change.kl_nats:.5f} nats (limit {quality.max_kl_nats:g}).")
    print_table(f"{made.path}: {report.in_words}", ("", "before", "after"), figures(report))
    print_table(
        "least accurate layers",
        ("weight", "stored as", "MB", "signal-to-noise ratio"),
        [
            (each.path, each.scheme, f"{each.bytes / 1e6:,.1f}", f"{each.snr_db:.1f} dB")
            for each in report.worst[:_WORST]
        ],
    )
    say(f"measured over {change.tokens:,} tokens of {quality.text}; {report.seconds:.1f} s; {made.path / PAGE_FILE}")
    next_step(after_bundle(made))
