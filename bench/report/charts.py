"""Chooses what of a case is drawn, and makes a chart of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from bench.report.compare import Grid, is_limit, is_ours, varied_in
from bench.report.svg import Bar, Chart, Panel, Scale, Tone
from bench.report.words import Measure, more_or_less, setting, times, unit_word, wanted
from bench.results import Spread
from bench.shop import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from bench.results import Figure, Results

Values = tuple[str | float, ...]
Row = dict[str, "Figure"]
"""The figures at one place, by subject."""

MOST_PANELS: Final = 7
"""Of one chart; the tables have the rest."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a case one chart shows: all, unless it says less."""

    case: str
    quantities: tuple[str, ...] = ()
    """In this order."""
    where: Mapping[str, Values] = field(default_factory=dict[str, "Values"])
    """The values of a key that are drawn; of a figure without the key nothing is asked."""
    name: str = ""
    """Of the chart, where a case has several."""

    def takes(self, figure: Figure) -> bool:
        """Whether *figure* is drawn."""
        return (not self.quantities or figure.quantity in self.quantities) and all(
            key not in figure.where or figure.where[key] in values for key, values in self.where.items()
        )

    def rank(self, figure: Figure) -> int:
        """In which order quantities come."""
        return self.quantities.index(figure.quantity) if figure.quantity in self.quantities else 0


_ONE_DRIVER: Final[Mapping[str, Values]] = {"driver": ("asyncpg",)}
_READ, _WRITE = Kind.READ.ask.title, Kind.WRITE.ask.title

CHOICES: Final = (
    Choice("counts", ("round trips",), _ONE_DRIVER),
    Choice("instructions", ("instructions",), _ONE_DRIVER),
    Choice("distance", ("requests", "reply", "end"), _ONE_DRIVER),
    Choice("rates", ("requests",), {"kind": (_READ, _WRITE), "clients": (1,), "pool": (10,)}),
    Choice("rates", ("requests",), {"kind": (_READ,), "clients": (32, 500), "pool": (10,)}, "crowd"),
    Choice(
        "rates",
        ("p50", "p99"),
        {"kind": (_READ,), "rtt_ms": (0,), "clients": (32,), "pool": (10,)},
        "latency",
    ),
    Choice("workers", ("requests", "scale")),
    Choice("fairness", ("p99", "longest wait of one more client", "least turns / most turns"), _ONE_DRIVER),
    Choice("hold_time", ("requests",)),
    Choice("overload", ("good answers / capacity", "p99 of good answers"), _ONE_DRIVER),
    Choice("restart", ("first good answer after", "requests that failed"), _ONE_DRIVER),
    Choice("waiting", ("memory of each",)),
    Choice("growth", ("growth, second half",)),
    Choice("imports", ("instructions", "CPU", "peak memory")),
    Choice("instruments", ("time",)),
)
"""A case that is not named here is drawn whole, up to the most panels."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chart of a case, and at how many settings there is no panel."""

    name: str
    chart: Chart
    even: int
    """Because all that were measured there are the same."""
    more: int
    """Because there was no room."""


def charts_of(case: str, title: str, results: Results, baseline: str) -> Iterator[Drawn]:
    """The charts of *case*, in the order they are chosen; all of it, where no choice fits what was measured."""
    figures = list(results.of(case))
    fitting = [choice for choice in CHOICES if choice.case == case and any(map(choice.takes, figures))]
    for choice in fitting or [Choice(case)]:
        chosen = sorted(filter(choice.takes, figures), key=choice.rank)
        rows = [row for row in _by_quantity(chosen) if len(row) > 1]
        telling = [row for row in rows if len({figure.rounds for figure in row.values()}) > 1]
        if telling:
            name = "-".join(filter(None, (case, choice.name))).replace("_", "-")
            drawn = telling[:MOST_PANELS]
            chart = _chart(title, drawn, baseline)
            yield Drawn(name, chart, len(rows) - len(telling), len(telling) - len(drawn))


def _by_quantity(figures: Iterable[Figure]) -> list[Row]:
    rows = list(Grid(figures).rows())
    order = list(dict.fromkeys(_first(row).quantity for row in rows))
    return sorted(rows, key=lambda row: order.index(_first(row).quantity))


