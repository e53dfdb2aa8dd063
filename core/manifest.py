"""Bundles: directories for deployment, with a `manifest.json` that describes the model and lists the hashes of all files."""

import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm.core.checkpoint import CONFIG_FILE, now
from slm.core.config import ModelConfig, first_mistake
from slm.core.contract import (
    CacheLayer,
    Device,
    Target,
    TensorSpec,
    cache_layers,
    input_specs,
    output_specs,
    slot_specs,
)
from slm.core.errors import SlmError
from slm.core.files import check_readable, member, read_json, sha256_file, write_text
from slm.core.graph_check import check_graph
from slm.core.graph_file import external_files
from slm.core.graph_plan.kind import Kind, Stored
from slm.core.tokenizer import TOKENIZER_FILE
from slm.core.tokenizer_config import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1
_AGAIN = "copy or export the bundle again"
_ID_BYTES = 8  # ids of tokens are int64

Precision = Literal["float32", "float16", "int8", "int4"]
# File names of the precisions in transformers.js.
MODEL_NAMES: dict[Precision, str] = {
    "float32": "model",
    "float16": "model_fp16",
    "int8": "model_quantized",
    "int4": "model_q4",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """Size and hash of a file in the bundle."""

    sha256: str
    bytes: int


class Parity(_Record):
    """The differences between a bundle and its reference, for the same tokens read in several arrangements.

    Attributes:
        reference: The reference, such as "PyTorch float32".
        tokens: The number of tokens.
        tolerance: The limit of each difference.
        logits: The largest absolute difference of the logits, by arrangement.
        caches: The largest absolute difference of the caches, by arrangement.
        greedy_tokens_equal: The number of equal greedy tokens.
        runtime: The runtime of the bundle, such as "onnxruntime 1.31.1"; empty in older manifests.
    """

    reference: str
    tokens: int
    tolerance: float
    logits: dict[str, float]
    caches: dict[str, float]
    greedy_tokens_equal: int
    runtime: str = ""

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(*self.logits.values(), *self.caches.values())


class Ranges(_Record):
    """The largest activations of a float32 model on a text, and the layers that stay float32 in a float16 graph.

    `largest` has the largest absolute input or output of each linear layer, by path. A layer stays float32 if this value
    times `margin` exceeds the range of float16.
    """

    text: str
    tokens: int
    margin: float
    largest: dict[str, float]
    float32: tuple[str, ...]


class Scheme(_Record):
    """The storage of one weight (N, K): unsigned integers, and a scale for each block of input channels.

    A b-bit integer q represents (q - z) * scale. z is 2^(b - 1), or the block's own zero point.

    Attributes:
        bits: Bits of an integer.
        block_size: Number of input channels that share a scale.
        zero_points: Whether each block has its own z.
        dynamic: Whether the layer multiplies 8-bit integers, with activations quantized per token. Weights are then signed
            and have one scale for each output channel: a block is as long as the input.
        reduced: Whether the sums of two products of a dynamic scheme fit in 16 bits, in which x86 CPUs without VNNI add
            them (`slm.core.grid.PAIR_LIMIT`). Older bundles may lack it: they have weights up to 127 without that limit, and
            the runtime rounds them again on a CPU that needs it (`slm.runtime.products`).
        half: Whether scales, and the input and output of the product, are float16, as on a GPU. Otherwise they are float32.
        halves: Whether the upper and lower four bits of the integers are stored apart, with the scale of the upper ones and
            one float32 for each output channel (`slm.export.graph.halves`).
        frequent: For a 4-bit table, the number of frequent tokens whose rows are stored in 8 bits as well, in blocks of the
            same size, and replace those in 4 bits (`slm.export.graph.frequent`).
    """

    bits: Literal[4, 8] = 8
    block_size: int = Field(gt=0)
    zero_points: bool = False
    dynamic: bool = False
    reduced: bool = False
    half: bool = False
    halves: bool = False
    frequent: int = Field(default=0, ge=0)

    @property
    def of_frequent(self) -> "Scheme":
        """The scheme of the rows of frequent tokens."""
        return Scheme(bits=8, block_size=self.block_size, half=self.half)

    def bytes(self, outputs: int, inputs: int) -> int:
        """Returns the bytes of a weight in the file: integers, scales and zero points."""
        blocks = inputs // self.block_size
        points = -(-blocks * self.bits // 8) if self.zero_points else 0
        rows = outputs * (inputs * self.bits // 8 + (2 if self.half else 4) * blocks + points + 4 * self.halves)
        if not self.frequent:
            return rows
        return rows + self.of_frequent.bytes(self.frequent, inputs) + _ID_BYTES * self.frequent

    @property
    def name(self) -> str:
        """A short name of the scheme."""
        if self.dynamic:
            return "int8 by channel, dynamic" + ", needs VNNI on x86" * (not self.reduced)
        frequent = f" with {self.frequent:,} rows in int8" if self.frequent else ""
        return f"int{self.bits} in blocks of {self.block_size}" + ", in halves" * self.halves + frequent


class Quantization(_Record):
    """The quantization of a bundle's weights.

    Attributes:
        method: The rounding method: nearest, nearest with searched scales, or GPTQ.
        accuracy_level: The quantization of activations in MatMulNBits: 4 is INT8 by block, 0 is none.
        smoothing: The exponent of activations in the smoothing factors; None without smoothing.
        schemes: The scheme of each layer, by path.
        errors: The relative error of each weight after smoothing: the norm of the error divided by the norm of the weight.
            `slm verify` recomputes it. Refinement also moves norms, whose changes are then here too.
        refined: Whether scales and norms were trained after rounding (`slm quantize --refine`).
    """

    method: Literal["nearest", "searched", "gptq"] = "nearest"
    accuracy_level: int
    smoothing: float | None = None
    schemes: dict[str, Scheme]
    errors: dict[str, float] = {}
    refined: bool = False

    @property
    def bits(self) -> int:
        """The smallest number of bits of any layer."""
        return min(scheme.bits for scheme in self.schemes.values())


class Quality(_Record):
    """The effect of quantization, measured on a text against the source bundle."""

    text: str
    tokens: int
    kl_nats: float
    same_top1: float
    same_top5: float
    perplexity_before: float
    perplexity_after: float
    max_kl_nats: float | None


class Manifest(_Record):
    """The description of a bundle that a client reads before it loads the graph.

    Attributes:
        parity: The differences that `slm export` measured on the CPU.
        gpu_parity: The differences that `slm verify` measured on GPUs: "cuda" and "cuda, graph as written".
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    slm_version: str
    created: str | None = None
    model: str
    precision: Precision
    target: Target = "fused"
    device: Device = "cpu"
    context: int = Field(gt=0)
    cache: tuple[CacheLayer, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    adapter_slots: bool = False
    parameters: int
    parity: Parity | None = None
    gpu_parity: dict[str, Parity] = {}
    ranges: Ranges | None = None
    quantization: Quantization | None = None
    quality: Quality | None = None
    provenance: dict[str, Any] = {}
    notices: tuple[str, ...] = ()
    files: dict[str, FileEntry] = {}


def parity_devices(manifest: Manifest) -> list[str]:
    """Returns the devices on which a bundle was verified against its checkpoint."""
    recorded = [name.partition(",")[0] for name in manifest.gpu_parity]
    return list(dict.fromkeys(["cpu"] * (manifest.parity is not None) + recorded))


def is_bundle(path: Path) -> bool:
    """Returns whether a directory contains a `manifest.json`."""
    return (path / MANIFEST_FILE).is_file()


class Bundle:
    """An opened bundle, whose files match the manifest."""

    def __init__(self, path: Path, manifest: Manifest, config: ModelConfig) -> None:
        self.path = path
        self.manifest = manifest
        self.config = config

    @property
    def model_path(self) -> Path:
        """The graph's file. Its weights are in files in the same directory, which are memory-mapped."""
        return member(self.path, self.manifest.model)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.config.stop_token_ids

    @property
    def bytes(self) -> int:
        """Total size of all files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def model_bytes(self) -> int:
        """Size of graph and weights."""
        files = self.manifest.files
        return sum(entry.bytes for name, entry in files.items() if name.startswith(self.manifest.model))

    def check_graph(self) -> None:
        """Checks that slm writes the bundle's graph, which `open` does only without `trust`.

        Raises:
            SlmError: If slm does not write such a graph.
        """
        _check_graph(self.path, self.manifest, self.config)

    @classmethod
    def open(cls, path: Path, trust: bool = False) -> "Bundle":
        """Opens a bundle and checks every file against the manifest.

        Args:
            path: The directory.
            trust: Whether to accept graphs that slm does not write. Such a graph can take any time and memory.

        Raises:
            SlmError: If the directory is not a bundle, a file is missing, truncated or altered, or slm does not write such a
                graph; the message names the file.
        """
        if not is_bundle(path):
            why = f"not a bundle: {path} has no {MANIFEST_FILE}" if path.exists() else f"not found: {path}"
            raise SlmError(why, "create a bundle from a checkpoint with slm export --onnx")
        fields = read_json(member(path, MANIFEST_FILE), "manifest")
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise SlmError(
                f"{path}: manifest schema {fields.get('schema_version')!r} is not supported, only {SCHEMA_VERSION}",
                "export the bundle again with this version of slm",
            )
        try:
            manifest = Manifest.model_validate(fields)
        except ValidationError as error:
            raise SlmError(f"{path / MANIFEST_FILE} is invalid: {first_mistake(error)}") from None
        for name, entry in manifest.files.items():
            _check_file(path, name, entry)
        for name in (TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE):  # tokenizers load these if they exist
            if os.path.lexists(path / name) and name not in manifest.files:
                raise SlmError(f"{path}: {name} is not listed in {MANIFEST_FILE}", _AGAIN)
        for name in (manifest.model, CONFIG_FILE, TOKENIZER_FILE):
            if name not in manifest.files:
                raise SlmError(f"{path}: {name} is not listed in {MANIFEST_FILE}")
        _check_weights(path, manifest)
        config = ModelConfig.from_hf(read_json(member(path, CONFIG_FILE), CONFIG_FILE))
        _check_contract(path, manifest, config)
        if not trust:
            _check_graph(path, manifest, config)
        return cls(path, manifest, config)


def sealed_files(path: Path) -> set[str]:
    """Returns the names of a bundle's files, including its manifest; an empty set if there is no bundle."""
    if not is_bundle(path):
        return set()
    try:
        manifest = Manifest.model_validate(read_json(path / MANIFEST_FILE, MANIFEST_FILE))
    except (ValidationError, SlmError):  # a manifest.json of another program
        return set()
    return {MANIFEST_FILE, *manifest.files}


def _check_file(directory: Path, name: str, entry: FileEntry) -> None:
    file = member(directory, name)
    if not file.is_file():
        raise SlmError(f"{directory}: {name} is missing", _AGAIN)
    check_readable(file, name)
    size = file.stat().st_size
    if size != entry.bytes:
        raise SlmError(f"{directory}: {name} has {size:,} bytes instead of {entry.bytes:,}", _AGAIN)
    if sha256_file(file) != entry.sha256:
        raise SlmError(f"{directory}: {name} was altered (its SHA-256 differs from {MANIFEST_FILE})", _AGAIN)


def _check_weights(directory: Path, manifest: Manifest) -> None:
    """Checks that the graph reads weights only from listed files: onnxruntime before 1.29 reads any path."""
    graph = PurePosixPath(manifest.model)
    for name in sorted(external_files(member(directory, manifest.model))):
        if (graph.parent / name).as_posix() not in manifest.files:
            raise SlmError(
                f"{directory}: the graph reads {name!r}, which is not listed in {MANIFEST_FILE}",
                "do not trust this artifact",
            )


def _check_contract(directory: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Checks that the manifest's description of the graph matches the configuration."""
    caches = cache_layers(config, manifest.device, manifest.cache[0].dtype if manifest.cache else "float32")
    slots = slot_specs(config) if manifest.adapter_slots else ()
    for name, found, wanted in (
        ("cache", manifest.cache, caches),
        ("inputs", manifest.inputs, input_specs(caches, slots)),
        ("outputs", manifest.outputs, output_specs(config.vocab_size, caches)),
        ("context", manifest.context, min(manifest.context, config.max_position_embeddings)),
        ("parameters", manifest.parameters, config.parameter_count()),
    ):
        if found != wanted:
            raise SlmError(f"{directory / MANIFEST_FILE} is invalid: {name} does not match {CONFIG_FILE}", _AGAIN)


def _check_graph(directory: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Checks that slm writes this graph for the manifest and configuration."""
    schemes = manifest.quantization.schemes if manifest.quantization else {}
    kept = frozenset(manifest.ranges.float32 if manifest.ranges else ())
    half = manifest.device != "cpu"

    def stored(path: str) -> Stored:
        if manifest.quantization is None:
            return Stored(half=half and path not in kept)
        if path not in schemes:
            raise SlmError(f"{directory / MANIFEST_FILE} is invalid: it has no scheme for {path}", _AGAIN)
        scheme = schemes[path]
        return Stored(
            scheme.bits,
            scheme.block_size,
            scheme.zero_points,
            scheme.dynamic,
            scheme.half,
            scheme.halves,
            scheme.frequent,
        )

    kind = Kind(
        manifest.target,
        manifest.device,
        manifest.context,
        manifest.quantization.accuracy_level if manifest.quantization else 0,
        stored,
        manifest.adapter_slots,
        any(cache.dtype == "int8" for cache in manifest.cache),
    )
    folder = PurePosixPath(manifest.model).parent
    inside = {name: entry.bytes for name, entry in manifest.files.items() if PurePosixPath(name).is_relative_to(folder)}
    sizes = {PurePosixPath(name).relative_to(folder).as_posix(): size for name, size in inside.items()}
    check_graph(member(directory, manifest.model), config, kind, sizes)


def seal(directory: Path, manifest: Manifest) -> Bundle:
    """Writes `manifest.json` with the hashes of all other files in the directory; returns the bundle."""
    entries = {
        file.relative_to(directory).as_posix(): FileEntry(sha256=sha256_file(file), bytes=file.stat().st_size)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_FILE
    }
    return amend(directory, manifest.model_copy(update={"files": entries, "created": now()}))


def amend(directory: Path, manifest: Manifest) -> Bundle:
    """Replaces `manifest.json` atomically and returns the bundle. The other files must not have changed since `seal`."""
    write_text(directory / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return Bundle(directory, manifest, ModelConfig.from_hf(read_json(directory / CONFIG_FILE, CONFIG_FILE)))
