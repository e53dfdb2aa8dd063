"""A recipe that trains in a tenth of a second, text to train it on, what a run leaves, and processes that train.

Text and datasets that are prepared, from files and from an object store in memory.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from slm.core.progress import Silent
from slm.core.tokenizer import END_OF_TEXT
from slm.train.data import workers
from slm.train.data.corpus import open_corpus
from slm.train.data.remote import text
from slm.train.data.remote.preparation import prepare_remote_dataset
from slm.train.recipe import Recipe
from slm.train.run import train
from tests.forks import Forks, forks
from tests.progress import Notes, Stopper
from tests.train.preparing import END, SETTINGS
from tests.train.recipes import small

# What the recipe is changed by. "everything" has all that a resumed run could forget: two optimizers, random numbers, a moving
# average, a place in an epoch.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "everything": {
        "data": {"sampler": "packed"},
        "optimizer": {"name": "muon", "ema": 0.9},
        "regularization": {"dropout": 0.1},
        "schedule": {"shape": "wsd"},
        "evaluation": {"prompts": ["Once upon a time"], "sample_tokens": 5},
        "checkpoints": {"every_updates": 2, "keep": 2},
    },
    # Whole documents, shorter rows at first, schedules of momentum and decay, and the mean of the last four of six updates.
    "sparing": {
        "data": {"sampler": "best_fit"},
        "batch": {"first_context": 6, "context_warmup": 0.7},
        "optimizer": {
            "name": "normuon",
            "cautious": True,
            "decay_shape": "linear",
            "embedding_betas": [0.8, 0.95],
            "momentum_warmup": 0.7,
            "tail": 0.6,
        },
    },
    "float16": {"machine": {"precision": "float16"}},
    # Rounding begins at the fourth of six updates.
    "rounded": {"qat": {"precision": "int4", "start": 0.5}, "optimizer": {"ema": 0.9}},
}
TIMES = ("elapsed_s", "tokens_s")
# Artifacts record one time of making, so that runs can be compared byte for byte.
MADE_AT = ("SOURCE_DATE_EPOCH", "1767225600")


@pytest.fixture(scope="session")
def story_file(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Path:
    """Sixty stories as TinyStories has them; not to be changed."""
    file = tmp_path_factory.mktemp("stories") / "stories.txt"
    file.write_text("".join(f"{story.strip()}\n{END_OF_TEXT}\n" for story in stories[:60]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def small_recipe(story_file: Path) -> Callable[..., Recipe]:
    """The factory of small recipes: a variant, and sections whose values replace single ones."""

    def make(variant: str = "plain", **sections: dict[str, Any]) -> Recipe:
        return small(story_file, VARIANTS[variant], sections)

    return make


@pytest.fixture(scope="session")
def whole_run(small_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain recipe's run in one piece; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*MADE_AT)
        train(small_recipe(), path)
    return path


@pytest.fixture
def finished(whole_run: Path) -> Path:
    """A copy of that run in `runs/small`."""
    return Path(shutil.copytree(whole_run, "runs/small"))


@pytest.fixture(scope="session")
def uncut(whole_run: Path) -> dict[str, Any]:
    """What that run leaves."""
    return _fingerprint(whole_run)


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _fingerprint(run: Path) -> dict[str, Any]:
    files = [*run.glob("checkpoint/*/*"), *run.glob("data/*"), *run.glob("trainer/*.safetensors"), run / "config.yaml"]
    hashes: dict[str, Any] = {
        str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)
    }
    return hashes | {"rows": [{k: v for k, v in row.items() if k not in TIMES} for row in _rows(run)]}


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a run's metrics."""
    return _rows


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[Path], dict[str, Any]]:
    """Everything a run leaves except times: bytes of its checkpoints and of the optimizer, rows of its metrics."""
    return _fingerprint


@pytest.fixture(scope="session")
def stopper() -> type[Stopper]:
    """A progress that stops its run."""
    return Stopper


@pytest.fixture
def notes() -> Notes:
    """A progress that keeps its notes."""
    return Notes()


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs programs that train, in forks of a process that has imported PyTorch, the command line and torchrun.

    The tests' own process cannot be forked for this: it has trained, and PyTorch's threads do not survive a fork.
    """
    imports = """
import torch._dynamo, torch.distributed.fsdp, torch.distributed.run, torch.nn.parallel  # which training imports late
import slm.train.run
from slm.cli.main import main
from slm.train.metrics import Metrics
Metrics.draw = lambda self: None  # which takes longer than the training
"""
    with forks(imports, tmp_path_factory.mktemp("trainers")) as start:
        yield start


@pytest.fixture
def stories_txt(stories: list[str]) -> None:
    """Stories in `stories.txt`, in the test's directory."""
    Path("stories.txt").write_text("".join(f"{story.strip()}{END}" for story in stories), encoding="utf-8")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that the workers of a preparation get many of them."""
    monkeypatch.setattr(workers, "_BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(workers, "_WORTH_WORKERS", 2)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[workers._Pool]:
    """The pools of workers that preparations start."""
    started: list[workers._Pool] = []
    start = workers._Pool.__init__

    def noted(self: workers._Pool, file: Path, count: int) -> None:
        started.append(self)
        start(self, file, count)

    monkeypatch.setattr(workers._Pool, "__init__", noted)
    return started


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty object store, and an empty cache."""
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def stored(store: Any, stories: list[str]) -> list[str]:
    """Sixty stories behind the address `memory://texts`, in files of several kinds."""
    store.pipe("/texts/a.txt", END.join(stories[:20]).encode())
    store.pipe(
        "/texts/b.jsonl.gz", gzip.compress("\n".join(json.dumps({"text": s}) for s in stories[20:40]).encode(), mtime=0)
    )
    store.pipe("/texts/deep/c.jsonl", "\n".join(json.dumps({"text": s}) for s in stories[40:60]).encode())
    store.pipe("/texts/.hidden/d.txt", b"hidden")
    store.pipe("/texts/about.csv", b"a,b\n1,2\n")
    return stories[:60]


@pytest.fixture
def remote_dataset(stored: list[str]) -> str:
    """The address of a dataset that was prepared from those stories."""
    prepare_remote_dataset(open_corpus(["memory://texts"], None), "memory://made/stories", SETTINGS, Silent())
    return "memory://made/stories"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that are fetched."""
    fetched: list[str] = []
    fetch = text.fetch

    def noted(address: str, local: Path) -> None:
        fetched.append(address.rpartition("/")[2])
        fetch(address, local)

    monkeypatch.setattr(text, "fetch", noted)
    monkeypatch.setattr("slm.train.data.remote.datasets.fetch", noted)
    return fetched


@pytest.fixture(autouse=True)
def one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts record one time of making."""
    monkeypatch.setenv(*MADE_AT)
