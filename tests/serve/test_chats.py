"""Chats with a model that has its own template: rendered outside the event loop."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.serve import app

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SLOW = "{% if 'slow' in messages[0].content %}" + LOOPS + "{% endif %}"


@pytest.fixture(scope="module")
def foreign(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose template never ends for some conversations."""
    copy = tmp_path_factory.mktemp("foreign") / "checkpoint"
    shutil.copytree(shared_checkpoint, copy)
    ours = Tokenizer.load(shared_checkpoint)
    template = SLOW + "<start_of_turn>user\n{{ messages[0].content }}<end_of_turn>\n<start_of_turn>model\n"
    Tokenizer(ours.backend, ours.config | {"chat_template": template}).save(copy)
    return export_bundle(copy, copy.parent / "onnx").path


def chat(said: str) -> dict[str, Any]:
    return {"model": "random", "messages": [{"role": "user", "content": said}], "max_tokens": 1}


def test_no_chat_is_rendered_on_the_event_loop(
    serve: Callable[..., Any], foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds even for the shortest chat."""
    rendered_on: list[str] = []
    chat_ids = app.chat_ids

    def seen(*arguments: Any) -> list[int]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        rendered_on.append(threading.current_thread().name)
        return chat_ids(*arguments)

    monkeypatch.setattr(app, "chat_ids", seen)
    assert serve(bundle=foreign).post("/v1/chat/completions", chat("hi")).status_code == 200
    assert len(rendered_on) == 1 and rendered_on[0].startswith("slm-chat")


def test_a_conversation_that_takes_long_holds_nobody_up(
    serve: Callable[..., Any], foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.core.template.MAX_SECONDS", 1.5)  # of processor time, which the quick ones hardly take
    running = serve(bundle=foreign)
    assert running.post("/v1/chat/completions", chat("hi")).status_code == 200
    with ThreadPoolExecutor(2) as threads:
        slow = [threads.submit(running.post, "/v1/chat/completions", chat(f"slow {i}")) for i in range(2)]
        time.sleep(0.3)
        for path, body in (
            ("/v1/completions", {"model": "random", "prompt": "One", "max_tokens": 1}),
            ("/v1/chat/completions", chat("quick")),
        ):
            assert running.post(path, body).status_code == 200
        assert not any(each.done() for each in slow)
        for each in slow:
            assert (
                each.result().status_code == 400 and "chat template failed" in each.result().json()["error"]["message"]
            )
