"""Damaged artifacts: strategies that change files, and a process of limited memory that loads the result."""

import json
import os
import select
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm.train.recipe import Recipe

_LOADER = Path(__file__).parent / "scripts" / "loader.py"
# The time limit of a case, in seconds; most take a tenth of a second.
_SECONDS = 40
# A longer limit for the first case, in which the process imports PyTorch, perhaps on a busy machine.
_START_SECONDS = 120

# Replacements for a value: of every type, at every limit.
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "1", "../outside/secret", "/etc/passwd", "a\0b", "\ud800",
    "\x1b[31m\nred", "é" * 300, "{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", [], [[]], [None], [1, 2], {}, {"": {}},
    {"a": [1]}, [{"role": 1}],
)  # fmt: skip


@dataclass
class Worker:
    """The process that loads artifacts."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = _SECONDS
    process: subprocess.Popen[str] | None = None

    def ask(self, how: str, path: Path, **about: Any) -> tuple[str, str]:
        """Returns the outcome and message of one case; a process that dies or hangs counts as an outcome, and is replaced."""
        seconds = self.seconds
        if self.process is None:
            seconds += _START_SECONDS
            self.process = subprocess.Popen(
                [sys.executable, str(_LOADER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        process = self.process
        assert process.stdin and process.stdout
        inside = [str(path.parent), *(str(each) for each in about.values())]
        process.stdin.write(
            json.dumps({"how": how, "path": str(path), "inside": inside, **{k: str(v) for k, v in about.items()}})
            + "\n"
        )
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else ""
        if not line:
            process.kill()
            process.wait()
            outcome, what = (
                "wrong",
                f"it hangs for {seconds} s" if not ready else f"the process died ({process.returncode})",
            )
            self.process = None
        else:
            answer = json.loads(line)
            outcome, what = answer["outcome"], answer["what"]
        self.counts[f"{how} {outcome}"] += 1
        return outcome, what

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()
    if path := os.environ.get("SLM_FUZZ_COUNTS"):
        with Path(path).open("a") as file:
            file.write(json.dumps(worker.counts) + "\n")


def pointers(document: Any) -> list[tuple[Any, ...]]:
    """Returns the paths of all values in a JSON document, the document itself first."""
    found: list[tuple[Any, ...]] = [()]
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += [(key, *rest) for rest in pointers(value)]
    return found


def replaced(document: Any, where: tuple[Any, ...], value: Any, *, delete: bool = False) -> Any:
    """Returns a copy of a document with the value at a path replaced or removed."""
    if not where:
        return value
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in where[:-1]:
        inner = inner[key]
    if delete:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return copy


def _spread(places: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Keeps only the first entries of long lists, so that a vocabulary does not dominate the cases."""
    kept, seen = [], Counter[tuple[Any, ...]]()
    for place in places:
        seen[place[:-1]] += 1
        if seen[place[:-1]] <= 40 and all(not isinstance(key, int) or key < 3 for key in place):
            kept.append(place)
    return kept


