"""Text files as streams: decompressed, decoded, without a byte order mark, and never whole in memory."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from slm.core.errors import SlmError
from slm.core.text.files import check_regular, compression

# Default limit on rows, cells and documents, in bytes of UTF-8. The longest novels have 5 MB.
DOCUMENT_BYTES = 16 << 20
RAISE_LIMIT = "--max-document-bytes raises the limit"

# Memory limit of a decompressor. `xz -9` needs 65 MiB, `zstd --ultra -22` a window of 2**27 bytes.
_XZ_BYTES = 256 << 20
_ZST_WINDOW_LOG = 27
_CHUNK = 128 << 10

# A byte order mark as text. A mark within a file was at the beginning of a file that was appended.
MARK = "\ufeff"

# Longer marks first: UTF-32's begins like UTF-16's.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def size(number: int) -> str:
    """Returns a number of bytes with a unit, such as "16 MiB"."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << shift:
            return f"{number / (1 << shift):.4g} {unit}"
    return f"{number:,} bytes"


class TextFile:
    """A text file, read from its beginning. Failures are SlmErrors that name the place.

    Args:
        file: The file; its suffix determines the compression.
        limit: Maximum UTF-8 bytes of a line or row.

    Attributes:
        number: Number of the last line read, from 1.
    """

    def __init__(self, file: Path, limit: int = DOCUMENT_BYTES) -> None:
        self.file = file
        self.limit = limit
        self.number = 0

    @contextmanager
    def stream(self, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
        """Opens the text; `newline` is that of `open`.

        Raises:
            SlmError: When the file cannot be opened or, within the block, read.
        """
        check_regular(self.file)
        try:
            with _open(self.file) as binary:
                self._skip_mark(binary)
                with io.TextIOWrapper(binary, encoding="utf-8", newline=newline) as text:
                    yield text
        except UnicodeDecodeError:
            raise SlmError(
                f"{self.file}{after('line', self.number)}: is not UTF-8 text", "convert it, for example with iconv"
            ) from None
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(error) from None
        except OSError as error:
            if error.strerror is None:  # the error of bz2 for damaged data
                raise self._damaged(error) from None
            raise SlmError(f"cannot read {self.file} ({error.strerror})", "check its permissions") from None
        except Exception as error:
            if type(error).__name__ == "ZstdError":  # an error of a package that may be absent
                raise self._damaged(error) from None
            raise

    def lines(self, newline: str | None = None) -> Iterator[str]:
        """Yields the lines, including line ends.

        Raises:
            SlmError: When a line is longer than the limit, or the file cannot be read or is not UTF-8 text.
        """
        with self.stream(newline) as stream:
            while line := stream.readline(self.limit + 1):
                self.number += 1
                if len(line) * 4 > self.limit and len(line.rstrip("\r\n").encode()) > self.limit:
                    raise self.error(f"is longer than {size(self.limit)}", RAISE_LIMIT)
                self.check_text(line)
                yield line

    def error(self, what: str, hint: str | None = None) -> SlmError:
        """Returns an error at the current line."""
        return SlmError(f"{self.file}, line {self.number}: {what}", hint)

    def check_text(self, text: str) -> None:
        """Checks that a part of the current line is text.

        Raises:
            SlmError: When it has a zero byte.
        """
        if "\0" in text:
            raise self.error("is not text: it holds a zero byte")

    def _skip_mark(self, binary: io.BufferedReader) -> None:
        start = binary.peek(4)[:4]
        if start.startswith(codecs.BOM_UTF8):
            binary.read(len(codecs.BOM_UTF8))
            return
        for mark, encoding in _OTHER_MARKS:
            # No text begins with U+0000, but UTF-32's mark reads as UTF-16's mark followed by U+0000.
            if start.startswith(mark):
                raise SlmError(
                    f"{self.file}: is {encoding} text, and slm reads UTF-8",
                    f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW",
                )

    def _damaged(self, error: Exception) -> SlmError:
        reason = " ".join(str(error).split())
        hint = "copy or download it again"
        if "emory" in reason:  # messages of liblzma and libzstd for a window that is too large
            hint = "compress it again with a smaller window (xz -9 or zstd -19 without --long)"
        return SlmError(f"cannot decompress {self.file} ({reason})", hint)


def after(unit: str, number: int) -> str:
    """Returns a phrase for a place after a line or row; empty before the first one."""
    return f", after {unit} {number}" if number else ""


def _open(file: Path) -> io.BufferedReader:
    match compression(file):
        case ".gz":
            stream: Any = gzip.GzipFile(file, "rb")
        case ".bz2":
            stream = bz2.BZ2File(file, "rb")
        case ".xz":
            stream = _Xz(file.open("rb"))
        case ".zst":
            stream = _open_zst(file)
        case _:
            return file.open("rb")
    return io.BufferedReader(stream, _CHUNK)


def _open_zst(file: Path) -> Any:
    # Imported here, because an edge device does not have it and can still read plain text.
    if sys.version_info >= (3, 14):
        import compression.zstd as zstd
    else:
        import backports.zstd as zstd  # not "from backports": other packages may have created that directory
    return zstd.open(file, "rb", options={zstd.DecompressionParameter.window_log_max: _ZST_WINDOW_LOG})


class _Xz(io.RawIOBase):
    """Decompresses .xz with a memory limit, which `lzma.open` lacks."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        """Always true."""
        return True

    def close(self) -> None:
        """Closes the stream and the file."""
        self._file.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        """Fills the buffer with the output of one step of the decompressor; returns 0 at the end of the file."""
        while True:
            fed = b""
            if self._decoder is None or self._decoder.eof:
                rest = b"" if self._decoder is None else self._decoder.unused_data
                fed = rest.lstrip(b"\0")  # padding between streams
                while not fed:
                    read = self._file.read(_CHUNK)
                    if not read:
                        if self._decoder is None:
                            raise EOFError("the file is empty")
                        return 0
                    fed = read.lstrip(b"\0") if self._decoder is not None else read
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_BYTES)
            elif self._decoder.needs_input:
                fed = self._file.read(_CHUNK)
                if not fed:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            data = self._decoder.decompress(fed, max_length=len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
