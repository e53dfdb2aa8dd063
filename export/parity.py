"""Numerical comparison of a bundle with its checkpoint in PyTorch.

The reference is the plain PyTorch model, without changes for export. The session uses the options that the runtime uses.
Both read the same tokens, beyond the window: in one step, in chunks, token by token, and as a ragged batch. The comparison
covers the logits at every position and the valid part of the caches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnxruntime as ort
import torch

from slm.core.contract import CACHE_SLACK, SIDES, CacheLayer
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Parity, Precision
from slm.core.nn import CausalLM, KVCache
from slm.core.nn.decoder import TorchDecoder
from slm.core.progress import Progress
from slm.export.graph import graph_tensors
from slm.runtime.backend import Decoder
from slm.runtime.cache import KVBuffers
from slm.runtime.decoder import Caches, OnnxDecoder, comparable_positions
from slm.runtime.memory import Array
from slm.runtime.session import RuntimeDevice
from slm.runtime.streaming import greedy

# The limit for two float32 implementations that sum in different orders, through 18 layers. Rounding errors scale with the
# values, so logits are compared in units of their standard deviation and caches in units of their largest value, if these
# exceed 1. Measured: 6e-6 with random weights at the 270M shape, and 4e-5 with Gemma's weights, whose logits for random
# tokens reach 131. There, PyTorch's own float32 differs from float64 by as much (docs/LOG.md).
TOLERANCE = 1e-4
# float16 has 11 significant bits: each layer rounds products, keys and values with a relative error of up to 1 / 2,048.
TOLERANCES: dict[Precision, float] = {"float32": TOLERANCE, "float16": 0.05}

_HINTS: dict[RuntimeDevice, str] = {
    "cpu": "the checkpoint's values may be too large for accurate float32; nothing was written",
    "cuda": "do not use the bundle on this GPU; slm verify --device cpu checks the graph itself, slm doctor the GPU",
}

GREEDY_PROMPT = 8
GREEDY_TOKENS = 32


def check_parity(
    bundle: Bundle,
    reference: CausalLM,
    progress: Progress,
    tolerance: float | None = None,
    device: RuntimeDevice = "cpu",
    optimize: bool = True,
) -> Parity:
    """Compares a bundle with a PyTorch model that has the same weights.

    Args:
        bundle: The bundle.
        reference: The PyTorch model.
        progress: Receives one advance for each arrangement of the tokens.
        tolerance: The largest accepted difference. The default is the tolerance of the bundle's precision.
        device: The device that runs the bundle.
        optimize: Whether onnxruntime optimizes the graph.

    Returns:
        The measured differences, all within the tolerance.

    Raises:
        SlmError: If a difference is above the tolerance, or the greedy tokens diverge at a position where the
            reference clearly prefers one of the two tokens.
    """
    tolerance = TOLERANCES[bundle.manifest.precision] if tolerance is None else tolerance
    comparison = _Comparison(bundle, OnnxDecoder(bundle, device, optimize=optimize), reference)
    arrangements: dict[str, Callable[[], _Difference]] = {
        "whole": lambda: comparison.in_chunks([comparison.length]),
        "chunks": lambda: comparison.in_chunks(comparison.chunks()),
        "steps": lambda: comparison.in_chunks(comparison.steps()),
        "batch": comparison.ragged_batch,
    }
    progress.start("compare with PyTorch", len(arrangements), "arrangements")
    found: dict[str, _Difference] = {}
    for name, run in arrangements.items():
        found[name] = run()
        progress.advance()
    progress.finish()
    _check(found, tolerance, device)
    greedy, gap = comparison.greedy()
    parity = Parity(
        reference="PyTorch float32",
        tokens=comparison.length,
        tolerance=tolerance,
        logits={name: difference.logits for name, difference in found.items()},
        caches={name: difference.caches for name, difference in found.items()},
        greedy_tokens_equal=greedy,
        runtime=f"onnxruntime {ort.__version__}",
    )
    if not gap <= 2 * tolerance:  # a smaller gap can change sign within the tolerance
        raise SlmError(
            f"the bundle does not match the checkpoint: greedy decoding diverges after {greedy} tokens, "
            f"where the two logits differ by {gap:.2g}",
            "the comparison of logits passed; a step with caches differs",
        )
    return parity


@dataclass(frozen=True)
class _Difference:
    logits: float
    caches: float


def _check(found: Mapping[str, _Difference], tolerance: float, device: RuntimeDevice) -> None:
    """Checks that every difference is within the tolerance.

    Raises:
        SlmError: If a difference is above the tolerance. The message names the difference, and the device unless it is
            the CPU.
    """
    where = "" if device == "cpu" else f" on {device.upper()}"
    for kind in ("logits", "caches"):
        for name, differences in found.items():
            difference = getattr(differences, kind)
            if not difference <= tolerance:  # NaN fails, too
                raise SlmError(
                    f"the bundle does not match the checkpoint{where}: {kind} differ by {difference:.2g} ({name}), "
                    f"limit {tolerance:.0e}",
                    _HINTS[device],
                )


class _Comparison:
    """The tokens, with the reference's logits at each position and caches at each length.

    With a large vocabulary, logits for all positions would take gigabytes. A long step is therefore compared at its last
    positions only. The chunks are short enough that every position is compared once.
    """

    def __init__(self, bundle: Bundle, decoder: OnnxDecoder, reference: CausalLM) -> None:
        self.decoder = decoder
        self.layers = bundle.manifest.cache
        self._stored = graph_tensors(bundle.model_path)
        self.reference = reference.eval()
        self.window = bundle.config.sliding_window
        self.length = min(3 * self.window, bundle.manifest.context)
        self.positions = comparable_positions(bundle.config.vocab_size)
        self.ids = np.random.default_rng(0).integers(0, bundle.config.vocab_size, (1, self.length))
        # The reference's cache keeps every position, so that it can be compared at any length.
        self.cache = KVCache(bundle.config)
        for layer in self.cache.layers:
            layer.window = None
        with torch.inference_mode():
            self.hidden = self.reference.model(torch.from_numpy(self.ids), cache=self.cache)
        self.unit = max(1.0, float(self.logits(slice(-min(self.positions, 64), None)).std()))

    def logits(self, positions: slice | list[int]) -> Array:
        """Returns the reference's logits (1, positions, V)."""
        with torch.inference_mode():
            array: Array = self.reference.lm_head(self.hidden[:, positions]).numpy()
        return array

    def difference(self, logits: Array, positions: slice | list[int]) -> float:
        """Returns the largest difference of logits (1, positions, V) from the reference's, in units of their deviation."""
        reference = self.logits(positions)
        if logits.shape != reference.shape:
            raise SlmError(
                f"the bundle does not match the checkpoint: logits are {logits.shape}, not {reference.shape}"
            )
        np.subtract(reference, logits, out=reference)
        return _largest(reference) / self.unit

    def chunks(self) -> list[int]:
        """Returns the sizes of chunks with borders just before, at and after the window."""
        borders = {0, self.window - 1, self.window, self.window + 1, self.window + CACHE_SLACK + 1, 2 * self.window + 7}
        borders = {border for border in borders if border < self.length} | {self.length}
        borders |= {*range(0, self.length, self.positions)}
        return [end - start for start, end in pairwise(sorted(borders))]

    def steps(self) -> list[int]:
        """Returns the sizes of a prompt shorter than the window, and of single tokens until the cache slides twice."""
        prompt = max(1, min(self.window - 2, self.length - 1))
        return [prompt] + [1] * min(2 * CACHE_SLACK + 6, self.length - prompt)

    def in_chunks(self, sizes: list[int]) -> _Difference:
        """Reads the tokens in steps of these sizes; compares the logits of each step and the caches at the end."""
        self.decoder.reset()
        worst, start = 0.0, 0
        for size in sizes:
            kept = min(size, self.positions)
            logits = self.decoder.step(self.ids[:, start : start + size], keep=kept)
            start += size
            worst = _larger(worst, self.difference(logits, slice(start - kept, start)))
        return _Difference(worst, self.caches(self.decoder.buffers, 0, start))

    def caches(self, buffers: Caches, row: int, length: int) -> float:
        """Returns the largest difference of one row's resident keys and values from the reference's at that length."""
        worst = 0.0
        for layer in self.layers:
            for side in SIDES:
                ours = buffers.resident(layer, side, length)[row]
                if layer.dtype == "int8":
                    ours = ours * self._stored[f"model.layers.{layer.layer}.self_attn.{side[0]}_scale"][0]
                ours = ours[:, -min(length, ours.shape[1]) :]  # positions before a row's beginning are padding
                theirs = self._reference(layer, side)[:, length - ours.shape[1] : length]
                worst = _larger(worst, _largest(ours - theirs) / max(1.0, float(np.abs(theirs).max())))
        return worst

    def _reference(self, layer: CacheLayer, side: str) -> Array:
        tensor = getattr(self.cache.layers[layer.layer], side)
        array: Array = tensor[0].numpy()
        return array

    def ragged_batch(self) -> _Difference:
        """Reads two prefixes of different lengths as a batch, then steps both rows together."""
        steps = min(3, self.length - 2)
        lengths = [self.length - steps, max(1, self.length // 2 - steps)]
        buffers = self.decoder.caches(batch=2)
        buffers.reserve(self.length)
        if isinstance(buffers, KVBuffers):
            worst, mask = self._read_rows(lengths, buffers)
        else:
            worst, mask = self._read_padded(lengths, buffers)
        for step in range(steps):
            ends = [length + step for length in lengths]
            if isinstance(buffers, KVBuffers):
                mask = (np.arange(max(ends) + 1) <= np.array(ends)[:, None]).astype(np.int64)
            else:
                mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            logits = self.decoder.run(self.ids[0, ends][:, None], mask, buffers, keep=1)
            worst = _larger(worst, self.difference(logits[None, :, 0], ends))
        caches = 0.0
        for row, length in enumerate(lengths):
            caches = _larger(caches, self.caches(buffers, row, length + steps))
        return _Difference(worst, caches)

    def _read_rows(self, lengths: list[int], buffers: KVBuffers) -> tuple[float, Array]:
        """Reads each prefix into its row. A windowed cache takes several tokens at a time for a single row only."""
        worst, mask = 0.0, np.ones((1, 0), np.int64)
        for row, length in enumerate(lengths):
            mask = np.ones((1, length), np.int64)
            logits = self.decoder.run(self.ids[:, :length], mask, buffers.row(row), keep=1)
            worst = _larger(worst, self.difference(logits, [length - 1]))
        return worst, mask

    def _read_padded(self, lengths: list[int], buffers: Caches) -> tuple[float, Array]:
        """Reads both prefixes in one step, the shorter one padded on the left, as transformers does."""
        ids = np.stack([np.pad(self.ids[0, :length], (max(lengths) - length, 0)) for length in lengths])
        mask = np.stack([np.arange(max(lengths)) >= max(lengths) - length for length in lengths]).astype(np.int64)
        logits = self.decoder.run(ids, mask, buffers, keep=1)
        return self.difference(logits[None, :, 0], [length - 1 for length in lengths]), mask

    def greedy(self) -> tuple[int, float]:
        """Returns the number of equal greedy tokens, and the reference's gap between the first two that differ."""
        count = min(GREEDY_TOKENS, self.length - GREEDY_PROMPT - 1)
        if count < 1:
            return 0, 0.0
        decoders: list[Decoder] = [self.decoder, TorchDecoder(self.reference)]
        prompt = self.ids[0, :GREEDY_PROMPT].tolist()
        ours, theirs = (greedy(decoder, prompt, count).tokens for decoder in decoders)
        equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), count)
        if equal == count:
            return equal, 0.0
        with torch.inference_mode():
            logits = self.reference(torch.tensor([prompt + theirs[:equal]]), num_logits_to_keep=1)[0, -1]
        return equal, float(logits[theirs[equal]] - logits[ours[equal]]) / self.unit


def _largest(difference: Array) -> float:
    return float(max(difference.max(), -difference.min()))


def _larger(a: float, b: float) -> float:
    """Returns the larger number, or NaN if either is NaN (`max` would lose it)."""
    return float(np.maximum(a, b))
