"""Replaces, on one dialect instance, the calls by which SQLAlchemy ends transactions: bounded, whole, honest.

``Dialect.do_commit``, ``do_rollback`` and ``do_ping`` are public, and every way to commit passes here: the
ORM, Core, savepoints of the root, ``run_sync`` and a user's own ``await session.commit()``. Replacing them on
the instance costs no event: ``Engine._has_events`` stays False.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Never

from sqlalchemy import event

from stanch.callers import place_of_caller
from stanch.errors import (
    CommitLost,
    CommitRefused,
    CommitUnknown,
    DatabaseUnavailable,
    DeadlinePassed,
    SessionStateRefused,
)
from stanch.reading import Readers
from stanch.redaction import redact
from stanch.session_state import INFO_KEY, State, session_state_of
from stanch.sqlstate import READ_ONLY_TRANSACTION, says_server_has_gone, sqlstate_of
from stanch.watch import undisturbed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import (
        DBAPIConnection,
        DBAPICursor,
        ExceptionContext,
        ExecutionContext,
    )

    from stanch.drivers import Driver
    from stanch.settings import Settings
    from stanch.verdict import Verifier
    from stanch.watch import Watch


def replace_transaction_ends(
    engine: Engine, settings: Settings, *, driver: Driver, watch: Watch, verifier: Verifier
) -> None:
    """Make COMMIT, ROLLBACK and ping of *engine* end within their timeouts, whatever is cancelled meanwhile.

    COMMIT is never cut short by a cancellation. If the connection was lost after it had been written, the
    *verifier* has the word: it is ``CommitUnknown``, or the truth. All three end in a severed connection if
    the server stays silent.
    """
    dialect = engine.dialect
    commit, rollback, ping = dialect.do_commit, dialect.do_rollback, dialect.do_ping
    rollback_to = dialect.do_rollback_to_savepoint

    def do_commit(connection: DBAPIConnection) -> None:
        undisturbed(commit_and_settle, connection)

    def commit_and_settle(connection: DBAPIConnection) -> None:
        stake = verifier.stake(connection)
        inner = dialect.get_driver_connection(connection)
        # Dead before COMMIT is written: the server must roll back, so the outcome is known.
        lost_before = driver.looks_dead(inner)
        try:
            watch.run(commit, connection, connection=inner, timeout=settings.commit_timeout, what="COMMIT")
        except CommitRefused:
            raise
        except Exception as error:
            if driver.looks_dead(inner) and not lost_before:
                verifier.settle(stake, error)
                return
            raise

    def do_rollback(connection: DBAPIConnection) -> None:
        verifier.rolled_back(connection)
        inner = dialect.get_driver_connection(connection)
        if driver.looks_dead(inner):
            return  # The server has ended its transaction, if there was one; the pool drops it when it is returned.
        if driver.is_idle(inner):
            # Nothing to roll back, nothing to wait for: a reader pays for no watch.
            rollback(connection)  # type: ignore[arg-type]  # given by position
            return
        try:
            watch.run(rollback, connection, connection=inner, timeout=settings.close_timeout, what="ROLLBACK")
        except Exception:
            # What cannot be rolled back must not go on. Severed it is a disconnect, which SQLAlchemy before 2.1
            # needs to see: of any other failure here it never returns the connection.
            driver.sever(inner)
            raise

    def do_ping(connection: DBAPIConnection) -> bool:
        inner = dialect.get_driver_connection(connection)
        return watch.run(
            ping, connection, connection=inner, timeout=settings.connect_timeout, what="the ping"
        )

    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        # Whoever goes on after it must know that it has happened.
        inner = connection.connection.driver_connection
        try:
            watch.run(
                rollback_to,
                connection,
                name,
                connection=inner,
                timeout=settings.close_timeout,
                what="ROLLBACK TO SAVEPOINT",
            )
        except Exception:
            driver.sever(inner)
            raise

    dialect.do_commit = do_commit  # type: ignore[method-assign,assignment]  # the seam itself, on this instance only
    dialect.do_rollback = do_rollback  # type: ignore[method-assign,assignment]  # likewise; given by position
    dialect.do_rollback_to_savepoint = do_rollback_to_savepoint  # type: ignore[method-assign]  # likewise
    dialect.do_ping = do_ping  # type: ignore[method-assign,assignment]  # likewise


def judge_statements(engine: Engine, settings: Settings) -> None:
    """Look at each statement of *engine* before it is sent: a reader may not write, session state is noted.

    ``Dialect.do_execute`` and its two variants are public, and whatever the ORM, Core or a driver-level statement
    sends passes here, lazy loads included. Each judgement costs a look-up by the text of the statement.
    """
    dialect = engine.dialect
    execute, execute_many = dialect.do_execute, dialect.do_executemany
    execute_bare = dialect.do_execute_no_params
    refuse_writes = Readers(dialect).refuse_writes
    state_of = session_state_of if dialect.name == "postgresql" else _stateless
    found = _note_state if settings.pooler is None else _refuse_state

    def look(statement: str, rows: Sequence[Any], context: ExecutionContext) -> None:
        for state in state_of(statement):
            if not (state.local_if and all(_is_true(state.local_if, row) for row in rows)):
                found(state, context)

    # In all three: the compiled text is the same object each time, so its hash is known, and IN lists are not
    # expanded in it; what was executed as a string has none.

    def do_execute(cursor: DBAPICursor, statement: str, parameters: Any, context: ExecutionContext) -> None:
        refuse_writes(statement, context)
        if state_of(statement if (compiled := context.compiled) is None else compiled.string):
            look(statement, [parameters], context)
        execute(cursor, statement, parameters, context)

    def do_executemany(
        cursor: DBAPICursor, statement: str, parameters: Any, context: ExecutionContext
    ) -> None:
        refuse_writes(statement, context)
        if state_of(statement if (compiled := context.compiled) is None else compiled.string):
            look(statement, parameters, context)
        execute_many(cursor, statement, parameters, context)

    def do_execute_no_params(cursor: DBAPICursor, statement: str, context: ExecutionContext) -> None:
        refuse_writes(statement, context)
        if state_of(statement if (compiled := context.compiled) is None else compiled.string):
            look(statement, [], context)
        execute_bare(cursor, statement, context)

    dialect.do_execute = do_execute  # type: ignore[method-assign,assignment]  # the seam itself, on this instance only
    dialect.do_executemany = do_executemany  # type: ignore[method-assign,assignment]  # likewise
    dialect.do_execute_no_params = do_execute_no_params  # type: ignore[method-assign,assignment]  # likewise


def _stateless(_sql: str) -> tuple[State, ...]:
    """What a statement leaves in a session where there is none: SQLite."""
    return ()


def _note_state(state: State, context: ExecutionContext) -> None:
    """Write *state* into the connection's record, where the pool looks at its return."""
    noted = context.root_connection.info.setdefault(INFO_KEY, {})
    if state not in noted:
        noted[state] = place_of_caller()


