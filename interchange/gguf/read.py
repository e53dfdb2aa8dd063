"""A GGUF file as a Gemma 3 checkpoint: configuration, tokenizer and tensors, dequantized one at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from slm.core.checkpoint import is_norm
from slm.core.config import FULL, MAX_LAYERS, SLIDING, LayerType, ModelConfig, layer_pattern
from slm.core.errors import SlmError
from slm.core.files import check_readable, sha256_file
from slm.core.licence import Notices, licence_notices
from slm.core.tokenizer import END_OF_TURN, Tokenizer
from slm.core.weights import EMBEDDING, HEAD, Array, Shape, check_finite
from slm.interchange.gguf import tokenizer as vocabulary
from slm.interchange.gguf.lengths import MAGIC, check_lengths
from slm.interchange.gguf.names import ARCHITECTURE, NOTICES_KEY, query_scalar, tensor_names

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Bytes of two tensors that are compared in one step.
_COMPARED_BYTES = 16 << 20


def is_gguf(path: Path) -> bool:
    """Returns whether a file begins like a GGUF file."""
    if not path.is_file():
        return False
    check_readable(path, "the model")
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GgufModel:
    """An opened GGUF file of architecture gemma3.

    Attributes:
        path: The file.
        config: The model's shape.
        shapes: Shapes of all tensors by Hugging Face's names; unknown names are kept as they are.
        notes: Contradictions within the file, and how they are resolved.
        generation: Empty: the fields of a `generation_config.json` are in the configuration.
        origin: Empty: a GGUF file has no record of slm.
    """

    kind: Final = "gguf"

    def __init__(self, path: Path) -> None:
        """Reads everything but the tensors' data.

        Raises:
            SlmError: When the file is damaged, of another architecture, split, or uses a feature that is not supported.
        """
        check_readable(path, "the model")
        # For damaged files the package raises ValueError, KeyError, IndexError, UnicodeDecodeError and others.
        try:
            from gguf import GGUFReader

            check_lengths(path)
            reader = GGUFReader(path)
            self.fields: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
            }
        except ImportError:
            raise
        except Exception as error:
            raise SlmError(
                f"cannot read the GGUF file: {path} ({' '.join(str(error).split())})", "copy or download it again"
            ) from None
        self.path = path
        self._check_kind()
        shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
        try:
            self.config = self._config(shapes)
        except (ArithmeticError, TypeError, ValueError) as error:  # text in place of a number, zero heads
            raise SlmError(f"{path}: a setting has an impossible value ({error})") from None
        self.notes: list[str] = []
        self.generation: dict[str, Any] = {}
        self.origin: dict[str, Any] = {}
        names = tensor_names(self.config.num_hidden_layers)
        self._tensors = {names.get(tensor.name, tensor.name): tensor for tensor in reader.tensors}
        self.shapes: dict[str, Shape] = {
            name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()
        }

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors by stored type, such as "Q4_K"."""
        kinds = [tensor.tensor_type.name for tensor in self._tensors.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def tie_equal_head(self) -> None:
        """Ties a stored head that equals the embedding byte by byte, and adds a note."""
        if self.config.tie_word_embeddings or not _equal(self._tensors[EMBEDDING], self._tensors[HEAD]):
            return
        self.config = self.config.model_copy(update={"tie_word_embeddings": True})
        del self._tensors[HEAD], self.shapes[HEAD]
        self.notes.append(f"{_HEAD} is {_EMBEDDING} once more: imported with a tied head")

    @property
    def name(self) -> str:
        """The model's name in its metadata, or the file's name."""
        return str(self.fields.get("general.name") or self.path.stem)

    @property
    def notices(self) -> Notices:
        """The licence notices that the metadata require."""
        written = self.fields.get(NOTICES_KEY)
        if isinstance(written, list) and written:  # written by slm, including changes to the weights since
            return tuple(map(str, written))
        licence = self.fields.get("general.license")
        return licence_notices(str(licence) if licence else None, self.path.name, self.config.vocab_size)

    def read(self, name: str) -> Array:
        """Returns a tensor in float32, norm weights without their 1.

        Raises:
            SlmError: When the gguf package does not know its type, or it has NaN or infinite values.
        """
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise SlmError(
                f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the gguf package cannot read",
                "a newer gguf package may; or import another quantization of the model",
            ) from None
        array: Array = np.asarray(values, np.float32).reshape(self.shapes[name])
        check_finite(array, tensor.name, self.path)
        return array - np.float32(1) if is_norm(name) else array

    def sha256(self) -> str:
        """Returns the hash of the file."""
        return sha256_file(self.path)

    def stored_as(self, name: str) -> str:
        """Returns a tensor's type in the file ("Q8_0")."""
        return str(self._tensors[name].tensor_type.name)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer in the file.

        Raises:
            SlmError: When its kind is not supported.
        """
        try:
            return vocabulary.from_gguf(self.fields, self.path, self.config.max_position_embeddings)
        except SlmError:
            raise
        except Exception as error:  # tokenizers raises bare Exceptions for merges of missing tokens
            reason = " ".join(str(error).split())
            raise SlmError(f"{self.path}: the tokenizer is damaged ({reason})", "copy or download it again") from None

    def _check_kind(self) -> None:
        architecture = self.fields.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise SlmError(
                f"{self.path}: general.architecture is {architecture!r}, not {ARCHITECTURE!r}",
                "slm runs Gemma 3 text models",
            )
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "attention.scale"):
            if self._setting(name, 0.0):
                raise SlmError(f"{self.path} asks for {name}, which slm does not compute")
        if int(self.fields.get("split.count", 1)) > 1:
            raise SlmError(f"{self.path} is one of several files", "join them first: llama-gguf-split --merge")

    def _setting(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise SlmError(f"{self.path}: the setting {ARCHITECTURE}.{key} is missing")
        return value

    def _config(self, gguf_shapes: Mapping[str, Shape]) -> ModelConfig:
        embedding = gguf_shapes.get(_EMBEDDING)
        if embedding is None or len(embedding) != 2:
            raise SlmError(f"{self.path}: {_EMBEDDING} is missing or not a matrix")
        stated = int(self._setting("vocab_size", embedding[1]))
        if stated != embedding[1]:
            raise SlmError(
                f"{self.path}: {ARCHITECTURE}.vocab_size is {stated:,}, and {_EMBEDDING} has {embedding[1]:,} rows"
            )
        layers, hidden = int(self._setting("block_count")), int(self._setting("embedding_length"))
        if layers > MAX_LAYERS:
            raise SlmError(f"{self.path}: gemma3.block_count is {layers:,}, at most {MAX_LAYERS:,}")
        heads, context = int(self._setting("attention.head_count")), int(self._setting("context_length"))
        kv_heads = self._setting("attention.head_count_kv", heads)
        head_dim = int(self._setting("attention.key_length", hidden // heads))
        if int(self._setting("rope.dimension_count", head_dim)) != head_dim:
            raise SlmError(f"{self.path} asks for rope.dimension_count, which slm does not compute")
        if isinstance(kv_heads, list) and len(set(kv_heads)) == 1:
            kv_heads = kv_heads[0]
        if isinstance(kv_heads, list) or int(self._setting("attention.value_length", head_dim)) != head_dim:
            raise SlmError(
                f"{self.path}: heads that differ from layer to layer or from keys to values are not Gemma 3's"
            )
        full: dict[str, Any] = {"rope_theta": decimal(self._setting("rope.freq_base", 10_000.0))}
        factor = self._setting("rope.scaling.factor", self._setting("rope.scale_linear", 0.0))
        scaling = self._setting("rope.scaling.type", "linear" if factor else "none")  # linear is llama.cpp's default
        if scaling != "none" and factor:
            full |= {"rope_type": scaling, "factor": decimal(factor)}
        window = int(self._setting("attention.sliding_window", 0))
        sliding = {"rope_theta": decimal(self._setting("rope.freq_base_swa", 10_000.0))}
        eos, pad, bos = (self._token(f"{kind}_token_id") for kind in ("eos", "padding", "bos"))
        return ModelConfig.checked(
            {
                "vocab_size": embedding[1],
                "hidden_size": hidden,
                "intermediate_size": int(self._setting("feed_forward_length")),
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": int(kv_heads),
                "head_dim": head_dim,
                "sliding_window": window or context,
                "layer_types": self._layer_types(layers) if window else (FULL,) * layers,
                "rope_parameters": {FULL: full, SLIDING: sliding},
                "query_pre_attn_scalar": query_scalar(layers, hidden, heads, head_dim),
                "max_position_embeddings": context,
                "rms_norm_eps": decimal(self._setting("attention.layer_norm_rms_epsilon")),
                "tie_word_embeddings": _HEAD not in gguf_shapes,
                "bos_token_id": bos,
                "eos_token_id": self._stop_tokens(eos),
                "pad_token_id": pad,
            }
        )

    def _layer_types(self, layers: int) -> tuple[LayerType, ...]:
        pattern = self._setting("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            return tuple(SLIDING if slides else FULL for slides in pattern)
        # For llama.cpp a pattern of 0 means that every layer slides.
        return layer_pattern(layers, int(pattern)) if pattern else (SLIDING,) * layers

    def _token(self, key: str) -> int | None:
        value = self.fields.get(f"tokenizer.ggml.{key}")
        return None if value is None else int(value)

    def _stop_tokens(self, eos: int | None) -> int | tuple[int, ...] | None:
        """Returns the stop tokens: end-of-text and, with a chat template, the end of a turn."""
        found = [eos, self._token("eot_token_id")]
        if "tokenizer.chat_template" in self.fields:
            tokens = self.fields.get("tokenizer.ggml.tokens", [])
            found += [tokens.index(token) for token in ("<eos>", END_OF_TURN) if token in tokens]
        stops = tuple(dict.fromkeys(token for token in found if token is not None))
        return stops[0] if len(stops) == 1 else stops or None


def _equal(first: Any, second: Any) -> bool:
    """Returns whether two stored tensors are equal byte by byte; reads parts, because both are mapped from the file."""
    if first.tensor_type != second.tensor_type or first.data.shape != second.data.shape:
        return False
    ours, theirs = (tensor.data.reshape(-1).view(np.uint8) for tensor in (first, second))
    return all(
        np.array_equal(ours[start : start + _COMPARED_BYTES], theirs[start : start + _COMPARED_BYTES])
        for start in range(0, len(ours), _COMPARED_BYTES)
    )


def decimal(value: Any) -> float:
    """Returns the shortest decimal that rounds to a float32: 1e-06 instead of 9.99999997e-07."""
    return float(str(np.float32(value)))
