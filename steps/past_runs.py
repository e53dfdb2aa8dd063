"""Runs of `slm train` and `slm finetune`, read back from their files: recipe, curves, figures, and the bundles made of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from slm.core.artifacts import ADAPTER_CONFIG_FILE, Artifact, artifacts, kind_of, unfinished
from slm.core.checkpoint import INFO_FILE, is_checkpoint, read_info
from slm.core.errors import SlmError
from slm.core.inventory import size
from slm.core.names import resolve, short_name
from slm.core.runs import RUNS, run_of
from slm.finetune.settings import FinetuneSettings
from slm.train.metrics import METRICS_FILE, Row, read_rows
from slm.train.recipe import Recipe, load_recipe

Kind = Literal["train", "finetune --lora", "finetune --full"]
Axis = Literal["tokens", "updates"]

_RECIPE_FILE = "config.yaml"
# The directory of the metrics in a run of full fine-tuning, and the checkpoint of a run.
_FULL = "finetune"
_CHECKPOINTS = ("best", "last")
# Parts of a fine-tuning run's record that belong to its recipe, besides the settings.
_INPUTS = {"base": ("path", "weights_sha256"), "data": ("path", "sha256"), "validation": ("path", "sha256")}
_WARNINGS = ("spike", "slow", "hang")
_NO_RUN = "name a run of slm train, or an adapter or a run of slm finetune"


@dataclass(frozen=True)
class BundleQuality:
    """A bundle of a run, with its measured quality.

    Attributes:
        name: The name that commands accept.
        precision: The precision of its weights.
        bytes: Size of its files.
        kl_nats: The mean KL divergence from its source, in nats; None if it was not quantized.
        same_top1: The share of positions with the same most likely token; None if it was not quantized.
    """

    name: str
    precision: str
    bytes: int
    kl_nats: float | None
    same_top1: float | None


@dataclass(frozen=True)
class PastRun:
    """A run.

    Attributes:
        name: The name that commands accept.
        path: The run's directory, or the adapter's.
        kind: The command that trained it.
        state: Why the run is unfinished; None if it is finished.
        recipe: Every value of the recipe by its dotted name.
        train: The rows of `metrics.jsonl` with the loss of an update.
        held_out: The rows with a measurement.
        warnings: The rows about loss spikes, and about times in which the run was slow or hung.
        measured_on: What the held-out loss was measured on: kind of the loss, and hashes of the text.
        record: The `slm.json` of the checkpoint or the adapter; empty if none was saved yet.
        bundles: The bundles that were exported from the run.
    """

    name: str
    path: Path
    kind: Kind
    state: str | None
    recipe: Mapping[str, Any]
    train: Sequence[Row]
    held_out: Sequence[Row]
    measured_on: tuple[object, ...]
    record: Mapping[str, Any]
    bundles: Sequence[BundleQuality]
    warnings: Sequence[Row] = ()

    @property
    def spikes(self) -> list[Row]:
        """The rows about loss spikes."""
        return [row for row in self.warnings if row["type"] == "spike"]

    @property
    def best(self) -> Row | None:
        """The measurement with the lowest loss after an update; None if there is none."""
        return min((row for row in self.held_out if row["updates"]), key=lambda row: row["loss"], default=None)

    @property
    def unit(self) -> str:
        """The unit of the loss."""
        return "nats a pair" if "nats a pair" in self.measured_on else "nats a token"

    def figures(self) -> dict[str, Any]:
        """Returns the figures by name; None for those that are not known."""
        rows = [*self.train, *self.held_out]
        last = max(rows, key=lambda row: row["updates"], default={})
        best, metrics = self.best, _mapping(self.record, "metrics")
        seconds = last.get("elapsed_s") if self.kind == "train" else metrics.get("seconds")
        tokens = last.get("tokens")
        settings = _mapping(self.record, "settings")
        return {
            "kind": self.kind,
            "state": self.state or "finished",
            "best_loss": best and best["loss"],
            "best_at_update": best and best["updates"],
            "last_loss": self.held_out[-1]["loss"] if self.held_out else None,
            "bits_per_byte": best and best.get("bits_per_byte"),
            "tokens": tokens,
            "updates": last.get("updates"),
            "seconds": seconds,
            "spikes": _spikes(self.spikes),
            "slow_or_hung": len(self.warnings) - len(self.spikes) or None,
            "tokens_s": tokens / seconds if tokens and isinstance(seconds, int | float) and seconds > 0 else None,
            "parameters": self.record.get("parameters") or metrics.get("trainable_parameters"),
            "seed": self.recipe.get("seed", settings.get("seed")),
            "slm_version": self.record.get("slm_version"),
        }


def past_run(name: str) -> PastRun:
    """Reads a run.

    Args:
        name: A run's directory, an adapter's, a checkpoint's in a run, or a name for one of them as of `slm list`.

    Raises:
        SlmError: If there is no such run, it has no metrics yet, or a file is damaged.
    """
    path, kind = _found(name)
    if kind == "train":
        return _trained(path)
    where = path / _FULL if kind == "finetune --full" else path
    record: Mapping[str, Any] = read_info(path / "checkpoint" / "best" if kind == "finetune --full" else path)
    record = _mapping(record, "finetuned") if kind == "finetune --full" else record
    rows = _rows(where, None)
    metrics = _mapping(record, "metrics")
    pairs = metrics.get("preferred_after") is not None
    own = not metrics.get("validation_rows")
    settings = _complete(FinetuneSettings, _mapping(record, "settings"))
    inputs = {f"{part}.{key}": _mapping(record, part).get(key) for part, keys in _INPUTS.items() for key in keys}
    return PastRun(
        name=short_name(path),
        path=path,
        kind=kind,
        state=None,
        recipe={**{name: value for name, value in inputs.items() if value}, **flattened(settings)},
        train=[row for row in rows if row["type"] == "train"],
        held_out=[row for row in rows if row["type"] == "eval"],
        warnings=[row for row in rows if row["type"] in _WARNINGS],
        measured_on=(
            "nats a pair" if pairs else "replies",
            "training rows" if own else "held-out rows",
            _mapping(record, "validation").get("sha256") or (inputs["data.sha256"], str(record.get("held_out_rows"))),
            _mapping(record, "base").get("tokenizer_sha256"),
        ),
        record=record,
        bundles=_bundles(path, path.name if kind == "finetune --lora" else None),
    )


def differing(runs: Sequence[PastRun]) -> dict[str, list[Any]]:
    """Returns the values of the recipes that differ, by dotted name, in the order of the runs; None where a recipe has none.

    Recipes of `slm train` and of `slm finetune` have no settings in common: with both, there are none.
    """
    if len({run.kind == "train" for run in runs}) > 1:
        return {}
    names = dict.fromkeys(name for run in runs for name in run.recipe)
    values = {name: [run.recipe.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def cautions(runs: Sequence[PastRun]) -> list[str]:
    """Returns sentences on what makes the losses of runs incomparable, and on unfinished runs."""
    found = [f"{run.name} is unfinished: {run.state}" for run in runs if run.state]
    found += [
        f"{run.name}: no rows were held out, so the loss is that of the training rows"
        for run in runs
        if "training rows" in run.measured_on
    ]
    if len({run.kind == "train" for run in runs}) > 1:
        found.append(
            "Runs of slm train and slm finetune have different recipes, and their losses are not comparable: one is of every "
            "token of a text, the other of replies."
        )
    elif len({run.unit for run in runs}) > 1:
        found.append("Losses of preferences and of replies are not comparable: one is per pair, the other per token.")
    elif len({run.measured_on[-1] for run in runs}) > 1:
        found.append("The tokenizers differ, so losses per token are not comparable; slm eval measures bits per byte.")
    elif len({run.measured_on for run in runs}) > 1:
        found.append(
            "The losses were measured on different text, so they are not comparable; slm eval measures on one text."
        )
    return found


def _spikes(rows: Sequence[Row]) -> str | None:
    """Returns how many updates spiked, by what was done; None without any."""
    counts = Counter({"skip": "skipped", "rewind": "rewound"}.get(row.get("action", ""), "found") for row in rows)
    return ", ".join(f"{count} {done}" for done, count in counts.items()) or None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _trained(path: Path) -> PastRun:
    stopped = unfinished(path)
    rows = _rows(path, None if stopped is None else stopped.reason)
    saved = [path / "checkpoint" / name for name in _CHECKPOINTS if is_checkpoint(path / "checkpoint" / name)]
    record: Mapping[str, Any] = read_info(saved[0]) if saved else {}
    recipe: Mapping[str, Any] = _complete(Recipe, _mapping(record, "recipe"))
    if not recipe:  # no checkpoint was saved yet
        recipe = load_recipe(path / _RECIPE_FILE).model_dump(mode="json")
    evaluation, batch = (_mapping(recipe, name) for name in ("evaluation", "batch"))
    text = _mapping(_mapping(record, "data"), "validation").get("text_sha256")
    return PastRun(
        name=short_name(path),
        path=path,
        kind="train",
        state=None if stopped is None else stopped.reason,
        recipe=flattened(recipe),
        train=[row for row in rows if row["type"] == "train"],
        held_out=[row for row in rows if row["type"] == "eval"],
        warnings=[row for row in rows if row["type"] in _WARNINGS],
        measured_on=(
            "text",
            text,
            evaluation.get("windows"),
            evaluation.get("context") or batch.get("context"),
            record.get("tokenizer_sha256"),
        ),
        record=record,
        bundles=_bundles(path, None),
    )


def _complete(model: type[BaseModel], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns recorded settings with the defaults of those that a version of slm did not have yet.

    Settings that this version does not have are returned as they were recorded.
    """
    try:
        return model.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _rows(directory: Path, state: str | None) -> list[Row]:
    rows = read_rows(directory / METRICS_FILE)
    if not any(row["type"] in ("train", "eval") for row in rows):
        raise SlmError(
            f"{directory} has no metrics yet" + (f": {state}" if state else ""), "compare it when it has trained"
        )
    return rows


