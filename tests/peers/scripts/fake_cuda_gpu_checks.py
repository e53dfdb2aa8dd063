"""Takes the steps of `make test-gpu` in front of the fake CUDA: `fake_cuda_gpu_checks.py BUNDLE`.

Twice, each in a process of its own: with flash attention and without. Marks each on standard error, among the lines of
`tests/fake_cuda/device.c`. Logits are not looked at: nothing is computed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

STEPS = Path(__file__).parents[2] / "gpu"


def take(bundle: str) -> None:
    """Takes the steps with onnxruntime's settings as they are in the environment."""
    sys.path.insert(0, str(STEPS))
    import steps
    from slm.runtime.decoder import OnnxDecoder

    run = OnnxDecoder.run

    def shaped(self: Any, ids: Any, mask: Any, buffers: Any, keep: int, *rest: Any) -> Any:
        logits = run(self, ids, mask, buffers, keep, *rest)
        # Where the number of logits to keep is computed on the device, it is 0 here.
        return logits if logits.size else np.zeros((len(ids), keep or ids.shape[1], self.vocab_size), np.float32)

    OnnxDecoder.run = shaped  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "steps.npz"
        steps.main(bundle, "cuda", str(out))
        with np.load(out) as arrays:
            print(json.dumps(sorted(name.removesuffix("/logits") for name in arrays if name.endswith("/logits"))))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        take(sys.argv[1])
    else:
        import subprocess

        for disabled in ("0", "1"):
            print(f"flash attention disabled: {disabled}", file=sys.stderr, flush=True)
            subprocess.run(
                [sys.executable, __file__, sys.argv[1], "take"],
                env=os.environ | {"ORT_DISABLE_FLASH_ATTENTION": disabled},
                check=True,
            )
