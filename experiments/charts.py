"""Charts as inline SVG: a few lines each, coloured by the page's style sheet.

Colours are CSS classes, so that one file is right in light, dark and print; text is text, so that
it can be found and copied; a chart is 360 units wide, which a phone shows at full size.
"""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 36
_ROW = 20
_COLOURS = 8


class _Axis:
    """Maps values to places, linear or logarithmic, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        if log:
            low, high = math.log10(low), math.log10(high)
        if not high > low:
            high = low + 1.0
        self.low, self.high, self._start, self._end, self._log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self._log else value
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self, most: int = 5) -> list[float]:
        if self._log:
            values = [m * 10**e for e in range(-9, 10) for m in (1, 2, 5)]
            inside = [v for v in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
            return inside[:: max(1, -(-len(inside) // 6))]
        rough = (self.high - self.low) / most
        unit = 10 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def lines(
    series: dict[str, Sequence[tuple]],
    *,
    x: str,
    y: str,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    diagonal: bool = False,
) -> Markup:
    """Lines with bands.

    Args:
      series: name to points (x, y) or (x, y, low, high); None is a gap, or has no band.
      x, y: names of the axes.
      low, high: of the vertical axis; by the data where None.
      log: logarithmic x; all x > 0.
      diagonal: also draw y = x.
    """
    series = {name: [p for p in points if p[1] is not None] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return Markup("")
    xs = [p[0] for points in series.values() for p in points]
    ys = [v for points in series.values() for p in points for v in p[1:] if v is not None]
    low = min(ys) if low is None else low
    high = max(ys) if high is None else high
    at_x = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, log)
    at_y = _Axis(low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(at_x, at_y, x, y)]
    if diagonal:
        ends = [max(low, min(xs)), min(high, max(xs))]
        parts.append(_path([(at_x(v), at_y(v)) for v in ends], "guide"))
    for number, points in enumerate(series.values()):
        colour = f"c{number % _COLOURS}"
        band = [p for p in points if len(p) > 2 and p[2] is not None]
        if len(band) > 1:
            around = [(at_x(p[0]), at_y(p[2])) for p in band]
            around += [(at_x(p[0]), at_y(p[3])) for p in reversed(band)]
            parts.append(_path(around, f"band {colour}", close=True))
        parts.append(_path([(at_x(p[0]), at_y(p[1])) for p in points], f"line {colour}"))
        if len(points) <= 30:
            parts += [
                f'<circle class="dot {colour}" cx="{at_x(p[0]):.1f}" cy="{at_y(p[1]):.1f}" r="2.5">'
                f"<title>{_number(p[0])}: {_number(p[1])}</title></circle>"
                for p in points
            ]
    return _svg(parts, HEIGHT, f"{y} against {x}") + (
        _legend(list(series)) if len(series) > 1 else Markup("")
    )


def bars(edges: Sequence[float], counts: Sequence[float], *, x: str, y: str) -> Markup:
    """A histogram: counts [B] between edges [B + 1]."""
    if not counts:
        return Markup("")
    at_x = _Axis(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    at_y = _Axis(0, max(max(counts), 1), HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(at_x, at_y, x, y)]
    for left, right, count in zip(edges, edges[1:], counts):
        start, top = at_x(left), at_y(count)
        parts.append(
            f'<rect class="bar" x="{start:.1f}" y="{top:.1f}" '
            f'width="{max(at_x(right) - start - 1, 0.5):.1f}" height="{at_y(0) - top:.1f}">'
            f"<title>{_number(left)} to {_number(right)}: {_number(count)}</title></rect>"
        )
    return _svg(parts, HEIGHT, f"{y} by {x}")


def intervals(rows: Sequence[dict[str, Any]], *, x: str, names: Sequence[str] = ()) -> Markup:
    """Values with intervals, one a row, on one axis from 0 to 1.

    Args:
      rows: label, value, ci95 ([low, high] or None), group (colour, an index).
      x: name of the axis.
      names: of the groups, for the legend.
    """
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return Markup("")
    left = 10 + 6.3 * max(len(row["label"]) for row in rows)
    height = _TOP + _ROW * len(rows) + _BOTTOM
    at_x = _Axis(0, 1, left, WIDTH - 46)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        place = at_x(tick)
        parts.append(_line(place, _TOP, place, height - _BOTTOM, "grid"))
        parts.append(_text(place, height - _BOTTOM + 14, f"{tick:g}", "middle"))
    for number, row in enumerate(rows):
        y, colour = _TOP + _ROW * (number + 0.5), f"c{row['group'] % _COLOURS}"
        parts.append(_text(left - 6, y + 4, row["label"], "end"))
        if row["ci95"]:
            low, high = row["ci95"]
            parts.append(_line(at_x(low), y, at_x(high), y, f"line {colour}"))
        told = f"{row['label']}: {row['value']:.3f} {row['ci95'] or ''}"
        parts.append(
            f'<circle class="dot {colour}" cx="{at_x(row["value"]):.1f}" cy="{y:.1f}" r="4">'
            f"<title>{escape(told)}</title></circle>"
        )
        parts.append(_text(WIDTH - 4, y + 4, f"{row['value']:.3f}", "end"))
    parts.append(_text((left + WIDTH - 46) / 2, height - 6, x, "middle"))
    return _svg(parts, height, x) + (_legend(names) if len(names) > 1 else Markup(""))


def _frame(at_x: _Axis, at_y: _Axis, x: str, y: str) -> str:
    bottom, parts = HEIGHT - _BOTTOM, []
    for tick in at_y.ticks():
        place = at_y(tick)
        parts.append(_line(_LEFT, place, WIDTH - _RIGHT, place, "grid"))
        parts.append(_text(_LEFT - 5, place + 4, _number(tick), "end"))
    for tick in at_x.ticks():
        parts.append(_text(at_x(tick), bottom + 14, _number(tick), "middle"))
    parts.append(_line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, x, "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="10" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 10 {middle:.0f})">{escape(y)}</text>'
    )
    return "".join(parts)


def _svg(parts: Sequence[str], height: float, title: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(names: Sequence[str]) -> Markup:
    keys = [
        f'<span class="key"><i class="c{number % _COLOURS}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    ]
    return Markup(f'<div class="legend">{"".join(keys)}</div>')


def _path(points: Sequence[tuple[float, float]], kind: str, close: bool = False) -> str:
    track = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{track}{" Z" if close else ""}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _number(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
