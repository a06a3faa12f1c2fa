"""A SQLAlchemy pool that is fair and bounded, keeps its books in a ledger, and asks the driver at every return.

It is a ``sqlalchemy.pool.Pool`` because SQLAlchemy has no other door: the private names ``_do_get``,
``_do_return_conn``, ``_invalidate``, ``_creator``, ``_invoke_creator``, ``_close_connection``, ``_dialect``,
``_ConnectionRecord`` (its ``__init__(connect=)``, ``get_connection``, ``_soft_invalidate_time``, ``starttime`` and
``fairy_ref``) and
``_ConnectionFairy._connection_record`` stand in this module only, and
``tests/test_contract.py`` holds them on the oldest and the newest supported SQLAlchemy.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import math
import os
import random
import threading
import time
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, Self, cast
from weakref import WeakSet

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import Pool as SQLAlchemyPool
from sqlalchemy.pool.base import ResetStyle, _ConnectionRecord
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from stanch.accounts import is_owed, paying
from stanch.admission import QueueTime
from stanch.callers import current_loop, current_task
from stanch.deadlines import in_force, to_tidy_up, whose, within
from stanch.door import PROBE_INTERVAL, Trouble
from stanch.errors import DatabaseUnavailable, PoolExhausted, PoolOverloaded, SecondEventLoop
from stanch.events import ConnectionSevered, Observers, SessionStateSet, StillHeld
from stanch.ledger import Ledger, Stats, Waiter
from stanch.session_state import CLEANING, INFO_KEY
from stanch.sqlstate import Kind as FailureKind, classify
from stanch.stopping import stop
from stanch.tracking import Sweep, tracker_of
from stanch.turns import LoopTurn, ThreadTurn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from stanch.accounts import Account
    from stanch.admission import Admission, Refusal
    from stanch.callers import Place
    from stanch.drivers import Driver
    from stanch.ledger import Checkout
    from stanch.meters import Instruments, WaitEnd
    from stanch.session_state import State
    from stanch.settings import Settings
    from stanch.tracking import Kind
    from stanch.turns import Turn
    from stanch.watch import Watch

_RECYCLE_JITTER: Final = 0.1
"""The part of ``pool_recycle`` by which a connection may be replaced sooner: all were opened in the same rush."""

_TOLD_PLACES: Final = 1000
"""How many places that set session state are told of; generated code could have any number."""


class Slot(_ConnectionRecord):
    """SQLAlchemy's record of one connection, and what the pool must know to judge it: its age, its books."""

    def __init__(self, pool: Pool, ledger: Ledger[Slot]) -> None:
        super().__init__(pool, connect=False)
        self.ledger = ledger
        self.entry: Checkout | None = None
        """What is on the books for it, from when its connection is in hand until it comes back."""
        self.dropped = False
        """Whether the garbage collector returns it."""
        self.generation = -1
        self.recycle_at = math.inf
        self.idle_since = 0.0
        self._stanch_pool = pool

    @property
    def fairy_ref(self) -> Any:
        """SQLAlchemy's weak reference to what it has lent the connection as."""
        return self._lent

    @fairy_ref.setter
    def fairy_ref(self, lent: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]  # an attribute there
        # SQLAlchemy takes the reference back before it returns the slot, and tells nobody that it was dead.
        before, self._lent = self._lent, lent
        self.dropped = lent is None and before is not None and before() is None
        if self.dropped:
            self._stanch_pool.collecting(self)

    _lent: Any = None

    def get_connection(self) -> DBAPIConnection:
        """The open connection, opened now if there is none. Called once the slot has been taken."""
        pool = self._stanch_pool
        connection = self.dbapi_connection
        if connection is None:
            # The generation from before the connect: one that began before a failover is of the old server.
            self.generation = pool.generation
            self.recycle_at = pool.recycle_at()
            began = time.monotonic()
            connection = pool.within_connect_timeout(self, super().get_connection)
            pool.opened(self.ledger, time.monotonic() - began)
        elif self._soft_invalidate_time > self.starttime:  # all SQLAlchemy would ask: its recycling is off
            connection = super().get_connection()
        if self.entry is None:
            pool.hand_out(self)
        return connection

    def checkin(self, _fairy_was_created: bool = True) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """Return the slot, also when a reset callback or a listener of the user's raises on the way."""
        try:
            super().checkin(_fairy_was_created)
        except BaseException:
            self._stanch_pool.reclaim(self)
            raise


