"""The plots of the stories, and the tasks of the fine-tuning rows, from the tables beside this file."""

import tomllib
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Any

from slm.train.stories.grammar import Plot


@dataclass(frozen=True)
class Task:
    """What an instruction asks for, in the present and in the past tense, and the plot that tells of it."""

    does: str
    did: str
    plot: Plot


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((files("slm.train.stories") / name).read_text(encoding="utf-8"))


def _frozen(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a plot, with tuples in place of lists."""
    if unknown := entry.keys() - {field.name for field in fields(Plot)}:
        raise ValueError(f"unknown fields of a plot: {', '.join(sorted(unknown))}")

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: frozen(each) for name, each in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in entry.items()}


def _task(entry: dict[str, Any], opening: str) -> Task:
    does, did, like, opens = (entry.pop(name, None) for name in ("does", "did", "like", "opens"))
    if opens:
        entry["text"] = f"{opening}\n{entry['text']}"
    own = _frozen(entry)
    plot = Plot(**own) if like is None else replace(_BY_NAME[like], lets={}, **own)
    return Task(does, did, plot)


PLOTS = tuple(Plot(**_frozen(entry)) for name in ("things", "friends") for entry in _table(f"{name}.toml")["plots"])
_BY_NAME = {plot.name: plot for plot in PLOTS}

_TASKS = _table("tasks.toml")
# Instructions: {about} is "a fox" or "a girl named Mia", {name} is "Rusty the fox" or "Mia".
ABOUT, NAMED = (tuple(_TASKS[name]) for name in ("about", "named"))
TASKS = tuple(_task(entry, _TASKS["opening"]) for entry in _TASKS["tasks"])
