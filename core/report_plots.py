"""Plots of reports as inline SVG. The style sheet of `slm.core.report_page` sets the colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# The width of a phone's screen, where text keeps its size. Wider screens enlarge the plot.
_WIDTH, _FONT = 400, 11
_LEFT, _RIGHT, _TOP = 46, 10, 8
# The approximate number of ticks on an axis.
_TICKS = 4
# The minimum distance between labels below bars.
_LABEL_WIDTH = 24


@dataclass(frozen=True)
class Bar:
    """One value, or a gap if it is None. `label` is shown below the bar, `told` as its tooltip."""

    label: str
    value: float | None
    told: str


@dataclass(frozen=True)
class Point:
    """One point. Marked points are filled and connected by a line from left to right."""

    label: str
    x: float
    y: float
    marked: bool
    told: str


@dataclass(frozen=True)
class Range:
    """A value with an interval around it. `told` is shown beside the label."""

    label: str
    value: float
    low: float
    high: float
    told: str


def bars(values: Sequence[Bar], title: str, height: int = 120) -> str:
    """Returns a plot of vertical bars that start at 0.

    Args:
        values: The bars from left to right. Values must not be negative.
        title: The description for screen readers.
        height: The height of the plot in SVG units; the width is 400.
    """
    top = max((bar.value for bar in values if bar.value is not None), default=0.0) or 1.0
    ticks = _ticks(0.0, top)
    top = max(top, ticks[-1])
    bottom = height - 18
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(values))

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * value / top

    parts = [_level(y(tick), _short(tick)) for tick in ticks]
    every = math.ceil(_LABEL_WIDTH / step)
    for i, bar in enumerate(values):
        x = _LEFT + i * step
        if bar.value is not None:
            size = f'width="{0.8 * step:.1f}" height="{bottom - y(bar.value):.1f}"'
            parts.append(
                f'<rect x="{x + 0.1 * step:.1f}" y="{y(bar.value):.1f}" {size} class="bar">{_told(bar.told)}</rect>'
            )
        if i % every == 0:
            parts.append(_text(x + step / 2, bottom + 13, bar.label, "middle"))
    return _svg(parts, height, title)


def lying_bars(values: Sequence[Bar], title: str) -> str:
    """Returns a plot of horizontal bars, each with its label and tooltip text above it."""
    top = max((bar.value or 0.0 for bar in values), default=0.0) or 1.0
    parts = []
    for i, bar in enumerate(values):
        y = 12 + 32 * i
        parts.append(_text(0, y, f"{bar.label}: {bar.told}", "start"))
        width = _WIDTH * (bar.value or 0.0) / top
        parts.append(f'<rect x="0" y="{y + 4}" width="{width:.1f}" height="10" class="bar">{_told(bar.told)}</rect>')
    return _svg(parts, 32 * len(values), title)


def ranges(values: Sequence[Range], title: str) -> str:
    """Returns a plot of values between 0 and 1 with their intervals, each with its label above it.

    Args:
        values: The values from top to bottom.
        title: The description for screen readers.
    """

    def x(share: float) -> float:
        return 4 + (_WIDTH - 8) * share

    parts = []
    for i, each in enumerate(values):
        y = 12 + 32 * i
        parts.append(_text(0, y, f"{each.label}: {each.told}", "start"))
        parts.append(f'<line x1="{x(0):.1f}" y1="{y + 9}" x2="{x(1):.1f}" y2="{y + 9}" class="level"/>')
        wide = max(1.0, x(each.high) - x(each.low))
        parts.append(
            f'<rect x="{x(each.low):.1f}" y="{y + 7}" width="{wide:.1f}" height="4" class="bar">{_told(each.told)}</rect>'
        )
        parts.append(f'<circle cx="{x(each.value):.1f}" cy="{y + 9}" r="4" class="marked">{_told(each.told)}</circle>')
    return _svg(parts, 32 * len(values), title)


def points(values: Sequence[Point], x_title: str, y_title: str, title: str, height: int = 280) -> str:
    """Returns a plot of points with a linear x axis and a logarithmic y axis.

    Args:
        values: The points. A y of 0 or less is drawn at the lower end.
        x_title: The title of the x axis.
        y_title: The title of the y axis.
        title: The description for screen readers.
        height: The height of the plot in SVG units; the width is 400.
    """
    positive = [point.y for point in values if point.y > 0] or [1.0]
    low, high = math.log10(min(positive)) - 0.1, math.log10(max(positive)) + 0.1
    left, right = (edge([point.x for point in values], default=0.0) for edge in (min, max))
    margin = (right - left) * 0.06 or abs(right) * 0.1 or 1.0
    left, right = left - margin, right + margin
    top, bottom = _TOP + 14, height - 34

    def x_of(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - left) / (right - left)

    def y_of(value: float) -> float:
        level = max(low, math.log10(value)) if value > 0 else low
        return bottom - (bottom - top) * (level - low) / (high - low)

    levels = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in ((1, 2, 5) if high - low < 2 else (1,))
    ]
    parts = [_level(y_of(level), _short(level)) for level in levels if low <= math.log10(level) <= high]
    for tick in _ticks(left, right):
        if left <= tick <= right:
            parts.append(_text(x_of(tick), bottom + 14, _short(tick), "middle"))
    parts += [_text(_WIDTH - _RIGHT, bottom + 29, x_title, "end"), _text(0, _TOP + 3, y_title, "start")]
    marked = sorted((point for point in values if point.marked), key=lambda point: (point.x, point.y))
    if len(marked) > 1:
        path = " ".join(f"{x_of(point.x):.1f},{y_of(point.y):.1f}" for point in marked)
        parts.append(f'<polyline points="{path}" class="frontier"/>')
    labels: list[tuple[float, float, list[str]]] = []
    for point in sorted(values, key=lambda point: point.marked):  # draws marked points last, above the others
        x, y = x_of(point.x), y_of(point.y)
        kind = "marked" if point.marked else "other"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}">{_told(point.told)}</circle>')
        near = next((label for label in labels if math.hypot(label[0] - x, label[1] - y) < _FONT), None)
        if near is None:
            labels.append((x, y, [point.label]))
        else:
            near[2].append(point.label)
    parts += [_beside(x, y, ", ".join(names)) for x, y, names in labels]
    return _svg(parts, height, title)


def _ticks(low: float, high: float) -> list[float]:
    """Returns round values from at least `low` to the first one at or above `high`."""
    raw = (high - low) / _TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.ceil(high / step) + 1)]


def _level(y: float, label: str) -> str:
    line = f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" class="level"/>'
    return line + _text(_LEFT - 4, y + 4, label, "end")


def _beside(x: float, y: float, label: str) -> str:
    """Returns a label to the right of a point, or to the left if it does not fit."""
    fits = x + 6 + len(label) * _FONT * 0.6 < _WIDTH
    return _text(x + 6, y - 5, label, "start") if fits else _text(x - 6, y - 5, label, "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _told(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" font-size="{_FONT}">'
    return "\n".join([head, *parts, "</svg>"])
