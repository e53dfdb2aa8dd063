"""Finds checkpoints, bundles and adapters under `./runs`, unfinished runs, and the newest artifact of a kind."""

import json
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
from slm.core.shell import quoted

Kind = Literal["checkpoint", "bundle", "adapter"]

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_SUFFIX = ".onnx_adapter"
# Files of a training run: its log, its recipe, and the names of the checkpoints that training writes, the best first.
METRICS_FILE = "metrics.jsonl"
_RECIPE_FILE = "config.yaml"
_TRAINED = ("best", "last")
# Directories of a run without artifacts.
_NO_ARTIFACTS = frozenset(("data", "tensorboard", "trainer", "rewind", "finetune"))


@dataclass(frozen=True)
class Artifact:
    """An artifact that slm wrote, or that was copied to `./runs`.

    Attributes:
        path: The artifact's directory or file.
        kind: The kind of artifact.
        created: The time of creation in seconds since 1970, from its record or else from the file system.
        record: A bundle's manifest, or the `slm.json` of a checkpoint or an adapter; empty if there is none.
    """

    path: Path
    kind: Kind
    created: float
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def is_of(self, checkpoint: "Artifact") -> bool:
        """Returns whether this bundle was exported from the current version of a checkpoint."""
        provenance = self.record.get("provenance") or {}
        if checkpoint.record:
            return bool(provenance.get(INFO_FILE) == checkpoint.record)
        return _same_place(provenance.get("checkpoint"), checkpoint.path) and self.created >= checkpoint.created


@dataclass(frozen=True)
class Unfinished:
    """A run that was interrupted, or that is in progress.

    Attributes:
        run: The run's directory.
        reason: The state of the run.
        checkpoint: The checkpoint that the run has saved; None if there is none.
        proceed: How to continue the run, for a message.
    """

    run: Path
    reason: str
    checkpoint: Path | None
    proceed: str


@dataclass(frozen=True)
class Choice:
    """The artifact that a command uses if the user names none, and the reason.

    Attributes:
        artifact: The artifact.
        why: The reason, in a few words.
        notes: A sentence for each newer run or adapter that was not used.
    """

    artifact: Artifact
    why: str
    notes: tuple[str, ...] = ()


def kind_of(path: Path) -> Kind | None:
    """Returns the kind of artifact at a path; None if there is none."""
    if is_bundle(path):
        return "bundle"
    if (path / ADAPTER_CONFIG_FILE).is_file() or (path.suffix == ADAPTER_SUFFIX and path.is_file()):
        return "adapter"
    return "checkpoint" if is_checkpoint(path) else None


def artifacts(run: Path | None = None) -> list[Artifact]:
    """Returns the artifacts under `./runs`, or in one run, in the order of their paths."""
    places = _below(RUNS) if run is None else _below(run, 2)
    return [found for place in places if (found := read_artifact(place)) is not None]


def read_artifact(path: Path) -> Artifact | None:
    """Returns the artifact at a path, or None; its record is empty if it cannot be read."""
    kind = kind_of(path)
    if kind is None:
        return None
    marker = path / {"bundle": MANIFEST_FILE, "adapter": ADAPTER_CONFIG_FILE, "checkpoint": CONFIG_FILE}[kind]
    record_file = marker if kind == "bundle" else path / INFO_FILE
    record: Mapping[str, Any] = {}
    with suppress(SlmError):  # a damaged artifact still counts: the command that opens it reports the damage
        if record_file.is_file():
            record = read_json(record_file, record_file.name)
            if kind == "bundle" and "precision" not in record:  # a manifest.json of another program
                return None
    touched = record_file if record_file.is_file() else marker if marker.is_file() else path
    return Artifact(path, kind, _created(record, touched), record)


