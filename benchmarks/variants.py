"""What a change to `modern` is worth in held-out loss, at equal tokens and at equal processor time.

The base is `modern` with the optimizer that it had until these measurements: plain Muon, momentum 0.95, betas 0.9 and 0.95.

    slm data prepare --data train.txt --val valid.txt --vocab-size 2048 --out datasets/small
    python benchmarks/variants.py datasets/small OUT --list
    python benchmarks/variants.py datasets/small OUT --seeds 0                     # every variant once
    python benchmarks/variants.py datasets/small OUT --only normuon,tail --seeds 0,1,2
    python benchmarks/variants.py datasets/small OUT --size 2m --only base,normuon --tokens 1048576
    python benchmarks/variants.py datasets/small OUT --table                       # runs nothing
    python benchmarks/variants.py datasets/small OUT --table --only base,normuon --picture variants.png

Each variant is the base with some values set. All runs of a table share model, data, tokens, held-out windows, float32 and one
thread. A complete schedule belongs to each budget. Results are appended to OUT/results.jsonl as soon as a run ends, and runs
that are there already with the same settings are skipped: a sweep that was stopped continues with the same command.

`--costs` measures the processor time a token of each variant and of its reference, one update of each in turns, in one process:
times of whole runs depend too much on what else the machine does. The result is OUT/costs.json. `--equal-time` then adds a run
for each variant whose token costs more or less than its reference's, with the tokens that take the same time. `--budgets` runs
the references with other budgets too, from which the table computes how many tokens they need for each variant's loss.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

from recipes import MODEL, PLAIN_MUON

BASE = "base"
# A width and depth whose blocks weigh more than the embedding; 2,019,264 parameters.
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
RESULTS, COSTS = "results.jsonl", "costs.json"
UPDATE = 16 * 128  # tokens of an update
# Rows of whole stories, the same tokens an update.
_LONG = ["batch.context=512", "batch.batch_size=4", "evaluation.context=512", "evaluation.windows=128"]

_NORMUON = "optimizer.name=normuon"
_SHORT = ["optimizer.momentum=0.9", "optimizer.embedding_betas=[0.8, 0.95]"]
_SHORTER = ["optimizer.momentum=0.85", "optimizer.embedding_betas=[0.5, 0.95]"]
_SMALL = ["batch.batch_size=8", "schedule.learning_rate=0.007"]  # half of the tokens an update, 0.7 of the rate

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
    "normuon": [_NORMUON],
    "normuon-rate-2": [_NORMUON, "optimizer.matrix_rate=2"],
    "muon-rate-2": ["optimizer.matrix_rate=2"],
    "momentum-0.8": ["optimizer.momentum=0.8"],
    "momentum-0.85": ["optimizer.momentum=0.85"],
    "momentum-0.9": ["optimizer.momentum=0.9"],
    "momentum-0.98": ["optimizer.momentum=0.98"],
    "momentum-warmup": ["optimizer.momentum_start=0.85", "optimizer.momentum_warmup=0.25"],
    # betas of the parameters that stay with AdamW
    "embedding-betas-0.8": ["optimizer.embedding_betas=[0.8, 0.95]"],
    "embedding-betas-0.5": ["optimizer.embedding_betas=[0.5, 0.95]"],
    "embedding-betas-0.99": ["optimizer.embedding_betas=[0.9, 0.99]"],
    "norm-betas-0.99": ["optimizer.norm_betas=[0.9, 0.99]"],
    # rows
    "context-from-32": ["batch.first_context=32"],
    # rows of 512, measured in windows of 512
    "rows-512": _LONG,
    "rows-512-from-64": [*_LONG, "batch.first_context=64"],
    "best-fit-512": [*_LONG, "data.sampler=best_fit"],
    # an ensemble of two base runs with other seeds, whose training is not counted
    "teachers-0.3": ["distillation.weight=0.3"],
    "teachers-0.7": ["distillation.weight=0.7"],
    # updates of 1,024 tokens, and of 4,096
    "small-updates": _SMALL,
    "small-updates-same-rate": ["batch.batch_size=8"],
    "large-updates": ["batch.batch_size=32", "schedule.learning_rate=0.014"],
    # schedule and initial weights
    "decay-from-start": ["schedule.decay=0.95"],
    "rate-1.5": ["schedule.learning_rate=0.015"],
    "embedding-rate-6": ["optimizer.embedding_rate=6"],
    "initial-0.01": ["model.initializer_range=0.01"],
    "initial-0.04": ["model.initializer_range=0.04"],
    # combinations
    "shorter-memories": _SHORT,
    "shorter-memories-rate-2": [*_SHORT, "optimizer.matrix_rate=2"],
    "shorter-memories-normuon": [*_SHORT, _NORMUON],
    "shorter-memories-normuon-cautious": [*_SHORT, _NORMUON, "optimizer.cautious=true", "optimizer.weight_decay=0.3"],
    "shorter-memories-normuon-rows": [*_SHORT, _NORMUON, "batch.first_context=32"],
    "normuon-momentum-0.9": [_NORMUON, "optimizer.momentum=0.9"],
    "shorter-memories-normuon-small-updates": [*_SHORT, _NORMUON, *_SMALL],
    "momentum-0.85-betas-0.5-normuon": [*_SHORTER, _NORMUON],
    "momentum-0.85-betas-0.5-normuon-small": [*_SHORTER, _NORMUON, *_SMALL],
    "momentum-0.8-betas-0.5-normuon": [*_SHORTER, _NORMUON, "optimizer.momentum=0.8"],
    "momentum-0.85-betas-0-normuon": [*_SHORTER, _NORMUON, "optimizer.embedding_betas=[0, 0.95]"],
    "momentum-0.7-betas-0-normuon": [_NORMUON, "optimizer.momentum=0.7", "optimizer.embedding_betas=[0, 0.95]"],
}
# What a variant is compared with, if not with the base: losses in other windows cannot be compared.
REFERENCES = {"rows-512": "rows-512", "rows-512-from-64": "rows-512", "best-fit-512": "rows-512"}
# The seeds of an ensemble's teachers, after the seed of the run, so that no run learns from itself.
TEACHERS = (101, 102)
# Budgets of the base in a table, as multiples of the variants'.
BUDGETS = (1.0, 0.6, 1.5, 2.0)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant: Name of the variant.
        seed: Seed.
        tokens: Tokens, rounded down to whole updates.
        overrides: Every value that differs from the base at full size.
    """

    variant: str
    seed: int
    tokens: int
    overrides: list[str]


