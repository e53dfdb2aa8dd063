"""What lies under `./runs`: checkpoints, bundles and adapters, which of them are finished, and which one is the newest."""

import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from slm.core.checkpoint import CONFIG_FILE, INFO_FILE, is_checkpoint
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.manifest import MANIFEST_FILE, is_bundle
from slm.core.runs import RUNS

Kind = Literal["checkpoint", "bundle", "adapter"]

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_SUFFIX = ".onnx_adapter"
# Of a training run: its log, its recipe, and the checkpoints that training itself writes, the one to prefer first.
METRICS_FILE = "metrics.jsonl"
_RECIPE_FILE = "config.yaml"
_TRAINED = ("best", "last")
# Directories of a run that hold no artifacts.
_NO_ARTIFACTS = frozenset(("data", "tensorboard", "trainer", "finetune"))


@dataclass(frozen=True)
class Artifact:
    """One thing that slm made, or that was put under `./runs`.

    Attributes:
        path: Where it lies.
        kind: What it is.
        created: When it was made, in seconds since 1970: as recorded in it, else as the file system says.
        record: A bundle's manifest; the `slm.json` of a checkpoint or an adapter. Empty where there is none.
    """

    path: Path
    kind: Kind
    created: float
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def is_of(self, checkpoint: "Artifact") -> bool:
        """Returns whether this bundle was exported from a checkpoint as the checkpoint is now."""
        provenance = self.record.get("provenance") or {}
        if checkpoint.record:
            return bool(provenance.get(INFO_FILE) == checkpoint.record)
        return _same_place(provenance.get("checkpoint"), checkpoint.path) and self.created >= checkpoint.created


@dataclass(frozen=True)
class Unfinished:
    """A run that was interrupted, or is still at work.

    Attributes:
        run: Its directory.
        reason: How far it is.
        checkpoint: What it has saved; None where there is nothing.
        proceed: What continues it.
    """

    run: Path
    reason: str
    checkpoint: Path | None
    proceed: str


@dataclass(frozen=True)
class Choice:
    """What is meant when nothing is named, and why.

    Attributes:
        artifact: What to use.
        why: Why this one, in a few words.
        notes: What was passed over although it is newer, a sentence each.
    """

    artifact: Artifact
    why: str
    notes: tuple[str, ...] = ()


def kind_of(path: Path) -> Kind | None:
    """Returns what a path holds; None where it is no artifact."""
    if is_bundle(path):
        return "bundle"
    if (path / ADAPTER_CONFIG_FILE).is_file() or (path.suffix == ADAPTER_SUFFIX and path.is_file()):
        return "adapter"
    return "checkpoint" if is_checkpoint(path) else None


def artifacts(run: Path | None = None) -> list[Artifact]:
    """Returns what lies under `./runs`, or in one run, in the order of their paths."""
    places = _below(RUNS) if run is None else _below(run, 2)
    return [found for place in places if (found := read_artifact(place)) is not None]


def read_artifact(path: Path) -> Artifact | None:
    """Returns an artifact with its record, empty where that cannot be read; None where there is no artifact."""
    kind = kind_of(path)
    if kind is None:
        return None
    marker = path / {"bundle": MANIFEST_FILE, "adapter": ADAPTER_CONFIG_FILE, "checkpoint": CONFIG_FILE}[kind]
    record_file = marker if kind == "bundle" else path / INFO_FILE
    record: Mapping[str, Any] = {}
    with suppress(SlmError):  # a damaged artifact stays one: the command that opens it says what is wrong
        if record_file.is_file():
            record = read_json(record_file, record_file.name)
            if kind == "bundle" and "precision" not in record:  # another program's manifest.json
                return None
    touched = record_file if record_file.is_file() else marker if marker.is_file() else path
    return Artifact(path, kind, _created(record, touched), record)


