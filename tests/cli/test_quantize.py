"""`slm quantize`: what it makes by which options, what it says, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle

Slm = Callable[..., Any]
LITTLE = ("--tokens", "256", "--calibration-tokens", "256", "--window", "64")
# Without choices by measurement, each of which takes as long as a quantization.
PLAIN = (*LITTLE, "--no-smooth", "--kv-cache", "float32")


@pytest.mark.parametrize(
    ("options", "precision", "ending"),
    [
        (("--int8",), "int8", "int8"),
        (("--int8-dynamic",), "int8", "int8-dynamic"),
        (("--int4", "--max-kl", "1"), "int4", "int4"),
        (("--int4", "--prefer", "size", "--method", "searched", "--smooth", "--max-kl", "1"), "int4", "int4"),
    ],
)
def test_what_it_makes(
    slm: Slm, shared_bundle: Bundle, tmp_path: Path, options: tuple[str, ...], precision: str, ending: str
) -> None:
    out = tmp_path / f"made-{ending}"
    result = slm("quantize", *options, shared_bundle.path, *LITTLE, "--out", out, "--json")
    assert result.code == 0, result.err
    figures = json.loads(result.out)  # one object, and nothing else
    bundle = Bundle.open(out)
    quantization, quality = bundle.manifest.quantization, bundle.manifest.quality
    assert quantization is not None and quality is not None and bundle.manifest.precision == precision
    assert figures["bundle"] == str(out) and figures["change"]["kl_nats"] == quality.kl_nats
    assert figures.pop("next") == f"slm verify {out}"
    assert figures == {"bundle": str(out)} | json.loads((out / "report.json").read_text())
    assert (out / "report.html").is_file()
    if "--method" in options:
        assert quantization.method == "searched" and quantization.smoothing is not None
    dynamic = {path for path, scheme in quantization.schemes.items() if scheme.dynamic}
    assert len(dynamic) == (16 if ending == "int8-dynamic" else 0)


def test_what_it_says(slm: Slm, shared_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    result = slm("quantize", "--int8", "--kv-cache", "int8", "--no-smooth", shared_bundle.path, *LITTLE, "--out", out)
    assert result.code == 0, result.err
    for words in (
        "graph and weights",
        "KL divergence",
        "same top-1, top-5",
        "decode, tokens/s",
        "least accurate layers",
    ):
        assert words in result.out
    assert "(limit 0.02)." in result.err and "report.html" in result.err


def test_a_target_size(slm: Slm, shared_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    arguments = ("quantize", "--int4", shared_bundle.path, *PLAIN, "--max-kl", "1", "--out", out)
    result = slm(*arguments, "--target-size", "0.32MB", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["bytes_after"] <= 320_000
    result = slm(*arguments, "--target-size", "10KB")
    assert result.code == 1 and "the weights take at least" in result.err and "--target-size" in result.err
    assert json.loads((out / "report.json").read_text())["bytes_after"] <= 320_000  # what stood there stands


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "choose one of"),
        (("--int8", "--int4"), 2, "choose one of"),
        (("--int8", "--sweep"), 2, "choose one of"),
        (("--int8", "--target-size", "1MB"), 1, "--target-size requires --int4"),
        (("--int8", "--head-bits", "4"), 1, "--head-bits requires --int4"),
        (("--int4", "--head-bits", "2"), 2, "'2' is not one of '4', '8'"),
        (("--sweep", "--head-bits", "8"), 1, "--sweep tries"),
        (("--int8-dynamic", "--block-size", "32"), 1, "does not support --block-size"),
        (("--int8-dynamic", "--method", "gptq"), 1, "does not support --block-size or --method"),
        (("--int8", "--method", "gptq"), 1, "supports the method nearest only, not gptq"),
        (("--int8", "--block-size", "128"), 1, "not a multiple of the block size 128"),
        (("--sweep", "--prefer", "size"), 1, "--sweep tries"),
        (("--sweep", "--max-kl", "0.1"), 1, "--sweep tries"),
        (("--int4", "--target-size", "large"), 2, "is not a size"),
        (("--int8", "--max-ppl-increase", "-1%"), 2, "is not a share"),
        (("--int8", "--max-kl", "1e-9"), 1, "nothing was written"),
        (("--int8", "--max-ppl-increase", "0", "--max-kl", "1", "--data", "noise.txt"), 1, "too little text"),
        (("--int8", "--data", "nowhere.txt"), 1, "not found: nowhere.txt"),
    ],
)
def test_what_it_refuses(
    slm: Slm, shared_bundle: Bundle, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    Path("noise.txt").write_text(" ")
    result = slm("quantize", *options, shared_bundle.path, *LITTLE, "--out", tmp_path / "made")
    assert result.code == code and said in result.err and "Traceback" not in result.err, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["noise.txt"] and result.out == ""


@pytest.mark.parametrize(("given", "wanted"), [("110MB", 110e6), ("0.5 GiB", 2**29), ("7", 7e6), ("10 kb", 1e4)])
def test_sizes(given: str, wanted: float) -> None:
    from slm.cli.options import ByteCount

    assert ByteCount("MB").convert(given, None, None) == wanted


def test_a_sweep(slm: Slm, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slm.quantize import sweep

    few = {name: settings for name, settings in sweep.TRIALS.items() if name.startswith("--int8 --block-size")}
    monkeypatch.setattr(sweep, "TRIALS", dict(list(few.items())[2:4]))
    arguments = ("quantize", "--sweep", shared_bundle.path, *LITTLE, "--out", tmp_path / "sweep")
    result = slm(*arguments)
    assert result.code == 0, result.err
    # Blocks of 64 do not fit 96 inputs, and are skipped with the reason.
    assert "skipped" in result.err and "sweep.html" in result.err
    monkeypatch.setattr(sweep, "TRIALS", dict(list(few.items())[4:]))
    result = slm(*arguments, "--json")
    assert result.code == 0, result.err
    figures = json.loads(result.out)
    assert [each["options"] for each in figures["trials"]] == list(few)[4:]
    assert set(figures["frontier"]["size"]) <= set(few) and figures["out"] == str(tmp_path / "sweep")
    result = slm(*arguments)
    assert "reusing 2 of 2 trials" in result.err and "--int8 --block-size 32 --smooth" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]


def test_a_head_in_halves(slm: Slm, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("quantize", "--int8", "--head", "halves", shared_bundle.path, *PLAIN)
    monkeypatch.setattr("slm.quantize.halves.MAX_KL_NATS", 1.0)
    out = tmp_path / "halves"
    result = slm(*options, "--out", out)
    assert result.code == 0, result.err
    assert "Single-token steps from halves: KL " in result.err
    head = json.loads((out / "report.json").read_text())["head"]
    assert head["tokens"] > 100 and 0 < head["kl_nats"] < 1 and head["same_top1"] > 0.95
    monkeypatch.setattr("slm.quantize.halves.MAX_KL_NATS", 1e-9)
    result = slm(*options, "--out", tmp_path / "refused")
    assert result.code == 1 and "from halves diverge" in result.err and "omit --head halves" in result.err
    assert not (tmp_path / "refused").exists()
    result = slm("quantize", "--sweep", "--head", "halves", shared_bundle.path)
    assert result.code == 1 and "omit the other settings" in result.err
