"""Follows the connections that are out: who took them, for how long, and which of them do not come back.

What a checkout costs stands here, so that it is as little as its settings ask for: ``Tracker`` for everything,
``Untracked`` for what costs nothing. A ``Sweep`` looks at all of them together, by one timer.
"""

from __future__ import annotations

import gc
import time
from contextvars import Context
from math import inf
from typing import TYPE_CHECKING, Final, Literal
from weakref import ReferenceType, ref

from sqlalchemy.ext.asyncio import async_session

from stanch.callers import NOWHERE, place_of_asker
from stanch.events import ConnectionLeaked, HeldIdle, LeakReturned, SessionDropped

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from stanch.events import Observers
    from stanch.ledger import Checkout
    from stanch.settings import Settings

Kind = Literal["running SQL", "idle in transaction", "idle", "its task is gone"]

_TOLD_PLACES: Final = 1000
"""How many places that hold without use are told; generated code could have any number."""

_LONGEST_TICK: Final = 1.0
"""Seconds between two looks at what is out; a shorter ``leak_after`` makes it a quarter of that."""

_COLLECTING_SHARE: Final = 0.02
"""Of the loop's time, at most, for proving by the garbage collector that a connection is lost."""


class Untracked:
    """Knows of each checkout what the ledger does, and looks at nothing."""

    __slots__ = ("_database", "_observers")

    def __init__(self, observers: Observers, database: str) -> None:
        self._observers = observers
        self._database = database

    def taken(self, checkout: Checkout) -> None:
        """*checkout* has gone out to the caller."""

    def returned(self, checkout: Checkout, held: float) -> None:
        """It has come back after *held* seconds."""
        if checkout.reported:
            self._observers.tell(
                LeakReturned(
                    database=self._database,
                    holder=checkout.holder,
                    place=str(checkout.place),
                    held=held,
                    sql_time=checkout.sql_time,
                )
            )

    def dropped(self, checkout: Checkout, held: float) -> None:
        """The garbage collector has returned it; whoever held it can no longer."""
        self._observers.tell(
            SessionDropped(
                database=self._database,
                holder=checkout.holder,
                place=str(checkout.place),
                held=held,
                sql_time=checkout.sql_time,
            )
        )


class Tracker(Untracked):
    """Knows besides which line took it, and tells of those that were held without use."""

    __slots__ = ("_idle_after", "_told")

    def __init__(self, settings: Settings, observers: Observers, database: str) -> None:
        super().__init__(observers, database)
        self._idle_after = settings.held_idle_after or inf
        self._told: set[str] = set()

    def taken(self, checkout: Checkout) -> None:
        """*checkout* has gone out to the caller, who is on the stack."""
        place = place_of_asker(checkout.task)
        checkout.place = checkout.place_of_opener() if place is NOWHERE else place

    def returned(self, checkout: Checkout, held: float) -> None:
        """It has come back after *held* seconds."""
        super().returned(checkout, held)
        if held - checkout.sql_time >= self._idle_after and not checkout.reported:
            self._tell_idle(checkout, held)

    def _tell_idle(self, checkout: Checkout, held: float) -> None:
        place = checkout.holder if checkout.place is NOWHERE else str(checkout.place)
        if place in self._told or len(self._told) >= _TOLD_PLACES:
            return
        self._told.add(place)
        self._observers.tell(
            HeldIdle(
                database=self._database,
                holder=checkout.holder,
                place=place,
                held=held,
                sql_time=checkout.sql_time,
            )
        )


def tracker_of(settings: Settings, observers: Observers, database: str) -> Untracked:
    """What *settings* ask for."""
    if settings.track_holders:
        return Tracker(settings, observers, database)
    return Untracked(observers, database)


class Sweep:
    """Looks at what is out on one event loop as long as anything is, and tells of what is out for too long.

    It never judges right after the loop has been blocked: a holder that had no turn meanwhile gets one tick more.
    """

    __slots__ = (
        "__weakref__",
        "_after",
        "_blocked",
        "_database",
        "_due",
        "_held",
        "_kind_of",
        "_loop",
        "_next_collection",
        "_observers",
        "_suspected",
        "_tick",
        "_timer",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        after: float,
        *,
        held: Callable[[], Sequence[Checkout]],
        kind_of: Callable[[Checkout], Kind],
        observers: Observers,
        database: str,
    ) -> None:
        self._loop = loop
        self._after = after
        self._tick = min(_LONGEST_TICK, after / 4)
        self._held = held
        self._kind_of = kind_of
        self._observers = observers
        self._database = database
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._blocked = False
        self._suspected: set[int] = set()
        self._next_collection = 0.0

    def begin(self) -> None:
        """Something is out; called at each checkout."""
        if self._timer is None:
            self._wind()

    def _wind(self) -> None:
        self._due = time.monotonic() + self._tick
        # Weakly, and in a context of its own: the timer would else keep the pool, and what whoever was first knew.
        myself: ReferenceType[Sweep] = ref(self)
        self._timer = self._loop.call_later(self._tick, _look, myself, context=Context())

    def look(self) -> None:
        """Judge what is out now, and look again later if anything is."""
        self._timer = None
        now = time.monotonic()
        held = self._held()
        if not held:
            self._suspected.clear()
            return
        late, self._blocked = not self._blocked and now - self._due > self._tick, False
        self._wind()
        if late:
            self._blocked = True
            return
        if self._find_lost(held, now):
            held = self._held()
        for checkout in held:
            if not checkout.reported and now - checkout.since >= self._after:
                checkout.reported = True
                self._tell(checkout, now)

    def _tell(self, checkout: Checkout, now: float) -> None:
        self._observers.tell(
            ConnectionLeaked(
                database=self._database,
                holder=checkout.holder,
                place=str(checkout.place),
                now_at=checkout.now_at,
                kind=self._kind_of(checkout),
                held=now - checkout.since,
                sql_time=checkout.sql_time_at(now),
                task=checkout.task_name,
            )
        )

    # Lost for certain -----------------------------------------------------------------------------------

    def _find_lost(self, held: Sequence[Checkout], now: float) -> bool:
        """Let the garbage collector look for what nobody can return any more: it alone knows for sure.

        A session and its transaction refer to each other, so that a dropped one would wait for the collector, which
        may not come for hours. Each suspect is looked for once; what is found comes back through the pool.
        """
        self._suspected &= {id(checkout) for checkout in held}
        suspects = {
            id(checkout)
            for checkout in held
            if now - checkout.since >= self._tick and self._seems_lost(checkout, now)
        } - self._suspected
        if not suspects or now < self._next_collection:
            return False
        self._suspected |= suspects
        gc.collect()
        took = time.monotonic() - now
        self._next_collection = now + took / _COLLECTING_SHARE
        return True

    def _seems_lost(self, checkout: Checkout, now: float) -> bool:
        """Whether nobody seems to use it: its ``AsyncSession`` is gone, or its task, and no SQL runs."""
        if checkout.running_since is not None:
            return False
        account = checkout.account
        session = None if account is None or account.session is None else account.session()
        if session is not None and async_session(session) is None:
            return True
        # A task may have handed its session on, and mostly has: that alone is suspicious only in the end.
        return checkout.is_orphan and (session is None or now - checkout.since >= self._after)


def _look(sweep: ReferenceType[Sweep]) -> None:
    if (living := sweep()) is not None:
        living.look()
