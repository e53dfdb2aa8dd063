"""Runs a command of slm on CUDA: `fake_cuda_commands.py BUNDLE COMMAND ARGUMENT...`; `{}` stands for the bundle.

Prints one JSON object: the exit code, and what the command printed.
"""

import contextlib
import io
import json
import sys

from slm.cli.main import main

bundle, *arguments = sys.argv[1:]
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        main([argument.replace("{}", bundle) for argument in arguments])
        code: object = 0
    except SystemExit as ended:
        code = ended.code or 0
print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}))
