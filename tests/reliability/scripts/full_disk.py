"""Runs every command that writes on a small file system of its own: with room, without, and read-only.

    unshare -Urm python full_disk.py MOUNTPOINT CHECKPOINT TEXT ROWS

Prints one JSON object a run: command, how the disk was, exit code, what was said, whether what was there is as it was.
"""

import gc
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import slm.web
from slm.cli.main import main

BALLAST = "ballast"
ONLY_SOME = (0.0, 0.3, 0.9)


def run(*arguments: object) -> tuple[int, str]:
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as done:
            return int(done.code or 0), said.getvalue()
    raise AssertionError


def tree(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != BALLAST
    }


def used(disk: Path) -> int:
    about = os.statvfs(disk)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def fill(disk: Path, free: int) -> None:
    about = os.statvfs(disk)
    with (disk / BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, about.f_bavail * about.f_frsize - free))


def mount(disk: Path, options: str) -> None:
    subprocess.run(
        ["mount", *(["-t", "tmpfs"] if "size" in options else []), "-o", options, "tmpfs", str(disk)], check=True
    )


def commands(
    disk: Path, checkpoint: Path, text: Path, rows: Path
) -> dict[str, tuple[tuple[object, ...], tuple[object, ...]]]:
    """Returns the arguments that make an artifact, and those that make it again, by name."""
    bundle, adapter = disk / "onnx", disk / "adapter"
    quick = ("--epochs", 1, "--rank", 2, "--samples", 0)
    tune = ("finetune", "--lora", rows, "--base", checkpoint, "--out", adapter, *quick)
    same: dict[str, tuple[object, ...]] = {
        "export": ("export", "--onnx", checkpoint, "--out", bundle),
        "gguf": ("export", "--gguf", "--gguf-type", "f32", checkpoint, "--out", disk / "model.gguf"),
        "quantize": ("quantize", "--int8", bundle, "--out", disk / "int8", "--data", text, "--tokens", 256, "--max-kl", 9,
                     "--max-ppl-increase", 9, "--no-smooth", "--kv-cache", "float32", "--calibration", text,
                     "--calibration-tokens", 256),
        "import": ("import", checkpoint, "--out", disk / "imported"),
        "merge": ("merge", checkpoint, checkpoint, "--out", disk / "merged"),
        "trim": ("trim", checkpoint, "--data", text, "--coverage", "90%", "--out", disk / "trimmed"),
    }  # fmt: skip
    if (Path(slm.web.__file__).resolve().parent / "static" / "vendor").is_dir():  # what `make web` fetches
        same["web"] = ("web", bundle, "--out", disk / "site")
    found = {name: (arguments, arguments) for name, arguments in same.items()}
    found["finetune"] = (tune, (*tune, "--overwrite"))
    export = ("export", "--onnx-adapter", "--adapter", adapter, checkpoint, "--out", disk / "small.onnx_adapter")
    found["adapter"] = (export, export)
    return found


def fresh(disk: Path, text: Path) -> dict[str, tuple[object, ...]]:
    """Returns the arguments of commands that replace nothing, by name."""
    settings = ("model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48", "batch.context=32",
                "batch.batch_size=4", "schedule.micro_steps=4", "schedule.warmup_micro_steps=1",
                "evaluation.every_micro_steps=2", "evaluation.windows=4")  # fmt: skip
    return {
        "train": ("train", "--recipe", "tiny", "--data", text, "--out", disk / "run",
                  *(each for setting in settings for each in ("--set", setting))),
        "data": ("data", "prepare", "--data", text, "--vocab-size", 300, "--out", disk / "dataset", "--workers", 1),
    }  # fmt: skip


def tell(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def tried(
    disk: Path, name: str, arguments: tuple[object, ...], size: int, after: Callable[[], None] = lambda: None
) -> None:
    before = tree(disk)
    for share in ONLY_SOME:
        fill(disk, int(size * share))
        code, said = run(*arguments)
        (disk / BALLAST).unlink()
        left = tree(disk)
        tell(name=name, disk=f"{share:.0%} free", code=code, said=said, kept=before.items() <= left.items(),
             added=sorted(left.keys() - before.keys()))  # fmt: skip
        after()
    gc.collect()  # the errors of the commands may still refer to open files, with which the file system cannot become read-only
    mount(disk, "remount,ro")
    code, said = run(*arguments)
    mount(disk, "remount,rw")
    left = tree(disk)
    tell(name=name, disk="read-only", code=code, said=said, kept=before.items() <= left.items(),
         added=sorted(left.keys() - before.keys()))  # fmt: skip


def _main() -> None:
    disk, checkpoint, text, rows = map(Path, sys.argv[1:])
    mount(disk, "size=64m")
    for name, (make, again) in commands(disk, checkpoint, text, rows).items():
        before = used(disk)
        code, said = run(*make)
        size = used(disk) - before
        tell(name=name, disk="empty", code=code, said=said, kept=True, added=[])
        tried(disk, name, again, size)
    for name, arguments in fresh(disk, text).items():
        before = used(disk)
        code, said = run(*arguments)
        size = used(disk) - before
        tell(name=name, disk="empty", code=code, said=said, kept=True, added=[])
        out = Path(str(arguments[arguments.index("--out") + 1]))

        def clear(out: Path = out) -> None:
            import shutil

            shutil.rmtree(out, ignore_errors=True)
            for left in out.parent.glob(f".{out.name}.*"):
                shutil.rmtree(left)

        clear()
        tried(disk, name, arguments, size, clear)


if __name__ == "__main__":
    _main()
