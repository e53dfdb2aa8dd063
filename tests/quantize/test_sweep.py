"""Sweeps: trials match `slm quantize`, the frontier is Pareto-optimal, and a second run continues."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.manifest import Bundle
from slm.core.progress import Silent
from slm.quantize import sweep as module
from slm.quantize.make import quantize_bundle
from slm.quantize.results import Change, Sweep, Trial
from slm.quantize.settings import Gate, Settings
from slm.quantize.sweep import SWEEP_FILE, SWEEP_PAGE, run_sweep
from slm.quantize.texts import TokenRows

INT8, INT4 = "--int8 --block-size 32 --smooth", "--int4 --prefer size --method nearest --no-smooth"
FEW = {
    INT8: Settings(block_size=32, smooth=True),
    "--int8 --block-size 128 --smooth": Settings(block_size=128, smooth=True),  # does not fit
    INT4: Settings(precision="int4", prefer="size", method="nearest", smooth=False),
}


class Notes(Silent):
    """Records notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def text_of(seed: int) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, 320, (4, 60)))


CALIBRATION = {"int8": text_of(6), "int4": text_of(7)}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIALS", FEW)


def run(source: Bundle, out: Path, seed: int = 5) -> tuple[Sweep, list[str]]:
    notes = Notes()
    return run_sweep(source, out, text_of(seed), CALIBRATION, notes), notes.notes


def test_trials_are_what_quantize_makes(shared_bundle: Bundle, tmp_path: Path) -> None:
    sweep, notes = run(shared_bundle, tmp_path / "sweep")
    assert [trial.options for trial in sweep.trials] == [INT8, INT4]
    assert "not a multiple of the block size 128" in sweep.skipped["--int8 --block-size 128 --smooth"]
    assert any("skipped" in note for note in notes)
    for trial in sweep.trials:
        settings = FEW[trial.options]
        shut = Settings(**settings.__dict__ | {"gate": Gate(None)})
        calibration = CALIBRATION[settings.precision]
        _, report = quantize_bundle(shared_bundle, tmp_path / "made", text_of(5), shut, None, calibration)
        assert trial.change == report.change and trial.bytes == report.bytes_after
        assert trial.decode_ratio > 0 and trial.decided["products"] == report.settings["products"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [SWEEP_PAGE, SWEEP_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "sweep"]  # no temporary bundle remains
    written = read_json(tmp_path / "sweep" / SWEEP_FILE, "sweep")
    assert written["frontier"]["size"] == [INT8, INT4]  # one is more accurate, the other smaller
    page = (tmp_path / "sweep" / SWEEP_PAGE).read_text(encoding="utf-8")
    assert page.count("<circle") == 4 and "in 2 ways" in page and INT4 in page and "http" not in page


def test_a_second_run_keeps_what_was_tried(
    shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(shared_bundle, tmp_path / "sweep")
    tried: list[str] = []
    original = module._try
    monkeypatch.setattr(module, "_try", lambda *given: (tried.append(given[0]), original(*given))[1])
    second, notes = run(shared_bundle, tmp_path / "sweep")
    assert second.trials == first.trials and INT8 not in tried and INT4 not in tried
    assert any("reusing 2 of 3 trials" in note for note in notes)
    run(shared_bundle, tmp_path / "sweep", seed=8)  # another text repeats all trials
    assert {INT8, INT4} <= set(tried)


def test_ctrl_c_keeps_what_was_finished(shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = module.measure
    calls: list[int] = []

    def interrupted(*given: Any) -> Change:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(shared_bundle, tmp_path / "sweep")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]  # the temporary bundle was removed
    assert [trial["options"] for trial in read_json(tmp_path / "sweep" / SWEEP_FILE, "sweep")["trials"]] == [INT8]
    sweep, notes = run(shared_bundle, tmp_path / "sweep")
    assert [trial.options for trial in sweep.trials] == [INT8, INT4] and "1 of 3" in notes[0]


def test_what_stands_there_is_left_alone(shared_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(SlmError, match="contains other files"):
        run(shared_bundle, tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / SWEEP_FILE).write_text("[1]")
    with pytest.raises(SlmError, match="not a JSON object"):
        run(shared_bundle, tmp_path / "other")
    assert not (tmp_path / "other" / SWEEP_PAGE).exists()


def trial(options: str, size: int, kl: float, speed: float) -> Trial:
    return Trial(options, {}, size, Change(10, kl, 1.0, 1.0, 10.0, 10.0), speed, 1.0)


def test_the_frontier() -> None:
    sweep = Sweep("b", 100, "text", 10, "key")
    sweep.trials = [
        trial("small", 10, 0.1, 1.0),
        trial("good", 30, 0.01, 2.0),
        trial("neither", 31, 0.02, 1.5),
        trial("as large as good, and worse", 30, 0.011, 3.0),
        trial("the same as small", 10, 0.1, 1.0),
    ]
    assert sweep.frontier(lambda trial: trial.bytes) == {"small", "good", "the same as small"}
    assert sweep.frontier(lambda trial: -trial.decode_ratio) == {"good", "as large as good, and worse"}


def test_options_say_what_settings_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of each trial, parsed by `slm quantize`, produce the trial's settings."""
    import importlib

    from slm.cli.commands.quantize import quantize

    monkeypatch.undo()
    everything = importlib.reload(module).TRIALS
    assert len(everything) == 12
    for options, settings in everything.items():
        given = quantize.make_context("quantize", options.split()).params
        assert given["int4"] == (settings.precision == "int4") and given["int8_dynamic"] == settings.dynamic
        assert given["int8"] == (settings.precision == "int8" and not settings.dynamic)
        block = None if settings.block_size is None else str(settings.block_size)
        names = {"prefer": settings.prefer, "block_size": block, "method": settings.method}
        names |= {"smooth": settings.smooth, "kv_cache": settings.cache, "target_size": settings.target_bytes}
        assert {name: given[name] for name in names} == names
