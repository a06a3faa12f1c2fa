"""Replaces, on one dialect instance, the calls by which SQLAlchemy ends transactions: bounded, whole, honest.

``Dialect.do_commit``, ``do_rollback`` and ``do_ping`` are public, and every way to commit passes here: the
ORM, Core, savepoints of the root, ``run_sync`` and a user's own ``await session.commit()``. Replacing them on
the instance costs no event: ``Engine._has_events`` stays False.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import event

from stanch.deadlines import in_force, reason_of, to_tidy_up, within
from stanch.errors import CommitRefused, CommitUnknown, DatabaseUnavailable, DeadlinePassed
from stanch.redaction import redact
from stanch.sqlstate import READ_ONLY_TRANSACTION, sqlstate_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext

    from stanch.drivers import Driver
    from stanch.settings import Settings
    from stanch.watch import Watch


def replace_transaction_ends(engine: Engine, settings: Settings, *, driver: Driver, watch: Watch) -> None:
    """Make COMMIT, ROLLBACK and ping of *engine* end within their timeouts, whatever is cancelled meanwhile.

    COMMIT raises ``CommitUnknown`` if the connection was lost after it had been written, and is never cut
    short by a cancellation. All three end in a severed connection if the server stays silent.
    """
    dialect = engine.dialect
    commit, rollback, ping = dialect.do_commit, dialect.do_rollback, dialect.do_ping

    def do_commit(connection: DBAPIConnection) -> None:
        inner = dialect.get_driver_connection(connection)
        _refuse_overdue()
        # Dead before COMMIT is written: the server must roll back, so the outcome is known.
        lost_before = driver.looks_dead(inner)
        try:
            timeout = within(settings.commit_timeout)
            watch.run(commit, connection, connection=inner, timeout=timeout, what="COMMIT")
        except CommitRefused:
            raise
        except Exception as error:
            if driver.looks_dead(inner) and not lost_before:
                raise _unknown() from error
            raise

    def do_rollback(connection: DBAPIConnection) -> None:
        inner = dialect.get_driver_connection(connection)
        try:
            timeout = to_tidy_up(settings.close_timeout)
            watch.run(rollback, connection, connection=inner, timeout=timeout, what="ROLLBACK")
        except Exception:
            # What cannot be rolled back must not go on. Severed it is a disconnect, which SQLAlchemy before 2.1
            # needs to see: of any other failure here it never returns the connection.
            driver.sever(inner)
            raise

    def do_ping(connection: DBAPIConnection) -> bool:
        inner = dialect.get_driver_connection(connection)
        timeout = within(settings.connect_timeout)
        return watch.run(ping, connection, connection=inner, timeout=timeout, what="the ping")

    dialect.do_commit = do_commit  # type: ignore[method-assign,assignment]  # the seam itself, on this instance only
    dialect.do_rollback = do_rollback  # type: ignore[method-assign,assignment]  # likewise; given by position
    dialect.do_ping = do_ping  # type: ignore[method-assign,assignment]  # likewise


def translate_errors(engine: Engine, *, redacted: bool) -> None:
    """Let every error of *engine* say what it means: what is a lost connection, and no values in any message."""

    def handle_error(context: ExceptionContext) -> BaseException | None:
        original = context.original_exception
        if redacted:
            redact(context.sqlalchemy_exception or original)
        match original:
            case CommitUnknown() | DeadlinePassed():
                # This one connection was lost or cut by us; the others need not pay for it.
                context.is_disconnect = True
                context.invalidate_pool_on_disconnect = False
            case _ if (passed := _cut_short(context)) is not None:
                context.is_disconnect = True
                context.invalidate_pool_on_disconnect = False
                return passed
            case TimeoutError():
                # The driver's own limit of a statement (asyncpg's command_timeout). The connection lives.
                return _too_long(original)
            case OSError() if context.execution_context is not None or context.statement is None:
                # Without a context the statement has not been sent yet: then it is a bind processor's own.
                context.is_disconnect = True
                return _gone(original)
            case _ if sqlstate_of(original) == READ_ONLY_TRANSACTION and not _asked_for_read_only(context):
                # A demoted primary answers pings for ever; only a new connection can reach the new primary.
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


def _asked_for_read_only(context: ExceptionContext) -> bool:
    connection = context.connection
    return connection is not None and bool(connection.get_execution_options().get("postgresql_readonly"))


def _unknown() -> CommitUnknown:
    return CommitUnknown(
        "the connection was lost while COMMIT was on its way: the work may or may not be stored",
        remedies=[
            "Do not repeat the work blindly: look first whether it is there.",
            "Give the work a key of the client's choosing, unique in its table; then repeating it is harmless.",
        ],
    )


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
