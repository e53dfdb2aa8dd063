"""A server in this process, on a free port, with the random model of the tests."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import uvicorn

import slm
from slm.core.manifest import Bundle
from slm.loading import load_adapter
from slm.runtime.decoder import OnnxDecoder
from slm.serve.app import make_app
from slm.serve.engine import Engine
from slm.serve.service import Limits, Service

NAME = "random"


class Running:
    """A server on a free port."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._server = uvicorn.Server(
            uvicorn.Config(make_app(service), port=0, log_config=None, timeout_graceful_shutdown=2)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        for _ in range(1000):
            if self._server.started:
                break
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture
def serve(shared_bundle: Bundle) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(
        limits: Limits | None = None,
        keys: tuple[str, ...] = (),
        bundle: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
        **options: Any,
    ) -> Running:
        model = slm.load(bundle or shared_bundle.path)
        assert isinstance(model.decoder, OnnxDecoder)
        engine = Engine(model.decoder, model.tokenizer, model.stop_token_ids, **options)
        known = {name: load_adapter(path, model.decoder.bundle) for name, path in (adapters or {}).items()}
        service = Service(model, NAME, engine, known, limits or Limits(new_tokens=64), keys, grace_s=1)
        running.append(Running(service))
        return running[-1]

    yield start
    for each in running:
        each.stop()
