"""Paths and hashes of rows, by which a model's record names the rows that it was fine-tuned on."""

import hashlib
from pathlib import Path

from slm.core.files import sha256_file
from slm.core.text.files import find_files


def provenance(data: Path) -> dict[str, str]:
    """Returns path and hash of the rows; for a directory, a hash over its files' names and hashes."""
    if not data.is_dir():
        return {"path": str(data), "sha256": sha256_file(data)}
    listed = "".join(f"{sha256_file(file)}  {file.relative_to(data)}\n" for file in find_files(data))
    return {"path": str(data), "sha256": hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()}
