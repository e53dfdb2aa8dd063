"""LoRA adapters for bundles with adapter slots.

An adapter is read from onnxruntime's adapter file and passed to each step as inputs, one adapter per row.

Dimensions: B batch, K inputs, N outputs, r rank.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.contract import product_sizes, slot_names
from slm.core.errors import SlmError
from slm.core.files import check_readable
from slm.core.manifest import Bundle

SUFFIX = ".onnx_adapter"

Array = NDArray[Any]


@dataclass(frozen=True)
class Adapter:
    """An adapter in the form of the graph's inputs.

    Attributes:
        name: The adapter's name in requests and messages.
        arrays: float32 by input: A (1, K, r) and B (1, r, N), with the scale included. A product that the adapter does not
            change has no entry.
    """

    name: str
    arrays: Mapping[str, Array]

    @cached_property
    def values(self) -> dict[str, ort.OrtValue]:
        """The arrays as OrtValues for IO binding, on the same memory."""
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    @cached_property
    def digest(self) -> str:
        """A hash that distinguishes adapters."""
        found = hashlib.sha256()
        for name in sorted(self.arrays):
            found.update(name.encode() + str(self.arrays[name].shape).encode() + self.arrays[name].tobytes())
        return found.hexdigest()


def stacked(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """Returns one adapter that holds one adapter per row, or None if no row has one. Smaller ranks are padded."""
    if all(adapter is None for adapter in adapters):
        return None
    present = [adapter for adapter in adapters if adapter is not None]
    if len(present) == len(adapters) and len({id(adapter) for adapter in present}) == 1:
        return present[0]
    arrays: dict[str, Array] = {}
    for name in sorted({name for adapter in present for name in adapter.arrays}):
        axis = 2 if name.endswith(".A") else 1  # of the rank
        shape = list(next(adapter.arrays[name] for adapter in present if name in adapter.arrays).shape)
        shape[0] = len(adapters)
        shape[axis] = max(adapter.arrays[name].shape[axis] for adapter in present if name in adapter.arrays)
        rows = np.zeros(shape, np.float32)
        for row, adapter in zip(rows, adapters, strict=True):
            if adapter is not None and name in adapter.arrays:
                array = adapter.arrays[name][0]
                row[: array.shape[0], : array.shape[1]] = array
        arrays[name] = rows
    return Adapter("+".join("base" if adapter is None else adapter.name for adapter in adapters), arrays)


def read_adapter(path: Path, bundle: Bundle) -> Adapter:
    """Reads a `.onnx_adapter` file for a bundle.

    Raises:
        SlmError: If the bundle has no slots, or the file is unreadable, belongs to another base model or does not fit.
    """
    check_slots_of(bundle)
    check_readable(path, "the adapter")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        parameters = file.get_parameters()
        arrays = {name: value.numpy().copy() for name, value in parameters.items()}
        made_for = int(file.get_model_version())
    except Exception as error:  # onnxruntime's exceptions share no narrower base class
        raise SlmError(f"{path} is not an adapter that onnxruntime can read ({str(error).splitlines()[0]})") from None
    base = model_version(bundle.manifest.provenance.get("weights_sha256"))
    if made_for and base and made_for != base:
        raise SlmError(
            f"{path} was made for other weights than those of {bundle.path}", "use the bundle of the adapter's base"
        )
    return checked(Adapter(path.stem, arrays), bundle, path)


def checked(adapter: Adapter, bundle: Bundle, path: Path) -> Adapter:
    """Returns an adapter after checking that its arrays fit the bundle's slots.

    Raises:
        SlmError: If an array does not fit.
    """
    sizes = {
        name: size
        for product, inputs, outputs in product_sizes(bundle.config)
        for name, size in zip(slot_names(product), (inputs, outputs), strict=True)
    }
    for name, array in adapter.arrays.items():
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        axis = 1 if name.endswith("A") else 2
        if name not in sizes or other not in adapter.arrays:
            raise SlmError(
                f"{path} has {name}, for which {bundle.path} has no slot", "the adapter belongs to another model"
            )
        if array.ndim != 3 or array.dtype != np.float32 or len(array) != 1 or array.shape[axis] != sizes[name]:
            raise SlmError(
                f"{path}: {name} is {array.dtype} {array.shape}, and the slot takes {sizes[name]:,} channels"
            )
        if array.shape[3 - axis] != adapter.arrays[other].shape[axis]:
            raise SlmError(f"{path}: {name} and {other} have different ranks")
        if not np.isfinite(array).all():
            raise SlmError(f"{path}: {name} has values that are not numbers")
    return adapter


def check_slots_of(bundle: Bundle) -> None:
    """Checks that a bundle has adapter slots.

    Raises:
        SlmError: If it has none.
    """
    if not bundle.manifest.adapter_slots:
        raise SlmError(
            f"{bundle.path} has no slots for adapters",
            "export one with slots: slm export --onnx --adapter-slots; or merge: slm export --onnx --adapter DIR",
        )


def model_version(weights_sha256: object) -> int:
    """Returns the number that identifies a base model in an adapter file: 31 bits of its hash, or 0 if it is unknown."""
    return int(str(weights_sha256)[:8], 16) & 0x7FFF_FFFF if weights_sha256 else 0
