"""All figures of a case as Markdown tables: subjects from above to below, settings or quantities across."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.report.compare import Grid, is_limit, is_ours, varied_in
from bench.report.words import Measure, setting, unit_word, with_quartiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bench.results import Figure, Spread

WIDEST: Final = 9
"""Columns of figures; what needs more becomes several tables."""

Row = dict[str, "Figure"]
"""The figures at one place, by subject."""


class Table(NamedTuple):
    """*title* says what all columns have in common."""

    title: str
    lines: list[str]


def markdown(text: str) -> str:
    r"""*text* as it is, in a page or a cell of a table.

    >>> print(markdown("a|b <c> *d* e_f [g]"))
    a\|b &lt;c&gt; \*d\* e\_f \[g\]
    """
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(safe.split()))


def name_of(subject: str) -> str:
    """As in the charts: stanch's in bold."""
    return f"**{markdown(subject)}**" if is_ours(subject) else markdown(subject)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; all cells are Markdown already."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def tables_of(figures: Iterable[Figure], order: Sequence[str], baseline: str) -> list[Table]:
    """By quantity, settings across; the other way round where there are more quantities than settings."""
    rows = list(Grid(figures).rows())
    wheres = list(dict.fromkeys(_where(row) for row in rows))
    quantities = list(dict.fromkeys(_quantity(row) for row in rows))
    if len(quantities) >= len(wheres):
        parts = [[row for row in rows if _where(row) == where] for where in wheres]
    else:
        parts = [
            narrow
            for quantity in quantities
            for narrow in _narrowed([row for row in rows if _quantity(row) == quantity])
        ]
    return [_table(part, rows, order, baseline) for part in parts]


def _narrowed(rows: list[Row]) -> Iterator[list[Row]]:
    """Split by the first key that varies, until each part is narrow enough."""
    varied = varied_in(map(_first, rows))
    if len(rows) <= WIDEST or not varied:
        yield from (rows[start : start + WIDEST] for start in range(0, len(rows), WIDEST))
        return
    values = [_first(row).where.get(varied[0]) for row in rows]
    for value in dict.fromkeys(values):
        yield from _narrowed([row for row, its in zip(rows, values, strict=True) if its == value])


def _table(rows: Sequence[Row], all_rows: Sequence[Row], order: Sequence[str], baseline: str) -> Table:
    headings = _headings(rows)
    columns = [_cells(row, baseline) for row in rows]
    subjects = sorted(
        {subject for row in rows for subject in row},
        key=lambda subject: (order.index(subject) if subject in order else len(order), subject),
    )
    body = [[name_of(subject), *(column.get(subject, "") for column in columns)] for subject in subjects]
    return Table(_title(rows, all_rows), plain_table(["", *map(markdown, headings)], body))


def _headings(rows: Sequence[Row]) -> list[str]:
    """What tells each column from the others."""
    varied = varied_in(map(_first, rows))
    if len({_quantity(row) for row in rows}) > 1 or not varied:
        return [_quantity(row) for row in rows]
    wheres = [_first(row).where for row in rows]
    return [setting({key: value for key, value in where.items() if key in varied}) for where in wheres]


def _title(rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    """What all columns have in common, as far as it is not so in all tables."""
    here, everywhere = varied_in(map(_first, rows)), varied_in(map(_first, all_rows))
    common = {
        key: value for key, value in _first(rows[0]).where.items() if key in everywhere and key not in here
    }
    quantities = {_quantity(row) for row in rows}
    told = [*quantities] if len(quantities) == 1 else []
    return ": ".join([*told, *([setting(common)] if common else [])])


def _cells(row: Row, baseline: str) -> dict[str, str]:
    """By subject: the median, and how many times the baseline's."""
    measure = Measure.of(_first(row).unit, [figure.spread.median for figure in row.values()])
    other = row.get(baseline)
    ratios = {name: figure.ratio(other) if other else None for name, figure in row.items()}
    best, worst = _extremes(row, ratios)
    cells: dict[str, str] = {}
    for name, figure in row.items():
        told = measure.text(figure.spread.median)
        ratio = ratios[name]
        told = f"**{told}**" if name in best else f"*{told}*" if name in worst else told
        if name == baseline or ratio is None:
            low, high = figure.spread.low, figure.spread.high
            told += f"<br>{measure.text(low)} to {measure.text(high)}" if low != high else ""
        else:
            told += f"<br>{with_quartiles(ratio)}"
        cells[name] = told
    return cells


def _extremes(row: Row, ratios: dict[str, Spread | None]) -> tuple[set[str], set[str]]:
    """The best and the worst of those that do the whole work, each with those that quartiles do not tell from it."""
    rivals = {name: figure for name, figure in row.items() if not is_limit(name)}
    better = _first(row).better
    if better == "neither" or not rivals:
        return set(), set()
    spreads = {name: ratios[name] or figure.spread for name, figure in rivals.items()}
    if any(ratios[name] is None for name in rivals):
        spreads = {name: figure.spread for name, figure in rivals.items()}
    ordered = sorted(spreads, key=lambda name: spreads[name].median, reverse=better == "more")
    first, last = spreads[ordered[0]], spreads[ordered[-1]]
    if _overlap(first, last):
        return set(), set()
    return (
        {name for name, spread in spreads.items() if _overlap(spread, first)},
        {name for name, spread in spreads.items() if _overlap(spread, last)},
    )


def _overlap(one: Spread, other: Spread) -> bool:
    return one.low <= other.high and other.low <= one.high


def _first(row: Row) -> Figure:
    return next(iter(row.values()))


def _quantity(row: Row) -> str:
    first = _first(row)
    return f"{first.quantity}{unit_word(first.quantity, first.unit)}"


def _where(row: Row) -> frozenset[tuple[str, str | float]]:
    return frozenset(_first(row).where.items())
