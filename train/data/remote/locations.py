"""Addresses such as s3://bucket/stories: which ones are supported, and their file systems.

Credentials come from the environment and the configuration files of each file system, never from an address: messages show
addresses, and recipes and manifests store them.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slm.core.errors import SlmError

# The protocols, and the package that fsspec needs for each.
_PACKAGES: dict[str, str | None] = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "memory": None,  # in this process only
}
# With one letter it would be a drive of Windows.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL | re.IGNORECASE)
# A secret may contain a slash. The names of Amazon's resources contain colons.
_PASSWORD = re.compile(r"(?!arn:)[^/]*:.*@", re.DOTALL)
_SIGNED = re.compile(
    r"[?&](sig|se|[^=&]*(x-amz-|x-goog-|token|secret|passw|signature|credential|access_?key|api_?key)[^=&]*)=",
    re.IGNORECASE,
)
_LOCAL = "file://"


def is_remote(name: str) -> bool:
    """Returns whether a value names a file or directory through fsspec, and not a path.

    Raises:
        SlmError: When the address contains credentials, also one of an unknown protocol, or nothing after the protocol.
    """
    found = _ADDRESS.fullmatch(name)
    if found is None:
        return False
    if _PASSWORD.match(found[2]) or _SIGNED.search(found[2]):
        raise SlmError(
            f"the {found[1]}:// address contains credentials, which would be stored and shown",
            "leave them out: fsspec's file systems read them from the environment or their configuration files",
        )
    if found[1] not in _PACKAGES:
        return False
    if not found[2].strip("/"):
        raise SlmError(f"{name} names no directory or file", f"for example {found[1]}://bucket/stories")
    return True


def check_path(name: str) -> None:
    """Checks that a value which is not an address is not like one.

    Raises:
        SlmError: When it has an unknown protocol, also one in upper case: it would be the name of a local directory.
    """
    if _ADDRESS.fullmatch(name):
        protocols = ", ".join(f"{protocol}://" for protocol, package in _PACKAGES.items() if package is not None)
        raise SlmError(f"{name} is an address of an unknown kind", f"slm knows {protocols} and file:///PATH")


def without_file_protocol(name: str) -> str:
    """Returns the path of a file:// address; any other name as it is."""
    return "/" + name.removeprefix(_LOCAL).lstrip("/") if name.startswith(f"{_LOCAL}/") else name


def joined(directory: str, name: str) -> str:
    """Returns the address of a file in a directory."""
    return f"{directory.rstrip('/')}/{name}"


def beside(directory: str, name: str) -> str:
    """Returns the address of a file in the parent of a directory.

    Raises:
        SlmError: When the directory has no parent that could hold files, such as a whole bucket.
    """
    parent, separator, last = directory.rstrip("/").rpartition("/")
    if not separator or not last or parent.endswith((":/", ":")):
        raise SlmError(
            f"{directory} is a whole bucket", f"name a directory in it, such as {directory.rstrip('/')}/stories"
        )
    return f"{parent}/{name}"


def file_system(address: str) -> Any:
    """Returns the fsspec file system of an address.

    Raises:
        SlmError: When fsspec or the package for the protocol is not installed, or the file system cannot be set up.
    """
    protocol = address.partition("://")[0]
    package = _PACKAGES[protocol]
    try:
        import fsspec
    except ImportError:
        raise SlmError(
            f"{protocol}:// needs the package fsspec, which is not installed", "pip install fsspec"
        ) from None
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):
        raise SlmError(
            f"{protocol}:// needs the package {package}, which is not installed", f"pip install {package}"
        ) from None
    with reported(address, "open"):
        # Without a cache of listings: another machine may have changed the directory.
        return fsspec.filesystem(protocol, use_listings_cache=False)


@contextmanager
def reported(address: str, action: str) -> Iterator[None]:
    """Turns errors of a file system into SlmErrors.

    Only the kind of an unknown error is shown, since its text may contain credentials.

    Args:
        address: What is accessed.
        action: The verb for the message, such as "read".
    """
    try:
        yield
    except (SlmError, GeneratorExit):
        raise
    except FileNotFoundError:
        raise SlmError(f"not found: {address}", "check the address, and that the credentials can see it") from None
    except PermissionError:
        raise SlmError(f"access denied: {address}", _CREDENTIALS) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space there: what is finished is kept, and the same command continues"
            if action != "write":
                hint = "free some space on the disk of the cache; SLM_CACHE=DIR sets another directory"
            raise SlmError(f"no space left to {action} {address}", hint) from None
        raise _failed(address, action, error) from None
    except Exception as error:
        raise _failed(address, action, error) from None


_CREDENTIALS = "credentials come from the environment or configuration of the file system, such as AWS_PROFILE"


def _failed(address: str, action: str, error: Exception) -> SlmError:
    return SlmError(f"cannot {action} {address} ({type(error).__name__})", f"check the network; {_CREDENTIALS}")
