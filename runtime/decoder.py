"""Runs a bundle with onnxruntime as a decoder (the interface of `slm.runtime.backend`).

Dimensions: B batch, T positions, V vocabulary.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, past_name
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme
from slm.runtime.adapters import Adapter, check_slots_of
from slm.runtime.backend import log_probabilities
from slm.runtime.cache import CachedRow, Extent, KVBuffers
from slm.runtime.cuda_graph import CUDA_OPTIONS, StepGraphs, check_bundle, without_graph
from slm.runtime.growing import GrowingCaches
from slm.runtime.head import WHOLE, in_halves
from slm.runtime.memory import DeviceBuffer, HostBuffer, Place
from slm.runtime.session import RuntimeDevice, first_line, open_session, takes_from, weights_file
from slm.runtime.unused import page_out, trim_freed_memory

# Tokens per step of a prompt. It bounds the attention scores, which are (heads, chunk, length).
PREFILL_CHUNK = 512

# Steps of at least this many tokens take much more memory than single-token steps.
_MANY = 64

# The largest block size, by bits of a weight, with which MatMulNBits (AVX-512 VNNI, accuracy level 4) sums in the same order
# for one row and for many.
_LARGEST_ALIKE = {8: 64, 4: 32}

# Logits of one step of a comparison: 64 positions of Gemma's vocabulary, or a whole prompt of a small one.
LOGITS_BYTES = 64 << 20

Array = NDArray[Any]
Caches = KVBuffers | GrowingCaches


def comparable_positions(vocab_size: int) -> int:
    """Returns the number of positions per step whose logits a comparison can request in bounded memory."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def _alike(scheme: Scheme) -> bool:
    """Returns whether a product sums in the same order for one row and for many. Integer sums are exact in any order."""
    return not scheme.halves and (scheme.dynamic or scheme.block_size <= _LARGEST_ALIKE[scheme.bits])


@dataclass(frozen=True)
class OnnxSnapshot:
    """A snapshot of a bundle.

    Attributes:
        model: Identifies the graph and its weights.
        row: The caches.
    """

    model: frozenset[str]
    row: CachedRow

    @property
    def length(self) -> int:
        """The number of tokens in the state."""
        return self.row.extent.length

    @property
    def bytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self.row.bytes


@dataclass
class _Bound:
    """A binding and the objects that it binds.

    Attributes:
        keep: The bound number of positions with logits; None before the first step.
        step: The bound arrays of single-token steps; None if the last step was another one.
        spare: The arrays of the step before, whose logits the caller may have released by now.
    """

    buffers: Caches
    growths: int
    adapter: Adapter | None
    binding: ort.IOBinding
    keep: int | None = None
    step: "_StepArrays | None" = None
    spare: "_StepArrays | None" = None


