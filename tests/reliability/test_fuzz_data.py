"""Damaged rows, texts, datasets and runs: each is read, or refused in one line that says where."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from slm.core.progress import Silent
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import load_state
from slm.train.data.corpus import open_corpus
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.recipe import Recipe
from slm.train.run import train
from tests.progress import Stopper

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

examples = pytest.mark.examples(few=15, many=600)

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Say <end_of_turn>."}, {"role": "assistant", "content": "ho"}]},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
    {"instruction": "Say red.", "input": "", "output": "red"},
    {"prompt": "One day", "completion": " a fox"},
    {"text": "The end."},
]


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Path:
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    path.write_text("<|endoftext|>\n".join(f"{story.strip()}\n" for story in stories[:60]), encoding="utf-8")
    return path


@examples
def test_fields_of_rows(fuzz: Any, damage: Any, shared_checkpoint: Path, tmp_path: Path, examples: int) -> None:
    """Every nasty value in place of every field of every kind of row."""
    cases = [(row, where, value) for row in ROWS for where in damage.pointers(row) for value in damage.nasty]
    seen = set()
    for row, where, value in cases[:: max(1, len(cases) // examples) | 1]:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(lines([ROWS[3], damage.replaced(row, where, value), ROWS[4]]))
        outcome, what = fuzz.worker.ask("rows", file, base=shared_checkpoint)
        assert outcome != "wrong", (what, where, value)
        assert outcome == "works" or "line 2" in what or "nothing" in what, what
        seen.add(outcome)
    assert seen == {"works", "refused"}


@examples
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_files_of_rows(
    fuzz: Any, damage: Any, shared_checkpoint: Path, tmp_path: Path, ending: str, examples: int
) -> None:
    file = tmp_path / f"rows.{ending}"
    match ending:
        case "jsonl":
            file.write_bytes(lines(ROWS))
        case "json":
            file.write_text(json.dumps(ROWS))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[2]] * 5), file)
        case _:
            comma = "," if ending == "csv" else "\t"
            file.write_text(f"prompt{comma}completion\n" + f'"One ""day"""{comma}" a\nfox"\n' * 3)
    changes = damage.bytes(file.read_bytes()).map(lambda data: damage.One(file.name, data))
    seen = fuzz.explore("rows", file, changes, examples // 2, base=shared_checkpoint)
    assert seen["refused"]


@examples
@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "txt.xz", "txt.zst", "parquet"])
def test_texts(fuzz: Any, damage: Any, tmp_path: Path, ending: str, examples: int) -> None:
    file = tmp_path / f"text.{ending}"
    plain = (
        lines([{"text": f"Story {i}."} for i in range(20)]) if "jsonl" in ending else b"One.\n<|endoftext|>\nTwo.\n" * 9
    )
    match ending.rpartition(".")[2]:
        case "gz":
            file.write_bytes(gzip.compress(plain))
        case "xz":
            file.write_bytes(lzma.compress(plain))
        case "zst":
            file.write_bytes(zstd.compress(plain))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [f"Story {i}." for i in range(20)]}), file)
        case _:
            file.write_bytes(plain)
    changes = damage.bytes(file.read_bytes()).map(lambda data: damage.One(file.name, data))
    seen = fuzz.explore("documents", file, changes, examples // 3)
    assert seen["refused"] or ending == "txt"


@examples
def test_datasets(fuzz: Any, damage: Any, texts: Path, tmp_path: Path, examples: int) -> None:
    source = tmp_path / "dataset"
    corpus = open_corpus([str(texts)], None)
    prepare_dataset(corpus, source, DatasetSettings(vocab_size=300, shard_tokens=2000), Silent())
    names = ("dataset.json", "tokenizer.json", *(file.name for file in source.glob("*.bin")))
    seen = fuzz.explore(
        "dataset", source, damage.of({n: (source / n).read_bytes() for n in names}, links=True), examples
    )
    seen += fuzz.every("dataset", source, "dataset.json", examples)
    assert seen["refused"]


@examples
def test_runs_that_go_on(
    fuzz: Any, damage: Any, texts: Path, tmp_path: Path, examples: int, small_recipe: Callable[..., Recipe]
) -> None:
    source = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(texts), source, Stopper(3))
    names = [
        "config.yaml", "metrics.jsonl", "checkpoint/best/slm.json", "data/dataset.json", "data/train.bin",
        *(f"trainer/{file.name}" for file in (source / "trainer").iterdir()),
    ]  # fmt: skip
    seen = fuzz.explore(
        "run", source, damage.of({n: (source / n).read_bytes() for n in names}), examples // 2, texts=texts
    )
    seen += fuzz.every("run", source, "trainer/state.json", examples // 4, texts=texts)
    seen += fuzz.every("run", source, "checkpoint/best/slm.json", examples // 4, texts=texts)
    assert seen["refused"]


@examples
def test_fine_tuning_that_goes_on(
    fuzz: Any, damage: Any, shared_checkpoint: Path, tmp_path: Path, examples: int
) -> None:
    rows, source = tmp_path / "rows.jsonl", tmp_path / "adapter"
    rows.write_bytes(lines([{"prompt": "One day", "completion": f" {i}"} for i in range(40)]))
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, rows, source, FinetuneSettings(epochs=1, rank=2), Stopper(3))
    assert load_state(source) is not None
    names = [f"trainer/{file.name}" for file in (source / "trainer").iterdir()]
    about = {"base": shared_checkpoint, "rows": rows}
    seen = fuzz.explore(
        "tuning", source, damage.of({n: (source / n).read_bytes() for n in names}), examples // 2, **about
    )
    seen += fuzz.every("tuning", source, "trainer/state.json", examples // 2, **about)
    assert seen["refused"]
