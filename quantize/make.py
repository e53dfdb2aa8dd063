"""Quantization of a float bundle. The result is written only if it passes the quality check."""

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
from slm.quantize.halves import check_halves
from slm.quantize.linears import linears_of
from slm.quantize.plain import plain_bundle
from slm.quantize.quality import Change, Divergence, Opened, Speeds, Text, calibration_text, divergence, measure, speeds
from slm.quantize.report import Report, model_bytes, parts_of, tensor_errors, write_report
from slm.quantize.write import write_bundle
from slm.runtime.decoder import OnnxDecoder

# The number of least accurate layers that a rejection names.
_BLAMED = 3


def quantize_bundle(
    source: Bundle,
    out: Path,
    text: Text,
    settings: Settings | None = None,
    progress: Progress | None = None,
    calibration: Text | None = None,
) -> tuple[Bundle, Report]:
    """Quantizes a float bundle and measures the effect on the CPU.

    Args:
        source: The bundle to quantize: float32, or float16 for CUDA.
        out: The new bundle's directory. It is created or replaced only if the result passes the quality check.
        text: The held-out text for the measurement.
        settings: The settings. The default is INT8.
        progress: Receives the progress of each step.
        calibration: The calibration text. The default is the training stories that ship with slm.

    Returns:
        The new bundle and the report.

    Raises:
        SlmError: If the source is already quantized, the settings do not fit it, a budget is too small, or the result
            fails the quality check. Nothing is written then.
    """
    settings, progress = settings or Settings(), progress or Silent()
    check_source(source, settings)
    settings = fitted_settings(source, settings, progress)
    if out.resolve() == source.path.resolve():
        raise SlmError(f"{out} is the bundle to quantize and cannot be overwritten", "choose another --out")
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
        speed = speeds(before(), after) if device == "cpu" else None  # speed is measured on the CPU only
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
    """Checks that a bundle can be quantized with these settings.

    Raises:
        SlmError: If the bundle is already quantized, or its target or device does not support a setting.
    """
    manifest = source.manifest
    if manifest.quantization is not None:
        raise SlmError(
            f"{source.path} is already {manifest.precision}", "quantize the float bundle that it was created from"
        )
    if manifest.device == "webgpu":
        raise SlmError(
            f"{source.path} is for WebGPU; only bundles for the CPU and for CUDA can be quantized",
            "export a bundle for the CPU: slm export --onnx",
        )
    if settings.precision == "int8" and settings.method not in (None, "nearest"):
        raise SlmError(
            f"INT8 supports the method nearest only, not {settings.method}",
            f"use slm quantize --int4 --method {settings.method}",
        )
    if settings.head == "halves":
        check_halves(source)
    if manifest.target == "portable":
        what = "--int8-dynamic" if settings.dynamic else "--kv-cache int8" if settings.cache == "int8" else None
        if what is not None:
            raise SlmError(
                f"{source.path} is a portable bundle, which does not support {what}",
                "quantize a fused bundle (slm export --onnx)",
            )
    if manifest.device == "cuda":
        _check_cuda(source, settings)


def _check_cuda(source: Bundle, settings: Settings) -> None:
    if settings.dynamic:
        raise SlmError(
            f"{source.path} is for CUDA, which does not support --int8-dynamic",
            "use slm quantize --int8, which stores 8-bit weights for CUDA",
        )
    if settings.cache is not None:
        raise SlmError(
            f"{source.path} is for CUDA, which supports float16 caches only, not {settings.cache}", "omit --kv-cache"
        )
    if settings.smooth:
        raise SlmError(
            f"{source.path} is for CUDA, where smoothed activations could overflow float16",
            "omit --smooth",
        )


def fitted_settings(source: Bundle, settings: Settings, progress: Progress) -> Settings:
    """Returns the settings with the values that a bundle's target and device require.

    Prints a note if `prefer` asks for something that the device does not support.
    """
    if source.manifest.target == "portable":
        return replace(settings, cache="float32")
    if source.manifest.device == "cuda":
        if settings.prefer == "speed":
            progress.note("CUDA supports float16 caches only; --prefer speed does not change them")
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
    ways = [f"use {finer} for a smaller error"] if finer else []
    ways.append(f"raise the limit with --max-kl {change.kl_nats * 1.1:.2g}")
    return SlmError(
        f"quality check failed: {reason}; perplexity {change.perplexity_before:.2f} to {change.perplexity_after:.2f}; "
        f"least accurate layers: {blamed}; nothing was written",
        ", or ".join(ways),
    )


def _in_words(recipe: Recipe) -> str:
    counts = recipe.words()["products"]
    assert isinstance(counts, dict)
    return ", ".join(f"{count} × {name}" for name, count in counts.items())