def unfinished(run: Path) -> Unfinished | None:
    """Returns how far an interrupted run is; None for a finished one and for what is no run of training.

    Training is finished when its last measurement came after the last update, or when it ended early as its recipe asks.
    """
    if kind_of(run) is not None:
        return None
    checkpoints = [run / "checkpoint" / name for name in reversed(_TRAINED) if is_checkpoint(run / "checkpoint" / name)]
    logged, begun = ((run / name).is_file() for name in (METRICS_FILE, _RECIPE_FILE))
    proceed = f"slm train --resume --out {shlex.quote(str(run))} continues it"
    if not checkpoints and (logged or begun):
        return Unfinished(run, "training has saved no checkpoint", None, proceed)
    if not checkpoints and (run / "trainer").is_dir():
        return Unfinished(run, "fine-tuning was interrupted", None, "the same slm finetune command continues it")
    if not logged or not checkpoints:
        return None
    recorded = [_record(checkpoint) for checkpoint in checkpoints]
    try:
        recipe = recorded[0]["recipe"]
        total = int(recipe["schedule"]["micro_steps"]) // int(recipe["batch"]["accumulation"])
        patience = recipe["evaluation"].get("patience")
        done = max(int(record.get("updates") or 0) for record in recorded)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # not a record of slm train
        return None
    measured = _evaluations(run / METRICS_FILE)
    if done >= total or any(updates >= total for updates, _ in measured):
        return None
    if patience and measured:
        best = min((row for row in measured if row[0] > 0), key=lambda row: row[1], default=(0, 0.0))[0]
        if sum(updates > best for updates, _ in measured) >= int(patience):
            return None
    return Unfinished(run, f"training stopped after {done:,} of {total:,} updates", checkpoints[0], proceed)


def newest_checkpoint(run: Path | None = None) -> Choice:
    """Chooses the newest checkpoint of a finished run, or of one run; of a training run the best one.

    Raises:
        SlmError: When there is none; an unfinished run is named then.
    """
    return _newest(_checkpoints(run), "checkpoint", "slm train or slm import makes one", run)


def newest_bundle(fits: Callable[[Mapping[str, Any]], bool] | None = None, run: Path | None = None) -> Choice:
    """Chooses the newest bundle whose manifest fits.

    Raises:
        SlmError: When no bundle fits, or when the newest checkpoint has no bundle: older bundles are of other models.
    """
    bundles = [each for each in artifacts(run) if each.kind == "bundle"]
    fitting = [each for each in bundles if fits is None or fits(each.record)]
    checkpoints, skipped = _finished(_checkpoints(run), run)
    checkpoint = max(checkpoints, key=_age, default=None)
    own = [each for each in fitting if checkpoint is not None and each.is_of(checkpoint)]
    latest = max(fitting, key=_age, default=None)
    if checkpoint is not None and not own and (latest is None or checkpoint.created > latest.created):
        named = "" if latest is None else f"; or name an older bundle, such as {latest.path}"
        raise SlmError(
            f"the newest model has no {'' if fits is None else 'float32 '}bundle: {checkpoint.path}",
            f"slm export --onnx {shlex.quote(str(checkpoint.path))} makes one{named}",
        )
    if latest is None:
        raise _nothing(
            "bundle" if fits is None else "float32 bundle", "slm export --onnx makes one from a checkpoint", skipped
        )
    chosen = max(own, key=_age) if own and checkpoint is not None and checkpoint.created > latest.created else latest
    return Choice(chosen, "newest bundle" if fits is None else "newest float32 bundle", _passed_over(chosen, skipped))


def newest_model(run: Path | None = None) -> Choice | None:
    """Chooses the newest model that can answer: a bundle, or a checkpoint that has none; None where there is no model.

    Raises:
        SlmError: When there is nothing but unfinished runs.
    """
    found = artifacts(run)
    bundles = [each for each in found if each.kind == "bundle"]
    checkpoints, skipped = _finished(_checkpoints(run), run)
    checkpoint, bundle = (max(each, key=_age, default=None) for each in (checkpoints, bundles))
    if checkpoint is not None and (bundle is None or checkpoint.created > bundle.created):
        own = [each for each in bundles if each.is_of(checkpoint)]
        if not own:
            why = "newest checkpoint, not exported yet"
            return Choice(checkpoint, why, _passed_over(checkpoint, skipped))
        bundle = max(own, key=_age)
    if bundle is not None:
        return Choice(bundle, "newest bundle", (*_passed_over(bundle, skipped), *_not_merged(bundle, found)))
    if skipped:
        raise _nothing("finished model", "", skipped)
    return None


def _checkpoints(run: Path | None) -> list[Artifact]:
    """Returns the checkpoints, of what training wrote in a run only the one to prefer."""
    found = {each.path: each for each in artifacts(run) if each.kind == "checkpoint"}
    kept = []
    for path, each in found.items():
        best, last = (path.parent / name in found for name in _TRAINED)
        numbered = path.name.startswith("update-")
        passed_over = (best and (numbered or path.name == "last")) or (last and numbered)
        if path.parent.name != "checkpoint" or not passed_over:
            kept.append(each)
    return kept


