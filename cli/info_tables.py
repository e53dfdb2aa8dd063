"""Tables of `slm info`, with the figures of its JSON object."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slm.cli.console import print_table
from slm.core.config import ModelConfig
from slm.core.manifest import Scheme

Report = Mapping[str, Any]
Rows = list[tuple[str, ...]]

_LONGEST = 100
_SIZES = {
    "disk_weights": "weights on disk",
    "disk_graph": "graph on disk",
    "disk_total": "total on disk",
    "memory_as_stored": "weights in memory, as stored",
    "memory_weights": "weights and graph in memory",
    "memory_float32": "weights in memory, float32",
    "memory_16_bit": "weights in memory, 16 bit",
}


def print_info(name: str, config: ModelConfig, report: Report, details: Report, history: Sequence[str]) -> None:
    """Prints size and lineage, then the architecture, then bytes and operations.

    Args:
        name: The name of the artifact or preset.
        config: The model's shape.
        report: The JSON object.
        details: The facts within `report` that are specific to the kind of artifact.
        history: The steps that created the artifact, in order.
    """
    # Skips facts that the report computes itself or that the lineage shows.
    steps = {step["step"] for step in report["lineage"]} - {"made_by"}
    shown = [key for key, value in details.items() if report[key] is value and key not in steps]
    told = _OF_BUNDLES if report["kind"] == "bundle" else {}
    rows: Rows = [("size", _size(report))]
    rows += [("lineage", " → ".join(history))] if history else []
    rows += _shape(config, report) + [
        (key, told[key](report) if key in told else _short(details[key])) for key in shown
    ]
    rows += [("notice", notice) for notice in report["notices"]]
    print_table(name, ("", ""), rows)
    with_ = report["counted_with"]
    print_table("size", ("", "MB"), _sizes(report))
    print_table(
        f"key-value cache: {with_['context']:,} tokens, batch {with_['batch']}",
        ("MB", "float32", "16 bit"),
        _cache(report),
    )
    print_table(
        f"million operations per token (a multiply-add is 2): decode at position {with_['position']:,}, and average of a "
        f"prefill of {with_['context']:,} tokens with logits at the last one",
        ("", "decode", "no windows", "prefill", "no windows"),
        _flops(report),
    )


def _size(report: Report) -> str:
    sizes = report["bytes"]
    if "disk_total" in sizes:
        return f"{report['parameters']['total']:,} parameters, {_mb(sizes['disk_total'])} MB on disk"
    return f"{report['parameters']['total']:,} parameters, {_mb(sizes['memory_float32'])} MB in float32"


def _shape(config: ModelConfig, report: Report) -> Rows:
    parts = report["parameters"]
    sliding = sum(config.window(i) is not None for i in range(config.num_hidden_layers))
    heads = (
        f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value, {config.head_dim} dimensions each"
    )
    rest = parts["attention"] + parts["mlp"] + parts["norms"]
    return [
        ("parameters", f"{parts['total']:,}"),
        ("  embedding", f"{parts['embedding']:,}"),
        (
            "  blocks",
            f"{rest:,}: attention {parts['attention']:,}, MLP {parts['mlp']:,}, norms {parts['norms']:,}",
        ),
        ("  head", "0 (tied to the embedding)" if report["tied_head"] else f"{parts['head']:,}"),
        ("layers", f"{sliding} sliding (window {config.sliding_window}), {config.num_hidden_layers - sliding} global"),
        ("hidden, intermediate", f"{config.hidden_size}, {config.intermediate_size}"),
        ("heads", heads),
        ("vocabulary", f"{config.vocab_size:,}{' (tied head)' if report['tied_head'] else ''}"),
    ]


def _bundle_cache(report: Report) -> str:
    """Returns the caches' dtypes and memory, and the number of layers by cached positions."""
    kept: Counter[str] = Counter()
    for layer in report["cache"]:
        window, slack = layer["window"], layer["slack"]
        if window is None:
            kept["all positions"] += 1
        elif report["target"] == "portable":
            kept[f"the last {window - 1:,}"] += 1
        else:
            kept[f"{window:,} + {slack}" if slack else f"{window:,}"] += 1
    layers = ", ".join(f"{count} layer{'s' * (count > 1)} with {what}" for what, count in kept.items())
    with_, size = report["counted_with"], _mb(report["kv_cache_bytes"]["bundle"])
    types = ", ".join(sorted({layer["dtype"] for layer in report["cache"]}))
    return f"{types}, {size} MB at {with_['context']:,} tokens, batch {with_['batch']}: {layers}"


