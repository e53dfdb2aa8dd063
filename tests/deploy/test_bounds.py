"""Versions that may be installed: none with a known hole, neither by pyproject.toml nor in the files that pin them."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The first version without what is known of a package's older ones, as far as a server or a reader of untrusted files meets it.
FIRST_SOUND = {
    "starlette": (
        "1.3.1",
        "CVE-2026-48710 (Host header), PYSEC-2026-248 (paths without a slash), CVE-2025-62727 (ranges)",
    ),
    "fastapi": ("0.133.1", "the first that permits starlette 1"),
    "h11": ("0.16.0", "CVE-2025-43859: chunked bodies, request smuggling"),
    "jinja2": ("3.1.6", "CVE-2025-27516, CVE-2024-56326: ways out of the sandbox"),
    "uvicorn": ("0.46.0", "the oldest that the connections' deadlines are tested with"),
    "pydantic": ("2.4.0", "CVE-2024-3772: a regular expression"),
    "onnxruntime": ("1.29", "older ones read a graph's external data from any path"),
}


def numbers(text: str) -> tuple[int, ...]:
    found = [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def permitted() -> dict[str, str]:
    """Returns the lowest permitted version of each package that a server needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found = {}
    for each in (*project["dependencies"], *extras["cpu"], *extras["serve"]):
        name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups()  # type: ignore[union-attr]
        found[name.lower()] = lowest
    return found


def pinned(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return {
        key.lower().replace("_", "-"): of
        for key, of in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE)
    }


@pytest.mark.parametrize("package", FIRST_SOUND)
def test_no_version_with_a_known_hole_is_permitted(package: str) -> None:
    first, why = FIRST_SOUND[package]
    assert numbers(permitted()[package]) >= numbers(first), why
    for file in ("constraints.txt", "constraints-hashes.txt"):
        assert numbers(pinned(file)[package]) >= numbers(first), (file, why)


def test_versions_are_compared_by_their_numbers() -> None:
    assert numbers("0.9") < numbers("0.16.0") == numbers("0.16") < numbers("1.3.1") < numbers("1.10.0")


def test_what_a_container_installs_is_pinned_by_hashes() -> None:
    """All that a server needs, in the versions of constraints.txt, each with hashes; `make hashes` writes the file."""
    text = (ROOT / "constraints-hashes.txt").read_text(encoding="utf-8")
    hashed, tested = pinned("constraints-hashes.txt"), pinned("constraints.txt")
    assert set(permitted()) <= set(hashed) and "torch" not in hashed
    for name, of in hashed.items():
        assert tested.get(name, of) == of, name
    entries = re.split(r"\n(?=\S)", text.partition("\n#    make hashes\n")[2].strip())
    assert len(entries) == len(hashed)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    container = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
    assert "--require-hashes --only-binary :all: --requirement constraints-hashes.txt" in container
    installs = re.findall(r"pip install .*", container)
    assert all("--require-hashes" in each or "--no-deps" in each for each in installs) and len(installs) == 2


@pytest.mark.skipif("SLM_TEST_OLDEST" not in os.environ, reason="only in `make test-oldest`")
def test_these_are_the_oldest() -> None:
    for name, lowest in permitted().items():
        assert numbers(version(name)) == numbers(lowest), name
