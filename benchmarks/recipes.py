"""How many tokens a small model needs under `modern` for the loss that `documented` ends with.

    slm data prepare --data train.txt --val valid.txt --vocab-size 2048 --out datasets/small
    python benchmarks/recipes.py datasets/small OUT [--picture docs/recipes.png] [--jobs 1]

A model of 502,272 parameters, 5,242,880 tokens or fewer, the same 512 windows of 128 held-out tokens for all. `documented`
keeps its 131,072 tokens an update and its schedule's proportions, which leaves 40 updates; its learning rate is swept by
factors; and it is run with 4,096 tokens an update too, for with 40 updates no rate can do much. `modern` runs with 2,048
tokens an update, a complete schedule for each budget, and the optimizer that it had when these figures were measured: plain
Muon. What is in OUT already is not run again. Everything ends in one picture and one JSON object.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

BUDGET = 40 * 131_072
MODEL = [
    "model.preset=tiny",
    "model.vocab_size=2048",
    "model.hidden_size=96",
    "model.intermediate_size=256",
    "model.num_hidden_layers=3",
    "model.layer_types=[sliding_attention, sliding_attention, full_attention]",
    "model.head_dim=48",
    "model.num_attention_heads=2",
    "model.sliding_window=128",
    "model.max_position_embeddings=512",
    "data.tokenizer=bpe",
    "evaluation.windows=512",
    "evaluation.context=128",
]
# `modern` until 2026-11-29.
PLAIN_MUON = ["optimizer.name=muon", "optimizer.momentum=0.95", "optimizer.embedding_betas=null"]
SEEDS = range(3)
# D: 131,072 tokens an update, as documented. E: 4,096.
ACCUMULATION = {"D": 32, "E": 1}
RATES = {"D": (10, 30, 100, 300, 1000), "E": (10, 30, 100)}
BUDGETS = (65_536, 131_072, 163_840, 524_288, 1_048_576, 1_747_968)

Run = tuple[str, str, list[str]]  # label, recipe, overrides


def documented(label: str, factor: int, seed: int, accumulation: int) -> Run:
    """Returns a run of `documented` with its schedule scaled to the budget and its rates multiplied."""
    micro_steps = BUDGET // 4096
    return (
        label,
        "documented",
        [
            f"seed={seed}",
            f"batch.accumulation={accumulation}",
            f"schedule.micro_steps={micro_steps}",
            f"schedule.warmup_micro_steps={round(micro_steps / 15)}",
            f"schedule.learning_rate={1e-4 * factor}",
            f"schedule.final_learning_rate={5e-4 * factor}",
            f"evaluation.every_micro_steps={micro_steps // 20}",
        ],
    )


def modern(tokens: int, seed: int) -> Run:
    """Returns a run of `modern` with a complete schedule for a budget."""
    micro_steps = tokens // 2048
    return (
        f"M-{tokens}-s{seed}",
        "modern",
        [
            f"seed={seed}",
            "batch.batch_size=16",
            "batch.context=128",
            "batch.accumulation=1",
            f"schedule.micro_steps={micro_steps}",
            f"schedule.warmup_micro_steps={max(10, min(80, micro_steps // 6))}",
            "schedule.learning_rate=0.01",
            *PLAIN_MUON,
            "optimizer.embedding_rate=3",
            f"evaluation.every_micro_steps={micro_steps // 12}",
        ],
    )


def runs() -> list[Run]:
    """Returns all runs, sweeps first."""
    sweeps = [documented(f"{kind}-x{f}-s0", f, 0, ACCUMULATION[kind]) for kind in "DE" for f in RATES[kind]]
    plain = [documented(f"D-s{seed}", 1, seed, 32) for seed in SEEDS]
    return [*sweeps, *plain, *(modern(tokens, seed) for tokens in BUDGETS for seed in SEEDS)]


def train(dataset: str, out: Path, run: Run) -> None:
    """Runs one of them, unless it is there."""
    import torch

    from slm.train.recipe import load_recipe
    from slm.train.run import train as train_recipe

    label, recipe, overrides = run
    path = out / label
    if (path / "result.json").is_file():
        return
    torch.set_num_threads(1)
    shutil.rmtree(path, ignore_errors=True)
    result = train_recipe(load_recipe(recipe, [*MODEL, f"data.train={dataset}", *overrides]), path)
    (path / "result.json").write_text(json.dumps({"loss": result.loss, "bits_per_byte": result.bits_per_byte}))
    print(f"{label}: {result.loss:.4f}", flush=True)


def train_all(dataset: str, out: Path, wanted: Sequence[Run], jobs: int) -> None:
    """Runs several at a time."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(train, dataset, out, run) for run in wanted]:
            future.result()


