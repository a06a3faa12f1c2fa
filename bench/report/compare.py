"""What ran side by side, compared: subject with subject at the same setting, and both with the goals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from bench.results import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from bench.results import Figure, Results

NEGLIGIBLE: Final = 0.01
"""A difference of less is none, whatever its quartiles say."""

OURS: Final = "stanch"
LIMITS: Final = frozenset({"bare", "asyncpg", "asyncpg-reset", "core", "orm-floor"})
"""Subjects that do less than a session layer does: no rivals, but what none can go below."""


def is_ours(subject: str) -> bool:
    """Whether *subject* is stanch, in one of its ways."""
    return subject == OURS or subject.startswith(f"{OURS}-")


def is_limit(subject: str) -> bool:
    """Whether *subject* is there to show how far one could go."""
    return subject in LIMITS


Place = tuple[str, str, str, frozenset[tuple[str, str | float]]]
"""Case, quantity, unit and setting: where these are equal, figures are comparable."""


def place_of(figure: Figure) -> Place:
    """Where *figure* was measured."""
    return figure.case, figure.quantity, figure.unit, frozenset(figure.where.items())


class Grid:
    """The figures by place and subject, in the order they were measured."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._at: defaultdict[Place, dict[str, Figure]] = defaultdict(dict)
        for figure in figures:
            self._at[place_of(figure)].setdefault(figure.subject, figure)

    def rows(self) -> Iterator[dict[str, Figure]]:
        """All that is comparable, together, by subject."""
        yield from self._at.values()

    def beside(self, figure: Figure) -> dict[str, Figure]:
        """All subjects where *figure* was measured."""
        return self._at.get(place_of(figure), {})


def varied_in(figures: Iterable[Figure]) -> list[str]:
    """The keys of their settings that do not have the same value everywhere."""
    wheres = [figure.where for figure in figures]
    keys = dict.fromkeys(key for where in wheres for key in where)
    return [key for key in keys if len({where.get(key) for where in wheres}) > 1]


class Verdict(Enum):
    """What a comparison says."""

    BETTER = "better"
    EVEN = "even"
    """Less than a hundredth apart, or the quartiles lie on both sides of the same."""
    WORSE = "worse"


class Comparison(NamedTuple):
    """One figure beside another."""

    figure: Figure
    other: Figure
    ratio: Spread | None
    """Of the rounds: how many times the other's; None where the other had nothing in some round."""

    @property
    def difference(self) -> Spread:
        """Of the rounds: how much more than the other's."""
        pairs = zip(self.figure.rounds, self.other.rounds, strict=False)
        return Spread.of(ours - theirs for ours, theirs in pairs)

    @property
    def gain(self) -> float:
        """How many times better: less than 1 is worse."""
        if self.ratio is None:
            factor = 1.0 if self.difference.median == 0 else inf if self.difference.median > 0 else 0.0
        else:
            factor = self.ratio.median
        if self.figure.better == "more":
            return factor
        return 1 / factor if factor else inf

    @property
    def verdict(self) -> Verdict:
        """Better, even or worse than the other."""
        spread, same = (self.difference, 0.0) if self.ratio is None else (self.ratio, 1.0)
        is_near = self.ratio is not None and abs(self.ratio.median - 1) < NEGLIGIBLE
        if is_near or spread.low <= same <= spread.high:
            return Verdict.EVEN
        return Verdict.BETTER if self.gain > 1 else Verdict.WORSE


def compare(figure: Figure, other: Figure | None) -> Comparison | None:
    """The two; None where there is no other, neither more nor less is better, or both are nothing, as most failures."""
    if other is None or figure.better == "neither" or not (any(figure.rounds) or any(other.rounds)):
        return None
    ratio = figure.ratio(other)
    return Comparison(
        figure, other, None if ratio is None or min(*figure.rounds, *other.rounds) < 0 else ratio
    )


def against(results: Results, baseline: str) -> list[Comparison]:
    """All of stanch's figures beside those of *baseline*."""
    return _compared(results, lambda row: [row[baseline]] if baseline in row else [])


def against_best(results: Results) -> list[Comparison]:
    """Stanch's best figure at each place beside the best of all that do the same work."""
    found: list[Comparison] = []
    for row in Grid(results.figures).rows():
        ours = [figure for figure in row.values() if is_ours(figure.subject)]
        theirs = [
            figure for figure in row.values() if not is_ours(figure.subject) and not is_limit(figure.subject)
        ]
        if ours and theirs and (compared := compare(_best(ours), _best(theirs))):
            found.append(compared)
    return found


