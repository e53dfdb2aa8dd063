"""Mixed requests to `slm serve` for minutes, with clients that go away, are killed, or do not read.

    python benchmarks/soak.py [--minutes 10] [--model BUNDLE] [--adapter NAME=PATH]

The server is a process of its own, with few slots and a short queue, so that some requests are refused. Every request has a
seed or is greedy, and was answered once before, alone: each answer that comes must be that one. At the end nothing may be
under way, every text that was taken must have ended, and the memory of the server must be what it was after the warm-up, to
5 %. The last line is one JSON object; what was found wrong makes the exit status 1.
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
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from streams import Reply, post

# Resident memory may be this much more at the end than after the warm-up.
FLAT = 0.05
# Of the time, that warms up: caches and the allocator reach the size that they keep.
WARM_UP = 0.2
MODEL = "soaked"
CLIENTS = 10
TOKENS = 48

PROMPTS = (
    "Once upon a time",
    "The little dog",
    "One day Lily found",
    "There was a big tree. " * 12,
    "Tom and his mother went to the park. They saw a",
    "It was dark and",
)
ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "fox"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["name", "kind", "legs"],
    "additionalProperties": False,
}
# A client that holds a stream until it is killed, and never reads it.
KILLED = """
import socket, sys
body = sys.argv[2].encode()
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
s.sendall(b"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-type: application/json\\r\\n"
          b"content-length: %d\\r\\n\\r\\n" % len(body) + body)
print("sent", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Question:
    """A request whose answer is always the same."""

    path: str
    body: str

    @property
    def fields(self) -> dict[str, Any]:
        """Its fields."""
        return json.loads(self.body)


@dataclass
class Found:
    """What happened.

    Attributes:
        counts: How often what happened.
        wrong: What must not have.
        rss_mib: Resident memory of the server, by the second.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)


class Server:
    """`slm serve` as a process."""

    def __init__(self, model: str | None, adapters: Sequence[str], log: Path, threads: int | None = None) -> None:
        command = [sys.executable, "-m", "slm", "serve", *([model] if model else []), "--port", "0", "--name", MODEL]
        command += ["--slots", "4", "--queue", "4", "--max-tokens", "256", "--prefix-mib", "16", "--timeout", "60"]
        command += [part for each in adapters for part in ("--adapter", each)]
        command += ["--threads", str(threads)] if threads else []
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file)
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read_text(encoding="utf-8"))) is None:
            if self.process.poll() is not None:
                raise SystemExit(log.read_text(encoding="utf-8"))
            time.sleep(0.05)
        self.port = int(found[1])

    def rss_mib(self) -> float:
        """Returns its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def metrics(self) -> dict[str, float]:
        """Returns what it tells Prometheus."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def stop(self) -> int:
        """Stops it as a supervisor would, and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def questions(models: Sequence[str]) -> list[Question]:
    """Returns the requests whose answers are compared."""
    asked = []
    for model in models:
        base = {"model": model, "max_tokens": TOKENS}
        for number, prompt in enumerate(PROMPTS):
            message = {"messages": [{"role": "user", "content": prompt}]}
            form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}
            for path, fields in (
                ("/v1/completions", {"prompt": prompt, "temperature": 0}),
                ("/v1/completions", {"prompt": prompt, "seed": number, "n": 3}),
                ("/v1/completions", {"prompt": prompt, "temperature": 0, "logprobs": 2, "max_tokens": 12}),
                ("/v1/chat/completions", message | {"temperature": 0}),
                ("/v1/chat/completions", message | {"seed": number, "response_format": form, "max_tokens": 128}),
            ):
                asked.append(Question(path, json.dumps(base | fields)))
    return asked


async def answers_alone(port: int, asked: Sequence[Question]) -> dict[Question, list[str]]:
    """Returns what each request gets when there is no other."""
    return {each: (await post(port, each.path, each.fields)).texts for each in asked}


async def soak(server: Server, known: dict[Question, list[str]], seconds: float, seed: int = 0) -> Found:
    """Has clients ask for some time; returns what happened."""
    found, until = Found(), time.monotonic() + seconds
    chance = random.Random(seed)
    asked = list(known)
    await asyncio.gather(
        *(client(server.port, known, asked, found, until, random.Random(chance.random())) for _ in range(CLIENTS)),
        killer(server.port, found, until, random.Random(chance.random())),
        watch(server, found, until),
    )
    return found


async def client(
    port: int,
    known: dict[Question, list[str]],
    asked: Sequence[Question],
    found: Found,
    until: float,
    chance: random.Random,
) -> None:
    """Asks one thing after another, in one way or another."""
    while time.monotonic() < until:
        question = chance.choice(asked)
        manner = chance.choices(("whole", "stream", "slow", "gone", "gone whole", "wrong"), (4, 6, 1, 4, 1, 1))[0]
        try:
            async with asyncio.timeout(120):
                await ask(port, question, manner, known[question], found, chance)
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError, TimeoutError) as error:
            found.wrong.append(f"{manner}: {type(error).__name__}: {error}")
        await asyncio.sleep(chance.random() * 0.05)


