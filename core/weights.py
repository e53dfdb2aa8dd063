"""Reads a checkpoint's weights, one safetensors file or several with an index, tensor by tensor and without PyTorch."""

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
# Number of values that are compared at a time.
_COMPARED_VALUES = 1 << 22
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Weights:
    """The tensors of a checkpoint.

    Attributes:
        path: The checkpoint's directory.
        files: The safetensors files.
        shapes: The shape of each tensor.
        dtypes: The dtype of each tensor, by numpy's names.
    """

    def __init__(self, path: Path) -> None:
        """Opens the files; tensors are read later.

        Raises:
            SlmError: If there are no weights, a file is missing or damaged, or two files contain different tensors of the
                same name.
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
                # Read, not mapped: the pages of a mapping would count as a second copy of each tensor.
                opened = safe_open(str(file), framework="np", backend="pread")
            except (SafetensorError, OSError) as error:
                raise SlmError(f"cannot read the weights: {file} ({error})", _AGAIN) from None
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                view = opened.get_slice(name)
                if name in self._homes:
                    self._check_copy(name, view)
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = _FLOATS.get(view.get_dtype(), view.get_dtype())
                self._homes[name] = opened
        if "bfloat16" in self.dtypes.values():
            import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy

    def untied(self, config: ModelConfig) -> dict[str, Shape]:
        """Returns the shapes without a tied head, if a file contains it beside the embedding.

        Raises:
            SlmError: If the head differs from the embedding.
        """
        if not config.tie_word_embeddings or HEAD not in self.shapes:
            return dict(self.shapes)
        if EMBEDDING in self.shapes and not self.same(EMBEDDING, HEAD):
            raise SlmError(
                f"{self.path}: config.json ties the head to the embedding, but {HEAD} has other values",
                f"slm import {self.path} writes a checkpoint with an untied head, as transformers 5 reads it",
            )
        return {name: shape for name, shape in self.shapes.items() if name != HEAD}

    def same(self, first: str, second: str) -> bool:
        """Returns whether two tensors have the same values; their float types may differ."""
        return self.shapes[first] == self.shapes[second] and _equal(
            self._homes[first].get_slice(first), self._homes[second].get_slice(second), self.shapes[first]
        )

    def _check_copy(self, name: str, view: Any) -> None:
        shape = tuple(view.get_shape())
        if shape != self.shapes[name] or not _equal(self._homes[name].get_slice(name), view, shape):
            raise SlmError(f"{self.path}: two files contain different tensors named {name}", _AGAIN)

    def read(self, name: str) -> Array:
        """Returns a tensor in its stored dtype.

        Raises:
            SlmError: If the tensor is not of floats, or a value is NaN or infinite.
        """
        if self.dtypes[name] not in _FLOATS.values():
            raise SlmError(
                f"{self.path}: {name} is stored as {self.dtypes[name]}, which is not supported",
                "slm reads float weights",
            )
        array: Array = self._homes[name].get_tensor(name)
        check_finite(array, name, self.path)
        return array

    def rows(self, name: str, ids: NDArray[np.int64]) -> Array:
        """Returns rows of a matrix in its stored dtype; a part of the matrix is in memory at a time.

        Raises:
            SlmError: As `read`, for the values of these rows.
        """
        if self.dtypes[name] not in _FLOATS.values():
            return self.read(name)[ids]  # raises
        view, (count, *columns) = self._homes[name].get_slice(name), self.shapes[name]
        step = max(1, _COMPARED_VALUES // max(1, math.prod(columns)))
        found: Array | None = None
        for start in range(0, count, step):
            inside = np.flatnonzero((start <= ids) & (ids < start + step))
            if inside.size:
                part = view[start : min(start + step, count)]
                found = np.empty((len(ids), *columns), part.dtype) if found is None else found
                found[inside] = part[ids[inside] - start]
        rows = np.empty((0, *columns), np.float32) if found is None else found
        check_finite(rows, name, self.path)
        return rows

    def float32(self, name: str) -> Array:
        """Returns a tensor in float32.

        Raises:
            SlmError: As `read`.
        """
        return self.read(name).astype(np.float32, copy=False)


def _equal(first: Any, second: Any, shape: Shape) -> bool:
    """Compares two safetensors slices, some rows at a time: matrices of large vocabularies take gigabytes."""
    import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy

    if not shape or any(view.get_dtype() not in _FLOATS for view in (first, second)):
        return False
    rows = max(1, _COMPARED_VALUES * shape[0] // max(1, math.prod(shape)))
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))  # safetensors rejects an end beyond the last row
        if not np.array_equal(first[part].astype(np.float64), second[part].astype(np.float64)):
            return False
    return True


def has_weights(path: Path) -> bool:
    """Returns whether a directory holds weights."""
    return (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()


def weight_files(path: Path) -> list[Path]:
    """Returns the files that contain a checkpoint's weights.

    Raises:
        SlmError: If there are none, or a file in the index is missing.
    """
    if os.path.lexists(path / WEIGHTS_FILE):
        check_readable(path / WEIGHTS_FILE, "the weights")
        return [path / WEIGHTS_FILE]
    if not (path / INDEX_FILE).is_file():
        hint = f"a checkpoint has {WEIGHTS_FILE}, or {INDEX_FILE} and the files that it lists"
        if any(path.glob("*.bin")):
            hint = f"slm does not load pickle files; {_CONVERT} writes {WEIGHTS_FILE}"
        raise SlmError(f"no weights: {path}", hint)
    index = read_json(path / INDEX_FILE, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise SlmError(f"{path / INDEX_FILE} has no weight_map from names to files")
    files = [member(path, name, links=True) for name in sorted({*index.values()})]
    for file in files:
        if not file.is_file():
            raise SlmError(f"{path}: {file.name} is missing, but {INDEX_FILE} lists it", _AGAIN)
    return files


def weights_sha256(path: Path) -> str:
    """Returns the SHA-256 of a checkpoint's weights; for several files, the hash of their hashes in order of name."""
    files = weight_files(path)
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def bytes_on_disk(path: Path) -> int:
    """Returns the size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(path))


def tensor_bytes(path: Path) -> int:
    """Returns the bytes of a checkpoint's tensors; reads file headers only and does not need the safetensors package.

    Raises:
        SlmError: If a file is not a safetensors file, or its length does not match its header.
    """
    return sum(map(_tensor_bytes, weight_files(path)))


def _tensor_bytes(file: Path) -> int:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            if 8 + length + max((end for _, end in ends), default=0) != size:
                raise ValueError("the tensors do not have the file's length")
            return sum(end - start for start, end in ends)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SlmError(f"cannot read the weights: {file}", _AGAIN) from None


def check_finite(array: Array, name: str, path: Path) -> None:
    """Checks that all values of a tensor are finite.

    Raises:
        SlmError: If a value is NaN or infinite.
    """
    # numpy's isfinite does not support bfloat16; conversion to float32 keeps finiteness.
    plain = array if array.dtype.kind == "f" else array.astype(np.float32)
    bad = int(plain.size - np.isfinite(plain).sum())
    if bad:
        raise SlmError(f"{path}: {name} has values that are NaN or infinite ({bad:,})", "the weights are damaged")
