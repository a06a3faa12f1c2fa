"""Who holds which connection, since when, and who waits: the pool's whole state and the only place that counts.

The ledger is pure: it never waits, opens or closes anything, and the pool asks it under the pool's lock. A
*slot* is the right to have one connection open; there are never more of them than ``pool_size +
max_overflow``. A slot is idle (its connection is open and nobody holds it) or out (somebody holds it, open or
not yet open). A slot that comes free goes to whoever has waited longest, also when its connection is gone:
what is handed over is then the right to open one. So a failed connect, a severed connection and a cancelled
waiter all pass their turn on.

Until a first connection has proved that there is a server, there is only one slot: whoever opens it may have to wait
for long, and the others had better wait in the queue, which is fair and bounded, than each before the same closed door.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from stanch.callers import NOWHERE, place_of_task

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from stanch.accounts import Account
    from stanch.callers import Place

Slot = TypeVar("Slot")


class Checkout:
    """One connection now out: who took it, when and where, and how much of that time ran SQL.

    Moments are monotonic, lengths of time in seconds. The pool opens it, the statements of the connection write
    into it, and it is final once the connection is back.
    """

    __slots__ = (
        "account",
        "place",
        "ready_after",
        "reported",
        "running_since",
        "since",
        "sql_time",
        "statement",
        "statements",
        "task",
    )

    def __init__(
        self,
        task: asyncio.Task[object] | None,
        since: float,
        account: Account | None = None,
        place: Place = NOWHERE,
    ) -> None:
        self.task = task
        self.since = since
        self.account = account
        """The unit of work that asked for it, or None outside any."""
        self.place = place
        """The nearest line of user code, where that is kept."""
        self.ready_after = 0.0
        """How long it took from then until the connection was in the holder's hand: to open it, or to ping it."""
        self.statements = 0
        self.sql_time = 0.0
        """Of statements that have ended; see ``running_since``."""
        self.running_since: float | None = None
        """Since when a statement has been running."""
        self.statement = ""
        """The text of the latest one, with its literals: never to be shown, but as its shape."""
        self.reported = False
        """Whether somebody was told that it is out for too long."""

    @property
    def holder(self) -> str:
        """Who has it: the unit of work, or outside any the task."""
        if self.account is not None:
            return self.account.holder
        return "no task" if self.task is None else self.task.get_name()

    @property
    def task_name(self) -> str:
        """The name of the task that took it; nothing where nobody has given it one, or it says who holds already."""
        name = "" if self.task is None or self.account is None else self.task.get_name()
        return "" if name.startswith("Task-") else name

    @property
    def now_at(self) -> str:
        """Where its task stands now, in words; nothing where that is not known."""
        if self.is_orphan:
            return "its task is gone"
        here = place_of_task(self._living_task())
        return "" if here is NOWHERE else str(here)

    @property
    def is_orphan(self) -> bool:
        """Whether the task that took it has ended, and that which opened the unit has too.

        Another one may have been given the session all the same, and may be using it.
        """
        return self.task is not None and self._living_task() is None

    def place_of_opener(self) -> Place:
        """Where the task that opened its unit stands now, or stood then: for a task that runs no code of the user's."""
        if self.account is None:
            return NOWHERE
        opened_by = None if self.account.task is None else self.account.task()
        here = NOWHERE if opened_by is self.task else place_of_task(opened_by)
        return (self.account.place or NOWHERE) if here is NOWHERE else here

    def _living_task(self) -> asyncio.Task[object] | None:
        # asyncio.wait_for() before Python 3.12 takes it in a task of its own, which is soon gone.
        if self.task is None or not self.task.done():
            return self.task
        opened_by = None if self.account is None or self.account.task is None else self.account.task()
        return None if opened_by is None or opened_by.done() else opened_by

    @property
    def is_tracked(self) -> bool:
        """Whether more is known of it than who has it; see ``track_holders``."""
        return self.place is not NOWHERE or self.running_since is not None or self.statements > 0

    def sql_time_at(self, now: float) -> float:
        """How long SQL has run on it until *now*, also of a statement that still runs."""
        running_since = self.running_since
        return self.sql_time + (0.0 if running_since is None else now - running_since)

    def told_at(self, now: float) -> str:
        """Who has it, from where, for how long, of that in SQL, and where the holder is now: one line for people."""
        told = self.holder
        if name := self.task_name:
            told += f" ({name})"
        if self.place is not NOWHERE:
            told += f", {self.place}" if str(self.place) != self.holder else ""
        told += f", {now - self.since:.2f} s"
        if self.is_tracked:
            told += f", of which SQL {self.sql_time_at(now):.3f} s"
        now_at = self.now_at
        if self.is_orphan:
            return f"{told}; {now_at}"
        return f"{told}; now at {now_at}" if now_at and now_at != str(self.place) else told


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The counts of one moment. ``in_use + idle`` never exceeds ``pool_size + max_overflow``.

    >>> Stats(pool_size=5, max_overflow=2, in_use=1, idle=3, waiting=0).size
    4
    """

    pool_size: int
    max_overflow: int
    in_use: int
    idle: int
    waiting: int
    adopted: bool = True
    """False where the engine keeps a pool of its own: who waits and who holds is then not known."""
    readers: Stats | None = field(default=None, repr=False)
    """What of all this is the readers', where they have connections of their own (``reader_pool_size``)."""

    @property
    def size(self) -> int:
        """Connections open or being opened."""
        return self.in_use + self.idle

    @property
    def bound(self) -> int:
        """How many may be open at once."""
        return self.pool_size + self.max_overflow

    def with_readers(self, readers: Stats) -> Stats:
        """Both pools of one database seen as one.

        >>> own = Stats(pool_size=5, max_overflow=2, in_use=1, idle=3, waiting=0)
        >>> both = own.with_readers(Stats(pool_size=4, max_overflow=0, in_use=1, idle=0, waiting=2))
        >>> (both.bound, both.in_use, both.waiting, both.readers.bound)
        (11, 2, 2, 4)
        """
        return Stats(
            pool_size=self.pool_size + readers.pool_size,
            max_overflow=self.max_overflow + readers.max_overflow,
            in_use=self.in_use + readers.in_use,
            idle=self.idle + readers.idle,
            waiting=self.waiting + readers.waiting,
            readers=readers,
        )

    def __add__(self, other: Stats) -> Stats:
        """Two pools of one database seen as one: each event loop has its own."""
        return Stats(
            pool_size=self.pool_size,
            max_overflow=self.max_overflow,
            in_use=self.in_use + other.in_use,
            idle=self.idle + other.idle,
            waiting=self.waiting + other.waiting,
        )