@st.composite
def changed_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Generates a JSON file with one or two values changed, or with its text damaged."""
    document = json.loads(content)
    kind = draw(
        st.sampled_from(["value", "value", "value", "value", "two", "delete", "add", "text", "deep", "twice", "bytes"])
    )
    if kind == "bytes":
        return draw(changed_bytes(content))
    if kind == "text":
        return draw(
            st.sampled_from(
                [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"\xef\xbb\xbf" + content, content + b"x", content * 2]
            )
        )
    if kind == "deep":
        return b'{"a":' * 100_000
    places = _spread(pointers(document))
    where = draw(st.sampled_from(places[1:] or places))
    if kind == "twice":
        key = json.dumps(str(where[0]) if where else "a")
        value = json.dumps(draw(st.sampled_from(NASTY)))
        return content.rstrip()[:-1] + f", {key}: {value}}}".encode()
    if kind == "add":
        name = draw(st.sampled_from(["surprise", "auto_map", "rope_scaling", "chat_template", "__class__", "../x"]))
        parent = draw(st.sampled_from([each for each in places if isinstance(_at(document, each), dict)] or [()]))
        changed = replaced(document, (*parent, name), draw(st.sampled_from(NASTY)))
    else:
        changed = replaced(document, where, draw(st.sampled_from(NASTY)), delete=kind == "delete" and bool(where))
    if kind == "two" and isinstance(changed, dict) and changed:
        key = draw(st.sampled_from(sorted(changed)))
        changed = replaced(changed, (key,), draw(st.sampled_from(NASTY)))
    return json.dumps(changed).encode()


def _at(document: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        document = document[key]
    return document


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, *, front: int = 4096) -> bytes:
    """Generates a binary file that is truncated, or has bits flipped, bytes inserted or numbers overwritten."""
    size = len(content)
    near = st.integers(0, max(0, min(size, front) - 1))
    at = draw(st.one_of(near, near, st.integers(0, max(0, size - 1))))
    match draw(st.sampled_from(["cut", "flip", "flip", "number", "number", "put", "drop", "append"])):
        case "cut":
            return content[:at]
        case "flip":
            return (
                content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
                if size
                else b""
            )
        case "number":
            number = draw(st.sampled_from([0, 1, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
            packed = draw(st.sampled_from([struct.pack("<Q", number), struct.pack("<I", number & 0xFFFF_FFFF)]))
            return content[:at] + packed + content[at + len(packed) :]
        case "put":
            return content[:at] + draw(st.binary(max_size=16)) + content[at:]
        case "drop":
            return content[:at] + content[at + draw(st.integers(1, 64)) :]
        case _:
            return content + draw(st.binary(max_size=64))


# Objects in place of a file; the callable creates each.
PLACES: dict[str, Callable[[Path, Path], None]] = {
    "nothing": lambda file, outside: None,
    "directory": lambda file, outside: file.mkdir(),
    "fifo": lambda file, outside: os.mkfifo(file),
    "link out": lambda file, outside: file.symlink_to(outside / "secret"),
    "link to itself": lambda file, outside: file.symlink_to(file.name),
    "broken link": lambda file, outside: file.symlink_to("nowhere"),
    "empty": lambda file, outside: file.write_bytes(b"") and None,
}


@dataclass(frozen=True)
class Damage:
    """A change to one file of an artifact: other bytes, or another object in its place."""

    file: str
    content: bytes | None = field(repr=False, default=None)
    place: str = ""


def damages(files: Mapping[str, bytes], *, links: bool = False) -> st.SearchStrategy[Damage]:
    """Generates changes to one of several files.

    Args:
        files: The contents of the files by name.
        links: Whether to include links that lead out of the directory. Bundles and datasets must not have them; the
            directories of the Hugging Face cache consist of such links, which are followed.
    """
    places = [place for place in sorted(PLACES) if links or place != "link out"]
    kinds = []
    for name, content in files.items():
        change = changed_json(content) if name.endswith(".json") else changed_bytes(content)
        kinds.append(change.map(lambda data, name=name: Damage(name, data)))
        kinds.append(st.sampled_from(places).map(lambda place, name=name: Damage(name, place=place)))
    return st.one_of(kinds)


def _kind(what: str) -> str:
    """Returns a key for a defect: the kind of exception and its place."""
    return f"{what.partition(':')[0]} {what.rpartition('(')[2]}"


def _shown(damage: Damage, source: Path) -> str:
    """Returns a short description of a change, from the first byte that differs."""
    if damage.content is None:
        return ""
    old = (source / damage.file).read_bytes() if source.is_dir() else source.read_bytes()
    try:
        old, new = (json.dumps(json.loads(each)).encode() for each in (old, damage.content))
    except ValueError:
        new = damage.content
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return f"byte {at:,}: {old[max(0, at - 40) : at + 40]!r} -> {new[max(0, at - 40) : at + 60]!r}"


@dataclass
class Fuzz:
    """Generates cases and loads them."""

    worker: Worker
    root: Path
    number: int = 0
    copies: dict[Path, Path] = field(default_factory=dict)

    def copy(self, source: Path) -> Path:
        """Returns a copy to link to: other tests share the artifact, and some libraries reject files with several names."""
        if source not in self.copies:
            self.copies[source] = self.root / f"whole-{len(self.copies)}" / source.name
            shutil.copytree(source, self.copies[source])
        return self.copies[source]

    def directory(self, source: Path, damage: Damage, finish: Callable[[Path], None] | None = None) -> Path:
        """Returns a copy of an artifact with the change applied; unchanged files are links."""
        self.number += 1
        parent = self.root / f"case-{self.number}"
        shutil.rmtree(self.root / f"case-{self.number - 1}", ignore_errors=True)
        parent.mkdir()
        case = parent / source.name
        if source.is_file():
            assert damage.content is not None
            case.write_bytes(damage.content)
            return case
        shutil.copytree(self.copy(source), case, copy_function=os.link)
        file = case / damage.file
        file.unlink()
        if damage.content is not None:
            file.write_bytes(damage.content)
        else:
            PLACES[damage.place](file, self.root / "outside")
        if finish is not None:
            finish(case)
        return case

    def explore(
        self,
        how: str,
        source: Path,
        cases: st.SearchStrategy[Damage],
        examples: int,
        finish: Callable[[Path], None] | None = None,
        **about: Any,
    ) -> Counter[str]:
        """Loads many damaged copies; fails if one neither loads nor gives a one-line error, and shows one of each kind."""
        found = _Found(self, how, source, finish, about)
        found.whole()

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def one(damage: Damage) -> None:
            found.load(damage)

        one()
        return found.told()

    def every(
        self,
        how: str,
        source: Path,
        name: str,
        most: int,
        finish: Callable[[Path], None] | None = None,
        **about: Any,
    ) -> Counter[str]:
        """Replaces every field of a JSON file by every bad value, or loads an even selection of these cases."""
        document = json.loads((source / name).read_bytes())
        places = [where for where in _spread(pointers(document)) if where]
        cases = [(where, value) for where in places for value in (*NASTY, _DELETED)]
        stride = max(1, len(cases) // most) | 1  # odd, so that the selection does not repeat the same values
        found = _Found(self, how, source, finish, about)
        found.whole()
        for where, value in cases[::stride]:
            changed = replaced(document, where, None if value is _DELETED else value, delete=value is _DELETED)
            found.load(Damage(name, json.dumps(changed).encode()))
        return found.told()


_DELETED = object()


@dataclass
class _Found:
    """The outcomes of several cases."""

    fuzz: Fuzz
    how: str
    source: Path
    finish: Callable[[Path], None] | None
    about: Mapping[str, Any]
    seen: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, tuple[str, Damage]] = field(default_factory=dict)

    def load(self, damage: Damage) -> None:
        outcome, what = self.fuzz.worker.ask(
            self.how, self.fuzz.directory(self.source, damage, self.finish), **self.about
        )
        self.seen[outcome] += 1
        if outcome == "wrong":
            self.wrong.setdefault(_kind(what), (what, damage))

    def whole(self) -> None:
        """Checks that an undamaged artifact loads."""
        file = self.source if self.source.is_file() else next(each for each in self.source.rglob("*") if each.is_file())
        name = file.relative_to(self.source).as_posix() if file != self.source else file.name
        case = self.fuzz.directory(self.source, Damage(name, file.read_bytes()), self.finish)
        assert self.fuzz.worker.ask(self.how, case, **self.about) == ("works", "")

    def told(self) -> Counter[str]:
        """Returns the counts of outcomes; fails with one case of each kind of defect."""
        cases = "\n".join(f"{what}\n    {damage} {_shown(damage, self.source)}" for what, damage in self.wrong.values())
        assert not self.wrong, cases
        return self.seen


@pytest.fixture
def fuzz(worker: Worker, tmp_path: Path) -> Fuzz:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text('{"secret": true}')
    return Fuzz(worker, tmp_path)


@pytest.fixture(scope="session")
def damage() -> type["Damaging"]:
    return Damaging


class Damaging:
    """The functions above as a fixture, because test modules do not import from each other."""

    of = staticmethod(damages)
    json = staticmethod(changed_json)
    bytes = staticmethod(changed_bytes)
    One = Damage
    nasty = NASTY
    pointers = staticmethod(pointers)
    replaced = staticmethod(replaced)


_SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "preset": "tiny", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 2, "head_dim": 16,
        "query_pre_attn_scalar": 16, "sliding_window": 8, "max_position_embeddings": 64,
    },
    "batch": {"batch_size": 4, "context": 24},
    "schedule": {"micro_steps": 4, "warmup_micro_steps": 1, "learning_rate": 3e-3, "final_learning_rate": 3e-4},
    "evaluation": {"every_micro_steps": 2, "windows": 8},
    "machine": {"device": "cpu", "precision": "float32"},
}  # fmt: skip


@pytest.fixture
def small_recipe() -> Callable[..., Recipe]:
    """Returns the recipe of a run that takes a second: (text, changes to its sections)."""

    def make(text: Path, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Recipe:
        sections = {"data": {"train": [str(text)]}, **(changes or {})}
        return Recipe.model_validate(
            {**_SMALL, **{name: {**_SMALL.get(name, {}), **more} for name, more in sections.items()}}
        )

    return make
