"""`slm serve` as a process: it says where it listens, answers, and ends when it is told to."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from slm.core.manifest import Bundle


@pytest.fixture
def process(shared_bundle: Bundle, tmp_path: Path) -> Any:
    keys = tmp_path / "keys"
    keys.write_text("secret\n\n")
    command = [
        sys.executable,
        "-m",
        "slm",
        "serve",
        shared_bundle.path,
        "--port",
        "0",
        "--name",
        "m",
        "--api-key-file",
        keys,
    ]
    started = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    yield started
    started.kill()
    started.wait()


def listening(process: Any) -> str:
    """Waits until it serves and returns where."""
    said = ""
    while "listening" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    found = re.search(r"http://127.0.0.1:\d+/v1", said)
    assert found is not None
    return found[0]


def test_it_serves_until_it_is_stopped(process: Any) -> None:
    client = openai.OpenAI(base_url=listening(process), api_key="secret", max_retries=0)
    assert client.completions.create(model="m", prompt="One", max_tokens=3).choices[0].finish_reason == "length"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(30) == 128 + signal.SIGTERM and "Traceback" not in rest
    assert rest.splitlines()[-1] == "stopped" and "error" not in rest
    logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged] == [200, 401]


def test_what_is_under_way_is_finished_before_it_ends(process: Any) -> None:
    url = listening(process)
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
    options: Any = {"model": "m", "prompt": "One", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**options, temperature=0).choices[0].text
    stream = iter(client.completions.create(**options, temperature=0, stream=True))
    chunks = [next(stream)]
    process.send_signal(signal.SIGTERM)
    chunks += stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    rest = process.stderr.read()
    assert process.wait(30) == 128 + signal.SIGTERM and "Traceback" not in rest
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_what_cannot_be_served_is_refused(slm: Callable[..., Any], shared_checkpoint: Path, tmp_path: Path) -> None:
    assert slm("serve", shared_checkpoint, "--port", 0).code == 1
    (tmp_path / "keys").write_text("\n")
    result = slm("serve", "--api-key-file", tmp_path / "keys", "--port", 0)
    assert result.code == 1 and "no API key" in result.err
    assert slm("serve", "--adapter", "nameless", "--port", 0).code == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = slm("serve", "--port", taken.getsockname()[1])
    error, hint = result.err.strip().splitlines()
    assert result.code == 1 and "in use" in error and hint.startswith("hint: another --port")
