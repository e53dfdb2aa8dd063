"""What a name given to a command means: a path, a run, or an artifact of a run; and what to type when it means nothing."""

import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

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
from slm.core.weights import WEIGHTS_FILE

# Where an artifact of a run may lie, below the run.
_PLACES = ("", "checkpoint", "adapters")
# A path that is not there.
_NOWHERE = "/dev/null/nothing"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Names in a message.
_LISTED = 8


def resolve(name: str, kinds: Sequence[Kind], others: Sequence[str] = ()) -> tuple[Path, tuple[str, ...]]:
    """Finds the artifact that a name means, and what should be said about it.

    A path is taken as it is. Otherwise a name is that of a run, of `RUN/ARTIFACT`, or of an artifact that occurs once under
    `./runs`. A run stands for its newest suitable artifact.

    Args:
        name: As it was typed.
        kinds: What the command can use.
        others: Further names that the command knows, to suggest.

    Returns:
        The path, and sentences for the user.

    Raises:
        SlmError: When there is no such artifact, it is of another kind, or several have the name; the hint says what to type.
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
        raise SlmError(f"{name} is the name of several artifacts", f"name one of {listed}")
    if fitting:
        return fitting[0].path, (f"Using {fitting[0].path} ({fitting[0].kind} named {name}).",)
    if found:
        return _suitable(found[0].path, found[0].kind, kinds), ()
    raise _not_found(name, path, kinds, others)


def short_name(path: Path) -> str:
    """Returns the shortest name that means an artifact: `tiny/onnx-int8` for `runs/tiny/onnx-int8`.

    What lies elsewhere than under `./runs` keeps its directory's name.
    """
    try:
        parts = path.resolve().relative_to(RUNS.resolve()).parts
    except ValueError:
        return path.resolve().name
    short = "/".join(part for i, part in enumerate(parts) if not (i == 1 and len(parts) > 2 and part in _PLACES))
    return short or path.resolve().name


def known_names(kinds: Sequence[Kind]) -> list[str]:
    """Returns the names that mean an artifact here: runs, and artifacts by their short names."""
    found = [each for each in artifacts() if each.kind in kinds]
    runs = dict.fromkeys(short_name(each.path).partition("/")[0] for each in found)
    return list(dict.fromkeys((*runs, *(short_name(each.path) for each in found))))


def _path(name: str) -> Path:
    """Returns the path that a name spells; of what cannot be a path, one that is not there.

    Raises:
        SlmError: When the path may not be looked at.
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
    ):  # longer than a name may be, "~" and no user, a zero byte: a text, it may be
        return Path(_NOWHERE)


def _is_plain(name: str) -> bool:
    """Says whether a name can be one below `./runs`: no absolute path, and none that leads out of it."""
    path = Path(name)
    return _path(name) == path and not path.is_absolute() and ".." not in path.parts


def _named(name: str) -> list[Artifact]:
    """Returns what a name means below a run: `RUN/ARTIFACT`, or an artifact's name alone in any of them."""
    first, _, rest = name.strip("/").partition("/")
    if rest:
        places = [RUNS / first / place / rest for place in _PLACES]
        return [found for place in dict.fromkeys(places) if (found := read_artifact(place)) is not None]
    return [each for each in artifacts() if first in (each.path.name, each.path.stem)]


def _suitable(path: Path, kind: Kind, kinds: Sequence[Kind]) -> Path:
    """Returns the path of an artifact that the command can use.

    Raises:
        SlmError: When it is of another kind.
    """
    if kind in kinds:
        return path
    quoted = shlex.quote(str(path))
    hints = {
        ("checkpoint", "bundle"): f"slm export --onnx {quoted} makes one",
        ("adapter", "bundle"): f"slm export --onnx --adapter {quoted} makes one with the adapter merged into it",
        ("adapter", "checkpoint"): f"an adapter answers with its base: slm generate BASE --adapter {quoted}",
        ("bundle", "checkpoint"): _origin(path),
    }
    hint = next((hints[kind, wanted] for wanted in reversed(kinds) if (kind, wanted) in hints), None)
    what = {"adapter": "a LoRA adapter"}.get(kind, f"a {kind}")
    raise SlmError(f"{_none_of(kinds)}: {path} is {what}", hint or "slm finetune --lora makes an adapter")


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
    elif "adapter" in kinds:
        adapters = [each for each in found if each.kind == "adapter"]
        if len(adapters) > 1:
            listed = ", ".join(short_name(each.path) for each in adapters)
            raise SlmError(f"{run} has several adapters", f"name one of {listed}")
        if not adapters:
            raise SlmError(f"{run} has no adapter", "slm finetune --lora FILE makes one")
        return adapters[0].path, (f"Using {adapters[0].path} (the only adapter of {run}).",)
    elif "bundle" in kinds:
        choice = newest_bundle(run=run)
    else:
        choice = newest_checkpoint(run=run)
    if choice is None:
        listed = ", ".join(str(each.path) for each in found)
        raise SlmError(f"{_none_of(kinds)}: {run}", f"it holds {listed}")
    what, comma, more = choice.why.partition(",")
    return choice.artifact.path, (f"Using {choice.artifact.path} ({what} of {run}{comma}{more}).", *choice.notes)


def _none_of(kinds: Sequence[Kind]) -> str:
    if len(kinds) == 1:
        return f"not {'an' if kinds[0] == 'adapter' else 'a'} {kinds[0]}"
    return f"neither a {' nor a '.join(kinds)}"


def _not_found(name: str, path: Path, kinds: Sequence[Kind], others: Sequence[str]) -> SlmError:
    """Returns the error for a name that means nothing, with a hint by what it looks like."""
    exists = path.exists()
    message = f"{_none_of(kinds) if exists else 'not found'}: {name}"
    if path.suffix == ".gguf" and path.is_file():
        return SlmError(f"a GGUF file is {_none_of(kinds)}: {name}", f"slm import {shlex.quote(name)}")
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
        return SlmError(message, f"a text goes after -p: slm generate -p {_quoted(name)}")
    if hub:
        return SlmError(message, f"for a model of the Hugging Face hub: slm import {name}")
    if known:
        more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
        prompt = "; a text goes after -p" if len(kinds) > 1 and name.isalpha() else ""
        return SlmError(message, f"there is {', '.join(known[:_LISTED])}{more} under ./{RUNS}{prompt}")
    return SlmError(message, _what_it_is(kinds))


def suggestions(typed: str, known: Sequence[str]) -> list[str]:
    """Returns the known names that are spelt most like what was typed, at most three."""
    name = typed.removeprefix("./").removeprefix(f"{RUNS}/").rstrip("/")
    spelt = {each.rpartition("/")[2].lower(): each for each in known} | {each.lower(): each for each in known}
    return list(dict.fromkeys(spelt[each] for each in get_close_matches(name.lower(), spelt, n=3, cutoff=0.7)))


def _what_it_is(kinds: Sequence[Kind]) -> str:
    if kinds[0] == "adapter":
        return f"an adapter is a directory that slm finetune --lora makes, or an {ADAPTER_SUFFIX} file"
    if len(kinds) > 1:
        return "slm train makes a checkpoint, slm export --onnx a bundle"
    if kinds[0] == "bundle":
        return "slm export --onnx makes one from a checkpoint"
    return f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"


def _is_text(name: str) -> bool:
    return any(character.isspace() for character in name.strip()) or name.rstrip().endswith(("?", "!", "…", "."))


def _quoted(text: str) -> str:
    return shlex.quote(text) if any(character in text for character in '"$`\\!') else f'"{text}"'
