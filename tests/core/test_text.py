"""One reader of text: every kind of file, encoding and compression gives the same documents, within limits."""

import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from slm.core.errors import SlmError
from slm.core.text import cuts, documents, files
from slm.core.text.cuts import PieceEncoder
from slm.core.text.documents import Beginning, batches, first_documents, read_documents, read_parts, text_files, whole
from slm.core.text.files import bare_name, find_files, kind
from slm.core.text.rows import read_rows
from slm.core.text.tokens import TextSource
from slm.core.tokenizer import Tokenizer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STORIES = ["One.\nTwo.", "Zwölf, “quoted”.", "Three"]
BOM = b"\xef\xbb\xbf"


def rows() -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(STORIES)).encode()


def table(delimiter: str) -> bytes:
    cells = [f'{i}{delimiter}"{text}"' for i, text in enumerate(STORIES)]
    return "\r\n".join([f"id{delimiter}text", *cells, ""]).encode()


CONTENTS: dict[str, bytes] = {
    ".txt": "\n<|endoftext|>\n".join(STORIES).encode(),
    ".TXT": "\r\n<|endoftext|> \r\n".join(text.replace("\n", "\r\n") for text in STORIES).encode(),
    ".jsonl": rows(),
    ".ndjson": rows().replace(b"\n", b"\r\n"),
    ".json": json.dumps([{"text": text} for text in STORIES], indent=1).encode(),
    ".csv": table(","),
    ".tsv": table("\t"),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data[:20]) + bytes(8) + lzma.compress(data[20:]),
    ".zst": zstd.compress,
}


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "mark"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_the_same_documents_whatever_the_file(suffix: str, compression: str, mark: bytes) -> None:
    file = Path(f"stories{suffix}{compression}")
    file.write_bytes(COMPRESS[compression](mark + CONTENTS[suffix]))
    assert find_files(file) == [file]
    assert bare_name(file) == "stories" and kind(file) == suffix.lower()
    assert list(read_documents(file)) == list(read_parts(file)) == STORIES


def test_parquet_has_the_same_documents() -> None:
    file = Path("stories.PARQUET")
    pq.write_table(pa.table({"text": STORIES, "other": [1, 2, 3]}), file)
    assert list(read_documents(find_files(file)[0])) == STORIES


def test_a_mark_before_the_first_separator_is_not_text() -> None:
    Path("a.txt").write_bytes(BOM + b"<|endoftext|>\nOne.\n" + BOM + b"<|endoftext|>\nTwo.\n")
    assert list(read_documents(Path("a.txt"))) == ["One.", "Two."]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(encoding: str) -> None:
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"  # the first two write one
    Path("a.txt.gz").write_bytes(gzip.compress(f"{mark}Once.".encode(encoding)))
    with pytest.raises(SlmError, match=f"is {encoding[:6].upper()} text") as error:
        list(read_documents(Path("a.txt.gz")))
    assert "iconv" in (error.value.hint or "")


def test_a_directory_has_texts_and_not_their_descriptions() -> None:
    for name in ("d/b.txt", "d/A.JSONL.gz", "d/sub/c.parquet", "d/info.json", "d/index.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    os.mkfifo("d/pipe.txt")
    Path("d/loop.txt").symlink_to("loop.txt")
    Path("d/sub/up").symlink_to("..")
    assert [file.as_posix() for file in find_files(Path("d"))] == ["d/A.JSONL.gz", "d/b.txt", "d/sub/c.parquet"]
    (Path("only") / "x").mkdir(parents=True)
    Path("only/x/info.json").write_text("[]")
    with pytest.raises(SlmError) as error:
        find_files(Path("only"))
    assert error.value.hint == "name the files themselves: only/x/info.json"


def test_a_directory_of_too_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("d").mkdir()
    for number in range(5):
        Path(f"d/{number}.txt").write_text("x")
    assert len(find_files(Path("d"))) == 5
    monkeypatch.setattr(files, "_MOST_ENTRIES", 4)
    with pytest.raises(SlmError, match="more than 4 files"):
        find_files(Path("d"))


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("hf:some/data", "is not a file: only slm train", "hf download"),
        ("tinystories", "is not a file: only slm train", "hf download"),
        ("sample", "is not a file: only slm train", "leave --data out"),
        ("https://example.org/a.txt", "is a URL", "download it"),
        ("x" * 5000 + ".txt", "data not found", "slm reads"),
    ],
)
def test_names_that_are_no_files(name: str, said: str, hint: str) -> None:
    with pytest.raises(SlmError, match=said) as error:
        find_files(Path(name))
    assert hint in (error.value.hint or "")


