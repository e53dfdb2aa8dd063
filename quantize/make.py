"""Quantization of a float bundle. The result is written only if it passes the quality check."""

import time
from dataclasses import asdict, replace
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.files import atomic_directory
from slm.core.manifest import Bundle, Quality, seal, sealed_files
from slm.core.progress import Progress, Silent
from slm.quantize.decide import decide
from slm.quantize.defaults import CALIBRATION_TOKENS
from slm.quantize.halves import rejection
from slm.quantize.quantizer import quantizer_of
from slm.quantize.refinement import Refinement
from slm.quantize.report import measured_report, norm_errors, write_report
from slm.quantize.results import Report, TaskChange
from slm.quantize.settings import Settings, check_source, fitted_settings
from slm.quantize.task import TaskCheck, measure_change
from slm.quantize.texts import TokenRows, calibration_text
from slm.quantize.write import write_bundle

# The number of least accurate layers that a rejection names.
_BLAMED = 3


def quantize_bundle(
    source: Bundle,
    out: Path,
    text: TokenRows,
    settings: Settings | None = None,
    progress: Progress | None = None,
    calibration: TokenRows | None = None,
    task: TaskCheck | None = None,
    refinement: Refinement | None = None,
) -> tuple[Bundle, Report]:
    """Quantizes a float bundle and measures the effect on the CPU.

    Args:
        source: The bundle to quantize: float32, or float16 for CUDA.
        out: The new bundle's directory. It is created or replaced only if the result passes the quality check.
        text: The held-out text for the measurement.
        settings: The settings. The default is INT8.
        progress: Receives the progress of each step.
        calibration: The calibration text. The default is the training stories that ship with slm.
        task: A task whose score must not fall by more than its limit.
        refinement: The training for the setting `refine`, and its text.

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
    if settings.refine:
        if refinement is None:
            raise ValueError("the setting `refine` needs a refinement")
        calibration = refinement.unread(calibration)
    with (
        atomic_directory(out, sealed_files(out)) as directory,
        quantizer_of(source, settings, calibration, text, progress, directory.parent) as quantizer,
    ):
        plan = decide(quantizer, refinement if settings.refine else None)
        counts = ", ".join(f"{count} × {name}" for name, count in plan.counts.items())
        progress.note(f"writing {source.manifest.parameters:,} parameters: {counts}")
        made = write_bundle(source, plan, quantizer.tensors(plan), directory)
        report = measured_report(quantizer, plan, made)
        if (reason := settings.limits.refuses(report.change)) is not None:
            raise _rejection(reason, report, settings)
        if settings.limits.max_kl_nats is not None and report.head is not None and (error := rejection(report.head)):
            raise error
        if task is not None:
            change = measure_change(task, source, made, progress)
            if (reason := task.refuses(change)) is not None:
                raise _task_rejection(reason, change, settings)
            report = replace(report, task=change)
        report = replace(report, seconds=round(time.perf_counter() - started, 2))
        write_report(directory, report)
        quality = Quality(text=text.name, max_kl_nats=settings.limits.max_kl_nats, **asdict(report.change))
        assert made.manifest.quantization is not None
        errors = {each.path: each.error for each in report.tensors} | norm_errors(quantizer, plan)
        quantization = made.manifest.quantization.model_copy(update={"errors": errors})
        seal(directory, made.manifest.model_copy(update={"quality": quality, "quantization": quantization}))
    return Bundle.open(out), report


def _rejection(reason: str, report: Report, settings: Settings) -> SlmError:
    blamed = ", ".join(f"{each.path} ({each.snr_db:.0f} dB)" for each in report.worst[:_BLAMED])
    finer, change = settings.finer(), report.change
    ways = [f"use {finer} for a smaller error"] if finer else []
    ways.append(f"raise the limit with --max-kl {change.kl_nats * 1.1:.2g}")
    return SlmError(
        f"quality check failed: {reason}; perplexity {change.perplexity_before:.2f} to {change.perplexity_after:.2f}; "
        f"least accurate layers: {blamed}; nothing was written",
        ", or ".join(ways),
    )


def _task_rejection(reason: str, change: TaskChange, settings: Settings) -> SlmError:
    finer = settings.finer()
    ways = [f"use {finer} for a smaller error"] if finer else []
    ways.append("raise the limit with --max-drop")
    return SlmError(
        f"task check failed: {reason}; {change.lost} of {change.rows:,} rows are worse and {change.won} better, difference "
        f"{100 * change.low:+.1f} to {100 * change.high:+.1f} points with 95 % confidence; nothing was written",
        ", or ".join(ways),
    )
