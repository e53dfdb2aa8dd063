"""The language of a document, by py3langid's model, which comes with the package and needs no network."""

from collections.abc import Collection
from functools import cache
from typing import Any

from slm.core.errors import SlmError

# Minimum probability of the language, as py3langid normalizes it.
LEAST_PROBABILITY = 0.5
# The beginning of a document decides: the time grows with the length, and certainty hardly does.
CHARACTERS = 4_000


def language(text: str) -> str | None:
    """Returns the ISO 639-1 code of a document's language; None if no language reaches the minimum probability."""
    code, probability = _identifier().classify(text[:CHARACTERS])
    return str(code) if probability >= LEAST_PROBABILITY else None


def check_languages(codes: Collection[str]) -> None:
    """Checks that languages can be identified.

    Raises:
        SlmError: When a code is unknown.
    """
    known = sorted(map(str, _identifier().labels))
    for code in codes:
        if code not in known:
            raise SlmError(f"--language {code} is not a language that can be identified", f"one of {', '.join(known)}")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
