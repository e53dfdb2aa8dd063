"""The files from npm that the page needs; `python -m slm.web.npm` fetches them.

`npm.json` pins packages by version and by npm's hash of the archive, and each file by size and SHA-256. `npm pack` downloads an
archive without its dependencies and runs no scripts; it uses the registry and the proxy that npm is configured with.
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

# The real directory: an editable installation links file by file, without files that are fetched later.
HOME = Path(__file__).resolve().parent
VENDOR = HOME / "static" / "vendor"
_HINT = "make web in a checkout, or python -m slm.web.npm; both need npm"
# Timeout of a connection, in seconds.
_SECONDS = 300


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(_Record):
    """A file of a package: its path in the archive, its size and its hash."""

    member: str
    bytes: int
    sha256: str


class Package(_Record):
    """A package of npm's registry, with the files that are used, by their local names."""

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
    """Returns every file by its local name."""
    return {name: member for package in packages().values() for name, member in package.files.items()}


def vendored(names: Iterable[str]) -> dict[str, Path]:
    """Returns the paths of files from npm, after checking each against its pin.

    Raises:
        SlmError: When a file is missing or altered; the message names it.
    """
    known, found = pinned(), {}
    for name in names:
        path = VENDOR / name
        if not path.is_file():
            raise SlmError(f"the page's {name} from npm is missing", _HINT)
        if path.stat().st_size != known[name].bytes or sha256_file(path) != known[name].sha256:
            raise SlmError(f"{path} is not the file that npm.json names", _HINT)
        found[name] = path
    return found


def fetch() -> list[str]:
    """Fetches files that are missing or altered, and returns their names.

    Raises:
        SlmError: When npm is missing or cannot reach its registry, or an archive or a file does not match its pin.
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
    """Returns a package's archive, after checking it against its pin."""
    wanted = f"{name}@{package.version}"
    npm = child.program("npm")
    if npm is None:
        raise SlmError(f"no npm to fetch {wanted} with", "install Node.js; only who builds the page needs it")
    command = [npm, "pack", wanted, "--ignore-scripts", "--loglevel=error", "--pack-destination", str(directory)]
    try:
        (directory / "package.json").write_text("{}", encoding="utf-8")  # npm does not look for settings in the parents
        done = child.run_program(command, directory=directory, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise SlmError(f"npm could not fetch {wanted} in {_SECONDS} s", "check the network") from None
    archives = list(directory.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["no archive"])[-1]
        raise SlmError(f"npm could not fetch {wanted} ({last})", "check the network, and npm config get registry")
    digest = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise SlmError(f"{wanted} is not the archive that npm.json names", "the registry sent something else")
    return archives[0]


def _unpack(archive: Path, package: Package, names: Iterable[str]) -> None:
    with tarfile.open(archive) as opened:
        for name in names:
            member = package.files[name]
            source = opened.extractfile(f"package/{member.member}")
            content = b"" if source is None else source.read()
            if hashlib.sha256(content).hexdigest() != member.sha256:
                raise SlmError(f"{member.member} in {archive.name} is not the file that npm.json names")
            with atomic_file(VENDOR / name) as partial:
                partial.write_bytes(content)


if __name__ == "__main__":
    try:
        done = fetch()
        sys.stdout.write(f"{VENDOR}: {', '.join(done) or 'nothing was missing'}\n")
    except SlmError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
