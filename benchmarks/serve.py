"""Streams over HTTP, side by side: `slm serve` and llama.cpp's server, with 1, 4, 8 and 16 clients at once.

    make bench-serve        builds llama.cpp's server from the source that llama-cpp-python has on PyPI (minutes) and runs this
    python benchmarks/serve.py [--rounds 5] [--streams 1,4,8,16] [--only "slm INT8,llama.cpp Q8_0"] [--bundle NAME=DIR]
    python benchmarks/serve.py --quick

The files are those of `benchmarks/peers.py`: one checkpoint of the 270M shape with random weights in every format. All servers
stay resident and take turns, each turn being as many streams as there are clients, all begun at once: prompts of random tokens,
no two alike and none cached, and as many new tokens each. What random weights write is mostly no text, so that a bias has
every server write the same token at every step (--free leaves it out, for models that were trained). Tokens a second are all
new tokens over the time from the first request to the last token, reading prompts included. CPU time is the server's own, a
measure that other work on the machine touches least; with --patience a turn that was disturbed is taken again, as in
`benchmarks/peers.py`. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from peer_files import HOME, PEERS, environment, prepare
from peers import Quiet, peer_versions, rounded
from streams import Reply, post

from slm.core.machine import instruction_sets, usable_cores
from slm.runtime.bench import Spread
from slm.version import __version__

LLAMA_SERVER = PEERS / "llama-server" / "llama-server"
# xllamacpp is llama.cpp's server in a wheel, built for AVX2 alone.
WHEEL = """
import sys, time, xllamacpp as x
model, port, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = x.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = model, port, slots, context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_ram_mib, params.kv_unified, params.ui = 0, False, False
server = x.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""
PAUSE_S = 0.05
# The token that everybody is made to write; a word in the tokenizer of benchmarks/peer_files.py.
FORCED = 300


@dataclass(frozen=True)
class Entry:
    """Who takes part: what kind of server, what it runs, and what must be said beside it."""

    kind: str
    model: Path
    note: str = ""


OURS, THEIRS = "slm INT8", "llama.cpp Q8_0"
ENTRIES = {
    OURS: Entry("slm", HOME / "onnx-int8"),
    "slm INT8 dynamic": Entry("slm", HOME / "onnx-int8-dynamic-kv8", "activations and caches in 8 bits"),
    THEIRS: Entry("llama-server", HOME / "q8_0.gguf", "built here, AMX off"),
    "llama.cpp Q8_0 wheel": Entry("xllamacpp", HOME / "q8_0.gguf", "xllamacpp, AVX2"),
}


@dataclass
class Turn:
    """What one turn of some streams came to, in seconds.

    Attributes:
        tokens: New ones of all streams.
        wall_s: From the first request to the last token.
        cpu_s: Of the server.
        first_s: To the first token, of each stream.
        between_s: Between the tokens of a stream, of all of them.
    """

    tokens: int
    wall_s: float
    cpu_s: float
    first_s: list[float]
    between_s: list[float]