def _found(name: str) -> tuple[Path, Kind]:
    """Returns the directory and the kind of a run.

    Raises:
        SlmError: If there is none of that name.
    """
    for path in _places(name):
        if (kind := _kind(path)) is not None:
            return path, kind
    for path in _places(name):
        if path.is_dir() and (stopped := unfinished(path)) is not None:
            raise SlmError(f"{path} has no metrics yet: {stopped.reason}", stopped.proceed)
        if (what := kind_of(path)) is not None:
            raise SlmError(f"{path} is {'an' if what == 'adapter' else 'a'} {what} without {METRICS_FILE}", _NO_RUN)
        if path.is_file():
            raise SlmError(f"{path} is not a run", _NO_RUN)
    path, _ = resolve(name, ("checkpoint", "adapter"))
    kind = _kind(path)
    if kind is None:
        raise SlmError(f"{path} is not of a run that slm trained", _NO_RUN)
    return path, kind


def _places(name: str) -> Iterator[Path]:
    """Yields the directories that a name may mean, each once; for a checkpoint, its run."""
    run, _, rest = name.strip("/").partition("/")
    below = [RUNS / run / kind / rest for kind in ("adapters", "checkpoint")] if rest else []
    for path in dict.fromkeys((Path(name).expanduser(), RUNS / name, *below)):
        yield path
        if path.parent.name == "checkpoint" and is_checkpoint(path):
            yield path.parent.parent


