"""Who is compared with whom, in which order, and what each round gave."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from bench.cases.case import Scale
from bench.results import Better, Figure
from bench.subjects import SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from bench.cases.case import Ground
    from bench.shop import Kind
    from bench.subjects import Subject

K = TypeVar("K")
T = TypeVar("T")

DRIVERS: Final = ("asyncpg", "psycopg")
FIRST: Final = frozenset(SUBJECTS) - {"asyncpg-reset", "context-async-asgi"}
"""Without those that are a second way to use what is there anyway."""
ON_BOTH: Final = frozenset({"article", "stanch", "stanch-reader"})
"""Who runs on both drivers, where there is time; the others on the first."""


class Lane(NamedTuple):
    """A subject on a driver."""

    subject: Subject
    driver: str

    def __str__(self) -> str:
        return f"{self.subject.name}, {self.driver}"


def chosen(ground: Ground, quick: Collection[str], kind: Kind | None = None) -> list[Subject]:
    """Those of the subjects that serve *kind*; where a quick run has more than are in *quick*, those in it."""
    able = [subject for subject in ground.subjects if kind is None or kind in subject.kinds]
    if ground.scale is Scale.FULL or len(able) <= len(quick):
        return able
    return [subject for subject in able if subject.name in quick] or able


def lanes(ground: Ground, kind: Kind, *, quick: Collection[str] = FIRST) -> list[Lane]:
    """Those of the subjects that are ``chosen``, and on which drivers."""
    subjects = chosen(ground, quick, kind)
    if ground.scale is Scale.QUICK:
        return [Lane(subject, DRIVERS[0]) for subject in subjects]
    return [
        Lane(subject, driver)
        for driver in DRIVERS
        for subject in subjects
        if driver == DRIVERS[0] or subject.name in ON_BOTH
    ]


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The order of round *by*: each is the first once, and nobody always follows the same.

    >>> rotated("abc", 1), rotated("abc", 5)
    (['b', 'c', 'a'], ['c', 'a', 'b'])
    """
    first = by % len(items) if items else 0
    return [*items[first:], *items[:first]]


@contextmanager
def together(managers: Mapping[K, AbstractContextManager[T]]) -> Generator[dict[K, T]]:
    """Enter all of them, as many at a time as there are processors: most of it is the start of a process."""
    with ExitStack() as stack:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            entering = {key: threads.submit(stack.enter_context, each) for key, each in managers.items()}
        yield {key: entered.result() for key, entered in entering.items()}


class Gathered:
    """The values of all rounds, until they are figures.

    >>> gathered = Gathered("fairness")
    >>> for value in (3.0, 5.0):
    ...     gathered.of("article", pool=2).more("requests", "1/s", value)
    >>> [figure.rounds for figure in gathered.figures()]
    [(3.0, 5.0)]
    """

    def __init__(self, case: str) -> None:
        self._case = case
        self._figures: dict[tuple[object, ...], Figure] = {}
        self._lacking: set[tuple[object, ...]] = set()

    def of(self, subject: str, **where: str | float) -> Gathering:
        """Where what one more round gave of this *subject* is told."""
        return Gathering(self, subject, where)

    def add(self, subject: str, where: dict[str, str | float], told: Told) -> None:
        """One more round; what has no value in one of them is left out altogether."""
        key = (subject, tuple(sorted(where.items())), told.quantity)
        if told.value is None:
            self._lacking.add(key)
            return
        rounds = self._figures[key].rounds if key in self._figures else ()
        self._figures[key] = Figure(
            self._case, subject, where, told.quantity, told.unit, told.better, (*rounds, told.value)
        )

    def figures(self) -> Iterator[Figure]:
        """In the order in which they first came."""
        return (figure for key, figure in self._figures.items() if key not in self._lacking)


class Told(NamedTuple):
    """A value of one round."""

    quantity: str
    unit: str
    better: Better
    value: float | None
    """None where the round had nothing of the kind."""


class Gathering(NamedTuple):
    """What is gathered of one subject in one setting."""

    gathered: Gathered
    subject: str
    where: dict[str, str | float]

    def more(self, quantity: str, unit: str, value: float | None) -> None:
        """More is better."""
        self.gathered.add(self.subject, self.where, Told(quantity, unit, "more", value))

    def less(self, quantity: str, unit: str, value: float | None) -> None:
        """Less is better."""
        self.gathered.add(self.subject, self.where, Told(quantity, unit, "less", value))

    def neither(self, quantity: str, unit: str, value: float | None) -> None:
        """Neither is."""
        self.gathered.add(self.subject, self.where, Told(quantity, unit, "neither", value))
