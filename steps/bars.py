"""Progress of a step: a bar on standard error in a terminal, below the cell in a notebook, or nothing."""

import sys
import time
from html import escape as escape_html
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from slm.core.progress import Progress, Silent

# The shortest time between two updates of a notebook's bar.
_REDRAW_S = 0.2


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


def shown(progress: Progress | bool) -> Progress:
    """Returns the display for the argument `progress` of a step: True shows a bar, False nothing."""
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return Silent()
    return RichProgress() if (display := _notebook()) is None else NotebookProgress(display)


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
        STDERR.print(escape(text))


class NotebookProgress:
    """Shows progress below a notebook's cell: notes as lines of its output, and one bar that disappears at the end.

    Rich's bar would need ipywidgets in a notebook; this one needs a front end that shows HTML.
    """

    def __init__(self, display: Any) -> None:
        """Prepares the display.

        Args:
            display: `IPython.display.display`, or a function with the same arguments.
        """
        self._display = display
        self._handle: Any = None
        self._name, self._unit, self._fields = "", "", ""
        self._total: int | None = None
        self._done, self._began, self._drawn = 0, 0.0, 0.0

    def start(self, name: str, total: int | None, unit: str) -> None:
        """Starts a bar in the place of the previous one."""
        self._name, self._total, self._unit, self._fields = name, total, unit, ""
        self._done, self._began = 0, time.monotonic()
        self._draw()

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Advances the bar and shows the fields beside it."""
        self._done += amount
        self._fields = "  ".join(f"{k} {v}" for k, v in fields.items()) or self._fields
        if time.monotonic() - self._drawn >= _REDRAW_S:
            self._draw()

    def finish(self) -> None:
        """Removes the bar."""
        if self._handle is not None:
            self._show("", "")

    def note(self, text: str) -> None:
        """Adds a line to the cell's output."""
        sys.stdout.write(f"{text}\n")

    def _draw(self) -> None:
        self._drawn = now = time.monotonic()
        took = now - self._began
        count = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        words = [self._name, count, self._unit, _clock(took)]
        if self._total and self._done:
            words += ["left", _clock(took / self._done * max(0, self._total - self._done))]
        text = " ".join(each for each in (*words, self._fields) if each)
        size = "" if self._total is None else f' value="{self._done}" max="{max(1, self._total)}"'
        self._show(text, f'<progress{size} style="width: 16em"></progress> {escape_html(text)}')

    def _show(self, text: str, html: str) -> None:
        data = {"text/plain": text, "text/html": html}
        if self._handle is None:
            self._handle = self._display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _notebook() -> Any:
    """Returns the function that displays in this notebook; None outside of notebooks."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:  # a terminal's IPython has none
        return None
    from IPython.display import display

    return display
