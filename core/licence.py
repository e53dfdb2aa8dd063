"""Licence notices: every artifact made from Gemma's weights states the terms and that the weights were modified.

Under Gemma's terms, a distributor of the model or of a derivative includes a notice file with a fixed sentence, and states
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
# The sizes of Gemma 3's vocabulary, with and without the tokens for images. Small models of other origin do not have them.
_GEMMA_VOCABULARIES = (262_144, 262_208)

Notices = tuple[str, ...]


def licence_notices(licence: str | None, origin: str, vocab_size: object) -> Notices:
    """Returns the notices for weights that slm did not make.

    Weights with the size of Gemma's vocabulary count as Gemma's, whatever licence is stated.

    Args:
        licence: The licence's name as in a model card or a GGUF file ("gemma", "apache-2.0"); None if none is stated.
        origin: The source of the weights, for the notice.
        vocab_size: Number of tokens in the vocabulary.
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
    """Returns the licence in a model card's front matter; if it lists several, the first."""
    if not card.is_file():
        return None
    front = re.match(r"---\r?\n(.*?)\n---", read_text(card, "the model card"), flags=re.DOTALL)
    stated = front and re.search(
        r"^license:[ \t]*(?:\[|\n[ \t]*-)?[ \t]*[\"']?([\w.+-]+)", front[1], flags=re.MULTILINE
    )
    return stated[1] if stated else None


def recorded_notices(info: dict[str, Any]) -> Notices:
    """Returns the notices in an artifact's `slm.json`."""
    notices = info.get("notices", [])
    return tuple(str(notice) for notice in notices) if isinstance(notices, list | tuple) else ()


def is_gemma(notices: Sequence[str]) -> bool:
    """Returns whether the notices include Gemma's terms."""
    return _GEMMA[0] in notices


def modified(notices: Sequence[str], how: str) -> Notices:
    """Returns the notices with a line that states the modification; no notices if there were none.

    Args:
        notices: The notices of the source.
        how: The modification ("quantized to INT8").
    """
    return (*notices, f"Modified: {how} by slm {__version__}") if notices else ()


def write_notice(directory: Path, notices: Sequence[str]) -> None:
    """Writes the notices to an artifact's `NOTICE`, or deletes the file if there are none."""
    if notices:
        (directory / NOTICE_FILE).write_text("\n".join(notices) + "\n", encoding="utf-8", newline="")
    else:
        (directory / NOTICE_FILE).unlink(missing_ok=True)
