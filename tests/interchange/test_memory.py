"""Importing holds one copy of the weights, whatever they come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from slm.core.checkpoint import tensor_shapes, write_checkpoint
from slm.core.config import ModelConfig
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from tests.forks import Run, forks

# Everybody's buffers, beside what the same process takes for a model of no size.
SLACK_MIB = 24

PROGRAM = """
import sys
from pathlib import Path
from slm.core.processes import peak_rss_mib
from slm.interchange.importing import import_model
import_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(peak_rss_mib())
"""


def checkpoint(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> float:
    """Writes a checkpoint of zeros and returns its size in MiB."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    write_checkpoint(path, config, tensors, tokenizer, {})
    return sum(tensor.nbytes for tensor in tensors.values()) / 2**20


@pytest.fixture(scope="module")
def importing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with forks("import gguf, slm.interchange.importing", tmp_path_factory.mktemp("importing")) as run:
        yield run


@dataclass(frozen=True)
class Sources:
    """A small and a large checkpoint, each as a directory and as a GGUF file."""

    home: Path
    embedding_mib: float
    weights_mib: float

    def paths(self, kind: str) -> list[Path]:
        return [self.home / (name if kind == "directory" else f"{name}.gguf") for name in ("small", "large")]


@pytest.fixture(scope="module")
def sources(shared_bundle: Bundle, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    from slm.interchange.gguf import write_gguf

    home = tmp_path_factory.mktemp("sources")
    small = shared_bundle.config
    large = small.model_copy(update={"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 4_096})
    checkpoint(home / "small", small, tokenizer)
    weights_mib = checkpoint(home / "large", large, tokenizer)
    for name in ("small", "large"):
        write_gguf(home / name, home / f"{name}.gguf", "q8_0")
    return Sources(home, large.vocab_size * large.hidden_size * 4 / 2**20, weights_mib)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_one_copy(sources: Sources, importing: Run, kind: str, dtype: str) -> None:
    ended = [importing(PROGRAM, str(source), "imported", dtype) for source in sources.paths(kind)]
    assert [each.returncode for each in ended] == [0, 0], ended
    nothing, something = (float(each.stdout) for each in ended)
    stored = sources.weights_mib / (2 if dtype == "bfloat16" else 1)
    assert sources.weights_mib > 150
    # Of the largest tensor, the embedding, a conversion has the float32 values in hand; a GGUF file is mapped.
    in_hand = sources.embedding_mib if dtype == "bfloat16" or kind == "gguf" else 0
    mapped = sources.paths(kind)[1].stat().st_size / 2**20 if kind == "gguf" else 0
    assert something - nothing < stored + in_hand + mapped + SLACK_MIB
    assert something - nothing > 0.8 * stored  # the measurement sees the weights at all
