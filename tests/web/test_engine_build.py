"""The page's engine as it is checked in was built from the sources as they are checked in."""

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from slm.web.npm import HOME

# The sources are not part of the package.
ENGINE = Path(__file__).parents[2] / "web" / "engine"


@pytest.fixture(scope="module")
def builder() -> dict[str, Any]:
    return runpy.run_path(str(ENGINE / "build.py"))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ENGINE / "built.json").read_text(encoding="utf-8"))
    return found


def test_the_modules_are_those_of_the_sources(builder: dict[str, Any], record: dict[str, Any]) -> None:
    assert record["sources"] == builder["source_hash"](), "the sources have changed: make web-engine"
    for name, wanted in record["modules"].items():
        content = (HOME / "static" / "engine" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == wanted, (
            f"{name} is not the module that was built: make web-engine"
        )
    assert set(record["modules"]) == set(builder["MODULES"]) and len(builder["sources"]()) > 6


def test_the_same_compiler_makes_the_same_bytes(
    builder: dict[str, Any], record: dict[str, Any], tmp_path: Path
) -> None:
    if builder["compiler"]() != record["compiler"]:
        pytest.skip(f"the modules were built by {record['compiler']}, which is not installed")
    assert builder["build"](tmp_path) == record["modules"]


def test_a_module_imports_its_memory_and_nothing_else() -> None:
    """It has no data of its own either, which each thread would write into the common memory."""
    for path in sorted((HOME / "static" / "engine").glob("*.wasm")):
        sections = dict(sections_of(path.read_bytes()))
        assert sections[2].startswith(b"\x01\x03env\x06memory\x02\x03") and 11 not in sections and 8 not in sections, (
            path
        )


def sections_of(module: bytes) -> list[tuple[int, bytes]]:
    """The sections of a WebAssembly module: id and contents."""
    found, at = [], 8
    while at < len(module):
        kind, at, size, shift = module[at], at + 1, 0, 0
        while True:
            size |= (module[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if module[at - 1] < 0x80:
                break
        found.append((kind, module[at : at + size]))
        at += size
    return found
