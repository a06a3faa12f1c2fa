"""Replaces, on one dialect instance, the calls by which SQLAlchemy ends transactions: bounded, whole, honest.

``Dialect.do_commit``, ``do_rollback`` and ``do_ping`` are public, and every way to commit passes here: the
ORM, Core, savepoints of the root, ``run_sync`` and a user's own ``await session.commit()``. Replacing them on
the instance costs no event: ``Engine._has_events`` stays False.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from stanch.callers import NOWHERE, place_of_caller
from stanch.completion import note_too_late
from stanch.deadlines import in_force, reason_of, to_tidy_up, within
from stanch.drivers.base import deadline_that_ended_a_statement, transaction_ended
from stanch.errors import (
    CommitLost,
    CommitRefused,
    CommitUnknown,
    DatabaseUnavailable,
    DeadlinePassed,
    WriteRefused,
)
from stanch.pool import adapted
from stanch.reading import reader_on, refusal_by_server
from stanch.redaction import redact
from stanch.sqlstate import QUERY_CANCELED, READ_ONLY_TRANSACTION, says_server_has_gone, sqlstate_of
from stanch.stopping import committing
from stanch.watch import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import (
        DBAPIConnection,
        ExceptionContext,
    )

    from stanch.drivers import Driver
    from stanch.settings import Settings
    from stanch.timing import Sending
    from stanch.unverified import Verifier
    from stanch.watch import Watch


class TransactionEnds:
    """The ends of an engine's transactions, within their timeouts, whatever is cancelled meanwhile.

    COMMIT is never cut short by a cancellation. If the connection was lost after it had been written, the *verifier*
    has the word: it is ``CommitUnknown``, or the truth. Each ends in a severed connection if the server stays silent.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        driver: Driver,
        watch: Watch,
        verifier: Verifier,
        sending: Sending,
    ) -> None:
        self._dialect = engine.dialect
        self._settings = settings
        self._driver = driver
        self._watch = watch
        self._verifier = verifier
        self._sending = sending
        self._roll_back = engine.dialect.do_rollback
        self._rollback_to = engine.dialect.do_rollback_to_savepoint
        self._ping = engine.dialect.do_ping

    def replace(self) -> None:
        """From now on the dialect ends transactions in this way; on this instance only."""
        dialect = self._dialect
        dialect.do_commit = self.do_commit  # type: ignore[method-assign,assignment]  # given by position
        dialect.do_rollback = self.do_rollback  # type: ignore[method-assign,assignment]  # likewise
        dialect.do_rollback_to_savepoint = self.do_rollback_to_savepoint  # type: ignore[method-assign]  # likewise
        dialect.do_ping = self.do_ping  # type: ignore[method-assign,assignment]  # likewise

    def do_commit(self, connection: DBAPIConnection) -> None:
        """COMMIT, and if it was lost the question what became of it, as one that nobody can cut short."""
        stored = False

        def commit() -> None:
            nonlocal stored
            self._commit_and_settle(connection)
            stored = True

        try:
            undisturbed(commit)
        except asyncio.CancelledError as cancelled:
            if stored:
                # SQLAlchemy will take the transaction for one that failed.
                note_too_late(cancelled)
            raise

    def _commit_and_settle(self, connection: DBAPIConnection) -> None:
        _refuse_overdue()
        stake = self._verifier.stake(connection)
        inner = self._dialect.get_driver_connection(adapted(connection))
        # Dead before COMMIT is written: the server must roll back, so the outcome is known.
        lost_before = self._driver.looks_dead(inner)
        timeout = within(self._settings.commit_timeout)
        try:
            with committing(inner):
                self._watch.run_undisturbed(
                    self._sending.commit, connection, connection=inner, timeout=timeout, what="COMMIT"
                )
            transaction_ended(inner)
        except CommitRefused:
            raise
        except Exception as error:
            if self._driver.looks_dead(inner) and not lost_before:
                self._verifier.settle(stake, error)
                return
            raise

    def do_rollback(self, connection: DBAPIConnection) -> None:
        """ROLLBACK; costs nothing where there is nothing to roll back."""
        self._verifier.rolled_back(connection)
        bare = adapted(connection)
        inner = self._dialect.get_driver_connection(bare)
        transaction_ended(inner)
        if self._driver.has_nothing_to_undo(inner):
            self._roll_back(bare)  # SQLAlchemy may think that a transaction is open
            return
        if self._driver.looks_dead(inner):
            return  # The server has ended its transaction, if there was one; the pool drops it when it is returned.
        self._undo(self._sending.roll_back, connection, inner=inner, what="ROLLBACK")

    def do_rollback_to_savepoint(self, connection: Connection, name: str) -> None:
        """ROLLBACK TO SAVEPOINT: whoever goes on after it must know that it has happened."""
        inner = connection.connection.driver_connection
        self._undo(self._rollback_to, connection, name, inner=inner, what="ROLLBACK TO SAVEPOINT")

    def _undo(self, undo: Callable[..., None], *arguments: Any, inner: Any, what: str) -> None:
        timeout = to_tidy_up(self._settings.close_timeout)
        try:
            self._watch.run(undo, *arguments, connection=inner, timeout=timeout, what=what)
        except Exception:
            # What cannot be rolled back must not go on. Severed it is a disconnect, which SQLAlchemy before 2.1
            # needs to see: of any other failure here it never returns the connection.
            self._driver.sever(inner)
            raise

    def do_ping(self, connection: DBAPIConnection) -> bool:
        """The ping, bounded as a connect is."""
        inner = self._dialect.get_driver_connection(connection)
        timeout = within(self._settings.connect_timeout)
        return self._watch.run(self._ping, connection, connection=inner, timeout=timeout, what="the ping")


