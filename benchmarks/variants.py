"""What a change to `modern` is worth in held-out loss, at equal tokens and at equal processor time.

    slm data prepare --data train.txt --val valid.txt --vocab-size 2048 --out datasets/small
    python benchmarks/variants.py datasets/small OUT --list
    python benchmarks/variants.py datasets/small OUT --seeds 0                     # every variant once
    python benchmarks/variants.py datasets/small OUT --only normuon,tail --seeds 0,1,2
    python benchmarks/variants.py datasets/small OUT --size 2m --only base,normuon --tokens 1048576
    python benchmarks/variants.py datasets/small OUT --table                       # runs nothing

Each variant is `modern` with some values set. All runs of a table share model, data, tokens, held-out windows, float32 and one
thread. A complete schedule belongs to each budget. Results are appended to OUT/results.jsonl as soon as a run ends, and runs
that are there already with the same settings are skipped: a sweep that was stopped continues with the same command.

`--equal-time` adds a second run for each variant whose update costs more or less processor time than the base's: its tokens are
scaled so that both take the same time. The base is run with several budgets, from which the table computes how many tokens the
base needs for each variant's loss.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from recipes import MODEL

BASE = "base"
# A width and depth whose blocks weigh more than the embedding; 2,046,528 parameters.
SIZES: dict[str, list[str]] = {
    "0.5m": MODEL,
    "2m": [
        *MODEL,
        "model.hidden_size=192",
        "model.intermediate_size=512",
        "model.num_hidden_layers=4",
        "model.layer_types=[sliding_attention, sliding_attention, sliding_attention, full_attention]",
        "model.head_dim=96",
    ],
}
ROWS = 16 * 128  # tokens of an update
_MUON = "optimizer.name=muon"

# The values that each variant sets on top of the base.
VARIANTS: dict[str, list[str]] = {
    BASE: [],
    # weight decay and dropout
    "decay-0": ["optimizer.weight_decay=0"],
    "decay-0.3": ["optimizer.weight_decay=0.3"],
    "decay-1": ["optimizer.weight_decay=1"],
    "cautious-0.1": ["optimizer.cautious=true"],
    "cautious-0.3": ["optimizer.cautious=true", "optimizer.weight_decay=0.3"],
    "cautious-1": ["optimizer.cautious=true", "optimizer.weight_decay=1"],
    "cautious-1-linear": ["optimizer.cautious=true", "optimizer.weight_decay=1", "optimizer.decay_shape=linear"],
    "dropout-0.05": ["regularization.dropout=0.05"],
    # averages
    "ema-0.98": ["optimizer.ema=0.98"],
    "tail-0.1": ["optimizer.tail=0.1"],
    "tail-0.2-rate-left": ["optimizer.tail=0.2", "schedule.final_learning_rate=0.001"],
    # the matrices' optimizer
    "normuon": ["optimizer.name=normuon"],
    "normuon-rate-2": ["optimizer.name=normuon", "optimizer.matrix_rate=2"],
    "muon-rate-2": ["optimizer.matrix_rate=2"],
    "momentum-0.9": ["optimizer.momentum=0.9"],
    "momentum-0.98": ["optimizer.momentum=0.98"],
    "momentum-warmup": ["optimizer.momentum_start=0.85", "optimizer.momentum_warmup_micro_steps=64"],
    # betas of the parameters that stay with AdamW
    "embedding-betas-0.8": ["optimizer.embedding_betas=[0.8, 0.95]"],
    "embedding-betas-0.5": ["optimizer.embedding_betas=[0.5, 0.95]"],
    "embedding-betas-0.99": ["optimizer.embedding_betas=[0.9, 0.99]"],
    "norm-betas-0.99": ["optimizer.norm_betas=[0.9, 0.99]"],
    # rows
    "context-from-32": ["batch.first_context=32"],
}
# Budgets of the base in a table, as multiples of the variants'.
BUDGETS = (1.0, 0.6, 1.5, 2.0)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant: Name of the variant.
        seed: Seed.
        tokens: Tokens, rounded down to whole updates.
        overrides: Every value that differs from the recipe `modern`.
    """

    variant: str
    seed: int
    tokens: int
    overrides: list[str]


