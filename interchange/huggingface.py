"""A Hugging Face directory of a Gemma 3 model, the text part of a multimodal one included."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.core.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE, with_stop_tokens
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.core.weights import Array, Shape, Weights

_MULTIMODAL = "gemma3"
# Where the text model's tensors lie in a multimodal checkpoint: as Google published them, and as transformers holds them
# since 4.52.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
_PICTURE_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class HuggingFaceModel:
    """A directory with `config.json`, safetensors and `tokenizer.json`.

    Attributes:
        path: The directory.
        config: The text model's shape, `eos_token_id` being what its `generation_config.json` says.
        shapes: Shapes of the text model's tensors under the names that a text checkpoint has.
        left_out: How many tensors of a multimodal model's vision part are not taken.
    """

    def __init__(self, path: Path) -> None:
        """Reads the configuration and opens the weights.

        Raises:
            SlmError: When a file is missing or damaged, or the model is not Gemma 3.
        """
        self.path = path
        self._fields = read_json(path / CONFIG_FILE, CONFIG_FILE)
        self._multimodal = self._fields.get("model_type") == _MULTIMODAL
        generation = path / GENERATION_CONFIG_FILE
        self.generation = read_json(generation, GENERATION_CONFIG_FILE) if generation.is_file() else {}
        self.config = self._config()
        self._weights = Weights(path)
        self._names = {self._text_name(name): name for name in self._weights.shapes if not self._of_pictures(name)}
        self.left_out = len(self._weights.shapes) - len(self._names)
        self.shapes: Mapping[str, Shape] = {text: self._weights.shapes[name] for text, name in self._names.items()}

    @property
    def types(self) -> dict[str, int]:
        """How many tensors are stored as what."""
        kinds = [self._weights.dtypes[name] for name in self._names.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def read(self, name: str) -> Array:
        """Returns a tensor as it is stored.

        Raises:
            SlmError: When it is not made of finite floats.
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
        return Tokenizer.load(self.path)

    def _config(self) -> ModelConfig:
        fields: dict[str, Any] = dict(self._fields)
        if self._multimodal:
            text = fields.get("text_config")
            if not isinstance(text, dict):
                raise SlmError(f"{self.path / CONFIG_FILE} has no text_config")
            whole = {name: fields[name] for name in ("eos_token_id", "tie_word_embeddings") if name in fields}
            fields = {"model_type": "gemma3_text"} | text | whole
        return ModelConfig.from_hf(with_stop_tokens(fields, self.path))

    def _text_name(self, name: str) -> str:
        if self._multimodal:
            for prefix, short in _TEXT_PREFIXES.items():
                if name.startswith(prefix):
                    return short + name.removeprefix(prefix)
        return name

    def _of_pictures(self, name: str) -> bool:
        return self._multimodal and name.startswith(_PICTURE_PREFIXES)
