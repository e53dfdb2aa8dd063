"""The speed of prefill and decoding on this machine, with the speed at which its memory can be read.

Cases take turns, so that other load on the machine affects all of them. Dimensions: B batch, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
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

# Tokens of the visit that warms up: threads are started, memory is taken.
_WARM_UP = 4
# A probe reads at least this much at a time, in as many passes as that takes: threads that wake up on one core need some
# milliseconds until they have one each.
_PROBE_BYTES = 2 << 30
# More than this says nothing else about memory; with less, the time goes into calls and not into reading.
_LARGEST_PROBE = 1 << 30
_SMALLEST_PROBE = 256 << 10
_TIMES = 3
_EMBEDDING = "model.embed_tokens"

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One benchmark: steps of `batch` rows after `prompt` tokens. The prompt is read only where there is one row."""

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
    """The timings of one case, a value for each round.

    Attributes:
        case: The case.
        step_bytes: Bytes of weights and caches that a step after the prompt reads.
        read_s: Seconds from the beginning of the prompt to the first new token; empty for several rows.
        decode_s: Seconds that all new tokens after the first took together.
        read_rate: Bytes of memory read a second in the same round; empty where it was not measured.
        steps: New tokens after the first, of each row.
    """

    case: Case
    step_bytes: int
    steps: int
    read_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    read_rate: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> Spread | None:
        """Time to first token."""
        return Spread.of([1e3 * seconds for seconds in self.read_s]) if self.read_s else None

    @property
    def prefill_tok_s(self) -> Spread | None:
        """Prompt tokens read a second."""
        return Spread.of([self.case.prompt / seconds for seconds in self.read_s]) if self.read_s else None

    @property
    def decode_tok_s(self) -> Spread:
        """New tokens a second, of all rows together."""
        return Spread.of([self.case.batch * self.steps / seconds for seconds in self.decode_s])

    @property
    def step_ms(self) -> Spread:
        """Milliseconds a step."""
        return Spread.of([1e3 * seconds / self.steps for seconds in self.decode_s])

    @property
    def memory_share(self) -> Spread | None:
        """Bytes that steps read a second, as a share of the memory speed of the same round."""
        if not self.read_rate:
            return None
        pairs = zip(self.decode_s, self.read_rate, strict=True)
        return Spread.of([self.step_bytes * self.steps / seconds / rate for seconds, rate in pairs])


class Rows(Protocol):
    """Rows with a past that take steps together."""

    def step(self, ids: Array) -> Array:
        """Reads one token of every row (B, 1) and returns the logits (B, V) for those that follow."""


class OnnxRows:
    """Rows of a bundle as if each had read a prompt.

    Buffers have the length that they have after a prompt, and are filled with ones: their values do not affect the time, but
    memory that was never written does, because all of it is one page of zeros. Caches that grow, as those of the portable
    target, are filled by reading.
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
        """Reads one token of every row (B, 1) and returns the logits (B, V) for those that follow."""
        return self._run(ids)

    def _run(self, ids: Array) -> Array:
        """Reads tokens (B, T) and returns the logits (B, V) for those that follow."""
        self._length += ids.shape[1]
        mask = np.ascontiguousarray(self._mask[:, : self._length])
        logits: Array = self._decoder.run(ids, mask, self._caches, keep=1)[:, -1]
        return logits


MakeRows = Callable[[Case, int], Rows]


def onnx_rows(decoder: OnnxDecoder) -> MakeRows:
    """Returns a function that makes rows of a bundle for a case and a number of steps."""
    return lambda case, new: OnnxRows(decoder, case, new)


def weight_bytes_read(bundle: Bundle) -> int:
    """Returns the bytes of weights that one step of a bundle reads, whatever the number of rows.

    That is everything stored beside the graph, except rotation tables and an untied embedding, of which a step reads one row.
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
    """Returns whether rotation tables are among the weights, as in bundles that slm wrote before 2026-11-23."""
    return f"positions.{bundle.config.layer_types[0]}_cos".encode() in bundle.model_path.read_bytes()