def test_a_pipe_is_not_waited_for() -> None:
    os.mkfifo("pipe.txt")
    with pytest.raises(SlmError, match="not a regular file"):
        find_files(Path("pipe.txt"))


LIMIT = 1000
LONG = "word " * 400  # 2,000 bytes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"short\n<|endoftext|>\n{LONG}"),
        ("a.txt", "short\n<|endoftext|>\n" + "line\n" * 400),
        ("a.jsonl", f'{{"text": "x"}}\n{{"text": "{LONG}"}}\n'),
        ("a.jsonl", f'{{"text": "x"}}\n{{"text": "{"ä" * 600}"}}\n'),
        ("a.json", f'[{{"text": "x"}},\n{{"text": "{LONG}"}}]'),
        ("a.csv", f"text\nx\n{LONG}\n"),
        ("a.csv", "text\nx\n" + '"' + "line\n" * 400 + '"\n'),
    ],
)
def test_what_is_longer_than_the_limit_is_named_by_line(name: str, content: str) -> None:
    file = Path(name)
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SlmError, match=r"longer than 1000 bytes|longer than 1,000 bytes") as error:
        list(read_documents(file, limit=LIMIT))
    assert f"{name}, line " in error.value.message and "--max-document-bytes" in (error.value.hint or "")
    assert list(read_documents(file, limit=LIMIT * 10))[-1].startswith(("word", "line", "ä"))


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_row_of_parquet_is_bounded_too(dictionary: bool) -> None:
    pq.write_table(pa.table({"text": ["x", "y", LONG]}), "a.parquet", use_dictionary=dictionary)
    with pytest.raises(SlmError, match=r"a\.parquet, row 3: is longer than 1,000 bytes"):
        list(read_documents(Path("a.parquet"), limit=LIMIT))
    assert len(list(read_documents(Path("a.parquet"), limit=LIMIT * 10))) == 3


def test_a_text_file_of_any_length_comes_in_parts() -> None:
    text = "\n\n" + "A word of text, and a längere line.\n\n  Indented.\n" * 300 + "\n\n"
    Path("a.txt").write_text(f"First.\n<|endoftext|>\n{text}<|endoftext|>\nLast.", encoding="utf-8")
    parts = list(read_parts(Path("a.txt"), limit=LIMIT))
    assert parts[0] == "First." and parts[-1] == "Last."
    middle = parts[1:-1]
    assert len(middle) > 10 and "".join(middle) == text.strip("\r\n")
    assert all(isinstance(part, Beginning) for part in middle[:-1]) and not isinstance(middle[-1], Beginning)
    assert all(part[:1].isspace() for part in middle[1:-1])
    assert all(len(part.encode()) <= 2 * LIMIT for part in middle)
    kept = iter(parts)
    assert list(first_documents(kept, 2)) == parts[:-1] and list(kept) == ["Last."]
    with pytest.raises(SlmError, match="all of it, and one is longer than"):
        list(whole(parts, LIMIT, "needs all of it"))
    assert list(read_documents(Path("a.txt"))) == ["First.", text.strip("\r\n"), "Last."]


def test_a_text_without_white_space_cannot_come_in_parts() -> None:
    Path("a.txt").write_text("One.\n" + "x" * 3000)
    with pytest.raises(SlmError, match="line 2: no white space within"):
        list(read_parts(Path("a.txt"), limit=LIMIT))


def test_rows_that_would_be_large_once_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.core.text.json_rows._LOOKED_THROUGH", 100)
    good = json.dumps({"text": '"[],{}\\' * 200, "a": 1})
    for name, content in (
        ("a.jsonl", f'{good}\n{{"text": "x", "a": [{"[]," * 500}1]}}\n'),
        ("a.json", f'[{good},\n{{"text": "x", "a": [{"[]," * 500_000}1]}}]'),
    ):
        Path(name).write_text(content)
        with pytest.raises(SlmError, match="line 2: holds too many values"):
            list(read_rows(Path(name), 4 << 20 if name == "a.json" else 2000))
    Path("b.jsonl").write_text(f"{good}\n")
    assert next(read_rows(Path("b.jsonl"), 4000)).content == json.loads(good)


