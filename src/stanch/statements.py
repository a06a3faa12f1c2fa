"""Looks at each statement of an engine before it is sent: readers may not write, what else matters is noted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Never
from weakref import WeakKeyDictionary

from stanch.callers import place_of_caller
from stanch.errors import SessionStateRefused
from stanch.reading import Readers
from stanch.session_state import INFO_KEY, State, session_state_of
from stanch.sqltext import function_of_doubt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPICursor, ExecutionContext

    from stanch.settings import Settings
    from stanch.timing import Sending


def judge_statements(engine: Engine, settings: Settings, sending: Sending) -> None:
    """Look at each statement of *engine* before it is sent: a reader may not write, what else matters is noted.

    That is session state, and functions that may write.

    ``Dialect.do_execute`` and its two variants are public, and whatever the ORM, Core or a driver-level statement
    sends passes here, lazy loads included. Each judgement costs a look-up by the text of the statement.
    """
    dialect = engine.dialect
    refuse_writes = Readers(dialect).refuse_writes
    is_server = dialect.name == "postgresql"
    state_of = session_state_of if is_server else _stateless
    doubt_of = function_of_doubt if is_server else _beyond_doubt
    found = _note_state if settings.pooler is None else _refuse_state

    def look(statement: str, rows: Sequence[Any], context: ExecutionContext) -> None:
        refuse_writes(statement, context)
        # The compiled text is the same object each time, so its hash is known, and IN lists are not expanded in it;
        # what was executed as a string has none.
        text = statement if (compiled := context.compiled) is None else compiled.string
        if state_of(text):
            for state in state_of(statement):
                if not (state.local_if and all(_is_true(state.local_if, row) for row in rows)):
                    found(state, context)
        if (called := doubt_of(text)) is not None:
            _called.setdefault(context.root_connection, called)

    def do_execute(cursor: DBAPICursor, statement: str, parameters: Any, context: ExecutionContext) -> None:
        look(statement, [parameters], context)
        sending.execute(cursor, statement, parameters, context)

    def do_executemany(
        cursor: DBAPICursor, statement: str, parameters: Any, context: ExecutionContext
    ) -> None:
        look(statement, parameters, context)
        sending.execute_many(cursor, statement, parameters, context)

    def do_execute_no_params(cursor: DBAPICursor, statement: str, context: ExecutionContext) -> None:
        look(statement, [], context)
        sending.execute_bare(cursor, statement, context)

    dialect.do_execute = do_execute  # type: ignore[method-assign,assignment]  # the seam itself, on this instance only
    dialect.do_executemany = do_executemany  # type: ignore[method-assign,assignment]  # likewise
    dialect.do_execute_no_params = do_execute_no_params  # type: ignore[method-assign,assignment]  # likewise


def function_called_on(connection: Connection) -> str | None:
    """The first function called on *connection* of which only the server knows whether it writes."""
    return _called.get(connection)


_called: Final[WeakKeyDictionary[Connection, str]] = WeakKeyDictionary()
"""SQLAlchemy's connection lasts as long as a session's transaction, the pooled one underneath goes on."""


def _beyond_doubt(_sql: str) -> str | None:
    """SQLite's functions cannot write."""
    return None


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
