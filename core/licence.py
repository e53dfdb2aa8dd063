"""The licence that travels: whatever is made from Gemma's weights says so, with the terms and that it was modified.

Gemma's terms ask that whoever passes on the model or a derivative includes a notice file with a given sentence, and says
prominently that files were modified.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm.core.files import read_text
from slm.version import __version__

NOTICE_FILE = "NOTICE"
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"

_GEMMA = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    f"Terms of use: {GEMMA_TERMS}; prohibited uses: https://ai.google.dev/gemma/prohibited_use_policy",
)
# Gemma 3's vocabulary, with and without the rows for images. Nobody trains one of that size for a small model of his own.
_GEMMA_VOCABULARIES = (262_144, 262_208)

Notices = tuple[str, ...]


def licence_notices(licence: str | None, origin: str, vocab_size: object) -> Notices:
    """Returns the notices for weights that slm did not make.

    The vocabulary is evidence, the licence a claim: weights with Gemma's vocabulary are Gemma's, whatever else is stated.

    Args:
        licence: Its name as a model card or a GGUF file has it ("gemma", "apache-2.0"); None when nothing is stated.
        origin: Where they came from.
        vocab_size: How many tokens they know.
    """
    gemma = vocab_size in _GEMMA_VOCABULARIES or (licence is not None and licence.lower().startswith("gemma"))
    stated = (
        () if licence is None or licence.lower().startswith("gemma") else (f"{origin} states the licence {licence}",)
    )
    return (*(_GEMMA if gemma else ()), *stated)


def foreign_notices(path: Path, config: dict[str, Any]) -> Notices:
    """Returns the notices for a Hugging Face directory that slm did not make.

    Args:
        path: The directory; its model card may state a licence.
        config: The contents of its config.json.
    """
    text = config.get("text_config")
    vocab_size = (text if isinstance(text, dict) else config).get("vocab_size")
    return licence_notices(_card_licence(path / "README.md"), path.name, vocab_size)


def _card_licence(card: Path) -> str | None:
    """Returns the licence in a model card's front matter: a name, or the first of a list."""
    if not card.is_file():
        return None
    front = re.match(r"---\r?\n(.*?)\n---", read_text(card, "the model card"), flags=re.DOTALL)
    stated = front and re.search(
        r"^license:[ \t]*(?:\[|\n[ \t]*-)?[ \t]*[\"']?([\w.+-]+)", front[1], flags=re.MULTILINE
    )
    return stated[1] if stated else None


def recorded_notices(info: dict[str, Any]) -> Notices:
    """Returns the notices that an artifact's `slm.json` carries."""
    notices = info.get("notices", [])
    return tuple(str(notice) for notice in notices) if isinstance(notices, list | tuple) else ()


def is_gemma(notices: Sequence[str]) -> bool:
    """Says whether Gemma's terms are among the notices."""
    return _GEMMA[0] in notices


def modified(notices: Sequence[str], how: str) -> Notices:
    """Returns the notices with a statement of what was done; none when there were none.

    Args:
        notices: Those of what it was made from.
        how: What was done ("quantized to INT8").
    """
    return (*notices, f"Modified: {how} by slm {__version__}") if notices else ()


def write_notice(directory: Path, notices: Sequence[str]) -> None:
    """Writes the notices into an artifact's `NOTICE`; no file when there are none."""
    if notices:
        (directory / NOTICE_FILE).write_text("\n".join(notices) + "\n", encoding="utf-8")
    else:
        (directory / NOTICE_FILE).unlink(missing_ok=True)
