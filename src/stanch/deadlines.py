"""One absolute moment by which something must have happened, and the name of what is waited for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment *at*, on the monotonic clock of the event loop, and *what* must be over by then.

    >>> deadline = Deadline.after(2.0, now=100.0, what="COMMIT")
    >>> deadline.remaining(now=101.5)
    0.5
    >>> deadline.remaining(now=200.0)
    0.0
    >>> deadline.earliest(Deadline(101.0, "the request")).what
    'the request'
    """

    at: float
    what: str

    @classmethod
    def after(cls, timeout: float, *, now: float, what: str) -> Self:
        """The deadline *timeout* seconds from *now*."""
        return cls(now + timeout, what)

    @classmethod
    def never(cls, what: str) -> Self:
        """A deadline that does not come."""
        return cls(math.inf, what)

    def remaining(self, *, now: float) -> float:
        """Seconds left; 0.0 once the moment has passed."""
        return max(0.0, self.at - now)

    def earliest(self, other: Deadline) -> Deadline:
        """The one of the two that comes first."""
        return self if self.at <= other.at else other
