"""Builds the page's engine: `web/static/engine/*.wasm` from the C sources beside this file. `make web-engine` runs it.

The modules are checked in, so that only a change of the sources needs a compiler. `built.json` has the hash of the sources that
they were built from, the compiler, and their own hashes; `tests/web/test_engine_build.py` compares all of them. The same
compiler makes the same bytes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "static" / "engine"
RECORD = "built.json"
CLANG, LINKER = os.environ.get("WEB_CLANG", "clang-19"), os.environ.get("WEB_LINKER", "wasm-ld-19")
FLAGS = (
    *(
        "--target=wasm32",
        "-std=c17",
        "-O3",
        "-msimd128",
        "-matomics",
        "-mbulk-memory",
        "-ffreestanding",
        "-fno-builtin",
    ),
    *("-nostdlib", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"),
)
LINK_FLAGS = (
    *("--no-entry", "--import-memory", "--shared-memory", "--max-memory=4294967296", "--export=__stack_pointer"),
    *("-z", "stack-size=65536", "--stack-first", "--strip-all"),
)
# The modules, by the flags that they add.
MODULES = {"simd.wasm": (), "relaxed.wasm": ("-mrelaxed-simd",)}


def sources() -> list[Path]:
    """Returns the C files and headers."""
    return sorted(path for path in HERE.iterdir() if path.suffix in (".c", ".h"))


def source_hash() -> str:
    """Returns a hash of the sources and of the flags."""
    found = hashlib.sha256(json.dumps([FLAGS, LINK_FLAGS, MODULES]).encode())
    for path in sources():
        found.update(f"{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def compiler() -> str:
    """Returns the version of the compiler; empty if it is not installed."""
    if shutil.which(CLANG) is None or shutil.which(LINKER) is None:
        return ""
    return subprocess.run([CLANG, "--version"], capture_output=True, check=True, text=True).stdout.splitlines()[0]


def build(out: Path) -> dict[str, str]:
    """Builds the modules into a directory; returns their hashes."""
    out.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, more in MODULES.items():
        with tempfile.TemporaryDirectory() as scratch:
            objects = []
            for source in (path for path in sources() if path.suffix == ".c"):
                objects.append(f"{scratch}/{source.stem}.o")
                subprocess.run([CLANG, *FLAGS, *more, "-c", source.name, "-o", objects[-1]], check=True, cwd=HERE)
            subprocess.run([LINKER, *LINK_FLAGS, *objects, "-o", str(out / name)], check=True)
        (out / name).chmod(0o644)
        hashes[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    return hashes


if __name__ == "__main__":
    if not compiler():
        sys.exit(f"{CLANG} or {LINKER} is not installed; on Debian: apt-get install clang-19 lld-19")
    record = {"compiler": compiler(), "sources": source_hash(), "modules": build(OUT)}
    (HERE / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="")
