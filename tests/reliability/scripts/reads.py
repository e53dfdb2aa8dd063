"""Reads a file as a command would, and prints the peak of resident memory that this took, in MiB, and what was said.

`python reads.py documents|parts|rows|careless FILE`
"""

import json
import resource
import sys
from pathlib import Path

import numpy  # noqa: F401
import pyarrow.parquet  # noqa: F401
import tokenizers  # noqa: F401

from slm.core.errors import SlmError
from slm.core.text.documents import read_documents, read_parts
from slm.core.text.files import find_files
from slm.finetune.rows import read_rows

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# No guard failed: the process cannot take the machine's memory.
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def _peak_kib() -> int:
    """Returns the peak of this program alone; ru_maxrss has that of the process that started it too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _read(how: str, path: Path) -> None:
    match how:
        case "documents":  # slm eval
            for file in find_files(path):
                for _ in read_documents(file):
                    pass
        case "parts":  # slm train, slm data prepare, slm quantize
            for file in find_files(path):
                for _ in read_parts(file):
                    pass
        case "rows":  # slm finetune
            read_rows(path)
        case "careless":  # what a reader without limits does, for the test of the test
            zstd.open(path).read()


before = _peak_kib()
said, hint = "", ""
try:
    _read(sys.argv[1], Path(sys.argv[2]))
except SlmError as error:
    said, hint = error.message, error.hint or ""
after = _peak_kib()
sys.stdout.write(json.dumps({"mib": (after - before) / 1024, "said": said, "hint": hint}) + "\n")
