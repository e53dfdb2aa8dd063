"""The decision which documents of a dataset remain, made in the order of the text."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from slm.core.text.documents import whole
from slm.train.data.dedup import Seen, opened
from slm.train.data.selection.findings import examined, parts
from slm.train.data.selection.minhash import NearDuplicates
from slm.train.data.selection.settings import Selection, SelectionRecord

_NEAR = "near duplicate"


class Selector:
    """Keeps documents that pass the filters and are neither equal nor similar to an earlier one of any split.

    Attributes:
        selection: The settings.
        duplicates: Number of exact duplicates removed, by split.
        removed: Number of other documents removed, by split and reason.
    """

    def __init__(self, selection: Selection, seen: Seen, near: NearDuplicates | None) -> None:
        self.selection = selection
        self._seen = seen
        self._near = near
        self.duplicates: Counter[str] = Counter()
        self.removed: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}

    def keeps(self, finding: bytes, split: str) -> bool:
        """Returns whether the next document remains, and counts it otherwise.

        Raises:
            SlmError: When the hashes cannot be written.
        """
        reason, digest, signature = parts(finding, self.selection)
        if not reason and digest and not self._seen.add(digest):
            self.duplicates[split] += 1
            return False
        if not reason and self._near is not None and not self._near.add(signature):
            reason = _NEAR
        if reason:
            self.removed[split][reason] += 1
        return not reason

    def chosen(self, documents: Iterable[str], split: str, limit: int, workers: int) -> Generator[str]:
        """Yields the documents that remain.

        Args:
            documents: Documents from `read_parts`.
            split: "train" or "validation".
            limit: Maximum bytes of a whole document.
            workers: Number of processes that examine; the result does not depend on it.

        Raises:
            SlmError: When there is a part of a document, the hashes cannot be written, or a worker is killed.
        """
        every = whole(documents, limit, f"{self.selection.option} compares whole documents")
        # Closed at once in any case, because the workers end with it.
        with closing(examined(every, self.selection, workers)) as found:
            for document, finding in found:
                if self.keeps(finding, split):
                    yield document

    def record(self) -> SelectionRecord | None:
        """Returns the manifest's part; None if only exact duplicates could be removed."""
        selection = self.selection
        if not selection.filters and selection.near_duplicates is None:
            return None
        return SelectionRecord(
            near_duplicates=selection.near_duplicates,
            languages=selection.languages,
            quality=selection.quality,
            versions=selection.versions(),
            removed={split: dict(sorted(counts.items())) for split, counts in self.removed.items()},
        )


@contextmanager
def selecting(selection: Selection, file: Path) -> Iterator[Selector]:
    """Yields a selector that keeps hashes and signatures in a file, which is removed at the end."""
    with opened(file) as seen:
        threshold = selection.near_duplicates
        yield Selector(selection, seen, None if threshold is None else NearDuplicates(seen.connection, threshold))
