"""Output of commands: results go to standard output, messages and progress to standard error."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slm.core.report_page import one_line
from slm.steps.bars import STDERR, RichProgress

__all__ = [
    "STDERR",
    "STDOUT",
    "RichProgress",
    "one_line",
    "print_json",
    "print_lines",
    "print_table",
    "say",
    "say_error",
]

STDOUT = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints one line about progress to standard error."""
    STDERR.print(escape(text))


def say_error(message: str, hint: str | None = None) -> None:
    """Prints an error, and a hint on how to fix it."""
    STDERR.print(f"[bold red]error:[/] {escape(message)}")
    if hint:
        STDERR.print(f"[bold]hint:[/] {escape(hint)}")


def print_json(value: Mapping[str, Any]) -> None:
    """Prints a result as one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def print_lines(*lines: str) -> None:
    """Prints lines of a result to standard output."""
    for line in lines:
        STDOUT.print(escape(line))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a result as a table to standard output."""
    STDOUT.print(f"[bold]{escape(title)}[/]")
    table = Table(header_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    STDOUT.print(table, soft_wrap=False)
