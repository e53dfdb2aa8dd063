"""The weights of a bundle as those of a checkpoint: a model of which only the bundle is left can be fine-tuned."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from slm.core.checkpoint import GENERATION_CONFIG_FILE, INFO_FILE, is_norm, tensor_shapes
from slm.core.contract import module_rows
from slm.core.errors import SlmError
from slm.core.files import read_json, sha256_file
from slm.core.manifest import MANIFEST_FILE, Bundle
from slm.core.tokenizer import Tokenizer
from slm.core.weights import Array, Shape, check_finite
from slm.export.graph import float_tensors


class BundleModel:
    """The weights of a bundle under the names of a checkpoint; a source of `slm.interchange.importing.import_model`.

    The values are those that the bundle computes with: quantized weights are dequantized, and smoothing stays in them.

    Attributes:
        path: The bundle's directory.
        config: The model's shape.
        shapes: Shapes of the tensors.
        types: Number of the graph's tensors by precision.
        notes: What a user should know about the weights.
        notices: The licence notices of the bundle.
        generation: Fields of the bundle's `generation_config.json`.
        origin: The record of the checkpoint that the bundle was made from.
    """

    kind: Final = "bundle"

    def __init__(self, path: Path) -> None:
        """Opens a bundle.

        Raises:
            SlmError: When the bundle is damaged.
        """
        self._bundle = Bundle.open(path)
        manifest = self._bundle.manifest
        self.path, self.config = path, self._bundle.config
        self.shapes: Mapping[str, Shape] = tensor_shapes(self.config)
        self.notes: list[str] = []
        if manifest.precision != "float32":
            self.notes.append(f"the weights are the rounded ones of the {manifest.precision.upper()} bundle")
        self.notices = manifest.notices
        file = path / GENERATION_CONFIG_FILE
        self.generation: Mapping[str, Any] = read_json(file, GENERATION_CONFIG_FILE) if file.is_file() else {}
        self.origin: dict[str, Any] = dict(manifest.provenance.get(INFO_FILE) or {})
        schemes = {} if manifest.quantization is None else manifest.quantization.schemes
        self._graph = graph = float_tensors(self._bundle.model_path, schemes)
        self._last: tuple[str, Array] | None = None
        self._places = {
            f"{module}.weight": (name, rows)
            for name in graph
            for module, rows in module_rows(name.removesuffix(".weight"), self.config).items()
        }
        plain = "float32" if manifest.precision in ("float32", "int8", "int4") else manifest.precision
        stored = {f"{path}.weight": f"int{scheme.bits}" for path, scheme in schemes.items()}
        self.types = dict(Counter(stored.get(name, plain) for name in graph))

    def read(self, name: str) -> Array:
        """Returns a tensor in float32.

        Raises:
            SlmError: When the graph lacks it, or it has NaN or infinite values.
        """
        if name not in self._places:
            raise SlmError(f"{self._bundle.model_path} has no {name}")
        joined, rows = self._places[name]
        array = np.ascontiguousarray(self._joined(joined)[rows])
        check_finite(array, name, self.path)
        return array - np.float32(1) if is_norm(name) else array

    def _joined(self, name: str) -> Array:
        """Returns a tensor of the graph. The last one is kept: q, k and v are read one after the other."""
        if self._last is None or self._last[0] != name:
            self._last = name, self._graph[name]
        return self._last[1]

    def tokenizer(self) -> Tokenizer:
        """Returns the bundle's tokenizer."""
        return Tokenizer.load(self.path)

    def sha256(self) -> str:
        """Returns the hash of the manifest, which has the hashes of all files."""
        return sha256_file(self.path / MANIFEST_FILE)
