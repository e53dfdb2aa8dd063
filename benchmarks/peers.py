"""Speed and memory of the 270M shape, side by side with llama.cpp, OpenVINO and onnxruntime-genai.

    make bench-peers        installs them under build/peers (llama.cpp is built from source: minutes) and runs this
    python benchmarks/peers.py [--rounds 7] [--only "slm INT8,llama.cpp Q8_0"] [--parts speed,batch] [--bundle NAME=DIR]
    python benchmarks/peers.py --parts gemma     the real Gemma 3 270M alone

One checkpoint with random weights (speed does not depend on their values) is exported to every format, once, under
bench-results/peers. Each contender is a process of its own with the same number of threads; all stay resident and take
turns, one prompt and its answer each, so that whatever else the machine does falls on all of them. The memory's speed is
measured in every round. A contender that cannot start is named and left out. The last line is one JSON object.
docs/benchmarks.md says what each part means and has a run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from peer_files import HOME, LONG, PEERS, environment, prepare

from slm.cli.commands.bench import fresh_process
from slm.core.accounting import cache_bytes
from slm.core.machine import instruction_sets, usable_cores
from slm.core.manifest import Bundle
from slm.core.presets import preset
from slm.runtime.bench import ReadProbe, Spread, cache_bytes_read, weight_bytes_read
from slm.version import __version__

Turn = TypeVar("Turn")

CONTENDERS = Path(__file__).with_name("contenders.py")
PARTS = ("speed", "batch", "positions", "memory", "start", "gemma")

POSITIONS = (100, 8_000, 30_000)
# Between turns: threads of the one before that still wait for work, spinning, go to sleep.
PAUSE_S = 0.05
# A turn is disturbed when other processes had more than this of the cores; they are watched for so long before one.
DISTURBED = 0.05
WATCH_S = 0.2

AMX_OFF = "AMX off"


@dataclass(frozen=True)
class Entry:
    """Who takes part: an engine, its packages under build/peers, what it runs, and what must be said beside it."""

    engine: str
    packages: str | None
    model: str
    note: str = ""


ENTRIES = {
    "slm INT8": Entry("slm", None, "onnx-int8"),
    "slm INT8 with float32 caches": Entry("slm", None, "onnx-int8-kv32"),
    "slm INT8 with INT8 caches": Entry("slm", None, "onnx-int8-kv8"),
    "slm INT8 block 32": Entry("slm", None, "onnx-int8-b32"),
    "slm float32": Entry("slm", None, "onnx"),
    "slm portable float32": Entry("slm", None, "onnx-portable"),
    "slm with PyTorch": Entry("slm", None, "checkpoint"),
    "llama.cpp Q8_0": Entry("llama.cpp", "llamacpp-native", "q8_0.gguf", AMX_OFF),
    "llama.cpp Q4_0": Entry("llama.cpp", "llamacpp-native", "q4_0.gguf", AMX_OFF),
    "OpenVINO INT8": Entry("openvino", "openvino", "openvino"),
    "slm INT8 in genai": Entry("onnxruntime-genai", "genai", "onnx-int8"),
}
OURS, THEIRS = "slm INT8", "llama.cpp Q8_0"
BY_CACHES = ("slm INT8 with float32 caches", "slm INT8 with INT8 caches")
LONG_BUNDLES = {"float32 caches": "onnx-long-int8", "INT8 caches": "onnx-long-int8-kv8"}


def main() -> None:
    """Runs the parts, prints tables, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--patience", type=float, default=0, metavar="S", help="seconds to wait for quiet, in all")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default=",".join(ENTRIES), help="contenders, by name")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR", help="one more of ours")
    parser.add_argument("--long-bundle", action="append", default=[], metavar="NAME=DIR", help="one more, long context")
    parser.add_argument("--gemma-bundle", action="append", default=[], metavar="NAME=DIR", help="one more, real Gemma")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    entries = {name: ENTRIES[name] for name in args.only.split(",")}
    entries |= {name: Entry("slm", None, str(Path(path).resolve())) for name, path in map(_named, args.bundle)}
    long = LONG_BUNDLES | {name: str(Path(path).resolve()) for name, path in map(_named, args.long_bundle)}
    if set(parts) != {"gemma"}:
        prepare()
    found: dict[str, Any] = about(args)
    print(f"{found['processor']}, {args.threads} threads")
    quiet = Quiet(args.patience)
    if "speed" in parts:
        found |= speed(entries, quiet, args)
    if "batch" in parts:
        found["batch"] = batches(quiet, args)
    if "positions" in parts:
        found["positions"] = positions(long, quiet, args)
    if "memory" in parts:
        found["memory"] = memory(long, args)
    if "start" in parts:
        found["start_to_first_token_ms"] = start(quiet, args)
    if "gemma" in parts:
        from peers_gemma import gemma

        found["gemma"] = gemma(quiet, args)
    if quiet.shares:
        found["others_share_of_cores"] = rounded(Spread.of(quiet.shares))
        print(f"other processes had {shown(found['others_share_of_cores'], 2)} of the cores during turns")
    print(json.dumps(found))


