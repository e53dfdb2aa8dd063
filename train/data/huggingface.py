"""Text of Hugging Face datasets, through the `datasets` library: downloaded once and mapped, or streamed."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError
from slm.core.text.streams import DOCUMENT_BYTES, RAISE_LIMIT, size

# Names of validation splits.
_VALIDATION = ("validation", "valid", "val", "dev")
_ROWS = 1024
# Rows of a table with more bytes are converted to text one by one.
_AT_ONCE_BYTES = 16 << 20

_OTHER_COLUMN = "--column NAME reads another column"


class HubDataset:
    """The training split of a Hugging Face dataset, and its validation split if it has one.

    Args:
        name: OWNER/NAME, or a local directory that `datasets.load_dataset` understands.
        config: Name of a configuration; None uses the only one.
        split: Name of the training split.
        column: Name of the column that holds the text.
        streaming: Whether to read it over the network each time instead of downloading it.
        limit: Maximum UTF-8 bytes of a document.

    Raises:
        SlmError: When it cannot be loaded, or has no such split or column.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        streaming: bool = False,
        limit: int = DOCUMENT_BYTES,
    ) -> None:
        import datasets

        self.name = name
        self._column = column
        self._limit = limit
        # The five warnings about five retries add nothing to the error below.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        arguments: dict[str, Any] = ({} if config is None else {"name": config}) | (
            {"streaming": True} if streaming else {}
        )
        try:
            splits: Any = datasets.load_dataset(name, **arguments)
        except Exception as error:  # an error of datasets, huggingface_hub or httpx
            raise _not_loaded(name, error) from None
        if split not in splits:
            raise SlmError(
                f"{name} has no split {split!r}", f"slm data prepare --split names one of {', '.join(splits)}"
            )
        self._train = splits[split]
        validation = next((other for other in _VALIDATION if other in splits and other != split), None)
        self._validation = None if validation is None else splits[validation]
        for rows in (self._train, self._validation):
            names = None if rows is None else rows.column_names  # None also for a stream that was not opened
            if names is not None and column not in names:
                raise SlmError(f"{name} has no column {column!r}", f"{_OTHER_COLUMN}; there is {', '.join(names)}")

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self._validation is not None

    @property
    def licence(self) -> str | None:
        """The licence in the dataset's card."""
        return self._train.info.license or None

    @property
    def fingerprint(self) -> list[str | None]:
        """Values that change with the rows, as far as they are known before reading them."""
        return [getattr(rows, "_fingerprint", None) for rows in (self._train, self._validation)]

    @property
    def rows(self) -> tuple[int | None, int | None]:
        """Number of training and of validation rows, if known."""
        return _length(self._train), _length(self._validation)

    def train(self) -> Iterator[str]:
        """Yields the training documents."""
        return self._documents(self._train)

    def validation(self) -> Iterator[str]:
        """Yields the validation documents."""
        return self._documents(self._validation)

    def _documents(self, rows: Any) -> Iterator[str]:
        try:
            for row, document in enumerate(_texts(rows, self._column), 1):
                if not isinstance(document, str):
                    raise SlmError(f"{self.name}, row {row}: {self._column!r} is not text", _OTHER_COLUMN)
                if len(document) * 4 > self._limit and len(document.encode()) > self._limit:
                    raise SlmError(f"{self.name}, row {row}: is longer than {size(self._limit)}", RAISE_LIMIT)
                if document.strip():
                    yield document.strip("\r\n")
        except (SlmError, GeneratorExit):
            raise
        except Exception as error:  # the network failed in the middle of a stream
            raise _not_loaded(self.name, error) from None


def _length(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def _texts(rows: Any, column: str) -> Iterator[object]:
    if _length(rows) is None:  # a stream
        yield from (row.get(column) for row in rows)
        return
    # One table at a time: reading rows one by one takes longer than tokenizing them.
    for table in rows.select_columns([column]).with_format("arrow").iter(_ROWS):
        texts = table.column(0)
        yield from texts.to_pylist() if texts.nbytes <= _AT_ONCE_BYTES else (text.as_py() for text in texts)


def _not_loaded(name: str, error: Exception) -> SlmError:
    if Path(name).is_dir():
        reason = " ".join(str(error).split())[:200]
        return SlmError(
            f"{name} could not be loaded ({reason})", "it must be a directory that datasets.load_dataset loads"
        )
    return SlmError(
        f"{name} could not be downloaded ({type(error).__name__})",
        "--data sample needs no network; --data FILE trains on your own text",
    )
