"""Reading documents: the two formats, compression, and one clear line for everything that is wrong."""

import gzip
import lzma
from pathlib import Path

import pytest

from slm.core.errors import SlmError
from slm.train.data.documents import find_files, read_documents

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
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: is not JSON"),
        ("a.jsonl", b'{"story": "x"}\n', 'line 1: is not a row with a "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: is not a row with a "text"'),
        ("a.jsonl", b'["x"]\n', 'line 1: is not a row with a "text"'),
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
    with pytest.raises(SlmError, match=r"no .txt or .jsonl file"):
        find_files(tmp_path)
    with pytest.raises(SlmError, match="not a kind of file"):
        find_files(write(tmp_path / "book.pdf", "%PDF"))