def float32_weight_bytes_read(config: ModelConfig) -> int:
    """Returns the same for a checkpoint in float32."""
    tied = config.tie_word_embeddings
    return weights_bytes(config, FLOAT32_BYTES) - (0 if tied else FLOAT32_BYTES * parameters(config).embedding)


def cache_bytes_read(layers: Sequence[CacheLayer], positions: int) -> int:
    """Returns the bytes of keys and values that the next token of a row attends to after that many positions."""
    return sum(
        2
        * layer.kv_heads
        * layer.head_dim
        * np.dtype(layer.dtype).itemsize
        * (positions if layer.window is None else min(positions, layer.window))
        for layer in layers
    )


class ReadProbe:
    """Reads memory as fast as possible with several threads.

    It reads as much as a token does, so that both come from the same level of memory: a server's processor caches hold a whole
    small model.
    """

    def __init__(self, size: int, threads: int) -> None:
        """Takes the memory.

        Args:
            size: Bytes; at least 256 KiB and at most 1 GiB are taken.
            threads: The number of threads; each reads a part of its own.
        """
        count = min(max(size, _SMALLEST_PROBE), _LARGEST_PROBE) // 8 // threads
        self._parts = [np.ones(count, np.int64) for _ in range(threads)]
        self._bytes = count * 8 * threads
        self._passes = max(1, _PROBE_BYTES // self._bytes)
        self._pool = ThreadPoolExecutor(threads)

    def rate(self) -> float:
        """Returns the bytes read a second, the median of several measurements."""
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


def measure(
    decoder: Decoder,
    make_rows: MakeRows,
    cases: Sequence[Case],
    step_bytes: Callable[[Case], int],
    probe: ReadProbe | None,
    *,
    new: int,
    rounds: int,
    progress: Progress | None = None,
) -> list[Timing]:
    """Times cases in turn, after one warm-up.

    Args:
        decoder: The model; it runs cases of one row.
        make_rows: Makes the rows of other cases.
        cases: The cases; prompt and new tokens fit into the context.
        step_bytes: Returns the bytes that a step of a case reads.
        probe: Measures the memory speed once a round; None where memory is not the limit.
        new: New tokens a row, at least 2; the first comes from the prompt's logits.
        rounds: How often every case is timed.
        progress: Advances with every timing.
    """
    progress = progress or Silent()
    timings = [Timing(case, step_bytes(case), new - 1) for case in cases]
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
                    decode_s = _steps(make_rows(timing.case, new), timing.case.batch, new - 1)
                timing.decode_s.append(decode_s)
                timing.read_rate += [] if rate is None else [rate]
                progress.advance()
    finally:
        progress.finish()
        decoder.reset()
    return timings


def prompt_ids(length: int, vocab_size: int) -> list[int]:
    """Returns a prompt; the same every time."""
    return [int(token) for token in np.random.default_rng(0).integers(vocab_size, size=length)]


def read_and_write(decoder: Decoder, prompt: int, new: int) -> tuple[float, float]:
    """Reads a prompt and decodes greedily; returns the seconds to the first token and from there to the last."""
    result = greedy(decoder, prompt_ids(prompt, decoder.vocab_size), new)
    return result.ttft_ms / 1e3, result.decode_s


def _steps(rows: Rows, batch: int, steps: int) -> float:
    """Returns the seconds of greedy steps of rows. One step before them is not timed: it touches the memory."""
    ids = rows.step(np.zeros((batch, 1), np.int64)).argmax(-1)[:, None]
    started = time.perf_counter()
    for _ in range(steps):
        ids = rows.step(ids).argmax(-1)[:, None]
    return time.perf_counter() - started


def resident_mib() -> float | None:
    """Returns the resident memory of this process, in MiB; None where the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / (1 << 10)  # KiB
    except (OSError, IndexError, ValueError):
        return None
