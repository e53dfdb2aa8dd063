"""Tokenization on several cores: processes that read text and write ids through pipes, in the order of the text.

A worker runs `work`, below. It ends when its input ends, so that no worker outlives the command, however the command ends. Both
directions carry the same frames: the number of parts, the length of each part, the parts.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple, TypeVar

import numpy as np

from slm.core import child
from slm.core.errors import SlmError
from slm.core.text.cuts import cuts_at_spaces, pieces
from slm.core.text.documents import Beginning
from slm.core.text.streams import RAISE_LIMIT
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.train.data.encoder import Encoder, end_of_text

# Size of a batch: large enough that the pipes do not matter.
_BATCH_CHARACTERS = 1 << 20
# A text of at most this many batches is done before workers have started and filled their caches.
_WORTH_WORKERS = 32
_PIPE_BYTES = 1 << 20
_LENGTH = np.dtype("<u8")
_ENCODE = "from slm.train.data.workers import work; work()"


_Batch = TypeVar("_Batch")


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        text: The text, in UTF-8.
        ends: Whether the document ends with this piece.
    """

    text: bytes
    ends: bool


def encoded(
    documents: Iterable[str], tokenizer: Tokenizer, file: Path, workers: int
) -> Generator[list[tuple[Piece, bytes]]]:
    """Yields batches of pieces with their ids in the stored type, in order, with end-of-text after every document.

    At most two batches per worker are in memory, and at the start as many as it takes to decide whether workers pay. The
    result does not depend on `workers`.

    Args:
        documents: The texts.
        tokenizer: The tokenizer.
        file: The tokenizer's `tokenizer.json`, which the workers read.
        workers: Number of processes; 1 encodes in this process, and so does any number for a short text.

    Raises:
        SlmError: When a worker is killed.
    """
    batches = _batches(documents, cuts_at_spaces(tokenizer))
    first = list(islice(batches, _WORTH_WORKERS + 1)) if workers > 1 else []
    end = end_of_text(tokenizer)
    if len(first) <= _WORTH_WORKERS:
        encoder = Encoder(tokenizer)
        for batch in chain(first, batches):
            yield _joined(batch, encoder.encode([piece.text.decode() for piece in batch]), end)
        return
    with _Pool(file, workers) as pool:
        for batch, ids in _in_order(chain(_popped(first), batches), pool, workers, _texts):
            yield _joined(batch, ids, end)


def mapped(
    batches: Iterable[list[bytes]], workers: int, code: str, argument: str
) -> Generator[tuple[list[bytes], list[bytes]]]:
    """Yields batches with the results of worker processes, in order. At most two batches per worker are in memory.

    Args:
        batches: Lists of texts.
        workers: Number of processes.
        code: What a worker runs; it calls `serve`.
        argument: The argument of the worker.

    Raises:
        SlmError: When a worker is killed.
    """
    with _Pool(argument, workers, code) as pool:
        yield from _in_order(batches, pool, workers, list)


