"""Draws what is known: a full screen of exactly so many lines, or all of it as text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from stanch.cli.top.readings import NOTHING
from stanch.measuring import BOUNDS, DROPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console, RenderableType

    from stanch.cli.top.state import State, Watched
    from stanch.measuring import Distribution, Leak, RouteTotals, Snapshot, StatementTotals

# What a person can choose ---------------------------------------------------------------------------------


class Order(Enum):
    """By what routes and statements are ordered: the name for people, and a field of each."""

    TIME = ("time", "held", "total")
    WORST = ("worst", "waited", "longest")
    COUNT = ("count", "units", "count")
    ERRORS = ("errors", "rolled_back", "errors")

    def routes(self, rows: Iterable[RouteTotals]) -> list[RouteTotals]:
        """*rows*, the largest first."""
        return sorted(rows, key=lambda row: -getattr(row, self.value[1]))

    def statements(self, rows: Iterable[StatementTotals]) -> list[StatementTotals]:
        """*rows*, the largest first."""
        return sorted(rows, key=lambda row: -getattr(row, self.value[2]))


class View(Enum):
    """Which tables are shown."""

    ALL = "all"
    HOLDERS = "holders"
    LEAKS = "leaks"
    ROUTES = "routes"
    STATEMENTS = "statements"
    EVENTS = "events"


E = TypeVar("E", bound=Enum)


@dataclass(slots=True)
class Choice:
    """What the person at the terminal has chosen so far."""

    database: int = 0
    order: Order = Order.TIME
    view: View = View.ALL
    is_paused: bool = False

    keys: ClassVar[str] = "dsvp"

    def press(self, key: str) -> None:
        """Choose anew: *key* is one of ``keys``. Any but *pause* ends a pause."""
        self.is_paused = key == "p" and not self.is_paused
        match key:
            case "d":
                self.database += 1
            case "s":
                self.order = _after(self.order)
            case "v":
                self.view = _after(self.view)
            case _:
                pass

    def __str__(self) -> str:
        pause = "PAUSED, p goes on" if self.is_paused else "p pause"
        return f"q quit  d database  s sort: {self.order.value[0]}  v view: {self.view.value}  {pause}"


def _after(chosen: E) -> E:
    every = list(type(chosen))
    return every[(every.index(chosen) + 1) % len(every)]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What bars and curves are drawn with. Told apart by form, for those who do not tell them apart by colour."""

    in_use: str = "█"
    idle: str = "░"
    waiting: str = "▚"
    levels: str = " ▁▂▃▄▅▆▇█"


ASCII: Final = Glyphs(in_use="#", idle="=", waiting="!", levels=" .:-=+*#")
"""For terminals that know no more."""

_STYLES: Final = {"in_use": "yellow", "idle": "green", "waiting": "bold red"}
_LEVELS: Final = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}


def glyphs_for(console: Console) -> Glyphs:
    """What *console* can show."""
    return Glyphs() if console.encoding.lower().startswith("utf") else ASCII


# The whole ------------------------------------------------------------------------------------------------


