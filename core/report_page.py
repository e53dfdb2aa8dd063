"""Reports as self-contained HTML pages, for small screens, with dark mode, and without network access."""

from collections.abc import Sequence
from html import escape

# The most characters of an untrusted text in a report.
_LONGEST = 600
# The same for a text on one line.
_LINE = 200

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #d8d8d8; --paper: #fff; --bar: #2f6fb0; --mark: #c8501e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --faint: #444; --paper: #161616; --bar: #6aa5e0; --mark: #ff9b66; }
}
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 54rem; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--faint); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); } .bar { fill: var(--bar); } .level { stroke: var(--faint); }
.frontier { fill: none; stroke: var(--mark); } .marked { fill: var(--mark); }
.other { fill: var(--paper); stroke: var(--bar); stroke-width: 1.5; }
pre { margin: 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8rem; max-width: 24rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a complete page.

    Args:
        title: The title, as plain text.
        parts: The HTML of the body.
    """
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table. It has a header row only if a column has a name."""
    return _table(columns, [[escape(cell) for cell in row] for row in rows])


def texts_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table of untrusted texts: shortened, with their line breaks, and without control characters."""
    return _table(columns, [[f"<pre>{escape(shown(cell))}</pre>" for cell in row] for row in rows])


def shown(text: str) -> str:
    """Returns an untrusted text, shortened, with control characters and directions of writing as escapes."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def one_line(text: str) -> str:
    """Returns untrusted text as one line of limited length, without control characters."""
    line = "".join(each if each.isprintable() else " " for each in " ".join(text.split()))
    return line if len(line) <= _LINE else f"{line[:_LINE]}…"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in ([head] if any(columns) else []) + lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'
