"""A case in a terminal: a table for each quantity, and, in plain words, where stanch is behind."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from bench.report.compare import Comparison, Grid, Verdict, compare, is_ours, varied_in
from bench.report.words import Measure, part, quartiles, setting, times, unit_word
from bench.subjects import BASELINE, SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from bench.results import Figure

NAMES: Final = 20
COLUMN: Final = 22
"""Characters of the column of names, and of one of figures."""

Row = dict[str, "Figure"]
"""The figures at one place, by subject."""


def show(title: str, figures: Sequence[Figure], console: Console) -> None:
    """All that a case has measured."""
    if not figures:
        return
    console.rule(Text(title, style="bold"), align="left")
    across = max(1, (console.width - NAMES) // COLUMN)
    for quantity, rows in _by_quantity(figures):
        if not any(value for row in rows for figure in row.values() for value in figure.rounds):
            console.print(Text(f"{quantity}: 0 everywhere", style="dim"))
            continue
        for start in range(0, len(rows), across):
            console.print(_table(quantity, rows[start : start + across], varied_in(figures)))
            console.print()
    for line in behind(figures):
        console.print(Text(line))


def _by_quantity(figures: Sequence[Figure]) -> Iterator[tuple[str, list[Row]]]:
    rows = list(Grid(figures).rows())
    quantities = [_quantity(next(iter(row.values()))) for row in rows]
    for quantity in dict.fromkeys(quantities):
        yield quantity, [row for row, of in zip(rows, quantities, strict=True) if of == quantity]


def _quantity(figure: Figure) -> str:
    return f"{figure.quantity}{unit_word(figure.quantity, figure.unit)}"


def _table(quantity: str, columns: Sequence[Row], varied: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column(Text(quantity, style="bold"), no_wrap=True, vertical="bottom")
    for row in columns:
        where = next(iter(row.values())).where
        heading = "\n".join(part(key, where[key]) for key in varied if key in where)
        table.add_column(Text(heading, style="dim"), justify="right")
    for name in (name for name in SUBJECTS if any(name in row for row in columns)):
        cells = [_cell(row, name) for row in columns]
        mark, style = ("▸ ", "bold") if is_ours(name) else ("  ", "")
        table.add_row(Text(mark + name), *cells, style=style)
    return table


def _cell(row: Row, subject: str) -> Text:
    """The median, how many times the baseline's, and the quartiles of that below."""
    if subject not in row:
        return Text()
    figure, baseline = row[subject], row.get(BASELINE)
    measure = Measure.of(figure.unit, [each.spread.median for each in row.values()])
    cell = Text(measure.text(figure.spread.median))
    ratio = figure.ratio(baseline) if baseline is not None and subject != BASELINE else None
    if ratio is None:
        low, high = figure.spread.low, figure.spread.high
        around = (
            f"{measure.text(low).removesuffix(measure.suffix)} to {measure.text(high)}" if low != high else ""
        )
    else:
        cell.append(f"  {times(ratio.median)}")
        around = quartiles(ratio)
    return cell.append(f"\n{around}", style="dim") if around else cell


# Where it is behind -----------------------------------------------------------------------------------------


def behind(figures: Sequence[Figure]) -> Iterator[str]:
    """A sentence for each other subject and each quantity in which it does better, the greatest difference first."""
    varied = varied_in(figures)
    comparisons = [
        compared
        for row in Grid(figures).rows()
        for ours in row.values()
        for theirs in row.values()
        if is_ours(ours.subject) and not is_ours(theirs.subject)
        if (compared := compare(ours, theirs))
    ]
    comparisons.sort(key=_whose)
    for (ours, quantity, theirs), members in groupby(comparisons, key=_whose):
        every = list(members)
        worse = sorted((one for one in every if one.verdict is Verdict.WORSE), key=lambda one: one.gain)
        if not worse:
            continue
        figure = worse[0].figure
        where = setting({key: figure.where[key] for key in varied if key in figure.where})
        measure = Measure.of(figure.unit, [figure.spread.median, worse[0].other.spread.median])
        yield (
            f"{ours} is behind {theirs}, {quantity}, in {len(worse)} of {len(every)}; most of all"
            f" {f'with {where}: ' if where else ''}{measure.text(figure.spread.median)}"
            f" beside {measure.text(worse[0].other.spread.median)}"
        )


def _whose(compared: Comparison) -> tuple[str, str, str]:
    return compared.figure.subject, compared.figure.quantity, compared.other.subject
