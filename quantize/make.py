"""Quantizing a bundle: a float bundle in, a smaller one out, if it is good enough."""

import time
from dataclasses import asdict, replace
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.files import atomic_directory
from slm.core.manifest import Bundle, Quality, seal, sealed_files
from slm.core.names import short_name
from slm.core.progress import Progress, Silent
from slm.export.graph import float_tensors, graph_tensors, released
from slm.quantize.decide import GATES, Recipe, Settings, decide
from slm.quantize.defaults import CALIBRATION_TOKENS
from slm.quantize.linears import linears_of
from slm.quantize.plain import plain_bundle
from slm.quantize.quality import Change, Divergence, Opened, Speeds, Text, calibration_text, divergence, measure, speeds
from slm.quantize.report import Report, model_bytes, parts_of, tensor_errors, write_report
from slm.quantize.write import write_bundle
from slm.runtime.decoder import OnnxDecoder

# Tensors that a refusal names.
_BLAMED = 3


def quantize_bundle(
    source: Bundle,
    out: Path,
    text: Text,
    settings: Settings | None = None,
    progress: Progress | None = None,
    calibration: Text | None = None,
) -> tuple[Bundle, Report]:
    """Quantizes a float bundle and measures on the CPU what that changed.

    Args:
        source: The bundle to quantize: a float32 one, or a float16 one for CUDA.
        out: The new bundle's directory; made or replaced once the quality is good enough.
        text: What both bundles read for the measurement.
        settings: How to quantize.
        progress: Told of each step.
        calibration: What settings are chosen by; by default stories that ship with slm, others than those measured on.

    Raises:
        SlmError: When the source is quantized already, no block size fits, a budget cannot be kept, or the gate does not let
            it through; nothing is written then.
    """
    settings, progress = settings or Settings(), progress or Silent()
    check_source(source, settings)
    settings = fitted_settings(source, settings, progress)
    if out.resolve() == source.path.resolve():
        raise SlmError(f"{out} is the bundle to quantize; it is kept", "name another --out")
    started = time.perf_counter()
    calibration = calibration or calibration_text(source, None, CALIBRATION_TOKENS[settings.precision])
    device = source.manifest.device
    with (
        atomic_directory(out, sealed_files(out)) as directory,
        released(),
        plain_bundle(source, directory.parent) as plain,
    ):
        before = Opened(source)
        recipe = decide(plain, before, calibration, settings, progress, directory.parent, device)
        progress.note(f"writing {source.manifest.parameters:,} parameters: {_in_words(recipe)}")
        made = write_bundle(source, recipe.contents(plain), directory)
        after = OnnxDecoder(made)
        change = measure(before(), after, text, progress)
        progress.note("comparing texts, speeds and tensors")
        texts = divergence(before(), after, text)
        speed = speeds(before(), after) if device == "cpu" else None  # the CPU's say nothing about another device's
        before.close()
        report = _report(source, plain, made, recipe, settings, change, texts, speed)
        gate = settings.gate or GATES[settings.precision]
        if (reason := gate.refuses(change)) is not None:
            raise _refusal(reason, change, report, settings)
        report = replace(report, seconds=round(time.perf_counter() - started, 2))
        write_report(directory, report)
        quality = Quality(text=text.name, max_kl_nats=gate.max_kl_nats, **asdict(change))
        assert made.manifest.quantization is not None
        quantization = made.manifest.quantization.model_copy(
            update={"errors": {each.path: each.error for each in report.tensors}}
        )
        seal(directory, made.manifest.model_copy(update={"quality": quality, "quantization": quantization}))
    return Bundle.open(out), report


def check_source(source: Bundle, settings: Settings) -> None:
    """Checks that a bundle can be quantized so.

    Raises:
        SlmError: When it cannot.
    """
    manifest = source.manifest
    if manifest.quantization is not None:
        raise SlmError(f"{source.path} is {manifest.precision} already", "quantize the bundle that it was made from")
    if manifest.device == "webgpu":
        raise SlmError(
            f"{source.path} was exported for WebGPU: bundles for the CPU and for CUDA can be quantized",
            "slm export --onnx",
        )
    if settings.precision == "int8" and settings.method not in (None, "nearest"):
        raise SlmError(
            f"8-bit integers are the nearest ones, not {settings.method}",
            f"slm quantize --int4 --method {settings.method}",
        )
    if manifest.target == "portable":
        what = "products of 8-bit integers" if settings.dynamic else "INT8 caches" if settings.cache == "int8" else None
        if what is not None:
            raise SlmError(
                f"{source.path} is a portable bundle, and {what} need onnxruntime's own operators",
                "quantize a fused one (slm export --onnx)",
            )
    if manifest.device == "cuda":
        _check_cuda(source, settings)


def _check_cuda(source: Bundle, settings: Settings) -> None:
    if settings.dynamic:
        raise SlmError(
            f"{source.path} is for CUDA, and products of 8-bit integers run on the CPU only",
            "slm quantize --int8 stores 8-bit weights for CUDA",
        )
    if settings.cache is not None:
        raise SlmError(
            f"{source.path} is for CUDA, and its caches stay float16, not {settings.cache}", "leave --kv-cache out"
        )
    if settings.smooth:
        raise SlmError(
            f"{source.path} is for CUDA, and smoothed activations could exceed float16: their range was measured without",
            "leave --smooth out",
        )


def fitted_settings(source: Bundle, settings: Settings, progress: Progress) -> Settings:
    """Returns settings with what a bundle's target and device leave no choice about; a note says what `prefer` does not get."""
    if source.manifest.target == "portable":
        return replace(settings, cache="float32")
    if source.manifest.device == "cuda":
        if settings.prefer == "speed":
            progress.note("caches stay float16 on CUDA")
        return replace(settings, cache="float16", smooth=False)
    return settings


def _report(
    source: Bundle,
    plain: Bundle,
    made: Bundle,
    recipe: Recipe,
    settings: Settings,
    change: Change,
    texts: Divergence,
    speed: Speeds | None,
) -> Report:
    linears = linears_of(source.config)
    before = recipe.smoothing.apply(graph_tensors(plain.model_path))
    after = float_tensors(made.model_path, recipe.schemes)
    return Report(
        source=short_name(source.path),
        settings=settings.words() | recipe.words(),
        bytes_before=model_bytes(source),
        bytes_after=model_bytes(made),
        parts=parts_of(made, linears, recipe.schemes),
        change=change,
        divergence=texts,
        speeds=speed,
        tensors=tensor_errors(linears, recipe.schemes, before, after, recipe.inputs_rms, recipe.harm),
        seconds=0.0,
    )


def _refusal(reason: str, change: Change, report: Report, settings: Settings) -> SlmError:
    blamed = ", ".join(f"{each.path} ({each.snr_db:.0f} dB)" for each in report.worst[:_BLAMED])
    finer = settings.finer()
    ways = [f"{finer} is more exact"] if finer else []
    ways.append(f"--max-kl {change.kl_nats * 1.1:.2g} would let it through")
    return SlmError(
        f"{reason} (perplexity {change.perplexity_before:.2f} to {change.perplexity_after:.2f}); nothing was written; "
        f"kept least well: {blamed}",
        "; ".join(ways),
    )


def _in_words(recipe: Recipe) -> str:
    counts = recipe.words()["products"]
    assert isinstance(counts, dict)
    return ", ".join(f"{count} × {name}" for name, count in counts.items())