def _finished(checkpoints: Collection[Artifact], run: Path | None) -> tuple[list[Artifact], list[Unfinished]]:
    """Returns what was not left by unfinished runs, and these runs; a run that was named is taken as it is."""
    runs = [run] if run is not None else _children(RUNS)
    left = {each.run: each for path in runs if (each := unfinished(path)) is not None}
    if run is not None:
        return list(checkpoints), list(left.values())
    kept = [
        each
        for each in checkpoints
        if not (
            each.path.name in _TRAINED and each.path.parent.name == "checkpoint" and each.path.parent.parent in left
        )
    ]
    return kept, list(left.values())


def _newest(checkpoints: list[Artifact], what: str, hint: str, run: Path | None) -> Choice:
    kept, skipped = _finished(checkpoints, run)
    if not kept:
        raise _nothing(what, hint, skipped)
    chosen = max(kept, key=_age)
    return Choice(chosen, f"newest {what}", _passed_over(chosen, skipped))


def _nothing(what: str, hint: str, skipped: list[Unfinished]) -> SlmError:
    if not skipped:
        return SlmError(f"there is no {what} under ./{RUNS}", hint)
    last = max(skipped, key=lambda each: _time_of(each.run))
    named = f"; to use it as it is, name {last.checkpoint}" if last.checkpoint else ""
    what = f"finished {what.removeprefix('finished ')}"
    return SlmError(f"there is no {what} under ./{RUNS}: {last.run}: {last.reason}", f"{last.proceed}{named}")


def _passed_over(chosen: Artifact, skipped: list[Unfinished]) -> tuple[str, ...]:
    """Returns a sentence for each unfinished run that is newer than what was chosen, or that it comes from."""
    notes = []
    for each in skipped:
        named = f"; name {each.checkpoint} to use it as it is" if each.checkpoint else ""
        if chosen.path.is_relative_to(each.run):
            notes.append(f"Note: {each.run} is unfinished: {each.reason}; {each.proceed}.")
        elif _time_of(each.run) > chosen.created:
            notes.append(f"Skipped {each.run}: {each.reason}; {each.proceed}{named}.")
    return tuple(notes)


def _not_merged(bundle: Artifact, found: list[Artifact]) -> tuple[str, ...]:
    """Says so when an adapter is newer than the bundle: the bundle answers without it."""
    adapter = max((each for each in found if each.kind == "adapter"), key=_age, default=None)
    if adapter is None or adapter.created <= bundle.created:
        return ()
    merges = f"slm export --onnx --adapter {shlex.quote(str(adapter.path))}"
    return (f"Note: the adapter {adapter.path} is newer and not part of it; {merges} merges it.",)


def _below(directory: Path, depth: int = 3) -> Iterator[Path]:
    """Yields directories that may be artifacts, of a run itself, its children and their children."""
    if kind_of(directory) is not None and directory != RUNS:
        yield directory
        return
    if depth:
        for child in _children(directory):
            if depth != 2 or child.name not in _NO_ARTIFACTS:  # of a run, not an adapter of that name
                yield from _below(child, depth - 1)


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # not there, or not readable
        return []


def _record(checkpoint: Path) -> Mapping[str, Any]:
    try:
        return read_json(checkpoint / INFO_FILE, INFO_FILE)
    except SlmError:
        return {}


def _evaluations(metrics: Path) -> list[tuple[int, float]]:
    """Returns updates and loss of each measurement; a line that a killed run left half written is left out."""
    rows = []
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        if '"eval"' not in line:
            continue
        try:
            row = json.loads(line)
            rows.append((int(row["updates"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return rows


def _created(record: Mapping[str, Any], file: Path) -> float:
    try:
        return datetime.fromisoformat(str(record.get("created"))).timestamp()
    except (ValueError, OverflowError):
        return _time_of(file)


def _time_of(path: Path) -> float:
    """Returns when a file was written; of a training run, when it logged last."""
    for file in (path / METRICS_FILE, path / "trainer", path):
        try:
            return file.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _age(artifact: Artifact) -> float:
    return artifact.created


def _same_place(recorded: object, path: Path) -> bool:
    return isinstance(recorded, str) and Path(recorded).resolve() == path.resolve()
