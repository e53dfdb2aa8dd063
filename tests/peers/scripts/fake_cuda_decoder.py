"""Takes a bundle through every kind of step on CUDA: `fake_cuda_decoder.py BUNDLE`, whose graph may be altered.

Prints one JSON object: what each step returned or raised. Marks each step on standard error, among the lines of
`tests/fake_cuda/device.c`. Logits are not looked at: nothing is computed.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slm.core.manifest import Bundle
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder

found: dict[str, Any] = {}


def step(name: str, function: Callable[[], Any]) -> None:
    print(f"step {name}", file=sys.stderr, flush=True)
    try:
        function()
        found[name] = "ok"
    except Exception as error:  # what is asserted is that there is none
        found[name] = f"{type(error).__name__}: {error}"[:500]


decoder = OnnxDecoder(Bundle.open(Path(sys.argv[1]), trust=True), "cuda", threads=1)
window = max(layer.window or 0 for layer in decoder.bundle.manifest.cache)
found["description"], found["caches"] = decoder.description, decoder.cache_device
step("prefill", lambda: decoder.read(list(range(10, 30))))
step("decode", lambda: decoder.read([5]))
step("chunk", lambda: decoder.read(list(range(10, 40))))
step("each", lambda: decoder.read_each([1, 2, 3, 4]))
step("across the window", lambda: decoder.read([7] * (window + 16)))
step("decode past the window", lambda: decoder.read([5]))
snapshot = decoder.snapshot()
step("restore", lambda: decoder.restore(snapshot))
step("rewind", lambda: decoder.rewind(decoder.length - 1))
step("ragged batch", lambda: decoder.logits(np.ones((3, 70), np.int64)))
batch = Batch(decoder, 3)
slots = [batch.take() for _ in range(3)]
for number, slot in enumerate(slots):
    step(f"slot {number}", lambda slot=slot, number=number: slot.read(list(range(5, 15 + 10 * number))))  # type: ignore[misc]
step("batch of 3", lambda: batch.step(dict.fromkeys(slots, 7)))
batch.release(slots[0])
step("batch of 2", lambda: batch.step(dict.fromkeys(slots[1:], 7)))
print(json.dumps(found))
