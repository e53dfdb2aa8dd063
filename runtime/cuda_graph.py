"""Records single-token steps as CUDA graphs: the GPU replays a step's kernel launches without the host.

Dimensions: B batch, L longest sequence that the buffers have room for, V vocabulary.

A graph stores the addresses and host-side numbers of its recording. A recorded step therefore reads its tokens and its
mask from fixed buffers on the GPU, and writes its logits to another. The mask always has L columns, zeros at the end, and
each row's length is its sum, computed on the GPU. GroupQueryAttention reads lengths and positions from these sums
(`GetSequenceLengths` in onnxruntime's group_query_attention_impl.cu). The host-side number L determines only the size of the
scratch memory and whether there is a past.

onnxruntime records a step at its first run: one call runs the step twice as usual, records it and replays it. Global layers
write the same key and value to the same position each time. Sliding layers move up each time, so their buffers are restored
afterwards, and the step is replayed once more.
"""

import threading
from weakref import ref

import numpy as np
import onnxruntime as ort

from slm.core.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime.cache import KVBuffers
from slm.runtime.memory import Array, Located

# Flash, memory-efficient or unfused attention (onnxruntime's AttentionBackend), all of which read lengths on the GPU. cuDNN
# attention, which onnxruntime prefers from compute capability 9.0 on, is untested in graphs.
_ATTENTION = 1 | 2 | 16
CUDA_OPTIONS = {"enable_cuda_graph": "1", "sdpa_kernel": str(_ATTENTION)}
# The run option that selects a graph, and the value that selects none.
_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"
# The most recorded arrangements of buffers: one for each number of rows and each length that buffers grow to. onnxruntime
# keeps every graph until the session ends; further arrangements run without graphs.
_MOST_GRAPHS = 64
# A single token without a past uses another kernel, which a graph with a past does not contain.
_SHORTEST = 2


def check_bundle(bundle: Bundle) -> None:
    """Checks that the steps of a bundle can be recorded.

    Raises:
        SlmError: If some of its nodes would run on the CPU.
    """
    if bundle.manifest.device != "cuda":
        raise SlmError(
            f"{bundle.path} was exported for {bundle.manifest.device}: CUDA graphs need a bundle whose nodes all run on CUDA",
            "use a bundle from slm export --onnx --device cuda, or omit CUDA graphs",
        )


def without_graph(options: ort.RunOptions) -> ort.RunOptions:
    """Makes runs with these options run without graphs. Returns the options."""
    options.add_run_config_entry(_GRAPH, _NO_GRAPH)
    return options


class StepGraphs:
    """The recorded steps of a session.

    onnxruntime keeps graphs by thread, so each thread that runs steps records its own.
    """

    def __init__(self, session: ort.InferenceSession, vocab_size: int) -> None:
        self._session = session
        self._vocab_size = vocab_size
        self._of_thread = _Recorded()

    def step_of(self, buffers: object, ids: Array, mask: Array) -> "RecordedStep | None":
        """Returns the recorded step that reads these tokens; None if they must be read without a graph.

        Args:
            buffers: The caches.
            ids: Tokens (B, T).
            mask: (B, past + T), padded on the right.
        """
        if not isinstance(buffers, KVBuffers) or ids.shape[1] != 1 or int(mask.sum(axis=1).min()) < _SHORTEST:
            return None
        mine = self._of_thread
        if mine.last is not None and mine.last[0]() is buffers and mine.last[1] == buffers.growths:
            return mine.last[2]
        # Addresses identify buffers: the same launches read and write any later buffers at the same addresses.
        key = buffers.located
        if key not in mine.steps:
            if len(mine.steps) == _MOST_GRAPHS:
                return None
            number = len(mine.steps) + 1
            mine.steps[key] = RecordedStep(self._session, number, buffers, ids.shape[0], self._vocab_size)
        mine.last = (ref(buffers), buffers.growths, mine.steps[key])
        return mine.steps[key]


class _Recorded(threading.local):
    """The recorded steps of one thread.

    Attributes:
        steps: By the addresses and shapes of the caches.
        last: The buffers of the last step, their number of growths, and the step.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[Located, ...], RecordedStep] = {}
        self.last: tuple[ref[KVBuffers], int, RecordedStep] | None = None


class RecordedStep:
    """One single-token step on one arrangement of buffers."""

    def __init__(
        self, session: ort.InferenceSession, number: int, buffers: KVBuffers, batch: int, vocab_size: int
    ) -> None:
        """Binds all inputs and outputs of the step.

        Args:
            session: The graph.
            number: onnxruntime's identifier of the recorded step in this thread.
            buffers: The caches.
            batch: Rows.
            vocab_size: The number of logits.
        """
        self._session = session
        self._mask = np.zeros((batch, buffers.room), np.int64)
        self._inputs = {INPUT_IDS: _on_gpu((batch, 1), np.int64), ATTENTION_MASK: _on_gpu(self._mask.shape, np.int64)}
        self._logits = _on_gpu((batch, 1, vocab_size), np.float32)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_output(LOGITS, self._logits)
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        # For a single token, the logits of all positions are those of the last position.
        self._binding.bind_ortvalue_input(LOGITS_TO_KEEP, ort.OrtValue.ortvalue_from_numpy(np.array(1, np.int64)))
        buffers.bind(self._binding)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(_GRAPH, str(number))
        self._recorded = False

    def run(self, buffers: KVBuffers, ids: Array, mask: Array) -> Array:
        """Reads tokens (B, 1), with a mask (B, past + 1) padded on the right, and returns the logits (B, 1, V).

        Args:
            buffers: The caches, at the addresses that the step was recorded with. No reference is kept, so that they can be
                freed.
            ids: The tokens.
            mask: The mask.
        """
        self._mask[:, : mask.shape[1]] = mask
        self._mask[:, mask.shape[1] :] = 0
        self._inputs[INPUT_IDS].update_inplace(np.ascontiguousarray(ids, np.int64))
        self._inputs[ATTENTION_MASK].update_inplace(self._mask)
        if not self._recorded:
            held = buffers.copy_sliding()
            self._session.run_with_iobinding(self._binding, self._options)
            buffers.put_sliding(held)
            self._recorded = True
        self._session.run_with_iobinding(self._binding, self._options)
        logits: Array = self._logits.numpy()
        return logits


def _on_gpu(shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
