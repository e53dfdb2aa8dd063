"""Importing holds one copy of the weights, whatever they come from."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slm.core.checkpoint import tensor_shapes, write_checkpoint
from slm.core.config import ModelConfig
from slm.core.tokenizer import Tokenizer

# Everybody's buffers, beside what the same process takes for a model of no size.
SLACK_MIB = 24

PROGRAM = """
import sys
from pathlib import Path
from slm.core.machine import peak_rss_mib
from slm.interchange.importing import import_model
import_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(peak_rss_mib())
"""


def checkpoint(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> float:
    """Writes a checkpoint of zeros and returns its size in MiB."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    write_checkpoint(path, config, tensors, tokenizer, {})
    return sum(tensor.nbytes for tensor in tensors.values()) / 2**20


def peak_mib(source: Path, dtype: str) -> float:
    command = [sys.executable, "-c", PROGRAM, str(source), "imported", dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_one_copy(config: ModelConfig, tokenizer: Tokenizer, kind: str, dtype: str) -> None:
    from slm.interchange.gguf import write_gguf

    large = config.model_copy(update={"vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 8_192})
    weights_mib = checkpoint(Path("large"), large, tokenizer)
    checkpoint(Path("small"), config, tokenizer)
    sources = {"directory": (Path("small"), Path("large")), "gguf": (Path("small.gguf"), Path("large.gguf"))}[kind]
    if kind == "gguf":
        for name in ("small", "large"):
            write_gguf(Path(name), Path(f"{name}.gguf"), "q8_0")
    nothing, something = (peak_mib(source, dtype) for source in sources)
    stored = weights_mib / (2 if dtype == "bfloat16" else 1)
    assert weights_mib > 150
    # Of the largest tensor, the embedding, a conversion has the float32 values in hand; a GGUF file is mapped.
    in_hand = 60_000 * 512 * 4 / 2**20 if dtype == "bfloat16" or kind == "gguf" else 0
    mapped = Path("large.gguf").stat().st_size / 2**20 if kind == "gguf" else 0
    assert something - nothing < stored + in_hand + mapped + SLACK_MIB
    assert something - nothing > 0.8 * stored  # the measurement sees the weights at all
