"""The part of `benchmarks/peers.py` for the real Gemma 3 270M: decode and prefill side by side with llama.cpp.

llama.cpp runs with flash attention and without, since either can be faster, in Q8_0 (from the same weights) and in Q4_K_M (the
file itself). It is the one that `make bench-peers` builds for this processor, and otherwise the wheel that `make peers`
installs, which is built for AVX2. The GGUF file is the only source of weights that needs no account, and all bundles are
made from it.
"""

import argparse
from typing import Any

from peer_files import HOME, PEERS, REAL, prepare_gemma
from peers import AMX_OFF, Entry, Quiet, rounded, shown, started

from slm.runtime.bench import Spread

POSITIONS = (128, 512, 2048)
OURS = "slm INT8"
_BUILT, _WHEEL = ("llamacpp-native", "llama.cpp", AMX_OFF), ("llamacpp", "xllamacpp", "wheel, AVX2")


def entries() -> dict[str, Entry]:
    """Returns who takes part."""
    packages, engine, note = _BUILT if (PEERS / _BUILT[0]).is_dir() else _WHEEL
    found = {OURS: Entry("slm", None, "gemma-int8")}
    for name, file in (("Q8_0", str((HOME / "gemma-q8_0.gguf").resolve())), ("Q4_K_M", str(REAL.resolve()))):
        for flash, kind in (("with flash attention", "flash"), ("without", "plain")):
            found[f"llama.cpp {name} {flash}"] = Entry(f"{engine} {kind}", packages, file, note)
    return found


def gemma(quiet: Quiet, args: argparse.Namespace) -> dict[str, Any]:
    """Measures decode and prefill after prompts of each length, in turns, and the ratios of each round."""
    prepare_gemma()
    all_of_them = entries() | {
        name: Entry("slm", None, path) for name, _, path in (said.partition("=") for said in args.gemma_bundle)
    }
    running, missing = started(all_of_them, args, max(POSITIONS) + args.new + 32)
    seconds: dict[int, dict[str, list[dict[str, float]]]] = {}
    for position in POSITIONS:
        seconds[position] = {name: [] for name in running}
        for round_ in range(args.rounds + 1):  # the first warms up
            for name, contender in running.items():
                turn = contender.turn(quiet, read=position, new=args.new)
                seconds[position][name] += [turn] if round_ else []
    for contender in running.values():
        contender.stop()
    found: dict[str, Any] = {"missing": missing}
    for position, turns in seconds.items():
        found[str(position)] = _rows(position, turns, args)
    return found


def _rows(position: int, turns: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the speeds after one length of prompt, and ours over the better of each pair of llama.cpp's."""
    rows: dict[str, Any] = {}
    for name, taken in turns.items():
        rows[name] = {
            "decode_tok_s": rounded(Spread.of([(args.new - 1) / turn["decode_s"] for turn in taken])),
            "prefill_tok_s": rounded(Spread.of([position / turn["read_s"] for turn in taken])),
        }
        decode, prefill = (shown(rows[name][f"{figure}_tok_s"]) for figure in ("decode", "prefill"))
        print(f"after {position:5} tokens  {name:40} decode {decode:22} prefill {prefill:28} tok/s", flush=True)
    if OURS in turns:
        for other in sorted({name.partition(" with")[0] for name in turns if name.startswith("llama.cpp")}):
            theirs = [each for name, each in turns.items() if name.startswith(other)]
            for figure, key in (("decode", "decode_s"), ("prefill", "read_s")):
                best = [min(turn[key] for turn in round_) for round_ in zip(*theirs, strict=True)]
                ratio = Spread.of([his / our[key] for our, his in zip(turns[OURS], best, strict=True)])
                rows.setdefault("ratios", {})[f"{other}, {figure}"] = rounded(ratio)
                print(f"after {position:5} tokens  {OURS} / {other}, {figure}: {shown(rounded(ratio), 2)}", flush=True)
    return rows
