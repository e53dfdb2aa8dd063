"""Whether an artifact may be written to a place: looked at before any work, by one rule for all commands.

What slm can make again (bundles, GGUF files, pages, imported and merged checkpoints) is replaced once the new one is whole.
Trained weights and prepared datasets are replaced only when the user asks for it. Nothing else is replaced.
"""

import errno
import os
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryFile

from slm.core.checkpoint import CHECKPOINT_FILES, INFO_FILE, is_checkpoint, read_info
from slm.core.errors import SlmError
from slm.core.files import check_replaceable

ANOTHER = "name another --out"
OVERWRITE = "--overwrite replaces it; another --out keeps it"


def check_output(out: Path, ours: Collection[str]) -> None:
    """Makes sure that a directory of derived files can be written.

    Args:
        out: The directory.
        ours: The files, relative to it, that an older artifact of the same kind there consists of.

    Raises:
        SlmError: When the place cannot be written to, or something else stands there.
    """
    check_writable(out)
    check_replaceable(out.resolve(), ours)


def check_checkpoint_output(out: Path, *, overwrite: bool = False) -> None:
    """Makes sure that a checkpoint can be written.

    Args:
        out: The directory.
        overwrite: Whether trained weights there may be replaced.

    Raises:
        SlmError: When the place cannot be written to, something else stands there, or trained weights do that may not be
            replaced.
    """
    check_output(out, CHECKPOINT_FILES)
    if not is_checkpoint(out):
        return
    if not (out / INFO_FILE).is_file():
        raise SlmError(f"{out} holds a model that slm did not make", ANOTHER)
    if not overwrite and is_trained(out):
        raise SlmError(f"{out} holds trained weights", OVERWRITE)


def is_trained(checkpoint: Path) -> bool:
    """Says whether training made a checkpoint, so that no command can make it again from its source."""
    record = read_info(checkpoint)
    derived = record.keys() & {"merged", "combined"}
    return "finetuned" in record or (record.get("made_by") == "slm train" and not derived)


def check_writable(target: Path) -> None:
    """Makes sure that a file or directory can be made: the nearest directory above it that is there can be written to.

    Raises:
        SlmError: When it cannot; the directory is named.
    """
    above = target.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        if above == target.absolute():  # the writer checks the target itself
            above = above.parent
        else:
            raise SlmError(f"cannot write {target}: {above} is not a directory", ANOTHER)
    if not os.access(above, os.W_OK | os.X_OK):
        raise _unwritable(target, above, errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES)
    try:
        with TemporaryFile(dir=above):  # what permissions do not tell: /proc, a network's file system, no inodes left
            pass
    except OSError as error:
        raise _unwritable(target, above, error.errno or errno.EIO) from None


def _unwritable(target: Path, above: Path, number: int) -> SlmError:
    return SlmError(
        f"cannot write {target}: nothing can be made in {above} ({os.strerror(number)})",
        "name a place you may write to with --out, or work in another directory",
    )
