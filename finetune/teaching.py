"""The teacher of a fine-tuning run: loaded when it is needed, answers rows, and is recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from slm.core.adapter_base import base_record
from slm.core.chat import knows_turns
from slm.core.checkpoint import notices_of, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.core.tokenizer import Tokenizer
from slm.finetune.examples import Renderer
from slm.finetune.preparation import Prepared
from slm.finetune.teacher import Teacher
from slm.finetune.writing import Writer
from slm.train.precision import Precision
from slm.train.teacher import check_teacher


@dataclass(frozen=True)
class Teaching:
    """A teacher that is loaded when it is needed.

    Attributes:
        record: Path and hashes, for `slm.json`.
        load: Returns the teacher.
        writer: Lets it answer rows that end with a request.
    """

    record: dict[str, str]
    load: Callable[[], Teacher]
    writer: Writer


def teaching_of(
    path: Path | None,
    place: tuple[Path, bool],
    config: ModelConfig,
    max_length: int,
    renderer: Renderer,
    device: torch.device,
    precision: Precision,
    progress: Progress,
) -> Teaching | None:
    """Returns the teacher of a run, after checking that it fits the base; None without one.

    Args:
        path: The teacher.
        place: The directory of the result, and whether stored answers of another teacher may be dropped.
        config: The shape of the base.
        max_length: Maximum tokens of a row.
        renderer: Converts rows to token ids.
        device: The device.
        precision: The type of the products.
        progress: Receives progress and notes.

    Raises:
        SlmError: If the teacher does not fit.
    """
    if path is None:
        return None
    check_teacher(path, renderer.tokenizer, config, max_length)
    record = base_record(path, renderer.tokenizer)

    @cache
    def load() -> Teacher:
        return Teacher(path, device, precision.autocast)

    writer = Writer(load, record["weights_sha256"], renderer, max_length, *place, progress)
    return Teaching(record, load, writer)


def check_rows(found: Prepared, teacher: Path, tokenizer: Tokenizer, progress: Progress) -> None:
    """Rejects rows from which a teacher's predictions are not learned, and warns about a teacher that has seen no turns."""
    if found.pairs is not None:
        raise SlmError("preferences are learned against the base, not from a teacher", "omit --teacher")
    if found.chats and not knows_turns(read_info(teacher), tokenizer):
        progress.note(
            f"warning: the teacher {teacher} was not tuned on conversations, so its predictions for them say little"
        )


def notices(base: Path, path: Path | None) -> tuple[str, ...]:
    """Returns the notices of the base, and of the teacher, whose terms may extend to models that learn its predictions."""
    teacher = () if path is None else notices_of(path)
    return tuple(dict.fromkeys((*notices_of(base), *teacher)))
