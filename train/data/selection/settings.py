"""The options that select documents, and what they removed."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel, ConfigDict

from slm.core.errors import SlmError

# The packages of the extra `data`, which are imported only where their option is used.
MINHASH, IDENTIFIER = "rensa", "py3langid"
_INSTALL = "pip install 'slm-edge[data]'"

# Version of the rules in quality.py; a change of a rule changes which documents remain.
QUALITY_RULES = 1


class Selection(BaseModel):
    """Which documents a dataset keeps.

    Attributes:
        deduplicate: Whether to remove exact duplicates.
        near_duplicates: Minimum similarity, from 0 to 1, of two documents of which the later one is removed; None keeps both.
        languages: ISO 639-1 codes of the languages to keep; empty keeps all.
        quality: Whether to remove documents that break a rule of `slm.train.data.selection.quality`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    deduplicate: bool = False
    near_duplicates: float | None = None
    languages: tuple[str, ...] = ()
    quality: bool = False

    @property
    def filters(self) -> bool:
        """Whether documents are judged one by one, without others."""
        return bool(self.languages) or self.quality

    @property
    def selects(self) -> bool:
        """Whether anything can be removed."""
        return self.filters or self.deduplicate or self.near_duplicates is not None

    def check(self) -> None:
        """Checks that the packages of the options are installed, and that the languages are known.

        Raises:
            SlmError: When one is not; the hint has the command that installs the package.
        """
        for option, package, wanted in (
            ("--near-dedup", MINHASH, self.near_duplicates is not None),
            ("--language", IDENTIFIER, bool(self.languages)),
        ):
            if wanted and not _installed(package):
                raise SlmError(f"{option} needs the package {package}, which is not installed", _INSTALL)
        if self.languages:
            from slm.train.data.selection.language import check_languages

            check_languages(self.languages)

    @property
    def option(self) -> str:
        """An option that was given, for messages."""
        options = {
            "--dedup": self.deduplicate,
            "--near-dedup": self.near_duplicates is not None,
            "--language": bool(self.languages),
        }
        return next((option for option, given in options.items() if given), "--quality")

    def versions(self) -> dict[str, str]:
        """Returns the version of every package and set of rules that decides which documents remain."""
        found = {}
        if self.near_duplicates is not None:
            found[MINHASH] = _version(MINHASH)
        if self.languages:
            found[IDENTIFIER] = _version(IDENTIFIER)
        if self.quality:
            found["quality"] = str(QUALITY_RULES)
        return found


class SelectionRecord(BaseModel):
    """The part of a dataset's manifest about the selection; absent if nothing but exact duplicates could be removed.

    Attributes:
        near_duplicates: As in `Selection`.
        languages: As in `Selection`.
        quality: As in `Selection`.
        versions: Versions of the packages and rules that decided.
        removed: Number of removed documents by split and reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    near_duplicates: float | None
    languages: tuple[str, ...]
    quality: bool
    versions: dict[str, str]
    removed: dict[str, dict[str, int]]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(none)"


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    # A directory of that name in the working directory has no origin.
    return found is not None and found.origin is not None
