"""What is stored under ./runs and in the cache: size, origin, quality and age of each artifact; and its removal."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.core import renames, systems
from slm.core.artifacts import Artifact, artifacts, read_artifact, unfinished
from slm.core.errors import SlmError
from slm.core.files import scratch_directory
from slm.core.locks import held, sole
from slm.core.names import short_name
from slm.core.runs import RUNS, cached_bundles

_STOP = "stop the slm serve, slm chat or other program that uses it"


@dataclass(frozen=True)
class Stored:
    """One artifact on disk.

    Attributes:
        name: The name that commands accept.
        artifact: The artifact.
        bytes: Size of its files.
        cached: Whether it is in the cache, not under ./runs.
    """

    name: str
    artifact: Artifact
    bytes: int
    cached: bool

    @property
    def precision(self) -> str:
        """The precision of a bundle; empty for other artifacts."""
        return str(self.artifact.record.get("precision") or "") if self.artifact.kind == "bundle" else ""

    @property
    def source(self) -> str | None:
        """The artifact that a bundle or an adapter was made from; None if that is not recorded."""
        record = self.artifact.record
        if self.artifact.kind == "adapter":
            base, rows = (str(_mapping(record, name).get("path") or "") for name in ("base", "data"))
            return f"{short_name(Path(base))} and {Path(rows).name}" if base and rows else None
        made = _mapping(record, "provenance")
        path = (None if self.cached else made.get("bundle")) or made.get("checkpoint")
        return short_name(Path(path)) if self.artifact.kind == "bundle" and isinstance(path, str) else None

    @property
    def quality(self) -> dict[str, float]:
        """The recorded figures: the held-out loss and bits per byte, or the divergence from the source, in nats."""
        record = self.artifact.record
        metrics = _mapping(record, "metrics") if self.artifact.kind != "bundle" else _mapping(record, "quality")
        names = ("loss", "loss_after", "bits_per_byte", "kl_nats")
        found = {name: metrics[name] for name in names if isinstance(metrics.get(name), float)}
        if "loss_after" in found:
            found["loss"] = found.pop("loss_after")
        return found


def stored() -> list[Stored]:
    """Returns the artifacts under ./runs and in the cache, the newest first."""
    found = artifacts()
    often = Counter(short_name(each.path) for each in found)
    kept = [Stored(_name(each.path, often), each, size(each.path), False) for each in found]
    cache = cached_bundles()
    places = sorted(cache.iterdir()) if cache.is_dir() else []
    cached = [each for path in places if not path.name.startswith(".") and (each := read_artifact(path)) is not None]
    kept += [Stored(each.path.name, each, size(each.path), True) for each in cached]
    return sorted(kept, key=lambda each: each.artifact.created, reverse=True)


def _name(path: Path, often: Mapping[str, int]) -> str:
    """Returns the short name of an artifact under ./runs; if an adapter and a checkpoint share it, the complete one."""
    short = short_name(path)
    return short if often[short] == 1 else path.relative_to(RUNS).as_posix()


def size(path: Path) -> int:
    """Returns the bytes of a file, or of all files below a directory; links count as themselves."""
    return sum(file.lstat().st_size for file in _files(path))


def removable(name: str) -> Path:
    """Returns what a name means, if slm may remove it: a run or an artifact under ./runs, or a bundle in the cache.

    Args:
        name: A run, `RUN/ARTIFACT`, a name in the cache, or a path to one of these.

    Raises:
        SlmError: When there is nothing of that name, or it is outside both places, or neither a run nor an artifact.
    """
    places = [place for place in _places(name) if os.path.lexists(place)]
    if len(places) > 1:
        raise SlmError(f"{name} is ambiguous", f"use one of {', '.join(map(str, places))}")
    homes = RUNS.resolve(), cached_bundles().resolve()
    place = places[0] if places else RUNS
    path = place.parent.resolve() / place.name
    if ".." in place.parts or not any(home in path.parents for home in homes):
        raise SlmError(f"there is no {name} under ./{RUNS} or in the cache", "slm list lists what there is")
    if place.is_symlink():
        raise SlmError(f"{place} is a link", "remove it yourself")
    is_run = path.parent == homes[0] and (artifacts(place) or unfinished(place))
    if read_artifact(place) is None and not is_run:
        raise SlmError(f"{place} is neither a run nor an artifact of slm", "remove it yourself")
    return place


def remove(path: Path) -> None:
    """Removes a run or an artifact. It first leaves its place, so that an interruption leaves no half of it in use.

    Raises:
        SlmError: When another process is writing it or, on Windows, uses one of its files.
    """
    working = held(path) if path.is_dir() else nullcontext()
    with sole(path.resolve()), working, scratch_directory(path.parent, "removed") as scratch:
        try:
            renames.replace(path, scratch / path.name)
        except PermissionError:
            if systems.WINDOWS:
                raise SlmError(f"cannot remove {path}: a program uses one of its files", _STOP) from None
            raise


def _places(name: str) -> Iterator[Path]:
    """Yields the paths that a name may mean, each once."""
    run, _, rest = (name.replace("\\", "/") if systems.WINDOWS else name).strip("/").partition("/")
    below = [RUNS / run / kind / rest for kind in ("checkpoint", "adapters")] if rest else []
    yield from dict.fromkeys((cached_bundles() / name, RUNS / name, *below, Path(name)))


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for directory, _, names in os.walk(path):
        yield from (Path(directory, name) for name in names)


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}
