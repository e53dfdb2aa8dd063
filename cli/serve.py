"""`slm serve`."""

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.choosing import default_model
from slm.cli.console import say
from slm.cli.options import Artifact, adapter_type
from slm.cli.sampling import warn_of_saturation
from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.core.machine import return_freed_memory
from slm.core.names import short_name

if TYPE_CHECKING:
    import uvicorn

_KEYS = "SLM_API_KEYS"


@click.command()
@click.argument("model", type=Artifact(checkpoints=False), required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="What requests call the model. [default: RUN/BUNDLE]")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=PATH",
    help="A LoRA adapter that requests may name as their model; may be repeated.",
)  # fmt: skip
@click.option("--slots", type=click.IntRange(1, 256), default=8, show_default=True, help="Answers under way at once.")
@click.option("--queue", type=click.IntRange(min=0), default=64, show_default=True, help="Answers that may wait.")
@click.option("--prefill-tokens", type=click.IntRange(min=1), default=256, show_default=True,
              help="The most of prompts that is read between two steps.")  # fmt: skip
@click.option("--prefix-mib", type=click.IntRange(min=0), default=256, show_default=True,
              help="Memory for beginnings of prompts, which are not read again; as much for each adapter.")  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="New tokens of an answer."
)
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), help="Tokens of a prompt. [default: the context]")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=300.0, show_default=True, metavar="S",
              help="When an answer is cut off.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE",
              help=f"API keys, one a line; or {_KEYS} in the environment, with commas. [default: none asked for]")  # fmt: skip
@click.option("--grace", type=click.FloatRange(min=0), default=30.0, show_default=True, metavar="S",
              help="How long answers may go on when the server is stopped.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: usable physical cores]")
def serve(
    model: Path | None,
    host: str,
    port: int,
    name: str | None,
    adapters: tuple[str, ...],
    slots: int,
    queue: int,
    prefill_tokens: int,
    prefix_mib: int,
    max_tokens: int,
    max_prompt_tokens: int | None,
    timeout: float,
    api_key_file: Path | None,
    grace: float,
    device: str,
    threads: int | None,
) -> None:
    """Answer over HTTP as OpenAI's API does: chats, completions, streams, JSON schemas.

    Without MODEL, the newest bundle under ./runs, or the small model that ships inside. New requests join between steps;
    when all slots and the queue are taken, the answer is 429 with Retry-After. Logs are JSON lines without what was asked or
    answered. It listens on this machine alone unless --host says otherwise.

    \b
      slm serve
      slm serve runs/tiny/onnx-int8 --port 8080 --slots 16
      slm serve runs/tiny/onnx-slots --adapter pirate=pirate.onnx_adapter
      curl localhost:8000/v1/completions -H 'content-type: application/json' \\
           -d '{"model": "model", "prompt": "One day", "max_tokens": 20}'

    docs/serve.md says what is served.
    """
    import uvicorn

    from slm.loading import load, load_adapter
    from slm.runtime.decoder import OnnxDecoder
    from slm.serve.app import make_app
    from slm.serve.engine import Engine
    from slm.serve.service import Limits, Service

    return_freed_memory()
    keys = _api_keys(api_key_file)
    listening = _listen(host, port)  # before anything is loaded, which may take a while
    path = model or default_model(bundle=True)
    loaded = load(path, device=device, threads=threads)  # type: ignore[arg-type]  # click checked
    decoder = loaded.decoder
    if not isinstance(decoder, OnnxDecoder):
        raise SlmError(f"{path} is a checkpoint", "slm export --onnx makes a bundle of it, which can be served")
    warn_of_saturation(decoder)
    known = {}
    for each in adapters:
        called, _, where = each.partition("=")
        if not called or not where:
            raise click.UsageError(f"--adapter {each}: NAME=PATH")
        known[called] = load_adapter(adapter_type.convert(where, None, None), decoder.bundle)
    engine = Engine(
        decoder,
        loaded.tokenizer,
        loaded.stop_token_ids,
        slots=slots,
        queue=queue,
        prefill_tokens=prefill_tokens,
        prefix_bytes=prefix_mib << 20,
    )
    limits = Limits(prompt_tokens=max_prompt_tokens, new_tokens=max_tokens, seconds=timeout)
    service = Service(loaded, name or short_name(path), engine, known, limits, keys, grace)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    say(f"{path}: {decoder.description}, {slots} slots, {engine.figures.cache_bytes / 2**20:.0f} MiB of caches so far")
    if host not in ("127.0.0.1", "::1", "localhost") and not keys:
        say("warning: everybody who reaches this address may ask; --api-key-file keeps others out")
    _run(config, listening)


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that connections can come to.

    Raises:
        SlmError: When the address is taken or not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SlmError(f"cannot listen on {host}:{port} ({reason})", "another --port, or another --host") from None


def _api_keys(file: Path | None) -> list[str]:
    said = os.environ.get(_KEYS, "").split(",") if file is None else read_text(file, "API keys").splitlines()
    keys = [key.strip() for key in said if key.strip()]
    if file is not None and not keys:
        raise SlmError(f"no API key in {file}", "one a line")
    return keys


def _run(config: "uvicorn.Config", listening: socket.socket) -> None:
    """Serves until it is stopped, and says where once it does."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            address, port = listening.getsockname()[:2]
            say(f"listening on http://{f'[{address}]' if ':' in address else address}:{port}/v1")

    server = Server(config)
    try:
        server.run(sockets=[listening])
    except (KeyboardInterrupt, SystemExit) as end:
        # Told to end, it has ended as it should: that is no error, though the exit code says by which signal.
        if server.started:
            say("stopped")
            raise SystemExit(130 if isinstance(end, KeyboardInterrupt) else end.code) from None
        raise
