"""What is found about a document without others: the first filter that rejects it, its hash and its signature.

Findings have a fixed size, so that those of many documents are a file: one byte for the reason, 32 for the hash if exact
duplicates are removed, 512 for the signature if near duplicates are removed.
"""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain, islice

from slm.train.data.selection.language import language
from slm.train.data.selection.minhash import SIGNATURE_BYTES, signature
from slm.train.data.selection.quality import fault
from slm.train.data.selection.settings import Selection
from slm.train.data.workers import mapped, serve

# The names of reasons in the manifest; a finding has the index. New ones go to the end.
REASONS = (
    "",
    "language",
    "too short",
    "too long",
    "word length",
    "symbols",
    "bullets",
    "ellipses",
    "few words",
    "stop words",
    "placeholder or code",
    "repeated lines",
    "repeated words",
)
_DIGEST_BYTES = 32

# Documents examined together: filters take about a second for a megabyte.
_BATCH_CHARACTERS = 1 << 17
# A text of at most this many batches is done before workers have started.
_WORTH_WORKERS = 8


def size_of(selection: Selection) -> int:
    """Returns the bytes of a finding."""
    return 1 + _DIGEST_BYTES * selection.deduplicate + SIGNATURE_BYTES * (selection.near_duplicates is not None)


def examine(text: str, selection: Selection) -> bytes:
    """Returns the finding about a document; a rejected one has no hash and no signature, but zeros."""
    reason = rejected_for(text, selection)
    if reason:
        return bytes([REASONS.index(reason)]).ljust(size_of(selection), b"\0")
    digest = hashlib.sha256(text.strip().encode()).digest() if selection.deduplicate else b""
    return b"\0" + digest + (b"" if selection.near_duplicates is None else signature(text))


def rejected_for(text: str, selection: Selection) -> str | None:
    """Returns the reason for which the filters reject a document; None if they accept it."""
    found = language(text) if selection.languages else None
    if selection.languages and found not in selection.languages:
        return "language"
    return fault(text, english=found == "en") if selection.quality else None


def parts(finding: bytes, selection: Selection) -> tuple[str, bytes, bytes]:
    """Returns the reason, hash and signature of a finding; empty where there is none."""
    after = 1 + _DIGEST_BYTES * selection.deduplicate
    return REASONS[finding[0]], finding[1:after], finding[after:]


def examined(documents: Iterable[str], selection: Selection, workers: int) -> Generator[tuple[str, bytes]]:
    """Yields documents with their findings, in order. The findings do not depend on `workers`.

    Raises:
        SlmError: When a worker is killed.
    """
    batches = _batches(documents)
    costly = selection.filters or selection.near_duplicates is not None
    first = list(islice(batches, _WORTH_WORKERS + 1)) if workers > 1 and costly else []
    if len(first) <= _WORTH_WORKERS:
        for document in chain.from_iterable(chain(first, batches)):
            yield document, examine(document, selection)
        return
    code = "from slm.train.data.selection.findings import work; work()"
    encoded = ([document.encode() for document in batch] for batch in chain(first, batches))
    for batch, found in mapped(encoded, workers, code, selection.model_dump_json()):
        for text, finding in zip(batch, found, strict=True):
            yield text.decode(), finding


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def work() -> None:
    """Runs a worker: examines documents by the settings in its argument until its input ends."""

    def examine_all(settings: str, texts: Sequence[bytes]) -> list[bytes]:
        selection = Selection.model_validate_json(settings)
        return [examine(text.decode(), selection) for text in texts]

    serve(examine_all)
