"""`slm train --dry-run`: estimates a recipe's time and memory, and warns about its settings."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slm.cli.console import STDOUT, print_json, print_table, say
from slm.core.errors import SlmError

if TYPE_CHECKING:
    from slm.train.estimate import Estimate
    from slm.train.parallel import Processes
    from slm.train.recipe import Recipe

# Bytes per token of GPT-2's vocabulary on English prose; used only for text without a dataset.
_BYTES_PER_TOKEN = 4.0
_MIB = 1 << 20


def foresee(
    recipe: "Recipe",
    out: Path | None,
    gpu: str | None,
    as_json: bool,
    processes: "Processes",
    *,
    overwrite: bool = False,
) -> None:
    """Runs the checks of training; then the first process prints the recipe, the estimate and the warnings.

    Raises:
        SlmError: As training would raise it; or if the GPU is unknown, or the number of updates depends on a text of unknown
            length.
    """
    import torch

    from slm.train.batching import fitted_by_estimate, place_of
    from slm.train.build import check_machine, pick_device
    from slm.train.estimate import GPUS, place_on
    from slm.train.logs.logs import check_packages
    from slm.train.parallel import by_first
    from slm.train.prepare import check_free
    from slm.train.teacher import teacher_paths

    if gpu is not None and gpu.lower() not in GPUS:
        raise SlmError(f"unknown GPU {gpu}", f"--on {', '.join(GPUS)}")
    teacher_paths(recipe)  # raises if one is missing, before the text is read
    device = pick_device(recipe.machine.device) if gpu is None else torch.device("cuda")
    if recipe.batch.automatic:
        place = place_of(recipe, device) if gpu is None else place_on(recipe, GPUS[gpu.lower()])
        recipe = fitted_by_estimate(recipe, place, processes.size)
    check_machine(recipe, device, processes)
    check_packages(recipe.log)

    def first() -> None:
        if out is not None:
            check_free(out, overwrite=overwrite)
        _foresee(recipe, gpu, as_json, processes.size)

    by_first(processes, first)


def _foresee(recipe: "Recipe", gpu: str | None, as_json: bool, processes: int) -> None:
    from slm.core.machine import memory
    from slm.train.estimate import estimate
    from slm.train.loop import duration
    from slm.train.review import review

    text_tokens, measured, text_bytes = _text_size(recipe)
    if text_tokens is None and recipe.schedule.epochs is not None:
        raise SlmError(
            "schedule.epochs cannot be converted to updates, because the length of the text is unknown",
            "run slm data prepare --data … first, or set --set schedule.epochs=null --set schedule.micro_steps=N",
        )
    recipe = recipe.for_tokens(text_tokens or 0)
    est = estimate(recipe, gpu and gpu.lower(), memory().usable, processes)
    passes = est.tokens / text_tokens if text_tokens else None
    odd = review(recipe, passes, processes, text_bytes)
    if est.advice is not None:
        odd.append(f"the run does not fit into the memory of the device: {est.advice}")
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
        ("attention", ", ".join(f"{kernel} in {layers} layers" for kernel, layers in est.kernels.items())),
        (
            "memory",
            f"about {est.memory.total / _MIB:,.0f} MiB: {parts} (MiB), without Python, PyTorch and CUDA",
        ),
        *([] if est.memory_available is None else [("fits", _fit(recipe, est))]),
        ("time", f"about {duration(est.seconds)}, {duration(est.update_seconds)} of it updates ({est.basis})"),
    ]
    print_table("estimated time and memory", ("", ""), rows)
    for sentence in odd:
        say(f"warning: {sentence}")


def _fit(recipe: "Recipe", est: "Estimate") -> str:
    """Returns whether a recipe fits into a device's memory, with the largest part and the settings that determine it."""
    assert est.memory_available is not None
    total, available = est.memory.total, est.memory_available
    verdict = "yes" if total < available else "no"
    largest, size = max(asdict(est.memory).items(), key=lambda part: part[1])
    reasons = [f"{verdict}: {total / _MIB:,.0f} of {available / _MIB:,.0f} MiB ({100 * total / available:.0f} %)"]
    batch, checkpointing = recipe.batch, recipe.machine.gradient_checkpointing
    reasons.append(f"{100 * size / total:.0f} % of it {largest}")
    reasons.append(f"{batch.batch_size} x {batch.context} tokens per micro-step")
    reasons.append(f"{batch.accumulation} micro-step{'s' * (batch.accumulation > 1)} per update")
    reasons.append(f"{'with' if checkpointing else 'without'} gradient checkpointing")
    return ", ".join(reasons)


def _text_size(recipe: "Recipe") -> tuple[int | None, bool, int | None]:
    """Returns the tokens of the training text, whether they were counted rather than estimated, and the text's bytes."""
    from slm.train.prepare import check_teachers, check_text, prepared_dataset

    dataset = prepared_dataset(recipe)
    if dataset is not None:
        check_teachers(recipe, dataset.tokenizer)
        return dataset.manifest.train.tokens, True, dataset.manifest.train.text_bytes
    size = check_text(recipe)
    return (None if size is None else max(1, round(size / _BYTES_PER_TOKEN))), False, size
