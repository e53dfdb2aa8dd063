"""The start of a fine-tuning run, also of `--dry-run`: reads and checks the inputs, before the base is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slm.core.adapter_base import base_record
from slm.core.checkpoint import read_config, read_info
from slm.core.config import ModelConfig
from slm.core.progress import Progress
from slm.core.tokenizer import Tokenizer
from slm.finetune.examples import Renderer
from slm.finetune.judge import Judge, judge_of
from slm.finetune.preparation import Prepared, RowFiles, prepare
from slm.finetune.review import review
from slm.finetune.rows import Row
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import saved_precision
from slm.finetune.teaching import Teaching, check_rows, teaching_of
from slm.finetune.writing import Writer
from slm.train.build import pick_device
from slm.train.precision import Precision, capability, choose_precision


@dataclass(frozen=True)
class Start:
    """The inputs of a run.

    Attributes:
        config: The shape of the base.
        tokenizer: The tokenizer of the base.
        info: The record of the base.
        renderer: Converts rows to token ids.
        device: The device.
        precision: The type of the products.
        teaching: The teacher; None without one.
        found: The rows.
        judge: Scores the replies after each epoch; None without a metric.
        course: Everything that decides the result, by which a run is resumed.
        unanswered: The number of rows that the teacher has yet to answer; 0 in a run.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    info: dict[str, Any]
    renderer: Renderer
    device: torch.device
    precision: Precision
    teaching: Teaching | None
    found: Prepared
    judge: Judge | None
    course: Mapping[str, Any]
    unanswered: int


def start_of(
    base: Path,
    files: RowFiles,
    settings: FinetuneSettings,
    teacher: Path | None,
    place: tuple[Path, bool],
    progress: Progress,
    *,
    answer: bool,
) -> Start:
    """Returns the inputs of a run, and warns about settings and rows that look wrong.

    Args:
        base: The base.
        files: The files of the rows.
        settings: Hyperparameters.
        teacher: The teacher; None without one.
        place: The directory of the result, and whether stored answers of another teacher may be dropped.
        progress: Receives progress and notes.
        answer: Whether the teacher answers rows that end with a request; otherwise those without a stored answer keep a
            placeholder.

    Raises:
        SlmError: When an input is missing or wrong, or there is nothing to learn.
    """
    config, tokenizer, info = read_config(base), Tokenizer.load(base), read_info(base)
    renderer = Renderer(tokenizer, config)
    device = pick_device("auto")
    precision = choose_precision("auto", capability(device), config, saved_precision(place[0], device))
    teaching = teaching_of(teacher, place, config, settings.context(config), renderer, device, precision, progress)
    left: list[int] = []

    def complete(writer: Writer, rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
        completed, unanswered = writer.complete(rows, numbers, write=answer)
        left.append(unanswered)
        return completed

    answering = None if teaching is None else partial(complete, teaching.writer)
    found = prepare(files, settings, config, renderer, progress, answering)
    unanswered = sum(left)
    if teacher is not None:
        check_rows(found, teacher, tokenizer, progress)
    for sentence in review(found, settings, config):
        progress.note(f"warning: {sentence}")
    # A placeholder is not a reply that a metric could expect.
    judge = None if unanswered else judge_of(found, files, renderer, config)
    course = {
        "settings": found.settings.model_dump(mode="json"),
        "base": base_record(base, tokenizer),
        **files.record(),
        "held_out": found.split.record,
        "precision": f"{precision.name} on {device.type}",
        **({} if teaching is None else {"teacher": teaching.record}),
    }
    return Start(config, tokenizer, info, renderer, device, precision, teaching, found, judge, course, unanswered)
