"""Text files: their kinds by name, and the files below a directory."""

import os
import stat
from pathlib import Path

from slm.core.errors import SlmError

# Manifest of a directory of `slm data prepare`, which holds tokens and no text.
DATASET_FILE = "dataset.json"

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TEXT = ".txt"
PARQUET = ".parquet"
JSON = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv")
# Below a directory, .json and .csv files usually describe the data, so they are read only if named.
_IN_DIRECTORIES = (TEXT, ".jsonl", ".ndjson", PARQUET)

ACCEPTED = (
    "slm reads .txt, .jsonl, .json, .csv and .tsv files, each of them also compressed (.gz, .bz2, .xz, .zst), "
    ".parquet files, and directories of .txt, .jsonl and .parquet files"
)
# Maximum number of entries below a directory.
_MOST_ENTRIES = 1_000_000
# Values besides paths that `slm train` and `slm data prepare` accept.
_HUB_PREFIX, _NAMES = "hf:", ("tinystories", "sample")


def kind(file: Path) -> str:
    """Returns the suffix of a file's kind, in lower case, without that of its compression."""
    return (Path(file.stem) if compression(file) else file).suffix.lower()


def compression(file: Path) -> str:
    """Returns the suffix of a file's compression, in lower case; "" if there is none."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def bare_name(file: Path) -> str:
    """Returns the name of a file without the suffixes of kind and compression: "pairs" for pairs.jsonl.gz."""
    return Path(file.stem).stem if compression(file) else file.stem


def is_dataset(path: Path) -> bool:
    """Returns whether a directory has the manifest of a prepared dataset."""
    return (path / DATASET_FILE).is_file()


def find_files(path: Path) -> list[Path]:
    """Returns the file, or for a directory all text files below it that are not hidden, sorted.

    Raises:
        SlmError: When the path does not exist or is of another kind, or a directory cannot be read or has no text file.
    """
    _check_exists(path)
    if is_dataset(path):
        raise SlmError(
            f"a prepared dataset holds tokens, not text: {path}",
            "only slm train --data accepts it, without other data; elsewhere name the original text",
        )
    if path.is_dir():
        return _below(path)
    if not is_text(path):
        raise SlmError(f"unknown kind of file: {path}", ACCEPTED)
    check_regular(path)
    return [path]


def check_regular(path: Path) -> None:
    """Checks that a path is a regular file, because opening a pipe or a device can block forever.

    Raises:
        SlmError: When it is not, or cannot be accessed.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise SlmError(f"cannot read {path} ({error.strerror})", "check the path and its permissions") from None
    if not regular:
        raise SlmError(f"not a regular file: {path}", "write its contents to a file first")


def is_text(file: Path) -> bool:
    """Returns whether the name of a file is that of text that slm reads."""
    what = kind(file)
    return what in (TEXT, *JSON, *TABLES) or (what == PARQUET and not compression(file))


def is_found(file: Path) -> bool:
    """Returns whether a file of this name is read below a directory, without being named."""
    return is_text(file) and kind(file) in _IN_DIRECTORIES


def _check_exists(path: Path) -> None:
    try:
        found = path.exists()
    except (OSError, ValueError):  # the name is too long, or has a zero byte
        found = False
    if found:
        return
    name = str(path)
    if name.startswith(_HUB_PREFIX) or name in _NAMES:
        raise SlmError(
            f"{name} is not a file: only slm train and slm data prepare read text by this name",
            "leave --data out to use the text that ships with slm"
            if name == "sample"
            else "download the dataset (hf download OWNER/NAME --repo-type dataset) and name its files",
        )
    if "://" in name or name.startswith(("https:/", "http:/")):
        raise SlmError(f"{name} is a URL, not a file", "download it and name the file")
    raise SlmError(f"data not found: {path}", f"check the path; {ACCEPTED}")


def _below(directory: Path) -> list[Path]:
    found: list[str] = []
    named: str | None = None  # a file that is read only if named
    entries = 0

    def fail(error: OSError) -> None:
        raise SlmError(f"cannot read {error.filename} ({error.strerror})", "check its permissions")

    for root, directories, files in os.walk(directory, onerror=fail):
        entries += len(files) + len(directories)
        # Hidden files belong to version control, notebooks and file managers.
        directories[:] = [name for name in directories if not name.startswith(".")]
        if entries > _MOST_ENTRIES:
            raise SlmError(
                f"{directory} holds more than {_MOST_ENTRIES:,} files and directories",
                "join the texts into fewer files, for example as JSON lines",
            )
        for name in files:
            file = Path(name)
            if name.startswith(".") or not is_text(file):
                continue
            path = f"{root.rstrip(os.sep)}{os.sep}{name}"
            if kind(file) not in _IN_DIRECTORIES:
                named = named or path
            elif os.path.isfile(path):  # noqa: PTH113  # for a million of them
                found.append(path)
    if not found:
        hint = f"name the files themselves: {named}" if named else ACCEPTED
        raise SlmError(f"no .txt, .jsonl or .parquet file in {directory}", hint)
    return [Path(file) for file in sorted(found, key=lambda file: file.split(os.sep))]  # noqa: PTH206
