"""A line chart with two logarithmic axes as SVG text: what `report` needs of a plotting library, without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 235, 64, 56  # margins; the names of the lines stand at the right
GAP = 15  # least distance of two names
# Okabe and Ito's colours, told apart by readers who do not see all of them.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float, float, float]]  # x, y, and the ends of its bar
    bold: bool = False
    dots: bool = False  # points alone, not joined


class Axis:
    """Values to pixels, logarithmic, with some room at both ends."""

    def __init__(self, values: Sequence[float], first: float, last: float):
        low, high = math.log10(min(values)), math.log10(max(values))
        room = 0.04 * (high - low) or 0.5
        self.low, self.high, self.first, self.last = low - room, high + room, first, last

    def __call__(self, value: float) -> float:
        return self.first + (math.log10(value) - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten that lie inside; powers alone where those would be many."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        return [v for p in powers for s in steps if self.low <= math.log10(v := s * 10.0**p) <= self.high]


def spread_out(wanted: Sequence[float]) -> list[float]:
    """Heights near those wanted, in the same order, none nearer to the next than GAP."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    above = -math.inf
    for i in order:
        above = placed[i] = max(wanted[i], above + GAP)
    too_low = max(0.0, max(placed, default=0.0) - (HEIGHT - BOTTOM))
    return [y - too_low for y in placed]


def chart(title: str, subtitle: str, x_name: str, y_name: str, lines: Sequence[Line], x_ticks: Sequence[float]) -> str:
    """All values must be above 0."""
    points = [point for line in lines for point in line.points]
    x = Axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = Axis([v for p in points for v in p[1:]], HEIGHT - BOTTOM, TOP)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 26, title, size=17, weight="bold"),
        text(LEFT, 46, subtitle, colour="#555555"),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_name, anchor="middle"),
        f'<g transform="translate(18 {middle:.1f}) rotate(-90)">{text(0, 0, y_name, anchor="middle")}</g>',
    ]
    for value in y.ticks():
        parts.append(segment(LEFT, y(value), WIDTH - RIGHT, y(value), "#dddddd", 1))
        parts.append(text(LEFT - 8, y(value) + 4, f"{value:g}", anchor="end"))
    for value in x_ticks:
        parts.append(segment(x(value), HEIGHT - BOTTOM, x(value), HEIGHT - BOTTOM + 5, "#555555", 1))
        parts.append(text(x(value), HEIGHT - BOTTOM + 20, f"{value:,g}", anchor="middle"))
    parts.append(segment(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#555555", 1))
    names = spread_out([y(line.points[-1][1]) + 4 for line in lines])
    for i, (line, height) in enumerate(zip(lines, names, strict=True)):
        dash = "" if i < len(COLOURS) else ' stroke-dasharray="6 4"'
        parts += drawn(line, COLOURS[i % len(COLOURS)], x, y, height, dash)
    return "\n".join([*parts, "</svg>", ""])


def drawn(line: Line, colour: str, x: Axis, y: Axis, name_height: float, dash: str) -> list[str]:
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _, _ in line.points)
    width = 3.5 if line.bold else 1.75
    joined = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'
    parts = [] if line.dots else [joined]
    for px, py, low, high in line.points:
        parts.append(segment(x(px), y(low), x(px), y(high), colour, 1))
        parts.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="{3.5 if line.bold else 2.5}" fill="{colour}"/>')
    end = x(line.points[-1][0])
    parts.append(segment(end + 5, y(line.points[-1][1]), WIDTH - RIGHT + 14, name_height - 4, colour, 0.5))
    weight = "bold" if line.bold else "normal"
    return [*parts, text(WIDTH - RIGHT + 18, name_height, line.name, colour=colour, weight=weight)]


def text(x: float, y: float, words: str, *, anchor="start", colour="#222222", size=12, weight="normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def segment(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'
