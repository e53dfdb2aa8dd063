"""Takes a bundle through every kind of step and keeps the logits: `steps.py BUNDLE DEVICE OUT.npz [graph]`.

PyTorch is never imported here: it would load CUDA's libraries, and hide that onnxruntime does not find them by itself.

The file has `TEXT` (T,) for each text that was read, and for each kind of step `KIND/text`, its text's name,
`KIND/positions` (N,), and `KIND/logits` (N, V), those after each of these positions of the text. Prints one JSON object.

Dimensions: N compared positions, T positions, V vocabulary.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.manifest import Bundle
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.speculative import SpeculativeDecoder

Array = NDArray[Any]
_DRAFTS = 6


class Steps:
    """A decoder, the texts that it reads, and the logits that it gave."""

    def __init__(self, decoder: OnnxDecoder) -> None:
        self.decoder = decoder
        self.window = min(layer.window for layer in decoder.bundle.manifest.cache if layer.window is not None)
        rng = np.random.default_rng(0)
        length = 2 * self.window + 24
        pattern = rng.integers(5, decoder.vocab_size, 7)
        self.texts = {
            "plain": rng.integers(0, decoder.vocab_size, length),
            "repeating": np.tile(pattern, self.window)[: self.window - 8],
        }
        self.found: dict[str, tuple[str, list[int], list[Array]]] = {}
        self.drafted = self.accepted = 0

    def keep(self, kind: str, positions: Sequence[int], logits: Array, text: str = "plain") -> None:
        """Keeps logits (N, V) that follow some positions of a text."""
        _, places, rows = self.found.setdefault(kind, (text, [], []))
        places += positions
        rows += list(logits)

    def read(self, start: int, stop: int, text: str = "plain") -> Array:
        """Reads part of a text; returns the logits (1, V) after it."""
        row: Array = self.decoder.read(self.texts[text][start:stop].tolist())[None]
        return row

    def prefill(self) -> None:
        """A text in one go, and as a complete row."""
        length, window = len(self.texts["plain"]), self.window
        for stop in (3, window - 1, window, window + 1, length):
            self.decoder.reset()
            self.keep("prefill", [stop - 1], self.read(0, stop))
        logits = self.decoder.logits(self.texts["plain"][None])[0]
        self.keep("all positions", range(length), logits)

    def chunk(self) -> None:
        """Several tokens after a past."""
        self.decoder.reset()
        start = self.window // 2
        self.read(0, start)
        logits = self.decoder.read_each(self.texts["plain"][start : start + 12].tolist())
        self.keep("chunk with a past", range(start, start + 12), logits)

    def across(self) -> None:
        """Single tokens and chunks on both sides of the window."""
        self.decoder.reset()
        start = self.window - 4
        self.read(0, start)
        for position in range(start, start + 9):
            self.keep("across the window", [position], self.read(position, position + 1))
        position = start + 9
        self.keep("across the window", [position + 11], self.read(position, position + 12))
        end = len(self.texts["plain"])
        self.keep("across the window", [end - 1], self.read(position + 12, end))

    def batch(self) -> None:
        """Rows of several lengths, which take their steps together; then fewer rows."""
        text = self.texts["plain"]
        batch = Batch(self.decoder, 3)
        lengths = {batch.take(): length for length in (5, self.window - 2, self.window + 9)}
        for slot, length in lengths.items():
            self.keep("ragged batch", [length - 1], slot.read(text[:length].tolist())[None])
        for step in range(5):
            if step == 4:
                first = next(iter(lengths))
                batch.release(first)
                del lengths[first]
            found = batch.step({slot: int(text[length + step]) for slot, length in lengths.items()})
            for slot, logits in found.items():
                self.keep("ragged batch", [lengths[slot] + step], logits[None])

    def rewind(self) -> None:
        """Other tokens, which are forgotten again."""
        self.decoder.reset()
        stop = self.window - 6
        self.read(0, stop)
        self.decoder.read_each(self.texts["plain"][:4].tolist())
        self.decoder.rewind(stop)
        self.keep("rewind", [stop], self.read(stop, stop + 1))
        self.decoder.rewind(3)
        self.keep("rewind", [stop + 1], self.read(3, stop + 2))

    def snapshot(self) -> None:
        """Snapshots before and after the window, restored after other tokens."""
        for stop in (self.window // 2, self.window + 5):
            self.decoder.reset()
            self.read(0, stop)
            snapshot = self.decoder.snapshot()
            self.read(0, 9)
            self.decoder.restore(snapshot)
            self.keep("snapshot", [stop], self.read(stop, stop + 1))

    def drafts(self) -> None:
        """A text that repeats, read token by token with drafts."""
        text = self.texts["repeating"]
        self.decoder.reset()
        drafting = SpeculativeDecoder(self.decoder, _DRAFTS)
        drafting.read(text[:15].tolist())
        for position in range(15, len(text)):
            self.keep("drafts", [position], drafting.read([int(text[position])])[None], "repeating")
        self.drafted, self.accepted = drafting.drafted, drafting.accepted

    def take(self) -> None:
        """Takes every kind of step; says on standard error which, for whoever reads a device's log beside it."""
        kinds: list[Callable[[], None]] = [
            self.prefill, self.chunk, self.across, self.batch, self.rewind, self.snapshot, self.drafts
        ]  # fmt: skip
        for kind in kinds:
            print(f"step {kind.__name__}", file=sys.stderr, flush=True)
            kind()


def main(bundle: str, device: str, out: str, graph: str = "") -> None:
    """Takes the steps and writes the file; with "graph" single-token steps are recorded as CUDA graphs."""
    options: dict[str, Any] = {"cuda_graph": True} if graph else {}
    decoder = OnnxDecoder(Bundle.open(Path(bundle)), device, **options)  # type: ignore[arg-type]  # "cpu" or "cuda"
    steps = Steps(decoder)
    steps.take()
    arrays: dict[str, Any] = dict(steps.texts)
    for kind, (text, positions, rows) in steps.found.items():
        arrays |= {f"{kind}/text": text, f"{kind}/positions": positions, f"{kind}/logits": np.stack(rows)}
    np.savez(out, **arrays)
    about = {
        "description": decoder.description,
        "caches": decoder.cache_device,
        "drafted": steps.drafted,
        "accepted": steps.accepted,
        "torch": "torch" in sys.modules,
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main(*sys.argv[1:])
