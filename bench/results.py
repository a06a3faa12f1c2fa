"""What was measured: figures, each one number of one subject under one setting, in as many rounds as were run.

Ratios are never stored: they are of the rounds of two subjects that ran side by side, so ``ratio`` pairs them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

FORMAT: Final = 1
"""Of the files; another number is another meaning."""

Better = Literal["less", "more", "neither"]


class Spread(NamedTuple):
    """A median, and the quarters around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """The spread of *values*; a single one is its own spread.

        >>> Spread.of([3.0, 1.0, 2.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
        """
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(median(ordered), ordered[round(last * 0.25)], ordered[round(last * 0.75)])


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity of one subject under one setting.

    >>> where = {"rtt_ms": 0.5, "clients": 1, "pool": 10}
    >>> figure = Figure("rate", "article", where, "requests", "1/s", "more", (350.0,))
    >>> figure.spread.median
    350.0
    """

    case: str
    subject: str
    where: Mapping[str, str | float]
    """The setting: figures are compared where this is equal."""
    quantity: str
    unit: str
    better: Better
    rounds: tuple[float, ...]
    """One value of each round; rounds of the same position ran side by side. A count has one."""

    @property
    def spread(self) -> Spread:
        """Over the rounds."""
        return Spread.of(self.rounds)

    def ratio(self, baseline: Figure) -> Spread | None:
        """How many times the baseline's, round by round; None where the baseline had nothing."""
        pairs = list(zip(self.rounds, baseline.rounds, strict=False))
        if not pairs or any(theirs == 0 for _, theirs in pairs):
            return None
        return Spread.of(ours / theirs for ours, theirs in pairs)

    def is_comparable(self, other: Figure) -> bool:
        """Whether both measure the same of different subjects."""
        return (self.case, self.quantity, self.unit, self.where) == (
            other.case,
            other.quantity,
            other.unit,
            other.where,
        )


@dataclass(slots=True)
class Results:
    """All figures of one run, and what it ran on."""

    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    """Processor, cores, operating system, load at the start; never a name or a path."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    scale: str = "quick"
    figures: list[Figure] = field(default_factory=list[Figure])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Cases and subjects that could not run here, and why."""

    def of(self, case: str) -> Iterator[Figure]:
        """The figures of one *case*, in the order they were measured."""
        return (figure for figure in self.figures if figure.case == case)

    def beside(self, figure: Figure, baseline: str) -> Figure | None:
        """What *baseline* measured where *figure* was."""
        return next(
            (other for other in self.figures if other.subject == baseline and other.is_comparable(figure)),
            None,
        )

    def write(self, file: Path) -> None:
        """Store them."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Self:
        """The stored ones; ``ValueError`` for a file of another format."""
        told = json.loads(file.read_text())
        if told.pop("format", None) != FORMAT:
            raise ValueError(f"{file.name} is of another format than {FORMAT}; run it again")
        figures = [
            Figure(**dict[str, Any](figure, rounds=tuple(figure["rounds"]))) for figure in told.pop("figures")
        ]
        return cls(**told, figures=figures)
