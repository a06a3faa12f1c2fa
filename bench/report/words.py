"""Numbers, units and settings as a reader reads them."""

from __future__ import annotations

from math import floor, log10
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bench.results import Better, Spread

DIGITS: Final = 3
"""Of what was timed: more are noise."""
READABLE: Final = 0.1
"""The least of some figures is at least this, in the unit that is shown for all of them."""

_SCALES: Final[tuple[tuple[tuple[float, str], ...], ...]] = (
    ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
)
_TIME, _BYTES, _LARGE = _SCALES
_UNITS: Final[dict[str, tuple[tuple[tuple[float, str], ...], float]]] = {
    "s": (_TIME, 1.0),
    "ms": (_TIME, 1e-3),
    "µs": (_TIME, 1e-6),
    "us": (_TIME, 1e-6),
    "ns": (_TIME, 1e-9),
    "B": (_BYTES, 1.0),
    "bytes": (_BYTES, 1.0),
    "KiB": (_BYTES, 2.0**10),
    "MiB": (_BYTES, 2.0**20),
    "instructions": (_LARGE, 1.0),
    "million": (_LARGE, 1e6),
}
"""The units whose multiples have names, and how many of the smallest one they are."""

_ATTACHED: Final = {"1/s": "/s", "%": " %", "times": "×", "KiB/100k": " KiB/100k"}
"""The other units that stand beside each number; a word such as *round trips* stands above all of them."""
_NONE: Final = frozenset({"", "1"})
"""What is counted has no unit."""
LARGE: Final = 100_000
"""Numbers of this size are told in millions, or thousands, of whatever they count."""

_SETTINGS: Final = {
    "rtt_ms": ("round trip of {} ms", "round trip of {} ms"),
    "rtt": ("round trip of {} ms", "round trip of {} ms"),
    "clients": ("{} client", "{} clients"),
    "pool": ("pool of {}", "pool of {}"),
    "workers": ("{} worker", "{} workers"),
    "load": ("load of {} × capacity", "load of {} × capacity"),
    "waiting": ("{} waiting", "{} waiting"),
    "requests": ("{} request", "{} requests"),
    "loops": ("{} loop", "{} loops"),
    "rate": ("{} request a second", "{} requests a second"),
    "opening": ("{} connection", "{} connection"),
}
"""By the key of a setting: its words for one, and for any other number. A key that is missing here is told as it is."""

_NAMES: Final = frozenset({"driver", "kind", "server", "way", "what"})
"""The keys whose value says all."""


class Measure(NamedTuple):
    """One unit for figures that stand beside each other."""

    factor: float
    suffix: str
    is_counted: bool
    """Whole numbers are told whole."""

    @classmethod
    def of(cls, unit: str, values: Iterable[float]) -> Self:
        """The largest in which the least of *values* is still readable.

        >>> Measure.of("s", [0.0008, 0.05]).text(0.05)
        '50.0 ms'
        >>> Measure.of("1/s", [411.7]).text(411.7)
        '412/s'
        >>> Measure.of("round trips", [3.0]).text(3.0)
        '3'
        """
        values = list(values)
        scale, factor = _UNITS.get(unit, ((), 1.0))
        if unit in _NONE and min((abs(value) for value in values if value), default=0.0) >= LARGE:
            scale = _LARGE
        if not scale:
            return cls(1.0, _ATTACHED.get(unit, ""), is_counted=True)
        least = min((abs(value) * factor for value in values if value), default=0.0)
        size, name = next((step for step in scale if least >= READABLE * step[0]), scale[-1])
        return cls(factor / size, f" {name}" if name else "", is_counted=size == factor == 1.0)

    def text(self, value: float) -> str:
        """The number with its unit."""
        return number(value * self.factor, is_counted=self.is_counted) + self.suffix


def number(value: float, *, is_counted: bool = True) -> str:
    """Three digits, or all of those before the point.

    >>> number(0.012345), number(1.0, is_counted=False), number(99.96), number(1234.5), number(7)
    ('0.0123', '1.00', '100', '1,234', '7')
    """
    if value == 0:
        return "0"
    if is_counted and float(value).is_integer():
        return f"{value:,.0f}"
    rounded = float(f"{value:.{DIGITS}g}")
    decimals = DIGITS - 1 - floor(log10(abs(rounded)))
    return f"{rounded:,.{decimals}f}" if decimals >= 0 else f"{value:,.0f}"


