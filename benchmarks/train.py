"""Training throughput of the 270M shape, side by side with transformers' Gemma 3.

    python benchmarks/train.py [--batch 8] [--context 128] [--rounds 5] [--steps 2] [--preset gemma3-270m]

The contenders have the same shape, batch, AdamW, clipping and autocast. They take turns, so that whatever else the machine
does falls on all of them; each turn is a process of its own, for two of them do not fit into memory with a real batch, and
two steps of it warm up. slm keeps freed memory, as `slm train` does. The figures are medians over the timed steps of all
rounds, with the slowest and the fastest step; processor time is that of all threads. Memory is each process's highest
resident size. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

# The first compiles, the second allocates what later ones reuse.
WARM_UP = 2
CONTENDERS = ("slm", "slm compiled", "transformers", "transformers compiled")


def main() -> None:
    """Runs the contenders in turn and prints what they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="how many are timed in a turn")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--preset", default="gemma3-270m")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    from slm.core.accounting import prefill_flops
    from slm.core.machine import processor_name, usable_cores
    from slm.core.presets import preset

    config = preset(args.preset)
    tokens = args.batch * args.context
    flops = 3 * prefill_flops(config, args.context, head_positions=args.context).total / args.context
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    peaks = []
    for number in range(args.rounds):
        peaks.append(products(args.dtype))
        for name in CONTENDERS:
            found[name] += turn(name, sys.argv[1:])
            last = median(step["seconds"] for step in found[name][-args.steps :])
            print(f"round {number + 1}: {name} {tokens / last:,.0f} tokens/s", flush=True)
    peak = max(peaks)
    seconds = {name: median(step["seconds"] for step in steps) for name, steps in found.items()}
    rows = {
        name: {
            "tok_s": round(tokens / seconds[name], 1),
            "tok_s_min": round(tokens / max(step["seconds"] for step in steps), 1),
            "tok_s_max": round(tokens / min(step["seconds"] for step in steps), 1),
            "cpu_s": round(median(step["cpu_s"] for step in steps), 3),
            "share_of_peak": round(flops * tokens / seconds[name] / peak, 3),
            "peak_rss_mib": round(max(step["peak_rss_mib"] for step in steps)),
            "loss": round(steps[-1]["loss"], 4),
        }
        for name, steps in found.items()
    }
    print(f"{processor_name()}, {usable_cores()} cores; medians of {args.rounds} rounds (min – max)")
    for name, row in rows.items():
        print(
            f"{name:24} {row['tok_s']:8,.0f} ({row['tok_s_min']:,.0f} – {row['tok_s_max']:,.0f}) tokens/s  "
            f"{row['cpu_s']:7.2f} s of processor time a step  {row['share_of_peak']:6.1%} of the products' peak  "
            f"{row['peak_rss_mib']:7,} MiB"
        )
    ours, theirs = (max(rows[name]["tok_s"] for name in rows if name.startswith(whose)) for whose in ("slm", "tr"))
    ours_cpu, theirs_cpu = (
        min(row["cpu_s"] for name, row in rows.items() if name.startswith(w)) for w in ("slm", "tr")
    )
    print(
        f"the faster of ours over the faster of theirs: {ours / theirs:.2f}; by processor time {theirs_cpu / ours_cpu:.2f}"
    )
    print(
        json.dumps(
            {
                "preset": args.preset,
                "parameters": config.parameter_count(),
                "batch": args.batch,
                "context": args.context,
                "dtype": args.dtype,
                "processor": processor_name(),
                "cores": usable_cores(),
                "load_average": round(os.getloadavg()[0], 1),
                "peak_tflops": round(peak / 1e12, 2),
                "ratio": round(ours / theirs, 3),
                "ratio_cpu": round(theirs_cpu / ours_cpu, 3),
                **rows,
            }
        )
    )


def turn(name: str, arguments: list[str]) -> list[dict[str, float]]:
    """Has a contender make its steps in a process of its own; returns what it says of each that counts."""
    command = [sys.executable, __file__, *arguments, "--contender", name]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def contend(args: argparse.Namespace) -> None:
    """Is a contender: makes its steps and says what each took."""
    import torch

    from slm.core.machine import freed_memory_kept
    from slm.core.presets import preset

    torch.manual_seed(0)
    config = preset(args.preset)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.context + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    make = ours if args.contender.startswith("slm") else theirs
    update = make(config, inputs, targets, args.dtype == "bfloat16", args.contender.endswith("compiled"))
    with freed_memory_kept() if make is ours else nullcontext():
        steps(update, args.steps)


def steps(update: Callable[[], float], count: int) -> None:
    """Makes the steps and prints the figures of those that count."""
    from slm.core.processes import peak_rss_mib

    for number in range(WARM_UP + count):
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = update()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        if number >= WARM_UP:
            figures = {"seconds": seconds, "cpu_s": cpu, "loss": loss, "peak_rss_mib": peak_rss_mib()}
            print(json.dumps(figures), flush=True)


def ours(config: Any, inputs: Any, targets: Any, half: bool, compiled: bool) -> Callable[[], float]:
    """Returns an update as `slm train` makes it."""
    import torch

    from slm.core.nn import CausalLM
    from slm.train.learner import Learner, Objective, UpdateSettings
    from slm.train.optimizer import make_optimizers
    from slm.train.precision import Precision
    from slm.train.sections import OptimizerRecipe

    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    learner = Learner(
        Objective(model, compiled=compiled),
        make_optimizers(model, OptimizerRecipe(decay="all")),
        lambda micro_step: (inputs, targets),
        UpdateSettings(lambda micro_step: 1e-4, Precision(torch.bfloat16 if half else None, scale_loss=False)),
    )
    return lambda: learner.update(0, lambda: None).loss


def theirs(config: Any, inputs: Any, targets: Any, half: bool, compiled: bool) -> Callable[[], float]:
    """Returns an update of transformers' model with its own loss, its fused attention and torch's fused AdamW."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    fields = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type", "dtype")}
    hf_config = Gemma3TextConfig(**fields)
    hf_config._attn_implementation = "sdpa"
    model = Gemma3ForCausalLM(hf_config).float().train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.1, fused=True
    )

    def update() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = run(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return update


def products(dtype: str) -> float:
    """Measures how many floating-point operations a second matrix products come to here."""
    import torch

    size = 2048
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