def unfinished(run: Path) -> Unfinished | None:
    """Returns the state of an interrupted run; None for a finished run and for other directories.

    Training is finished if its last evaluation followed the last update, or if it stopped early as its recipe specifies.
    """
    if kind_of(run) is not None:
        return None
    checkpoints = [run / "checkpoint" / name for name in reversed(_TRAINED) if is_checkpoint(run / "checkpoint" / name)]
    logged, begun = ((run / name).is_file() for name in (METRICS_FILE, _RECIPE_FILE))
    proceed = f"continue it with slm train --resume --out {quoted(str(run))}"
    if not checkpoints and (logged or begun):
        return Unfinished(run, "training has not saved a checkpoint", None, proceed)
    if not checkpoints and (run / "trainer").is_dir():
        return Unfinished(run, "fine-tuning was interrupted", None, "continue it with the same slm finetune command")
    if not logged or not checkpoints:
        return None
    recorded = [_record(checkpoint) for checkpoint in checkpoints]
    try:
        recipe = recorded[0]["recipe"]
        total = int(recipe["schedule"]["micro_steps"]) // int(recipe["batch"]["accumulation"])
        patience = recipe["evaluation"].get("patience")
        done = max(int(record.get("updates") or 0) for record in recorded)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # the record is not from slm train
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
    """Returns the newest checkpoint of all finished runs, or of one run; for a training run, its best checkpoint.

    Raises:
        SlmError: If there is none; the message names an unfinished run, if there is one.
    """
    return _newest(_checkpoints(run), "checkpoint", "create one with slm train or slm import", run)


def is_anything_trained() -> bool:
    """Returns whether there is a checkpoint or an unfinished run under ./runs."""
    checkpoints, skipped = _finished(_checkpoints(None), None)
    return bool(checkpoints or skipped)


def newest_bundle(fits: Callable[[Mapping[str, Any]], bool] | None = None, run: Path | None = None) -> Choice:
    """Returns the newest bundle whose manifest meets a condition.

    Raises:
        SlmError: If there is no such bundle, or if the newest checkpoint has none: older bundles belong to other models.
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
            f"create one with slm export --onnx {quoted(str(checkpoint.path))}{named}",
        )
    if latest is None:
        raise _nothing("bundle" if fits is None else "float32 bundle", "create one with slm export --onnx", skipped)
    chosen = max(own, key=_age) if own and checkpoint is not None and checkpoint.created > latest.created else latest
    return Choice(chosen, "newest bundle" if fits is None else "newest float32 bundle", _passed_over(chosen, skipped))


def newest_model(run: Path | None = None) -> Choice | None:
    """Returns the newest model: a bundle, or a checkpoint without a bundle; None if there is no model.

    Raises:
        SlmError: If there are only unfinished runs.
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
    """Returns the checkpoints; for a training run, only the preferred one."""
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
    """Returns the checkpoints of finished runs, and the unfinished runs; for one run, returns all its checkpoints."""
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
    named = f"; to use its checkpoint anyway, name {last.checkpoint}" if last.checkpoint else ""
    what = f"finished {what.removeprefix('finished ')}"
    return SlmError(f"there is no {what} under ./{RUNS}: {last.run}: {last.reason}", f"{last.proceed}{named}")


def _passed_over(chosen: Artifact, skipped: list[Unfinished]) -> tuple[str, ...]:
    """Returns a sentence for each unfinished run that is newer than the chosen artifact, or that contains it."""
    notes = []
    for each in skipped:
        named = f", or name {each.checkpoint} to use it anyway" if each.checkpoint else ""
        if chosen.path.is_relative_to(each.run):
            notes.append(f"Note: {each.run} is unfinished: {each.reason}; {each.proceed}.")
        elif _time_of(each.run) > chosen.created:
            notes.append(f"Skipped {each.run}: {each.reason}; {each.proceed}{named}.")
    return tuple(notes)


def _not_merged(bundle: Artifact, found: list[Artifact]) -> tuple[str, ...]:
    """Returns a notice if an adapter is newer than the bundle, which does not include it."""
    adapter = max((each for each in found if each.kind == "adapter"), key=_age, default=None)
    if adapter is None or adapter.created <= bundle.created:
        return ()
    merges = f"slm export --onnx --adapter {quoted(str(adapter.path))}"
    return (f"Note: the adapter {adapter.path} is newer and not merged into this bundle; to merge it: {merges}",)


def _below(directory: Path, depth: int = 3) -> Iterator[Path]:
    """Yields the directories that may be artifacts: the directory itself, its children and their children."""
    if kind_of(directory) is not None and directory != RUNS:
        yield directory
        return
    if depth:
        for child in _children(directory):
            if depth != 2 or child.name not in _NO_ARTIFACTS:  # an adapter may have such a name, a level deeper
                yield from _below(child, depth - 1)


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # missing or not readable
        return []


def _record(checkpoint: Path) -> Mapping[str, Any]:
    try:
        return read_json(checkpoint / INFO_FILE, INFO_FILE)
    except SlmError:
        return {}


def _evaluations(metrics: Path) -> list[tuple[int, float]]:
    """Returns updates and loss of each evaluation; skips a line that an interrupted run left incomplete."""
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
    """Returns the modification time of a file; for a training run, the time of its last log entry."""
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