def _quality(report: Report) -> str:
    quality = report["quality"]
    allowed = "" if quality["max_kl_nats"] is None else f" (limit {quality['max_kl_nats']:g})"
    return (
        f"KL {quality['kl_nats']:.5f} nats{allowed}, same top-1 "
        f"{quality['same_top1']:.1%}, perplexity {quality['perplexity_before']:.3f} -> {quality['perplexity_after']:.3f}; "
        f"{quality['tokens']:,} tokens of {quality['text']}"
    )


def _quantization(report: Report) -> str:
    quantization = report["quantization"]
    counts = Counter(Scheme(**scheme).name for scheme in quantization["schemes"].values())
    smoothed = quantization["smoothing"]
    return (
        f"{', '.join(f'{count} × {name}' for name, count in counts.items())}; {_METHODS[quantization['method']]}, "
        f"{'not smoothed' if smoothed is None else f'smoothed (alpha {smoothed:g})'}"
    )


def _parity(report: Report) -> str:
    return _compared(report["parity"])


def _gpu_parity(report: Report) -> str:
    return "; ".join(f"{name}: {_compared(parity)}" for name, parity in report["gpu_parity"].items())


def _parity_devices(report: Report) -> str:
    devices, wanted = report["parity_devices"], report["device"]
    found = ", ".join(devices) or "none"
    if wanted in devices or wanted == "cpu":
        return found
    return f"{found}; not verified on {wanted}" + (" (slm verify --device cuda, on a GPU)" if wanted == "cuda" else "")


def _compared(parity: Mapping[str, Any]) -> str:
    largest = max(*parity["logits"].values(), *parity["caches"].values())
    return (
        f"largest difference from {parity['reference']} {largest:.1e} (limit {parity['tolerance']:.0e}), "
        f"{parity['greedy_tokens_equal']} equal greedy tokens; {parity['tokens']:,} tokens"
    )


def _ranges(report: Report) -> str:
    ranges = report["ranges"]
    path = max(ranges["largest"], key=ranges["largest"].get)
    return (
        f"largest activation {ranges['largest'][path]:,.1f} in {path}; {len(ranges['float32'])} of {len(ranges['largest'])} "
        f"linear layers stay float32; {ranges['tokens']:,} tokens of {ranges['text']}"
    )


_METHODS = {"nearest": "rounded to nearest", "searched": "with searched scales", "gptq": "by GPTQ"}
# Functions that return the text of a bundle's field.
_OF_BUNDLES = {
    "cache": _bundle_cache,
    "quantization": _quantization,
    "quality": _quality,
    "parity": _parity,
    "gpu_parity": _gpu_parity,
    "parity_devices": _parity_devices,
    "ranges": _ranges,
}


def _sizes(report: Report) -> Rows:
    def label(name: str) -> str:
        return _SIZES.get(name) or f"weights in memory, INT8 in blocks of {name.rpartition('_')[2]}"

    return [(label(name), _mb(size)) for name, size in report["bytes"].items()]


def _cache(report: Report) -> Rows:
    sizes = report["kv_cache_bytes"]
    rows = {
        "with windows, as allocated": "windowed",
        "with windows, without slack": "windowed_without_slack",
        "without windows": "full",
    }
    return [(label, _mb(sizes[key]), _mb(sizes[f"{key}_16_bit"])) for label, key in rows.items()]


def _flops(report: Report) -> Rows:
    pairs = [report["flops"][name] for name in ("decode", "prefill_per_token")]

    def row(label: str, windowed: str, full: str) -> tuple[str, ...]:
        return label, *(_millions(flops[key]) for flops in pairs for key in (windowed, full))

    def saved(label: str, key: str) -> tuple[str, ...]:
        return label, *(cell for flops in pairs for cell in (f"{flops[key]:.1f} %", ""))

    return [
        row("body", "body", "body"),
        row("attention", "attention", "attention_full"),
        row("head", "head", "head"),
        row("total", "total", "total_full"),
        saved("saved, attention", "attention_saved_percent"),
        saved("saved, total", "total_saved_percent"),
    ]


def _short(value: Any) -> str:
    """Returns a value on one line of limited length; nested records are shown by their paths only."""
    if isinstance(value, Mapping):
        value = ", ".join(
            f"{name}: {item.get('path', '{…}') if isinstance(item, Mapping) else item}" for name, item in value.items()
        )
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e6 else f"{size / 1e6:,.4f}"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e6 else f"{count / 1e6:,.4f}"
