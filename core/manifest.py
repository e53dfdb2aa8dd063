"""A bundle: the directory that is deployed, described and sealed by its `manifest.json`."""

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
from slm.core.graph_plan import Kind, Stored
from slm.core.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1
_AGAIN = "copy or export the bundle again"

Precision = Literal["float32", "float16", "int8", "int4"]
# transformers.js's names for the precisions.
MODEL_NAMES: dict[Precision, str] = {
    "float32": "model",
    "float16": "model_fp16",
    "int8": "model_quantized",
    "int4": "model_q4",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """A file as it was sealed."""

    sha256: str
    bytes: int


class Parity(_Record):
    """How far a bundle is from the model it was exported from, over several arrangements of the same tokens.

    Largest absolute differences; the tolerance applies to each.

    Attributes:
        runtime: What ran the bundle, such as "onnxruntime 1.31.1"; empty where a bundle does not record it.
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
        """The largest difference of all."""
        return max(*self.logits.values(), *self.caches.values())


class Ranges(_Record):
    """How large activations grew while text was read in float32, and which products of a float16 graph stay float32.

    `largest` has the largest absolute value in or out of each product by its path; times `margin` it must fit.
    """

    text: str
    tokens: int
    margin: float
    largest: dict[str, float]
    float32: tuple[str, ...]


class Scheme(_Record):
    """How one weight (N, K) is stored: unsigned integers, a float32 scale for each block of input channels.

    An integer q of b bits stands for (q - z) * scale, z being 2^(b - 1) or, with zero points, one for each block.

    Attributes:
        bits: Bits of an integer.
        block_size: Input channels that share a scale.
        zero_points: Whether each block has its own z.
        dynamic: Whether the product is one of 8-bit integers, activations being rounded to them a token at a time. Weights are
            signed then, and a block is as long as the input, so that a scale belongs to an output channel.
        reduced: Of a dynamic scheme, whether weights keep to seven bits: processors without VNNI add pairs of products in 16
            bits, and cut off what eight bits can come to.
    """

    bits: Literal[4, 8] = 8
    block_size: int = Field(gt=0)
    zero_points: bool = False
    dynamic: bool = False
    reduced: bool = False

    def bytes(self, outputs: int, inputs: int) -> int:
        """Returns what a weight takes in the file: integers, scales and zero points."""
        blocks = inputs // self.block_size
        points = -(-blocks * self.bits // 8) if self.zero_points else 0
        return outputs * (inputs * self.bits // 8 + 4 * blocks + points)

    @property
    def name(self) -> str:
        """The scheme in a word."""
        if self.dynamic:
            return f"int{7 if self.reduced else 8} by channel, dynamic"
        return f"int{self.bits} in blocks of {self.block_size}"


class Quantization(_Record):
    """How the weights are stored.

    Attributes:
        method: How integers were chosen: to the nearest, with scales searched for, or by GPTQ.
        accuracy_level: What MatMulNBits rounds activations to: 4 is INT8 by block, 0 nothing.
        smoothing: The share of the activations in smoothing's factors; None where there is none.
        schemes: By path of each product.
        errors: How far each weight is from the smoothed one that it was rounded from, as a share of that, both as roots of
            sums of squares. `slm verify` finds the same.
    """

    method: Literal["nearest", "searched", "gptq"] = "nearest"
    accuracy_level: int
    smoothing: float | None = None
    schemes: dict[str, Scheme]
    errors: dict[str, float] = {}

    @property
    def bits(self) -> int:
        """The fewest bits of any layer."""
        return min(scheme.bits for scheme in self.schemes.values())


class Quality(_Record):
    """What quantization changed, measured on text against the bundle it was made from."""

    text: str
    tokens: int
    kl_nats: float
    same_top1: float
    same_top5: float
    perplexity_before: float
    perplexity_after: float
    max_kl_nats: float | None


class Manifest(_Record):
    """Everything a client must know before it opens the graph.

    Attributes:
        parity: What export found on the CPU provider.
        gpu_parity: What `slm verify` found on GPUs, such as "cuda" and "cuda, graph as written".
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
    """Returns the devices on which a bundle is known to compute what its checkpoint computes."""
    recorded = [name.partition(",")[0] for name in manifest.gpu_parity]
    return list(dict.fromkeys(["cpu"] * (manifest.parity is not None) + recorded))


def is_bundle(path: Path) -> bool:
    """Says whether a directory looks like a bundle."""
    return (path / MANIFEST_FILE).is_file()


class Bundle:
    """An opened bundle whose files are as they were sealed."""

    def __init__(self, path: Path, manifest: Manifest, config: ModelConfig) -> None:
        self.path = path
        self.manifest = manifest
        self.config = config

    @property
    def model_path(self) -> Path:
        """The graph; its weights lie beside it, memory-mapped when it is opened."""
        return member(self.path, self.manifest.model)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.config.stop_token_ids

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @classmethod
    def open(cls, path: Path, trust: bool = False) -> "Bundle":
        """Opens a bundle and checks every file against the manifest.

        Args:
            path: The directory.
            trust: Whether a graph may have other nodes than slm writes. Such a graph can take any time and memory.

        Raises:
            SlmError: When the directory is not a bundle, a file is missing, truncated or altered, or the graph is not one that
                slm writes; it is named.
        """
        if not is_bundle(path):
            why = f"not a bundle: {path} has no {MANIFEST_FILE}" if path.exists() else f"not found: {path}"
            raise SlmError(why, "slm export --onnx makes one from a checkpoint")
        fields = read_json(member(path, MANIFEST_FILE), "manifest")
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise SlmError(
                f"{path}: manifest schema {fields.get('schema_version')!r} is not {SCHEMA_VERSION}",
                "export it again with this version of slm",
            )
        try:
            manifest = Manifest.model_validate(fields)
        except ValidationError as error:
            raise SlmError(f"{path / MANIFEST_FILE} is wrong: {first_mistake(error)}") from None
        for name, entry in manifest.files.items():
            _check_file(path, name, entry)
        for name in (TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE):  # which are read where they lie
            if os.path.lexists(path / name) and name not in manifest.files:
                raise SlmError(f"{path}: {name} is not among the files that the manifest seals", _AGAIN)
        for name in (manifest.model, CONFIG_FILE, TOKENIZER_FILE):
            if name not in manifest.files:
                raise SlmError(f"{path}: {name} is not among the files that the manifest seals")
        _check_weights(path, manifest)
        config = ModelConfig.from_hf(read_json(member(path, CONFIG_FILE), CONFIG_FILE))
        _check_contract(path, manifest, config)
        if not trust:
            _check_graph(path, manifest, config)
        return cls(path, manifest, config)


def sealed_files(path: Path) -> set[str]:
    """Returns the names of a bundle's files, its manifest included; none where there is no bundle."""
    if not is_bundle(path):
        return set()
    try:
        manifest = Manifest.model_validate(read_json(path / MANIFEST_FILE, MANIFEST_FILE))
    except (ValidationError, SlmError):  # some other program's manifest.json
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
        raise SlmError(f"{directory}: {name} was altered after it was sealed (SHA-256 differs)", _AGAIN)


def _check_weights(directory: Path, manifest: Manifest) -> None:
    """Makes sure that the graph takes its weights from sealed files: onnxruntime before 1.29 follows any path."""
    graph = PurePosixPath(manifest.model)
    for name in sorted(external_files(member(directory, manifest.model))):
        if (graph.parent / name).as_posix() not in manifest.files:
            raise SlmError(
                f"{directory}: the graph reads {name!r}, which is not among the files that the manifest seals",
                "do not trust this artifact",
            )


def _check_contract(directory: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Makes sure that what the manifest says of the graph is what such a graph of this configuration has."""
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
            raise SlmError(f"{directory / MANIFEST_FILE} is wrong: {name} does not fit {CONFIG_FILE}", _AGAIN)


def _check_graph(directory: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Makes sure that the graph is the one that slm writes for such a manifest and configuration."""
    schemes = manifest.quantization.schemes if manifest.quantization else {}
    kept = frozenset(manifest.ranges.float32 if manifest.ranges else ())
    half = manifest.device != "cpu"

    def stored(path: str) -> Stored:
        if manifest.quantization is None:
            return Stored(half=half and path not in kept)
        if path not in schemes:
            raise SlmError(f"{directory / MANIFEST_FILE} is wrong: it does not say how {path} is stored", _AGAIN)
        scheme = schemes[path]
        return Stored(scheme.bits, scheme.block_size, scheme.zero_points, scheme.dynamic)

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
    """Writes `manifest.json` with the hash of every other file in the directory; returns the bundle."""
    entries = {
        file.relative_to(directory).as_posix(): FileEntry(sha256=sha256_file(file), bytes=file.stat().st_size)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_FILE
    }
    return amend(directory, manifest.model_copy(update={"files": entries, "created": now()}))


def amend(directory: Path, manifest: Manifest) -> Bundle:
    """Writes `manifest.json` again, whole or not at all; the files beside it are as they were sealed. Returns the bundle."""
    write_text(directory / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return Bundle(directory, manifest, ModelConfig.from_hf(read_json(directory / CONFIG_FILE, CONFIG_FILE)))
