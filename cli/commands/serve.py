"""`slm serve`."""

import gc
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.choosing import default_model
from slm.cli.console import say
from slm.cli.listening import cannot_listen
from slm.cli.options import (
    MAX_PORT,
    Artifact,
    FilePath,
    HostName,
    Loading,
    Real,
    Whole,
    Word,
    adapter_type,
    allow_slow_option,
    collects,
    collects_loading,
    cuda_graph_option,
    threads_option,
    trust_option,
)
from slm.cli.sampling import warn_of_conversions, warn_of_saturation
from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.core.machine import return_freed_memory
from slm.core.names import short_name
from slm.web.hosts import hosts_of, is_loopback

if TYPE_CHECKING:
    from slm.runtime.adapters import Adapter
    from slm.runtime.model import Model
    from slm.serve.engine import Engine
    from slm.serve.service import Service

_KEYS = "SLM_API_KEYS"
# A shorter key, in characters, can be guessed.
_SHORT_KEY = 16
# The default limit of a step in seconds, which holds for pieces of a prompt of up to so many tokens.
_STEP_S = 30.0
_PIECE = 1024
_DAY_S = 86_400.0


class _Origin(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions only
    name = "origin"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the origin as browsers spell it."""
        from slm.serve.access import origin_of

        origin = origin_of(str(value))
        if origin is None:
            self.fail(
                f"{value!r} is not an origin such as https://example.org or http://localhost:3000, or *.", param, ctx
            )
        return origin


@dataclass(frozen=True)
class Network:
    """Where the server listens, and who may use it.

    Attributes:
        host: The address to listen on.
        port: The port; 0 takes a free one.
        api_key_file: The file with the API keys; None for those of the environment.
        hosts: Host names that requests may use.
        origins: Origins of web pages that may use the API.
        grace: How long running requests may continue when the server is stopped, in seconds.
    """

    host: str
    port: int
    api_key_file: Path | None
    hosts: tuple[str, ...]
    origins: tuple[str, ...]
    grace: float


@dataclass(frozen=True)
class EngineOptions:
    """How many completions the engine runs, and the memory and time for them; see `slm.serve.engine.Engine`."""

    slots: int
    queue: int
    prefill_tokens: int
    prefix_mib: int
    step_timeout: float | None


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one request; see `slm.serve.service.Limits`."""

    max_tokens: int
    max_prompt_tokens: int | None
    timeout: float


@click.command()
@click.argument("model", type=Artifact(checkpoints=False), required=False)
@click.option(
    "--host",
    type=Word(),
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is every address.",
)
@click.option("--port", type=Whole(0, MAX_PORT), default=8000, show_default=True, help="Port; 0 takes a free one.")
@click.option("--name", type=Word(), help="Name of the model in requests. [default: RUN/BUNDLE]")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=PATH",
    help="LoRA adapter that requests can select as their model (repeatable).",
)  # fmt: skip
@click.option("--slots", type=Whole(1, 256), default=8, show_default=True, help="Completions that run at once.")
@click.option(
    "--queue", type=Whole(0, 100_000), default=64, show_default=True, help="Completions that may wait for a slot."
)
@click.option("--prefill-tokens", type=Whole(1, 1 << 20), default=256, show_default=True,
              help="The most prompt tokens read between two steps.")  # fmt: skip
@click.option("--prefix-mib", type=Whole(0, 1 << 20), default=256, show_default=True,
              help="Memory for cached prefixes of prompts, for the base and for each adapter.")  # fmt: skip
@click.option(
    "--max-tokens", type=Whole(1, 1 << 20), default=1024, show_default=True, help="The most new tokens of a completion."
)
@click.option("--max-prompt-tokens", type=Whole(1, 1 << 20), help="The most tokens of a prompt. [default: the context]")
@click.option("--timeout", type=Real(0, _DAY_S, min_open=True), default=300.0, show_default=True, metavar="S",
              help="Time limit of a request, in seconds.")  # fmt: skip
