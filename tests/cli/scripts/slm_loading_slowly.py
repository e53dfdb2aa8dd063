"""Runs slm, whose models load once a file exists. If it contains a text, loading fails with it."""

import sys
import time
from pathlib import Path

from slm import loading
from slm.cli.main import main
from slm.core.errors import SlmError

load = loading.load
gate = Path(sys.argv.pop(1))


def later(*arguments, **options):
    while not gate.exists():
        time.sleep(0.02)
    if reason := gate.read_text():
        raise SlmError(reason)
    return load(*arguments, **options)


loading.load = later
main()