def _refuse_state(state: State, _context: ExecutionContext) -> Never:
    raise SessionStateRefused(
        f"{state.what} outlives its transaction, and PgBouncer would hand it to whoever comes next; nothing was sent",
        remedies=[
            "Let it end with the transaction: SET LOCAL, set_config(…, …, true), pg_advisory_xact_lock().",
            "For a temporary table: CREATE TEMP TABLE … ON COMMIT DROP.",
            "What must live longer (LISTEN, PREPARE, LOAD) needs a connection past PgBouncer.",
        ],
    )


def _is_true(placeholder: str, parameters: Any) -> bool:
    try:
        key = int(placeholder[1:]) - 1 if placeholder[0] == "$" else placeholder[2:-2]
        return parameters[key] is True
    except (LookupError, TypeError, ValueError):
        return False


def translate_errors(engine: Engine, *, redacted: bool) -> None:
    """Let every error of *engine* say what it means: what is a lost connection, and no values in any message."""

    def handle_error(context: ExceptionContext) -> BaseException | None:
        original = context.original_exception
        if redacted:
            redact(context.sqlalchemy_exception or original)
        match original:
            case CommitUnknown() | CommitLost() | DeadlinePassed():
                # This one connection was lost or cut by us; the others need not pay for it.
                context.is_disconnect = True
                context.invalidate_pool_on_disconnect = False
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
            case _ if says_server_has_gone(sqlstate_of(original)):
                # asyncpg's connection still looks open when the server's last words arrive.
                context.is_disconnect = True
            case _:
                pass
        return None

    event.listen(engine, "handle_error", handle_error, retval=True)


def _asked_for_read_only(context: ExceptionContext) -> bool:
    connection = context.connection
    return connection is not None and bool(connection.get_execution_options().get("postgresql_readonly"))


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