def full_screen(
    state: State,
    choice: Choice,
    *,
    title: str,
    width: int,
    height: int,
    glyphs: Glyphs,
) -> RenderableType:
    """*state* on exactly *height* lines; what does not fit is left out, the least telling first."""
    lines: list[RenderableType] = [_header(state, choice, title, width)]
    if (trouble := _trouble(state)) is not None:
        lines.append(trouble)
    used = len(lines) + 1  # with the keys
    if state.databases:
        watched = chosen(state, choice)
        times = _times(watched, width)
        failed = _not_served(watched)
        head = [
            (3, _counts(watched, width, glyphs)),
            *((1, line) for line in failed),
            (times.row_count, times),
        ]
        for needed, part in head:
            if used + needed <= height:
                lines.append(part)
                used += needed
        for section, rows in _fitting(_sections(state, watched, choice), height - used):
            lines.append(section.drawn(width, rows))
            used += rows + 1
    lines += [Text() for _ in range(height - used)]
    lines.append(Text(str(choice), style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def chosen(state: State, choice: Choice) -> Watched:
    """The database that is looked at."""
    return state.databases[choice.database % len(state.databases)]


def as_text(state: State, *, title: str, width: int, glyphs: Glyphs) -> RenderableType:
    """*state* whole, every database after the other."""
    parts: list[RenderableType] = []
    for number, watched in enumerate(state.databases):
        choice = Choice(database=number)
        parts += [
            _header(state, choice, title, width),
            Text(),
            _counts(watched, width, glyphs),
            *_not_served(watched),
            _times(watched, width),
        ]
        for section in _sections(state, watched, choice):
            parts += [Text(), section.drawn(width, len(section.rows))]
        parts.append(Text())
    return Group(*parts)


# The head -------------------------------------------------------------------------------------------------


def _header(state: State, choice: Choice, title: str, width: int) -> RenderableType:
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    line.add_column(no_wrap=True, justify="right")
    told, moment = Text(title, style="bold"), ""
    if state.databases:
        now, number = chosen(state, choice).told.snapshot, len(state.databases)
        which = f" ({choice.database % number + 1} of {number})" if number > 1 else ""
        told = Text(f"{now.database}{which}  ", style="bold cyan").append_text(told)
        if width >= 80:
            told.append(f"  process {now.pid}, since {duration(now.at - now.started)}", style="default")
        moment = clock(now.at)
    line.add_row(told, moment)
    return line


def _trouble(state: State) -> Text | None:
    """Why the numbers are not of now."""
    told = "connecting" if not state.databases else ""
    if state.lost is not None:
        left = max(0.0, state.lost.again_at - time.monotonic())
        told = f"no feed, again in {left:.0f} s: {state.lost.why}"
    return Text(told, style="bold reverse", no_wrap=True, overflow="ellipsis") if told else None


def _counts(watched: Watched, width: int, glyphs: Glyphs) -> RenderableType:
    """Three lines: in use, idle, waiting; a figure, a bar against the bound, the last minutes as a curve."""
    stats = watched.told.snapshot.stats
    table = _grid(4, padding=1)
    whole = f"{stats.in_use} of {stats.bound}"
    bar = max(5, min(30, width // 3))
    curve = max(0, min(width - bar - len(whole) - 12, len(watched.samples)))
    for name, figure in (("in_use", whole), ("idle", str(stats.idle)), ("waiting", str(stats.waiting))):
        number: int = getattr(stats, name)
        history: list[int] = [getattr(sample, name) for sample in watched.samples]
        top = max([*history, 1]) if name == "waiting" else stats.bound
        style = _STYLES[name] if number else "dim"
        table.add_row(
            name.replace("_", " ").ljust(7),
            Text(figure.rjust(len(whole)), style=style),
            Text((getattr(glyphs, name) * _part(number, stats.bound, bar)).ljust(bar), style=style),
            Text(_curve(history, curve, top, glyphs.levels), style=_STYLES[name]),
        )
    return table


def _not_served(watched: Watched) -> list[Text]:
    """One line where somebody waited and got no connection."""
    ends = watched.told.snapshot.wait_ends
    words = [
        f"{ends[end]} {told}"
        for end, told in (("timeout", "timed out"), ("refused", "refused"), ("unavailable", "server away"))
        if ends.get(end)
    ]
    if not words:
        return []
    line = f"not served  {', '.join(words)}, since the start"
    return [Text(line, style=_STYLES["waiting"], no_wrap=True, overflow="ellipsis")]


def _part(number: int, whole: int, width: int) -> int:
    """How much of *width* stands for *number*; something is never drawn as nothing."""
    if number <= 0 or whole <= 0:
        return 0
    return min(width, max(1, round(number / whole * width)))


def _curve(history: Sequence[int], width: int, top: int, levels: str) -> str:
    """*history* on at most *width* signs, each the highest of its seconds."""
    if width <= 0 or not history:
        return ""
    each = -(-len(history) // width)
    highest = [max(history[start : start + each]) for start in range(0, len(history), each)]
    return "".join(levels[_part(number, top, len(levels) - 1)] for number in highest)


def _times(watched: Watched, width: int) -> Table:
    """How long is waited, held and opened: in the last minute, and where there is room, since the start."""
    told, now = watched.told, watched.told.snapshot
    shares = (50, 90, 99) if width >= 52 else (50, 99)
    has_room = width >= 92
    rows = [("waited", told.waits, now.waits), ("held", told.uses, now.uses)]
    if has_room:
        rows.append(("opened", NOTHING, now.creates))
    heads = ["last minute", *(f"p{percent}" for percent in shares), "times"]
    table = _grid(1 + 2 * len(heads[1:]), padding=2)
    if has_room:
        heads += [f"all p{shares[0]}", *heads[2:]]
    table.add_row(
        *(Text(head.rjust(9) if number else head, style="dim") for number, head in enumerate(heads))
    )
    for name, lately, whole in rows:
        cells = [*(bound_of(lately, percent) for percent in shares), str(lately.count)]
        if has_room:
            cells += [*(bound_of(whole, percent) for percent in shares), str(whole.count)]
        table.add_row(Text(name), *(Text(cell.rjust(9)) for cell in cells))
    return table


def _grid(columns: int, *, padding: int) -> Table:
    """A table in which every row is one line, however narrow."""
    table = Table.grid(padding=(0, padding, 0, 0))
    for _ in range(columns):
        table.add_column(no_wrap=True, overflow="crop")
    return table


# The tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its head, its share of the free width (0: as wide as it needs), and from which width on it shows."""

    head: str
    ratio: int = 0
    least: int = 0
    right: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One table: its columns, the first of which bears its name, and all its rows."""

    columns: tuple[Column, ...]
    rows: Sequence[tuple[Text, ...]]

    def drawn(self, width: int, count: int) -> RenderableType:
        """The heads and the first *count* rows, one line each."""
        table = Table.grid(expand=True, padding=(0, 1))
        shown = [number for number, column in enumerate(self.columns) if width >= column.least]
        heads: list[Text] = []
        for number in shown:
            column = self.columns[number]
            table.add_column(
                ratio=column.ratio or None,
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
            )
            hidden = f" ({count} of {len(self.rows)})" if number == 0 and count < len(self.rows) else ""
            heads.append(Text(column.head + hidden))
        table.add_row(*heads, style="bold underline")
        for row in self.rows[:count]:
            table.add_row(*(row[number] for number in shown))
        return table


def _sections(state: State, watched: Watched, choice: Choice) -> list[Section]:
    """Those that have rows, the most telling first."""
    now = watched.told.snapshot
    makers: dict[View, Callable[[], Section]] = {
        View.LEAKS: lambda: _leaks(now),
        View.HOLDERS: lambda: _holders(now),
        View.ROUTES: lambda: _routes(now, choice.order),
        View.STATEMENTS: lambda: _statements(now, choice.order),
        View.EVENTS: lambda: _events(state, now.database),
    }
    if choice.view is not View.ALL:
        return [makers[choice.view]()]
    return [section for section in (make() for make in makers.values()) if section.rows]


def _fitting(sections: list[Section], lines: int) -> list[tuple[Section, int]]:
    """How many rows of each: every one gets a row before any gets a second; who has no line for one is left out."""
    fits = sections[: max(0, lines // 2)] or [section for section in sections[:1] if lines >= 1]
    counts = [0 for _ in fits]
    left = lines - len(fits)
    while left > 0:
        growing = [number for number, section in enumerate(fits) if counts[number] < len(section.rows)]
        if not growing:
            break
        for number in growing[:left]:
            counts[number] += 1
        left -= len(growing)
    return list(zip(fits, counts, strict=True))


def _holders(now: Snapshot) -> Section:
    columns = (
        Column("holders", ratio=3),
        Column("place", ratio=3),
        Column("held", right=True),
        Column("SQL", right=True, least=50),
        Column("state", least=70),
        Column("now at", ratio=2, least=110),
    )
    rows = [
        (
            Text(row.holder),
            Text(row.place),
            Text(duration(row.held)),
            Text(share(row.sql_time, row.held)),
            Text(row.state, style=_style_of_state(row.state)),
            Text(row.now_at),
        )
        for row in now.holders
    ]
    return Section(columns, rows)


def _style_of_state(state: str) -> str:
    if "running SQL" in state and "no SQL" not in state:
        return "green"
    return "bold red" if "gone" in state else "yellow"


def _leaks(now: Snapshot) -> Section:
    columns = (
        Column("leaks"),
        Column("taken at", ratio=3),
        Column("by", ratio=2, least=50),
        Column("held", right=True),
        Column("kind", ratio=3, least=80),
        Column("", least=60),
    )
    rows = [
        (
            Text(clock(row.at)),
            Text(row.place, style="bold red"),
            Text(row.holder),
            Text(duration(row.held)),
            Text(row.kind),
            Text(_now(row)),
        )
        for row in now.leaks
    ]
    return Section(columns, rows)


def _now(leak: Leak) -> str:
    if not leak.returned:
        return "out"
    return "reclaimed" if leak.kind == DROPPED else "returned"


def _routes(now: Snapshot, order: Order) -> Section:
    columns = (
        Column("routes by pool time" if order is Order.TIME else f"routes by {order.value[0]}", ratio=1),
        Column("units", right=True),
        Column("held", right=True),
        Column("SQL", right=True, least=50),
        Column("waited", right=True, least=60),
        Column("statements", right=True, least=90),
        Column("rolled back", right=True, least=80),
        Column("N+1", right=True, least=70),
    )
    rows = [
        (
            Text(row.route),
            Text(str(row.units)),
            Text(duration(row.held)),
            Text(share(row.sql_time, row.held)),
            Text(duration(row.waited)),
            Text(str(row.statements)),
            Text(str(row.rolled_back), style="yellow" if row.rolled_back else "dim"),
            Text(str(row.repeated), style="bold yellow" if row.repeated else "dim"),
        )
        for row in order.routes(now.routes)
    ]
    return Section(columns, rows)


def _statements(now: Snapshot, order: Order) -> Section:
    columns = (
        Column(f"statements by {order.value[0]}", ratio=3),
        Column("count", right=True),
        Column("total", right=True),
        Column("longest", right=True, least=60),
        Column("errors", right=True, least=80),
        Column("slowest at", ratio=1, least=100),
    )
    rows = [
        (
            Text(row.shape),
            Text(str(row.count)),
            Text(duration(row.total)),
            Text(duration(row.longest)),
            Text(str(row.errors), style="yellow" if row.errors else "dim"),
            Text(row.place),
        )
        for row in order.statements(now.statements)
    ]
    return Section(columns, rows)


def _events(state: State, database: str) -> Section:
    columns = (Column("events"), Column("", ratio=1))
    rows = [
        (Text(clock(each.at)), Text(each.text, style=_LEVELS.get(each.level, "")))
        for each in state.happenings
        if each.database == database
    ]
    return Section(columns, rows)


# Figures --------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A length of time, as short as it can be told.

    >>> [duration(seconds) for seconds in (0.0, 0.0004, 0.0123, 1.5, 61.0, 600.0, 90_000.0)]
    ['0', '0.4 ms', '12 ms', '1.50 s', '61 s', '10 min', '25 h']
    """
    if seconds < 0.00005:
        return "0"
    if seconds < 0.01:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def share(part: float, whole: float) -> str:
    """*part* of *whole* in per cent.

    >>> share(0.014, 61.2), share(1.0, 1.0), share(0.0, 0.0)
    ('<1 %', '100 %', '')
    """
    if whole <= 0:
        return ""
    percent = 100 * part / whole
    return "<1 %" if 0 < percent < 1 else f"{min(100.0, percent):.0f} %"


def bound_of(distribution: Distribution, percent: int) -> str:
    """A quantile: the buckets know only between which bounds it lies, so the upper one is told.

    >>> from stanch.measuring import Distribution
    >>> slow = Distribution(2, 90.0, (1, *(0,) * 15, 1))
    >>> bound_of(slow, 50), bound_of(slow, 99), bound_of(Distribution(0, 0.0, ()), 99)
    ('≤ 0.5 ms', '> 30 s', '-')
    """
    bound = distribution.quantile(percent / 100)
    if bound is None:
        return "-"
    # of what is beyond the last bound the distribution tells that bound
    return f"> {duration(BOUNDS[-2])}" if bound == BOUNDS[-1] else f"≤ {_round(bound)}"


def _round(bound: float) -> str:
    return f"{1000 * bound:g} ms" if bound < 1 else f"{bound:g} s"


def clock(moment: float) -> str:
    """The time of day at *moment*, here."""
    return time.strftime("%H:%M:%S", time.localtime(moment))
