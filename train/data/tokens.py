"""Token files: a corpus as one stream of ids on disk, read through a memory map.

offset 0     magic, 8 bytes; the last one is the version of the format
offset 8     header, a JSON object in UTF-8, padded with spaces
offset 1024  ids, little-endian uint16 or uint32; end-of-text follows every document
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from slm.core.errors import SlmError
from slm.core.files import atomic_file
from slm.core.progress import Progress
from slm.core.tokenizer import END_OF_TEXT, Tokenizer

_MAGIC = b"SLMTOK\x00\x01"
_START = 1024  # a multiple of a cache line and of every dtype

# Text that is encoded at once: enough documents for all cores, little enough to hold in memory.
_BATCH_CHARACTERS = 4 << 20
# A longer document is encoded in pieces, so that one without separators uses all cores too.
_PIECE_CHARACTERS = 256 << 10

_AGAIN = "train again without --resume, which makes the token files anew"


class TokenHeader(BaseModel):
    """What a token file says of itself.

    Attributes:
        dtype: Of the ids: uint16 where the vocabulary fits.
        tokens: Number of ids, the end-of-text after every document included.
        documents: Number of documents.
        text_bytes: UTF-8 bytes of the documents; with `tokens` they turn nats a token into bits a byte.
        text_sha256: Of the documents, each followed by a zero byte.
        tokenizer_sha256: Of the tokenizer, as `Tokenizer.sha256`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["uint16", "uint32"]
    tokens: int
    documents: int
    text_bytes: int
    text_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class Tokens:
    """An opened token file.

    Attributes:
        header: What it says of itself.
        ids: All ids, (tokens,), mapped and read only.
    """

    header: TokenHeader
    ids: NDArray[np.unsignedinteger]


def write_tokens(
    file: Path, documents: Iterable[str], tokenizer: Tokenizer, progress: Progress, name: str
) -> TokenHeader:
    """Encodes documents into a token file, whole or not at all; the same text gives the same bytes.

    Args:
        file: The file to make or replace.
        documents: Texts; special tokens spelt in them are only characters.
        tokenizer: Encodes on all cores.
        progress: Is told how many documents are done.
        name: What the documents are, for the progress.
    """
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    end_of_text = tokenizer.token_id(END_OF_TEXT)
    digest = hashlib.sha256()
    tokens = count = text_bytes = 0
    progress.start(f"tokenizing {name}", None, "documents")
    try:
        with atomic_file(file) as partial, partial.open("wb") as out:
            out.write(bytes(_START))
            for batch in _batches(documents):
                pieces = [list(_pieces(document)) for document in batch]
                encoded = iter(tokenizer.encode_documents([piece for parts in pieces for piece in parts]))
                for document, parts in zip(batch, pieces, strict=True):
                    ids = [i for _ in parts for i in next(encoded)] + [end_of_text]
                    out.write(np.array(ids, dtype=_little_endian(dtype)).tobytes())
                    text = document.encode()
                    digest.update(text + b"\0")
                    tokens, count, text_bytes = tokens + len(ids), count + 1, text_bytes + len(text)
                progress.advance(len(batch))
            header = TokenHeader(
                dtype=dtype,
                tokens=tokens,
                documents=count,
                text_bytes=text_bytes,
                text_sha256=digest.hexdigest(),
                tokenizer_sha256=tokenizer.sha256,
            )
            out.seek(0)
            out.write(_MAGIC + header.model_dump_json().encode().ljust(_START - len(_MAGIC)))
    finally:
        progress.finish()
    return header


def open_tokens(file: Path, tokenizer: Tokenizer) -> Tokens:
    """Opens a token file.

    Raises:
        SlmError: When it is missing, damaged, truncated, or was made with another tokenizer.
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
    dtype = _little_endian(header.dtype)
    size, wanted = file.stat().st_size, _START + header.tokens * dtype.itemsize
    if size != wanted:
        raise SlmError(f"the token file has {size:,} bytes instead of {wanted:,}: {file}", _AGAIN)
    if header.tokenizer_sha256 != tokenizer.sha256:
        raise SlmError(f"the token file was made with another tokenizer: {file}", _AGAIN)
    return Tokens(header, np.memmap(file, dtype=dtype, mode="r", offset=_START, shape=(header.tokens,)))


def _little_endian(dtype: str) -> np.dtype[np.unsignedinteger]:
    return np.dtype(dtype).newbyteorder("<")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[str]:
    """Cuts a long document before white space that follows something else.

    A byte-level BPE never joins across such a place: GPT-2's pattern puts white space before what follows it. So the pieces'
    ids are the document's.
    """
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        while end > start and not (document[end].isspace() and not document[end - 1].isspace()):
            end -= 1
        if end == start:
            break  # no such place: the rest stays whole
        yield document[start:end]
        start = end
    yield document[start:]
