"""Who may wait for a connection, and who is refused now: decided by the time that callers wait, not by their number.

Pure: asked under the pool's lock, every time is handed in (monotonic seconds). The idea is CoDel's (RFC 8289): a queue
that comes and goes is what queues are for; one that stands is load that cannot be served, and whoever joins it only
makes all the others late. A packet is dropped at little cost, a request is not, so more is asked for here before
anybody is refused: callers must have been late for a whole interval, while the queue grew to twice what it had been
and to more than three places for each connection. So a burst that is being served, a crowd of constant size and slow
work of a few are waited for, and load that exceeds what can be served is seen about when lateness has doubled.

While refusing, as many may wait as were lately served within the time that a wait may take; the others are told at
once. It ends when nobody had to be refused for ten intervals: chance alone leaves one without.
"""

from __future__ import annotations

from typing import Final, Protocol

from stanch.values import Value

FEW: Final = 20
"""So many may wait in any case: thrice the connections of the smallest pools is no more than one page asks for."""

CROWD: Final = 3
"""So many may wait for each connection in any case: a crowd of constant size comes and goes, and is no overload."""

QUIET: Final = 10
"""Intervals without a refusal, after which load and capacity agree again."""


class Refusal(Value):
    """Why somebody is not let in or not kept waiting, with the figures of that moment."""

    reason: str
    waiting: int
    waited: float
    """How long whoever is first had waited, in seconds; of one who had waited already, how long he had."""
    at: float
    """When it was decided."""


class Admission(Protocol):
    """What the ledger asks. *now* and *waited* are in seconds; *out* is how many connections are held."""

    is_refusing: bool
    """Whether newcomers may be refused at this moment; who asks pays nothing more while it is False."""
    reason: str
    """Why, in words."""

    def see(self, *, waited: float, waiting: int, out: int, now: float) -> None:
        """Take note of the queue, at each arrival and each turn: its length, and how long its first has waited."""
        ...

    def served(self, now: float) -> None:
        """Take note that somebody who waited got a turn."""
        ...

    def refuses(self, *, waiting: int, out: int, now: float) -> bool:
        """Whether one more is refused who would wait behind *waiting* others."""
        ...

    def is_too_late(self, *, waited: float, waiting: int, out: int, now: float) -> bool:
        """Whether the first of the queue is refused when its turn comes: the others may still be in time."""
        ...


class Everybody(Admission):
    """Refuses nobody: where ``queue_target`` is None."""

    is_refusing: bool = False
    reason: str = ""

    def see(self, *, waited: float, waiting: int, out: int, now: float) -> None:
        """Nothing is noted."""

    def served(self, now: float) -> None:
        """Nothing is noted."""

    def refuses(self, *, waiting: int, out: int, now: float) -> bool:
        """Nobody is."""
        del waiting, out, now
        return False

    def is_too_late(self, *, waited: float, waiting: int, out: int, now: float) -> bool:
        """Nobody is."""
        del waited, waiting, out, now
        return False


class QueueTime(Admission):
    """Refuses once callers have waited longer than *target* seconds, for *interval* seconds on end, and more came.

    >>> gate = QueueTime(target=0.1, interval=0.2)
    >>> for tenth in range(6):  # each tenth of a second ten more wait for the one connection, and nobody is served
    ...     gate.see(waited=tenth / 10, waiting=10 * tenth, out=1, now=tenth / 10)
    ...     print(tenth, gate.is_refusing)
    0 False
    1 False
    2 False
    3 False
    4 True
    5 True
    """

    __slots__ = (
        "_at_first",
        "_before",
        "_count",
        "_interval",
        "_late_since",
        "_refused_at",
        "_target",
        "_window",
        "is_refusing",
        "reason",
    )

    def __init__(self, *, target: float, interval: float) -> None:
        self.is_refusing = False
        self.reason = (
            f"callers wait longer than queue_target {target:.2f} s, have for more than queue_interval"
            f" {interval:.2f} s, and ever more come"
        )
        self._target = target
        self._interval = interval
        self._late_since: float | None = None
        self._at_first = 0
        self._refused_at = 0.0
        # Turns since the window began, and the same of the window before.
        self._window, self._count = 0.0, 0
        self._before = (0.0, 0)

    def see(self, *, waited: float, waiting: int, out: int, now: float) -> None:
        """See `Admission`."""
        if self.is_refusing:
            self._end(now)
        elif waited <= self._target:
            self._late_since = None
        elif self._late_since is None:
            self._late_since, self._at_first = now, waiting
        elif (
            now - self._late_since >= self._interval
            and waiting > max(FEW, CROWD * out)
            and waiting >= 2 * self._at_first
        ):
            self.is_refusing, self._refused_at = True, now

    def served(self, now: float) -> None:
        """See `Admission`."""
        if now - self._window >= self._interval:
            self._before = (self._window, self._count)
            self._window, self._count = now, 0
        self._count += 1

    def refuses(self, *, waiting: int, out: int, now: float) -> bool:
        """See `Admission`. One may wait for each connection in any case: the next to come free must find somebody."""
        if self.is_refusing:
            self._end(now)
        if not self.is_refusing or waiting < max(out, self._served_in_time(now)):
            return False
        self._refused_at = now
        return True

    def is_too_late(self, *, waited: float, waiting: int, out: int, now: float) -> bool:
        """See `Admission`."""
        if not self.is_refusing or waited <= self._target or waiting <= out:
            return False
        self._refused_at = now
        return True

    def _end(self, now: float) -> None:
        if now - self._refused_at >= QUIET * self._interval:
            self.is_refusing, self._late_since = False, None

    def _served_in_time(self, now: float) -> int:
        began, count = self._before
        return int((count + self._count) / max(now - began, self._interval) * self._target)
