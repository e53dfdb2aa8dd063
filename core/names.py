"""Resolves a name given to a command: a path, a run, or an artifact of a run; errors suggest what to type."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from slm.core import systems
from slm.core.artifacts import (
    ADAPTER_SUFFIX,
    Artifact,
    Kind,
    artifacts,
    kind_of,
    newest_bundle,
    newest_checkpoint,
    newest_model,
    read_artifact,
    unfinished,
)
from slm.core.checkpoint import CONFIG_FILE
from slm.core.errors import SlmError
from slm.core.runs import RUNS
from slm.core.shell import quoted
from slm.core.weights import WEIGHTS_FILE

# Directories of a run, relative to the run, that contain its artifacts.
_PLACES = ("", "checkpoint", "adapters")
# A path that never exists.
_NOWHERE = "/dev/null/nothing"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The most names that a message lists.
_LISTED = 8


def resolve(name: str, kinds: Sequence[Kind], others: Sequence[str] = ()) -> tuple[Path, tuple[str, ...]]:
    """Returns the artifact that a name refers to, and notices about the choice.

    An existing path is used unchanged. Otherwise the name is that of a run, of `RUN/ARTIFACT`, or of an artifact whose name
    occurs once under `./runs`. A run refers to its newest suitable artifact.

    Args:
        name: The name as typed.
        kinds: The kinds of artifacts that the command supports.
        others: Further valid names, for suggestions.

    Returns:
        The path, and sentences to show to the user.

    Raises:
        SlmError: If there is no such artifact, it is of another kind, or the name is ambiguous; the hint says what to type.
    """
    if not name:
        raise SlmError("the name of an artifact is empty", _what_it_is(kinds))
    path = _path(name)
    if (kind := kind_of(path)) is not None:
        return _suitable(path, kind, kinds), ()
    places = (path, RUNS / name) if _is_plain(name) else (path,)
    for place in places:
        if (kind := kind_of(place)) is not None:
            return _suitable(place, kind, kinds), (f"Using {place} ({kind} named {name}).",)
        if place.is_dir() and place.resolve() != RUNS.resolve() and (artifacts(place) or unfinished(place)):
            return _of_run(place, kinds)
    found = _named(name) if _is_plain(name) else []
    fitting = [each for each in found if each.kind in kinds]
    if len(fitting) > 1:
        listed = ", ".join(short_name(each.path) for each in fitting)
        raise SlmError(f"{name} is ambiguous: several artifacts have this name", f"use one of {listed}")
    if fitting:
        return fitting[0].path, (f"Using {fitting[0].path} ({fitting[0].kind} named {name}).",)
    if found:
        return _suitable(found[0].path, found[0].kind, kinds), ()
    raise _not_found(name, path, kinds, others)


def short_name(path: Path) -> str:
    """Returns the shortest name for an artifact: `tiny/onnx-int8` for `runs/tiny/onnx-int8`.

    For an artifact outside `./runs`, returns the name of its directory.
    """
    try:
        parts = path.resolve().relative_to(RUNS.resolve()).parts
    except ValueError:
        return path.resolve().name
    short = "/".join(part for i, part in enumerate(parts) if not (i == 1 and len(parts) > 2 and part in _PLACES))
    return short or path.resolve().name


def known_names(kinds: Sequence[Kind]) -> list[str]:
    """Returns the names that `resolve` accepts: runs, and the short names of artifacts."""
    found = [each for each in artifacts() if each.kind in kinds]
    runs = dict.fromkeys(short_name(each.path).partition("/")[0] for each in found)
    return list(dict.fromkeys((*runs, *(short_name(each.path) for each in found))))


def _path(name: str) -> Path:
    """Returns the path that a name spells, or a path that does not exist if the name cannot be a path.

    Raises:
        SlmError: If permissions do not allow access to the path.
    """
    try:
        path = Path(name).expanduser()
        path.lstat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        return path
    except PermissionError as error:
        raise SlmError(f"cannot read {name} ({error.strerror})", "check its permissions") from None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # the name is too long, has "~" without a user or a zero byte: it may be a prompt
        return Path(_NOWHERE)


def _is_plain(name: str) -> bool:
    """Returns whether a name is a relative path below `./runs`, without `..`."""
    path = Path(name)
    return _path(name) == path and not path.anchor and ".." not in path.parts


def _named(name: str) -> list[Artifact]:
    """Returns the artifacts that a name may refer to: `RUN/ARTIFACT`, or an artifact's name alone, in any run."""
    first, _, rest = (name.replace("\\", "/") if systems.WINDOWS else name).strip("/").partition("/")
    if rest:
        places = [RUNS / first / place / rest for place in _PLACES]
        return [found for place in dict.fromkeys(places) if (found := read_artifact(place)) is not None]
    return [each for each in artifacts() if first in (each.path.name, each.path.stem)]