class _Caller:
    """Somebody who did not get a connection at once: how he waits, and until when."""

    __slots__ = ("due", "turn", "waited", "waiter")

    def __init__(
        self, task: asyncio.Task[object] | None, turn: Turn, timeout: float, *, has_begun: bool
    ) -> None:
        now = time.monotonic()
        self.turn = turn
        self.due = now + timeout
        self.waiter = Waiter[Slot](task, turn.wake, since=now, has_begun=has_begun)
        self.waited = 0.0
        """Seconds in the queue, all his waits together."""


class Pool(SQLAlchemyPool):
    """At most ``pool_size + max_overflow`` connections, given to waiters in the order they came.

    Guarantees: a wait ends within ``pool_timeout`` seconds and before the deadline in force, in a connection or in
    ``PoolExhausted``. A waiter that is cancelled gives its place back; a connection that is mid-operation or
    mid-transaction when it is returned is severed, never reused. Who would have to wait too long is refused early
    (``PoolOverloaded``; see ``max_waiting`` and ``queue_target`` of ``Settings``), unless his unit of work has had a
    connection already, his task holds one, or it runs a callback of a commit.

    Until a first connection is ready, and whenever the server has turned somebody away, one caller at a time tries to
    open another, soon at first, and then once a second; the others wait in the queue. If the server has no room
    (SQLSTATE 53300), they wait for what comes back or for room, as for a pool that is full. If it cannot be reached and
    nothing is out that could come back, they are told by the failure of the one who tried (``DatabaseUnavailable``),
    and newcomers wait for its return, a second at most.

    Serves the engine of an event loop, and under threads one that is not async. ``dispose()`` closes what is idle and
    outdates what is out; the bound and the waiters stay, and ``recreate()`` gives this same pool. The connections of a
    loop that was closed are dropped without awaiting, and the next loop begins a new generation; while the loop lives,
    any other is refused (``SecondEventLoop``). A forked child begins with nothing.
    """

    def __init__(
        self,
        replaced: SQLAlchemyPool,
        settings: Settings,
        *,
        driver: Driver,
        watch: Watch,
        observers: Observers,
        instruments: Instruments,
        database: str,
        sized_by: str = "pool_size or max_overflow",
    ) -> None:
        super().__init__(
            replaced._creator,
            pre_ping=False,  # asked in _answers(), where it is known who may open another
            reset_on_return=replaced._reset_on_return is not ResetStyle.reset_none,
            dialect=replaced._dialect,
            _dispatch=replaced.dispatch,
        )
        self._settings = settings
        self._driver = driver
        self._watch = watch
        self._observers = observers
        self._instruments = instruments
        patience = 0.0 if settings.pool_pre_ping else settings.ping_after
        self._ping_after = patience if patience >= 0 else math.inf
        self._tracker = tracker_of(settings, observers, database)
        self._sweep: Sweep | None = None
        self._database = database
        self._sized_by = sized_by
        # An RLock: the garbage collector returns connections on the thread that holds it.
        self._lock = threading.RLock()
        self._is_async: bool = self._dialect.is_async
        self._turn: type[LoopTurn | ThreadTurn] = LoopTurn if self._is_async else ThreadTurn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = ""
        self._ledger = self._new_ledger()
        self._disposed = False
        self._collected: dict[int, bool] = {}
        """Ids of connections that the garbage collector is returning at this moment, and whether they are ours."""
        self._told: set[tuple[str, Place]] = set()
        self.generation = 0
        self.admit: Callable[[], None] = _everybody
        """Asked before each checkout; raises what speaks against it."""
        _survive_forks(self)

    # What SQLAlchemy calls ------------------------------------------------------------------------------

    def _do_get(self) -> ConnectionPoolEntry:
        self.admit()
        ledger = self._ledger_of_this_loop()
        task, account = current_task(), paying.get()
        with self._lock:
            slot = ledger.take(task, new=lambda: Slot(self, ledger))
            holds_another = slot is None and task is not None and ledger.held_by(task) is not None
        caller: _Caller | None = None
        try:
            if slot is None:
                caller = self._caller(task, account, holds_another=holds_another)
                slot = self._queue_up(ledger, caller)
            while not self._is_ready(slot, account):
                caller = caller or self._caller(task, account)
                if self._open(ledger, slot, caller):
                    break
                slot = self._wait(ledger, caller)
        except BaseException as error:
            self._tell_wait(caller, account, error)
            raise
        try:
            self._tell_wait(caller, account, None)
        except BaseException:  # a meter's own: nobody would return what nobody was given
            self._do_return_conn(slot)
            raise
        return slot

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        assert isinstance(record, Slot)
        if record.dropped and record.ledger in _of_the_parent:
            return
        self._drop_unless_idle(record)
        record.idle_since = time.monotonic()
        if record.dropped and self._is_async:
            self._soon(record)
        else:
            self._book_return(record)

    def _book_return(self, slot: Slot) -> None:
        try:
            if slot.entry is not None:
                self._take_in(slot, slot.entry, slot.idle_since)
        finally:  # a meter that raises costs no slot
            with self._lock:
                kept = slot.ledger.give_back(slot, usable=slot.dbapi_connection is not None)
        if not kept:
            slot.close()

    def _soon(self, slot: Slot) -> None:
        """Book the return of *slot* in the next turn of the loop.

        The garbage collector comes in the middle of anything: of a change to the books, or of a meter or an observer
        that holds a lock of its own.
        """
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._book_return, slot)
        except (AssertionError, RuntimeError):  # closed: nobody is in the middle of anything there
            self._book_return(slot)

    def _invalidate(
        self,
        connection: PoolProxiedConnection,
        exception: BaseException | None = None,
        _checkin: bool = True,  # noqa: FBT001, FBT002  # SQLAlchemy's signature
    ) -> None:
        """Outdate every connection of the generation *connection* belongs to."""
        self._retire(getattr(connection, "_connection_record", None))
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        close = partial(super()._close_connection, connection, terminate=terminate)
        if (is_ours := self._collected.pop(id(connection), None)) is not None:
            # The garbage collector comes in the middle of anything: nothing may be awaited, not in a greenlet either.
            if is_ours:
                self._driver.sever(self._dialect.get_driver_connection(connection))
            return
        if not in_greenlet():  # nothing can be awaited, SQLAlchemy cuts the socket
            close()
            return
        self._watch.run(
            close,
            connection=self._dialect.get_driver_connection(connection),
            timeout=to_tidy_up(self._settings.close_timeout),
            what="closing a connection",
        )

    def dispose(self) -> None:
        """Close what is idle; what is out now is closed when it comes back."""
        with self._lock:
            self._forget_closed_loop()  # nothing of its can be awaited here
            self.generation += 1
            loop, idle = self._loop, self._ledger.clear_idle()
        try:
            for slot in idle:
                if loop is current_loop():
                    slot.close()
                else:
                    _where_it_lives(loop, self._drop, slot)
        except (
            BaseException
        ):  # cancelled: the others are on no books any more, so nobody would ever close them
            for slot in idle:
                if slot.dbapi_connection is not None:
                    self._drop(slot)
            raise
        self._disposed = True

    def recreate(self) -> Self:
        """Give this same pool, with nothing idle."""
        # Engine.dispose() replaces the pool by this answer. The bound, the waiters and what is out live on
        # here; after dispose(close=False), for a forked child, the idle connections are forgotten, not
        # closed. After dispose() there is nothing to forget: what became idle while it closed is of today.
        with self._lock:
            disposed, self._disposed = self._disposed, False
            if not disposed:
                self.generation += 1
                self._ledger.clear_idle()
        return self

    def status(self) -> str:
        """The counts in words, as SQLAlchemy's pools tell theirs."""
        stats = self.stats()
        return f"in_use {stats.in_use} idle {stats.idle} waiting {stats.waiting} of {stats.bound}"

    # What the rest of stanch calls ----------------------------------------------------------------------

    def stats(self) -> Stats:
        """The counts of this moment."""
        with self._lock:
            self._forget_closed_loop()
            return self._ledger.stats()

    def held(self) -> list[Checkout]:
        """All that is out now, longest held first."""
        with self._lock:
            self._forget_closed_loop()
            return [checkout for _, checkout in self._ledger.held()]

    def held_by(self, task: asyncio.Task[object] | None) -> Checkout | None:
        """What *task* has held for longest, or None."""
        with self._lock:
            return self._ledger.held_by(task)

    def sever_held(self) -> None:
        """Cut off every connection that is out, and stop its statement; its holder is told as ``StillHeld``."""
        now = time.monotonic()
        with self._lock:
            self._forget_closed_loop()
            loop, held = self._loop, [*self._ledger.held()]
        for slot, checkout in held:
            _where_it_lives(loop, self._stop, slot)
            checkout.reported = True
            self._observers.tell(
                StillHeld(
                    database=self._database,
                    holder=checkout.holder,
                    held=now - checkout.since,
                    place=str(checkout.place),
                    now_at=checkout.now_at,
                    sql_time=checkout.sql_time_at(now),
                    task=checkout.task_name,
                )
            )

    def refuse_early(self) -> None:
        """Raise ``PoolOverloaded`` if a caller who came now would not be let wait; for one who has done nothing yet."""
        ledger = self._ledger
        # Nobody is refused while nobody waits, or because of those who waited on a loop that is no more.
        if ledger.has_queue and current_loop() is self._loop:
            with self._lock:
                refusal = ledger.refusal()
            if refusal is not None:
                self._instruments.meter.waited(0.0, "refused", None)
                raise self._overloaded(ledger, refusal)

    def open_beside(self) -> DBAPIConnection:
        """A new connection beside the pool, which may be full: not on the books, and the caller's to close."""
        return self._invoke_creator(None)  # type: ignore[arg-type]  # what it is for is nobody's entry

    def within_connect_timeout(self, slot: Slot, connect: Callable[[], DBAPIConnection]) -> DBAPIConnection:
        """*connect*, with what SQLAlchemy and listeners ask of a new connection: the driver bounds only its opening."""
        timeout = within(2 * self._settings.connect_timeout)
        # A thread's driver keeps the time itself.
        alarm = asyncio.get_running_loop().call_later(timeout, self._sever, slot) if self._is_async else None
        due = time.monotonic() + timeout
        try:
            return connect()
        except Exception as error:
            if not self._is_async and isinstance(error, self._driver_errors):
                from stanch.drivers.base import unavailable  # noqa: PLC0415  # drivers load it, and failures need it

                raise unavailable([("the server", error)], self._settings.connect_timeout) from error
            if time.monotonic() < due:
                failure = None if isinstance(error, SQLAlchemyError) else classify(error)
                if failure is None or failure.kind is not FailureKind.UNAVAILABLE:
                    raise
                # SQLAlchemy translates what asyncpg raises from a statement, not from its set-up of types.
                raise DatabaseUnavailable(
                    f"a new connection was lost before it was ready for use ({type(error).__name__})",
                    remedies=["See whether the server was restarted just now: its log says so."],
                ) from error
            limit = whose("twice connect_timeout,", timeout)
            raise DatabaseUnavailable(
                f"a new connection was not ready for use in time ({limit}); it was severed",
                remedies=[
                    "The server accepts connections, but does not answer: look at its log and its load."
                ],
            ) from error
        finally:
            if alarm is not None:
                alarm.cancel()

    @property
    def _driver_errors(self) -> tuple[type[Exception], ...]:
        """What a driver that is not async raises when it cannot connect."""
        errors: Any = cast("Dialect", self._dialect).dbapi
        return OSError, errors.OperationalError

    def recycle_at(self) -> float:
        """When a connection that is opened now shall be replaced (monotonic seconds)."""
        recycle = self._settings.pool_recycle
        if recycle < 0:
            return math.inf
        return time.monotonic() + recycle * (1 - random.uniform(0, _RECYCLE_JITTER))  # noqa: S311  # jitter

    def opened(self, ledger: Ledger[Slot], seconds: float) -> None:
        """A connection is ready for use after *seconds*: whoever waited for that may open another."""
        self._instruments.meter.opened(seconds)
        if not ledger.is_open:
            with self._lock:
                ledger.open_up(new=lambda: Slot(self, ledger))

    def _sever(self, slot: Slot) -> None:
        if slot.dbapi_connection is not None:
            self._driver.sever(slot.driver_connection)

    def _stop(self, slot: Slot) -> None:
        if slot.dbapi_connection is not None:
            stop(self._driver, slot.driver_connection)

    def collecting(self, slot: Slot) -> None:
        """The garbage collector returns *slot*, and closes its connection if that can only be done by awaiting."""
        connection = slot.dbapi_connection
        if self._is_async and connection is not None:
            is_ours = slot.ledger not in _of_the_parent
            if not is_ours:
                _of_the_parent.append(connection)
            self._collected[id(connection)] = is_ours

    def reclaim(self, slot: Slot) -> None:
        """Take back a slot whose return failed before it reached the books; nothing is known of its connection."""
        if slot.ledger.holds(slot):
            if slot.dbapi_connection is not None:
                self._drop(slot)
            self._do_return_conn(slot)

    def hand_out(self, slot: Slot) -> None:
        """*slot* has its connection and goes to whoever is on the stack."""
        checkout = slot.entry = slot.ledger.checkout(slot)
        checkout.since = time.monotonic()  # what opening it took is not held against him
        if self._sweep is not None:
            self._sweep.begin()
        self._instruments.meter.taken(checkout)

    def _take_in(self, slot: Slot, checkout: Checkout, now: float) -> None:
        slot.entry = None
        held = now - checkout.since
        if checkout.account is not None:
            checkout.account.held += held
        if slot.dropped:
            self._tracker.dropped(checkout, held)
        else:
            self._tracker.returned(checkout, held)
        self._instruments.meter.returned(checkout, held)

    # The books, of one loop -----------------------------------------------------------------------------

    def _new_ledger(self) -> Ledger[Slot]:
        settings = self._settings
        admission: Admission | None = None
        if settings.queue_target is not None:
            admission = QueueTime(target=settings.queue_target, interval=settings.queue_interval)
        return Ledger(
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            clock=time.monotonic,
            keeps_idle=settings.keeps_idle,
            lifo=settings.pool_use_lifo,
            max_waiting=settings.max_waiting,
            admission=admission,
        )

    def _ledger_of_this_loop(self) -> Ledger[Slot]:
        if self._is_async:
            loop = asyncio.get_running_loop()
            if loop is not self._loop:
                self._move_to(loop)
        return self._ledger

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._forget_closed_loop()
            stats = self._ledger.stats()
            if stats.size or stats.waiting:
                raise SecondEventLoop(
                    f"database {self._database!r} is in use on another event loop, which is alive"
                    f" (thread {self._thread!r}, in_use {stats.in_use}, idle {stats.idle}): its connections"
                    " belong to that one",
                    remedies=[
                        "Close the database there first: await db.close(); or close that loop, as asyncio.run() does.",
                        "Or give this loop a Database of its own, from the same URL.",
                    ],
                )
            self._ledger = self._new_ledger()
            self._sweep = self._sweep_of(self._ledger, loop)
            self._loop, self._thread = loop, threading.current_thread().name

    def _sweep_of(self, ledger: Ledger[Slot], loop: asyncio.AbstractEventLoop) -> Sweep | None:
        """Who looks for what does not come back to *ledger*, if that is wanted."""
        if self._settings.leak_after is None:
            return None

        def held() -> list[Checkout]:
            with self._lock:
                return [
                    checkout
                    for slot, checkout in ledger.held()
                    if slot.entry is checkout and not slot.dropped
                ]

        def kind_of(checkout: Checkout) -> Kind:
            with self._lock:
                slot = next((slot for slot, each in ledger.held() if each is checkout), None)
            if checkout.running_since is not None:
                return "running SQL"
            if checkout.is_orphan:
                return "its task is gone"
            if slot is None or slot.dbapi_connection is None or self._driver.is_idle(slot.driver_connection):
                return "idle"
            return "idle in transaction"

        return Sweep(
            loop,
            self._settings.leak_after,
            held=held,
            kind_of=kind_of,
            observers=self._observers,
            database=self._database,
        )

    def _forget_closed_loop(self) -> None:
        """Drop the connections of a loop that was closed; the next loop begins a new generation."""
        if self._loop is None or not self._loop.is_closed():
            return
        ledger = self._ledger
        self._ledger, self._loop, self._sweep = self._new_ledger(), None, None
        self.generation += 1
        # Nobody can return what is out there: a return awaits, and that loop runs no more.
        for slot in (*ledger.clear_idle(), *(slot for slot, _ in ledger.held())):
            if slot.dbapi_connection is not None:
                self._drop(slot)

    def leave_to_the_parent(self) -> None:
        """In a forked child: what is on the books is the parent's, and must be neither used, closed nor collected."""
        # Another thread of the parent's may have held the lock; here it would never let go.
        self._lock = threading.RLock()
        _of_the_parent.append(self._ledger)
        self._ledger, self._loop, self._sweep = self._new_ledger(), None, None
        self.generation += 1

    # Opening --------------------------------------------------------------------------------------------

    def _open(self, ledger: Ledger[Slot], slot: Slot, caller: _Caller) -> bool:
        """Whether *slot* could be opened; if not, it has left the books, and its *caller* waits again."""
        with self._lock:
            if not ledger.may_open(slot):
                ledger.stand_back(slot, caller.waiter)
                return False
        try:
            self.admit()  # asked again: he may have waited, and the database be closed by now
            slot.get_connection()
        except BaseException as error:
            if slot.dbapi_connection is not None:  # open, and not ready for use
                self._drop(slot)
            if isinstance(error, DatabaseUnavailable) and self._is_to_wait(ledger, slot, caller, error):
                return False
            if ledger.holds(slot):
                self._do_return_conn(slot)
            raise
        return True

    def _is_to_wait(
        self, ledger: Ledger[Slot], slot: Slot, caller: _Caller, error: DatabaseUnavailable
    ) -> bool:
        """Whether *caller*, whom the server has turned away, waits for room or for what is out; else he is told."""
        deadline = in_force()
        if deadline is not None and deadline.has_passed:
            return False  # it was he who had no time left, and nothing was learned of the server
        with self._lock:
            others = sum(1 for other, _ in ledger.held() if other is not slot and self._lives(other))
            return ledger.turned_away(slot, caller.waiter, Trouble.of(error), others=others)

    def _lives(self, slot: Slot) -> bool:
        if slot.dbapi_connection is None:
            return False
        # What another thread is using must not be looked at.
        return not (self._is_async and self._driver.looks_dead(slot.driver_connection))

    # Waiting --------------------------------------------------------------------------------------------

    def _queue_up(self, ledger: Ledger[Slot], caller: _Caller) -> Slot:
        with self._lock:  # one step: on another thread a connection may have come back just now
            slot = ledger.take(caller.waiter.task, new=lambda: Slot(self, ledger))
            if slot is not None:
                return slot
            refusal = None if caller.waiter.has_begun else ledger.refusal()
            if refusal is None:
                ledger.enqueue(caller.waiter)
        if refusal is not None:
            raise self._overloaded(ledger, refusal)
        return self._wait(ledger, caller)

    def _caller(
        self, task: asyncio.Task[object] | None, account: Account | None, *, holds_another: bool = False
    ) -> _Caller:
        has_begun = holds_another or is_owed.get() or (account is not None and account.held > 0)
        return _Caller(task, self._turn(), self._settings.pool_timeout, has_begun=has_begun)

    def _tell_wait(
        self, caller: _Caller | None, account: Account | None, error: BaseException | None
    ) -> None:
        """Put on *account*, and tell the meter, how long *caller* was in the queue; None did not have to wait."""
        if caller is None and error is None:  # nearly always
            self._instruments.meter.waited(0.0, "served", account)
            return
        waited = 0.0 if caller is None else caller.waited
        end: WaitEnd = "served"
        match error:
            case None:
                pass
            case PoolOverloaded():
                end = "refused"
            case _ if not waited:
                return  # it was no wait that failed
            case PoolExhausted():
                end = "timeout"
            case DatabaseUnavailable():
                end = "unavailable"
            case _:
                end = "cancelled"
        if account is not None:
            account.waited += waited
        self._instruments.meter.waited(waited, end, account)

    def _wait(self, ledger: Ledger[Slot], caller: _Caller) -> Slot:
        waiter, began = caller.waiter, time.monotonic()
        try:
            while True:
                with self._lock:
                    look_again = ledger.look(waiter, new=lambda: Slot(self, ledger))
                now = time.monotonic()
                # While the server is away, somebody has tried again by then, or is at it and has no answer yet.
                due = min(caller.due, waiter.since + PROBE_INTERVAL) if ledger.is_away else caller.due
                patience = within(due - now)
                if waiter.is_over or patience <= 0:
                    break
                caller.turn.wait(
                    patience if look_again is None else max(0.0, min(patience, look_again - now))
                )
        except BaseException:
            # Cancelled: a slot may have been handed over in the same moment, so it is passed on, not lost.
            self._give_up(ledger, waiter)
            raise
        finally:
            caller.waited += time.monotonic() - began
        deadline = in_force()
        # A turn that comes at the deadline is passed on at once: a connect begun now would only hold up the next.
        if waiter.slot is None or (deadline is not None and deadline.has_passed):
            error = self._left_empty(ledger, waiter)
            self._give_up(ledger, waiter)
            # A connection that came free between the alarm and here was ours; it has gone to the next.
            raise error
        return waiter.slot

    def _left_empty(self, ledger: Ledger[Slot], waiter: Waiter[Slot]) -> PoolExhausted | DatabaseUnavailable:
        if waiter.refusal is not None:
            return self._overloaded(ledger, waiter.refusal)
        trouble = waiter.trouble or ledger.trouble
        if trouble is not None and not trouble.is_full:
            return trouble.told()
        error = self._exhausted(ledger)
        if trouble is not None:
            figures, line, holders = error.what.partition("\n")
            error.what = (
                f"{figures}; the server has no room for another connection: {trouble.what}{line}{holders}"
            )
            error.__cause__ = trouble.cause
        return error

    def _overloaded(self, ledger: Ledger[Slot], refusal: Refusal) -> PoolOverloaded:
        stats, holders, remedies = self._situation(ledger)
        return PoolOverloaded(
            f"refused, for others wait already (in_use {stats.in_use} of {stats.bound}, waiting {refusal.waiting},"
            f" the first for {refusal.waited:.2f} s): {refusal.reason}{holders}",
            remedies=[
                "Let the client try again later: the reply is 503 with Retry-After.",
                *remedies,
                f"Raise {self._sized_by}, if the server has room; for work that can wait, queue_target=None.",
            ],
        )

    def _give_up(self, ledger: Ledger[Slot], waiter: Waiter[Slot]) -> None:
        with self._lock:
            unwanted = ledger.give_up(waiter, usable=lambda slot: slot.dbapi_connection is not None)
        if unwanted is not None and unwanted.dbapi_connection is not None:
            self._drop(unwanted)

    def _exhausted(self, ledger: Ledger[Slot]) -> PoolExhausted | DatabaseUnavailable:
        stats, holders, remedies = self._situation(ledger)
        deadline = in_force()
        limit = str(deadline) if deadline and deadline.has_passed else f"{self._settings.pool_timeout:.2f} s"
        if ledger.is_opening:
            return DatabaseUnavailable(
                f"no connection could be opened within {limit}: the first is still on its way"
                f" (waiting {stats.waiting}){holders}",
                remedies=["See whether the server answers: pg_isready -h <host> -p <port>."],
            )
        return PoolExhausted(
            f"no connection came free within {limit}"
            f" (in_use {stats.in_use} of {stats.bound}, waiting {stats.waiting}){holders}",
            remedies=[
                *remedies,
                f"Raise {self._sized_by}, if the server has room: all workers share max_connections.",
            ],
        )

    def _situation(self, ledger: Ledger[Slot]) -> tuple[Stats, str, list[str]]:
        """The counts, the longest holders in words, and what may help the caller against them."""
        from stanch.blame import lines_of, remedies_for  # noqa: PLC0415  # only when it has come to that

        now = time.monotonic()
        with self._lock:
            stats = ledger.stats()
            held = [checkout for _, checkout in ledger.held()]
        return stats, lines_of(held, now), remedies_for(held, now, current_task())

    # Judging --------------------------------------------------------------------------------------------

    def _is_ready(self, slot: Slot, account: Account | None) -> bool:
        """Whether *slot*, now on *account*, is open and may be handed out; a connection that may not is cut off."""
        try:
            checkout = slot.ledger.checkout(slot)
            checkout.account = account
            self._tracker.taken(checkout)
            if slot.dbapi_connection is None:
                return False
            now = time.monotonic()
            if self._fit(slot, now) and (now - slot.idle_since < self._ping_after or self._answers(slot)):
                return True
            self._drop(slot)
        except BaseException:  # cancelled while it was pinged
            self._do_return_conn(slot)
            raise
        return False

    def _fit(self, slot: Slot, now: float) -> bool:
        """Whether an idle connection may be handed out: asked without a round trip."""
        return (
            slot.generation == self.generation
            and now < slot.recycle_at
            and not self._driver.looks_dead(slot.driver_connection)
        )

    def _answers(self, slot: Slot) -> bool:
        """Whether a connection that nobody has used for ``ping_after`` seconds still does; the others are believed."""
        assert slot.dbapi_connection is not None
        with suppress(Exception):  # whatever it is: a connection that cannot be asked is replaced
            if cast("Dialect", self._dialect).do_ping(slot.dbapi_connection):
                return True
        deadline = in_force()
        if (
            deadline is None or not deadline.has_passed
        ):  # else it was the caller who had no time left for the answer
            # What silenced this one has silenced the others, and each would cost its holder a timeout.
            self._retire(slot)
        return False

    def _retire(self, slot: Slot | None) -> None:
        """Outdate the generation of *slot*, once."""
        with self._lock:
            if slot is None or slot.generation >= self.generation:
                self.generation += 1

    def _drop_unless_idle(self, slot: Slot) -> None:
        if slot.dbapi_connection is None:
            return
        driver_connection = slot.driver_connection
        if slot.generation != self.generation:
            self._drop(slot)
        elif not (self._driver.is_idle(driver_connection) or self._finished(driver_connection)):
            # The driver is asked, not SQLAlchemy: what is mid-operation here would answer the next holder.
            is_gone = self._driver.looks_dead(driver_connection)
            self._drop(slot)
            if not is_gone:
                self._observers.tell(
                    ConnectionSevered(database=self._database, reason="it was not idle when it was returned")
                )
        elif (states := slot.info.pop(INFO_KEY, None)) and not self._reset(slot, states):
            self._drop(slot)

    def _finished(self, connection: Any) -> bool:
        """Whether *connection* was only unfinished, and is idle now; if it could not be, somebody was told why."""
        if not self._driver.is_unfinished(connection):
            return False
        finished = self._cleaned(connection, "")
        if not finished:
            self._driver.sever(connection)
        return finished

    def _reset(self, slot: Slot, states: Mapping[State, Place]) -> bool:
        """Whether the session *states* that a unit left behind are gone; if not, somebody was told why."""
        undoing = [state.undo for state in states if state.undo is not None]
        if self._settings.reset == "strict" and len(undoing) == len(states):
            return self._cleaned(slot.driver_connection, "; ".join(filter(None, (*CLEANING, *undoing))))
        for state, place in states.items():
            if (state.what, place) not in self._told and len(self._told) < _TOLD_PLACES:
                self._told.add((state.what, place))
                self._observers.tell(
                    SessionStateSet(database=self._database, what=state.what, place=str(place))
                )
        return False

    def _cleaned(self, connection: Any, sql: str) -> bool:
        def clean() -> None:
            await_only(self._driver.clean(connection, sql))

        try:
            self._watch.run(
                clean,
                connection=connection,
                timeout=self._settings.close_timeout,
                what="resetting the session state",
            )
        except Exception as error:  # noqa: BLE001  # the unit is over; it is not told of this
            reason = f"its session state could not be reset ({type(error).__name__})"
            self._observers.tell(ConnectionSevered(database=self._database, reason=reason))
            return False
        return True

    def _drop(self, slot: Slot) -> None:
        """Cut the connection off without awaiting; the slot itself stays and can be connected anew."""
        self._driver.sever(slot.driver_connection)
        slot.dbapi_connection = None
        slot.info.clear()


