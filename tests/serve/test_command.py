"""`slm serve` as a process: it prints its address, serves, and ends on a signal."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from slm.core.manifest import Bundle


@pytest.fixture
def process(shared_bundle: Bundle, tmp_path: Path) -> Any:
    keys = tmp_path / "keys"
    keys.write_text("secret\n\n")
    command = [sys.executable, "-m", "slm", "serve", shared_bundle.path, "--port", "0"]
    command += ["--name", "m", "--api-key-file", keys]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    yield started
    started.kill()
    started.wait()


@dataclass(frozen=True)
class Said:
    """The output of a server at its start, and its address."""

    url: str
    text: str


def listening(process: Any) -> Said:
    """Waits until the server accepts connections."""
    said = ""
    while "listening" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    found = re.search(r"http://127.0.0.1:\d+/v1", said)
    assert found is not None
    return Said(found[0], said)


def test_it_serves_until_it_is_stopped(process: Any) -> None:
    said = listening(process)
    client = openai.OpenAI(base_url=said.url, api_key="secret", max_retries=0)
    assert f"page: {said.url.removesuffix('v1')}\n" in said.text and "fewer than 16 characters" in said.text
    assert "model m: prompts up to 256 tokens, completions up to 1,024 in 300 s\n" in said.text
    answer = client.completions.create(model="m", prompt="One", max_tokens=3, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(30) == 128 + signal.SIGTERM and "Traceback" not in rest
    assert rest.splitlines()[-1] == "stopped" and "error" not in rest
    logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged] == [200, 401]


def test_what_is_under_way_is_finished_before_it_ends(process: Any) -> None:
    url = listening(process).url
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


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e300", "x"])
@pytest.mark.parametrize("option", ["--grace", "--timeout", "--step-timeout"])
def test_times_are_numbers_of_seconds(slm: Callable[..., Any], option: str, value: str) -> None:
    result = slm("serve", option, value, "--port", 0)
    assert result.code == 2 and option in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--threads", 100_000), ("--slots", 10**9), ("--queue", 10**9), ("--prefix-mib", 10**9), ("--prefill-tokens", 10**9),
        ("--max-tokens", 10**12), ("--port", 65_536), ("--allow-host", "http://x"), ("--allow-host", "x:80"),
        ("--allow-host", ""), ("--cors-origin", "example.org"), ("--cors-origin", "https://example.org/page"),
    ],
)  # fmt: skip
def test_options_have_bounds(slm: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert slm("serve", *arguments).code == 2


@pytest.mark.parametrize("keys", [",", "", " ", " , ,\n", "a\x00b"])
def test_keys_that_are_none_are_refused(
    slm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    """A variable or file that holds no key is an error: the user wants a key to be required."""
    (tmp_path / "keys").write_text(keys.replace(",", "\n"))
    result = slm("serve", "--api-key-file", tmp_path / "keys", "--port", 0)
    assert result.code == 1 and "API key" in result.err
    if "\0" not in keys:  # which no variable can hold
        monkeypatch.setenv("SLM_API_KEYS", keys)
        result = slm("serve", "--port", 0)
        assert result.code == 1 and "SLM_API_KEYS" in result.err


def test_keys_are_read_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slm.cli.commands.serve import _api_keys

    (tmp_path / "keys").write_bytes("\ufeffone key\r\n\n  ключ\u2028x \nlast".replace("\u2028", "-").encode())
    assert _api_keys(tmp_path / "keys") == ["one key", "ключ-x", "last"]
    monkeypatch.setenv("SLM_API_KEYS", " a , b,,c ")
    assert _api_keys(None) == ["a", "b", "c"]
    monkeypatch.delenv("SLM_API_KEYS")
    assert _api_keys(None) == []


def test_what_is_unsafe_is_said() -> None:
    from slm.cli.commands.serve import _warnings

    key = "a-key-of-some-length"
    assert _warnings("127.0.0.1", [], []) == _warnings("0.0.0.0", [key], ["*"]) == _warnings("::1", [key], []) == []
    (open_to_all,) = _warnings("0.0.0.0", [], [])
    (pages,) = _warnings("127.0.0.1", [], ["*"])
    (short,) = _warnings("127.0.0.1", [key, "short"], [])
    assert "any client" in open_to_all and "any web page" in pages and "fewer than 16" in short


def test_what_cannot_be_served_is_refused(slm: Callable[..., Any], shared_checkpoint: Path, tmp_path: Path) -> None:
    assert slm("serve", shared_checkpoint, "--port", 0).code == 1
    (tmp_path / "keys").write_text("\n")
    result = slm("serve", "--api-key-file", tmp_path / "keys", "--port", 0)
    assert result.code == 1 and "no API key" in result.err
    assert slm("serve", "--adapter", "nameless", "--port", 0).code == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = slm("serve", "--port", taken.getsockname()[1])
    error, hint = result.err.strip().splitlines()
    assert result.code == 1 and "in use" in error and hint.startswith("hint: choose another --port")
