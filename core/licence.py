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


def licence_notices(licence: str | None, origin: str) -> Notices:
    """Returns the notices for weights that state a licence.

    Args:
        licence: Its name as a model card or a GGUF file has it ("gemma", "apache-2.0"); None when nothing is stated.
        origin: Where they came from.
    """
    if licence is None:
        return ()
    return _GEMMA if licence.lower().startswith("gemma") else (f"{origin} states the licence {licence}",)


def foreign_notices(path: Path, config: dict[str, Any]) -> Notices:
    """Returns the notices for a Hugging Face directory that slm did not make.

    Its model card decides; without one, Gemma's vocabulary says that the weights are Gemma's.

    Args:
        path: The directory.
        config: The contents of its config.json.
    """
    card = path / "README.md"
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", read_text(card, "the model card"), flags=re.DOTALL)
        stated = front and re.search(r"^license:\s*[\"']?([^\s\"'#]+)", front[1], flags=re.MULTILINE)
        if stated:
            return licence_notices(stated[1], path.name)
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    return _GEMMA if size in _GEMMA_VOCABULARIES else ()


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
