"""Export of a checkpoint as a GGUF file for llama.cpp, which is read back and compared before it appears."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slm.core.checkpoint import is_norm, notices_of, open_weights, read_config, tensor_shapes
from slm.core.config import FULL, SLIDING, ModelConfig, layer_pattern
from slm.core.errors import SlmError
from slm.core.files import atomic_file
from slm.core.licence import GEMMA_TERMS, Notices, is_gemma, modified
from slm.core.outputs import check_writable
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import Array, Weights
from slm.interchange.gguf.names import (
    ARCHITECTURE,
    NOTICES_KEY,
    VERSION_KEY,
    is_query_norm,
    query_scalar,
    tensor_names,
)
from slm.interchange.gguf.read import GgufModel, decimal, is_gguf
from slm.interchange.gguf.tokenizer import to_gguf
from slm.version import __version__

GgufType = Literal["f32", "f16", "q8_0"]

# The version of slm that wrote a file is within this many bytes.
_HEAD = 4096
# Q8_0 rounds blocks of 32 to 127 steps of their largest value; the step itself has half precision, which is coarse below 6e-5.
_Q8_BLOCK, _Q8_STEPS = 32, 127
_HALF, _HALF_SUBNORMAL = 2**-11, 2**-25  # the largest error of half precision: relative, and absolute near 0
_PROBE = 'Once upon a time,  there were 3 foxes.\n\nThey said: "¿Qué?" — naïve 東京 🦊\tfin'


@dataclass(frozen=True)
class Written:
    """A GGUF file, read back.

    Attributes:
        path: The file.
        bytes: Size of the file.
        types: Number of tensors by stored type.
        largest_difference: Largest difference between a stored tensor and the checkpoint's, relative to the tensor's largest
            value.
    """

    path: Path
    bytes: int
    types: dict[str, int]
    largest_difference: float


def write_gguf(checkpoint: Path, path: Path, kind: GgufType, progress: Progress | None = None) -> Written:
    """Writes a checkpoint as one GGUF file, whole or not at all.

    Norms are always float32; a matrix whose rows do not divide into blocks of 32 is float16 in a Q8_0 file.

    Args:
        checkpoint: The checkpoint's directory.
        path: The file to create, or the GGUF file to replace; its name becomes the model's.
        kind: Type of the stored matrices.
        progress: Receives the number of tensors done.

    Raises:
        SlmError: When the checkpoint cannot be read, another file is at the path, llama.cpp's Gemma 3 cannot express the
            configuration or the tokenizer, or the written file does not match the checkpoint.
    """
    progress = progress or Silent()
    check_gguf_output(path)
    config = read_config(checkpoint)
    notices = modified(notices_of(checkpoint), f"converted to GGUF ({kind.upper()})")
    source = _Source(config, open_weights(checkpoint, config), Tokenizer.load(checkpoint), path.stem, notices)
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise SlmError(
            f"llama.cpp's Gemma 3 has no activation {config.hidden_activation!r}", "slm export --onnx runs it"
        )
    with atomic_file(path) as partial:
        _write(partial, source, kind, progress)
        types, largest = _verified(partial, source, progress)
        size = partial.stat().st_size
    return Written(path, size, types, largest)


def check_gguf_output(path: Path) -> None:
    """Checks that a GGUF file can be written: nothing is there, or a file that slm wrote.

    A link to such a file is replaced, and its target is kept.

    Raises:
        SlmError: When the place cannot be written to, or another file is there.
    """
    check_writable(path)
    if not path.exists():
        return
    if not is_gguf(path):
        raise SlmError(f"{path} exists and is not a GGUF file", "name another --out")
    with path.open("rb") as file:
        if VERSION_KEY.encode() not in file.read(_HEAD):
            raise SlmError(f"{path} exists and slm did not write it", "name another --out")


@dataclass(frozen=True)
class _Source:
    """The contents of a file."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    name: str
    notices: Notices

    @property
    def scalar(self) -> int:
        """The number whose inverse square root is llama.cpp's scale of this model's attention scores."""
        c = self.config
        return query_scalar(c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.head_dim)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Yields each tensor as llama.cpp uses it, norms without their 1.

        If the model's scale of attention differs from llama.cpp's, the norm of the queries compensates.
        """
        rest = np.float32((self.scalar / self.config.query_pre_attn_scalar) ** 0.5)
        for name in tensor_shapes(self.config):
            array = self.weights.float32(name)
            yield name, (1 + array) * rest - 1 if is_query_norm(name) and rest != 1 else array


def _write(path: Path, source: _Source, kind: GgufType, progress: Progress) -> None:
    from gguf import GGUFWriter, LlamaFileType

    file_types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    config = source.config
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_string(VERSION_KEY, __version__)
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(2)
    if source.notices:
        writer.add_description("\n".join(source.notices))
        writer.add_array(NOTICES_KEY, list(source.notices))
    if is_gemma(source.notices):
        writer.add_license("gemma")
        writer.add_license_link(GEMMA_TERMS)
    _add_shape(writer, config)
    for key, value in to_gguf(source.tokenizer, config.vocab_size).items():
        _add_vocabulary(writer, key, value)
    for key, token in (("bos", config.bos_token_id), ("padding", config.pad_token_id)):
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    if config.stop_token_ids:
        writer.add_eos_token_id(config.stop_token_ids[0])
        if len(config.stop_token_ids) > 1:
            writer.add_eot_token_id(config.stop_token_ids[1])
    chat_template = source.tokenizer.config.get("chat_template")
    if isinstance(chat_template, str):
        writer.add_chat_template(chat_template)
    names = {full: short for short, full in tensor_names(config.num_hidden_layers).items()}
    shapes = tensor_shapes(config)
    for full, shape in shapes.items():
        _declare(writer, names[full], shape, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress.start(f"write {kind.upper()}", len(shapes), "tensors")
        for array in _stored(source, kind):
            writer.write_tensor_data(array)
            progress.advance()
    finally:
        progress.finish()
        writer.close()


def _add_shape(writer: Any, config: ModelConfig) -> None:
    """Adds the settings of architecture gemma3; settings that official files omit are added only if they differ."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if FULL in config.rope_parameters:
        rope = config.rope_parameters[FULL]
        writer.add_rope_freq_base(rope.rope_theta)
        if rope.rope_type != "default":
            writer.add_string(f"{ARCHITECTURE}.rope.scaling.type", rope.rope_type)
            writer.add_rope_scaling_factor(rope.factor)
    if SLIDING in config.layer_types:
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32(f"{ARCHITECTURE}.rope.freq_base_swa", config.rope_parameters[SLIDING].rope_theta)
        _add_pattern(writer, config)