def planned(size: str, variant: str, seed: int, tokens: int) -> Run:
    """Returns a run of a variant with a complete schedule for its budget."""
    update = _tokens_an_update(variant)
    micro_steps = tokens // update
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
    return Run(variant, seed, micro_steps * update, overrides)


def _tokens_an_update(variant: str) -> int:
    settings = dict(value.split("=", 1) for value in VARIANTS[variant])
    return int(settings.get("batch.batch_size", 16)) * int(settings.get("batch.context", 128))


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
    path = _place(out, size, run)
    shutil.rmtree(path, ignore_errors=True)
    more = [f"data.train={dataset}", "log=[]", *_further(out, size, run)]
    result = train(load_recipe("modern", [*PLAIN_MUON, *run.overrides, *more]), path)
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
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shutil.rmtree(path / "trainer", ignore_errors=True)
    print(f"{size} {run.variant}, seed {run.seed}, {run.tokens:,} tokens: {result.loss:.4f}", flush=True)


def _further(out: Path, size: str, run: Run) -> list[str]:
    """Returns the teachers of a run, which are runs of the base beside it."""
    if not run.variant.startswith("teachers"):
        return []
    found = (out / "runs").glob(f"{size}-{BASE}-*-s{TEACHERS[0]}")
    tokens = max((int(path.name.split("-")[-2]) for path in found), default=0)
    paths = [_place(out, size, Run(BASE, seed, tokens, [])) / "checkpoint/best" for seed in TEACHERS]
    return [f"distillation.teachers={json.dumps([str(path.resolve()) for path in paths])}"]


