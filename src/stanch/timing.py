"""How long SQL runs, and for whom: the last thing that stands before the driver is asked.

A statement is written into the checkout it runs on, into the account of the unit that holds it, and told to the
meter. COMMIT and ROLLBACK count as time, but not as statements. What a stream fetches later does not pass here.
"""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Any, Final

from stanch.callers import place_of_caller
from stanch.events import RepeatedStatement, SlowStatement
from stanch.pool import adapted, checkout_of
from stanch.sqltext import shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, Dialect, ExecutionContext

    from stanch.accounts import Account
    from stanch.events import Observers
    from stanch.ledger import Checkout
    from stanch.meters import Instruments
    from stanch.settings import Settings

_COUNTED: Final = 200
"""How many different texts of one transaction are told apart."""

_TOLD: Final = 1000
"""How many repeated statements are told; generated code could have any number."""


class Sending:
    """The calls by which a dialect sends something to the server: as they are, until somebody keeps time."""

    __slots__ = ("commit", "execute", "execute_bare", "execute_many", "roll_back")

    def __init__(self, dialect: Dialect) -> None:
        self.execute: Callable[..., None] = dialect.do_execute
        self.execute_many: Callable[..., None] = dialect.do_executemany
        self.execute_bare: Callable[..., None] = dialect.do_execute_no_params
        self.commit: Callable[..., None] = dialect.do_commit
        self.roll_back: Callable[..., None] = dialect.do_rollback

    def keep_time(self, clock: Clock) -> None:
        """From now on *clock* runs while the server works."""
        self.execute = clock.timed(self.execute)
        self.execute_many = clock.timed(self.execute_many)
        self.execute_bare = clock.timed(self.execute_bare)
        self.commit = clock.timed_end(self.commit)
        self.roll_back = clock.timed_end(self.roll_back)


class Clock:
    """Keeps the time of one engine's statements, and tells of those that are slow or come suspiciously often."""

    __slots__ = ("_database", "_instruments", "_observers", "_repeated", "_slow", "_told")

    def __init__(
        self, settings: Settings, *, observers: Observers, instruments: Instruments, database: str
    ) -> None:
        self._instruments = instruments
        self._observers = observers
        self._database = database
        self._slow = settings.slow_statement or inf
        self._repeated = settings.repeated_statement or 0
        self._told: set[tuple[str, str]] = set()

    def timed(self, execute: Callable[..., None]) -> Callable[..., None]:
        """*execute*, one of the dialect's ways to execute a statement, timed."""
        instruments, ended, clock = self._instruments, self._ended, time.monotonic

        # Positional, as SQLAlchemy calls them: the context is the last in each.
        def timed(cursor: DBAPICursor, statement: str, *rest: Any) -> None:
            context: ExecutionContext = rest[-1]
            checkout = checkout_of(context.root_connection.connection)
            # The compiled text is one object for all its parameters, with one row and unexpanded lists.
            text = statement if (compiled := context.compiled) is None else compiled.string or statement
            instruments.meter.executing(checkout)
            started = clock()
            if checkout is not None:
                checkout.running_since, checkout.statement = started, text
            try:
                execute(cursor, statement, *rest)
            except BaseException as error:
                ended(text, started, checkout, error)
                raise
            ended(text, started, checkout, None)

        return timed

    def timed_end(self, end: Callable[..., None]) -> Callable[..., None]:
        """*end*, COMMIT or ROLLBACK, timed."""
        clock = time.monotonic

        def timed(connection: DBAPIConnection) -> None:
            checkout = checkout_of(connection)
            if checkout is None:
                end(connection)
                return
            started = checkout.running_since = clock()
            try:
                end(adapted(connection))
            finally:
                checkout.running_since = None
                seconds = clock() - started
                checkout.sql_time += seconds
                if checkout.account is not None:
                    checkout.account.sql_time += seconds

        return timed

    def _ended(
        self, text: str, started: float, checkout: Checkout | None, error: BaseException | None
    ) -> None:
        seconds = time.monotonic() - started
        if checkout is not None:
            checkout.running_since = None
            checkout.sql_time += seconds
            checkout.statements += 1
            if (account := checkout.account) is not None:
                account.statements += 1
                account.sql_time += seconds
                if self._repeated:
                    self._count(text, account)
        if seconds >= self._slow:
            self._tell_slow(text, seconds, checkout)
        self._instruments.meter.executed(text, seconds, checkout, place_of_caller, error)

    def _count(self, text: str, account: Account) -> None:
        counts = account.shapes
        if counts is None:
            counts = account.shapes = {}
        elif text not in counts and len(counts) >= _COUNTED:
            return
        count = counts[text] = counts.get(text, 0) + 1
        if count == self._repeated:
            account.repeated = True
            self._tell_repeated(text, count, account)

    def _tell_slow(self, text: str, seconds: float, checkout: Checkout | None) -> None:
        self._observers.tell(
            SlowStatement(
                database=self._database,
                shape=shape_of(text),
                seconds=seconds,
                place=str(place_of_caller()),
                holder="no unit" if checkout is None else checkout.holder,
            )
        )

    def _tell_repeated(self, text: str, count: int, account: Account) -> None:
        place, shape = str(place_of_caller()), shape_of(text)
        if (place, shape) in self._told or len(self._told) >= _TOLD:
            return
        self._told.add((place, shape))
        self._observers.tell(
            RepeatedStatement(
                database=self._database, shape=shape, times=count, place=place, holder=account.holder
            )
        )
