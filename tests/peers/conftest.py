"""Other people's tools, which `make peers` puts under build/peers, one directory each, beside nothing of ours.

Each runs in a process of its own: the same package in another version cannot be imported twice.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2] / "build" / "peers"
SCRIPTS = Path(__file__).parent / "scripts"

Ask = Callable[..., Any]


def asker(name: str, script: str) -> Ask:
    """Returns a function that runs a script with a peer's packages first and returns the JSON it prints last."""
    packages = PEERS / name
    if not packages.is_dir():
        pytest.skip(f"no {name} under build/peers; `make peers` installs it")

    def ask(*arguments: object) -> Any:
        environment = os.environ | {"PYTHONPATH": str(packages), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.fixture(scope="session")
def transformers4() -> Ask:
    """transformers 4.57 with the tokenizers and hub packages that it wants."""
    return asker("transformers4", "transformers4.py")


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[[Path, Sequence[str], int], list[list[int]]]:
    """llama.cpp's greedy tokens: (file, prompts, how many) to ids."""
    ask = asker("llamacpp", "llama_cpp_greedy.py")
    return lambda file, prompts, count: ask(file, count, json.dumps(list(prompts)))


@pytest.fixture(scope="session")
def lm_eval() -> Ask:
    """lm-evaluation-harness, with our models and with its own reading of transformers' models."""
    return asker("lmeval", "lm_eval_answers.py")
