"""A checkpoint's weights: one safetensors file or several behind an index, read tensor by tensor without PyTorch."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import check_readable, member, read_json, sha256_file

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Array = NDArray[Any]
Shape = tuple[int, ...]

_CONVERT = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
_AGAIN = "copy, download or train it again"
# Values of a tensor that are compared at a time.
_COMPARED_VALUES = 1 << 22
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Weights:
    """The tensors of a checkpoint's directory.

    Attributes:
        path: The directory.
        files: The safetensors files.
        shapes: Every tensor's shape.
        dtypes: Every tensor's dtype, by numpy's names.
    """

    def __init__(self, path: Path) -> None:
        """Opens the files; no tensor is read yet.

        Raises:
            SlmError: When there are no weights, one of several files is missing, a file is damaged, or two files hold
                different tensors of one name.
        """
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.files = weight_files(path)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._homes: dict[str, Any] = {}
        for file in self.files:
            check_readable(file, "the weights")
            try:
                # Read, not mapped: the pages of a mapping would count as a second copy of what is read from it.
                opened = safe_open(str(file), framework="np", backend="pread")
            except (SafetensorError, OSError) as error:
                raise SlmError(f"cannot read the weights: {file} ({error})", _AGAIN) from None
            for name in opened.keys():  # noqa: SIM118  not a mapping
                view = opened.get_slice(name)
                if name in self._homes:
                    self._check_copy(name, view)
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = _FLOATS.get(view.get_dtype(), view.get_dtype())
                self._homes[name] = opened
        if "bfloat16" in self.dtypes.values():
            import ml_dtypes  # noqa: F401  teaches numpy the type

    def untied(self, config: ModelConfig) -> dict[str, Shape]:
        """Returns the shapes, a tied head's left out where a file holds it beside the embedding.

        Raises:
            SlmError: When that head is not the embedding.
        """
        if not config.tie_word_embeddings or HEAD not in self.shapes:
            return dict(self.shapes)
        if EMBEDDING in self.shapes and not self.same(EMBEDDING, HEAD):
            raise SlmError(
                f"{self.path}: config.json ties the head to the embedding, and {HEAD} is another matrix",
                f"slm import {self.path} makes a checkpoint with a head of its own, which is how transformers 5 reads it",
            )
        return {name: shape for name, shape in self.shapes.items() if name != HEAD}

    def same(self, first: str, second: str) -> bool:
        """Says whether two tensors hold the same values, whatever their float types."""
        return self.shapes[first] == self.shapes[second] and _equal(
            self._homes[first].get_slice(first), self._homes[second].get_slice(second), self.shapes[first]
        )

    def _check_copy(self, name: str, view: Any) -> None:
        shape = tuple(view.get_shape())
        if shape != self.shapes[name] or not _equal(self._homes[name].get_slice(name), view, shape):
            raise SlmError(f"{self.path}: two files hold different tensors called {name}", _AGAIN)

    def read(self, name: str) -> Array:
        """Returns a tensor as it is stored.

        Raises:
            SlmError: When it is not made of floats, or one of them is NaN or infinite.
        """
        if self.dtypes[name] not in _FLOATS.values():
            raise SlmError(f"{self.path}: {name} is stored as {self.dtypes[name]}", "slm reads float weights")
        array: Array = self._homes[name].get_tensor(name)
        check_finite(array, name, self.path)
        return array

    def float32(self, name: str) -> Array:
        """Returns a tensor in float32.

        Raises:
            SlmError: As `read`.
        """
        return self.read(name).astype(np.float32, copy=False)


def _equal(first: Any, second: Any, shape: Shape) -> bool:
    """Compares two safetensors slices some rows at a time: a large vocabulary's matrices take gigabytes."""
    import ml_dtypes  # noqa: F401  teaches numpy bfloat16

    if not shape or any(view.get_dtype() not in _FLOATS for view in (first, second)):
        return False
    rows = max(1, _COMPARED_VALUES * shape[0] // max(1, math.prod(shape)))
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))  # safetensors refuses an end beyond the last row
        if not np.array_equal(first[part].astype(np.float64), second[part].astype(np.float64)):
            return False
    return True


def has_weights(path: Path) -> bool:
    """Says whether a directory holds weights."""
    return (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()


def weight_files(path: Path) -> list[Path]:
    """Returns the files that hold a checkpoint's weights.

    Raises:
        SlmError: When there are none, or one that the index names is missing.
    """
    if os.path.lexists(path / WEIGHTS_FILE):
        check_readable(path / WEIGHTS_FILE, "the weights")
        return [path / WEIGHTS_FILE]
    if not (path / INDEX_FILE).is_file():
        hint = f"a checkpoint has {WEIGHTS_FILE}, or {INDEX_FILE} with its files"
        if any(path.glob("*.bin")):
            hint = f"slm does not open pickles; {_CONVERT} writes {WEIGHTS_FILE}"
        raise SlmError(f"no weights: {path}", hint)
    index = read_json(path / INDEX_FILE, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise SlmError(f"{path / INDEX_FILE} has no weight_map of names to files")
    files = [member(path, name, links=True) for name in sorted({*index.values()})]
    for file in files:
        if not file.is_file():
            raise SlmError(f"{path}: {file.name} is missing, which {INDEX_FILE} names", _AGAIN)
    return files


def weights_sha256(path: Path) -> str:
    """Returns the SHA-256 of a checkpoint's weights; of several files, of their own hashes in the order of their names."""
    files = weight_files(path)
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def bytes_on_disk(path: Path) -> int:
    """Returns the size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(path))


def tensor_bytes(path: Path) -> int:
    """Returns the bytes of a checkpoint's tensors, from the headers alone: an answering machine lacks the package.

    Raises:
        SlmError: When a file is no safetensors file or not as long as its header says.
    """
    return sum(map(_tensor_bytes, weight_files(path)))


def _tensor_bytes(file: Path) -> int:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            if length > size:
                raise ValueError("a header longer than the file")
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            if 8 + length + max((end for _, end in ends), default=0) != size:
                raise ValueError("tensors of another length than the file")
            return sum(end - start for start, end in ends)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SlmError(f"cannot read the weights: {file}", _AGAIN) from None


def check_finite(array: Array, name: str, path: Path) -> None:
    """Makes sure that a tensor holds numbers.

    Raises:
        SlmError: When one is NaN or infinite.
    """
    # bfloat16 is not numpy's own; its finiteness is that of the same number in float32.
    plain = array if array.dtype.kind == "f" else array.astype(np.float32)
    bad = int(plain.size - np.isfinite(plain).sum())
    if bad:
        raise SlmError(f"{path}: {name} holds {bad:,} values that are NaN or infinite", "the weights are damaged")
