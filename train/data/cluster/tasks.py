"""The tasks that run on the machines of a cluster. Each reads and writes the shared store, and can be done again at any time.

Arguments are JSON and results are bytes. Errors of the user's come back as JSON, with the name of the machine.
"""

import hashlib
import json
import os
import socket
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.text.documents import Beginning, whole
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.train.data.cluster.layout import unpacked
from slm.train.data.cluster.store import Store, scratch_directory, writable
from slm.train.data.selection.findings import examine
from slm.train.data.selection.settings import Selection
from slm.train.data.shards import Shard, shard_file
from slm.train.data.sources import FileRange, source_of
from slm.train.data.tokens import TokenFileWriter, dtype_name, little_endian
from slm.train.data.workers import encoded
from slm.version import __version__

_ERROR, _RESULT = b"E", b"R"
# Native libraries use one thread: the cluster runs a task per processor.
_ONE_THREAD = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_task(name: str, spec: str) -> bytes:
    """Runs a task; called on the machines of the cluster.

    Args:
        name: Name of the task.
        spec: Its arguments, as JSON.

    Returns:
        What `result_of` takes.
    """
    for variable in _ONE_THREAD:
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        arguments = json.loads(spec)
        _check_versions(arguments)
        with writable():
            return _RESULT + _TASKS[name](arguments)
    except SlmError as error:
        return _ERROR + json.dumps([f"{error.message} (on {socket.gethostname()})", error.hint]).encode()


def result_of(returned: bytes) -> bytes:
    """Returns the result of a task.

    Raises:
        SlmError: When the task raised it.
    """
    if returned.startswith(_ERROR):
        raise SlmError(*json.loads(returned.removeprefix(_ERROR)))
    return returned.removeprefix(_RESULT)


def _check_versions(spec: dict[str, Any]) -> None:
    """Checks that this machine makes the same bytes as the others."""
    found = {"slm": __version__} | Selection.model_validate(spec["selection"]).versions()
    for package, version in spec["versions"].items():
        if found[package] != version:
            raise SlmError(
                f"a machine of the cluster has {package} {found[package]}, and the one that prepares has {version}",
                "install the same versions on all machines",
            )


def _scan(spec: dict[str, Any]) -> bytes:
    """Returns bytes and characters of every document of a file, as uint64."""
    source = source_of(spec["source"])
    source.check()
    sizes = array("Q")
    size = characters = 0
    for part in source.parts(spec["column"], spec["limit"]):
        size, characters = size + len(part.encode()), characters + len(part)
        if not isinstance(part, Beginning):
            sizes.extend((size, characters))
            size = characters = 0
    return sizes.tobytes()


def _examine(spec: dict[str, Any]) -> bytes:
    """Writes the findings about the documents of a part."""
    store, selection = Store(spec["store"]), Selection.model_validate(spec["selection"])
    with store.writing(f"parts/{spec['part']}.findings") as path, path.open("wb") as out:
        for document in whole(_documents(spec), spec["limit"], f"{selection.option} compares whole documents"):
            out.write(examine(document, selection))
    return _noted(store, spec, {})


def _encode(spec: dict[str, Any]) -> bytes:
    """Writes the ids and the text of the documents of a part that are kept, and the tokens and bytes of each."""
    store, part = Store(spec["store"]), spec["part"]
    documents = _documents(spec)
    if spec["kept"] is not None:
        kept = unpacked(store.read(f"parts/{part}.kept"), spec["documents"])
        documents = (document for document, keep in zip(documents, kept, strict=True) if keep)
    index, tokens, size = array("Q"), 0, 0
    with scratch_directory() as scratch:
        tokenizer = _tokenizer(store, scratch)
        itemsize = little_endian(dtype_name(tokenizer)).itemsize
        with (
            store.writing(f"parts/{part}.ids") as ids_path,
            store.writing(f"parts/{part}.text") as text_path,
            ids_path.open("wb") as ids_out,
            text_path.open("wb") as text_out,
        ):
            for batch in encoded(documents, tokenizer, scratch / TOKENIZER_FILE, 1):
                for piece, ids in batch:
                    ids_out.write(ids)
                    text_out.write(piece.text + b"\0" * piece.ends)
                    tokens, size = tokens + len(ids) // itemsize, size + len(piece.text) + piece.ends
                    if piece.ends:
                        index.extend((tokens, size))
                        tokens = size = 0
    store.write(f"parts/{part}.index", index.tobytes())
    return _noted(store, spec, {"documents": len(index) // 2})


def _shard(spec: dict[str, Any]) -> bytes:
    """Writes a token file from slices of parts."""
    store, name = Store(spec["store"]), shard_file(spec["split"], spec["number"])
    itemsize = little_endian(spec["dtype"]).itemsize
    with store.writing(name) as path:
        writer = TokenFileWriter(path, spec["dtype"], spec["tokenizer_sha256"])
        try:
            for part, first_token, last_token, first_byte, last_byte, documents in spec["slices"]:
                for block in store.blocks(f"parts/{part}.ids", first_token * itemsize, last_token * itemsize):
                    writer.add(b"", block, 0)
                for block in store.blocks(f"parts/{part}.text", first_byte, last_byte):
                    writer.add(block, b"", 0)
                writer.add(b"", b"", documents)
            header = writer.close()
        except BaseException:
            writer.abandon()
            raise
        fields = header.model_dump(include={"tokens", "documents", "text_bytes", "text_sha256"})
        shard = Shard(file=name, bytes=path.stat().st_size, sha256=sha256_file(path), **fields)
    return _noted(store, spec, shard.model_dump())


def _hash(spec: dict[str, Any]) -> bytes:
    """Returns the hash of the text of all parts of a split."""
    store, digest = Store(spec["store"]), hashlib.sha256()
    for part in spec["parts"]:
        for block in store.blocks(f"parts/{part}.text"):
            digest.update(block)
    return _noted(store, spec, digest.hexdigest())


_TASKS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "scan": _scan,
    "examine": _examine,
    "encode": _encode,
    "shard": _shard,
    "hash": _hash,
}


def _noted(store: Store, spec: dict[str, Any], result: Any) -> bytes:
    store.note(spec["done"], spec["key"], result)
    return json.dumps(result).encode()


def _documents(spec: dict[str, Any]) -> Iterator[str]:
    """Yields the documents of a part."""
    for source, first, count in spec["ranges"]:
        yield from _range(FileRange(source_of(source), first, count, 0), spec["column"], spec["limit"])


def _range(wanted: FileRange, column: str, limit: int) -> Iterator[str]:
    wanted.source.check()
    ended = 0
    for part in wanted.source.parts(column, limit):
        if ended >= wanted.first:
            yield part
        ended += not isinstance(part, Beginning)
        if ended == wanted.first + wanted.documents:
            return
    raise SlmError(f"{wanted.source} has fewer documents than at the start", "leave the text as it is, and start again")


def _tokenizer(store: Store, scratch: Path) -> Tokenizer:
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        (scratch / name).write_bytes(store.read(name))
    return Tokenizer.load(scratch)
