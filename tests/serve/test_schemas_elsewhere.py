"""Schemas are checked within limits where the system has no fork, as on Windows, or no limit of memory, as on macOS."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from slm.core import child
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.constraint import Grammars
from slm.runtime.schema_check import Spawned
from tests.serve.test_schemas import EXPENSIVE, ORDINARY

WINDOWS = (
    "import os, psutil, signal, sys; del os.fork, os.nice, signal.setitimer; sys.modules['resource'] = None\n"
    "from importlib import util; find = util.find_spec\n"
    "util.find_spec = lambda name, package=None: None if name == 'resource' else find(name, package)\n"
)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    """All processes are as on Windows, also those that they start."""
    with pytest.MonkeyPatch.context() as patch:
        python = child.python
        prefix = f"{WINDOWS}from slm.core import child; python = child.python\n"
        prefix += f"child.python = lambda code, *arguments: python({WINDOWS!r} + code, *arguments)\n"
        patch.setattr(child, "python", lambda code, *arguments: python(prefix + code, *arguments))
        made = Grammars(tokenizer, 320, (0, 2))
        yield made
        made.close()


@pytest.mark.parametrize("name", list(ORDINARY)[:3])
def test_ordinary_schemas_are_followed(grammars: Grammars, name: str) -> None:
    assert 0 < grammars.json(ORDINARY[name])[0].allowed().sum() < 100


@pytest.mark.parametrize("name", ["optional characters", "multiples", "products", "ref to itself", "look-ahead"])
def test_expensive_schemas_are_refused_and_others_still_pass(grammars: Grammars, name: str) -> None:
    started = time.monotonic()
    with pytest.raises(SlmError, match="not supported"):
        grammars.json(EXPENSIVE[name])
    assert time.monotonic() - started < 20
    assert grammars.json({"type": "boolean"})[0].allowed().any()


def test_a_process_checks_many_schemas_and_is_replaced_after_one_that_takes_too_much(tokenizer: Tokenizer) -> None:
    checks = Spawned({"tokenizer": tokenizer.backend.to_str(), "size": 320, "stops": [0, 2]})
    assert checks.tried('{"type": "boolean"}') is None
    first = checks._process
    assert checks.tried('{"type": "nothing"}') and checks.tried('{"type": "integer"}') is None
    assert checks._process is first
    wrong: Any = checks.tried(json.dumps(EXPENSIVE["optional characters"]))
    assert "takes more than" in wrong
    assert checks.tried('{"type": "boolean"}') is None and checks._process is not first
    checks.end()
    assert checks._process is None