def _place(out: Path, size: str, run: Run) -> Path:
    return out / "runs" / f"{size}-{run.variant}-{run.tokens}-s{run.seed}"


def results(out: Path) -> list[dict[str, Any]]:
    """Returns the results so far."""
    file = out / RESULTS
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
    costs = _costs(out)
    for name in variants:
        cost = costs.get(f"{size} {name}", 1.0)
        if abs(cost - 1) > 0.03:
            yield from (planned(size, name, seed, round(tokens / cost)) for seed in seeds)


def measure_costs(dataset: str, out: Path, size: str, variants: Sequence[str], rounds: int) -> None:
    """Writes the processor time of a token of each variant, in units of its reference's: the median over the rounds."""
    import torch

    torch.set_num_threads(1)
    known = _costs(out)
    for name in variants:
        reference = REFERENCES.get(name, BASE)
        if name == reference:
            continue
        updates = [_update(dataset, out, size, each) for each in (reference, name)]
        tokens = _tokens_an_update(reference) / _tokens_an_update(name)
        ratios = []
        for number in range(-2, rounds):
            times = []
            for update in updates:
                began = time.process_time()
                update(number + 2)
                times.append(time.process_time() - began)
            if number >= 0:  # the first updates also allocate
                ratios.append(times[1] / times[0] * tokens)
        known[f"{size} {name}"] = round(median(ratios), 3)
        print(f"{size} {name}: {median(ratios):.3f} of the processor time of {reference}", flush=True)
        (out / COSTS).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _update(dataset: str, out: Path, size: str, variant: str) -> Callable[[int], object]:
    """Returns what makes one update of a variant, by its number."""
    import torch

    from slm.train.build import build_average, build_learner, build_model
    from slm.train.data.dataset import open_dataset
    from slm.train.parallel import Alone
    from slm.train.precision import FLOAT32
    from slm.train.recipe import load_recipe

    run = planned(size, variant, 0, 128 * UPDATE)
    recipe = load_recipe("modern", [*PLAIN_MUON, *run.overrides, *_further(out, size, run)])
    device, tokens = torch.device("cpu"), open_dataset(Path(dataset)).train
    model = build_model(recipe, recipe.model.config(), device, None)
    learner = build_learner(recipe, model, tokens, device, FLOAT32, None, Alone())
    average = build_average(recipe, model, 0)

    def update(number: int) -> None:
        learner.update(number, lambda: None)
        if average is not None:
            average.update()

    return update


def table(out: Path, size: str, tokens: int) -> list[dict[str, Any]]:
    """Returns a row for each variant and budget, by what it is compared with, the best loss first."""
    found = []
    for name, budget in sorted({(row["variant"], row["tokens"]) for row in results(out) if row["size"] == size}):
        reference = REFERENCES.get(name, BASE)
        base, at_budget = _budgets(out, size, reference), _rows(out, size, reference, tokens)
        rows, costs = _rows(out, size, name, budget), _costs(out)
        loss = mean(row["loss"] for row in rows)
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
                "reference": reference,
                "tokens": budget,
                "losses": {row["seed"]: round(row["loss"], 4) for row in rows},
                "loss": round(loss, 4),
                "against_reference": round(mean(paired), 4) if paired else None,
                "seeds_better": f"{sum(d < 0 for d in paired)} of {len(paired)}" if paired else "",
                "processor_time": 1.0 if name == reference else costs.get(f"{size} {name}"),
                "reference_tokens_for_this_loss": None if need is None else round(need),
                "share_of_tokens": None if need is None else round(budget / need, 3),
            }
        )
    return sorted(found, key=lambda row: (row["reference"], row["loss"]))