def translate_errors(engine: Engine, *, redacted: bool, reads_only: bool = False) -> None:
    """Let every error of *engine* say what it means: what is a lost connection, and no values in any message.

    *reads_only*: its server connections were started for reading, so that a refused write is no demoted primary.
    """

    def handle_error(context: ExceptionContext) -> BaseException | None:
        original = context.original_exception
        if redacted:
            redact(context.sqlalchemy_exception or original)
        match original:
            case asyncio.CancelledError():
                return None  # also where a deadline has passed at the same moment: whoever cancelled waits for it
            case CommitUnknown() | CommitLost() | DeadlinePassed():
                # This one connection was lost or cut by us; the others need not pay for it.
                context.is_disconnect = True
                context.invalidate_pool_on_disconnect = False
            case _ if (passed := _cut_short(context) or _ended_by_the_server(context)) is not None:
                context.is_disconnect = passed.connection_invalidated
                context.invalidate_pool_on_disconnect = False
                return passed
            case TimeoutError():
                # The driver's own limit of a statement (asyncpg's command_timeout). The connection lives.
                return _too_long(original)
            case OSError() if context.execution_context is not None or context.statement is None:
                # Without a context the statement has not been sent yet: then it is a bind processor's own.
                context.is_disconnect = True
                return _gone(original)
            case _ if sqlstate_of(original) == READ_ONLY_TRANSACTION and (
                reads_only or _asked_for_read_only(context)
            ):
                return _refused_by_server(context)
            case _ if _has_left(context):
                context.is_disconnect = True
            case _:
                pass
        return None

    event.listen(engine, "handle_error", handle_error, retval=True)


def _refuse_overdue() -> None:
    """A COMMIT that nobody could wait for is not begun: the connection goes, and the server rolls back."""
    deadline = in_force()
    if deadline is not None and deadline.has_passed:
        raise deadline.passed(f"{deadline} had passed before COMMIT was begun; its work is rolled back")


def _cut_short(context: ExceptionContext) -> DeadlinePassed | None:
    """What to say instead, if the connection was severed because a deadline had passed."""
    connection = context.connection
    if connection is None or connection.invalidated or connection.closed:
        return None
    passed = reason_of(connection.connection.driver_connection)
    if passed is not None:
        passed.__cause__ = context.original_exception
    return passed


def _ended_by_the_server(context: ExceptionContext) -> DeadlinePassed | None:
    """What to say instead, if the server has kept the limit that rode on BEGIN. The connection lives."""
    connection = context.connection
    if sqlstate_of(context.original_exception) != QUERY_CANCELED or connection is None or connection.closed:
        return None
    deadline = deadline_that_ended_a_statement(connection.connection.driver_connection)
    if deadline is None:
        return None
    what, place = "COMMIT" if context.statement is None else "a statement", place_of_caller()
    where = "" if place is NOWHERE else f" at {place}"  # a flush at the end of a unit
    ended = deadline.passed(
        f"{what}{where} was ended by the server: {deadline} were all but over; its connection is kept"
    )
    ended.connection_invalidated = False
    ended.__cause__ = context.original_exception
    return ended


def _has_left(context: ExceptionContext) -> bool:
    """Whether the server that this pool was made for is no longer there, whatever the connection looks like."""
    state = sqlstate_of(context.original_exception)
    # A demoted primary answers pings for ever; only a new connection can reach the new primary. And asyncpg's
    # connection still looks open when the last words of a server arrive.
    return state == READ_ONLY_TRANSACTION or says_server_has_gone(state)


def _asked_for_read_only(context: ExceptionContext) -> bool:
    connection = context.connection
    return connection is not None and bool(connection.get_execution_options().get("postgresql_readonly"))


def _refused_by_server(context: ExceptionContext) -> WriteRefused:
    connection = context.connection
    reader = None if connection is None else reader_on(connection)
    refused = refusal_by_server(reader or "a READ ONLY transaction")
    refused.__cause__ = context.original_exception
    return refused


def _too_long(error: TimeoutError) -> DeadlinePassed:
    passed = DeadlinePassed(
        "a statement took longer than the driver's command_timeout",
        remedies=["See what the server is doing: select * from pg_stat_activity where state <> 'idle'."],
    )
    passed.__cause__ = error
    return passed


def _gone(error: OSError) -> DatabaseUnavailable:
    gone = DatabaseUnavailable(
        f"the connection to the database broke ({type(error).__name__})",
        remedies=["Nothing was committed by this statement. The work can be done again."],
    )
    gone.__cause__ = error
    return gone
