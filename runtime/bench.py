"""Measures the speed of prefill and decoding, and the read speed of this machine's memory.

Cases take turns, so that other load on the machine affects all of them. Dimensions: B batch, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slm.core.accounting import FLOAT32_BYTES, parameters, weights_bytes
from slm.core.config import ModelConfig
from slm.core.contract import CacheLayer
from slm.core.manifest import Bundle
from slm.core.progress import Progress, Silent
from slm.runtime.backend import Decoder
from slm.runtime.decoder import PREFILL_CHUNK, OnnxDecoder
from slm.runtime.growing import GrowingCaches
from slm.runtime.streaming import greedy

# Tokens of the warm-up, which starts threads and allocates memory.
_WARM_UP = 4
# A probe reads at least this many bytes, in several passes if necessary: threads that wake up on the same core need a few
# milliseconds to spread over the cores.
_PROBE_BYTES = 2 << 30
# More bytes measure the same memory speed; with fewer, the time of calls exceeds the time of reading.
_LARGEST_PROBE = 1 << 30
_SMALLEST_PROBE = 256 << 10
_TIMES = 3
_EMBEDDING = "model.embed_tokens"

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One benchmark: steps of `batch` rows after `prompt` tokens. The prompt is read only if there is one row."""

    prompt: int
    batch: int = 1


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Returns the spread of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass
class Timing:
    """The timings of one case, one value per round.

    Attributes:
        case: The case.
        step_bytes: Bytes of weights and caches that a step after the prompt reads.
        read_s: Seconds from the start of the prompt to the first new token; empty for several rows.
        decode_s: Total seconds of all new tokens after the first.
        read_rate: Memory read speed in the same round, in bytes per second; empty if not measured.
        steps: New tokens of each row after the first.
    """

    case: Case
    step_bytes: int
    steps: int
    read_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    read_rate: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> Spread | None:
        """Time to first token, in milliseconds."""
        return Spread.of([1e3 * seconds for seconds in self.read_s]) if self.read_s else None

    @property
    def prefill_tok_s(self) -> Spread | None:
        """Prompt tokens per second."""
        return Spread.of([self.case.prompt / seconds for seconds in self.read_s]) if self.read_s else None

    @property
    def decode_tok_s(self) -> Spread:
        """New tokens per second, summed over rows."""
        return Spread.of([self.case.batch * self.steps / seconds for seconds in self.decode_s])

    @property
    def step_ms(self) -> Spread:
        """Milliseconds per step."""
        return Spread.of([1e3 * seconds / self.steps for seconds in self.decode_s])

    @property
    def memory_share(self) -> Spread | None:
        """Bytes per second that steps read, divided by the memory speed of the same round."""
        if not self.read_rate:
            return None
        pairs = zip(self.decode_s, self.read_rate, strict=True)
        return Spread.of([self.step_bytes * self.steps / seconds / rate for seconds, rate in pairs])


class Rows(Protocol):
    """Rows with a past that step together."""

    def step(self, ids: Array) -> Array:
        """Reads one token of every row (B, 1) and returns the next logits (B, V)."""


class OnnxRows:
    """Rows of a bundle in the state that they have after a prompt.

    Buffers have the length that they have after a prompt, and are filled with ones. The values do not affect the time, but
    memory that was never written does, because the system maps all of it to one page of zeros. Growing caches (portable
    target) are filled by reading tokens.
    """

    def __init__(self, decoder: OnnxDecoder, case: Case, new: int) -> None:
        total = case.prompt + new
        self._decoder = decoder
        self._length = 0
        self._caches = decoder.caches(case.batch)
        self._caches.reserve(total)
        self._mask = np.ones((case.batch, total), np.int64)
        if isinstance(self._caches, GrowingCaches):
            for start in range(0, case.prompt, PREFILL_CHUNK):
                self._run(np.zeros((case.batch, min(PREFILL_CHUNK, case.prompt - start)), np.int64))
        else:
            self._caches.fill(case.prompt)
        self._length = case.prompt

    def step(self, ids: Array) -> Array:
        """Reads one token of every row (B, 1) and returns the next logits (B, V)."""
        return self._run(ids)

    def _run(self, ids: Array) -> Array:
        """Reads tokens (B, T) and returns the logits (B, V) after the last of each row."""
        self._length += ids.shape[1]
        mask = np.ascontiguousarray(self._mask[:, : self._length])
        self._decoder.whole_head = False  # a step of greedy decoding
        try:
            logits: Array = self._decoder.run(ids, mask, self._caches, keep=1)[:, -1]
        finally:
            self._decoder.whole_head = True
        return logits


MakeRows = Callable[[Case, int], Rows]


def onnx_rows(decoder: OnnxDecoder) -> MakeRows:
    """Returns a function that creates the rows of a case for a number of steps."""
    return lambda case, new: OnnxRows(decoder, case, new)


def weight_bytes_read(bundle: Bundle) -> int:
    """Returns the bytes of weights that one step of a bundle reads, independent of the number of rows.

    These are all weights stored beside the graph, except rotation tables and an untied embedding: a step reads one row of
    each.
    """
    manifest, config = bundle.manifest, bundle.config
    beside = (
        entry for name, entry in manifest.files.items() if name.startswith(manifest.model) and name != manifest.model
    )
    stored = sum(entry.bytes for entry in beside)
    if _has_tables(bundle):
        bases = len(set(config.layer_types))
        itemsize = FLOAT32_BYTES if manifest.device == "cpu" else FLOAT32_BYTES // 2
        stored -= bases * 2 * manifest.context * config.head_dim // 2 * itemsize
    if config.tie_word_embeddings:
        return stored
    if manifest.quantization is not None:
        return stored - manifest.quantization.schemes[_EMBEDDING].bytes(config.vocab_size, config.hidden_size)
    parts = parameters(config)
    return stored - stored * parts.embedding // parts.total