def _in_order(
    batches: Iterable[_Batch], pool: "_Pool", workers: int, texts: Callable[[_Batch], list[bytes]]
) -> Iterator[tuple[_Batch, list[bytes]]]:
    waiting: deque[tuple[_Batch, Future[list[bytes]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.ask(texts(batch))))
        if len(waiting) >= 2 * workers:
            batch, results = waiting.popleft()
            yield batch, results.result()
    while waiting:
        batch, results = waiting.popleft()
        yield batch, results.result()


def _texts(batch: list[Piece]) -> list[bytes]:
    return [piece.text for piece in batch]


def _popped(batches: list[list[Piece]]) -> Iterator[list[Piece]]:
    """Yields the batches, and drops the reference to each."""
    batches.reverse()
    while batches:
        yield batches.pop()


def _joined(batch: list[Piece], ids: list[bytes], end: bytes) -> list[tuple[Piece, bytes]]:
    return [(piece, each + end if piece.ends else each) for piece, each in zip(batch, ids, strict=True)]


def _batches(documents: Iterable[str], cut: bool) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for document in documents:
        goes_on = isinstance(document, Beginning)
        if goes_on and not cut:
            raise SlmError(
                "this tokenizer takes whole documents, and one is too long to be read whole",
                f"a line {END_OF_TEXT} ends a document in a .txt file; {RAISE_LIMIT}",
            )
        *before, last = pieces(document) if cut else (document,)
        for text in before:
            batch.append(Piece(text.encode(), False))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        batch.append(Piece(last.encode(), not goes_on))
        characters += len(last)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Pool:
    """Worker processes, each with a thread that waits for it."""

    def __init__(self, argument: Path | str, workers: int, code: str = _ENCODE) -> None:
        argument = str(argument.resolve()) if isinstance(argument, Path) else argument
        self._threads = ThreadPoolExecutor(workers)
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        one_core = {name: "1" for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        try:
            for _ in range(workers):
                process = child.popen(
                    code,
                    argument,
                    variables=one_core | {"TOKENIZERS_PARALLELISM": "false"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pipesize=_PIPE_BYTES,
                    apart=True,  # the command handles Ctrl-C and ends its workers
                )
                self._processes.append(process)
                self._idle.put(process)
        except BaseException:
            self._end()
            raise

    def ask(self, texts: list[bytes]) -> "Future[list[bytes]]":
        """Gives each batch to the first free worker."""
        return self._threads.submit(self._ask, texts)

    def _ask(self, texts: list[bytes]) -> list[bytes]:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, texts)
            ids = _receive(process.stdout)
        except OSError:  # the reader is gone
            ids = None
        self._idle.put(process)
        if ids is None:
            raise _lost(process)
        return ids

    def _end(self) -> None:
        for process in self._processes:
            process.kill()  # this also wakes the thread that waits for it
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # discards what was not written yet
                    pipe.close()
            process.wait()

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def _lost(process: "subprocess.Popen[bytes]") -> SlmError:
    code = process.wait()
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
    return SlmError(
        f"a tokenizing worker (process {process.pid}) {how}",
        "out of memory is the usual reason: try fewer --workers",
    )


def _send(stream: IO[bytes], parts: list[bytes]) -> None:
    stream.write(np.array([len(parts), *map(len, parts)], dtype=_LENGTH).tobytes())
    stream.write(b"".join(parts))
    stream.flush()


def _receive(stream: IO[bytes]) -> list[bytes] | None:
    """Reads a frame. Returns None if the stream ends within it."""
    start = stream.read(_LENGTH.itemsize)
    if len(start) < _LENGTH.itemsize:
        return None
    count = int.from_bytes(start, "little")
    table = stream.read(count * _LENGTH.itemsize)
    if len(table) < count * _LENGTH.itemsize:
        return None
    lengths = np.frombuffer(table, dtype=_LENGTH).tolist()
    data = stream.read(sum(lengths))
    if len(data) < sum(lengths):
        return None
    ends = np.cumsum([0, *lengths]).tolist()
    return [data[start:end] for start, end in pairwise(ends)]


def work() -> None:
    """Runs a worker: encodes with the tokenizer that its argument names until its input ends."""
    encoders: dict[str, Encoder] = {}

    def encode(file: str, texts: list[bytes]) -> list[bytes]:
        encoder = encoders.get(file) or encoders.setdefault(file, Encoder(Tokenizer.load(Path(file))))
        return encoder.encode([text.decode() for text in texts])

    serve(encode)


def serve(answer: Callable[[str, list[bytes]], list[bytes]]) -> None:
    """Answers texts with results until the input ends, and ends the process.

    Args:
        answer: Receives the worker's argument and the texts of a batch.
    """
    while (texts := _receive(sys.stdin.buffer)) is not None:
        results = answer(sys.argv[1], texts)
        try:
            _send(sys.stdout.buffer, results)
        except OSError:  # the command has ended: a broken pipe, or an invalid argument on Windows
            break
    os._exit(0)  # exits without flushing into a closed pipe
