"""What a checkpoint is on disk, for those who read it without PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INFO_FILE = "slm.json"
# All that a checkpoint consists of.
CHECKPOINT_FILES = frozenset(
    (CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHTS_FILE, INFO_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
)

Shapes = Mapping[str, tuple[int, ...]]


def is_checkpoint(path: Path) -> bool:
    """Says whether a directory looks like a checkpoint: a configuration with weights."""
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def read_config(path: Path) -> ModelConfig:
    """Reads the configuration of a checkpoint.

    Raises:
        SlmError: When the directory is not a checkpoint or its configuration cannot be run.
    """
    if not is_checkpoint(path):
        kind = "not found" if not path.exists() else "not a checkpoint"
        raise SlmError(f"{kind}: {path}", f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    return ModelConfig.from_hf(read_json(path / CONFIG_FILE, CONFIG_FILE))


def read_info(path: Path) -> dict[str, Any]:
    """Returns what `slm.json` says of how a checkpoint was made; empty for one that slm did not make."""
    file = path / INFO_FILE
    return read_json(file, INFO_FILE) if file.is_file() else {}


def check_tensors(found: Shapes, wanted: Shapes, path: Path) -> None:
    """Compares names and shapes of tensors with those that a configuration asks for.

    Raises:
        SlmError: That names the first tensors missing, left over or of the wrong shape.
    """
    common = sorted(wanted.keys() & found.keys())
    complaints = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "wrong shape": [f"{n} {found[n]} instead of {wanted[n]}" for n in common if found[n] != wanted[n]],
    }
    parts = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in complaints.items()
        if names
    ]
    if parts:
        raise SlmError(f"{path}: the weights do not fit the configuration; {'; '.join(parts)}")
