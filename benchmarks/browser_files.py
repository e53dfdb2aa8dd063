"""The files that `benchmarks/browser.py` runs: one checkpoint in every format, under bench-results/browser/NAME."""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

HOME = Path("bench-results/browser")
# Quality is not measured here, and random weights have none.
_LOOSELY = ("--tokens", "1024", "--max-kl", "99")


def prepare(name: str, checkpoint: Path | None, given: dict[str, Path], wanted: Collection[str]) -> Path:
    """Makes the files of a model that are not there yet, and returns their directory.

    Args:
        name: The name of the model.
        checkpoint: A checkpoint; None for random weights in the 270M shape.
        given: Files that exist already, by the names that they get.
        wanted: The names of the files.

    Raises:
        SystemExit: If a file does not exist, the model has another one of that name, or there is nothing to make one from.
    """
    home = HOME / name
    if checkpoint is not None:
        given = {"checkpoint": checkpoint} | given
    for each, path in given.items():
        if not path.exists():
            raise SystemExit(f"not found: {path}")
        # Never replace a file: those made from the older one would stay.
        if os.path.lexists(home / each) and not (home / each).exists():
            raise SystemExit(f"{home / each} is a link to a file that is gone; remove {home}")
        if (home / each).exists() and not (home / each).samefile(path):
            raise SystemExit(f"{home} has another {each} than {path}: choose another --name")
    home.mkdir(parents=True, exist_ok=True)
    for each, path in given.items():
        if not (home / each).exists():
            (home / each).symlink_to(path.resolve())
    made = {"q8_0.gguf", "onnx-int8", "portable-int8"} & set(wanted)
    missing = {each for each in made if not (home / each).exists()}
    if missing and not (home / "checkpoint").exists():
        if given:  # random weights beside the files of a model would be compared with them
            raise SystemExit(f"a --checkpoint is needed to make {', '.join(sorted(missing))}")
        from peer_files import _make_checkpoint

        _make_checkpoint(home / "checkpoint")
    source = home / "checkpoint"
    if "q8_0.gguf" in missing:
        _make(home / "q8_0.gguf", ("export", "--gguf", source, "--gguf-type", "q8_0"))
    if "onnx-int8" in missing:
        _make(home / "onnx", ("export", "--onnx", source))
        _make(home / "onnx-int8", ("quantize", "--int8", home / "onnx", *_LOOSELY))
    if "portable-int8" in missing:
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