@click.option("--step-timeout", type=Real(0, _DAY_S, min_open=True), metavar="S",
              help="Time limit of a step, in seconds: after it, /health and /ready return 503 until the step returns. "
                   "[default: 30, or --timeout if shorter]")  # fmt: skip
@click.option("--api-key-file", type=FilePath(), metavar="FILE",
              help=f"API keys, one per line; or {_KEYS} in the environment, separated by commas. "
                   "[default: no key required]")  # fmt: skip
@click.option("--allow-host", "hosts", type=HostName(), multiple=True, metavar="NAME",
              help="Host name that requests may use (repeatable). [default: localhost, 127.0.0.1 and [::1] for a server "
                   "on this machine without keys, any name otherwise]")  # fmt: skip
@click.option("--cors-origin", "origins", type=_Origin(), multiple=True, metavar="ORIGIN",
              help="Origin of web pages that may use the API from a browser (repeatable); * is every origin.")  # fmt: skip
@click.option("--grace", type=Real(0, _DAY_S), default=30.0, show_default=True, metavar="S",
              help="Time that running requests have after the server is stopped, in seconds.")  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@cuda_graph_option
@threads_option
@trust_option
@allow_slow_option
@collects_loading
@collects("network", Network)
@collects("limits", RequestLimits)
@collects("engine", EngineOptions)
def serve(
    model: Path | None,
    name: str | None,
    adapters: tuple[str, ...],
    network: Network,
    engine: EngineOptions,
    limits: RequestLimits,
    loading: Loading,
) -> None:
    """Serve a bundle over HTTP with an OpenAI-compatible API: chats, completions, streams, JSON schemas.

    Without MODEL, uses the newest bundle under ./runs, or the bundled demo model if there is none. New requests join between
    steps. When all slots and the queue are full, the status is 429 with Retry-After. Logs are JSON lines without prompts and
    completions. The server accepts connections from this machine only, unless --host sets another address.

    \b
      slm serve
      slm serve runs/tiny/onnx-int8 --port 8080 --slots 16
      slm serve runs/tiny/onnx-slots --adapter pirate=pirate.onnx_adapter
      curl localhost:8000/v1/completions -d '{"prompt": "One day", "max_tokens": 20}'

    docs/serve.md describes the API.
    """
    from slm.serve import log
    from slm.serve.service import Limits, Service

    return_freed_memory()
    keys = _api_keys(network.api_key_file)
    listening = _listen(network.host, network.port)  # checked before the model is loaded, which may take a while
    path = model or default_model(bundle=True)
    loaded, known = _load(path, adapters, loading)
    service = Service(
        loaded,
        name or short_name(path),
        _engine(loaded, engine, limits.timeout),
        known,
        Limits(prompt_tokens=limits.max_prompt_tokens, new_tokens=limits.max_tokens, seconds=limits.timeout),
        keys,
        network.grace,
        hosts=hosts_of(listening.getsockname()[0], network.hosts, keys=bool(keys), host=network.host),
        origins=network.origins,
    )
    log.configure()
    caches = service.engine.figures.cache_bytes / 2**20
    say(f"{path}: {loaded.decoder.description}, {engine.slots} slots, {caches:.0f} MiB of caches so far")
    for warning in _warnings(listening.getsockname()[0], keys, network.origins):
        say(f"warning: {warning}")
    # Garbage collection stops every thread; the loaded objects stay alive, so collections can skip them.
    gc.collect()
    gc.freeze()
    _run(service, listening)


def _load(path: Path, adapters: Sequence[str], loading: Loading) -> "tuple[Model, dict[str, Adapter]]":
    """Returns the model, and the adapters by their names in requests.

    Raises:
        SlmError: If the model is a checkpoint.
        click.UsageError: If an adapter is not NAME=PATH.
    """
    from slm.loading import load, load_adapter
    from slm.runtime.decoder import OnnxDecoder

    model = load(path, **loading)
    decoder = model.decoder
    if not isinstance(decoder, OnnxDecoder):
        raise SlmError(f"{path} is a checkpoint", "export it to a bundle first: slm export --onnx")
    warn_of_saturation(decoder)
    warn_of_conversions(decoder, loading["device"])
    known = {}
    for each in adapters:
        called, _, where = each.partition("=")
        if not called or not where:
            raise click.UsageError(f"--adapter {each}: NAME=PATH")
        known[called] = load_adapter(adapter_type.convert(where, None, None), decoder.bundle)
    return model, known


