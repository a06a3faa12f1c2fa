"""Looks at each statement of an engine before it is sent: readers may not write, what else matters is noted."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Never
from weakref import WeakKeyDictionary

from sqlalchemy.sql.elements import TextClause

from stanch.callers import place_of_caller
from stanch.errors import SessionStateRefused
from stanch.reading import Readers
from stanch.session_state import INFO_KEY, State, session_state_of
from stanch.sqltext import REMEMBERED, objection_to_reading, suspicion, suspicion_by_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPICursor, ExecutionContext

    from stanch.settings import Settings
    from stanch.sqltext import Suspicion
    from stanch.timing import Sending


def judge_statements(engine: Engine, settings: Settings, sending: Sending) -> None:
    """Look at each statement of *engine* before it is sent: a reader may not write, what else matters is noted.

    That is session state, and what may have written although no session knows.

    ``Dialect.do_execute`` and its two variants are public, and whatever the ORM, Core or a driver-level statement
    sends passes here, lazy loads included. What is judged once costs a look-up by the text of the statement.
    """
    dialect = engine.dialect
    refuse_writes = Readers(dialect).refuse_writes
    is_server = dialect.name == "postgresql"
    state_of = session_state_of if is_server else _stateless
    suspicion_of = suspicion if is_server else suspicion_by_words  # a function of SQLite's cannot write
    is_harmless = _unobjectionable(objection_to_reading, state_of, suspicion_of)
    found = _note_state if settings.pooler is None else _refuse_state

    def look(statement: str, rows: Sequence[Any], context: ExecutionContext) -> None:
        # The compiled text is the same object each time, so its hash is known, and IN lists are not expanded in it;
        # what was executed as a string has none.
        text = statement if (compiled := context.compiled) is None else compiled.string
        if is_harmless(text):
            return  # as most of what is sent, and whoever sends it
        refuse_writes(statement, context)
        if state_of(text):
            for state in state_of(statement):
                if not (state.local_if and all(_is_true(state.local_if, row) for row in rows)):
                    found(state, context)
        if (suspected := suspicion_of(text)) is not None:
            _note_write(suspected, context)

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


def _unobjectionable(*judgements: Callable[[str], object]) -> Callable[[str], bool]:
    """Whether a text only reads and leaves nothing behind: none of *judgements* finds anything in it. Remembered."""

    @lru_cache(maxsize=REMEMBERED)
    def is_harmless(text: str) -> bool:
        return not any(found(text) for found in judgements)

    return is_harmless


def doubts_on(connection: Connection) -> Sequence[str]:
    """What was executed on *connection*, and of which only the server knows whether it wrote."""
    return tuple(_doubts.get(connection, ()))


def tell_writes_past_the_session(connection: Connection, note: Callable[[str], None]) -> None:
    """From now on *note* is told of each statement on *connection* that is meant to write, by its first keyword."""
    # On the connection itself, with which it goes: a table of ours would keep both alive.
    vars(connection)[_TOLD_OF_WRITES] = note


_TOLD_OF_WRITES: Final = "_stanch_told_of_writes"

_doubts: Final[WeakKeyDictionary[Connection, dict[str, None]]] = WeakKeyDictionary()
"""SQLAlchemy's connection lasts as long as a session's transaction, the pooled one underneath goes on."""


def _note_write(suspected: Suspicion, context: ExecutionContext) -> None:
    connection = context.root_connection
    if not suspected.certain:
        _doubts.setdefault(connection, {})[_name_of(suspected, context)] = None
    elif (note := vars(connection).get(_TOLD_OF_WRITES)) is not None:
        note(suspected.what)


def _name_of(suspected: Suspicion, context: ExecutionContext) -> str:
    statement = None if context.compiled is None else context.compiled.statement
    by_words = not suspected.what.endswith(")")
    return f"text({suspected.what})" if by_words and isinstance(statement, TextClause) else suspected.what


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
