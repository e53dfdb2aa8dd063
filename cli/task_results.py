"""The results of `slm eval --task` in the terminal."""

from slm.cli.console import one_line, print_table, say
from slm.steps.comparison import Comparison
from slm.steps.comparison_report import notes, reply_texts, summary, title_of

# Examples of each model.
_FEW = 3
# Characters of a text.
_CELL = 60


def print_results(compared: Comparison) -> None:
    """Prints the table of the models, and the worst examples of each."""
    task = compared.task
    print_table(title_of(compared), *summary(compared, narrow=True))
    for result in compared.results:
        worst = result.measured.worst(_FEW)
        if worst:
            wrong = sum(score < 1 for score in result.measured.scores)
            print_table(
                f"{result.name}: worst of {wrong:,} imperfect {'replies' if wrong != 1 else 'reply'}",
                ("row", "prompt", "expected", "choice" if task.metric == "choice" else "reply"),
                [[_cell(text) for text in reply_texts(each)] for each in worst],
            )
    for note in notes(compared):
        say(note)


def _cell(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _CELL else f"{line[:_CELL]}…"
