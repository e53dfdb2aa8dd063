"""Import of models from other sources as checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from slm.core.checkpoint import (
    CHECKPOINT_FILES,
    CONFIG_FILE,
    check_tensors,
    tensor_shapes,
    write_checkpoint,
)
from slm.core.config import Dtype, ModelConfig
from slm.core.errors import SlmError
from slm.core.files import check_replaceable
from slm.core.licence import Notices, modified
from slm.core.names import short_name
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import INDEX_FILE, WEIGHTS_FILE, Array, Shape, check_finite
from slm.interchange.gguf.read import GgufModel, is_gguf
from slm.interchange.hub import SOURCES, download, is_hub_id
from slm.interchange.huggingface import HuggingFaceModel
from slm.version import __version__

WantedDtype = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["gguf", "huggingface", "bundle"]


class Source(Protocol):
    """A model made elsewhere, as `import_model` reads it."""

    @property
    def kind(self) -> Kind:
        """Kind of the source."""

    @property
    def path(self) -> Path:
        """The file or directory."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the tensors under the names of a checkpoint."""

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors by stored type."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about the model."""

    @property
    def notices(self) -> Notices:
        """The licence notices of the model."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """Further fields of `generation_config.json`."""

    @property
    def origin(self) -> dict[str, Any]:
        """The record of an earlier checkpoint of slm that the model was made from."""

    def read(self, name: str) -> Array:
        """Returns a tensor of floats."""

    def tokenizer(self) -> Tokenizer:
        """Returns the model's tokenizer."""

    def sha256(self) -> str:
        """Returns the hash of the weights."""


@dataclass(frozen=True)
class Imported:
    """An imported model.

    Attributes:
        path: The checkpoint.
        kind: Kind of the source.
        parameters: Number of parameters; a tied head counts once.
        dtype: Type of the weights in the checkpoint.
        stored_as: Number of the source's tensors by stored type.
        notices: The licence notices of the model.
    """

    path: Path
    kind: Kind
    parameters: int
    dtype: Dtype
    stored_as: dict[str, int]
    notices: Notices


def source_name(source: str) -> str:
    """Returns the default name of a model, after its source.

    "gemma-3-270m" for google/gemma-3-270m and for gemma-3-270m.gguf; "tiny-onnx" for the artifact runs/tiny/onnx.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return path.stem
    return short_name(path).replace("/", "-") if path.exists() else source.rpartition("/")[2]


def import_model(
    source: str | Source,
    out: Path,
    dtype: WantedDtype = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Imports a model as a checkpoint.

    Tensors are read one by one and written together, so memory holds one copy of the weights.

    Args:
        source: A Hugging Face directory, a GGUF file, or the id of a model on the hub; or an opened source.
        out: The checkpoint's directory, created or replaced after everything is read and checked.
        dtype: Type of the stored weights; "auto" keeps float types and stores quantized weights as float32.
        revision: Branch, tag or commit on the hub.
        progress: Receives the number of tensors done.

    Raises:
        SlmError: When the source is not available, is damaged, is another kind of model, or lacks or adds a tensor.
    """
    progress = progress or Silent()
    model = _open(source, revision, progress) if isinstance(source, str) else source
    if out.resolve() == model.path.resolve():
        raise SlmError(f"{out} is the source itself", "choose another --out")
    check_replaceable(out.resolve(), CHECKPOINT_FILES)
    wanted = tensor_shapes(model.config)
    check_tensors(model.shapes, wanted, model.path)
    tokenizer = _fitting(model)
    stored = _storage(model.types, dtype)
    for note in model.notes:
        progress.note(note)
    progress.note(f"importing {model.config.parameter_count():,} parameters as {stored}")
    tensors = _read(model, wanted, stored, progress)
    how = f"weights of {sum(model.types.values())} tensors ({', '.join(model.types)}) stored as {stored}"
    notices = modified(model.notices, how)
    named = source if isinstance(source, str) else str(model.path)
    info = model.origin | {
        "made_by": "slm import",
        "slm_version": __version__,
        "imported": {"source": named, "kind": model.kind, "stored_as": model.types, "sha256": model.sha256()},
        "notices": notices,
    }
    write_checkpoint(out, model.config, tensors, tokenizer, info, model.generation)
    return Imported(out, model.kind, model.config.parameter_count(), stored, model.types, notices)


def _open(source: str, revision: str | None, progress: Progress) -> GgufModel | HuggingFaceModel:
    path = Path(source)
    if revision is not None and not is_hub_id(source):
        raise SlmError("a revision is for models on the hub", "leave --revision out")
    if is_gguf(path):
        progress.note(f"reading {path}")
        gguf = GgufModel(path)
        gguf.tie_equal_head()
        return gguf
    if is_hub_id(source):
        progress.note(f"{source} is not a path: looking on the Hugging Face hub")
        path = download(source, revision)
    elif not path.exists():
        raise SlmError(f"not found: {source}", f"name {SOURCES}")
    if path.is_file():
        raise SlmError(f"{path} is not a GGUF file", "name a .gguf file, or the directory that holds the model")
    if not (path / CONFIG_FILE).is_file():
        hint = f"a Hugging Face model is a directory with {CONFIG_FILE}, {WEIGHTS_FILE} (or {INDEX_FILE}) and tokenizer.json"
        raise SlmError(f"{path} has no {CONFIG_FILE}", hint)
    return HuggingFaceModel(path)


def _fitting(model: Source) -> Tokenizer:
    """Returns the tokenizer, after checking that the embedding has a row for each of its tokens."""
    tokenizer = model.tokenizer()
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    if vocabulary and max(vocabulary.values()) >= model.config.vocab_size:
        raise SlmError(
            f"{model.path}: the tokenizer has {len(vocabulary):,} tokens and the embedding {model.config.vocab_size:,} rows"
        )
    before = tokenizer.encode("")
    if before and max(before) >= model.config.vocab_size:
        raise SlmError(f"{model.path}: the tokenizer adds a token to each text that the embedding has no row for")
    return tokenizer


def _storage(types: Mapping[str, int], wanted: WantedDtype) -> Dtype:
    """Returns the type of the stored weights."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if set(types) == {"bfloat16"} else "float16" if set(types) == {"float16"} else "float32"


def _read(model: Source, names: Mapping[str, Shape], dtype: Dtype, progress: Progress) -> dict[str, Array]:
    import ml_dtypes

    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    tensors: dict[str, Array] = {}
    progress.start("import", len(names), "tensors")
    try:
        for name in names:
            array = model.read(name)
            if array.dtype != numpy_dtype:
                with np.errstate(over="ignore"):  # check_finite reports overflows
                    array = array.astype(numpy_dtype)
                check_finite(array, f"{name} as {dtype}", model.path)
            tensors[name] = np.ascontiguousarray(array)
            progress.advance()
    finally:
        progress.finish()
    return tensors
