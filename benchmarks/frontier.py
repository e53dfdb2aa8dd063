"""Draws what a sweep found: divergence against size, and against the speed of writing, with other programs' files beside it.

    slm quantize --sweep BUNDLE --out DIR
    python benchmarks/frontier.py DIR/sweep.json docs/quantization.png --point "llama.cpp Q8_0=292,0.0032"

A point is NAME=MB,NATS: size and mean divergence of a file of the same weights, measured on the same text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Settings by the beginning of their options: colour and mark.
_KINDS = (("--int8-dynamic", "tab:purple", "D"), ("--int8", "tab:blue", "o"), ("--int4", "tab:orange", "s"))


def main() -> None:
    """Reads the sweep and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--point", action="append", default=[], metavar="NAME=MB,NATS")
    args = parser.parse_args()
    trials: list[dict[str, Any]] = json.loads(args.sweep.read_text(encoding="utf-8"))["trials"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    by_size, by_speed = figure.subplots(1, 2, sharey=True)
    for trial in trials:
        colour, mark = next((colour, mark) for start, colour, mark in _KINDS if trial["options"].startswith(start))
        name = trial["options"].removeprefix("--").replace(" --", ", ")
        for axes, x in ((by_size, trial["bytes"] / 1e6), (by_speed, trial["decode_ratio"])):
            axes.plot(x, trial["change"]["kl_nats"], mark, color=colour)
            axes.annotate(name, (x, trial["change"]["kl_nats"]), fontsize=6, xytext=(4, 2), textcoords="offset points")
    for point in args.point:
        name, _, values = point.partition("=")
        megabytes, nats = map(float, values.split(","))
        by_size.plot(megabytes, nats, "x", color="black")
        by_size.annotate(name, (megabytes, nats), fontsize=7, xytext=(4, 2), textcoords="offset points")
    by_size.set(yscale="log", xlabel="graph and weights, MB", ylabel="mean divergence from float32, nats a token")
    by_speed.set(xlabel="times as fast to write as float32")
    for axes in (by_size, by_speed):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
