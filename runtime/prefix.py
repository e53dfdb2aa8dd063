"""Prefix caching: tokens that an earlier prompt begins with are not read again.

A prompt that is read in other portions is summed in another order, so that its logits differ by rounding
(`slm.runtime.speculative` states by how much).

Dimensions: T positions, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.errors import SlmError
from slm.runtime.backend import Decoder, DecoderAround, Snapshot, TextSnapshot

Array = NDArray[Any]
_TOKEN = np.dtype(np.int32)


# The pause for a snapshot adds a tenth to the time of a prompt of 33 tokens, and half to that of 17; read again, they take a
# quarter and a third of their time (INT8 model of 270M parameters, 2 cores).
SHORTEST = 32


class PrefixCache:
    """Snapshots by their tokens, up to a number of bytes. The least recently used snapshot is dropped first.

    It also decides when a prompt is worth a snapshot. The snapshot is taken before the last token of the prompt, which is
    read separately, the first time too: a repeated prompt then has the same logits bit for bit, and caches that cannot
    rewind serve it as well.

    Attributes:
        max_bytes: The most memory for snapshots and their tokens.
        shortest: The fewest tokens of a snapshot.
        bytes: The memory in use.
    """

    def __init__(self, max_bytes: int, shortest: int = SHORTEST) -> None:
        if max_bytes < 0:
            raise SlmError(f"max_bytes is {max_bytes}; it must be 0 or more")
        self.max_bytes, self.shortest = max_bytes, shortest
        self.bytes = 0
        self._entries: OrderedDict[bytes, Snapshot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ids: Sequence[int]) -> bool:
        return _key(ids) in self._entries

    def longest(self, ids: Sequence[int]) -> Snapshot | None:
        """Returns the longest snapshot that is a prefix of these tokens, or equals them, and marks it as used."""
        wanted = _key(ids)
        key = max((key for key in self._entries if wanted.startswith(key)), key=len, default=None)
        if key is None:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def restore(self, decoder: Decoder, ids: Sequence[int]) -> int:
        """Restores the longest known prefix of a prompt into a decoder, at least one token shorter than the prompt.

        Returns:
            How many tokens need not be read; 0 leaves the decoder empty.
        """
        snapshot = self.longest(ids)
        if snapshot is not None:
            try:
                decoder.restore(snapshot)
                decoder.rewind(min(snapshot.length, len(ids) - 1))
                return decoder.length
            except SlmError:  # caches of the portable target cannot rewind once the window is full
                pass
        decoder.reset()
        return 0

    def pause(self, length: int, read: int) -> int:
        """Returns where the reading of a prompt pauses for a snapshot: before its last token, or at its end for none.

        Args:
            length: Tokens of the prompt.
            read: How many of them were read.
        """
        last = length - 1
        return last if self.max_bytes and self.shortest <= last > read else length

    def store(self, ids: Sequence[int], decoder: Decoder) -> None:
        """Stores a snapshot of a decoder that has read these tokens, the part of a prompt up to its pause."""
        self.add(ids, decoder.snapshot())

    def add(self, ids: Sequence[int], snapshot: Snapshot) -> bool:
        """Stores a snapshot of these tokens, and drops others to make room. Returns False if it is larger than the cache."""
        assert snapshot.length == len(ids)
        key = _key(ids)
        if key in self._entries:
            self.bytes -= len(key) + self._entries.pop(key).bytes
        size = len(key) + snapshot.bytes
        if size > self.max_bytes:
            return False
        while self.bytes + size > self.max_bytes:
            oldest, dropped = self._entries.popitem(last=False)
            self.bytes -= len(oldest) + dropped.bytes
        self._entries[key] = snapshot
        self.bytes += size
        return True

    def clear(self) -> None:
        """Drops all snapshots."""
        self._entries.clear()
        self.bytes = 0


def _key(ids: Sequence[int]) -> bytes:
    # Every token takes 4 bytes, so that a prefix of the bytes is a prefix of the tokens.
    return np.asarray(ids, _TOKEN).tobytes()


class PrefixDecoder(DecoderAround):
    """A decoder whose first read after a reset reuses the known prefix of the prompt.

    The prefix is known from the previous text (the next turn of a chat begins with the whole conversation), or from a
    snapshot; the longer one is used. `PrefixCache` decides which prompts get a snapshot.

    Attributes:
        decoder: The decoder that computes.
        cache: The snapshots; several decoders of one model can share them.
        reused: Tokens of the last prompt that were reused.
    """

    def __init__(self, decoder: Decoder, cache: PrefixCache) -> None:
        super().__init__(decoder)
        self.cache = cache
        self.reused = 0
        self._ids: list[int] = []  # the tokens in the decoder's state
        self._begun = False

    @property
    def length(self) -> int:
        """The number of tokens read since the last reset."""
        return self.decoder.length if self._begun else 0

    def reset(self) -> None:
        """Forgets all tokens; the next prompt may still reuse them."""
        self._begun = False

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the next token. The first read reuses a known prefix."""
        if self._begun:
            logits = self.decoder.read(ids)
            self._ids += ids
            return logits
        read = self.reused = self._go_to_known(ids)
        self._ids = list(ids[:read])
        pause = self.cache.pause(len(ids), read)
        if pause < len(ids):
            self.decoder.read(ids[read:pause])
            read, self._ids = pause, list(ids[:pause])
            self.cache.store(self._ids, self.decoder)
        logits = self.decoder.read(ids[read:])
        self._ids, self._begun = list(ids), True
        return logits

    def _go_to_known(self, ids: Sequence[int]) -> int:
        """Brings the decoder to the known prefix of a prompt and returns its length; at least one token is left to read."""
        most = len(ids) - 1
        # An interrupted step leaves the decoder empty.
        common = common_length(self._ids, ids) if self.decoder.length == len(self._ids) else 0
        snapshot = self.cache.longest(ids)
        if common and (snapshot is None or min(common, most) >= min(snapshot.length, most)):
            try:
                self.decoder.rewind(min(common, most))
                return min(common, most)
            except SlmError:  # sliding layers dropped the needed positions
                pass
        return self.cache.restore(self.decoder, ids)

    def _begin(self) -> None:
        """Starts an empty text if the first call after a reset is not `read`."""
        if not self._begun:
            self.decoder.reset()
            self._ids, self._begun = [], True

    @property
    def revocable(self) -> int:
        """The most tokens that `read_each` may read next so that all of them can be rewound."""
        self._begin()
        return self.decoder.revocable

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""
        self._begin()
        logits = self.decoder.read_each(ids)
        self._ids += ids
        return logits

    def rewind(self, length: int) -> None:
        """Forgets all tokens after the first `length`; see `Decoder.rewind`."""
        self._begin()
        self.decoder.rewind(length)
        del self._ids[length:]

    def snapshot(self) -> TextSnapshot:
        """Returns a copy of the state."""
        self._begin()
        return TextSnapshot(self.decoder.snapshot(), np.array(self._ids, _TOKEN))

    def restore(self, snapshot: Any) -> None:
        """Replaces the state by a snapshot; see `Decoder.restore`."""
        if not isinstance(snapshot, TextSnapshot):
            raise SlmError("the snapshot is not of this decoder", "read the text with this one")
        self._begun = True
        self.decoder.restore(snapshot.inner)
        self._ids = snapshot.ids.tolist()


def common_length(some: Sequence[int], others: Sequence[int]) -> int:
    """Returns the length of the common prefix of two token sequences."""
    size = min(len(some), len(others))
    unequal = np.asarray(some[:size], _TOKEN) != np.asarray(others[:size], _TOKEN)
    return int(unequal.argmax()) if unequal.any() else size
