"""Runs one step of a tiny model on one of onnxruntime's providers and compares it with NumPy, for `slm doctor`.

Opening a session proves little: kernels for the GPU may be missing, and a driver may fail at the first launch. The model
consists of matrix products and `GroupQueryAttention`, like slm's bundles, with head dims of 64 and 256. On CUDA it is
float16, and no node may run elsewhere; on other providers it is float32. On the CPU, the bundled demo model also runs a step.

Dimensions: T positions, D hidden, N query heads on one key head, H head dim.
"""

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core import graph_encoding
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.session import CPU, CUDA, CUDA_OPTIONS, first_line, load_cuda_libraries, session_options
from slm.runtime.shipped import model_path

Array = NDArray[Any]

HEAD_DIMS = (64, 256)
_POSITIONS, _HIDDEN, _HEADS = 5, 64, 2
_SCALE = 0.25
# The tolerance of products of 64 numbers near 1, rounded to float16 three times.
_TOLERANCE = 0.03


def try_provider(provider: str) -> dict[str, Any]:
    """Opens the model with a provider and runs one step of it.

    Returns:
        `available` and `loaded`, the providers of onnxruntime and of the session; `ran`, whether the step matched the
        reference; `error`, the reason if it did not, otherwise None.
    """
    load_cuda_libraries()
    kind = np.dtype(np.float16 if provider == CUDA else np.float32)
    options = session_options(1)
    if provider == CUDA:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    found: dict[str, Any] = {"available": ort.get_available_providers(), "loaded": [], "ran": False, "error": None}
    providers: list[Any] = [(CUDA, CUDA_OPTIONS)] if provider == CUDA else list(dict.fromkeys([provider, CPU]))
    try:
        if provider == CPU:
            _try_shipped()
        session = ort.InferenceSession(tiny_model(kind), options, providers=providers, enable_fallback=0)
        found["loaded"] = session.get_providers()
        if provider in found["loaded"]:
            off = _difference(session, kind)
            found["ran"] = off <= _TOLERANCE
            found["error"] = None if found["ran"] else f"one step differs from the reference by {off:.2g}"
    except Exception as error:  # onnxruntime's exceptions share no narrower base class
        found["error"] = first_line(error)
    return found


def tiny_model(kind: "np.dtype[Any]") -> bytes:
    """Returns the model's file: `hidden` (1, T, D) to `attended_H` (1, T, N * H) for each head dim."""
    nodes, weights, outputs = [], [], []
    for size in HEAD_DIMS:
        for part, weight in zip("qkv", _weights(size), strict=True):
            weights.append(graph_encoding.tensor(f"{part}_{size}", weight.astype(kind)))
            nodes.append(graph_encoding.node("MatMul", ["hidden", f"{part}_{size}"], [f"{part}{size}"]))
        inputs = [*(f"{part}{size}" for part in "qkv"), "", "", "last_index", "total"]
        attributes = {"num_heads": _HEADS, "kv_num_heads": 1, "scale": _SCALE}
        made = [f"attended_{size}", f"key_{size}", f"value_{size}"]
        nodes.append(graph_encoding.node("GroupQueryAttention", inputs, made, "com.microsoft", attributes))
        outputs.append(graph_encoding.value(made[0], kind, (1, _POSITIONS, _HEADS * size)))
    taken = [
        graph_encoding.value("hidden", kind, (1, _POSITIONS, _HIDDEN)),
        graph_encoding.value("last_index", np.int32, (1,)),
        graph_encoding.value("total", np.int32, ()),
    ]
    return graph_encoding.model("trial", nodes, weights, taken, outputs, {"": 21, "com.microsoft": 1})


def _try_shipped() -> None:
    """Runs a step of the bundled demo model.

    Raises:
        SlmError: If the model is damaged or cannot run, or its logits are not finite.
    """
    logits = OnnxDecoder(Bundle.open(model_path()), threads=1).read([0, 1, 2])
    if not np.isfinite(logits).all():
        raise SlmError("the bundled demo model returned logits that are not finite")


def _difference(session: ort.InferenceSession, kind: "np.dtype[Any]") -> float:
    """Returns the largest difference between a step and NumPy's result; infinity if a result is not finite."""
    hidden = _random(0, (1, _POSITIONS, _HIDDEN))
    feeds = {
        "hidden": hidden.astype(kind),
        "last_index": np.array([_POSITIONS - 1], np.int32),
        "total": np.array(_POSITIONS, np.int32),
    }
    worst = 0.0
    for size, found in zip(HEAD_DIMS, session.run(None, feeds), strict=True):
        off = float(np.abs(found.astype(np.float32) - _attended(hidden[0], size)).max())
        worst = max(worst, off if np.isfinite(off) else np.inf)
    return worst


def _attended(hidden: Array, size: int) -> Array:
    """Returns causal attention (1, T, N * H) of hidden states (T, D), in float32."""
    q, k, v = (hidden @ weight for weight in _weights(size))
    q = q.reshape(_POSITIONS, _HEADS, size).swapaxes(0, 1)  # (N, T, H)
    scores = np.where(np.tri(_POSITIONS, dtype=bool), _SCALE * (q @ k.T), -np.inf)  # (N, T, T)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended: Array = (shares / shares.sum(axis=-1, keepdims=True)) @ v
    return attended.swapaxes(0, 1).reshape(1, _POSITIONS, _HEADS * size)


def _weights(size: int) -> list[Array]:
    """Returns the products of queries (D, N * H), keys and values (D, H)."""
    return [_random(seed, (_HIDDEN, width)) / 8 for seed, width in ((1, _HEADS * size), (2, size), (3, size))]


def _random(seed: int, shape: tuple[int, ...]) -> Array:
    """Returns random numbers that float16 represents exactly."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return numbers.astype(np.float16).astype(np.float32)
