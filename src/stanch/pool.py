"""A SQLAlchemy pool that is fair and bounded, keeps its books in a ledger, and asks the driver at every return.

It is a ``sqlalchemy.pool.Pool`` because SQLAlchemy has no other door: the private names ``_do_get``,
``_do_return_conn``, ``_invalidate``, ``_creator``, ``_invoke_creator``, ``_close_connection``, ``_dialect``,
``_ConnectionRecord`` (its ``__init__(connect=)``, ``get_connection`` and ``fairy_ref``) and
``_ConnectionFairy._connection_record`` stand in this module only, and
``tests/test_contract.py`` holds them on the oldest and the newest supported SQLAlchemy.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import Pool as SQLAlchemyPool
from sqlalchemy.pool.base import ResetStyle, _ConnectionRecord
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from stanch.accounts import paying
from stanch.callers import current_loop, current_task
from stanch.deadlines import in_force, to_tidy_up, whose, within
from stanch.errors import DatabaseUnavailable, PoolExhausted
from stanch.events import ConnectionSevered, Observers, SessionStateSet, StillHeld
from stanch.ledger import Ledger, Stats, Waiter
from stanch.session_state import CLEANING, INFO_KEY
from stanch.sqlstate import Kind as FailureKind, classify
from stanch.tracking import Sweep, tracker_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from stanch.accounts import Account
    from stanch.callers import Place
    from stanch.drivers import Driver
    from stanch.ledger import Checkout
    from stanch.meters import Instruments, WaitEnd
    from stanch.session_state import State
    from stanch.settings import Settings
    from stanch.tracking import Kind
    from stanch.watch import Watch

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
        self.opened_at = 0.0
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

    _lent: Any = None

    def get_connection(self) -> DBAPIConnection:
        """The open connection, opened now if there is none. Called once the slot has been taken."""
        pool = self._stanch_pool
        if self.dbapi_connection is None:
            # The generation from before the connect: one that began before a failover is of the old server.
            self.generation = pool.generation
            began = self.opened_at = time.monotonic()
            connection = pool.within_connect_timeout(self, super().get_connection)
            pool.opened(self.ledger, time.monotonic() - began)
        else:
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


class Pool(SQLAlchemyPool):
    """At most ``pool_size + max_overflow`` connections on each event loop, given to waiters in the order they came.

    Guarantees: a wait ends within ``pool_timeout`` seconds and before the deadline in force, in a connection or in
    ``PoolExhausted``; until a first connection is ready only one caller opens one, and the others wait just so
    (theirs is ``DatabaseUnavailable``). A waiter that is cancelled gives its place back; a connection that is
    mid-operation or mid-transaction when it is returned is severed, never reused. ``dispose()`` closes what is idle
    and outdates what is out; the bound and the waiters stay, and ``recreate()`` gives this same pool. A second event
    loop gets books of its own, and the connections of a loop that was closed are dropped without awaiting.
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
            pre_ping=settings.pool_pre_ping,
            reset_on_return=replaced._reset_on_return is not ResetStyle.reset_none,
            dialect=replaced._dialect,
            _dispatch=replaced.dispatch,
        )
        self._settings = settings
        self._driver = driver
        self._watch = watch
        self._observers = observers
        self._instruments = instruments
        self._tracker = tracker_of(settings, observers, database)
        self._sweeps: dict[Ledger[Slot], Sweep] = {}
        self._database = database
        self._sized_by = sized_by
        self._ledgers: dict[asyncio.AbstractEventLoop, Ledger[Slot]] = {}
        self._latest: tuple[asyncio.AbstractEventLoop | None, Ledger[Slot] | None] = (None, None)
        # An RLock: the garbage collector returns connections on the thread that holds it.
        self._lock = threading.RLock()
        self._disposed = False
        self._pid = os.getpid()
        self._of_the_parent: list[Ledger[Slot]] = []
        self._told: set[tuple[str, Place]] = set()
        self.generation = 0
        self.admit: Callable[[], None] = _everybody
        """Asked before each checkout; raises what speaks against it."""

    # What SQLAlchemy calls ------------------------------------------------------------------------------

    def _do_get(self) -> ConnectionPoolEntry:
        self.admit()
        ledger = self._ledger_of_this_loop()
        task, account = current_task(), paying.get()
        with self._lock:
            slot = ledger.take(task, new=lambda: Slot(self, ledger))
        if slot is None:
            slot = self._wait_on(ledger, task, account)
        else:
            self._instruments.meter.waited(0.0, "served", account)
        checkout = ledger.checkout(slot)
        checkout.account = account
        try:
            self._tracker.taken(checkout)
            if slot.dbapi_connection is not None and not (self._fit(slot) and self._answers(slot)):
                self._drop(slot)
        except BaseException:  # cancelled while it was pinged
            self._do_return_conn(slot)
            raise
        return slot

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        assert isinstance(record, Slot)
        self._drop_unless_idle(record)
        now = record.idle_since = time.monotonic()
        if record.entry is not None:
            self._take_in(record, record.entry, now)
        with self._lock:
            kept = record.ledger.give_back(record, usable=record.dbapi_connection is not None)
        if not kept:
            record.close()

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
        if not in_greenlet():  # the garbage collector: nothing may be awaited, SQLAlchemy cuts the socket
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
        self._leave_to_the_parent()
        with self._lock:
            self._forget_closed_loops()  # nothing of theirs can be awaited here
            self.generation += 1
            idle = [(loop, slot) for loop, ledger in self._ledgers.items() for slot in ledger.clear_idle()]
        for loop, slot in idle:
            if loop is current_loop():
                slot.close()
            else:
                _where_it_lives(loop, self._drop, slot)
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
                for ledger in self._ledgers.values():
                    ledger.clear_idle()
        return self

    def status(self) -> str:
        """The counts in words, as SQLAlchemy's pools tell theirs."""
        stats = self.stats()
        return f"in_use {stats.in_use} idle {stats.idle} waiting {stats.waiting} of {stats.bound}"

    # What the rest of stanch calls ----------------------------------------------------------------------

    def stats(self) -> Stats:
        """The counts of this moment, over all event loops."""
        empty = Stats(
            pool_size=self._settings.pool_size,
            max_overflow=self._settings.max_overflow,
            in_use=0,
            idle=0,
            waiting=0,
        )
        with self._lock:
            return sum((ledger.stats() for ledger in self._living()), start=empty)

    def held(self) -> list[Checkout]:
        """All that is out now, over all event loops."""
        with self._lock:
            return [checkout for ledger in self._living() for _, checkout in ledger.held()]

    def held_by(self, task: asyncio.Task[object] | None) -> Checkout | None:
        """What *task* has held for longest on the running loop, or None."""
        ledger = self._ledger_of_this_loop()
        with self._lock:
            return ledger.held_by(task)

    def sever_held(self) -> None:
        """Cut off every connection that is out; its holder gets a disconnect error, and is told as ``StillHeld``."""
        now = time.monotonic()
        with self._lock:
            self._forget_closed_loops()
            held = [(loop, *entry) for loop, ledger in self._ledgers.items() for entry in ledger.held()]
        for loop, slot, checkout in held:
            _where_it_lives(loop, self._sever, slot)
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

    def open_beside(self) -> DBAPIConnection:
        """A new connection beside the pool, which may be full: not on the books, and the caller's to close."""
        return self._invoke_creator(None)  # type: ignore[arg-type]  # what it is for is nobody's entry

    def within_connect_timeout(self, slot: Slot, connect: Callable[[], DBAPIConnection]) -> DBAPIConnection:
        """*connect*, with what SQLAlchemy and listeners ask of a new connection: the driver bounds only its opening."""
        timeout = within(2 * self._settings.connect_timeout)
        alarm = asyncio.get_running_loop().call_later(timeout, self._sever, slot)
        due = time.monotonic() + timeout
        try:
            return connect()
        except Exception as error:
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
            alarm.cancel()

    def opened(self, ledger: Ledger[Slot], seconds: float) -> None:
        """A connection is ready for use after *seconds*: whoever waited for the first one may open another."""
        self._instruments.meter.opened(seconds)
        if ledger.is_opening:
            with self._lock:
                ledger.open_up(new=lambda: Slot(self, ledger))

    def _sever(self, slot: Slot) -> None:
        if slot.dbapi_connection is not None:
            self._driver.sever(slot.driver_connection)

    def reclaim(self, slot: Slot) -> None:
        """Take back a slot whose return failed before it reached the books; nothing is known of its connection."""
        if slot.ledger.holds(slot):
            if slot.dbapi_connection is not None:
                self._drop(slot)
            self._do_return_conn(slot)

    def hand_out(self, slot: Slot) -> None:
        """*slot* has its connection and goes to whoever is on the stack."""
        checkout = slot.entry = slot.ledger.checkout(slot)
        checkout.ready_after = time.monotonic() - checkout.since
        sweep = self._sweeps.get(slot.ledger)
        if sweep is not None:
            sweep.begin()
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

    # Books of the running loop --------------------------------------------------------------------------

    def _ledger_of_this_loop(self) -> Ledger[Slot]:
        loop = asyncio.get_running_loop()
        latest_loop, latest = self._latest
        if latest_loop is loop and latest is not None:
            return latest
        with self._lock:
            self._forget_closed_loops()
            ledger = self._ledgers.get(loop)
            if ledger is None:
                ledger = self._ledgers[loop] = Ledger(
                    pool_size=self._settings.pool_size,
                    max_overflow=self._settings.max_overflow,
                    clock=time.monotonic,
                    keeps_idle=self._settings.keeps_idle,
                )
                self._watch_over(ledger, loop)
            self._latest = (loop, ledger)
        return ledger

    def _watch_over(self, ledger: Ledger[Slot], loop: asyncio.AbstractEventLoop) -> None:
        """Have somebody look for what does not come back to *ledger*, if that is wanted."""
        if self._settings.leak_after is None:
            return

        def held() -> list[Checkout]:
            with self._lock:
                return [checkout for slot, checkout in ledger.held() if slot.entry is checkout]

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

        self._sweeps[ledger] = Sweep(
            loop,
            self._settings.leak_after,
            held=held,
            kind_of=kind_of,
            observers=self._observers,
            database=self._database,
        )

    def _leave_to_the_parent(self) -> None:
        """In a forked child: what is on the books is the parent's, and must be neither used, closed nor collected."""
        if os.getpid() == self._pid:
            return
        self._pid = os.getpid()
        # Another thread of the parent's may have held the lock; here it would never let go.
        self._lock = threading.RLock()
        self._of_the_parent += self._ledgers.values()
        self._ledgers, self._latest = {}, (None, None)
        self._sweeps = {}

    def _living(self) -> list[Ledger[Slot]]:
        self._leave_to_the_parent()
        return [ledger for loop, ledger in self._ledgers.items() if not loop.is_closed()]

    def _forget_closed_loops(self) -> None:
        self._leave_to_the_parent()
        for loop in [loop for loop in self._ledgers if loop.is_closed()]:
            ledger = self._ledgers.pop(loop)
            self._sweeps.pop(ledger, None)
            # Nobody can return what is out there: a return awaits, and that loop runs no more.
            for slot in (*ledger.clear_idle(), *(slot for slot, _ in ledger.held())):
                if slot.dbapi_connection is not None:
                    self._drop(slot)

    # Waiting --------------------------------------------------------------------------------------------

    def _wait_on(
        self, ledger: Ledger[Slot], task: asyncio.Task[object] | None, account: Account | None
    ) -> Slot:
        """As ``_wait``, and it is told how long that was."""
        began = time.monotonic()
        end: WaitEnd = "cancelled"
        try:
            slot = self._wait(ledger, task)
            end = "served"
        except (PoolExhausted, DatabaseUnavailable):
            end = "timeout"
            raise
        finally:
            waited = time.monotonic() - began
            if account is not None:
                account.waited += waited
            self._instruments.meter.waited(waited, end, account)
        return slot

    def _wait(self, ledger: Ledger[Slot], task: asyncio.Task[object] | None) -> Slot:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        waiter = Waiter[Slot](task, wake=lambda: _wake(loop, turn))
        with self._lock:
            ledger.enqueue(waiter)
        alarm = loop.call_later(within(self._settings.pool_timeout), _resolve, turn)
        try:
            await_only(turn)
        except BaseException:
            # Cancelled: a slot may have been handed over in the same moment, so it is passed on, not lost.
            self._give_up(ledger, waiter)
            raise
        finally:
            alarm.cancel()
        deadline = in_force()
        # A turn that comes at the deadline is passed on at once: a connect begun now would only hold up the next.
        if waiter.slot is None or (deadline is not None and deadline.has_passed):
            error = self._exhausted(ledger)
            self._give_up(ledger, waiter)
            # A connection that came free between the alarm and here was ours; it has gone to the next.
            raise error
        return waiter.slot

    def _give_up(self, ledger: Ledger[Slot], waiter: Waiter[Slot]) -> None:
        with self._lock:
            unwanted = ledger.give_up(waiter, usable=lambda slot: slot.dbapi_connection is not None)
        if unwanted is not None and unwanted.dbapi_connection is not None:
            self._drop(unwanted)

    def _exhausted(self, ledger: Ledger[Slot]) -> PoolExhausted | DatabaseUnavailable:
        from stanch.blame import lines_of, remedies_for  # noqa: PLC0415  # only when it has come to that

        now = time.monotonic()
        with self._lock:
            stats = ledger.stats()
            held = [checkout for _, checkout in ledger.held()]
        deadline = in_force()
        limit = str(deadline) if deadline and deadline.has_passed else f"{self._settings.pool_timeout:.2f} s"
        lines = lines_of(held, now)
        if ledger.is_opening:
            return DatabaseUnavailable(
                f"no connection could be opened within {limit}: the first is still on its way"
                f" (waiting {stats.waiting}){lines}",
                remedies=["See whether the server answers: pg_isready -h <host> -p <port>."],
            )
        return PoolExhausted(
            f"no connection came free within {limit}"
            f" (in_use {stats.in_use} of {stats.bound}, waiting {stats.waiting}){lines}",
            remedies=[
                *remedies_for(held, now, current_task()),
                f"Raise {self._sized_by}, if the server has room: all workers share max_connections.",
            ],
        )

    # Judging --------------------------------------------------------------------------------------------

    def _fit(self, slot: Slot) -> bool:
        """Whether an idle connection may be handed out: asked without a round trip."""
        recycle = self._settings.pool_recycle
        return (
            slot.generation == self.generation
            and not (0 <= recycle < time.monotonic() - slot.opened_at)
            and not self._driver.looks_dead(slot.driver_connection)
        )

    def _answers(self, slot: Slot) -> bool:
        """Whether a connection that nobody has used for ``ping_after`` seconds still does; the others are believed."""
        patience = self._settings.ping_after
        if self._settings.pool_pre_ping or not 0 < patience <= time.monotonic() - slot.idle_since:
            return True
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
        if slot.generation != self.generation or self._driver.looks_dead(driver_connection):
            self._drop(slot)
        elif not self._driver.is_idle(driver_connection):
            # The driver is asked, not SQLAlchemy: what is mid-operation here would answer the next holder.
            self._drop(slot)
            self._observers.tell(
                ConnectionSevered(database=self._database, reason="it was not idle when it was returned")
            )
        elif (states := slot.info.pop(INFO_KEY, None)) and not self._reset(slot, states):
            self._drop(slot)

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


def _everybody() -> None:
    """Nothing speaks against a checkout."""


def _where_it_lives(loop: asyncio.AbstractEventLoop, cut: Callable[[Slot], None], slot: Slot) -> None:
    """Cut a connection off on the thread of its loop: only there may the sockets of a running loop be touched."""
    if loop is current_loop() or not loop.is_running():
        cut(slot)
    else:
        loop.call_soon_threadsafe(cut, slot)


def _wake(loop: asyncio.AbstractEventLoop, turn: asyncio.Future[None]) -> None:
    if current_loop() is loop:
        _resolve(turn)
    else:  # the garbage collector on another thread, where a future of this loop must not be touched
        loop.call_soon_threadsafe(_resolve, turn)


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
