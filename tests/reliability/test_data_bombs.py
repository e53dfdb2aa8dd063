"""Small files that expand: read in bounded memory, or refused with the place, the limit and the option that raises it."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from tests.forks import forks

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SCRIPT = Path(__file__).parent / "scripts" / "reads.py"
# Beside what the imports take: some multiples of a row of 16 MiB.
MOST_MIB = 320
MIB = 1 << 20
# Decompressed to some hundreds of MiB: far above the bound, and quick to make.
COPIES = 450


def squeezed(file: Path, parts: Callable[[], Iterator[bytes]]) -> None:
    """Compresses a text; each part is a frame of its own, and parts that repeat are compressed once."""
    frames: dict[bytes, bytes] = {}
    with file.open("wb") as out:
        for part in parts():
            if part not in frames:
                frames[part] = zstd.compress(part, level=1)
            out.write(frames[part])


def squeezed_into_one_frame(file: Path, parts: Callable[[], Iterator[bytes]]) -> None:
    with zstd.open(file, "wb", level=1) as out:
        for part in parts():
            out.write(part)


def line_of_text() -> Iterator[bytes]:
    yield from [b"a" * MIB] * COPIES


def row_of_json() -> Iterator[bytes]:
    yield b'{"text": "'
    yield from [b"a" * MIB] * COPIES
    yield b'"}\n'


def message() -> Iterator[bytes]:
    yield b'{"messages": [{"role": "user", "content": "'
    yield from [b"a" * MIB] * COPIES
    yield b'"}, {"role": "assistant", "content": "b"}]}\n'


def element() -> Iterator[bytes]:
    yield b'[{"text": "b"}, {"text": "'
    yield from [b"a" * MIB] * COPIES
    yield b'"}]'


def values() -> Iterator[bytes]:
    yield b'{"text": "b", "ids": ['
    yield from [b"[]," * (MIB // 3)] * 14
    yield b"[]]}\n"


def brackets() -> Iterator[bytes]:
    yield b"[" * 5 * MIB


def cell() -> Iterator[bytes]:
    yield b'text\n"'
    yield from [b"a line\n" * (MIB // 7)] * COPIES
    yield b'"\n'


def dictionary(file: Path) -> None:
    text = pa.array(["a" * (20 * MIB)]).dictionary_encode()
    pq.write_table(pa.table({"text": text.take(pa.array([0] * 100))}), file, compression="zstd")


def one_value(file: Path) -> None:
    table = pa.table({"text": ["a" * (300 * MIB)]})
    # The statistics would be copies of the value, and take seconds.
    pq.write_table(table, file, compression="zstd", use_dictionary=False, write_statistics=False)


def long_list(file: Path) -> None:
    each = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int32()), ["x" * 500])
    lists = pa.ListArray.from_arrays(pa.array([0, len(each)], pa.int32()), each)
    pq.write_table(pa.table({"text": ["a"], "messages": lists}), file, compression="zstd")


BOMBS: dict[str, Callable[..., Iterator[bytes] | None]] = {
    "line.txt.zst": line_of_text,
    "row.jsonl.zst": row_of_json,
    "message.jsonl.zst": message,
    "element.json.zst": element,
    "values.jsonl.zst": values,
    "brackets.jsonl.zst": brackets,
    "cell.csv.zst": cell,
    "dictionary.parquet": dictionary,
    "value.parquet": one_value,
    "list.parquet": long_list,
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bombs")
    for name, make in BOMBS.items():
        file = directory / name
        if name.endswith(".parquet"):
            make(file)
        elif make is line_of_text:
            squeezed_into_one_frame(file, make)
        else:
            squeezed(file, make)  # type: ignore[arg-type]
        assert file.stat().st_size < MIB
    return directory


Read = Callable[[str, Path], dict[str, Any]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """Reads a file in a process of its own and returns the report."""
    program = SCRIPT.read_text(encoding="utf-8")
    imports = "import numpy, pyarrow.parquet, tokenizers, slm.core.text.documents, slm.finetune.rows"
    with forks(imports, tmp_path_factory.mktemp("reads")) as run:

        def ask(how: str, file: Path) -> dict[str, Any]:
            done = run(program, how, str(file))
            assert done.returncode == 0, done.stderr
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        yield ask


@pytest.mark.parametrize("how", ["documents", "parts", "rows"])
@pytest.mark.parametrize("name", BOMBS)
def test_what_expands_takes_little_memory(bombs: Path, read: Read, name: str, how: str) -> None:
    found = read(how, bombs / name)
    assert found["mib"] < MOST_MIB, found
    if name == "list.parquet" and how != "rows":  # another column is never decoded
        assert not found["said"]
        return
    assert name in found["said"], found
    if name != "brackets.jsonl.zst":
        assert "--max-document-bytes" in found["hint"], found


def test_the_test_notices_memory(bombs: Path, read: Read) -> None:
    assert read("careless", bombs / "line.txt.zst")["mib"] > COPIES - 50
