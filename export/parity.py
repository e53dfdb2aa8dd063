"""The proof that a bundle computes what its checkpoint computes: the only place of export that needs PyTorch.

The reference is the plain model, not one prepared for export, and the session is the one that ships. The same tokens go
through both past the window, in one go, in chunks, step by step and as a ragged batch; logits at every position and the
cached positions that matter are compared.
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
from slm.runtime.session import Device
from slm.runtime.streaming import greedy

# Two float32 implementations that add in another order, through 18 layers. Rounding grows with the numbers: logits are
# compared in units of their standard deviation, caches in units of their largest value, where those pass 1. Measured
# 6e-6 with random weights at the 270M shape and 4e-5 with Gemma's own, whose logits for random tokens reach 131; there
# PyTorch's float32 is as far from float64 (docs/LOG.md).
TOLERANCE = 1e-4
# float16 has 11 bits: products, keys and values are rounded to 1 / 2,048 of themselves in every layer.
TOLERANCES: dict[Precision, float] = {"float32": TOLERANCE, "float16": 0.05}

_HINTS: dict[Device, str] = {
    "cpu": "the checkpoint's values may be out of float32's comfortable range; nothing was written",
    "cuda": "do not use the bundle on this GPU; slm verify --device cpu checks the graph itself, slm doctor the GPU",
}

GREEDY_PROMPT = 8
GREEDY_TOKENS = 32


def check_parity(
    bundle: Bundle,
    reference: CausalLM,
    progress: Progress,
    tolerance: float | None = None,
    device: Device = "cpu",
    optimize: bool = True,
) -> Parity:
    """Compares a bundle with a model that has its weights.

    Args:
        bundle: The bundle.
        reference: The model.
        progress: Told of each arrangement.
        tolerance: The largest difference allowed; by default that of the bundle's precision.
        device: Where the bundle is run.
        optimize: Whether onnxruntime may change the graph.

    Returns:
        The differences found, all within the tolerance.

    Raises:
        SlmError: When one is larger, or greedy texts part where the reference sees a clear difference.
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
    if not gap <= 2 * tolerance:  # nearer than that, either of two tokens may come out the likelier
        raise SlmError(
            f"the bundle is not the checkpoint: greedy tokens part after {greedy}, where their logits differ by {gap:.2g}",
            "the comparison of logits passed; a step with caches differs",
        )
    return parity


@dataclass(frozen=True)
class _Difference:
    logits: float
    caches: float


def _check(found: Mapping[str, _Difference], tolerance: float, device: Device) -> None:
    """Makes sure that differences are within the tolerance.

    Raises:
        SlmError: When one is not; it says which, and on which device where that is not the CPU.
    """
    where = "" if device == "cpu" else f" on {device.upper()}"
    for kind in ("logits", "caches"):
        for name, differences in found.items():
            difference = getattr(differences, kind)
            if not difference <= tolerance:  # NaN fails too
                raise SlmError(
                    f"the bundle is not the checkpoint{where}: {kind} differ by {difference:.2g} ({name}), "
                    f"allowed {tolerance:.0e}",
                    _HINTS[device],
                )


class _Comparison:
    """The tokens, and what PyTorch makes of them: at any position the logits, at any length the caches.

    Logits of the whole text would take gigabytes with a large vocabulary. Of a long step the last positions are compared,
    as many as fit; the chunks are short enough to have every position compared once.
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
        # The reference keeps every position, so that any arrangement can be compared with it.
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
        """Compares logits (1, positions, V) with the reference's."""
        reference = self.logits(positions)
        if logits.shape != reference.shape:
            raise SlmError(f"the bundle is not the checkpoint: logits are {logits.shape}, not {reference.shape}")
        np.subtract(reference, logits, out=reference)
        return _largest(reference) / self.unit

    def chunks(self) -> list[int]:
        """Chunks whose borders lie on both sides of the window."""
        borders = {0, self.window - 1, self.window, self.window + 1, self.window + CACHE_SLACK + 1, 2 * self.window + 7}
        borders = {border for border in borders if border < self.length} | {self.length}
        borders |= {*range(0, self.length, self.positions)}
        return [end - start for start, end in pairwise(sorted(borders))]

    def steps(self) -> list[int]:
        """A prompt that ends before the window is full, then one token at a time until its cache moved up twice."""
        prompt = max(1, min(self.window - 2, self.length - 1))
        return [prompt] + [1] * min(2 * CACHE_SLACK + 6, self.length - prompt)

    def in_chunks(self, sizes: list[int]) -> _Difference:
        """Compares logits at every position and the caches at the end."""
        self.decoder.reset()
        worst, start = 0.0, 0
        for size in sizes:
            kept = min(size, self.positions)
            logits = self.decoder.step(self.ids[:, start : start + size], keep=kept)
            start += size
            worst = _larger(worst, self.difference(logits, slice(start - kept, start)))
        return _Difference(worst, self.caches(self.decoder.buffers, 0, start))

    def caches(self, buffers: Caches, row: int, length: int) -> float:
        """Compares one row's resident positions with the reference's at that length."""
        worst = 0.0
        for layer in self.layers:
            for side in SIDES:
                ours = buffers.resident(layer, side, length)[row]
                if layer.dtype == "int8":
                    ours = ours * self._stored[f"model.layers.{layer.layer}.self_attn.{side[0]}_scale"][0]
                ours = ours[:, -min(length, ours.shape[1]) :]  # what is before a row's beginning is padding
                theirs = self._reference(layer, side)[:, length - ours.shape[1] : length]
                worst = _larger(worst, _largest(ours - theirs) / max(1.0, float(np.abs(theirs).max())))
        return worst

    def _reference(self, layer: CacheLayer, side: str) -> Array:
        tensor = getattr(self.cache.layers[layer.layer], side)
        array: Array = tensor[0].numpy()
        return array

    def ragged_batch(self) -> _Difference:
        """Two beginnings of the tokens, of different lengths, then steps of both together."""
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
        """Reads each beginning into its row: a windowed cache takes several tokens of one row at a time."""
        worst, mask = 0.0, np.ones((1, 0), np.int64)
        for row, length in enumerate(lengths):
            mask = np.ones((1, length), np.int64)
            logits = self.decoder.run(self.ids[:, :length], mask, buffers.row(row), keep=1)
            worst = _larger(worst, self.difference(logits, [length - 1]))
        return worst, mask

    def _read_padded(self, lengths: list[int], buffers: Caches) -> tuple[float, Array]:
        """Reads both at once, the shorter one padded on the left, as other people's tools do it."""
        ids = np.stack([np.pad(self.ids[0, :length], (max(lengths) - length, 0)) for length in lengths])
        mask = np.stack([np.arange(max(lengths)) >= max(lengths) - length for length in lengths]).astype(np.int64)
        logits = self.decoder.run(ids, mask, buffers, keep=1)
        return self.difference(logits[None, :, 0], [length - 1 for length in lengths]), mask

    def greedy(self) -> tuple[int, float]:
        """Returns how many greedy tokens both choose alike, and how far apart the reference sees the first that differ."""
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
    """Returns the larger; NaN where either is, so that it cannot be lost."""
    return float(np.maximum(a, b))