def _named(said: str) -> tuple[str, str]:
    name, _, path = said.partition("=")
    return name, path


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the figures hold for."""
    import onnxruntime

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0] if names else platform.machine(),
        "instruction_sets": [name for name, has in instruction_sets().items() if has],
        "threads": args.threads,
        "versions": {"slm": __version__, "onnxruntime": onnxruntime.__version__} | peer_versions(),
        "rounds": args.rounds,
        "prompt": args.prompt,
        "new_tokens": args.new,
    }


def peer_versions() -> dict[str, str]:
    """Returns the versions of what is under build/peers."""
    wanted = {
        "llamacpp-native": "llama_cpp_python",
        "llamacpp": "xllamacpp",
        "openvino": "openvino",
        "genai": "onnxruntime_genai",
    }
    found = {
        package: [
            path.name.split("-")[1].removesuffix(".dist") for path in (PEERS / home).glob(f"{package}-*.dist-info")
        ]
        for home, package in wanted.items()
    }
    return {package: versions[0] for package, versions in found.items() if versions}


class Quiet:
    """Other processes' share of the cores, and the patience to wait until it is small.

    Engines lose unequally to other work, those most whose threads wait for each other by spinning. So a turn that was
    disturbed is taken again as long as the patience lasts, whatever it came to; the JSON says how disturbed the turns
    that count were.
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.shares: list[float] = []

    def take(self, pids: Sequence[int], turn: Callable[[], Turn]) -> Turn:
        """Takes a turn of processes when nothing else runs."""
        while True:
            self._wait()
            before, began = self._others(pids), time.perf_counter()
            result = turn()
            seconds = time.perf_counter() - began
            share = max(0.0, self._others(pids) - before) / (seconds * (os.cpu_count() or 1))
            if share <= DISTURBED or self.patience_s <= 0:
                self.shares.append(share)
                return result
            self.patience_s -= seconds

    def _wait(self) -> None:
        while self.patience_s > 0:
            before = self._others([])
            time.sleep(WATCH_S)
            self.patience_s -= WATCH_S
            if self._others([]) - before <= DISTURBED * WATCH_S * (os.cpu_count() or 1):
                return

    def _others(self, pids: Sequence[int]) -> float:
        """Returns the CPU seconds that all processes but some have had, and those that the host took; 0 without /proc."""
        if not Path("/proc/stat").exists():
            return 0.0
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]  # idle, waiting for a disk
        for pid in (os.getpid(), *pids):
            own = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            busy -= sum(map(int, own[11:15]))  # with children that have ended
        return busy / os.sysconf("SC_CLK_TCK")


