"""What the databases looked like during the last minutes: one sample a second, so that a fresh page has a past."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from stanch.measuring import BOUNDS, Distribution

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stanch.database import Database

PERIOD: Final = 1.0
"""Seconds between two samples."""

KEPT: Final = 300
"""How many samples are kept: five minutes."""

RECENT: Final = 60
"""How many samples make up what is called recent: one minute."""


class Sample(NamedTuple):
    """One database at one moment; *taken* and *failed* count from the start."""

    in_use: int
    idle: int
    waiting: int
    bound: int
    taken: int
    """Checkouts that have ended."""
    failed: int
    """Waits that ended without a connection."""
    waits: Distribution
    uses: Distribution


_NEVER: Final = Distribution(0, 0.0, (0,) * (len(BOUNDS) + 1))
_NOTHING: Final = Sample(0, 0, 0, 0, 0, 0, _NEVER, _NEVER)
"""Of a database that was installed later."""


class Moment(NamedTuple):
    """All databases at one moment."""

    number: int
    at: float
    """Seconds since the epoch, for people; it never goes back, whatever the wall clock does."""
    samples: Mapping[str, Sample]


class History:
    """Keeps the samples. It is a timer of the running loop, no task: a loop that ends takes it along.

    Costs one look at the counts of each database a second, some twenty microseconds.
    """

    def __init__(self, databases: Sequence[Database[Any]]) -> None:
        self._databases = databases
        self._moments: deque[Moment] = deque(maxlen=KEPT + 1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._origin = 0.0
        self.pid = 0
        self.run = ""
        """Names this process among all others, also those that had its number before."""
        self.since = 0.0
        self.is_over = False
        """Whether it was stopped, and not begun again."""

    def begin(self) -> None:
        """Keep samples from now on, on the running loop; does nothing where it is at it.

        A process that was forked from one that had begun begins anew: it serves other requests.
        """
        loop = asyncio.get_running_loop()
        if self.pid == os.getpid() and self._timer is not None and self._is_running():
            return
        if self.pid != os.getpid():
            self.pid = os.getpid()
            self.since = time.time()
            self.run = f"{self.pid:x}-{int(self.since * 1000):x}"
            self._origin = self.since - time.monotonic()
            self._moments.clear()
        self.is_over = False
        self._loop = loop
        self._look()

    def stop(self) -> None:
        """Keep no more samples."""
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def latest(self) -> int:
        """The number of the latest sample; the first is 1."""
        return self._moments[-1].number if self._moments else 0

    def columns(self, after: int) -> dict[str, dict[str, list[float]]]:
        """The samples that came *after* this one, by database, as columns of one length."""
        moments = [moment for moment in tuple(self._moments)[-KEPT:] if moment.number > after]
        return {database.name: _columns(moments, database.name) for database in self._databases}

    def recently(self, database: str) -> Iterator[tuple[str, Distribution]]:
        """How long was waited and used in the last minute, or since the start if that is later."""
        moments = tuple(self._moments)[-RECENT - 1 :]
        seen = [moment.samples[database] for moment in moments if database in moment.samples]
        if seen:
            yield "waits", seen[-1].waits.since(seen[0].waits)
            yield "uses", seen[-1].uses.since(seen[0].uses)

    # Private --------------------------------------------------------------------------------------------

    def _is_running(self) -> bool:
        # A loop that was closed, or left standing, no longer calls anybody.
        return self._loop is not None and not self._loop.is_closed() and self._loop.is_running()

    def _look(self) -> None:
        assert self._loop is not None
        # In a context of its own: it would else keep what the visitor knew who began it.
        self._timer = self._loop.call_later(PERIOD, self._look, context=Context())
        samples = {database.name: _sample(database) for database in self._databases}
        self._moments.append(Moment(self.latest + 1, self._origin + time.monotonic(), samples))


def _sample(database: Database[Any]) -> Sample:
    stats = database.stats()
    waits, uses, failed = database.measure().totals()
    return Sample(stats.in_use, stats.idle, stats.waiting, stats.bound, uses.count, failed, waits, uses)


def _columns(moments: Sequence[Moment], database: str) -> dict[str, list[float]]:
    counts = {
        field: [getattr(moment.samples.get(database, _NOTHING), field) for moment in moments]
        for field in Sample._fields[:-2]
    }
    return {
        "number": [moment.number for moment in moments],
        "at": [round(moment.at, 3) for moment in moments],
        **counts,
    }
