"""Agents of other frameworks call tools through `slm serve`: the requests that they send, and the responses that they read.

The model's tokens are given, so that the test does not depend on what a small model has learned; everything else is the server.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle
from slm.core.tools import Call, with_calls
from slm.serve.service import Limits
from tests.peers.conftest import SCRIPTS, environment
from tests.serve.conftest import Running, servers
from tests.serve.scripted import script
from tests.serve.test_tools import long_bundle

pytestmark = pytest.mark.peer

SET = Call("set_light", {"room": "hall", "level": 40})
SAID = "the light in the hall is at 40 percent"


@pytest.fixture(scope="module")
def running(
    shared_bundle: Bundle, shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    bundle = long_bundle(shared_checkpoint, tmp_path_factory.mktemp("agents"), context=32768)
    for start in servers(shared_bundle):
        yield start(bundle=bundle, limits=Limits(new_tokens=1024))


def run(program: str, package: str, url: str) -> Any:
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / program), f"{url}/v1"]
    env = environment(package) | {"PYTHONSAFEPATH": ""}  # the scripts import `light` from their folder
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_openais_framework(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [with_calls("Let me see.", [SET]), "It is at 40 percent."]
    prompts = script(monkeypatch, running, replies * 2)
    found = run("openai_agents.py", "agents", running.url)
    assert found["answer"] == found["streamed"] == "It is at 40 percent."
    assert found["calls"] == [SET.arguments] * 2
    assert "raw_response_event" in found["events"]
    first, second = map(running.service.model.tokenizer.decode, prompts[:2])
    assert "set_light{room: string (The room.), level: integer (In percent.)}: Sets a light." in first
    assert SAID in second and with_calls("Let me see.", [SET]) in second


def test_smolagents(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [with_calls("", [SET]), with_calls("", [Call("final_answer", {"answer": "At 40 percent."})])]
    prompts = script(monkeypatch, running, replies * 2)
    found = run("smolagents_agent.py", "smolagents", running.url)
    assert found == {"answer": "At 40 percent.", "streamed": "At 40 percent.", "calls": [SET.arguments] * 2}
    first, second = map(running.service.model.tokenizer.decode, prompts[:2])
    assert "set_light{" in first and SAID in second