def _engine(model: "Model", options: EngineOptions, timeout: float) -> "Engine":
    from slm.runtime.decoder import OnnxDecoder
    from slm.serve.engine import Engine

    assert isinstance(model.decoder, OnnxDecoder)  # `_load`
    default = min(_STEP_S * max(1.0, options.prefill_tokens / _PIECE), max(1.0, timeout))
    return Engine(
        model.decoder,
        model.tokenizer,
        slots=options.slots,
        queue=options.queue,
        prefill_tokens=options.prefill_tokens,
        prefix_bytes=options.prefix_mib << 20,
        step_timeout_s=options.step_timeout or default,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that accepts connections.

    Raises:
        SlmError: If the address is in use or does not belong to this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise cannot_listen(host, port, error) from None


def _api_keys(file: Path | None) -> list[str]:
    """Returns the API keys; none if neither a file nor the environment has any.

    Raises:
        SlmError: If the file or the variable exists but holds no key, so that a typing error does not open the server.
    """
    if file is not None:
        given, where = read_text(file, "API keys").removeprefix("\ufeff").split("\n"), str(file)
    elif _KEYS in os.environ:
        given, where = os.environ[_KEYS].split(","), _KEYS
    else:
        return []
    keys = [key.strip() for key in given if key.strip()]
    if not keys:
        raise SlmError(
            f"no API key in {where}",
            "write one key per line" if file else f"separate keys with commas, or unset {_KEYS} to serve without keys",
        )
    if any(not key.isprintable() for key in keys):
        raise SlmError(
            f"an API key in {where} has a character that is not allowed in HTTP headers", "use letters and digits"
        )
    return keys


def _warnings(address: str, keys: Sequence[str], origins: Sequence[str]) -> list[str]:
    """Returns warnings about unsafe settings."""
    found = []
    if not keys and not is_loopback(address):
        found.append("any client that reaches this address can use the server; --api-key-file requires a key")
    if not keys and "*" in origins:
        found.append(
            "any web page opened in a browser on this machine can use the server; name the origins, or require keys"
        )
    if any(len(key) < _SHORT_KEY for key in keys):
        found.append(f"an API key has fewer than {_SHORT_KEY} characters and may be guessed")
    return found


def _run(service: "Service", listening: socket.socket) -> None:
    """Serves until the server is stopped, and prints its addresses once it accepts connections."""
    from slm.serve.server import Server, exit_now

    address, port = listening.getsockname()[:2]
    page = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    limits = service.limits
    prompt = limits.prompt_tokens or service.model.decoder.context

    def say_where() -> None:
        names = ", ".join((service.name, *service.adapters))
        say(
            f"model {names}: prompts up to {prompt:,} tokens, "
            f"completions up to {limits.new_tokens:,} in {limits.seconds:g} s"
        )
        say(f"page: {page}/")
        say(f"listening on {page}/v1")

    def say_what_is_left(requests: int) -> None:
        if requests:
            under_way = "1 request has" if requests == 1 else f"{requests} requests have"
            say(f"stopping: {under_way} up to {service.grace_s:g} s to finish; press Ctrl-C again to end immediately")

    server = Server(service, say_where, on_stop=say_what_is_left)
    server.run(sockets=[listening])
    if server.stopped_by is None:
        return
    if service.engine.alive:  # a thread of onnxruntime is stuck in a step, and a normal exit would wait for it
        exit_now(server.stopped_by, b"stopped: the engine was stuck\n")
    say("stopped")
    # A signal is a normal end of the server: no error message, but the exit code names the signal.
    raise SystemExit(128 + server.stopped_by)