def unit_word(quantity: str, unit: str) -> str:
    """What is put behind *quantity* where no number has the unit beside it.

    >>> unit_word("statements", "statements"), unit_word("CPU", "instructions"), unit_word("p50", "ms")
    ('', ', instructions', '')
    """
    is_beside = unit in _ATTACHED or (unit in _UNITS and unit != "instructions")
    return "" if unit in _NONE or is_beside or unit in quantity else f", {unit}"


def times(ratio: float) -> str:
    """How many times as much.

    >>> times(1.084), times(0.02134), times(12.34), times(1234.0)
    ('1.08×', '0.021×', '12.3×', '1,234×')
    """
    if 0 < ratio < 0.095:
        return f"{float(f'{ratio:.2g}'):.10f}".rstrip("0") + "×"
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{number(ratio, is_counted=False)}×"


def quartiles(spread: Spread) -> str:
    """The quarters around a ratio; nothing for what has no spread, as counts."""
    if spread.low == spread.high:
        return ""
    return f"{times(spread.low).rstrip('×')} to {times(spread.high).rstrip('×')}"


def with_quartiles(spread: Spread) -> str:
    """A ratio, and its quarters if it has any.

    >>> from bench.results import Spread
    >>> with_quartiles(Spread(1.5, 1.4, 1.65)), with_quartiles(Spread(3.0, 3.0, 3.0))
    ('1.50× (1.40 to 1.65)', '3.00×')
    """
    around = quartiles(spread)
    return times(spread.median) + (f" ({around})" if around else "")


TWICE: Final = 2.0
"""From here on a difference is told as a multiple, not in per cent."""


def more_or_less(ratio: float) -> str:
    """A ratio as a difference.

    >>> more_or_less(0.82), more_or_less(1.3), more_or_less(2.55), more_or_less(0.0004), more_or_less(1.0)
    ('18 % less', '30 % more', '2.55 times as much', 'over 99.9 % less', 'the same')
    """
    if ratio == 1:
        return "the same"
    if ratio >= TWICE:
        return f"{times(ratio)[:-1]} times as much"
    if ratio <= 0.001:
        return "over 99.9 % less" if ratio else "none"
    percent = abs(ratio - 1) * 100
    return f"{percent:.{0 if 1 <= percent < 99 else 1}f} % {'more' if ratio > 1 else 'less'}"


def as_difference(spread: Spread) -> str:
    """A ratio as a difference, in Markdown, with the ratio and its quarters.

    >>> from bench.results import Spread
    >>> as_difference(Spread(0.5, 0.45, 0.55)), as_difference(Spread(3.0, 2.5, 3.5))
    ('**50 % less**, 0.50× (0.45 to 0.55)', '**3.00 times as much** (2.50 to 3.50)')
    """
    told = f"**{more_or_less(spread.median)}**"
    if spread.median < TWICE:
        return f"{told}, {with_quartiles(spread)}"
    around = quartiles(spread)
    return f"{told} ({around})" if around else told


def wanted(better: Better) -> str:
    """What is hoped for of a quantity."""
    return {"less": "less is better", "more": "more is better", "neither": ""}[better]


def setting(where: Mapping[str, str | float]) -> str:
    """A setting, in words.

    >>> setting({"driver": "asyncpg", "kind": "one-row read", "clients": 1, "rtt_ms": 0.5})
    'asyncpg, one-row read, 1 client, round trip of 0.5 ms'
    """
    return ", ".join(part(key, value) for key, value in where.items())


def part(key: str, value: str | float) -> str:
    """One key of a setting and its value."""
    if isinstance(value, (int, float)):
        told = f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
    else:
        told = value
    if key in _NAMES:
        return told
    one, many = _SETTINGS.get(key, (f"{key.replace('_', ' ')} {{}}",) * 2)
    return (one if value == 1 else many).format(told)
