"""Shards: the text of one split as token files of about the same length, each whole or absent."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.progress import Progress
from slm.core.text.documents import Beginning, first_documents
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.train.data.tokens import TokenFileWriter, TokenHeader, dtype_name, little_endian, read_header
from slm.train.data.workers import Piece, encoded

# Interval, in documents, of progress updates while documents are only compared.
_KEPT_AT_ONCE = 10_000


class Shard(BaseModel):
    """One token file of a dataset.

    Attributes:
        file: Name in the dataset's directory.
        bytes: Size of the file.
        sha256: SHA-256 of the file.
        tokens: Number of ids, including the end-of-text after every document.
        documents: Number of documents.
        text_bytes: UTF-8 bytes of the documents.
        text_sha256: SHA-256 of the documents, each followed by a zero byte.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    text_bytes: int
    text_sha256: str


class ChangedTextError(SlmError):
    """Finished shards were made from another text."""


def shard_file(split: str, number: int | None) -> str:
    """Returns the name of a token file. The only file of an undivided split has no number."""
    return f"{split}.bin" if number is None else f"{split}-{number:05}.bin"


def finished_shards(directory: Path, split: str, tokenizer: Tokenizer) -> list[TokenHeader]:
    """Returns the headers of the complete shards in a directory, from the first up to one that is missing or damaged."""
    headers: list[TokenHeader] = []
    with suppress(SlmError):
        while True:
            headers.append(read_header(directory / shard_file(split, len(headers)), tokenizer.sha256))
    return headers


def no_text(split: str) -> SlmError:
    """Returns the error for a split without documents."""
    hint = "give more text" if split == "train" else "name validation text with --val"
    return SlmError(
        f"there is no {split} text",
        f"{hint}; --dedup also removes training text that is validation text, and so do filters",
    )


@dataclass(frozen=True)
class ShardWriter:
    """Writes the splits of a dataset.

    Attributes:
        directory: The directory, which holds the tokenizer.
        tokenizer: The tokenizer.
        progress: Receives the number of documents done.
        shard_tokens: A shard ends with the document that reaches this many tokens; None writes one file per split.
        workers: Number of processes that encode; the bytes do not depend on it.
    """

    directory: Path
    tokenizer: Tokenizer
    progress: Progress
    shard_tokens: int | None = None
    workers: int = 1

    def write(self, split: str, documents: Iterator[str], total: int | None = None) -> tuple[tuple[Shard, ...], str]:
        """Writes a split. The same text gives the same bytes.

        Finished shards in the directory are kept: their documents are read again and compared, not encoded.

        Args:
            split: "train" or "validation".
            documents: The texts; special tokens spelled in them are encoded as plain characters.
            total: Number of documents, if known.

        Returns:
            The shards, and the SHA-256 of all text, each document followed by a zero byte.

        Raises:
            ChangedTextError: When finished shards were made from another text.
            SlmError: When there is no document, or a worker is killed.
        """
        directory, tokenizer, progress = self.directory, self.tokenizer, self.progress
        progress.start(f"tokenizing {split} text", total, "documents")
        files = _Split(directory, split, tokenizer, self.shard_tokens)
        try:
            for header in [] if self.shard_tokens is None else finished_shards(directory, split, tokenizer):
                files.keep(header, documents, progress)
            # Closed at once in any case, because the workers end with it.
            with closing(encoded(documents, tokenizer, directory / TOKENIZER_FILE, self.workers)) as batches:
                for batch in batches:
                    files.add(batch)
                    progress.advance(sum(piece.ends for piece, _ in batch))
            files.finish()
        finally:
            files.abandon()
            progress.finish()
        if not files.shards:
            raise no_text(split)
        return tuple(files.shards), files.text.hexdigest()


class _Split:
    """The finished shards of a split and the current one."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer, shard_tokens: int | None) -> None:
        self._directory = directory
        self._split = split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._itemsize = little_endian(dtype_name(tokenizer)).itemsize
        self._current: TokenFileWriter | None = None
        self.shards: list[Shard] = []
        self.text = hashlib.sha256()

    @property
    def _file(self) -> Path:
        number = None if self._shard_tokens is None else len(self.shards)
        return self._directory / shard_file(self._split, number)

    @property
    def _unfinished(self) -> Path:
        return self._file.with_name(f".{self._file.name}.unfinished")

    def keep(self, header: TokenHeader, documents: Iterator[str], progress: Progress) -> None:
        """Skips the documents of a finished shard after checking that they are the same."""
        text, count = hashlib.sha256(), 0
        for part in first_documents(documents, header.documents):
            ends = not isinstance(part, Beginning)
            data = part.encode() + (b"\0" if ends else b"")
            text.update(data)
            self.text.update(data)
            count += ends
            if ends and count % _KEPT_AT_ONCE == 0:
                progress.advance(_KEPT_AT_ONCE)
        progress.advance(count % _KEPT_AT_ONCE)
        if text.hexdigest() != header.text_sha256:
            raise ChangedTextError(f"{self._file.name} was made from another text", "the same command starts over now")
        self._append(header)

    def add(self, batch: list[tuple[Piece, bytes]]) -> None:
        """Appends pieces, and ends shards that are full."""
        first = 0
        tokens = self._open().tokens
        for index, (piece, ids) in enumerate(batch, 1):
            tokens += len(ids) // self._itemsize
            if piece.ends and self._shard_tokens is not None and tokens >= self._shard_tokens:
                self._append_pieces(batch[first:index])
                self.finish()
                first, tokens = index, 0
        if first < len(batch):
            self._append_pieces(batch[first:])

    def _open(self) -> TokenFileWriter:
        """Returns the current shard; opens a new one if there is none."""
        if self._current is None:
            self._current = TokenFileWriter(self._unfinished, dtype_name(self._tokenizer), self._tokenizer.sha256)
        return self._current

    def _append_pieces(self, pieces: list[tuple[Piece, bytes]]) -> None:
        text = b"".join(part for piece, _ in pieces for part in (piece.text, b"\0" if piece.ends else b""))
        self._open().add(text, b"".join([ids for _, ids in pieces]), sum(piece.ends for piece, _ in pieces))
        self.text.update(text)

    def finish(self) -> None:
        """Ends the current shard, if any."""
        if self._current is not None:
            header = self._current.close()
            renames.replace(self._unfinished, self._file)
            self._current = None
            self._append(header)

    def abandon(self) -> None:
        """Removes the current shard, if any."""
        if self._current is not None:
            self._current.abandon()
            self._unfinished.unlink(missing_ok=True)

    def _append(self, header: TokenHeader) -> None:
        fields = header.model_dump(include={"tokens", "documents", "text_bytes", "text_sha256"})
        file = self._file
        self.shards.append(Shard(file=file.name, bytes=file.stat().st_size, sha256=sha256_file(file), **fields))
