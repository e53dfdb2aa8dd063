"""Several tokens a step, beside plain decoding: batches, drafts and cached prefixes.

    python benchmarks/several.py [--model BUNDLE] [--threads 1] [--rounds 7]

Without a bundle, this is the real Gemma 3 270M (`make build/peers/gemma-3-270m-q4_k_m.gguf`) with `slm quantize --int8`. All
cases take turns, and each ratio is one of medians in one run. Processor time has little noise from other work on the machine,
but with several threads it includes their waiting. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peer_files import HOME, prepare_gemma
from peers import about

from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime.bench import Case, OnnxRows, prompt_ids
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.prefix import PrefixCache, PrefixDecoder
from slm.runtime.speculative import SpeculativeDecoder
from slm.runtime.streaming import greedy

POSITIONS = (128, 512)
ROWS, TOGETHER = (1, 2, 4, 8), (1, 2, 4, 8, 16)
STEPS, NEW, DRAFT = 12, 96, 8
PREFIX, QUESTION = 512, 32
_RECORDS = "".join(
    f'{{"id": {i}, "name": "item {i}", "price": {3 * i + 2}, "in_stock": {str(i % 3 > 0).lower()}, "tags": ["new", "sale"]}},\n'
    for i in range(1, 9)
)
TEXTS = {
    "records of JSON": "[\n" + _RECORDS,
    "a text to repeat": "Copy the text.\nText: The keeper of the lighthouse climbed ninety-nine steps each evening, lit the "
    "lamp, wrote down the wind and the weather, and counted the ships.\nCopy: The keeper of the lighthouse",
    "a story": "Once upon a time there was a girl who lived near a forest. One day she",
}
Seconds = tuple[float, float]


def timed(call: Callable[[], Any]) -> Seconds:
    """Returns the seconds of a call: wall time and processor time."""
    wall, process = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - process


def in_turns(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Returns the medians of calls that take turns, after one round that warms up."""
    found: dict[str, list[Seconds]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, call in cases.items():
            seconds = timed(call)
            found[name] += [seconds] if round_ else []
    return {name: (median(wall for wall, _ in each), median(cpu for _, cpu in each)) for name, each in found.items()}


def batches(decoder: OnnxDecoder, rounds: int) -> dict[str, Any]:
    """Steps of several rows: their cost in steps of one row, and the tokens per second over one row."""
    found: dict[str, Any] = {}
    for position in POSITIONS:
        rows = {count: OnnxRows(decoder, Case(position, count), STEPS * (rounds + 1)) for count in ROWS}

        def steps(count: int, rows: dict[int, OnnxRows] = rows) -> None:
            for _ in range(STEPS):
                rows[count].step(np.zeros((count, 1), np.int64)).argmax(-1)

        seconds = in_turns({str(count): lambda count=count: steps(count) for count in ROWS}, rounds)  # type: ignore[misc]
        one = seconds["1"]
        for name, (wall, process) in seconds.items():
            cost, gain = process / one[1], int(name) * one[0] / wall
            found[f"{position}, {name} rows"] = {
                "step_ms": wall / STEPS * 1e3,
                "step_process_ms": process / STEPS * 1e3,
                "process_cost": cost,
                "process_gain": int(name) / cost,
                "gain": gain,
            }
            print(
                f"after {position:4} tokens  {name:>2} rows  {process / STEPS * 1e3:6.1f} ms of processor time a step, "
                f"{cost:5.2f} of one row's; tokens per second {int(name) / cost:5.2f} times (wall time {gain:5.2f})",
                flush=True,
            )
    return found


def together(decoder: OnnxDecoder) -> dict[str, Any]:
    """Steps of several tokens of one row, as drafts are read: their cost in single-token steps."""
    found: dict[str, Any] = {}
    for position in POSITIONS:
        decoder.reset()
        decoder.read(prompt_ids(position, decoder.vocab_size))

        def step(count: int) -> None:
            length = decoder.length
            decoder.read_each([5] * count) if count > 1 else decoder.read([5])
            decoder.rewind(length)

        seconds = in_turns({str(count): lambda count=count: step(count) for count in TOGETHER}, STEPS)  # type: ignore[misc]
        for name, (wall, process) in seconds.items():
            cost = process / seconds["1"][1]
            found[f"{position}, {name} tokens"] = {"process_ms": process * 1e3, "process_cost": cost, "ms": wall * 1e3}
            print(
                f"after {position:4} tokens  {name:>2} tokens of one row  {process * 1e3:6.1f} ms of processor time, "
                f"{cost:5.2f} of one token's",
                flush=True,
            )
    return found


def drafts(decoder: OnnxDecoder, tokenizer: Tokenizer, rounds: int) -> dict[str, Any]:
    """Whole texts with drafts and without."""
    found: dict[str, Any] = {}
    ahead = SpeculativeDecoder(decoder, DRAFT)
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        written: dict[str, list[int]] = {}

        def write(which: str, ids: list[int] = ids, written: dict[str, list[int]] = written) -> None:
            written[which] = greedy(ahead if which == "drafts" else decoder, ids, NEW).tokens

        before = ahead.drafted, ahead.accepted
        seconds = in_turns({which: lambda which=which: write(which) for which in ("plain", "drafts")}, rounds)  # type: ignore[misc]
        drafted, accepted = ahead.drafted - before[0], ahead.accepted - before[1]
        gains = [plain / with_drafts for plain, with_drafts in zip(seconds["plain"], seconds["drafts"], strict=True)]
        found[name] = {
            "gain": gains[0],
            "process_gain": gains[1],
            "accepted_share": accepted / drafted if drafted else None,
            "accepted_a_text": accepted / (rounds + 1),
            "same_text": written["plain"] == written["drafts"],
        }
        print(
            f"{name}: {NEW} tokens with drafts of up to {DRAFT} {gains[1]:.2f} times as fast by processor time (wall time "
            f"{gains[0]:.2f}); {accepted} of {drafted} drafted tokens accepted; the same text: {found[name]['same_text']}",
            flush=True,
        )
    return found


def prefixes(decoder: OnnxDecoder, rounds: int) -> dict[str, Any]:
    """The time to the first token of a prompt whose beginning was read before."""
    cached = PrefixDecoder(decoder, PrefixCache(1 << 30))
    prompt = prompt_ids(PREFIX, decoder.vocab_size)
    questions = np.random.default_rng(1).integers(0, decoder.vocab_size, (2 * rounds + 2, QUESTION)).tolist()
    cached.read(prompt)
    snapshot = cached.cache.bytes

    def read(which: Any) -> None:
        which.reset()
        which.read(prompt + questions.pop())

    seconds = in_turns({"plain": lambda: read(decoder), "cached": lambda: read(cached)}, rounds)
    gains = [plain / known for plain, known in zip(seconds["plain"], seconds["cached"], strict=True)]
    print(
        f"first token of {PREFIX} + {QUESTION} tokens with {PREFIX} cached {gains[1]:.1f} times as fast by processor time "
        f"(wall time {gains[0]:.1f}); {snapshot / 2**20:.1f} MiB"
    )
    return {"gain": gains[0], "process_gain": gains[1], "bytes": snapshot}


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.prompt, args.new = PREFIX, NEW  # for `about`
    if args.model is None:
        prepare_gemma()
    bundle = Bundle.open(args.model or HOME / "gemma-int8")
    decoder = OnnxDecoder(bundle, threads=args.threads)
    setting = about(args)
    print(f"{setting['processor']}, {decoder.description}")
    figures = {
        "batches": batches(decoder, args.rounds),
        "tokens_of_one_row": together(decoder),
        "drafts": drafts(decoder, Tokenizer.load(bundle.path), args.rounds),
        "prefixes": prefixes(decoder, args.rounds),
    }
    print(json.dumps(setting | {"decoder": decoder.description} | figures))


if __name__ == "__main__":
    main()
