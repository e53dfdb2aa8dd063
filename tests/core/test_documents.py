"""Reading documents: the two formats, compression, and one clear line for everything that is wrong."""

import gzip
import lzma
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from slm.core.errors import SlmError
from slm.core.text.documents import read_documents
from slm.core.text.files import find_files

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DUMP = "First story.\nIts second line.\n<|endoftext|>\n\n<|endoftext|>\nSecond <|endoftext|> story.\n\n<|endoftext|>\nThird"
STORIES = ["First story.\nIts second line.", "Second <|endoftext|> story.", "Third"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_separated_text(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "a.txt", DUMP))) == STORIES


def test_windows_line_ends(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "a.txt", DUMP.replace("\n", "\r\n")))) == STORIES


def test_text_without_separator_is_one_document(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "a.txt", "\nOne.\n\nTwo.\n"))) == ["One.\n\nTwo."]


def test_jsonl(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "One."}\n\n{"text": "", "id": 1}\n{"text": "Zw\\u00f6lf."}\n')
    assert list(read_documents(file)) == ["One.", "Zwölf."]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path: Path, suffix: str, compress) -> None:  # type: ignore[no-untyped-def]
    assert list(read_documents(write(tmp_path / f"a.txt{suffix}", compress(DUMP.encode())))) == STORIES


def test_a_directory_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/z.jsonl", "a.txt.gz", "ignored.pdf"):
        write(tmp_path / name, "")
    assert [file.relative_to(tmp_path).as_posix() for file in find_files(tmp_path)] == [
        "a.txt.gz",
        "b/z.jsonl",
        "c.txt",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe", "not UTF-8"),
        ("a.txt", b"\x7fELF\x00\x00", "line 1: is not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"story": "x"}\n', 'line 1: is not a row with a "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: "text" is not text'),
        ("a.jsonl", b'["x"]\n', 'row 1: is not a row with a "text"'),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', 'line 2: is not a row with a "text"'),
        ("a.csv", b"text,id\nx,1\ny\n", "line 3: 1 cell under 2 names"),
        ("a.json", b'[{"text": "x"}, {"text" 1}]', "line 1: not JSON"),
        ("a.json", b'[{"text": "x"}', "the array has no end"),
        ("a.json", b'[{"text": "x"}] {}', "something after the array"),
        ("a.txt.bz2", b"no bz2 at all", "cannot decompress"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1: holds half of a surrogate pair"),
        ("a.txt.gz", b"no gzip at all", "cannot decompress"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "cannot decompress"),
        ("a.txt.xz", b"no xz at all", "cannot decompress"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(SlmError, match=message) as error:
        list(read_documents(file))
    assert str(file) in error.value.message


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="data not found"):
        find_files(tmp_path / "none.txt")
    with pytest.raises(SlmError, match=r"no .txt, .jsonl or .parquet file"):
        find_files(tmp_path)
    with pytest.raises(SlmError, match="unknown kind of file"):
        find_files(write(tmp_path / "book.pdf", "%PDF"))


def test_zstandard(tmp_path: Path) -> None:
    content = zstd.compress(DUMP[:30].encode()) + zstd.compress(DUMP[30:].encode())  # as several frames in a row
    assert list(read_documents(write(tmp_path / "a.txt.zst", content))) == STORIES
    with pytest.raises(SlmError, match="cannot decompress"):
        list(read_documents(write(tmp_path / "b.txt.zst", content[:-3])))
    with pytest.raises(SlmError, match="cannot decompress"):
        list(read_documents(write(tmp_path / "c.txt.zst", b"no zst at all")))


def parquet(path: Path, columns: dict[str, list], rows_a_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path


def test_parquet(tmp_path: Path) -> None:
    columns = {"id": [1, 2, 3, 4, 5], "text": ["\nOne.\n", " ", "Zwölf.", "", "Three\n\nlines"], "other": list("abcde")}
    file = parquet(tmp_path / "a.parquet", columns)
    assert find_files(tmp_path) == [file]
    assert list(read_documents(file)) == ["One.", "Zwölf.", "Three\n\nlines"]
    assert list(read_documents(file, "other")) == list("abcde")


def test_rows_have_the_column_that_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"content": "One.", "text": 1}\n{"text": "x"}\n')
    with pytest.raises(SlmError, match='line 2: is not a row with a "content"'):
        list(read_documents(file, "content"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"story": ["x"]}, r'has no column "text"'),
        ({"text": ["x", "y", None, "z"]}, r'row 3: is not a row with a "text"'),
        ({"text": [1, 2]}, r'row 1: "text" is not text'),
    ],
)
def test_rows_without_text(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    file = parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(SlmError, match=message) as error:
        list(read_documents(file))
    assert str(file) in error.value.message


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1" + bytes(40) + b"PAR1"])
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SlmError, match="cannot read") as error:
        list(read_documents(write(tmp_path / "a.parquet", content)))
    assert "\n" not in error.value.message


def test_no_file_is_held_whole(tmp_path: Path) -> None:
    """Ten times the rows take no more memory, in each kind of file."""

    def peak(file: Path) -> int:
        tracemalloc.start()
        pool = pa.default_memory_pool()
        count = sum(1 for _ in read_documents(file))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count % 1000 == 0
        return most + pool.bytes_allocated()

    row = "word " * 100
    for kind in ("jsonl", "txt.gz", "txt.xz", "txt.zst", "parquet"):
        peaks = []
        for number in (2_000, 20_000):
            file = tmp_path / f"{number}.{kind}"
            if kind == "parquet":
                parquet(file, {"text": [row] * number}, rows_a_group=500)
            elif kind == "jsonl":
                write(file, f'{{"text": "{row}"}}\n' * number)
            else:
                compress = {"gz": gzip.compress, "xz": lambda d: lzma.compress(d, preset=0), "zst": zstd.compress}[
                    kind[4:]
                ]
                write(file, compress(f"{row}\n<|endoftext|>\n".encode() * number))
            peaks.append(peak(file))
        assert peaks[1] < 1.5 * peaks[0] + (1 << 20), kind
        assert peaks[1] < 6 << 20, kind  # of 10 MB
