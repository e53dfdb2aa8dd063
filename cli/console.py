"""Output of commands: results go to standard output, messages and progress to standard error."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

# The most characters of a sample text in a report.
_WIDTH = 200


class _Aside(Console):
    """A console on standard error; a closed pipe or a failed write silences it, and the command continues."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints, or silences the console if the write fails."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        """Silences the console."""
        self.quiet = True


STDERR = _Aside(stderr=True, highlight=False, soft_wrap=True)
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


def one_line(text: str) -> str:
    """Returns untrusted text as one line of limited length, without control characters."""
    line = "".join(each if each.isprintable() else " " for each in " ".join(text.split()))
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]}…"


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


class RichProgress:
    """Shows progress as a bar with elapsed and remaining time; see `slm.core.progress.Progress`."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Starts a bar; ends the previous one."""
        self.finish()
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}"),
            console=STDERR,
            transient=not STDERR.is_terminal,
            disable=not STDERR.is_terminal,
        )
        self._task = self._bars.add_task(escape(name), total=total, fields="")
        self._bars.start()

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Advances the bar and shows the fields beside it."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)
            if fields:
                self._bars.update(self._task, fields="  ".join(f"{k} {v}" for k, v in fields.items()))

    def finish(self) -> None:
        """Ends the bar."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        say(text)
