"""What a case is: a question, how long its answer takes, and how to find it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.results import Figure
    from bench.subjects import Subject
    from stanch.embedded import EmbeddedPostgres


class Scale(Enum):
    """How thorough a run is."""

    QUICK = "quick"
    """All of `make bench` in less than ten minutes."""
    FULL = "full"
    """`make bench-full`: as long as it takes."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What the cases of one run share."""

    server: EmbeddedPostgres
    """With the shop's tables in its default database."""
    subjects: Sequence[Subject]
    """Those that were asked for and can be built here, the baseline first."""
    scale: Scale
    step: Callable[[str], None]
    """Tell what is done now."""


class Case(Protocol):
    """One question to all subjects."""

    name: str
    """As on the command line."""
    title: str
    method: str
    """For the page: what exactly is counted or timed, and what is not, in Markdown."""

    def needs(self) -> str | None:
        """What this machine lacks for it, or None."""
        ...

    def seconds(self, ground: Ground) -> float:
        """About how long it takes, for the time that is left."""
        ...

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Measure; figures are given as soon as they are complete."""
        ...
