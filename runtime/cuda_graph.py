"""Single-token steps recorded as CUDA graphs: the GPU replays a step's launches without the host.

Dimensions: B batch, L longest sequence that the buffers have room for, V vocabulary.

A graph holds addresses and numbers of the host as they were when it was recorded. So a recorded step reads its tokens and its
mask from fixed buffers on the GPU, and writes its logits to another. The mask always has L columns, zeros at the end, and each
row's length is its sum, computed on the GPU. GroupQueryAttention reads lengths and positions from these sums
(`GetSequenceLengths` in onnxruntime's group_query_attention_impl.cu). The number that it reads on the host, L, only says how
much scratch memory to take and whether there is a past.

onnxruntime records a step when it runs for the first time: it runs it twice as usual, records it and replays it, all in one
call. Global layers write the same key and value to the same position each time. Sliding layers move up each time, so what they
held is put back afterwards, and the step is replayed once more.
"""

import threading

import numpy as np
import onnxruntime as ort

from slm.core.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime.cache import KVBuffers
from slm.runtime.memory import Array, Located

# What onnxruntime asks for: cuDNN's attention takes memory of its own, which a graph must not.
CUDA_OPTIONS = {"enable_cuda_graph": "1", "sdpa_kernel": str(1 | 2 | 16)}  # flash, memory-efficient, or plain products
# The option of a run that names its graph, and the name that stands for none.
_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"
# Arrangements of buffers that are recorded: one for each number of rows and each length that buffers grow to. onnxruntime
# keeps each graph until the session ends; steps of further ones run as usual.
_MOST_GRAPHS = 64
# A single token without a past takes another kernel, which a graph with a past does not hold.
_SHORTEST = 2


def check_bundle(bundle: Bundle) -> None:
    """Checks that a bundle's steps can be recorded.

    Raises:
        SlmError: When some of its nodes would run on the CPU.
    """
    if bundle.manifest.device != "cuda":
        raise SlmError(
            f"{bundle.path} was exported for {bundle.manifest.device}: CUDA graphs need a bundle whose nodes all run on CUDA",
            "slm export --onnx --device cuda, or leave CUDA graphs out",
        )


def without_graph(options: ort.RunOptions) -> ort.RunOptions:
    """Makes runs with these options run as usual; returns the options."""
    options.add_run_config_entry(_GRAPH, _NO_GRAPH)
    return options


class StepGraphs:
    """The recorded steps of a session.

    onnxruntime keeps graphs by thread, so each thread that runs steps records its own.
    """

    def __init__(self, session: ort.InferenceSession, vocab_size: int) -> None:
        self._session = session
        self._vocab_size = vocab_size
        self._of_thread = threading.local()

    def step_of(self, buffers: object, ids: Array, mask: Array, keep: int) -> "RecordedStep | None":
        """Returns the step that reads these tokens from a graph; None if they are to be read without one.

        Args:
            buffers: The caches.
            ids: Tokens (B, T).
            mask: (B, past + T), padded on the right.
            keep: Positions of which logits are wanted; 0 for all.
        """
        if not isinstance(buffers, KVBuffers) or ids.shape[1] != 1 or int(mask.sum(axis=1).min()) < _SHORTEST:
            return None
        steps: dict[tuple[Located, ...], RecordedStep] = self._of_thread.__dict__.setdefault("steps", {})
        key = buffers.located
        if key not in steps:
            if len(steps) == _MOST_GRAPHS:
                return None
            steps[key] = RecordedStep(self._session, len(steps) + 1, buffers, ids.shape[0], self._vocab_size)
        return steps[key]


class RecordedStep:
    """One single-token step on one arrangement of buffers."""

    def __init__(
        self, session: ort.InferenceSession, number: int, buffers: KVBuffers, batch: int, vocab_size: int
    ) -> None:
        """Binds everything that the step reads and writes.

        Args:
            session: The graph.
            number: What onnxruntime calls the recorded step by, of this thread.
            buffers: The caches.
            batch: Rows.
            vocab_size: How many logits there are.
        """
        self._session = session
        self._buffers = buffers
        self._mask = np.zeros((batch, buffers.room), np.int64)
        self._inputs = {INPUT_IDS: _on_gpu((batch, 1), np.int64), ATTENTION_MASK: _on_gpu(self._mask.shape, np.int64)}
        self._logits = _on_gpu((batch, 1, vocab_size), np.float32)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_output(LOGITS, self._logits)
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        # Of a single token all logits are those of the last one.
        self._binding.bind_ortvalue_input(LOGITS_TO_KEEP, ort.OrtValue.ortvalue_from_numpy(np.array(1, np.int64)))
        buffers.bind(self._binding)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(_GRAPH, str(number))
        self._recorded = False

    def run(self, ids: Array, mask: Array) -> Array:
        """Reads tokens (B, 1), with a mask (B, past + 1) padded on the right; returns the logits (B, 1, V)."""
        self._mask[:, : mask.shape[1]] = mask
        self._mask[:, mask.shape[1] :] = 0
        self._inputs[INPUT_IDS].update_inplace(np.ascontiguousarray(ids, np.int64))
        self._inputs[ATTENTION_MASK].update_inplace(self._mask)
        if not self._recorded:
            held = self._buffers.copy_sliding()
            self._session.run_with_iobinding(self._binding, self._options)
            self._buffers.put_sliding(held)
            self._recorded = True
        self._session.run_with_iobinding(self._binding, self._options)
        logits: Array = self._logits.numpy()
        return logits


def _on_gpu(shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
