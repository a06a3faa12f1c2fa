"""Draws bars beside each other, as one SVG that is as wide as its place and serves light and dark.

Lengths across are percentages, type is in pixels: there is no ``viewBox``, so on a telephone the bars become shorter
and the letters stay readable. No charting library for Python that we know draws so: pygal names its elements at random
and loads a script from elsewhere (Kozea/pygal#424), matplotlib draws for one width and one scheme. The standard
library writes the XML.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import ceil, floor, log, log2, log10
from typing import TYPE_CHECKING, Final, NamedTuple, Self
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.results import Spread

NARROWEST: Final = 300
"""Pixels that a chart needs across: a telephone's 360, without what surrounds a page's text."""
MARK: Final = "Made by python -m bench.report"
"""In every file, so that those that are no longer made are known."""

_PADDING: Final = 0.02
_INSIDE: Final = NARROWEST * (1 - 2 * _PADDING)
_TYPE: Final = {"title": (15, True), "panel": (13, True), "note": (12, False), "tick": (11, False)}
_ROW: Final = 31
_LINE, _LABEL, _BAR, _THICK = 15, 13, 18, 8
_GAP: Final = 10
"""Between a value and its ratio, at least."""

_STYLE: Final = """
    svg { --ink: #1f2933; --soft: #55626f; --line: #8491a0; --paper: #ffffff; --track: #eef1f4;
          --ours: #2a7765; --peer: #7d8a98; --base: #45525e; }
    @media (prefers-color-scheme: dark) {
      svg { --ink: #e4e7eb; --soft: #a7b1bc; --line: #7b8896; --paper: #14191f; --track: #222a33;
            --ours: #63b8a3; --peer: #7e8b99; --base: #c3ccd5; }
    }
    text { fill: var(--ink); stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke;
           font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
    .title { font-size: 15px; font-weight: 600; }
    .panel { font-size: 13px; font-weight: 600; }
    .note, .value { fill: var(--soft); }
    .tick { fill: var(--soft); font-size: 11px; }
    .strong { font-weight: 600; }
    .end { text-anchor: end; }
    .middle { text-anchor: middle; }
    .paper { fill: var(--paper); }
    .track { fill: var(--track); }
    .guide { stroke: var(--track); stroke-width: 1.5; }
    .one { stroke: var(--line); stroke-width: 1.2; stroke-dasharray: 3 3; }
    .ours { fill: var(--ours); stroke: var(--ours); }
    .peer { fill: var(--peer); stroke: var(--peer); }
    .base { fill: var(--base); stroke: var(--base); }
    .limit { fill: var(--paper); stroke: var(--peer); }
    .bar, .dot { stroke-width: 1.5; }
    .stem { stroke-width: 3; }
    .halo { stroke: var(--paper); stroke-width: 3.2; }
    .whisker { stroke: var(--ink); stroke-width: 1.6; }
  """


class Tone(Enum):
    """Whose bar it is."""

    OURS = "ours"
    PEER = "peer"
    BASE = "base"
    LIMIT = "limit"


class Bar(NamedTuple):
    """One subject. *ratio* is empty where there is none."""

    label: str
    value: str
    ratio: str
    spread: Spread
    tone: Tone


@dataclass(frozen=True, slots=True)
class Scale:
    """What lies where across. Bars begin at zero, or, where ratios are too far apart for that, at 1."""

    low: float
    high: float
    step: float
    """Between two ticks; of a logarithmic scale, their quotient."""
    suffix: str = "×"
    is_logarithmic: bool = False

    @classmethod
    def of_ratios(cls, spreads: Iterable[Spread]) -> Self:
        """From zero if the largest is not more than three; else logarithmic, if nothing is zero."""
        known = list(spreads)
        high = max([1.0, *(spread.high for spread in known)])
        low = min([1.0, *(spread.low for spread in known)])
        if high <= LINEAR or low <= 0:
            return cls._linear(low, high, "×")
        base = 2 if log2(high / low) <= OCTAVES else 10
        # Rounded, for 8 is 2 to the power of 3, and not of 3.0000000000000004.
        down, up = floor(round(log(low, base), 6)), ceil(round(log(high, base), 6))
        stride = ceil((up - down) / TICKS)
        return cls(
            float(base) ** (floor(down / stride) * stride),
            float(base) ** (ceil(up / stride) * stride),
            float(base) ** stride,
            is_logarithmic=True,
        )

    @classmethod
    def of_values(cls, spreads: Iterable[Spread], suffix: str = "") -> Self:
        """From zero, or from below it if something is."""
        known = list(spreads)
        return cls._linear(
            min(spread.low for spread in known), max(spread.high for spread in known) or 1.0, suffix
        )

    @classmethod
    def _linear(cls, low: float, high: float, suffix: str) -> Self:
        low, high = min(low, 0.0), max(high, 0.0)
        size = 10 ** floor(log10((high - low) / TICKS))
        for nice in (1, 2, 2.5, 5, 10, 20):
            step = size * nice
            down, up = floor(low / step + _SLACK), ceil(high / step - _SLACK)
            if up - down <= TICKS:
                return cls(down * step, up * step, step, suffix)
        raise AssertionError("twenty times a tenth of the fifth part is enough for both sides of zero")

    @property
    def origin(self) -> float:
        """Where bars begin."""
        return 1.0 if self.is_logarithmic else 0.0

    def at(self, value: float) -> float:
        """The percentage across."""
        if self.is_logarithmic:
            return 100 * log(value / self.low) / log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and their labels, from left to right."""
        if self.is_logarithmic:
            number = round(log(self.high / self.low) / log(self.step))
            values = [self.low * self.step**each for each in range(number + 1)]
        else:
            number = round((self.high - self.low) / self.step)
            values = [self.low + self.step * each for each in range(number + 1)]
        return [(value, f"{value:.4g}{self.suffix}" if abs(value) > 1e-12 else "0") for value in values]


LINEAR: Final = 3.0
TICKS: Final = 5
"""Steps between them, at most: more do not fit across a telephone."""
_SLACK: Final = 0.001
"""Part of a step by which a figure may be over the edge: it is less than a pixel."""
OCTAVES: Final = 6


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars that are of the same setting."""

    title: str
    bars: Sequence[Bar]
    scale: Scale
    has_one: bool
    """Whether there is a baseline, which lies at 1."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """All of one file. *story* is what is read out."""

    title: str
    notes: Sequence[str]
    """One line each, if they are short enough."""
    story: str
    panels: Sequence[Panel]


# Type --------------------------------------------------------------------------------------------------------

_NARROW, _SLIM, _WIDE = frozenset("ijl|.,:;'!() []I"), frozenset('frt-/"1'), frozenset("mwMWQO@%×")


def width_of(text: str, size: float, *, is_bold: bool = False) -> float:
    """About how wide *text* is, in pixels: as in DejaVu Sans, than which few faces are wider.

    >>> round(width_of("one-row read", 12))
    85
    """
    ems = sum(
        0.37 if letter in _NARROW else 0.45 if letter in _SLIM else 0.93 if letter in _WIDE else 0.635
        for letter in text
    )
    return ems * size * (1.1 if is_bold else 1.0)


def wrapped(text: str, size: float, room: float, *, is_bold: bool) -> list[str]:
    """The lines of *text* in so many pixels.

    >>> wrapped("times the article's pattern at the same setting", 12, 288, is_bold=False)
    ["times the article's pattern at the same", 'setting']
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size, is_bold=is_bold) <= room:
            lines[-1] = longer
        else:
            lines.append(cut(word, size, room, is_bold=is_bold))
    return lines


def cut(text: str, size: float, room: float, *, is_bold: bool) -> str:
    """As much of *text* as there is room for."""
    if width_of(text, size, is_bold=is_bold) <= room:
        return text
    while text and width_of(f"{text}…", size, is_bold=is_bold) > room:
        text = text[:-1]
    return f"{text}…"


# Drawing -----------------------------------------------------------------------------------------------------


def draw(chart: Chart) -> str:
    """The file."""
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "width": "100%", "role": "img"})
    root.set("aria-labelledby", "title story")
    root.append(ET.Comment(f" {MARK} "))
    ET.SubElement(root, "title", {"id": "title"}).text = chart.title
    ET.SubElement(root, "desc", {"id": "story"}).text = chart.story
    ET.SubElement(root, "style").text = _STYLE
    paper = ET.SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%", "rx": "8"})
    inside = ET.SubElement(
        root, "svg", {"x": f"{_PADDING:.0%}", "width": f"{1 - 2 * _PADDING:.0%}", "overflow": "visible"}
    )
    y = _lines(inside, "title", chart.title, 10)
    for note in chart.notes:
        y = _lines(inside, "note", note, y)
    for panel in chart.panels:
        y = _panel(inside, panel, y + 16)
    height = f"{y + 10:g}"
    for element in (root, paper, inside):
        element.set("height", height)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _lines(parent: ET.Element, kind: str, text: str, y: float) -> float:
    size, is_bold = _TYPE[kind]
    for line in wrapped(text, size, _INSIDE, is_bold=is_bold):
        y += size * 1.35
        _text(parent, line, kind, "0", y - size * 0.25)
    return y


