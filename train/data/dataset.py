"""A prepared dataset: the directory of token files that `slm data prepare` and `slm train` write, and its manifest.

    DIR/dataset.json  tokenizer.json  tokenizer_config.json  train-00000.bin …  validation-00000.bin …

A run that trains on a dataset elsewhere contains the tokenizer, and a reference as its `dataset.json`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import member, read_json, sha256_file
from slm.core.progress import Progress
from slm.core.text.files import DATASET_FILE, is_dataset
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.core.tokenizer_config import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from slm.train.data.remote.locations import is_remote
from slm.train.data.selection.settings import SelectionRecord
from slm.train.data.shards import Shard
from slm.train.data.tokens import DtypeName, TokenHeader, TokenIds, Tokens, map_ids, read_header

FORMAT_VERSION: Literal[1] = 1

_AGAIN = "slm data prepare makes datasets"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_RecordT = TypeVar("_RecordT", bound=_Record)


class Source(_Record):
    """The origin of text.

    Attributes:
        name: A path, or the name of a corpus or of a Hugging Face dataset, as the user gave it.
        kind: Kind of the source.
        split: Split that the text belongs to.
        bytes: Size of the file; None if the text is not in a file of the user's.
    """

    name: str
    kind: Literal["file", "huggingface", "sample"]
    split: Literal["train", "validation"]
    bytes: int | None = None


class Split(_Record):
    """One stream of tokens.

    Attributes:
        shards: The files, in order.
        tokens: Number of ids, including the end-of-text after every document.
        documents: Number of documents.
        text_bytes: UTF-8 bytes of the documents.
        text_sha256: SHA-256 of all documents, each followed by a zero byte.
        duplicates_removed: Documents removed because they occurred before or are validation text.
    """

    shards: tuple[Shard, ...] = Field(min_length=1)
    tokens: int
    documents: int
    text_bytes: int
    text_sha256: str
    duplicates_removed: int = 0

    @classmethod
    def of(cls, shards: tuple[Shard, ...], text_sha256: str, duplicates_removed: int) -> Self:
        """Returns the sum of shards."""
        tokens, documents, text_bytes = _totals(shards)
        return cls(
            shards=shards,
            tokens=tokens,
            documents=documents,
            text_bytes=text_bytes,
            text_sha256=text_sha256,
            duplicates_removed=duplicates_removed,
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tokens, self.documents, self.text_bytes) != _totals(self.shards):
            raise ValueError("the totals are not those of the shards")
        return self


class DatasetManifest(_Record):
    """The description of a dataset, complete without its tokens.

    Attributes:
        format_version: Version of the directory's format.
        slm_version: Version of slm that wrote it.
        tokenizer_sha256: SHA-256 of the tokenizer, as `Tokenizer.sha256`.
        vocab_size: Number of tokens of the tokenizer.
        dtype: Type of the stored ids.
        train: The training tokens.
        validation: The validation tokens.
        held_out: How the validation text was chosen.
        deduplicated: Whether exact duplicates were removed.
        sources: Origin of the text.
        licence: Licence of the text, as given or as the source states it; None if neither.
        selection: The filters and the removal of near duplicates; None if neither was asked for.
    """

    format_version: Literal[1] = FORMAT_VERSION
    slm_version: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: DtypeName
    train: Split
    validation: Split
    held_out: str
    deduplicated: bool
    sources: tuple[Source, ...]
    licence: str | None = None
    selection: SelectionRecord | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files of a dataset with this manifest."""
        shards = (shard.file for shard in (*self.train.shards, *self.validation.shards))
        return (DATASET_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *shards)

    def to_json(self) -> str:
        """Returns the contents of `dataset.json`."""
        return self.model_dump_json(indent=2, exclude={"selection"} if self.selection is None else None) + "\n"


class DatasetReference(_Record):
    """A reference from a run to a dataset that lies elsewhere.

    Attributes:
        format_version: Format version of the dataset.
        dataset: Absolute path of the dataset.
        manifest_sha256: SHA-256 of its `dataset.json`, which lists every file.
    """

    format_version: Literal[1] = FORMAT_VERSION
    dataset: str
    manifest_sha256: str


@dataclass(frozen=True)
class Dataset:
    """An opened dataset.

    Attributes:
        path: Directory of the token files.
        manifest: The manifest.
        tokenizer: The tokenizer of the tokens.
        train: The training tokens.
        validation: The validation tokens.
        address: The address that `path` is a local copy of; None for a dataset in the local file system.
    """

    path: Path
    manifest: DatasetManifest
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    address: str | None = None


def refer_to(path: Path, address: str | None = None) -> DatasetReference:
    """Returns a reference to a dataset in its current state, or to the address that it is a copy of."""
    path = path.resolve()
    return DatasetReference(dataset=address or str(path), manifest_sha256=sha256_file(path / DATASET_FILE))


def read_manifest(path: Path) -> DatasetManifest:
    """Reads a dataset's manifest.

    Raises:
        SlmError: When the directory has no manifest, or it is damaged or of another version.
    """
    if not is_dataset(path):
        raise SlmError(f"not a prepared dataset: {path} has no {DATASET_FILE}", _AGAIN)
    return _parse(DatasetManifest, path)