class Contender:
    """A process that takes a turn when it is told to."""

    def __init__(self, name: str, entry: Entry, threads: int, context: int) -> None:
        """Starts it.

        Raises:
            RuntimeError: With what it said last, when it cannot.
        """
        model = HOME / entry.model
        self.name = name
        if entry.packages is not None and not (PEERS / entry.packages).is_dir():
            raise RuntimeError(f"no {PEERS / entry.packages}; make bench-peers installs it")
        if not model.exists():
            raise RuntimeError(f"{model} could not be made")
        self._log = HOME / f"{name.replace(' ', '-')}.log"
        command = [sys.executable, str(CONTENDERS), entry.engine, str(model), str(threads), str(context)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(entry.packages),
            )
        self._answer()

    def turn(self, quiet: Quiet, **wanted: int) -> dict[str, float]:
        """Has it take a turn; returns seconds."""
        time.sleep(PAUSE_S)
        return quiet.take([self._process.pid], lambda: self._turn(wanted))

    def _turn(self, wanted: dict[str, int]) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1] if said else f"it ended with {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Ends it."""
        self._process.communicate()


def started(
    entries: dict[str, Entry], args: argparse.Namespace, context: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Starts contenders; returns them, and why the others are missing."""
    running: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name, entry in entries.items():
        try:
            running[name] = Contender(name, entry, args.threads, context)
        except RuntimeError as error:
            missing[name] = str(error)
            print(f"left out: {name}: {error}", flush=True)
    return running, missing


# The parts


def speed(entries: dict[str, Entry], quiet: Quiet, args: argparse.Namespace) -> dict[str, Any]:
    """Measures prefill and decode in turns, the memory's speed once a round."""
    running, missing = started(entries, args, args.prompt + args.new + 32)
    ours = Bundle.open(HOME / ENTRIES[OURS].model)
    read_bytes = weight_bytes_read(ours) + cache_bytes_read(ours.manifest.cache, args.prompt)
    probe = ReadProbe(read_bytes, args.threads)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    rates: list[float] = []
    for round_ in range(args.rounds + 1):
        time.sleep(PAUSE_S)
        rates.append(quiet.take([], probe.rate))
        for name, contender in running.items():
            turns[name].append(contender.turn(quiet, read=args.prompt, new=args.new))
        print(f"round {round_} of {args.rounds}", file=sys.stderr, flush=True)
    probe.close()
    for contender in running.values():
        contender.stop()
    rates, turns = rates[1:], {name: taken[1:] for name, taken in turns.items()}  # the first warmed up
    steps = args.new - 1
    rows = {}
    for name, taken in turns.items():
        files = HOME / entries[name].model
        size = (
            files.stat().st_size if files.is_file() else sum(f.stat().st_size for f in files.rglob("*") if f.is_file())
        )
        rows[name] = {
            "decode_tok_s": rounded(Spread.of([steps / turn["decode_s"] for turn in taken])),
            "prefill_tok_s": rounded(Spread.of([args.prompt / turn["read_s"] for turn in taken])),
            "ttft_ms": rounded(Spread.of([1e3 * turn["read_s"] for turn in taken])),
            "rss_mib": round(taken[-1]["rss_mib"]),
            "file_bytes": size,
            "note": entries[name].note,
        }
    print(
        f"\n{args.prompt} tokens of prompt, {args.new} new, {args.threads} threads, medians of {args.rounds} (min – max)"
    )
    for name, row in rows.items():
        print(
            f"{name:28} decode {shown(row['decode_tok_s']):24} prefill {shown(row['prefill_tok_s']):28} tok/s  "
            f"{row['file_bytes'] / 1e6:6.1f} MB  {row['rss_mib']:5} MiB  {row['note']}"
        )
    found: dict[str, Any] = {"speed": rows, "missing": missing, "ratios": {}}
    found["read_gb_s"] = rounded(Spread.of([rate / 1e9 for rate in rates]))
    print(f"memory is read at {shown(found['read_gb_s'], 1)} GB/s")
    if OURS not in turns:
        return found
    shares = [read_bytes * steps / turn["decode_s"] / rate for turn, rate in zip(turns[OURS], rates, strict=True)]
    found["memory_share"] = rounded(Spread.of(shares))
    print(
        f"{OURS} decode reads {read_bytes / 1e6:.0f} MB a token: {shown(found['memory_share'], 2)} of that; goal 0.60, aim 0.80"
    )
    for other in rows:
        if other == OURS:
            continue
        for figure, key in (("decode", "decode_s"), ("prefill", "read_s")):
            each = [his[key] / our[key] for our, his in zip(turns[OURS], turns[other], strict=True)]
            of_medians = rows[OURS][f"{figure}_tok_s"]["median"] / rows[other][f"{figure}_tok_s"]["median"]
            of_best = rows[OURS][f"{figure}_tok_s"]["max"] / rows[other][f"{figure}_tok_s"]["max"]
            ratio = {"of_medians": round(of_medians, 3), "of_best": round(of_best, 3)}
            found["ratios"].setdefault(other, {})[figure] = ratio | {"rounds": rounded(Spread.of(each))}
    goals = {(THEIRS, "decode"): "goal 1.5, aim 2", (THEIRS, "prefill"): "goal 1.6"}
    for other, ratios in found["ratios"].items():
        for figure, ratio in ratios.items():
            note = ", ".join(filter(None, (entries[other].note, goals.get((other, figure)))))
            print(
                f"{OURS} / {other}, {figure}: {ratio['of_medians']:.2f} of medians, {ratio['of_best']:.2f} of the best rounds, "
                f"by round {shown(ratio['rounds'], 2)}" + (f"  [{note}]" if note else "")
            )
    return found


def batches(quiet: Quiet, args: argparse.Namespace) -> dict[str, Any]:
    """Measures eight rows against one."""
    running, _ = started({name: ENTRIES[name] for name in BY_CACHES}, args, 1024)
    rates: dict[tuple[str, int], dict[int, list[float]]] = {
        (name, position): {1: [], 8: []} for position in (128, 512) for name in running
    }
    for round_ in range(args.rounds + 1):
        for (name, position), by_batch in rates.items():
            for batch, values in by_batch.items():
                turn = running[name].turn(quiet, position=position, batch=batch, steps=args.new)
                values += [batch * args.new / turn["decode_s"]] if round_ else []
    found: dict[str, Any] = {name: {} for name in running}
    for (name, position), by_batch in rates.items():
        ratio = Spread.of([eight / one for one, eight in zip(by_batch[1], by_batch[8], strict=True)])
        figures = {f"batch_{batch}_tok_s": rounded(Spread.of(values)) for batch, values in by_batch.items()}
        found[name][str(position)] = figures | {"ratio": rounded(ratio)}
        print(
            f"{name}, batch 8 / batch 1 after {position} tokens: {shown(rounded(ratio), 2)} "
            f"({shown(figures['batch_8_tok_s'])} tok/s); goal 3.5"
        )
    for contender in running.values():
        contender.stop()
    return found


def positions(bundles: dict[str, str], quiet: Quiet, args: argparse.Namespace) -> dict[str, Any]:
    """Measures steps late in a long context against early ones."""
    running, _ = started({name: Entry("slm", None, model) for name, model in bundles.items()}, args, LONG)
    seconds: dict[str, dict[int, list[float]]] = {name: {p: [] for p in POSITIONS} for name in running}
    for round_ in range(args.rounds + 1):
        for position in POSITIONS:
            for name, contender in running.items():
                took = contender.turn(quiet, position=position, batch=1, steps=args.new)["decode_s"] / args.new
                seconds[name][position] += [took] if round_ else []
    found: dict[str, Any] = {}
    for name, contender in running.items():
        contender.stop()
        early = seconds[name][POSITIONS[0]]
        found[name] = {
            str(position): {
                "decode_tok_s": rounded(Spread.of([1 / took for took in late])),
                "share_of_first": rounded(Spread.of([a / b for a, b in zip(early, late, strict=True)])),
            }
            for position, late in seconds[name].items()
        }
        for position, row in found[name].items():
            print(
                f"{name}, position {position}: {shown(row['decode_tok_s'])} tok/s, "
                f"{shown(row['share_of_first'], 2)} of position {POSITIONS[0]}"
            )
    print("goal: 0.65 at 8,000 with INT8 caches")
    return found


def memory(bundles: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Measures whole processes that read a prompt as long as the context and write a few tokens."""
    config = preset("gemma3-270m")
    found: dict[str, Any] = {}
    new, mib = 16, 1 << 20
    cases = [(f"4k, {name}", ENTRIES[name].model, 4096 - new) for name in BY_CACHES]
    cases += [(f"32k, {name}", path, LONG - new) for name, path in bundles.items()]
    for name, path, prompt in cases:
        if not (HOME / path).exists():
            print(f"left out: {name}: {HOME / path} is missing")
            continue
        bundle = Bundle.open(HOME / path)
        figures = fresh_process(HOME / path, prompt, new=new, threads=args.threads)
        dtype = 1 if bundle.manifest.cache[0].dtype == "int8" else 4
        ours, full = (cache_bytes(config, prompt + new, 1, dtype, kind) for kind in ("windowed", "full"))
        found[name] = figures | {
            "over_file": round(figures["rss_mib"] * mib / bundle.bytes, 3),
            "peak_over_file": round(figures["peak_rss_mib"] * mib / bundle.bytes, 3),
            "cache_mib": round(ours / mib, 1),
            "full_length_cache_mib": round(full / mib, 1),
            "peak_rss_mib_with_full_length_caches": round(figures["peak_rss_mib"] + (full - ours) / mib, 1),
        }
        row = found[name]
        print(
            f"memory at {name}: {row['rss_mib']:.0f} MiB during decode, {row['peak_rss_mib']:.0f} MiB peak, "
            f"{row['over_file']:.2f} and {row['peak_over_file']:.2f} times the bundle; "
            f"caches {row['cache_mib']:.0f} MiB; "
            f"at full length in every layer {row['full_length_cache_mib']:.0f}, "
            f"which would make {row['peak_rss_mib_with_full_length_caches']:.0f}"
        )
    print("goal: 2 times the INT8 file at 4k, aim 1.5")
    return found


def start(quiet: Quiet, args: argparse.Namespace) -> dict[str, float]:
    """Measures from the start of `slm generate` to the first character that the shipped model writes."""
    prompt = "Once upon a time"
    command = [sys.executable, "-m", "slm", "generate", "-p", prompt, "--greedy", "--max-new-tokens", "4"]

    def once() -> float:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=HOME)
        assert process.stdout
        read = b""
        while len(read) <= len(prompt) and (more := os.read(process.stdout.fileno(), 4096)):
            read += more
        seconds = time.perf_counter() - began
        process.communicate()
        return 1e3 * seconds

    times = [quiet.take([], once) for _ in range(args.rounds + 1)]
    found = rounded(Spread.of(times[1:]))
    print(f"slm generate, start to first token of the shipped model: {shown(found)} ms; goal 1,000")
    return found


def rounded(spread: Spread) -> dict[str, float]:
    """Returns a spread to four digits."""
    return {name: float(f"{value:.4g}") for name, value in asdict(spread).items()}


def shown(spread: dict[str, float], digits: int = 0) -> str:
    """Returns the median with the least and the most."""
    return "{:,.{d}f} ({:,.{d}f} – {:,.{d}f})".format(*(spread[name] for name in ("median", "min", "max")), d=digits)


if __name__ == "__main__":
    main()
