"""Quantization reports as self-contained HTML pages, for small screens, with dark mode, and without network access."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from slm.core.metrics.intervals import Interval, difference_text, score_text
from slm.core.metrics.scoring import METRICS
from slm.core.report_page import page, table
from slm.core.report_plots import Bar, Point, bars, lying_bars, points
from slm.quantize.results import Report, Sweep, TensorError, Trial

# Titles of the four products of a layer.
_KINDS = {
    "qkv_proj": "queries, keys, values",
    "o_proj": "attention output",
    "gate_up_proj": "MLP: gate and up",
    "down_proj": "MLP: down",
}


def report_page(report: Report) -> str:
    """Returns the HTML page of one quantization."""
    stored = (
        f"<p>{escape(report.in_words)}. Calibrated on {escape(report.calibration)}. Measured over "
        f"{report.change.tokens:,} tokens of {escape(report.text)}; {report.seconds:,.1f} s.</p>"
    )
    parts = [
        f"<h1>{escape(report.source)}, quantized</h1>",
        stored,
        table(("", "before", "after"), figures(report)),
        "<h2>Settings</h2>",
        table(("", ""), [(_words(name), _said(name, value)) for name, value in report.settings.items()]),
        "<h2>Size by part</h2>",
        lying_bars(
            [Bar(name, size, f"{_mb(size)} ({size / report.bytes_after:.0%})") for name, size in report.parts.items()],
            "bytes by part of the model",
        ),
        "<h2>Signal-to-noise ratio by layer</h2>",
        "<p>Signal-to-noise ratio (dB) of each product's output for average inputs. 6 dB correspond to one bit.</p>",
        *_by_layer(report.tensors, "snr_db", "dB"),
    ]
    if any(each.harm_nats is not None for each in report.tensors):
        parts += [
            "<h2>Sensitivity by layer</h2>",
            "<p>KL divergence if only this product has four bits, in thousandths of a nat.</p>",
            *_by_layer(report.tensors, "harm_nats", "millinats"),
        ]
    every = [
        (each.path, each.scheme, _mb(each.bytes), _or_dash(each.snr_db, ".1f"), f"{each.error:.2%}", _harm(each))
        for each in report.tensors
    ]
    columns = ("weight", "stored as", "size", "signal-to-noise ratio, dB", "relative error", "sensitivity, nats")
    parts += ["<h2>All weights</h2>", f"<details><summary>all {len(every)}</summary>{table(columns, every)}</details>"]
    return page(f"{report.source}, quantized", parts)


def figures(report: Report) -> list[tuple[str, str, str]]:
    """Returns the rows of the summary table: name, value before, value after."""
    change, speeds, texts = report.change, report.speeds, sorted(report.divergence.equal)
    same = f"{texts[len(texts) // 2]} of {report.divergence.tokens} (median of {len(texts)} texts)"
    rows = [
        ("graph and weights", _mb(report.bytes_before), _mb(report.bytes_after)),
        ("perplexity", f"{change.perplexity_before:.3f}", f"{change.perplexity_after:.3f}"),
        ("KL divergence", "", f"{change.kl_nats:.5f} nats"),
        ("same top-1, top-5", "", f"{change.same_top1:.1%}, {change.same_top5:.1%}"),
        ("equal greedy tokens", "", same),
    ]
    if (task := report.task) is not None:
        old, new = (score_text(each.score, Interval(each.low, each.high)) for each in (task.before, task.after))
        fallen = difference_text(task.after.score - task.before.score, Interval(task.low, task.high))
        rows += [
            (f"{METRICS[task.metric].title}, {task.rows:,} rows (95 %)", old, new),
            ("difference in points (95 %)", "", fallen),
        ]
    if speeds is None:
        return rows
    for name, (before, after), ratio in (
        ("decode", speeds.decode, speeds.decode_ratio),
        ("prefill", speeds.prefill, speeds.prefill_ratio),
    ):
        rows.append((f"{name}, tokens/s", f"{before:,.0f}", f"{after:,.0f} ({ratio:.2f} ×)"))
    return rows


def sweep_page(sweep: Sweep) -> str:
    """Returns the HTML page of a sweep."""
    trials = sweep.trials
    smaller, faster = sweep.frontier(lambda trial: trial.bytes), sweep.frontier(lambda trial: -trial.decode_ratio)
    parts = [
        f"<h1>{escape(sweep.bundle)}, quantized in {len(trials)} ways</h1>",
        f"<p>{_mb(sweep.bytes_before)} in float32. KL divergence over {sweep.tokens:,} tokens of {escape(sweep.text)}.</p>",
        "<h2>Quality and size</h2>",
        points(_points(trials, smaller, lambda trial: trial.bytes / 1e6), "MB", "KL divergence, nats", "quality, size"),
        "<h2>Quality and decode speed</h2>",
        points(
            _points(trials, faster, lambda trial: trial.decode_ratio),
            "decode, times float32",
            "KL divergence, nats",
            "quality, speed",
        ),
        "<p>Filled points are on the Pareto frontier: no other trial is better in one value and as good in the other.</p>",
        "<h2>All trials</h2>",
        table(SWEEP_COLUMNS, sweep_rows(sweep)),
    ]
    if sweep.skipped:
        parts += [
            "<h2>Not supported for this model</h2>",
            table(("", ""), [(f"slm quantize {k}", v) for k, v in sweep.skipped.items()]),
        ]
    return page(f"{sweep.bundle}, quantized in {len(trials)} ways", parts)


SWEEP_COLUMNS = ("", "slm quantize", "MB", "KL, nats", "same top-1", "perplexity", "decode ×", "prefill ×", "frontier")


def sweep_rows(sweep: Sweep) -> list[tuple[str, ...]]:
    """Returns a row for each trial, with the columns of `SWEEP_COLUMNS`."""
    smaller, faster = sweep.frontier(lambda trial: trial.bytes), sweep.frontier(lambda trial: -trial.decode_ratio)
    return [
        (
            str(i),
            trial.options,
            f"{trial.bytes / 1e6:,.1f}",
            f"{trial.change.kl_nats:.5f}",
            f"{trial.change.same_top1:.1%}",
            f"{trial.change.perplexity_after:.3f}",
            f"{trial.decode_ratio:.2f}",
            f"{trial.prefill_ratio:.2f}",
            ", ".join(word for word, front in (("size", smaller), ("speed", faster)) if trial.options in front),
        )
        for i, trial in enumerate(sweep.trials, start=1)
    ]


def _points(trials: Sequence[Trial], front: set[str], x: Callable[[Trial], float]) -> list[Point]:
    return [
        Point(
            str(i),
            x(trial),
            trial.change.kl_nats,
            trial.options in front,
            f"{trial.options}: {trial.change.kl_nats:.5f} nats, {_mb(trial.bytes)}, decode {trial.decode_ratio:.2f} ×",
        )
        for i, trial in enumerate(trials, start=1)
    ]


def _by_layer(tensors: Sequence[TensorError], field: str, unit: str) -> list[str]:
    """Returns a plot for each kind of product, and a paragraph each for embedding and head."""
    scale = 1000 if unit == "millinats" else 1
    parts, outside = [], []
    for each in tensors:
        value = getattr(each, field)
        if each.path.rpartition(".")[2] not in _KINDS and value is not None:
            outside.append(f"{each.path}: {scale * value:.3g} {unit}")
    for kind, words in _KINDS.items():
        found = [each for each in tensors if each.path.endswith(f".{kind}")]
        row = [
            Bar(
                each.path.split(".")[2],
                None if (value := getattr(each, field)) is None else max(0.0, scale * value),
                f"layer {each.path.split('.')[2]}, {each.scheme}: {_or_dash(value, '.3g', scale)} {unit}",
            )
            for each in found
        ]
        parts += [f"<h3>{words}</h3>", bars(row, f"{words}, {unit} by layer")]
    return [*parts, *[f"<p>{escape(text)}</p>" for text in outside]]


def _words(name: str) -> str:
    known = {"products": "weights", "target_bytes": "largest size", "attention_us": "attention of a few layers"}
    return known.get(name, name.replace("_", " "))


def _said(name: str, value: Any) -> str:
    match name, value:
        case "products", _:
            return ", ".join(f"{count} × {scheme}" for scheme, count in value.items())
        case "attention_us", _:
            return ", ".join(f"{microseconds:,.0f} µs with {cache} caches" for cache, microseconds in value.items())
        case "refinement", _:
            change = f"KL divergence {value['kl_before']:.4f} nats before and {value['kl_after']:.4f} after"
            which = "refined" if value["kept"] else "earlier"
            return f"{value['tokens']:,} tokens; {change}, on {value['held_back']:,} held-back tokens; kept the {which} weights"
        case _, None:
            return "none"
        case _, bool():
            return str(value)
        case _, int():
            return f"{value:,}"
    return str(value)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _or_dash(value: float | None, form: str, scale: float = 1) -> str:
    return "—" if value is None else f"{scale * value:{form}}"


def _harm(each: TensorError) -> str:
    return _or_dash(each.harm_nats, ".5f")