def evaluations(out: Path, label: str) -> list[tuple[int, float]]:
    """Returns tokens and held-out losses of a run; empty where it was not run."""
    file = out / label / "metrics.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    return [(row["tokens"], row["loss"]) for row in rows if row["type"] == "eval"]


def main() -> None:
    """Runs what is missing, draws, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("recipes.png"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only-draw", action="store_true", help="take what is there and run nothing")
    args = parser.parse_args()

    def final(label: str) -> float:
        return (evaluations(args.out, label) or [(0, float("inf"))])[-1][1]

    if not args.only_draw:
        train_all(args.dataset, args.out, runs(), args.jobs)
    best = {kind: min(RATES[kind], key=lambda f, kind=kind: final(f"{kind}-x{f}-s0")) for kind in "DE"}
    if not args.only_draw:
        more = [documented(f"{k}-x{f}-s{s}", f, s, ACCUMULATION[k]) for k, f in best.items() for s in SEEDS]
        train_all(args.dataset, args.out, more, args.jobs)
    groups = {
        "documented": [f"D-s{s}" for s in SEEDS],
        f"documented, rate × {best['D']}": [f"D-x{best['D']}-s{s}" for s in SEEDS],
        f"documented, 4,096 tokens an update, rate × {best['E']}": [f"E-x{best['E']}-s{s}" for s in SEEDS],
        **{f"modern, {tokens:,} tokens": [f"M-{tokens}-s{s}" for s in SEEDS] for tokens in BUDGETS},
    }
    curves = {name: [c for label in labels if (c := evaluations(args.out, label))] for name, labels in groups.items()}
    draw(curves, args.picture)
    figures = {
        name: {
            "tokens": found[0][-1][0],
            "seeds": len(found),
            "loss": round(mean(curve[-1][1] for curve in found), 4),
            "losses": [round(curve[-1][1], 4) for curve in found],
        }
        for name, found in curves.items()
        if found
    }
    for name, row in figures.items():
        print(f"{name:55} {row['tokens']:>10,} tokens  {row['loss']:.4f}  {row['losses']}")
    swept = {label: round(final(label), 4) for k in "DE" for f in RATES[k] for label in [f"{k}-x{f}-s0"]}
    print(json.dumps({"figures": figures, "sweeps": swept}))


def draw(curves: dict[str, list[list[tuple[int, float]]]], picture: Path) -> None:
    """Draws every run's held-out loss over the tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = iter([*("C3", "C1", "C8"), *("C0",) * len(curves)])
    told = False
    for name, found in curves.items():
        colour = next(colours)
        for number, curve in enumerate(found):
            ours = name.startswith("modern")
            label = None if number or (ours and told) else ("modern, a schedule for each budget" if ours else name)
            told = told or ours
            tokens, losses = zip(*[point for point in curve if point[0]], strict=True)
            axes.plot(tokens, losses, color=colour, linewidth=1, label=label)
            axes.plot(tokens[-1:], losses[-1:], "o", color=colour, markersize=4)
    axes.set(xscale="log", xlabel="tokens", ylabel="held-out loss (nats a token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