def _kind(path: Path) -> Kind | None:
    if (path / ADAPTER_CONFIG_FILE).is_file() and (path / METRICS_FILE).is_file():
        return "finetune --lora"
    if (path / _FULL / METRICS_FILE).is_file() and (path / "checkpoint" / "best" / INFO_FILE).is_file():
        return "finetune --full"
    return "train" if (path / _RECIPE_FILE).is_file() and (path / METRICS_FILE).is_file() else None


def _bundles(path: Path, adapter: str | None) -> list[BundleQuality]:
    """Returns the bundles of a run's own checkpoints, or of an adapter."""
    run = path if adapter is None else run_of(path)
    if adapter is not None and path.parent.name == "adapters":
        run = path.parent.parent
    found = []
    for each in artifacts(run) if run.is_dir() and run != RUNS else ():
        made = _mapping(each.record, "provenance")
        origin, merged = Path(str(made.get("checkpoint") or "")), _merged_adapter(made)
        of_run = origin.parent.name == "checkpoint" and (
            origin.name in _CHECKPOINTS or origin.name.startswith("update-")
        )
        is_own = (merged is None and of_run) if adapter is None else Path(str(merged or "")).name == adapter
        if each.kind == "bundle" and is_own:
            found.append(_quality(each))
    return found


def _merged_adapter(made: Mapping[str, Any]) -> object:
    """Returns the path of the adapter that slm export or slm merge merged into a bundle's weights; None without one."""
    by_merge = _mapping(_mapping(_mapping(made, INFO_FILE), "merged"), "adapter").get("path")
    return made.get("adapter") or by_merge


def _quality(bundle: Artifact) -> BundleQuality:
    quality = _mapping(bundle.record, "quality")
    kl, top1 = (quality.get(name) for name in ("kl_nats", "same_top1"))
    return BundleQuality(
        short_name(bundle.path),
        str(bundle.record.get("precision") or ""),
        size(bundle.path),
        kl if isinstance(kl, float) else None,
        top1 if isinstance(top1, float) else None,
    )


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}