def _text(parent: ET.Element, text: str, kind: str, x: str, y: float, *, shift: float = 0.0) -> None:
    told = {"class": kind, "x": x, "y": f"{y:g}"} | ({"dx": f"{shift:g}"} if shift else {})
    ET.SubElement(parent, "text", told).text = text


def _panel(parent: ET.Element, panel: Panel, y: float) -> float:
    y = _lines(parent, "panel", panel.title, y)
    y = _lines(parent, "note", panel.note, y) + 5
    one = ET.SubElement(parent, "g")  # below the rows, whose height is not known yet
    top = y
    end = max((width_of(bar.ratio, 12, is_bold=True) + _GAP for bar in panel.bars if bar.ratio), default=0.0)
    for bar in panel.bars:
        y = _row(parent, panel.scale, bar, y, end)
    if panel.has_one:
        across = panel.scale.at(1.0)
        _line(one, "one", (across, across), (top + 2, y + 2))
    size, _ = _TYPE["tick"]
    for value, label in panel.scale.ticks():
        across = panel.scale.at(value)
        place = "" if across < 2 else " end" if across > 98 else " middle"
        kind = "tick strong" if panel.has_one and value == 1 else "tick"
        _text(parent, label, kind + place, _percent(across), y + size + 2)
    return y + size + 4


