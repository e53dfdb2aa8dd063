"""The options of `slm eval --task`."""

from typing import Any

import click

from slm.cli.options import FilePath, Share, Whole, adapter_type
from slm.core.task import METRICS


def task_options(command: Any) -> Any:
    """Adds the options of --task to a command."""
    options = (
        click.option(
            "--task",
            type=FilePath(),
            metavar="ROWS",
            help="Rows that slm finetune reads: score the models' replies to them.",
        ),
        click.option(
            "--metric",
            type=click.Choice(METRICS),
            help="Score of a reply to --task: docs/evaluation.md has the definitions. [default: by the rows]",
        ),
        click.option(
            "--adapter",
            type=adapter_type,
            multiple=True,
            metavar="ADAPTER",
            help="With --task: also evaluate the first MODEL with this adapter; may be repeated.",
        ),
        click.option("--min", type=Share(), metavar="SCORE", help="With --task: exit with 1 if a model scores less."),
        click.option(
            "--max-tokens",
            type=Whole(1),
            metavar="N",
            help="With --task: longest reply. [default: twice the longest expected one, from 32 to 1024]",
        ),
        click.option(
            "--batch",
            type=Whole(1, 64),
            metavar="N",
            help="With --task: rows that a fused bundle answers together; 1 to measure the time of single ones. [default: 8]",
        ),
        click.option(
            "--tool-choice",
            type=click.Choice(["auto", "required"]),
            help="With --task: calls follow the schemas of the row's tools, as in slm serve; required allows only calls. "
            "[default: no constraint]",
        ),
        click.option(
            "--out",
            type=FilePath(),
            metavar="DIR",
            help="With --task: directory of report.html and report.json. [default: runs/eval-NAME, of ROWS]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