def needed(budgets: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Returns the tokens with which the base reaches a loss, interpolated over the logarithm; None outside its budgets."""
    ordered = sorted(budgets)
    for (low, above), (high, below) in pairwise(ordered):
        if below <= loss <= above:
            share = (above - loss) / (above - below)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return None


def _budgets(out: Path, size: str, variant: str) -> list[tuple[int, float]]:
    rows = [row for row in results(out) if (row["size"], row["variant"]) == (size, variant)]
    budgets = sorted({row["tokens"] for row in rows})
    return [(tokens, mean(row["loss"] for row in rows if row["tokens"] == tokens)) for tokens in budgets]


def _rows(out: Path, size: str, variant: str, tokens: int) -> list[dict[str, Any]]:
    """Returns the results of one variant and budget by seed; a setting that was changed since is left out."""
    rows = [row for row in results(out) if (row["size"], row["variant"], row["tokens"]) == (size, variant, tokens)]
    return sorted({row["seed"]: row for row in rows}.values(), key=lambda row: row["seed"])


def _costs(out: Path) -> dict[str, float]:
    """Returns the processor time of a token by size and variant, in units of its reference's."""
    file = out / COSTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def draw(out: Path, size: str, variants: Sequence[str], picture: Path) -> None:
    """Draws the loss at the end of each run over its tokens: a point for each seed, and the mean of each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    measured = [name for name in variants if _budgets(out, size, name)]
    for number, name in enumerate(measured):
        rows = [row for row in results(out) if (row["size"], row["variant"]) == (size, name)]
        axes.plot([row["tokens"] for row in rows], [row["loss"] for row in rows], "o", color=f"C{number}", markersize=3)
        tokens, losses = zip(*_budgets(out, size, name), strict=True)
        axes.plot(tokens, losses, color=f"C{number}", label=name)
    axes.set(xscale="log", xlabel="tokens, a complete schedule each", ylabel="held-out loss (nats a token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(picture, dpi=110)


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
    parser.add_argument("--budgets", action="store_true", help="run the references at other budgets too")
    parser.add_argument("--costs", type=int, metavar="ROUNDS", help="measure the processor time of updates, and end")
    parser.add_argument("--equal-time", action="store_true", help="run each variant for the base's processor time too")
    parser.add_argument("--list", action="store_true", help="print the variants and what is still to be run")
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    parser.add_argument("--picture", type=Path, help="draw the variants' losses over their budgets, as a PNG file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names, seeds = args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there is {', '.join(VARIANTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = args.tokens // UPDATE * UPDATE
    wanted = [planned(args.size, name, seed, tokens) for seed in seeds for name in names]
    if any(name.startswith("teachers") for name in names):
        wanted = [*(planned(args.size, BASE, seed, tokens) for seed in TEACHERS), *wanted]
    if args.budgets:
        wanted += [
            planned(args.size, name, seed, round(tokens * share))
            for seed in seeds
            for name in dict.fromkeys(REFERENCES.get(name, BASE) for name in names)
            for share in BUDGETS
        ]
    if args.list:
        known = [(row["size"], row["overrides"]) for row in results(args.out)]
        for run in wanted:
            state = "done" if (args.size, run.overrides) in known else "to run"
            print(f"{state:7} {run.variant:30} seed {run.seed}  {run.tokens:>10,}  {' '.join(VARIANTS[run.variant])}")
        return
    if args.costs:
        measure_costs(args.dataset, args.out, args.size, names, args.costs)
        return
    if not args.table:
        run_all(args.dataset, args.out, args.size, wanted, args.jobs)
        if args.equal_time:
            later = list(equal_time(args.out, args.size, [n for n in names if n != BASE], seeds, tokens))
            run_all(args.dataset, args.out, args.size, later, args.jobs)
    if args.picture:
        draw(args.out, args.size, names, args.picture)
    rows = table(args.out, args.size, tokens)
    for row in rows:
        print(
            f"{row['variant']:30} {row['tokens']:>10,} tokens  {row['loss']:.4f}  {row['against_reference'] or 0:+.4f}  "
            f"{row['seeds_better']:>6}  time × {row['processor_time'] or 0:.2f}  tokens × {row['share_of_tokens'] or 0:.2f}  "
            f"{list(row['losses'].values())}"
        )
    print(json.dumps({"size": args.size, "tokens": tokens, "table": rows}))


if __name__ == "__main__":
    main()
