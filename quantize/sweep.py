"""Sweep: quantizes a bundle with many settings and compares size, speed and quality."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError
from slm.core.files import check_replaceable, read_json, write_text
from slm.core.manifest import Bundle
from slm.core.names import short_name
from slm.core.progress import Progress
from slm.export.graph import released
from slm.quantize.decide import decide
from slm.quantize.page import sweep_page
from slm.quantize.quality import measure, speeds
from slm.quantize.quantizer import Quantizer, quantizer_of
from slm.quantize.results import Change, Sweep, Trial
from slm.quantize.settings import Settings, check_source
from slm.quantize.texts import TokenRows
from slm.quantize.write import graph_bytes
from slm.runtime.decoder import OnnxDecoder
from slm.version import __version__

SWEEP_FILE, SWEEP_PAGE = "sweep.json", "sweep.html"

# The settings to try, by their command-line options.
TRIALS: Mapping[str, Settings] = {
    "--int8 --block-size 128 --no-smooth": Settings(block_size=128, smooth=False),
    "--int8 --block-size 128 --smooth": Settings(block_size=128, smooth=True),
    "--int8 --block-size 64 --no-smooth": Settings(block_size=64, smooth=False),
    "--int8 --block-size 64 --smooth": Settings(block_size=64, smooth=True),
    "--int8 --block-size 32 --no-smooth": Settings(block_size=32, smooth=False),
    "--int8 --block-size 32 --smooth": Settings(block_size=32, smooth=True),
    "--int8-dynamic": Settings(dynamic=True),
    "--int8 --kv-cache int8": Settings(cache="int8"),
    "--int4": Settings(precision="int4"),
    "--int4 --prefer size": Settings(precision="int4", prefer="size"),
    "--int4 --prefer size --method searched": Settings(precision="int4", prefer="size", method="searched"),
    "--int4 --prefer size --method nearest --no-smooth": Settings(
        precision="int4", prefer="size", method="nearest", smooth=False
    ),
}


def run_sweep(
    source: Bundle, out: Path, text: TokenRows, calibration: Mapping[str, TokenRows], progress: Progress
) -> Sweep:
    """Tries all settings. Rewrites `sweep.json` and `sweep.html` after each trial, so that an interrupted sweep continues.

    Args:
        source: The float bundle.
        out: The directory of the two files.
        text: The held-out text for the measurement.
        calibration: The calibration text, by precision.
        progress: Receives the progress of each step.

    Returns:
        The sweep with all trials.

    Raises:
        SlmError: If the source cannot be quantized, or `out` contains other files.
    """
    check_source(source, Settings())
    if source.manifest.device != "cpu":
        raise SlmError(
            f"{source.path} is for {source.manifest.device.upper()}, but a sweep measures speed on the CPU",
            "sweep a CPU bundle of the same checkpoint, then quantize this bundle with --int8 or --int4",
        )
    check_replaceable(out.resolve(), {SWEEP_FILE, SWEEP_PAGE})
    sweep = Sweep(
        short_name(source.path), source.model_bytes, text.name, text.rows.size, _key(source, text, calibration)
    )
    earlier = _earlier(out / SWEEP_FILE, sweep.key)
    if earlier:
        progress.note(f"reusing {len(earlier)} of {len(TRIALS)} trials from {out / SWEEP_FILE}")
    out.mkdir(parents=True, exist_ok=True)
    scratch = out.resolve().parent
    with quantizer_of(source, Settings(), calibration["int8"], text, progress, scratch) as quantizer:
        for number, (options, settings) in enumerate(TRIALS.items(), start=1):
            if options in earlier:
                sweep.trials.append(earlier[options])
                continue
            progress.note(f"{number} of {len(TRIALS)}: slm quantize {options}")
            try:
                check_source(source, settings)
                on_text = calibration[settings.precision]
                sweep.trials.append(_try(options, replace(quantizer, settings=settings, calibration=on_text)))
            except SlmError as error:
                sweep.skipped[options] = error.message
                progress.note(f"skipped: {error.message}")
            rest = [trial for name, trial in earlier.items() if name not in {each.options for each in sweep.trials}]
            _write(out, replace(sweep, trials=[*sweep.trials, *rest]))
    _write(out, sweep)
    return sweep


def as_dict(sweep: Sweep) -> dict[str, Any]:
    """Returns the contents of `sweep.json`."""
    smaller, faster = sweep.frontier(lambda trial: trial.bytes), sweep.frontier(lambda trial: -trial.decode_ratio)
    return asdict(sweep) | {
        "frontier": {
            "size": [trial.options for trial in sweep.trials if trial.options in smaller],
            "decode": [trial.options for trial in sweep.trials if trial.options in faster],
        }
    }


def _try(options: str, quantizer: Quantizer) -> Trial:
    """Makes and measures a temporary bundle with the quantizer's settings."""
    with released():
        plan = decide(quantizer)
        with quantizer.trial(plan) as bundle:
            before, after = quantizer.reference(), OnnxDecoder(bundle)
            change = measure(before, after, quantizer.evaluation, quantizer.progress)
            speed = speeds(before, after)
            size = graph_bytes(bundle)
    return Trial(options, plan.decisions(), size, change, round(speed.decode_ratio, 4), round(speed.prefill_ratio, 4))


def _key(source: Bundle, text: TokenRows, calibration: Mapping[str, TokenRows]) -> str:
    """Returns a hash of everything except the settings that a trial's figures depend on."""
    found = hashlib.sha256(__version__.encode())
    for name, entry in sorted(source.manifest.files.items()):
        if name.startswith(source.manifest.model):
            found.update(entry.sha256.encode())
    for each in (text, *[calibration[precision] for precision in sorted(calibration)]):
        found.update(f"{each.name} {each.rows.shape}".encode() + each.rows.astype("<i8").tobytes())
    return found.hexdigest()


def _earlier(path: Path, key: str) -> dict[str, Trial]:
    """Returns the trials of an earlier sweep with the same key, by their options."""
    if not path.is_file():
        return {}
    fields = read_json(path, "sweep")
    if fields.get("key") != key:
        return {}
    try:
        trials = [Trial(**each | {"change": Change(**each["change"])}) for each in fields["trials"]]
    except (KeyError, TypeError):
        raise SlmError(f"{path} is not a sweep file of slm", "remove it, or choose another --out") from None
    return {trial.options: trial for trial in trials if trial.options in TRIALS}


def _write(out: Path, sweep: Sweep) -> None:
    write_text(out / SWEEP_FILE, json.dumps(as_dict(sweep), indent=1) + "\n")
    write_text(out / SWEEP_PAGE, sweep_page(sweep))
