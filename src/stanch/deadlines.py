"""One absolute deadline, and the name of whoever set it: a timeout is turned into it once and travels down.

Nothing here waits or cancels. Whoever waits asks ``within()`` how long he may, and whoever opens a unit of work
says ``under()`` which deadline holds inside.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment, *at* (monotonic seconds), that *timeout* seconds were given to reach; *source* says by whom.

    >>> Deadline(at=0.0, timeout=2.0, source="transaction(timeout=2.0)").remaining()
    0.0
    """

    at: float
    timeout: float
    source: str

    @classmethod
    def after(cls, timeout: float, source: str) -> Deadline:
        """The deadline *timeout* seconds from now."""
        return cls(time.monotonic() + timeout, timeout, source)

    def remaining(self) -> float:
        """Seconds that are left; 0.0 once it has passed."""
        return max(0.0, self.at - time.monotonic())


def earlier(one: Deadline | None, other: Deadline | None) -> Deadline | None:
    """Whichever of the two passes first; a missing one never does."""
    if one is None or other is None:
        return one or other
    return one if one.at <= other.at else other


_in_force: Final[ContextVar[Deadline | None]] = ContextVar("stanch deadline", default=None)


def in_force() -> Deadline | None:
    """The deadline of whatever is being done now, or None."""
    return _in_force.get()


def within(timeout: float) -> float:
    """How long a wait may take that is allowed *timeout* seconds by itself: that, or less under a deadline."""
    deadline = _in_force.get()
    return timeout if deadline is None else min(timeout, deadline.remaining())


@contextmanager
def under(deadline: Deadline | None) -> Generator[None]:
    """*deadline* is in force inside the block."""
    token = _in_force.set(deadline)
    try:
        yield
    finally:
        _in_force.reset(token)
