"""Agents of other frameworks call tools through `slm serve`: the requests that they send, and the responses that they read.

The model's tokens are given, so that the test does not depend on what a small model has learned; everything else is the server.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle
from slm.core.tools import Call, with_calls
from slm.runtime.generation import Generation
from slm.serve import engine
from slm.serve.service import Limits
from tests.peers.conftest import SCRIPTS, environment
from tests.serve.conftest import Running, servers
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


@pytest.fixture
def scripted(running: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], list[str]]:
    """Makes the model of the server give answers, one for each request. Returns the list that the prompts will be in."""
    tokenizer = running.service.model.tokenizer

    def script(answers: Sequence[str]) -> list[str]:
        left, prompts = iter(answers), list[str]()

        class Given(Generation):
            def __init__(self, request: Any, *rest: Any, **options: Any) -> None:
                super().__init__(request, *rest, **options)
                prompts.append(tokenizer.decode(list(request.prompt)))
                tokens = iter([*tokenizer.encode_literal(next(left)), *running.service.model.stop_token_ids])
                self._next = lambda logits: next(tokens)

        monkeypatch.setattr(engine, "Generation", Given)
        return prompts

    return script


def run(script: str, package: str, url: str) -> Any:
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / script), f"{url}/v1"]
    env = environment(package) | {"PYTHONSAFEPATH": ""}  # the scripts import `light` from their folder
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_openais_framework(running: Running, scripted: Callable[[Sequence[str]], list[str]]) -> None:
    replies = [with_calls("Let me see.", [SET]), "It is at 40 percent."]
    prompts = scripted(replies * 2)
    found = run("openai_agents.py", "agents", running.url)
    assert found["answer"] == found["streamed"] == "It is at 40 percent."
    assert found["calls"] == [SET.arguments] * 2
    assert "raw_response_event" in found["events"]
    assert "set_light{room: string (The room.), level: integer (In percent.)}: Sets a light." in prompts[0]
    assert SAID in prompts[1] and with_calls("Let me see.", [SET]) in prompts[1]


def test_smolagents(running: Running, scripted: Callable[[Sequence[str]], list[str]]) -> None:
    prompts = scripted([with_calls("", [SET]), with_calls("", [Call("final_answer", {"answer": "At 40 percent."})])])
    found = run("smolagents_agent.py", "smolagents", running.url)
    assert found == {"answer": "At 40 percent.", "calls": [SET.arguments]}
    assert "set_light{" in prompts[0] and SAID in prompts[1]