@dataclass(eq=False, slots=True)
class Waiter(Generic[Slot]):
    """A place in the queue. *wake* is called once, after *slot* has been handed over."""

    task: asyncio.Task[object] | None
    wake: Callable[[], None]
    slot: Slot | None = field(default=None)


class Ledger(Generic[Slot]):
    """The books of one pool on one event loop.

    >>> ledger = Ledger[list[str]](pool_size=1, max_overflow=0, clock=lambda: 0.0)
    >>> first = ledger.take(None, new=lambda: ["a"])
    >>> first
    ['a']
    >>> ledger.take(None, new=lambda: ["b"]) is None
    True
    >>> waiter = Waiter[list[str]](None, wake=lambda: None)
    >>> ledger.enqueue(waiter)
    >>> ledger.give_back(first, usable=True)
    True
    >>> waiter.slot is first, ledger.stats().in_use
    (True, 1)
    """

    __slots__ = ("_clock", "_idle", "_max_overflow", "_out", "_pool_size", "_queue", "_to_keep", "is_opening")

    def __init__(
        self, *, pool_size: int, max_overflow: int, clock: Callable[[], float], keeps_idle: bool = True
    ) -> None:
        self._clock = clock
        self._pool_size = pool_size
        self._max_overflow = max_overflow
        self.is_opening = True
        """Whether no connection has ever been ready, so that one caller at a time tries to open the first."""
        self._to_keep = pool_size if keeps_idle else 0
        self._idle: deque[Slot] = deque()
        self._out: dict[int, tuple[Slot, Checkout]] = {}
        self._queue: deque[Waiter[Slot]] = deque()

    def take(self, task: asyncio.Task[object] | None, *, new: Callable[[], Slot]) -> Slot | None:
        """An idle slot, or a *new* one while there is room; None if the caller must wait.

        Never overtakes a waiter: while somebody waits, the answer is None.
        """
        if self._queue:
            return None
        if self._idle:
            slot = self._idle.popleft()
        elif len(self._out) < self._room:
            slot = new()
        else:
            return None
        self._hand(slot, task)
        return slot

    def open_up(self, *, new: Callable[[], Slot]) -> None:
        """A first connection is ready: from now on there is room for all; who waits gets a *new* slot, in order."""
        self.is_opening = False
        while self._queue and len(self._out) < self._room:
            self._serve_next(new())

    def enqueue(self, waiter: Waiter[Slot]) -> None:
        """Let *waiter* wait behind all who came before."""
        self._queue.append(waiter)

    def give_up(self, waiter: Waiter[Slot], *, usable: Callable[[Slot], bool]) -> Slot | None:
        """End a wait that was cancelled or took too long.

        A slot that had been handed over in the same moment goes to the next waiter or becomes idle; it is
        returned if neither wants it, for the caller to close.
        """
        if waiter.slot is None:
            self._queue.remove(waiter)
            return None
        return None if self.give_back(waiter.slot, usable=usable(waiter.slot)) else waiter.slot

    def give_back(self, slot: Slot, *, usable: bool) -> bool:
        """Take *slot* back. True: it was handed on or kept idle. False: it left the books, close its connection.

        *usable*: its connection is open and may serve again. An unusable slot is still handed to a waiter, as
        the right to open a connection.
        """
        del self._out[id(slot)]
        if self._queue:
            self._serve_next(slot)
            return True
        if usable and len(self._idle) < self._to_keep:
            self._idle.append(slot)
            return True
        return False

    def holds(self, slot: Slot) -> bool:
        """Whether *slot* is out."""
        return id(slot) in self._out

    def checkout(self, slot: Slot) -> Checkout:
        """The entry of *slot*, which is out."""
        return self._out[id(slot)][1]

    def clear_idle(self) -> list[Slot]:
        """Forget all idle slots and return them, for the caller to close."""
        idle = list(self._idle)
        self._idle.clear()
        return idle

    def held(self) -> Iterator[tuple[Slot, Checkout]]:
        """The slots now out, longest held first."""
        return iter(sorted(self._out.values(), key=lambda entry: entry[1].since))

    def held_by(self, task: asyncio.Task[object] | None) -> Checkout | None:
        """What *task* has held for longest, or None. A session it was handed is on another task's account."""
        mine = (checkout for _, checkout in self._out.values() if checkout.task is task)
        return min(mine, key=lambda checkout: checkout.since, default=None)

    @property
    def _room(self) -> int:
        return 1 if self.is_opening else self._pool_size + self._max_overflow

    def _serve_next(self, slot: Slot) -> None:
        waiter = self._queue.popleft()
        self._hand(slot, waiter.task)
        waiter.slot = slot
        waiter.wake()

    def _hand(self, slot: Slot, task: asyncio.Task[object] | None) -> None:
        self._out[id(slot)] = (slot, Checkout(task, self._clock()))

    def stats(self) -> Stats:
        """The counts of this moment."""
        return Stats(
            pool_size=self._pool_size,
            max_overflow=self._max_overflow,
            in_use=len(self._out),
            idle=len(self._idle),
            waiting=len(self._queue),
        )