@dataclass
class Server:
    """A server that runs."""

    name: str
    entry: Entry
    process: subprocess.Popen[bytes]
    port: int
    turns: dict[int, list[Turn]] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """Returns the CPU time that it has had."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(name: str, entry: Entry, args: argparse.Namespace, slots: int) -> Server:
    """Starts a server and waits until it is ready.

    Raises:
        RuntimeError: With what it said last, when it cannot.
    """
    if not entry.model.exists():
        raise RuntimeError(f"{entry.model} could not be made")
    each = args.prompt + args.new + 32
    log = HOME / f"serve-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"
    port, threads = str(_free_port()), str(args.threads)
    if entry.kind == "slm":
        command = [sys.executable, "-m", "slm", "serve", str(entry.model), "--port", port, "--threads", threads]
        command += ["--name", "m", "--slots", str(slots), "--prefix-mib", "0", "--max-tokens", str(args.new)]
        packages = None
    elif entry.kind == "llama-server":
        command = [str(LLAMA_SERVER), "-m", str(entry.model), "--port", port, "-t", threads, "-tb", threads]
        command += ["-np", str(slots), "-c", str(slots * each), "--no-kv-unified", "-cram", "0", "--no-ui", "--offline"]
        packages = None
        if not LLAMA_SERVER.exists():
            raise RuntimeError(f"no {LLAMA_SERVER}; make bench-serve builds it")
    else:
        command = [sys.executable, "-c", WHEEL, str(entry.model), port, threads, str(slots), str(slots * each)]
        packages = "llamacpp"
        if not (PEERS / packages).is_dir():
            raise RuntimeError(f"no {PEERS / packages}; make peers installs it")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(packages))
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return Server(name, entry, process, int(port))
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    process.kill()
    said = log.read_text(errors="replace").strip().splitlines()
    raise RuntimeError(said[-1] if said else "it did not start")


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def request(entry: Entry, prompt: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is asked: the same of everybody, in the words of each."""
    body: dict[str, Any] = {"model": "m", "prompt": list(prompt), "max_tokens": args.new, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    if not args.free:
        body["logit_bias"] = {str(FORCED): 100}
    return body if entry.kind == "slm" else body | {"cache_prompt": False}


async def take(server: Server, streams: int, args: argparse.Namespace, chance: random.Random) -> Turn:
    """Has a server answer so many streams at once."""
    prompts = [[chance.randrange(5, FORCED) for _ in range(args.prompt)] for _ in range(streams)]
    before = server.cpu_s()
    replies = await asyncio.gather(
        *(post(server.port, "/v1/completions", request(server.entry, prompt, args)) for prompt in prompts)
    )
    cpu_s = server.cpu_s() - before
    tokens, first_s, between_s, last = 0, [], [], 0.0
    for reply in replies:
        _check(server.name, reply, args.new)
        sent, *times = reply.times
        written = [when for when, event in zip(times, reply.events, strict=True) if _text(event)]
        tokens += reply.events[-1]["usage"]["completion_tokens"]
        first_s.append(written[0] - sent)
        between_s += [after - before for before, after in pairwise(written)]
        last = max(last, written[-1])
    return Turn(tokens, last - min(reply.times[0] for reply in replies), cpu_s, first_s, between_s)


def _text(event: dict[str, Any]) -> str:
    return str(event["choices"][0].get("text") or "") if event["choices"] else ""


def _check(name: str, reply: Reply, new: int) -> None:
    if reply.status != 200 or not reply.complete:
        raise SystemExit(f"{name}: status {reply.status}: {(reply.body or b'the stream was cut off').decode()[:300]}")
    written = reply.events[-1]["usage"]["completion_tokens"]
    if written != new:
        raise SystemExit(f"{name} wrote {written} tokens, {new} were asked for")


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value that this share of them does not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summed_up(turns: Sequence[Turn]) -> dict[str, Any]:
    """Returns the figures of the turns with one number of streams."""
    first = [1e3 * each for turn in turns for each in turn.first_s]
    between = [1e3 * each for turn in turns for each in turn.between_s]
    return {
        "tok_s": rounded(Spread.of([turn.tokens / turn.wall_s for turn in turns])),
        "ttft_ms": {"p50": round(percentile(first, 0.5), 1), "p95": round(percentile(first, 0.95), 1)},
        "between_ms": {"p50": round(percentile(between, 0.5), 2), "p95": round(percentile(between, 0.95), 2)},
        "cpu_ms_a_token": rounded(Spread.of([1e3 * turn.cpu_s / turn.tokens for turn in turns])),
    }


def measure(servers: Sequence[Server], counts: Sequence[int], quiet: Quiet, args: argparse.Namespace) -> None:
    """Has all servers take their turns; those of the first round warm up."""
    for round_ in range(args.rounds + 1):
        for streams in counts:
            for server in servers:
                time.sleep(PAUSE_S)
                taken = partial(take, server, streams, args, random.Random(1000 * round_ + streams))
                turn = quiet.take([server.process.pid], lambda taken=taken: asyncio.run(taken()))
                if round_:
                    server.turns.setdefault(streams, []).append(turn)
        print(f"round {round_} of {args.rounds}", file=sys.stderr, flush=True)


def report(servers: Sequence[Server], counts: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables and returns their figures."""
    found: dict[str, Any] = {"servers": {}, "ratios": {}}
    print(f"\nprompts of {args.prompt} tokens, {args.new} new, {args.threads} threads, {args.rounds} rounds")
    for server in servers:
        rows = {str(streams): summed_up(server.turns[streams]) for streams in counts}
        found["servers"][server.name] = rows | {"note": server.entry.note}
        for streams, row in rows.items():
            rate, cpu = row["tok_s"], row["cpu_ms_a_token"]["median"]
            print(
                f"{server.name:30} {streams:>2} streams {rate['median']:7.1f} tok/s ({rate['min']:.1f} – {rate['max']:.1f})  "
                f"first token {row['ttft_ms']['p50']:.0f} ms, p95 {row['ttft_ms']['p95']:.0f}  "
                f"between p50 {row['between_ms']['p50']:.1f}, p95 {row['between_ms']['p95']:.1f}  CPU {cpu:.1f} ms a token"
            )
    by_name = {server.name: server for server in servers}
    for server in servers:
        if {1, 8} <= set(counts):
            eight = _ratio(server, 8, server, 1)
            found["ratios"][f"{server.name}: 8 streams / 1"] = eight
            goal = "; goal 3" if server.entry.kind == "slm" else ""
            print(
                f"{server.name}: 8 streams / 1 stream {eight['median']:.2f} ({eight['min']:.2f} – {eight['max']:.2f}){goal}"
            )
    for theirs in (name for name, server in by_name.items() if server.entry.kind != "slm"):
        for ours in (name for name, server in by_name.items() if server.entry.kind == "slm"):
            for streams in counts:
                ratio = _ratio(by_name[ours], streams, by_name[theirs], streams)
                found["ratios"][f"{ours} / {theirs}, {streams} streams"] = ratio
                goal = "; goal 1.3" if streams == 8 else ""
                spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} – {ratio['max']:.2f}){goal}"
                print(f"{ours} / {theirs}, {streams} streams: {spread}")
    return found


def _ratio(above: Server, streams: int, below: Server, others: int) -> dict[str, float]:
    """Returns tokens a second over tokens a second, by round."""
    pairs = zip(above.turns[streams], below.turns[others], strict=True)
    return rounded(Spread.of([(a.tokens / a.wall_s) / (b.tokens / b.wall_s) for a, b in pairs]))


def main() -> None:
    """Starts the servers, measures, prints tables, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,4,8,16", help="clients at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each stream")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", default=",".join(ENTRIES), help="servers, by name")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR", help="one more of ours")
    parser.add_argument(
        "--gguf", action="append", default=[], metavar="NAME=FILE", help="one more for llama.cpp's server"
    )
    parser.add_argument("--patience", type=float, default=0, metavar="S", help="seconds to wait for quiet, in all")
    parser.add_argument("--free", action="store_true", help="let models write what they write")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, to see that it works")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.new, args.streams = 1, 32, "1,8"
    counts = [int(each) for each in args.streams.split(",")]
    entries = {name: ENTRIES[name] for name in args.only.split(",") if name}
    for kind, named in (("slm", args.bundle), ("llama-server", args.gguf)):
        entries |= {each.partition("=")[0]: Entry(kind, Path(each.partition("=")[2])) for each in named}
    if any(entry.model.parent == HOME for entry in entries.values()):
        prepare()
    quiet = Quiet(args.patience)
    servers: list[Server] = []
    missing: dict[str, str] = {}
    try:
        for name, entry in entries.items():
            try:
                servers.append(start(name, entry, args, max(counts)))
            except RuntimeError as error:
                missing[name] = str(error)
                print(f"left out: {name}: {error}", flush=True)
        measure(servers, counts, quiet, args)
        found = report(servers, counts, args)
    finally:
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
        for server in servers:
            server.process.wait(60)
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"slm": __version__} | peer_versions(),
        "instruction_sets": [name for name, has in instruction_sets().items() if has],
        "threads": args.threads,
        "rounds": args.rounds,
        "prompt": args.prompt,
        "new_tokens": args.new,
    }
    if quiet.shares:
        found["others_share_of_cores"] = rounded(Spread.of(quiet.shares))
    print(json.dumps(about | found | {"missing": missing}))


if __name__ == "__main__":
    main()
