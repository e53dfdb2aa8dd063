"""Downloads from the Hugging Face hub, with a one-line explanation of every failure."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.core.errors import SlmError

# What can be imported, for hints.
SOURCES = "a Hugging Face directory, a .gguf file, or a model on the hub as OWNER/NAME"

# The needed files of a repository; the vision part of a multimodal model is in the same files.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Returns whether a source has the form of a hub id, OWNER/NAME, and is not an existing path."""
    return _ID.fullmatch(source) is not None and not Path(source).exists()


def download(repository: str, revision: str | None = None) -> Path:
    """Returns the directory of a model in the hub's cache, downloading it if necessary.

    Args:
        repository: OWNER/NAME.
        revision: Branch, tag or commit; None uses the main branch.

    Raises:
        SlmError: When the model is not available; the hint says what to do.
    """
    from huggingface_hub import snapshot_download

    with _explained(repository):
        # A pattern's * crosses directories; files in subdirectories belong to other formats or to the vision part.
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=["*/*"]))


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Converts the errors of huggingface_hub to SlmErrors with hints."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except errors.GatedRepoError:
        raise SlmError(
            f"{repository} is gated: its licence must be accepted first",
            f"accept it at {page}, then `hf auth login` or set HF_TOKEN to a token that may read it",
        ) from None
    except errors.RevisionNotFoundError:
        raise SlmError(f"{repository} has no such revision", f"{page}/tree/main lists them") from None
    except errors.RepositoryNotFoundError:
        raise SlmError(
            f"the hub has no model {repository}, or not for you",
            "check the spelling; for a private model `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise SlmError(
            f"{repository} is not in the hub's cache and "
            + ("HF_HUB_OFFLINE is set" if offline else "could not be downloaded"),
            "unset HF_HUB_OFFLINE" if offline else "check the network; or import a directory or a GGUF file",
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SlmError(
            f"{repository} could not be downloaded ({reason})",
            "check the network; or import a directory or a GGUF file",
        ) from None
