"""Checks of output paths, made before any work starts; every command uses the same rule.

Artifacts that slm can produce again (bundles, GGUF files, pages, imported, merged and trimmed checkpoints) are replaced when
the new one is complete. Trained weights and prepared datasets are replaced only if the user asks for it. Other files are never
replaced.
"""

import errno
import os
import sys
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryFile

from slm.core.checkpoint import CHECKPOINT_FILES, INFO_FILE, is_checkpoint, read_info
from slm.core.errors import SlmError
from slm.core.files import check_replaceable

ANOTHER = "name another --out"
OVERWRITE = "--overwrite replaces it; another --out keeps it"


def check_output(out: Path, ours: Collection[str]) -> None:
    """Checks that a directory of derived files can be written.

    Args:
        out: The directory.
        ours: The files, relative to `out`, of an older artifact of the same kind.

    Raises:
        SlmError: If the path is not writable, or the directory holds other files.
    """
    check_writable(out)
    check_replaceable(out.resolve(), ours)


def check_checkpoint_output(out: Path, *, overwrite: bool = False) -> None:
    """Checks that a checkpoint can be written.

    Args:
        out: The directory.
        overwrite: Whether trained weights in `out` may be replaced.

    Raises:
        SlmError: If the path is not writable, or the directory holds other files, or it holds trained weights and
            `overwrite` is False.
    """
    check_output(out, CHECKPOINT_FILES)
    if not is_checkpoint(out):
        return
    if not (out / INFO_FILE).is_file():
        raise SlmError(f"{out} holds a model that slm did not write", ANOTHER)
    if not overwrite and is_trained(out):
        raise SlmError(f"{out} holds trained weights", OVERWRITE)


def is_trained(checkpoint: Path) -> bool:
    """Returns whether training wrote a checkpoint: no command can produce it again from its source."""
    record = read_info(checkpoint)
    derived = record.keys() & {"merged", "combined", "trimmed"}
    return "finetuned" in record or (record.get("made_by") == "slm train" and not derived)


def check_writable(target: Path) -> None:
    """Checks that a file or directory can be created: its nearest existing parent must be writable.

    Raises:
        SlmError: If it cannot be created; the message names the directory.
    """
    above = target.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        if above == target.absolute():  # the target is a file; the caller's writer checks it
            above = above.parent
        else:
            raise SlmError(f"cannot write {target}: {above} is not a directory", ANOTHER)
    if not os.access(above, os.W_OK | os.X_OK):
        raise _unwritable(target, above, _reason(above))
    try:
        with TemporaryFile(dir=above):  # permission bits do not show this: /proc, network file systems, no free inodes
            pass
    except OSError as error:
        raise _unwritable(target, above, error.errno or errno.EIO) from None


def _reason(directory: Path) -> int:
    if sys.platform != "win32" and hasattr(os, "statvfs") and os.statvfs(directory).f_flag & os.ST_RDONLY:
        return errno.EROFS
    return errno.EACCES


def _unwritable(target: Path, above: Path, number: int) -> SlmError:
    return SlmError(
        f"cannot write {target}: {above} is not writable ({os.strerror(number)})",
        "name a writable directory with --out, or run the command in another directory",
    )