def planned(size: str, variant: str, seed: int, tokens: int) -> Run:
    """Returns a run of a variant with a complete schedule for its budget."""
    micro_steps = tokens // ROWS
    overrides = [
        *SIZES[size],
        f"seed={seed}",
        "machine.precision=float32",
        "batch.batch_size=16",
        "batch.context=128",
        "batch.accumulation=1",
        f"schedule.micro_steps={micro_steps}",
        f"schedule.warmup_micro_steps={max(10, min(80, micro_steps // 6))}",
        "schedule.learning_rate=0.01",
        "optimizer.embedding_rate=3",
        f"evaluation.every_micro_steps={max(1, micro_steps // 3)}",
        "evaluation.prompts=[]",
        *VARIANTS[variant],
    ]
    return Run(variant, seed, micro_steps * ROWS, overrides)


def measure(dataset: str, out: Path, size: str, run: Run) -> None:
    """Trains in a process of its own, and appends the result."""
    import torch

    from slm.train.pretraining import Pretraining
    from slm.train.recipe import load_recipe
    from slm.train.run import train

    torch.set_num_threads(1)
    spent = {"seconds": 0.0, "process_seconds": 0.0}
    update = Pretraining.update

    def timed(task: Pretraining, check: Any) -> None:
        wall, process = time.perf_counter(), time.process_time()
        update(task, check)
        spent["seconds"] += time.perf_counter() - wall
        spent["process_seconds"] += time.process_time() - process

    Pretraining.update = timed  # type: ignore[method-assign]  # evaluations do not count
    path = out / "runs" / f"{size}-{run.variant}-{run.tokens}-s{run.seed}"
    shutil.rmtree(path, ignore_errors=True)
    result = train(load_recipe("modern", [*run.overrides, f"data.train={dataset}", "log=[]"]), path)
    rows = map(json.loads, (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    row = {
        "size": size,
        "variant": run.variant,
        "seed": run.seed,
        "tokens": run.tokens,
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        **{name: round(value, 2) for name, value in spent.items()},
        "parameters": result.parameters,
        "curve": [(r["tokens"], r["loss"]) for r in rows if r["type"] == "eval"],
        "torch": torch.__version__,
        "overrides": run.overrides,
    }
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(path / "trainer", ignore_errors=True)
    print(f"{size} {run.variant}, seed {run.seed}, {run.tokens:,} tokens: {result.loss:.4f}", flush=True)


def results(out: Path) -> list[dict[str, Any]]:
    """Returns the results so far."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def run_all(dataset: str, out: Path, size: str, wanted: Sequence[Run], jobs: int) -> None:
    """Runs what is missing, several at a time."""
    known = [(row["size"], row["overrides"]) for row in results(out)]
    missing = [run for run in wanted if (size, run.overrides) not in known]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [(run, pool.submit(measure, dataset, out, size, run)) for run in missing]
        for run, future in futures:
            try:
                future.result()
            except Exception as error:  # the other variants still run
                print(f"{size} {run.variant}, seed {run.seed}: {error}", flush=True)


def equal_time(out: Path, size: str, variants: Sequence[str], seeds: Sequence[int], tokens: int) -> Iterator[Run]:
    """Yields runs with the tokens that each variant processes in the base's processor time, where they differ by 3 %."""
    costs = {name: _cost(_rows(out, size, name, tokens)) for name in (BASE, *variants)}
    for name in variants:
        cost, base = costs[name], costs[BASE]
        if cost is not None and base is not None and abs(base / cost - 1) > 0.03:
            yield from (planned(size, name, seed, round(tokens * base / cost)) for seed in seeds)


def table(out: Path, size: str, tokens: int) -> list[dict[str, Any]]:
    """Returns a row for each variant and budget, the best loss first."""
    base = _budgets(out, size)
    at_budget = _rows(out, size, BASE, tokens)
    cost = _cost(at_budget)
    found = []
    for name, budget in sorted({(row["variant"], row["tokens"]) for row in results(out) if row["size"] == size}):
        rows = _rows(out, size, name, budget)
        loss, mine = mean(row["loss"] for row in rows), _cost(rows)
        paired = [
            row["loss"] - other["loss"]
            for row in rows
            for other in at_budget
            if budget == tokens and row["seed"] == other["seed"]
        ]
        need = needed(base, loss)
        found.append(
            {
                "variant": name,
                "tokens": budget,
                "losses": {row["seed"]: round(row["loss"], 4) for row in rows},
                "loss": round(loss, 4),
                "against_base": round(mean(paired), 4) if paired else None,
                "seeds_better": f"{sum(d < 0 for d in paired)} of {len(paired)}" if paired else "",
                "processor_time": None if mine is None or cost is None else round(mine / cost, 3),
                "base_tokens_for_this_loss": None if need is None else round(need),
                "share_of_tokens": None if need is None else round(budget / need, 3),
            }
        )
    return sorted(found, key=lambda row: row["loss"])


def needed(budgets: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Returns the tokens with which the base reaches a loss, interpolated over the logarithm; None outside its budgets."""
    ordered = sorted(budgets)
    for (low, above), (high, below) in zip(ordered, ordered[1:], strict=False):
        if below <= loss <= above:
            share = (above - loss) / (above - below)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return None


def _budgets(out: Path, size: str) -> list[tuple[int, float]]:
    rows = [row for row in results(out) if (row["size"], row["variant"]) == (size, BASE)]
    budgets = sorted({row["tokens"] for row in rows})
    return [(tokens, mean(row["loss"] for row in rows if row["tokens"] == tokens)) for tokens in budgets]


def _rows(out: Path, size: str, variant: str, tokens: int) -> list[dict[str, Any]]:
    """Returns the results of one variant and budget by seed; a setting that was changed since is left out."""
    rows = [row for row in results(out) if (row["size"], row["variant"], row["tokens"]) == (size, variant, tokens)]
    return sorted({row["seed"]: row for row in rows}.values(), key=lambda row: row["seed"])


def _cost(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns the processor seconds per token: the least of several runs, as other programs only add to it."""
    return min((row["process_seconds"] / row["tokens"] for row in rows), default=None)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5m")
    parser.add_argument("--only", default=",".join(VARIANTS), help="names of variants, separated by commas")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budgets", action="store_true", help="run the base with the other budgets of a table too")
    parser.add_argument("--equal-time", action="store_true", help="run each variant for the base's processor time too")
    parser.add_argument("--list", action="store_true", help="print the variants and what is still to be run")
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names, seeds = args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there is {', '.join(VARIANTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = args.tokens // ROWS * ROWS
    wanted = [planned(args.size, name, seed, tokens) for seed in seeds for name in names]
    if args.budgets:
        wanted += [planned(args.size, BASE, seed, round(tokens * share)) for seed in seeds for share in BUDGETS]
    if args.list:
        known = [(row["size"], row["overrides"]) for row in results(args.out)]
        for run in wanted:
            state = "done" if (args.size, run.overrides) in known else "to run"
            print(f"{state:7} {run.variant:30} seed {run.seed}  {run.tokens:>10,}  {' '.join(VARIANTS[run.variant])}")
        return
    if not args.table:
        run_all(args.dataset, args.out, args.size, wanted, args.jobs)
        if args.equal_time:
            later = list(equal_time(args.out, args.size, [n for n in names if n != BASE], seeds, tokens))
            run_all(args.dataset, args.out, args.size, later, args.jobs)
    rows = table(args.out, args.size, tokens)
    for row in rows:
        print(
            f"{row['variant']:30} {row['tokens']:>10,} tokens  {row['loss']:.4f}  {row['against_base'] or 0:+.4f}  "
            f"{row['seeds_better']:>6}  time × {row['processor_time'] or 0:.2f}  tokens × {row['share_of_tokens'] or 0:.2f}  "
            f"{list(row['losses'].values())}"
        )
    print(json.dumps({"size": args.size, "tokens": tokens, "table": rows}))


if __name__ == "__main__":
    main()
