"""`slm train --dry-run`: what a recipe would do, what it would take, and what looks wrong in it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slm.cli.console import STDOUT, print_json, print_table, say
from slm.core.errors import SlmError

if TYPE_CHECKING:
    from slm.train.recipe import Recipe

# GPT-2's vocabulary on English prose; only for text that nobody has tokenized yet.
_BYTES_PER_TOKEN = 4.0
_MIB = 1 << 20


def foresee(recipe: "Recipe", gpu: str | None, as_json: bool, processes: int = 1) -> None:
    """Prints the resolved recipe, its estimate and what is odd about it.

    Raises:
        SlmError: When the GPU is not known, or the length hangs on a text whose length is not known.
    """
    from slm.core.machine import memory
    from slm.train.estimate import GPUS, estimate
    from slm.train.loop import duration
    from slm.train.review import review

    if gpu is not None and gpu.lower() not in GPUS:
        raise SlmError(f"slm has no figures for a {gpu}", f"--on {', '.join(GPUS)}")
    text_tokens, measured = _text_tokens(recipe)
    if text_tokens is None and recipe.schedule.epochs is not None:
        raise SlmError(
            "schedule.epochs cannot be turned into updates before the text is there",
            "slm data prepare --data … first, or --set schedule.epochs=null --set schedule.micro_steps=N",
        )
    recipe = recipe.for_tokens(text_tokens or 0)
    est = estimate(recipe, gpu and gpu.lower(), memory().usable, processes)
    passes = est.tokens / text_tokens if text_tokens else None
    odd = review(recipe, passes)
    if est.advice is not None:
        odd.append(f"it does not fit into the memory of the device: {est.advice}")
    if as_json:
        print_json(
            {
                **asdict(est),
                "memory": {**asdict(est.memory), "total": est.memory.total},
                "text_tokens": text_tokens,
                "passes": passes,
                "warnings": odd,
                "recipe": recipe.model_dump(mode="json"),
            }
        )
        return
    STDOUT.print(recipe.to_yaml(), markup=False)
    about = "" if measured else "about "
    per_update = recipe.batch.accumulation * recipe.tokens_per_micro_step
    parts = ", ".join(f"{name} {size / _MIB:,.0f}" for name, size in asdict(est.memory).items() if size)
    rows = [
        ("model", f"{est.parameters:,} parameters"),
        ("run", f"{est.updates:,} updates of {per_update:,} tokens ({est.micro_steps:,} micro-steps)"),
        ("tokens", f"{est.tokens:,}" + (f", {about}{passes:.1f} passes over the text" if passes else "")),
        ("device", f"{est.device}, {est.precision}"),
        ("memory", f"about {est.memory.total / _MIB:,.0f} MiB ({parts})"),
        ("time", f"about {duration(est.seconds)} ({est.basis})"),
    ]
    print_table("what it would take: estimates", ("", ""), rows)
    for sentence in odd:
        say(f"warning: {sentence}")


def _text_tokens(recipe: "Recipe") -> tuple[int | None, bool]:
    """Returns how many tokens the training text has, and whether they were counted rather than guessed by its size."""
    from slm.train.data.corpus import is_named, open_corpus
    from slm.train.data.dataset import is_dataset, read_manifest

    names = recipe.data.train
    first = Path(names[0]).expanduser()
    if len(names) == 1 and not is_named(names[0]) and is_dataset(first):
        return read_manifest(first).train.tokens, True
    if any(is_named(name) and name != "sample" for name in names):
        return None, False  # it would have to be downloaded
    corpus = open_corpus(names, recipe.data.validation)
    size = sum(len(document.encode()) for document in corpus.train())
    return max(1, round(size / _BYTES_PER_TOKEN)), False