def _chart(title: str, rows: Sequence[Row], baseline: str) -> Chart:
    """One panel for each row; all that have ratios have the same scale."""
    ratios = [_ratios(row, baseline) for row in rows]
    known = [spread for ratio in ratios if ratio for spread in ratio.values()]
    scale = Scale.of_ratios(known) if known else None
    firsts = [_first(row) for row in rows]
    heading = _Heading(firsts)
    panels = [_panel(row, ratio, scale, heading, baseline) for row, ratio in zip(rows, ratios, strict=True)]
    notes = [heading.common()]
    if scale is not None:
        notes.append(f"×: times {baseline}" + (", logarithmic" if scale.is_logarithmic else ""))
    if any(len(set(figure.rounds)) > 1 for row in rows for figure in row.values()):
        notes.append("thin line: quartiles of the rounds")
    return Chart(title, [note for note in notes if note], _story(heading.common(), panels, baseline), panels)


def _ratios(row: Row, baseline: str) -> dict[str, Spread] | None:
    """By subject; None where not all of them have one."""
    if baseline not in row:
        return None
    ratios = {subject: figure.ratio(row[baseline]) for subject, figure in row.items()}
    found = {subject: ratio for subject, ratio in ratios.items() if ratio is not None and ratio.low >= 0}
    return found if len(found) == len(ratios) else None


@dataclass(frozen=True, slots=True)
class _Heading:
    """Tells a panel from the others of its chart, and what all of them have in common."""

    firsts: Sequence[Figure]
    """One figure of each panel."""

    def common(self) -> str:
        """The quantity and what is hoped for, where they are the same in all panels."""
        told = [{_told(figure) for figure in self.firsts}, {wanted(figure.better) for figure in self.firsts}]
        return ": ".join(text for each in told if len(each) == 1 for text in each if text)

    def title(self, figure: Figure) -> str:
        """What is not the same in all panels; the whole setting where there is only one."""
        is_alone = len(self.firsts) == 1
        varied = varied_in(self.firsts)
        quantities = {_told(other) for other in self.firsts}
        where = {key: value for key, value in figure.where.items() if is_alone or key in varied}
        told = [_told(figure) if len(quantities) > 1 else "", setting(where)]
        return ": ".join(filter(None, told))

    def note(self, figure: Figure) -> str:
        """What is hoped for, where that is not the same in all panels."""
        return wanted(figure.better) if len({other.better for other in self.firsts}) > 1 else ""


def _told(figure: Figure) -> str:
    return f"{figure.quantity}{unit_word(figure.quantity, figure.unit)}"


def _panel(
    row: Row, ratios: dict[str, Spread] | None, scale: Scale | None, heading: _Heading, baseline: str
) -> Panel:
    first = _first(row)
    measure = Measure.of(first.unit, [figure.spread.median for figure in row.values()])
    spreads = ratios or {
        name: Spread(*(value * measure.factor for value in figure.spread)) for name, figure in row.items()
    }
    bars = [
        Bar(
            name,
            measure.text(figure.spread.median),
            times(spreads[name].median) if ratios else "",
            spreads[name],
            _tone(name, baseline),
        )
        for name, figure in row.items()
    ]
    if all(len(figure.rounds) == 1 for figure in row.values()):
        bars = _merged(bars)
    if first.better != "neither":
        bars.sort(key=lambda bar: bar.spread.median, reverse=first.better == "more")
    if ratios is None or scale is None:
        scale = Scale.of_values(spreads.values())
    return Panel(heading.title(first), bars, scale, has_one=ratios is not None, note=heading.note(first))


def _merged(bars: Sequence[Bar]) -> list[Bar]:
    """Those of several subjects that are the same, as counts are, become one bar with all names."""
    names: dict[Bar, list[str]] = {}
    for bar in bars:
        names.setdefault(bar._replace(label=""), []).append(bar.label)
    return [bar._replace(label=", ".join(labels)) for bar, labels in names.items()]


def _tone(subject: str, baseline: str) -> Tone:
    if is_ours(subject):
        return Tone.OURS
    if subject == baseline:
        return Tone.BASE
    return Tone.LIMIT if is_limit(subject) else Tone.PEER


def _story(common: str, panels: Sequence[Panel], baseline: str) -> str:
    """What stanch's bars say, for who cannot see them."""
    told = [f"{common}."] if common else []
    for panel in panels:
        ours = [
            f"{bar.label} {bar.value}"
            + (f", {more_or_less(bar.spread.median)} ({bar.ratio}) beside {baseline}" if bar.ratio else "")
            for bar in panel.bars
            if bar.tone is Tone.OURS
        ]
        heading = [panel.title] if panel.title else []
        told.append(f"{': '.join([*heading, '; '.join(ours) or 'not measured of stanch'])}.")
    return " ".join([*told, "The tables have all figures."])


def _first(row: Row) -> Figure:
    return next(iter(row.values()))
