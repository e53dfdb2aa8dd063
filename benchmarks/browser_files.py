"""The files that `benchmarks/browser.py` runs: one checkpoint in every format, under bench-results/browser/NAME."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path("bench-results/browser")
# Quality is not measured here, and random weights have none.
_LOOSELY = ("--tokens", "1024", "--max-kl", "99")


def prepare(name: str, checkpoint: Path | None, given: dict[str, Path]) -> Path:
    """Makes every file of a model that is not there yet, and returns their directory.

    Args:
        name: The name of the model.
        checkpoint: A checkpoint; None for random weights in the 270M shape.
        given: Files that exist already, by the names that they get.
    """
    home = HOME / name
    home.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        given = {"checkpoint": checkpoint} | given
    for each, path in given.items():
        if not (home / each).exists():
            (home / each).symlink_to(path.resolve())
    if not (home / "checkpoint").exists():
        from peer_files import _make_checkpoint

        _make_checkpoint(home / "checkpoint")
    source = home / "checkpoint"
    _make(home / "q8_0.gguf", ("export", "--gguf", source, "--gguf-type", "q8_0"))
    if not (home / "onnx-int8").exists():
        _make(home / "onnx", ("export", "--onnx", source))
        _make(home / "onnx-int8", ("quantize", "--int8", home / "onnx", *_LOOSELY))
    if not (home / "portable-int8").exists():
        _make(home / "portable", ("export", "--onnx", source, "--target", "portable"))
        _make(home / "portable-int8", ("quantize", "--int8", home / "portable", *_LOOSELY))
    for each in ("onnx", "portable"):  # float32 takes four times the space and is not needed any more
        if (home / each).is_dir() and not (home / each).is_symlink():
            shutil.rmtree(home / each)
    return home


def size(path: Path) -> int:
    """Returns the bytes of a file, or of a model's files for generation in a directory."""
    if path.is_file():
        return path.stat().st_size
    wanted = (each for each in path.rglob("*") if each.is_file() and not each.name.startswith("report"))
    return sum(each.stat().st_size for each in wanted)


def _make(path: Path, command: Sequence[object]) -> None:
    if path.exists():
        return
    print(f"making {path}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "slm", *map(str, command), "--out", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