def test_an_array_is_read_across_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.core.text.json_rows._CHUNK", 7)
    values = [{"text": 'a, "b" [c] \\ ü'}, 12345678901, -1.5e-7, True, None, "x" * 50, [], {}, [[1, 2], {"a": []}]]
    Path("a.json").write_text(json.dumps(values, indent=2, ensure_ascii=True))
    found = list(read_rows(Path("a.json")))
    assert [value.content for value in found] == values
    assert found[1].place == "row 2"
    Path("b.json").write_text("\n \n[1,\n2,\n  nul]\n")
    with pytest.raises(SlmError, match=r"b\.json, line 5: not JSON"):
        list(read_rows(Path("b.json")))
    for bad in ("[1,]", "[1 2]", "[", "[1", '["x'):
        Path("c.json").write_text(bad)
        with pytest.raises(SlmError, match="not JSON"):
            list(read_rows(Path("c.json")))


def test_xz_and_zst_that_ask_for_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.txt.xz").write_bytes(lzma.compress(b"Once.", preset=9))
    options = {zstd.CompressionParameter.window_log: 20, zstd.CompressionParameter.enable_long_distance_matching: 1}
    Path("a.txt.zst").write_bytes(zstd.ZstdCompressor(options=options).compress(b"Once. " * 500_000, 2)[:])
    assert list(read_documents(Path("a.txt.xz"))) == ["Once."]
    assert len(next(read_documents(Path("a.txt.zst")))) == 3_000_000
    monkeypatch.setattr("slm.core.text.streams._XZ_BYTES", 1 << 20)
    monkeypatch.setattr("slm.core.text.streams._ZST_WINDOW_LOG", 19)
    for name in ("a.txt.xz", "a.txt.zst"):
        with pytest.raises(SlmError, match="cannot decompress") as error:
            list(read_documents(Path(name)))
        assert "smaller window" in (error.value.hint or "")


def test_tables_with_too_many_columns_or_one_name_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.core.text.csv_rows.MOST_COLUMNS", 3)
    monkeypatch.setattr("slm.core.text.parquet_rows.MOST_COLUMNS", 3)
    Path("a.csv").write_text("text,b,c\nx,y,z\n")
    assert list(read_documents(Path("a.csv"))) == ["x"]
    Path("a.csv").write_text("text,b,c,d\nx,y,z,z\n")
    with pytest.raises(SlmError, match="more than 3 columns"):
        list(read_documents(Path("a.csv")))
    pq.write_table(pa.table({name: ["x"] for name in ("text", "b", "c", "d")}), "a.parquet")
    with pytest.raises(SlmError, match="more than 3 columns"):
        list(read_documents(Path("a.parquet")))
    Path("b.csv").write_text("text,text\nx,y\n")
    with pytest.raises(SlmError, match="two columns are called 'text'"):
        list(read_documents(Path("b.csv")))


def test_long_texts_have_the_ids_of_the_whole(
    stories: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(stories)[:20_000]
    want = tokenizer.encode_literal(text)
    calls: list[str] = []
    original = Tokenizer.encode_literal

    def counted(self: Tokenizer, part: str, besides: frozenset[int] = frozenset()) -> list[int]:
        calls.append(part)
        return original(self, part, besides)

    monkeypatch.setattr(cuts, "_PIECE_CHARACTERS", 500)
    monkeypatch.setattr(Tokenizer, "encode_literal", counted)
    assert PieceEncoder(tokenizer).encode(text) == want
    assert len(calls) > 20
    assert PieceEncoder(tokenizer).encode_documents([text, "Short."]) == [want, original(tokenizer, "Short.")]


def test_documents_are_taken_together_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BATCH_CHARACTERS", 10)
    assert list(batches(["a" * 4, "b" * 8, "c", "d" * 20])) == [["a" * 4, "b" * 8], ["c", "d" * 20]]


def test_the_first_tokens_are_those_of_the_documents(tokenizer: Tokenizer) -> None:
    Path("a.jsonl").write_bytes(BOM + rows())
    found = list(TextSource(Path("a.jsonl")).first_tokens(tokenizer, 10_000))
    assert found == tokenizer.encode_documents(STORIES)
    assert len(list(TextSource(Path("a.jsonl")).first_tokens(tokenizer, 1))) == 1
    assert text_files([Path("a.jsonl")]) == [Path("a.jsonl")]
