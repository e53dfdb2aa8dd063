"""How long training stands still for a save, written at once or in the background.

    python benchmarks/saves.py [--preset gemma3-270m] [--rounds 5] [--context 128] [--updates] [--dir DIR]

Makes an update of one window, so that the optimizer has its state, and saves the run in turns: at once, and with
`checkpoints.asynchronous`. With --updates it also times an update while the thread writes, and one without it. Figures are
medians in milliseconds; the processor time is this process's, all threads. The first round is not counted: it allocates the
copies. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from slm.core.progress import Silent
from slm.train import run as module
from slm.train.parallel import Alone
from slm.train.prepare import prepare
from slm.train.recipe import load_recipe
from slm.train.writer import AtOnce, Background, Writer


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Returns the wall and the processor time of some work, in milliseconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def main() -> None:
    """Saves in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemma3-270m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--updates", action="store_true", help="time updates too")
    parser.add_argument("--dir", type=Path, help="where the run is saved; a temporary directory by default")
    args = parser.parse_args()
    overrides = [
        f"model.preset={args.preset}",
        "data.train=[sample]",
        "data.tokenizer=bpe",
        "optimizer.name=adamw",
        "batch.batch_size=1",
        f"batch.context={args.context}",
        "batch.accumulation=1",
        "evaluation.windows=1",
        "log=[]",
    ]
    recipe = load_recipe("modern", overrides)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        path = Path(directory) / "run"
        prepare(recipe, path, Silent())
        opened = module._Run(path, Alone(), Silent())
        print(measure(opened, args.rounds, args.updates))


def measure(opened: module._Run, rounds: int, updates: bool) -> str:
    """Returns the figures of an opened run as JSON."""
    step = iter(range(1_000_000))

    def update() -> None:
        opened.learner.update(next(step), lambda: None)

    update()
    writers: dict[str, Writer] = {"at_once": AtOnce(), "background": Background(shared=True)}
    names = ("at_once", "background", "update_alone", "update_meanwhile", "writing")
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        taken = {"update_alone": timed(update)} if updates else {}
        for name, writer in writers.items():
            opened.keeper._writer = writer
            began = time.perf_counter()
            taken[name] = timed(lambda: opened.save(opened.counters))
            if name == "background":
                if updates:
                    taken["update_meanwhile"] = timed(update)
                opened.keeper.finish()
                taken["writing"] = ((time.perf_counter() - began) * 1e3, 0.0)
        print(number, {name: round(wall) for name, (wall, _) in taken.items()}, flush=True)
        if number:
            for name, each in taken.items():
                figures[name].append(each)
    state = opened.learner.optimizers.state_tensors(opened.model)
    return json.dumps(
        {
            "parameters": opened.config.parameter_count(),
            "state_mib": round((4 * opened.config.parameter_count() + sum(x.nbytes for x in state.values())) / 2**20),
            "rounds": rounds,
            **{
                f"{name}_{kind}ms": round(statistics.median(each[place] for each in taken), 1)
                for name, taken in figures.items()
                if taken
                for place, kind in enumerate(("", "processor_"))
            },
        }
    )


if __name__ == "__main__":
    main()