class _StepArrays:
    """The tokens and logits of single-token steps of B rows, in memory that stays bound.

    A new binding of both and a list of all outputs would take 0.2 ms of each step at the 270M shape.

    Attributes:
        ids: The tokens (B, 1), which the next step reads.
        logits: The logits (B, 1, V) of the last step. They belong to the caller as long as the caller refers to them.
    """

    def __init__(self, rows: int, vocab_size: int) -> None:
        self.ids = np.zeros((rows, 1), np.int64)
        self.logits = np.empty((rows, 1, vocab_size), np.float32)
        # OrtValues share the memory of their arrays.
        self._values = ort.OrtValue.ortvalue_from_numpy(self.ids), ort.OrtValue.ortvalue_from_numpy(self.logits)
        self._own = sys.getrefcount(self.logits)

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds both."""
        binding.bind_ortvalue_input(INPUT_IDS, self._values[0])
        binding.bind_ortvalue_output(LOGITS, self._values[1])

    def fits(self, rows: int) -> bool:
        """Returns whether a step of so many rows can write its logits here: no caller refers to the last ones."""
        return len(self.ids) == rows and sys.getrefcount(self.logits) <= self._own


class OnnxDecoder:
    """A bundle that onnxruntime runs, with its caches in place.

    Attributes:
        bundle: The bundle.
        session: The open graph.
        cache_device: The device of attention, and therefore of the caches.
        place: Creates cache buffers on that device.
        buffers: The caches of the current text.
        whole_head: Whether steps that return one row of logits read a head in halves whole (`slm.runtime.head`).
    """

    def __init__(
        self,
        bundle: Bundle,
        device: RuntimeDevice = "cpu",
        threads: int | None = None,
        optimize: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        """Opens a bundle.

        Args:
            bundle: The bundle.
            device: Where to run.
            threads: Threads per operator; by default the usable physical cores.
            optimize: Whether onnxruntime may optimize the graph.
            cuda_graph: Whether to record single-token steps on CUDA and replay them (`slm.runtime.cuda_graph`).

        Raises:
            SlmError: If the bundle cannot be opened on the device, or its steps cannot be recorded.
        """
        self.bundle = bundle
        if cuda_graph:
            check_bundle(bundle)
        self.session = open_session(bundle, device, threads, optimize, CUDA_OPTIONS if cuda_graph else None)
        self._device = device
        self.cache_device: RuntimeDevice = "cpu"
        self.place: Place = HostBuffer
        if device == "cuda":
            # Only attention reads the caches of a fused graph; in a portable graph another operator also reads the shape of
            # keys.
            values = [past_name(layer.layer, "value") for layer in bundle.manifest.cache]
            self.cache_device = takes_from(self.session, values)
        if self.cache_device == "cuda":
            self.place = partial(DeviceBuffer, session=self.session, device=self.cache_device)
        self._threads = self.session.get_session_options().intra_op_num_threads
        self._mask = np.ones((1, 0), np.int64)
        self._many = ort.RunOptions()  # shrinks the arena after large steps
        self._many.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._few: ort.RunOptions | None = None
        self._graphs: StepGraphs | None = None
        if cuda_graph:
            self._few, self._many = without_graph(ort.RunOptions()), without_graph(self._many)
            self._graphs = StepGraphs(self.session, self.vocab_size)
        self._bound: _Bound | None = None
        self.whole_head = True
        self._halves = in_halves(bundle)
        self.adapter: Adapter | None = None
        self._extent = Extent()
        self.buffers = self.caches()

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.bundle.manifest.context

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        return self.bundle.config.vocab_size

    @property
    def length(self) -> int:
        """The number of tokens read since the last reset."""
        return self._extent.length

    @property
    def description(self) -> str:
        """A short description of the backend and its device."""
        elsewhere = " (attention on the CPU)" * (self.cache_device != self._device)
        graphs = " with CUDA graphs" * (self._graphs is not None)
        where = self._device.upper() + elsewhere + graphs
        threads = f"{self._threads} thread{'s' * (self._threads > 1)}"
        return f"onnxruntime {ort.__version__} on {where}, {threads}, {self.bundle.manifest.precision}"

    def reset(self) -> None:
        """Forgets all tokens."""
        self._extent = Extent()
        if self._graphs is None:  # recorded steps hold the addresses of these buffers
            self._bound = None  # a binding keeps its buffers alive
            self.buffers = self.caches()

    def caches(self, batch: int = 1) -> Caches:
        """Returns empty caches for `batch` rows, of the kind that the bundle's target uses."""
        manifest = self.bundle.manifest
        if manifest.target == "portable":
            return GrowingCaches(manifest.cache, batch, self.cache_device)
        return KVBuffers(manifest.cache, self.context, batch, self.place)

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens, long prompts in chunks, and returns the logits (V,) for the next token.

        Raises:
            SlmError: If the tokens do not fit into the context.
        """
        self._check_room(len(ids))
        new = np.asarray(ids, np.int64)[None]
        self.make_room(self.buffers, self.length + len(ids))
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self.step(new[:, start : start + PREFILL_CHUNK])
        self.after_prompt(len(ids))
        return logits[0, -1]

    def after_prompt(self, tokens: int) -> None:
        """Returns memory that only a long prompt needed to the system: temporary values, and pages of the embedding."""
        if tokens >= PREFILL_CHUNK and self._device == "cpu":
            page_out(weights_file(self.bundle))
            trim_freed_memory()

    @property
    def revocable(self) -> int:
        """The most tokens that `read_each` may read next so that all of them can be rewound."""
        return min(self.buffers.revocable(self._extent), self.context - self.length)

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""
        self._check_room(len(ids))
        logits: Array = self.step(np.asarray(ids, np.int64)[None], keep=0)[0]
        return logits

    def rewind(self, length: int) -> None:
        """Forgets all tokens after the first `length`; see `slm.runtime.backend.Decoder.rewind`."""
        self._extent = self.buffers.rewind(0, self._extent, length)

    def snapshot(self) -> OnnxSnapshot:
        """Returns a copy of the cached positions."""
        return OnnxSnapshot(self.identified(self.adapter), self.buffers.copy_row(0, self._extent))

    def restore(self, snapshot: Any) -> None:
        """Replaces the state by a snapshot; see `slm.runtime.backend.Decoder.restore`."""
        row = self.own(snapshot, self.adapter)
        self.make_room(self.buffers, snapshot.length)
        self._extent = self.buffers.put_row(0, row)

    @property
    def steps_alike(self) -> bool:
        """Whether logits are bit-identical for any number of rows, and of up to `FEW_TOKENS` tokens, per step.

        docs/generation.md has the limits. This holds for two of onnxruntime's CPU kernels: the one for INT8 caches, unless
        there are more threads than heads and it splits positions among threads; and products with INT8 weights in blocks of at
        most 64.
        """
        manifest = self.bundle.manifest
        return (
            self._device == "cpu"
            and manifest.quantization is not None
            and all(_alike(scheme) for scheme in manifest.quantization.schemes.values())
            and all(layer.dtype == "int8" for layer in manifest.cache)
            and self._threads <= self.bundle.config.num_attention_heads
        )

    @property
    def identity(self) -> frozenset[str]:
        """Identifies the graph and its weights: bundles with the same identity compute the same logits."""
        manifest = self.bundle.manifest
        return frozenset(each.sha256 for name, each in manifest.files.items() if name.startswith(manifest.model))

    def identified(self, adapter: Adapter | None) -> frozenset[str]:
        """Returns what identifies the model with an adapter."""
        return self.identity if adapter is None else self.identity | {adapter.digest}

    def own(self, snapshot: Any, adapter: Adapter | None = None) -> CachedRow:
        """Returns the caches of a snapshot.

        Raises:
            SlmError: If the snapshot belongs to another model or adapter, or does not fit into the context.
        """
        if not isinstance(snapshot, OnnxSnapshot) or snapshot.model != self.identified(adapter):
            raise SlmError(f"the snapshot is not of {self.bundle.path}", "read the text with this model")
        if snapshot.length > self.context:
            raise SlmError(f"the snapshot has {snapshot.length:,} tokens and the context {self.context:,}")
        return snapshot.row

    def step(self, ids: Array, keep: int = 1) -> Array:
        """Reads tokens (1, T) of one row and returns the logits (1, keep or T, V); `keep` = 0 returns all positions."""
        extent = self.buffers.extended(self._extent, ids.shape[1])
        self.make_room(self.buffers, extent.length)
        try:
            logits = self.run(ids, self._attended(extent.length), self.buffers, keep, self.adapter)
            self._extent = extent
        except BaseException:  # includes Ctrl-C: the content of the buffers is unknown after an interrupted step
            self.reset()
            raise
        return logits

    def _attended(self, length: int) -> Array:
        """Returns the mask (1, length) of an unpadded row, a view of an array that grows as needed."""
        if length > self._mask.shape[1]:
            self._mask = np.ones((1, min(self.context, 2 * length)), np.int64)
        return self._mask[:, :length]

    def make_room(self, buffers: Caches, length: int, rows: int | None = None) -> None:
        """Makes room for sequences of this length. Keeps the cached positions of the first `rows` rows, by default of all."""
        if not buffers.fits(length):
            self._bound = None  # otherwise the binding keeps the replaced buffers in memory until the next step
            buffers.reserve(length, rows)

    def _check_room(self, tokens: int) -> None:
        if self.length + tokens > self.context:
            raise SlmError(
                f"{self.length + tokens:,} tokens do not fit into the context of {self.context:,}",
                "a shorter prompt, or slm export --onnx --context N",
            )

    def logits(self, ids: Array) -> Array:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T), independent of the state."""
        batch, length = ids.shape
        buffers = self.caches(batch)
        buffers.reserve(length)
        return self.run(ids, np.ones((batch, length), np.int64), buffers, 0, self.adapter)

    def score(self, ids: Array) -> tuple[Array, Array]:
        """Returns log-probabilities, and whether each token was the most likely one, both (B, T - 1); see `Scorer.score`."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        positions = min(comparable_positions(self.vocab_size), PREFILL_CHUNK)
        if inputs.shape[1] > positions:  # with past positions, the graph reads several tokens of only one row at a time
            scored = [self._score_in_chunks(*row, positions) for row in zip(inputs, targets, strict=True)]
        else:
            rows = comparable_positions(self.vocab_size) // max(1, inputs.shape[1])
            scored = [
                log_probabilities(self.logits(inputs[i : i + rows]), targets[i : i + rows])
                for i in range(0, len(ids), rows)
            ]
        likely, likeliest = zip(*scored, strict=True)
        return np.concatenate(likely), np.concatenate(likeliest)

    def _score_in_chunks(self, inputs: Array, targets: Array, positions: int) -> tuple[Array, Array]:
        """Scores one row (T,); returns (1, T) each."""
        buffers = self.caches()
        buffers.reserve(len(inputs))
        scored = []
        for start in range(0, len(inputs), positions):
            chunk = inputs[None, start : start + positions]
            logits = self.run(chunk, self._attended(start + chunk.shape[1]), buffers, 0, self.adapter)
            scored.append(log_probabilities(logits, targets[None, start : start + positions]))
        likely, likeliest = zip(*scored, strict=True)
        return np.concatenate(likely, axis=1), np.concatenate(likeliest, axis=1)

    def use(self, adapter: Adapter | None) -> None:
        """Uses an adapter from now on; None is the base model. A change of adapter forgets all tokens.

        Raises:
            SlmError: If the bundle has no adapter slots.
        """
        if adapter is not None:
            check_slots_of(self.bundle)
        if adapter is not self.adapter:
            self.reset()
            self.adapter = adapter

    def run(self, ids: Array, mask: Array, buffers: Caches, keep: int, adapter: Adapter | None = None) -> Array:
        """Runs the graph once.

        Args:
            ids: Tokens (B, T).
            mask: (B, past + T).
            buffers: Caches, updated in place.
            keep: The number of last positions whose logits are returned; 0 for all.
            adapter: One adapter for all rows, or one per row (`slm.runtime.adapters.stacked`).

        Returns:
            Logits (B, keep or T, V).
        """
        step = None if self._graphs is None else self._graphs.step_of(buffers, ids, mask)
        if step is not None:
            assert isinstance(buffers, KVBuffers)
            try:
                return step.run(buffers, ids, mask)
            except Exception as error:
                raise self._failure(error) from error
        bound = self._bound_to(buffers, adapter)
        arrays = self._step_arrays(bound, ids, keep)
        if arrays is None:
            bound.step = None
            bound.binding.bind_output(LOGITS)
            bound.binding.bind_cpu_input(INPUT_IDS, np.ascontiguousarray(ids, np.int64))
        bound.binding.bind_cpu_input(ATTENTION_MASK, mask)
        whole = self._halves and (self.whole_head or keep != 1) and len(ids) == 1 and 1 in (keep, ids.size)
        asked = WHOLE if whole else keep
        if bound.keep != asked:
            # onnxruntime binds an optional input only as an OrtValue: by name it searches the required inputs only.
            kept = ort.OrtValue.ortvalue_from_numpy(np.array(asked, np.int64))
            bound.binding.bind_ortvalue_input(LOGITS_TO_KEEP, kept)
            bound.keep = asked
        try:
            self.session.run_with_iobinding(bound.binding, self._many if ids.size >= _MANY else self._few)
            if arrays is not None:
                return arrays.logits
            outputs = bound.binding.get_outputs()
            logits: Array = outputs[0].numpy()
        except Exception as error:  # onnxruntime's exceptions share no narrower base class
            raise self._failure(error) from error
        if logits.shape[::2] != (len(ids), self.vocab_size):
            raise SlmError(f"{self.bundle.model_path} returned logits of shape {logits.shape}")
        buffers.written(outputs[1:])
        return logits[:, -1:] if whole and keep else logits

    def _step_arrays(self, bound: _Bound, ids: Array, keep: int) -> _StepArrays | None:
        """Returns the bound arrays of a single-token step with its tokens; None if the step must be bound otherwise.

        The caches must be written in place: others need the list of outputs.
        """
        if ids.shape[1] != 1 or keep != 1 or self._device != "cpu" or not isinstance(bound.buffers, KVBuffers):
            return None
        arrays = bound.step
        if arrays is None or not arrays.fits(len(ids)):
            # A caller usually holds the last logits until it has the next ones.
            arrays = bound.spare if bound.spare is not None and bound.spare.fits(len(ids)) else None
            arrays = arrays or _StepArrays(len(ids), self.vocab_size)
            arrays.bind(bound.binding)
            bound.step, bound.spare = arrays, bound.step
        arrays.ids[:] = ids
        return arrays

    def _failure(self, error: Exception) -> SlmError:
        return SlmError(f"onnxruntime cannot run {self.bundle.model_path} ({first_line(error)})")

    def _bound_to(self, buffers: Caches, adapter: Adapter | None) -> _Bound:
        """Returns a binding of caches and adapter, reused while both are unchanged (saves 3 % of a 270M step)."""
        bound = self._bound
        if (
            bound is None
            or bound.buffers is not buffers
            or bound.growths != buffers.growths
            or bound.adapter is not adapter
        ):
            binding = self.session.io_binding()
            binding.bind_output(LOGITS)  # logits are bound first, so they are the first output
            buffers.bind(binding)
            for name, value in ({} if adapter is None else adapter.values).items():
                binding.bind_ortvalue_input(name, value)
            bound = self._bound = _Bound(buffers, buffers.growths, adapter, binding)
        return bound