def open_dataset(path: Path, progress: Progress | None = None) -> Dataset:
    """Opens a dataset, or the one that a run's data directory refers to. Its tokens stay on the disk.

    Args:
        path: The directory.
        progress: Receives notes about a remote dataset that is fetched.

    Raises:
        SlmError: When a file is missing, truncated, not the one in the manifest, or of another tokenizer, or when the dataset
            that a run refers to has changed.
    """
    if not is_dataset(path):
        raise SlmError(f"not a prepared dataset: {path} has no {DATASET_FILE}", _AGAIN)
    tokenizer = _load_tokenizer(path)
    if "dataset" in read_json(member(path, DATASET_FILE), DATASET_FILE):
        reference = _parse(DatasetReference, path)
        if is_remote(reference.dataset):
            return _opened_copy(reference.dataset, reference.manifest_sha256, tokenizer, progress)
        path = _followed(reference)
    return _opened(path, tokenizer)


def open_remote(address: str, progress: Progress | None = None) -> Dataset:
    """Opens the local copy of a remote dataset, which is fetched as far as it is missing or damaged.

    Args:
        address: The address, such as s3://bucket/stories.
        progress: Receives notes.

    Raises:
        SlmError: When the dataset cannot be fetched, or as `open_dataset`.
    """
    return _opened_copy(address, None, None, progress)


def _opened_copy(address: str, sha256: str | None, tokenizer: Tokenizer | None, progress: Progress | None) -> Dataset:
    # Imported here, because it imports the manifest from this module.
    from slm.train.data.remote.datasets import local_copy

    with local_copy(address, sha256, progress) as path:
        return replace(_opened(path, tokenizer or _load_tokenizer(path)), address=address)


def _opened(path: Path, tokenizer: Tokenizer) -> Dataset:
    manifest = read_manifest(path)
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise SlmError(f"{path}: the tokens were made with another tokenizer", "copy the dataset again")
    train, validation = (_open_split(path, split, manifest) for split in (manifest.train, manifest.validation))
    return Dataset(path, manifest, tokenizer, train, validation)


def _load_tokenizer(path: Path) -> Tokenizer:
    """Loads a dataset's tokenizer; none of its files may be a link out of the directory."""
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE):
        member(path, name)
    return Tokenizer.load(path)


def check_files(path: Path, manifest: DatasetManifest) -> None:
    """Compares every token file with the manifest, byte for byte.

    Raises:
        SlmError: When a file is missing or was altered; the message names it.
    """
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        file = member(path, shard.file)
        _check_header(file, shard, manifest)
        if sha256_file(file) != shard.sha256:
            raise SlmError(f"{path}: {shard.file} was altered after it was made (SHA-256 differs)", "copy it again")


def _totals(shards: tuple[Shard, ...]) -> tuple[int, int, int]:
    return (
        sum(shard.tokens for shard in shards),
        sum(shard.documents for shard in shards),
        sum(shard.text_bytes for shard in shards),
    )


def _parse(kind: type[_RecordT], path: Path) -> _RecordT:
    file = member(path, DATASET_FILE)
    return _validated(kind, read_json(file, DATASET_FILE), str(file))


def parse_manifest(fields: dict[str, Any], file: str) -> DatasetManifest:
    """Returns the manifest with the contents of a file.

    Raises:
        SlmError: When it is damaged or of another version; the message names the file.
    """
    return _validated(DatasetManifest, fields, file)


def _validated(kind: type[_RecordT], fields: dict[str, Any], file: str) -> _RecordT:
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        found = fields.get("format_version") if isinstance(fields, dict) else None
        raise SlmError(
            f"{file}: format version {found!r} is not {FORMAT_VERSION}",
            "prepare it again with this version of slm",
        )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise SlmError(f"{file} is wrong: {first_mistake(error)}", "copy it again, or prepare the data again") from None


def _followed(reference: DatasetReference) -> Path:
    """Returns the path of a dataset in the local file system, after comparing its manifest."""
    path = Path(reference.dataset)
    if not is_dataset(path):
        raise SlmError(f"the dataset that the run was started with is gone: {path}", "put it back where it was")
    if sha256_file(path / DATASET_FILE) != reference.manifest_sha256:
        raise SlmError(
            f"the dataset is not the one that the run was started with: {path}",
            "restore that dataset, or start a new run",
        )
    return path


def _open_split(path: Path, split: Split, manifest: DatasetManifest) -> Tokens:
    files = []
    for shard in split.shards:
        file = member(path, shard.file)
        files.append(map_ids(file, _check_header(file, shard, manifest)))
    header = TokenHeader(
        dtype=manifest.dtype,
        tokens=split.tokens,
        documents=split.documents,
        text_bytes=split.text_bytes,
        text_sha256=split.text_sha256,
        tokenizer_sha256=manifest.tokenizer_sha256,
    )
    return Tokens(header, TokenIds(files))


def _check_header(file: Path, shard: Shard, manifest: DatasetManifest) -> TokenHeader:
    header = read_header(file, manifest.tokenizer_sha256)
    listed = header.model_copy(update=shard.model_dump(include={"tokens", "documents", "text_bytes", "text_sha256"}))
    if header != listed or header.dtype != manifest.dtype:
        raise SlmError(f"the token file is not the one that {DATASET_FILE} lists: {file}", "copy the dataset again")
    return header
