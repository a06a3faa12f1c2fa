"""Who holds which connection, since when, and who waits: the pool's whole state and the only place that counts.

The ledger is pure: it never waits, opens or closes anything, and the pool asks it under the pool's lock. A
*slot* is the right to have one connection open; there are never more of them than ``pool_size +
max_overflow``. A slot is idle (its connection is open and nobody holds it) or out (somebody holds it, open or
not yet open). A slot that comes free goes to whoever has waited longest, also when its connection is gone:
what is handed over is then the right to open one. So a failed connect, a severed connection and a cancelled
waiter all pass their turn on.

That right is worth something only while the server takes connections; whether it does, the *door* knows. While it is
not open there is one attempt at a time, made by whoever is first in the queue, and the others wait in the queue, which
is fair and bounded, rather than each before the same closed door. Who may wait at all, *admission* decides.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from stanch.admission import Everybody, Refusal
from stanch.callers import NOWHERE, place_of_task
from stanch.door import Door, State

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from stanch.accounts import Account
    from stanch.admission import Admission
    from stanch.callers import Place
    from stanch.door import Trouble

Slot = TypeVar("Slot")

_ANSWERS: Final = frozenset({State.OPEN, State.FULL})
_SHUT: Final = frozenset({State.FULL, State.AWAY})


class Checkout:
    """One connection now out: who took it, when and where, and how much of that time ran SQL.

    Moments are monotonic, lengths of time in seconds. The pool opens it, the statements of the connection write
    into it, and it is final once the connection is back.
    """

    __slots__ = (
        "__weakref__",  # a meter may keep something of its own for each
        "account",
        "place",
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

    @property
    def own(self) -> Stats:
        """What of all this is not the readers': ``with_readers()`` undone.

        >>> own = Stats(pool_size=5, max_overflow=2, in_use=1, idle=3, waiting=0)
        >>> own.with_readers(Stats(pool_size=4, max_overflow=0, in_use=1, idle=0, waiting=2)).own == own
        True
        """
        readers = self.readers
        if readers is None:
            return self
        return Stats(
            pool_size=self.pool_size - readers.pool_size,
            max_overflow=self.max_overflow - readers.max_overflow,
            in_use=self.in_use - readers.in_use,
            idle=self.idle - readers.idle,
            waiting=self.waiting - readers.waiting,
            adopted=self.adopted,
        )


class Waiter(Generic[Slot]):
    """A place in the queue. *wake* is called after the wait has ended in one of three ways, or to look again."""

    __slots__ = ("has_begun", "refusal", "since", "slot", "task", "trouble", "wake")

    def __init__(
        self,
        task: asyncio.Task[object] | None,
        wake: Callable[[], None],
        *,
        since: float = 0.0,
        has_begun: bool = False,
    ) -> None:
        self.task = task
        self.wake = wake
        self.has_begun = has_begun
        """Whether his unit of work has had a connection before: to refuse him would be to throw that work away."""
        self.since = since
        """When the wait began (monotonic seconds)."""
        self.slot: Slot | None = None
        """What was handed over."""
        self.refusal: Refusal | None = None
        self.trouble: Trouble | None = None
        """Why no connection can be opened, and there is none to wait for."""

    @property
    def is_over(self) -> bool:
        """Whether the wait has ended."""
        return self.slot is not None or self.refusal is not None or self.trouble is not None


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

    __slots__ = (
        "_admission",
        "_clock",
        "_door",
        "_idle",
        "_max_overflow",
        "_max_waiting",
        "_next_idle",
        "_out",
        "_pool_size",
        "_queue",
        "_to_keep",
    )

    def __init__(
        self,
        *,
        pool_size: int,
        max_overflow: int,
        clock: Callable[[], float],
        keeps_idle: bool = True,
        lifo: bool = False,
        max_waiting: int | None = None,
        admission: Admission | None = None,
        door: Door | None = None,
    ) -> None:
        self._clock = clock
        self._pool_size = pool_size
        self._max_overflow = max_overflow
        self._max_waiting = max_waiting
        self._admission: Admission = admission or Everybody()
        self._door = door or Door()
        self._to_keep = pool_size if keeps_idle else 0
        self._idle: deque[Slot] = deque()
        self._next_idle = self._idle.pop if lifo else self._idle.popleft
        self._out: dict[int, tuple[Slot, Checkout]] = {}
        # In the order they came. Whoever gives up leaves from the middle, and a million of them leave nothing behind.
        self._queue: OrderedDict[Waiter[Slot], None] = OrderedDict()

    # Taking ---------------------------------------------------------------------------------------------

    def take(self, task: asyncio.Task[object] | None, *, new: Callable[[], Slot]) -> Slot | None:
        """An idle slot, or a *new* one while there is room; None if the caller must wait.

        Never overtakes a waiter: while somebody waits, the answer is None.
        """
        if self._queue:
            return None
        if self._idle:
            slot = self._next_idle()
        elif self._has_room:
            slot = new()
            self.may_open(slot)
        else:
            return None
        self._hand(slot, task)
        return slot

    def may_open(self, slot: Slot) -> bool:
        """Whether who holds *slot*, whose connection is not open, may open it now; if not, he must ``stand_back()``."""
        if self._door.is_open or self._door.is_tried_by(slot):
            return True
        now = self._clock()
        if not self._door.lets_try(now):
            return False
        self._door.begin(slot, now)
        return True

    def open_up(self, *, new: Callable[[], Slot]) -> None:
        """A connection is ready: while that is so there is room for all; who waits gets a *new* slot, in order."""
        self._door.succeed()
        while self._queue and self._has_room:
            self._serve_next(new())

    def turned_away(self, slot: Slot, waiter: Waiter[Slot], trouble: Trouble, *, others: int) -> bool:
        """The server did not let *slot* be opened, while *others* are out with a connection; it leaves the books.

        True: its *waiter* waits again, in his old place. False: everybody who waits is told of the *trouble*.
        """
        del self._out[id(slot)]
        is_worth_waiting = self._door.fail(slot, trouble, now=self._clock(), others=others)
        if is_worth_waiting or self._idle:
            self._put_back(waiter)
            return True
        waiters, self._queue = self._queue, OrderedDict()
        for each in waiters:
            each.trouble = trouble
            each.wake()
        return False

    def stand_back(self, slot: Slot, waiter: Waiter[Slot]) -> None:
        """*slot* cannot be opened now, so it leaves the books; its *waiter* waits again, in his old place."""
        del self._out[id(slot)]
        self._put_back(waiter)

    # Waiting --------------------------------------------------------------------------------------------

    def refusal(self) -> Refusal | None:
        """Why one more may not wait, or None; nobody is refused while nobody waits."""
        waiting = len(self._queue)
        if not waiting:
            return None
        now = self._clock()
        waited = now - self._first.since
        if self._max_waiting is not None and waiting >= self._max_waiting:
            return Refusal(f"max_waiting is {self._max_waiting}", waiting, waited, now)
        if self._is_queueing:
            self._admission.see(waited=waited, waiting=waiting, out=len(self._out), now=now)
            if self._admission.refuses(waiting=waiting, out=len(self._out), now=now):
                return Refusal(self._admission.reason, waiting, waited, now)
        return None

    def enqueue(self, waiter: Waiter[Slot]) -> None:
        """Let *waiter* wait behind all who came before."""
        waiter.since = self._clock()
        self._queue[waiter] = None

    def look(self, waiter: Waiter[Slot], *, new: Callable[[], Slot]) -> float | None:
        """What *waiter* does before he waits on. If he is first and the door lets somebody try, he gets a *new* slot.

        The moment at which he shall look again; None: he will be woken.
        """
        if self._door.is_open or waiter not in self._queue or waiter is not self._first:
            return None
        if self._has_room:
            self._serve_next(new())
            return None
        return None if self._door.is_tried or len(self._out) >= self._bound else self._door.next_try

    def give_up(self, waiter: Waiter[Slot], *, usable: Callable[[Slot], bool]) -> Slot | None:
        """End a wait that was cancelled or took too long.

        A slot that had been handed over in the same moment goes to the next waiter or becomes idle; it is
        returned if neither wants it, for the caller to close.
        """
        if waiter.slot is not None:
            return None if self.give_back(waiter.slot, usable=usable(waiter.slot)) else waiter.slot
        if waiter in self._queue:
            del self._queue[waiter]
            self._let_first_look()
        return None

    def give_back(self, slot: Slot, *, usable: bool) -> bool:
        """Take *slot* back. True: it was handed on or kept idle. False: it left the books, close its connection.

        *usable*: its connection is open and may serve again. An unusable slot is still handed to a waiter, as
        the right to open a connection, if the door lets one be opened.
        """
        del self._out[id(slot)]
        self._door.give_up(slot)
        if not usable:
            self._door.make_room(self._clock())
        if self._queue:
            if usable or self._has_room:
                self._serve_next(slot, usable=usable)
                return True
            self._let_first_look()
            return False
        if usable and len(self._idle) < self._to_keep:
            self._idle.append(slot)
            return True
        return False

    # Looking --------------------------------------------------------------------------------------------

    @property
    def is_opening(self) -> bool:
        """Whether no connection has ever been ready, so that one caller at a time tries to open the first."""
        return self._door.state is State.UNKNOWN

    @property
    def is_open(self) -> bool:
        """Whether the server takes connections, as far as is known."""
        return self._door.is_open

    @property
    def is_away(self) -> bool:
        """Whether the server could not be reached, and nobody has reached it since."""
        return self._door.state is State.AWAY

    @property
    def trouble(self) -> Trouble | None:
        """Why no connection could be opened, while that is so."""
        return self._door.trouble

    @property
    def has_queue(self) -> bool:
        """Whether anybody waits."""
        return bool(self._queue)

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

    # Private --------------------------------------------------------------------------------------------

    @property
    def _bound(self) -> int:
        return self._pool_size + self._max_overflow

    @property
    def _has_room(self) -> bool:
        """Whether one more connection may be opened now."""
        if self._door.is_open:
            return len(self._out) < self._bound
        room = 1 if self.is_opening else self._bound
        return len(self._out) < room and self._door.lets_try(self._clock())

    @property
    def _is_queueing(self) -> bool:
        """Whether it is for other callers that callers wait, and not for a server that has yet to answer."""
        return self._door.state in _ANSWERS

    @property
    def _first(self) -> Waiter[Slot]:
        return next(iter(self._queue))

    def _put_back(self, waiter: Waiter[Slot]) -> None:
        waiter.slot = None
        self._queue[waiter] = None
        self._queue.move_to_end(waiter, last=False)
        # Several may come back, in any order; they are few, for each of them had a slot.
        older = [each for each, _ in zip(self._queue, range(self._bound + 1), strict=False)]
        for each in reversed([each for each in older if each.since < waiter.since]):
            self._queue.move_to_end(each, last=False)
        if self._idle:  # it came back while he tried, and nobody was waiting for it
            self._serve_next(self._next_idle(), usable=True)
        self._let_first_look()

    def _let_first_look(self) -> None:
        """Whoever is first has become so, or may try again at another time: before a door that was shut, and is."""
        if self._queue and self._door.state in _SHUT and not self._door.is_tried:
            self._first.wake()

    def _serve_next(self, slot: Slot, *, usable: bool = False) -> None:
        """Hand *slot* to whoever has waited longest; not *usable* is the right to open it."""
        if not usable:
            self.may_open(slot)
        waiter = self._next_in_time() if self._is_queueing else self._queue.popitem(last=False)[0]
        self._hand(slot, waiter.task)
        waiter.slot = slot
        waiter.wake()
        self._let_first_look()

    def _next_in_time(self) -> Waiter[Slot]:
        """The first of the queue; before him, those are refused who have waited too long."""
        now, out, admission = self._clock(), len(self._out) + 1, self._admission
        waited, waiting = now - self._first.since, len(self._queue)
        admission.see(waited=waited, waiting=waiting, out=out, now=now)
        admission.served(now)
        while not self._first.has_begun and admission.is_too_late(
            waited=waited, waiting=waiting, out=out, now=now
        ):
            late, _ = self._queue.popitem(last=False)
            late.refusal = Refusal(admission.reason, waiting - 1, waited, now)
            late.wake()
            waited, waiting = now - self._first.since, waiting - 1
        return self._queue.popitem(last=False)[0]

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
