"""Runs one text on any backend and streams it."""

import time
from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

from slm.runtime.backend import Decoder, Reader
from slm.runtime.generation import Generation, Piece, Request, Result
from slm.runtime.head import read_whole
from slm.runtime.sampling import GREEDY

Item = TypeVar("Item")


class Stream(Iterator[Item]):
    """An iterator over one text: its pieces, or their texts.

    Nothing is computed before the first item is requested.
    """

    def __init__(self, generation: Generation, items: Generator[Item, None, None]) -> None:
        self._generation, self._items = generation, items

    def __next__(self) -> Item:
        return next(self._items)

    @property
    def result(self) -> Result:
        """The result so far; final once the stream has ended."""
        return self._generation.result

    def finish(self) -> Result:
        """Reads the stream to its end and returns the result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Ends the stream. If the text was not complete, its result is "interrupted"."""
        self._items.close()

    def through(self, items: Generator[Item, None, None]) -> "Stream[Item]":
        """Returns a stream of the same text whose items come from another generator."""
        return Stream(self._generation, items)


def texts(pieces: Stream[Piece]) -> Stream[str]:
    """Returns a stream of the texts of pieces, without empty ones."""
    return Stream(pieces._generation, (piece.text for piece in pieces if piece.text))


def run(decoder: Reader, generation: Generation) -> Stream[Piece]:
    """Runs a generation on a decoder, after a reset.

    Ctrl-C during a step yields the text that was held back, and then raises `KeyboardInterrupt`.
    """
    return Stream(generation, _pieces(decoder, generation))


def greedy(decoder: Decoder, prompt: Sequence[int], new: int) -> Result:
    """Decodes exactly `new` tokens after a prompt greedily, without text. Prompt and new tokens must fit into the context."""
    return run(decoder, Generation(Request(prompt, GREEDY, new), decoder.context, decoder.vocab_size)).finish()


def _pieces(decoder: Reader, generation: Generation) -> Generator[Piece, None, None]:
    decoder.reset()
    generation.begin()
    try:
        while not generation.done:
            if generation.waiting:
                yield from generation.resume()
                continue
            began = time.perf_counter()
            if generation.slid:
                decoder.reset()
            read_whole(decoder, generation.needs_whole)
            try:
                logits = decoder.read(generation.unread)
            finally:
                read_whole(decoder, True)
            yield from generation.feed(logits, began)
    except KeyboardInterrupt:
        yield from generation.end("interrupted")
        raise