async def ask(
    port: int, question: Question, manner: str, wanted: list[str], found: Found, chance: random.Random
) -> None:
    """Asks once and compares."""
    fields = question.fields
    if manner == "wrong":
        reply = await post(port, question.path, fields | {"temperature": 9})
        found.counts["refused as wrong"] += 1
        if reply.status != 400:
            found.wrong.append(f"a wrong field is answered with {reply.status}")
        return
    if manner == "gone whole":
        try:
            await asyncio.wait_for(post(port, question.path, fields), chance.random() * 0.3)
        except TimeoutError:
            found.counts["gone, waiting"] += 1
        return
    streamed = manner in ("stream", "slow", "gone")
    reply = await post(
        port,
        question.path,
        fields | {"stream": streamed},
        gone_after=chance.randrange(1, 20) if manner == "gone" else None,
        pause=(lambda: chance.random() * 0.2) if manner == "slow" else (lambda: 0.0),
    )
    if reply.status == 429:
        found.counts["429"] += 1
        if int(reply.headers["retry-after"]) < 1:
            found.wrong.append("429 without Retry-After")
        await asyncio.sleep(chance.random() * 0.2)
        return
    found.counts[manner] += 1
    if trouble := difference(reply, manner, wanted):
        found.wrong.append(f"{manner}: {trouble}: {question.body[:200]}")


def difference(reply: Reply, manner: str, wanted: list[str]) -> str | None:
    """Returns what is wrong with an answer, if anything is."""
    if reply.status != 200:
        return f"status {reply.status}: {reply.body[:200]!r}"
    if manner == "gone" and not reply.complete:
        same = all(whole.startswith(part) for part, whole in zip(reply.texts, wanted, strict=False))
        return None if same else f"begins with {reply.texts}, wanted {wanted}"
    if not reply.complete:
        return "the answer is not whole"
    return None if reply.texts == wanted else f"{reply.texts}, wanted {wanted}"


async def killer(port: int, found: Found, until: float, chance: random.Random) -> None:
    """Starts clients that do not read, and kills them."""
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 256, "stream": True, "ignore_eos": True})
    while time.monotonic() < until:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-S", "-c", KILLED, str(port), body),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        await process.stdout.readline()
        await asyncio.sleep(chance.random() * 0.5)
        process.kill()
        await process.wait()
        found.counts["killed"] += 1
        await asyncio.sleep(chance.random())


async def watch(server: Server, found: Found, until: float) -> None:
    """Looks at the memory."""
    while time.monotonic() < until:
        found.rss_mib.append(server.rss_mib())
        if server.process.poll() is not None:
            found.wrong.append("the server ended")
        await asyncio.sleep(1)


async def settled(server: Server, patience_s: float = 30) -> dict[str, float]:
    """Returns the metrics once nothing is under way, or after some time."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        metrics = await asyncio.to_thread(server.metrics)
        if not metrics["slm_running"] and not metrics["slm_waiting"]:
            break
        await asyncio.sleep(0.2)
    return metrics


def growth(rss_mib: Sequence[float]) -> tuple[float, float, float]:
    """Returns resident memory after the warm-up, that at the end (each the median of a tenth), and how much more that is."""
    after = rss_mib[int(len(rss_mib) * WARM_UP) :]
    tenth = max(1, len(after) // 10)
    first, last = median(after[:tenth]), median(after[-tenth:])
    return first, last, last / first - 1


def judged(found: Found, metrics: dict[str, float]) -> None:
    """Adds what the end shows to be wrong."""
    ended = sum(value for name, value in metrics.items() if name.startswith("slm_ended_total"))
    for trouble, what in (
        (metrics["slm_running"], "texts still under way"),
        (metrics["slm_waiting"], "texts still waiting"),
        (metrics["slm_requests_total"] - ended, "texts that never ended"),
        (metrics.get('slm_ended_total{reason="error"}', 0), "texts that ended with an error"),
    ):
        if trouble:
            found.wrong.append(f"{trouble:g} {what}")
    if growth(found.rss_mib)[2] > FLAT:
        found.wrong.append("resident memory grew from {:.1f} to {:.1f} MiB".format(*growth(found.rss_mib)))


def main() -> None:
    """Soaks, prints what happened, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", help="a bundle [default: as slm serve]")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        server = Server(args.model, args.adapter, Path(home) / "log", args.threads)
        try:
            asked = questions([MODEL, *(each.partition("=")[0] for each in args.adapter)])
            known = asyncio.run(answers_alone(server.port, asked))
            found = asyncio.run(soak(server, known, 60 * args.minutes))
            metrics = asyncio.run(settled(server))
            judged(found, metrics)
        finally:
            status = server.stop()
        if status != 128 + signal.SIGTERM:
            found.wrong.append(f"the server ended with {status}")
        if any(prompt in server.log.read_text() for prompt in PROMPTS):
            found.wrong.append("a prompt is in the log")
    first, last, more = growth(found.rss_mib)
    for line in found.wrong[:20]:
        print("wrong:", line)
    print(", ".join(f"{count} {what}" for what, count in found.counts.most_common()))
    print(f"resident memory {first:.1f} MiB after the warm-up, {last:.1f} at the end: {more:+.1%}")
    print(
        json.dumps(
            {
                "minutes": args.minutes,
                "cores": os.cpu_count(),
                "counts": dict(found.counts),
                "wrong": len(found.wrong),
                "rss_mib": {"warm": round(first, 1), "end": round(last, 1), "most": round(max(found.rss_mib), 1)},
                "growth": round(more, 4),
                "new_tokens": metrics["slm_new_tokens_total"],
                "reused_tokens": metrics["slm_reused_tokens_total"],
            }
        )
    )
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