def against_limits(results: Results) -> list[Comparison]:
    """All of stanch's figures beside each of what does less."""
    return _compared(results, lambda row: [figure for figure in row.values() if is_limit(figure.subject)])


def _compared(results: Results, others: Callable[[dict[str, Figure]], Iterable[Figure]]) -> list[Comparison]:
    return [
        compared
        for row in Grid(results.figures).rows()
        for other in others(row)
        for figure in row.values()
        if is_ours(figure.subject) and (compared := compare(figure, other))
    ]


def _best(figures: Sequence[Figure]) -> Figure:
    sign = -1 if figures[0].better == "more" else 1
    return min(figures, key=lambda figure: sign * figure.spread.median)


@dataclass(frozen=True, slots=True)
class Group:
    """The comparisons of one quantity that have the same verdict, the greatest difference first."""

    comparisons: list[Comparison]
    of: int
    """How many of it there are, whatever came of them."""

    @property
    def first(self) -> Comparison:
        """The greatest difference."""
        return self.comparisons[0]

    @property
    def last(self) -> Comparison:
        """The smallest."""
        return self.comparisons[-1]


def grouped(comparisons: Sequence[Comparison], verdict: Verdict) -> list[Group]:
    """Those of *verdict*, by quantity, the greatest ratio first; what has no ratio comes last."""

    def key(one: Comparison) -> tuple[str, str]:
        return one.figure.case, one.figure.quantity

    def size(one: Comparison) -> float:
        return -max(one.gain, 1 / one.gain) if one.ratio is not None and one.ratio.median else 0.0

    groups: list[Group] = []
    for _, members in groupby(sorted(comparisons, key=key), key=key):
        every = list(members)
        if chosen := sorted((one for one in every if one.verdict is verdict), key=size):
            groups.append(Group(chosen, len(every)))
    return sorted(groups, key=lambda group: size(group.first))


# Goals -------------------------------------------------------------------------------------------------------


class Goal(Protocol):
    """What a ratio should be, or a figure itself."""

    @property
    def case(self) -> str:
        """Where it is measured."""
        ...

    @property
    def subject(self) -> str:
        """Whose goal it is."""
        ...

    @property
    def where(self) -> Mapping[str, str | float]:
        """The part of the setting that counts; what it does not name may be anything."""
        ...

    @property
    def quantity(self) -> str:
        """Which figure."""
        ...

    @property
    def than(self) -> str | None:
        """The subject that it is a ratio to; None: the bounds are of the figure itself."""
        ...

    @property
    def ratio_at_least(self) -> float | None:
        """The median is not less."""
        ...

    @property
    def ratio_at_most(self) -> float | None:
        """The median is not more."""
        ...

    @property
    def says(self) -> str:
        """The goal, as a sentence."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal, and what was measured: what is furthest from it of all settings it is about."""

    goal: Goal
    worst: tuple[Figure, Spread] | None = None
    """A figure, and what of it is bounded."""

    @property
    def is_met(self) -> bool | None:
        """None where nothing was measured."""
        if self.worst is None:
            return None
        return _distance(self.goal, self.worst[1]) <= 0


def judge(results: Results, goals: Iterable[Goal]) -> list[Judged]:
    """Each goal beside the results."""
    grid = Grid(results.figures)
    judged: list[Judged] = []
    for goal in goals:
        found = [
            (figure, bounded)
            for figure in results.of(goal.case)
            if (figure.subject, figure.quantity) == (goal.subject, goal.quantity)
            and goal.where.items() <= figure.where.items()
            and (bounded := _bounded(goal, figure, grid))
        ]
        judged.append(Judged(goal, max(found, key=lambda one: _distance(goal, one[1]), default=None)))
    return judged


def _bounded(goal: Goal, figure: Figure, grid: Grid) -> Spread | None:
    if goal.than is None:
        return figure.spread
    other = grid.beside(figure).get(goal.than)
    return None if other is None else figure.ratio(other)


def _distance(goal: Goal, bounded: Spread) -> float:
    """How far the median is on the wrong side of the goal; not positive if it is on the right one."""
    short = -inf if goal.ratio_at_least is None else goal.ratio_at_least - bounded.median
    over = -inf if goal.ratio_at_most is None else bounded.median - goal.ratio_at_most
    return max(short, over)