def _has_tables(bundle: Bundle) -> bool:
    """Returns whether the weights include rotation tables, as in bundles exported before 2026-11-23."""
    return f"positions.{bundle.config.layer_types[0]}_cos".encode() in bundle.model_path.read_bytes()


def float32_weight_bytes_read(config: ModelConfig) -> int:
    """Returns the bytes of weights that one step of a float32 checkpoint reads."""
    tied = config.tie_word_embeddings
    return weights_bytes(config, FLOAT32_BYTES) - (0 if tied else FLOAT32_BYTES * parameters(config).embedding)


def cache_bytes_read(layers: Sequence[CacheLayer], positions: int) -> int:
    """Returns the bytes of keys and values that the next token of a row attends to after `length` positions."""
    return sum(
        2
        * layer.kv_heads
        * layer.head_dim
        * np.dtype(layer.dtype).itemsize
        * (positions if layer.window is None else min(positions, layer.window))
        for layer in layers
    )


class ReadProbe:
    """Measures the read speed of memory with several threads.

    The probe reads as many bytes as a step, so that both use the same level of memory: the processor caches of a server hold
    a whole small model.
    """

    def __init__(self, size: int, threads: int) -> None:
        """Allocates the memory.

        Args:
            size: Bytes, limited to the range from 256 KiB to 1 GiB.
            threads: The number of threads; each reads its own part.
        """
        count = min(max(size, _SMALLEST_PROBE), _LARGEST_PROBE) // 8 // threads
        self._parts = [np.ones(count, np.int64) for _ in range(threads)]
        self._bytes = count * 8 * threads
        self._passes = max(1, _PROBE_BYTES // self._bytes)
        self._pool = ThreadPoolExecutor(threads)

    def rate(self) -> float:
        """Returns the read speed in bytes per second, the median of several measurements."""
        return median(self._rate() for _ in range(_TIMES))

    def _rate(self) -> float:
        started = time.perf_counter()
        list(self._pool.map(self._read, self._parts))
        return self._passes * self._bytes / (time.perf_counter() - started)

    def _read(self, part: Array) -> None:
        for _ in range(self._passes):
            np.bitwise_or.reduce(part)

    def close(self) -> None:
        """Ends the threads and frees the memory."""
        self._pool.shutdown()
        self._parts = []


@dataclass(frozen=True)
class Measured:
    """A model whose speed is measured.

    Attributes:
        decoder: The model, for cases of one row.
        make_rows: Creates the rows of other cases.
        step_bytes: Returns the bytes that a step of a case reads.
    """

    decoder: Decoder
    make_rows: MakeRows
    step_bytes: Callable[[Case], int]


def measure(
    model: Measured,
    cases: Sequence[Case],
    probe: ReadProbe | None,
    *,
    new: int,
    rounds: int,
    progress: Progress | None = None,
) -> list[Timing]:
    """Times cases in turn, after one warm-up.

    Args:
        model: The model.
        cases: The cases; prompt and new tokens fit into the context.
        probe: Measures the memory speed once per round; None if memory is not the limit.
        new: New tokens per row, at least 2; the first comes from the prompt's logits.
        rounds: The number of timings per case.
        progress: Advances with every timing.
    """
    progress = progress or Silent()
    decoder = model.decoder
    timings = [Timing(case, model.step_bytes(case), new - 1) for case in cases]
    progress.start("benchmark", rounds * len(cases), "visits")
    try:
        read_and_write(decoder, min(case.prompt for case in cases), min(new, _WARM_UP))
        for _ in range(rounds):
            rate = None if probe is None else probe.rate()
            for timing in timings:
                if timing.case.batch == 1:
                    read_s, decode_s = read_and_write(decoder, timing.case.prompt, new)
                    timing.read_s.append(read_s)
                else:
                    decode_s = _steps(model.make_rows(timing.case, new), timing.case.batch, new - 1)
                timing.decode_s.append(decode_s)
                timing.read_rate += [] if rate is None else [rate]
                progress.advance()
    finally:
        progress.finish()
        decoder.reset()
    return timings


def prompt_ids(length: int, vocab_size: int) -> list[int]:
    """Returns a prompt of random ids from a fixed seed."""
    return [int(token) for token in np.random.default_rng(0).integers(vocab_size, size=length)]


def read_and_write(decoder: Decoder, prompt: int, new: int) -> tuple[float, float]:
    """Reads a prompt and decodes greedily. Returns the seconds to the first token, and from there to the last."""
    result = greedy(decoder, prompt_ids(prompt, decoder.vocab_size), new)
    return result.ttft_ms / 1e3, result.decode_s


def _steps(rows: Rows, batch: int, steps: int) -> float:
    """Returns the seconds of greedy steps of rows. One untimed step before them touches the memory."""
    ids = rows.step(np.zeros((batch, 1), np.int64)).argmax(-1)[:, None]
    started = time.perf_counter()
    for _ in range(steps):
        ids = rows.step(ids).argmax(-1)[:, None]
    return time.perf_counter() - started
