"""Calls a step for its command (`slm.steps`)."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from slm.cli.console import RichProgress
from slm.core.errors import ArgumentError

_T = TypeVar("_T")


def call(step: Callable[..., _T], **options: Any) -> _T:
    """Calls a step with the options of its command, and with the progress bar.

    Raises:
        click.UsageError: If the options contradict each other, or one is out of range.
        SlmError: As the step.
    """
    try:
        return step(**options, progress=RichProgress())
    except ArgumentError as error:
        if error.hint is not None:
            raise
        raise click.UsageError(error.message) from None
