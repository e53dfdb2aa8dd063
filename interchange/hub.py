"""Models from the Hugging Face hub, with every way in which that fails explained in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.core.errors import SlmError

# All that is needed of a repository; the vision part of a multimodal one lies in the same files.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Says whether a source is spelt as a hub's id, OWNER/NAME, and is not a path that exists."""
    return _ID.fullmatch(source) is not None and not Path(source).exists()


def download(repository: str, revision: str | None = None) -> Path:
    """Downloads a model into the hub's cache, or finds it there, and returns its directory.

    Args:
        repository: OWNER/NAME.
        revision: Branch, tag or commit; None takes the main branch.

    Raises:
        SlmError: When it cannot be had; the hint says what to do.
    """
    from huggingface_hub import snapshot_download

    with _explained(repository):
        # A pattern's * crosses directories; what lies in one is another format's or a part for pictures.
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=["*/*"]))


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub into what a user can do about them."""
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