def _row(parent: ET.Element, scale: Scale, bar: Bar, y: float, end: float) -> float:
    """The value ends *end* pixels from the right edge, before the ratio."""
    is_ours = bar.tone is Tone.OURS
    strong = " strong" if is_ours else ""
    room = _INSIDE - end - width_of(bar.value, 12) - _GAP
    _text(parent, bar.value, "value end", "100%", y + _LABEL, shift=-end)
    if bar.ratio:
        _text(parent, bar.ratio, f"ratio end{strong}", "100%", y + _LABEL)
    lines = wrapped(bar.label, 12, room, is_bold=is_ours)
    for number, line in enumerate(lines):
        _text(parent, line, f"label{strong}", "0", y + _LABEL + number * _LINE)
    y += (len(lines) - 1) * _LINE
    _shape(parent, scale, bar, y + _BAR)
    return y + _ROW


def _shape(parent: ET.Element, scale: Scale, bar: Bar, y: float) -> None:
    origin, at = scale.at(scale.origin), scale.at(bar.spread.median)
    low, high = scale.at(bar.spread.low), scale.at(bar.spread.high)
    middle = y + _THICK / 2
    tone = bar.tone.value
    if scale.is_logarithmic:
        _line(parent, "guide", (0, 100), (middle, middle))
        _line(parent, f"{tone} stem", (origin, at), (middle, middle))
    else:
        _rect(parent, "track", 0, 100, y)
        _rect(parent, f"bar {tone}", min(origin, at), abs(at - origin), y)
    if low != high:
        for kind in ("halo", "whisker"):
            _line(parent, kind, (low, high), (middle, middle))
            for end in (low, high):
                _line(parent, kind, (end, end), (y, y + _THICK))
    if scale.is_logarithmic:
        dot = {"class": f"dot {tone}", "cx": _percent(at), "cy": f"{middle:g}", "r": "4"}
        ET.SubElement(parent, "circle", dot)


def _rect(parent: ET.Element, kind: str, x: float, width: float, y: float) -> None:
    told = {"class": kind, "x": _percent(x), "width": _percent(width), "y": f"{y:g}", "height": f"{_THICK}"}
    ET.SubElement(parent, "rect", told)


def _line(parent: ET.Element, kind: str, x: tuple[float, float], y: tuple[float, float]) -> None:
    told = {"x1": _percent(x[0]), "x2": _percent(x[1]), "y1": f"{y[0]:g}", "y2": f"{y[1]:g}"}
    ET.SubElement(parent, "line", {"class": kind, **told})


def _percent(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"
