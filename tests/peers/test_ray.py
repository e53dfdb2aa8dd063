"""Ray Serve on this machine: two replicas behind one address answer as `slm serve` does, streams included."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

import slm
from slm.core.manifest import Bundle

pytestmark = pytest.mark.peer

PACKAGES = Path(__file__).parents[2] / "build" / "peers" / "ray"
SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = Path(__file__).parents[2] / "examples"
REPLICAS = 2


@pytest.fixture(scope="module")
def address(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PACKAGES.is_dir():
        pytest.skip("no ray under build/peers; `make peers` installs it")
    said = tmp_path_factory.mktemp("ray") / "stderr"
    with said.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "ray_replicas.py"), str(EXAMPLES), str(shared_bundle.path), str(REPLICAS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONPATH": str(PACKAGES), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None and process.stdout is not None
        lines = iter(process.stdout.readline, "")
        line = next((line for line in lines if line.startswith("{")), None)
        assert line is not None, said.read_text()[-3000:]
        yield f"http://127.0.0.1:{json.loads(line)['port']}"
        process.stdin.close()
        assert process.wait(60) == 0
        process.stdout.close()


def test_replicas_answer_as_one(address: str, shared_bundle: Bundle) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    model = slm.load(shared_bundle.path)
    prompts = [f"One day {number}" for number in range(24)]
    wanted = [model.generate(prompt, max_new_tokens=12, temperature=0) for prompt in prompts]

    def whole(prompt: str) -> str:
        return client.completions.create(model="model", prompt=prompt, max_tokens=12, temperature=0).choices[0].text

    def streamed(prompt: str) -> str:
        chunks = client.completions.create(model="model", prompt=prompt, max_tokens=12, temperature=0, stream=True)
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
        assert len(pieces) > 1
        return "".join(pieces)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(whole, prompts)) == wanted
        assert list(pool.map(streamed, prompts)) == wanted
    assert wanted[0] != wanted[1]


def test_both_replicas_take_part(address: str) -> None:
    """Each has waited for its own texts, and says so when it is the one that is asked."""
    waited = set()
    for _ in range(40):
        metrics = httpx.get(f"{address}/metrics", timeout=30).text
        waited.add(
            next(line for line in metrics.splitlines() if line.startswith("slm_time_to_first_token_seconds_sum"))
        )
    assert len(waited) == REPLICAS, waited


def test_errors_pass_through(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="model", prompt="One day", temperature=9)
    assert httpx.get(f"{address}/ready", timeout=30).status_code == 200
    assert {model.id for model in client.models.list()} == {"model"}