def checkout_of(connection: Any) -> Checkout | None:
    """What is on the books for SQLAlchemy's pooled *connection*; None for one that was detached, or opened beside."""
    slot = connection._connection_record
    return None if slot is None else slot.entry


def adapted(connection: Any) -> Any:
    """What SQLAlchemy's pooled *connection* is around, or itself: each name that it does not know is an error first."""
    return getattr(connection, "dbapi_connection", connection)


def _everybody() -> None:
    """Nothing speaks against a checkout."""


_of_the_parent: Final[list[object]] = []
"""What a forked child keeps for ever: collected, it would be closed, and the sockets are its parent's."""

_pools: Final[WeakSet[Pool]] = WeakSet()
"""Those that a forked child begins anew; one that nobody uses any more is no concern of it."""


def _survive_forks(pool: Pool) -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        _register_once()
    _pools.add(pool)


@cache
def _register_once() -> None:
    os.register_at_fork(after_in_child=_begin_anew)


def _begin_anew() -> None:
    for pool in _pools:
        pool.leave_to_the_parent()


def _where_it_lives(loop: asyncio.AbstractEventLoop | None, cut: Callable[[Slot], None], slot: Slot) -> None:
    """Cut a connection off on the thread of its loop: only there may the sockets of a running loop be touched."""
    if loop is None or loop is current_loop() or not loop.is_running():
        cut(slot)
    else:
        loop.call_soon_threadsafe(cut, slot)