def _add_pattern(writer: Any, config: ModelConfig) -> None:
    """Adds the pattern of sliding layers, as a period if there is one, unless every sixth layer is global."""
    key, layers = f"{ARCHITECTURE}.attention.sliding_window_pattern", config.num_hidden_layers
    periods = [every for every in range(1, layers + 2) if layer_pattern(layers, every) == config.layer_types]
    if not periods:  # only recent versions of llama.cpp read this one
        writer.add_array(key, [kind == SLIDING for kind in config.layer_types])
    elif config.layer_types != layer_pattern(layers):
        writer.add_uint32(key, periods[0])


def _add_vocabulary(writer: Any, key: str, value: Any) -> None:
    key = f"tokenizer.ggml.{key}"
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _type_of(name: str, shape: tuple[int, ...], kind: GgufType) -> GgufType:
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _Q8_BLOCK else kind


def _declare(writer: Any, name: str, shape: tuple[int, ...], kind: GgufType) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    stored = GGMLQuantizationType[_type_of(name, shape, kind).upper()]
    if stored == GGMLQuantizationType.Q8_0:
        rows = quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=stored)
    else:
        dtype = np.dtype(np.float32 if stored == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)


def _stored(source: _Source, kind: GgufType) -> Iterator[Array]:
    """Yields each tensor in its stored form."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    for name, array in source.tensors():
        stored = _type_of(name, array.shape, kind)
        value = array + np.float32(1) if is_norm(name) else array
        if stored == "f16" and np.abs(value).max() > np.finfo(np.float16).max:
            raise SlmError(f"{source.weights.path}: {name} holds values beyond float16", "--gguf-type f32")
        yield quantize(np.ascontiguousarray(value), GGMLQuantizationType[stored.upper()])


def _verified(path: Path, source: _Source, progress: Progress) -> tuple[dict[str, int], float]:
    """Compares a written file with the checkpoint. Returns its stored types, and the largest difference.

    The file is no longer mapped afterwards: Windows does not rename a mapped file.
    """
    written = GgufModel(path)
    return written.types, _compare(written, source, progress)


def _compare(written: GgufModel, source: _Source, progress: Progress) -> float:
    """Compares the written file with the checkpoint, and returns the largest difference.

    Raises:
        SlmError: When a setting, the tokenizer or a tensor differs.
    """
    config, nothing = source.config, "nothing was written"
    # llama.cpp computes with numbers in float32, and stores them so.
    ropes = {
        kind: rope.model_copy(update={"rope_theta": decimal(rope.rope_theta), "factor": decimal(rope.factor)})
        for kind, rope in config.rope_parameters.items()
    }
    changes = {"rope_parameters": ropes, "rms_norm_eps": decimal(config.rms_norm_eps)}
    wanted = config.model_copy(update={"query_pre_attn_scalar": source.scalar} | changes)
    for field in type(config).model_fields:
        ours, theirs = getattr(wanted, field), getattr(written.config, field)
        if field == "rope_parameters":  # the file has no value for a kind of layer that does not occur
            ours, theirs = ({kind: rope[kind] for kind in set(config.layer_types)} for rope in (ours, theirs))
        if field == "sliding_window" and SLIDING not in config.layer_types:
            continue
        # A chat template adds stop tokens; the initialization of weights is not stored.
        if field not in ("eos_token_id", "initializer_range") and ours != theirs:
            raise SlmError(f"the GGUF file would say {field} {theirs!r} instead of {ours!r}", nothing)
    if not set(config.stop_token_ids[:2]) <= set(written.config.stop_token_ids):
        raise SlmError(f"the GGUF file would end a text at {written.config.stop_token_ids}", nothing)
    if written.tokenizer().encode(_PROBE) != source.tokenizer.encode(_PROBE):
        raise SlmError("the GGUF file's tokenizer splits text differently", nothing)
    largest = 0.0
    progress.start("read back", len(written.shapes), "tensors")
    try:
        for name, array in source.tensors():
            difference, allowed = _difference(array, written.read(name), is_norm(name), written.stored_as(name))
            progress.advance()
            if not difference <= allowed:
                raise SlmError(f"the GGUF file's {name} differs by {difference:.2g} (limit {allowed:.2g})", nothing)
            largest = max(largest, difference)
    finally:
        progress.finish()
    return largest


def _difference(ours: Array, theirs: Array, norm: bool, kind: str) -> tuple[float, float]:
    """Returns the largest relative difference, and its limit; of the block nearest to its limit for Q8_0."""
    if kind == "Q8_0":
        blocks = ours.reshape(-1, _Q8_BLOCK)
        unit = np.maximum(np.abs(blocks).max(axis=1), np.finfo(np.float16).tiny)
        relative = np.abs(theirs.reshape(-1, _Q8_BLOCK) - blocks).max(axis=1) / unit
        limits = 0.5 / _Q8_STEPS + np.maximum(_HALF, _Q8_STEPS * _HALF_SUBNORMAL / unit)
        worst = np.argmax(relative - limits)
        return float(relative[worst]), float(limits[worst])
    unit = np.abs(ours).max() + (1 if norm else 0)
    allowed = {"F32": 2**-23 if norm else 0.0, "F16": 2**-11}[kind]
    return float(np.abs(theirs - ours).max() / max(float(unit), 1e-30)), allowed
