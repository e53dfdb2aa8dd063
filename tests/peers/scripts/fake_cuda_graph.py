"""Takes single-token steps on CUDA, as CUDA graphs or not: `fake_cuda_graph.py BUNDLE yes|no`, whose graph may be altered.

Prints one JSON object: what the decoder calls itself, or the error. Marks each step on standard error.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder


def step(name: str, function: Callable[[], object]) -> None:
    print(f"step {name}", file=sys.stderr, flush=True)
    function()


try:
    bundle = Bundle.open(Path(sys.argv[1]), trust=True)
    decoder = OnnxDecoder(bundle, "cuda", threads=1, cuda_graph=sys.argv[2] == "yes")
except SlmError as error:
    print(json.dumps({"error": error.message}))
    sys.exit()
step("prefill", lambda: decoder.read(list(range(10, 30))))
for number in range(1, 4):
    step(f"token {number}", lambda: decoder.read([5]))
step("chunk", lambda: decoder.read([5, 6, 7]))
step("token after the chunk", lambda: decoder.read([5]))
step("reset", decoder.reset)
step("prefill after the reset", lambda: decoder.read(list(range(10, 40))))
step("token after the reset", lambda: decoder.read([5]))
batch = Batch(decoder, 2)
slots = [batch.take() for _ in range(2)]
for slot in slots:
    step("slot", lambda slot=slot: slot.read(list(range(5, 15))))  # type: ignore[misc]
for number in range(1, 3):
    step(f"batch {number}", lambda: batch.step(dict.fromkeys(slots, 7)))
print(json.dumps({"description": decoder.description}))