def _suitable(path: Path, kind: Kind, kinds: Sequence[Kind]) -> Path:
    """Returns the path of an artifact, if the command supports its kind.

    Raises:
        SlmError: If it does not.
    """
    if kind in kinds:
        return path
    argument = quoted(str(path))
    hints = {
        ("checkpoint", "bundle"): f"create a bundle with slm export --onnx {argument}",
        ("adapter", "bundle"): f"create a bundle with the adapter merged: slm export --onnx --adapter {argument}",
        ("adapter", "checkpoint"): f"use an adapter with its base: slm generate BASE --adapter {argument}",
        ("bundle", "checkpoint"): _origin(path),
    }
    hint = next((hints[kind, wanted] for wanted in reversed(kinds) if (kind, wanted) in hints), None)
    what = {"adapter": "a LoRA adapter"}.get(kind, f"a {kind}")
    raise SlmError(f"{_none_of(kinds)}: {path} is {what}", hint or "create an adapter with slm finetune --lora")


def _origin(bundle: Path) -> str:
    found = read_artifact(bundle)
    provenance = found.record.get("provenance") if found is not None else None
    source = provenance.get("checkpoint") if isinstance(provenance, dict) else None
    return (
        f"it was exported from {source}"
        if source
        else f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
    )


def _of_run(run: Path, kinds: Sequence[Kind]) -> tuple[Path, tuple[str, ...]]:
    """Returns a run's newest suitable artifact."""
    found = artifacts(run)
    if "bundle" in kinds and "checkpoint" in kinds:
        choice = newest_model(run)
    elif "adapter" in kinds and "checkpoint" not in kinds:
        adapters = [each for each in found if each.kind == "adapter"]
        if len(adapters) > 1:
            listed = ", ".join(short_name(each.path) for each in adapters)
            raise SlmError(f"{run} has several adapters", f"use one of {listed}")
        if not adapters:
            raise SlmError(f"{run} has no adapter", "create one with slm finetune --lora FILE")
        return adapters[0].path, (f"Using {adapters[0].path} (the only adapter of {run}).",)
    elif "bundle" in kinds:
        choice = newest_bundle(run=run)
    else:
        choice = newest_checkpoint(run=run)
    if choice is None:
        listed = ", ".join(str(each.path) for each in found)
        raise SlmError(f"{_none_of(kinds)}: {run}", f"it contains {listed}")
    what, comma, more = choice.why.partition(",")
    return choice.artifact.path, (f"Using {choice.artifact.path} ({what} of {run}{comma}{more}).", *choice.notes)


def _none_of(kinds: Sequence[Kind]) -> str:
    if len(kinds) == 1:
        return f"not {'an' if kinds[0] == 'adapter' else 'a'} {kinds[0]}"
    return f"neither {' nor '.join('an adapter' if each == 'adapter' else f'a {each}' for each in kinds)}"


def _not_found(name: str, path: Path, kinds: Sequence[Kind], others: Sequence[str]) -> SlmError:
    """Returns the error for an unknown name, with a hint that depends on its form."""
    exists = path.exists()
    message = f"{_none_of(kinds) if exists else 'not found'}: {name}"
    if path.suffix == ".gguf" and path.is_file():
        return SlmError(f"a GGUF file is {_none_of(kinds)}: {name}", f"slm import {quoted(name)}")
    if exists:
        if (path / "dataset.json").is_file():
            return SlmError(f"{message} is a prepared dataset", f"slm data info {path}; slm train --data {path}")
        return SlmError(message, _what_it_is(kinds))
    known = known_names(kinds)
    near = suggestions(name, [*known, *others])
    here = path.parts[0] == RUNS.name or path.parent.exists() or (RUNS / path.parts[0]).exists()
    hub = _HUB_ID.fullmatch(name) and not here
    if near and not (hub and not any("/" in each for each in near)):
        return SlmError(message, f"did you mean {' or '.join(near)}?")
    if _is_text(name):
        return SlmError(message, f"to continue that text: slm generate -p {_quoted(name)}")
    if hub:
        return SlmError(message, f"to import a model from the Hugging Face hub: slm import {name}")
    if known:
        more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
        prompt = (
            f"; to continue that text: slm generate -p {name}"
            if "bundle" in kinds and "checkpoint" in kinds and "adapter" not in kinds and name.isalpha()
            else ""
        )
        return SlmError(message, f"names under ./{RUNS}: {', '.join(known[:_LISTED])}{more}{prompt}")
    return SlmError(message, _what_it_is(kinds))


def suggestions(typed: str, known: Sequence[str]) -> list[str]:
    """Returns at most three known names with the most similar spelling."""
    name = typed.removeprefix("./").removeprefix(f"{RUNS}/").rstrip("/")
    spelt = {each.rpartition("/")[2].lower(): each for each in known} | {each.lower(): each for each in known}
    return list(dict.fromkeys(spelt[each] for each in get_close_matches(name.lower(), spelt, n=3, cutoff=0.7)))


def _what_it_is(kinds: Sequence[Kind]) -> str:
    if kinds[0] == "adapter":
        return f"create an adapter with slm finetune --lora, or name an {ADAPTER_SUFFIX} file"
    if len(kinds) > 1:
        return "create a checkpoint with slm train, or a bundle with slm export --onnx"
    if kinds[0] == "bundle":
        return "create a bundle from a checkpoint with slm export --onnx"
    return f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"


def _is_text(name: str) -> bool:
    return any(character.isspace() for character in name.strip()) or name.rstrip().endswith(("?", "!", "…", "."))


def _quoted(text: str) -> str:
    return quoted(text) if any(character in text for character in '"$`\\!') else f'"{text}"'
