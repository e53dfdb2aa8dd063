"""Reads a prompt and further tokens with each bundle, on the CPU that runs this: `answer.py PLAN.json OUT.npz`.

Needs the edge installation of slm only. The plan names the bundles, the prompt and, for each bundle, the further tokens.
Without them, the first bundle takes the most likely token each time, and the others read the same tokens. The result has the
logits (positions, vocabulary) of each bundle.
"""

import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from slm.core.machine import instruction_sets
from slm.core.manifest import Bundle
from slm.runtime import products, session
from slm.runtime.decoder import OnnxDecoder


def logits(path: Path, prompt: list[int], further: list[int] | None, count: int) -> tuple[np.ndarray, list[int]]:
    """Returns the logits of the prompt, in one step, and of further tokens, one at a time, and these tokens."""
    bundle = Bundle.open(path)
    decoder = OnnxDecoder(bundle, threads=1)
    found = [decoder.logits(np.array([prompt]))[0]]
    last = np.asarray(decoder.read(prompt))
    tokens: list[int] = []
    for i in range(count):
        tokens.append(int(last.argmax()) if further is None else further[i])
        last = np.asarray(decoder.read(tokens[-1:]))
        found.append(last.reshape(1, -1))
    return np.concatenate(found), tokens


def main(plan: Path, out: Path) -> None:
    """Follows a plan."""
    asked = json.loads(plan.read_text())
    session.use_huge_pages = lambda: None  # what the host has
    arrays, tokens = {}, {}
    for name in asked["bundles"]:
        path, known = Path(asked["home"]) / name.removesuffix(" as stored"), next(iter(tokens.values()), None)
        further = asked["further"].get(name, known)
        with_file = name.endswith(" as stored")
        session.saturates = (lambda bundle: False) if with_file else products.saturates
        arrays[name], tokens[name] = logits(path, asked["prompt"], further, asked["count"])
    about = {
        "machine": platform.machine(),
        "instruction_sets": [name for name, has in instruction_sets().items() if has],
        "products_saturate": products.products_saturate(),
        "onnxruntime": ort.__version__,
        "tokens": tokens,
        "processor_seconds": os.times().user,
    }
    np.savez(out, about=np.array(json.dumps(about)), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
