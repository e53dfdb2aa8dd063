"""The Hugging Face directory of a Gemma 3 model, or of the text part of a multimodal one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from slm.core.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE, notices_of, read_info, with_stop_tokens
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.licence import Notices
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.core.weights import EMBEDDING, HEAD, Array, Shape, Weights, weights_sha256
from slm.interchange.statements import statement_notes

_MULTIMODAL = "gemma3"
# Prefixes of the text model's tensors in a multimodal checkpoint: as Google published them, and as transformers writes them
# since 4.52.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# Tables of the rotary embedding, which some programs store although they follow from the configuration.
_ROTARY_TABLE = re.compile(r".*\brotary_emb(_local)?\.(\w+_)?inv_freq")
_PICTURE_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class HuggingFaceModel:
    """A directory with `config.json`, safetensors and `tokenizer.json`.

    Attributes:
        path: The directory.
        config: The text model's shape, with `eos_token_id` from `generation_config.json`.
        shapes: Shapes of the text model's tensors under the names of a text checkpoint.
        notes: Contradictions between the directory's files, and how they are resolved; that the vision part is ignored.
    """

    kind: Final = "huggingface"

    def __init__(self, path: Path) -> None:
        """Reads the configuration and opens the weights.

        Raises:
            SlmError: When a file is missing or damaged, the model is not Gemma 3, or files contradict each other in a way
                that transformers does not resolve.
        """
        self.path = path
        self._fields = read_json(path / CONFIG_FILE, CONFIG_FILE)
        self._multimodal = self._fields.get("model_type") == _MULTIMODAL
        generation = path / GENERATION_CONFIG_FILE
        self.generation = read_json(generation, GENERATION_CONFIG_FILE) if generation.is_file() else {}
        text = self._text_fields()
        self.config = ModelConfig.from_hf(text)
        self._weights = Weights(path)
        self._names = self._text_names()
        self.notes = statement_notes(path, text, self.config, self.types)
        if left_out := sum(self._of_pictures(name) for name in self._weights.shapes):
            self.notes.insert(0, f"the text part alone: {left_out} tensors of the vision part are left out")
        if self.config.tie_word_embeddings and HEAD in self._names:
            self._settle_head()
        self.shapes: Mapping[str, Shape] = {text: self._weights.shapes[name] for text, name in self._names.items()}

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors by stored type."""
        kinds = [self._weights.dtypes[name] for name in self._names.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    @property
    def notices(self) -> Notices:
        """The licence notices of the directory."""
        return notices_of(self.path)

    @property
    def origin(self) -> dict[str, Any]:
        """The directory's `slm.json`, if slm wrote it."""
        return read_info(self.path)

    def sha256(self) -> str:
        """Returns the hash of the weights."""
        return weights_sha256(self.path)

    def read(self, name: str) -> Array:
        """Returns a tensor in its stored type.

        Raises:
            SlmError: When its values are not finite floats.
        """
        return self._weights.read(self._names[name])

    def tokenizer(self) -> Tokenizer:
        """Returns the directory's tokenizer.

        Raises:
            SlmError: When there is no `tokenizer.json`.
        """
        if not (self.path / TOKENIZER_FILE).is_file():
            hint = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes one from a tokenizer.model"
            raise SlmError(f"{self.path} has no {TOKENIZER_FILE}", hint)
        tokenizer = Tokenizer.load(self.path)
        file = self.path / _SPECIAL_TOKENS_FILE
        if file.is_file() and "added_tokens_decoder" not in tokenizer.config:
            # As in transformers: older tokenizers name their special tokens here, and these names take precedence.
            tokenizer.config |= special_token_names(read_json(file, _SPECIAL_TOKENS_FILE))
        return tokenizer

    def _text_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = dict(self._fields)
        if self._multimodal:
            text = fields.get("text_config")
            if not isinstance(text, dict):
                raise SlmError(f"{self.path / CONFIG_FILE} has no text_config")
            names = ("eos_token_id", "tie_word_embeddings", "quantization_config")
            whole = {name: fields[name] for name in names if name in fields}
            fields = {"model_type": "gemma3_text"} | text | whole
        return with_stop_tokens(fields, self.path)

    def _text_names(self) -> dict[str, str]:
        """Returns the stored name of each of the text model's tensors."""
        names: dict[str, str] = {}
        for name in self._weights.shapes:
            if self._of_pictures(name) or _ROTARY_TABLE.fullmatch(name):
                continue
            text = self._text_name(name)
            if text in names and not self._weights.same(names[text], name):
                raise SlmError(f"{self.path}: {names[text]} and {name} are the same tensor with different values")
            names[text] = name
        return names

    def _settle_head(self) -> None:
        """Decides, as transformers 5, whether to use a stored head although the configuration ties it."""
        if EMBEDDING not in self._names:
            self._names[EMBEDDING] = self._names.pop(HEAD)
            self.notes.append(
                f"the weights hold the head and no embedding: the embedding is {HEAD}, as config.json ties both"
            )
        elif self._weights.same(self._names[EMBEDDING], self._names[HEAD]):
            del self._names[HEAD]
        else:
            self.config = self.config.model_copy(update={"tie_word_embeddings": False})
            self.notes.append(
                f"config.json ties the head to the embedding, but {self._names[HEAD]} is another matrix: imported with a"
                " head of its own, as transformers 5 reads it"
            )

    def _text_name(self, name: str) -> str:
        if self._multimodal:
            for prefix, short in _TEXT_PREFIXES.items():
                if name.startswith(prefix):
                    return short + name.removeprefix(prefix)
        return name

    def _of_pictures(self, name: str) -> bool:
        return self._multimodal and name.startswith(_PICTURE_PREFIXES)


def special_token_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens of a `special_tokens_map.json` by name, such as "bos_token"."""
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in fields.items()}
    return {name: value for name, value in found.items() if name.endswith("_token") and isinstance(value, str)}
