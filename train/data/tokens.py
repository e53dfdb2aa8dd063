"""Token files: text as one stream of ids on disk, in one or more files, read through memory maps.

offset 0     magic, 8 bytes; the last one is the version of the format
offset 8     header, a JSON object in UTF-8, padded with spaces
offset 1024  ids, little-endian uint16 or uint32; end-of-text follows every document
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer

DtypeName = Literal["uint16", "uint32"]

_MAGIC = b"SLMTOK\x00\x01"
_START = 1024  # a multiple of a cache line and of every dtype

_AGAIN = "copy it again, or prepare the data again"


class TokenHeader(BaseModel):
    """The header of a token file.

    Attributes:
        dtype: Type of the ids: uint16 if the vocabulary fits.
        tokens: Number of ids, including the end-of-text after every document.
        documents: Number of documents.
        text_bytes: UTF-8 bytes of the documents, which convert nats per token to bits per byte.
        text_sha256: SHA-256 of the documents, each followed by a zero byte.
        tokenizer_sha256: SHA-256 of the tokenizer, as `Tokenizer.sha256`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: DtypeName
    tokens: int
    documents: int
    text_bytes: int
    text_sha256: str
    tokenizer_sha256: str


class TokenIds:
    """The ids of one or more token files, mapped and read-only: `len(ids)`, `ids[start:stop]`.

    Args:
        files: The ids of each file, (tokens,).
    """

    def __init__(self, files: Sequence[NDArray[np.unsignedinteger]]) -> None:
        self._files = files
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, where: slice) -> NDArray[np.unsignedinteger]:
        """Returns the ids of a slice of step 1, (n,): a view into the map if they lie in one file."""
        start, stop, step = where.indices(len(self))
        assert step == 1
        parts = []
        index = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[index - 1] if index else 0
            end = min(stop, self._ends[index])
            parts.append(self._files[index][start - first : end - first])
            start, index = end, index + 1
        if not parts:
            return self._files[0][:0]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class Tokens:
    """Opened token files that are one stream.

    Attributes:
        header: The sum of their headers.
        ids: All ids.
    """

    header: TokenHeader
    ids: TokenIds


def dtype_name(tokenizer: Tokenizer) -> DtypeName:
    """Returns the stored type of a tokenizer's ids."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def little_endian(dtype: str) -> np.dtype[np.unsignedinteger]:
    """Returns the numpy type of stored ids."""
    return np.dtype(dtype).newbyteorder("<")


class TokenFileWriter:
    """Writes one token file, which is not valid until `close`. Renaming it to its final name is up to the caller.

    Args:
        file: The file to create.
        dtype: Type of the ids.
        tokenizer_sha256: SHA-256 of the tokenizer.
    """

    def __init__(self, file: Path, dtype: DtypeName, tokenizer_sha256: str) -> None:
        self._dtype = dtype
        self._itemsize = little_endian(dtype).itemsize
        self._tokenizer_sha256 = tokenizer_sha256
        self._digest = hashlib.sha256()
        self._documents = self._text_bytes = 0
        self.tokens = 0
        self._out = file.open("wb")
        self._out.write(bytes(_START))

    def add(self, text: bytes, ids: bytes, documents: int) -> None:
        """Appends text; its first document may have begun before, and its last may continue in the next call.

        Args:
            text: UTF-8 text, with a zero byte after every document that ends.
            ids: Ids in the stored type, with end-of-text after every document that ends.
            documents: Number of documents that end.
        """
        self._out.write(ids)
        self._digest.update(text)
        self._text_bytes += len(text) - documents
        self._documents += documents
        self.tokens += len(ids) // self._itemsize

    def close(self) -> TokenHeader:
        """Writes the header, and waits until the file is on the disk."""
        header = TokenHeader(
            dtype=self._dtype,
            tokens=self.tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            text_sha256=self._digest.hexdigest(),
            tokenizer_sha256=self._tokenizer_sha256,
        )
        self._out.seek(0)
        self._out.write(_MAGIC + header.model_dump_json().encode().ljust(_START - len(_MAGIC)))
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        return header

    def abandon(self) -> None:
        """Closes a file that is to be discarded."""
        self._out.close()


def read_header(file: Path, tokenizer_sha256: str) -> TokenHeader:
    """Reads the header of a token file and checks the file's size.

    Raises:
        SlmError: When the file is missing, damaged, truncated, or was made with another tokenizer.
    """
    if not file.is_file():
        raise SlmError(f"token file not found: {file}", _AGAIN)
    with file.open("rb") as stream:
        start = stream.read(_START)
    if not start.startswith(_MAGIC):
        raise SlmError(f"not a token file of this version of slm: {file}", _AGAIN)
    try:
        header = TokenHeader.model_validate_json(start.removeprefix(_MAGIC))
    except ValidationError:
        raise SlmError(f"the header of the token file is damaged: {file}", _AGAIN) from None
    size, wanted = file.stat().st_size, _START + header.tokens * little_endian(header.dtype).itemsize
    if size != wanted:
        raise SlmError(f"the token file has {size:,} bytes instead of {wanted:,}: {file}", _AGAIN)
    if header.tokenizer_sha256 != tokenizer_sha256:
        raise SlmError(f"the token file was made with another tokenizer: {file}", _AGAIN)
    return header


def map_ids(file: Path, header: TokenHeader) -> NDArray[np.unsignedinteger]:
    """Maps the ids of a token file whose header was read: (tokens,), read-only."""
    # A plain array over the map: each slice of an np.memmap costs microseconds.
    mapped = np.memmap(file, dtype=little_endian(header.dtype), mode="r", offset=_START, shape=(header.tokens,))
    return np.asarray(mapped)


def open_tokens(file: Path, tokenizer: Tokenizer) -> Tokens:
    """Opens a single token file.

    Raises:
        SlmError: As `read_header`.
    """
    header = read_header(file, tokenizer.sha256)
    return Tokens(header, TokenIds([map_ids(file, header)]))
