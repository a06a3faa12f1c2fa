"""Keeps a reader to reading: whatever it executes is judged by the text that SQLAlchemy would send.

A reader runs without BEGIN, so a write that slipped through would be durable at once. ``objection_to`` looks at
the kind of a statement, before a connection is taken. ``Readers`` judges what is about to be sent: lazy loads, CTEs at
any depth, hints and fragments of text have all come to words there. The judgement is kept with the text, so a
statement in a loop costs a look-up.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import WeakKeyDictionary

from sqlalchemy.orm import FromStatement
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import Select, TextualSelect

from stanch.errors import WriteRefused
from stanch.sqltext import objection_to_reading

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect
    from sqlalchemy.engine.interfaces import ExecutionContext
    from sqlalchemy.sql.compiler import Compiled

_PLAIN_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_READER: Final = "_stanch_reader"


def mark_reader(connection: Connection, holder: str) -> None:
    """From now on *connection* executes only what reads; *holder* says who must not do more."""
    # On the connection itself, with which it goes. An execution option is merged into those of each statement.
    vars(connection)[_READER] = holder


def reader_on(connection: Connection) -> str | None:
    """Who reads on *connection*, where it was marked as a reader's."""
    holder: str | None = vars(connection).get(_READER)
    return holder


def refusal(what: str, holder: str) -> WriteRefused:
    """The error for *holder*, a reader that was asked to execute *what*."""
    return WriteRefused(
        f"{holder} may only read, and was asked to execute {what}; nothing was sent",
        remedies=[
            "To write, ask for a writer: SessionDep instead of ReaderDep, or async with db.transaction().",
            'For several reads of one snapshot: db.transaction(read_only=True, isolation_level="REPEATABLE READ").',
            'If it is only a column called like a keyword, quote its name in text(): "update".',
        ],
    )


def refusal_by_server(holder: str) -> WriteRefused:
    """The error for *holder*, a reader, one statement of which the server has refused, for it would have written."""
    return WriteRefused(
        f"{holder} may only read, and the server refused a statement that would have written; nothing was stored",
        remedies=[
            "What writes there, perhaps a function or a trigger, belongs into a writer: SessionDep, db.transaction().",
        ],
    )


def objection_to(statement: Any) -> str | None:
    """What speaks against *statement* in a reader by its kind alone; None if it may go on to be compiled.

    Takes whatever ``Session.execute()`` takes. What is inside a ``select()`` is judged when it is compiled; see
    ``Readers``.

    >>> from sqlalchemy import select, text, update, literal_column
    >>> objection_to(select(literal_column("1"))), objection_to(text("DELETE FROM orders"))
    (None, 'DELETE')
    """
    if type(statement) is Select:
        return None  # what most readers execute, told at one look
    match statement:
        case TextClause():
            return objection_to_reading(statement.text)
        case FromStatement() | TextualSelect():
            return objection_to(statement.element)
        case _ if not getattr(statement, "is_dml", False) and _may_read(statement):
            return None
        case _:
            # A class of SQLAlchemy's or of a user's own: Insert, CreateTable, Sequence.
            return type(statement).__name__


def objection_when_compiled(statement: Any, dialect: Dialect) -> str | None:
    """What ``Readers`` would find in *statement*, for an engine that is not ours and where they do not look.

    Compiles it each time, which costs some 100 µs. What cannot be compiled by itself is refused.
    """
    if (objection := objection_to(statement)) is not None:
        return objection
    try:
        compiled = _as_executed(statement).compile(dialect=_quoting_everything(dialect))
    except Exception:  # noqa: BLE001  # whatever it is, it is not known to read
        return type(statement).__name__
    return objection_to_reading(str(compiled))


def _as_executed(statement: Any) -> Any:
    if isinstance(statement, FunctionElement):
        return cast("Any", statement).select()  # what executing a function means to SQLAlchemy
    return statement


def _may_read(statement: Any) -> bool:
    return isinstance(statement, FunctionElement) or any(
        getattr(statement, trait, False) for trait in ("is_select", "is_text")
    )


class Readers:
    """Judges what the readers of one engine are about to send; what was judged once is remembered."""

    __slots__ = ("_quoting", "_remembered")

    def __init__(self, dialect: Dialect) -> None:
        self._quoting = _quoting_everything(dialect)
        self._remembered: WeakKeyDictionary[Compiled, str | None] = WeakKeyDictionary()

    def refuse_writes(self, sql: str, context: ExecutionContext) -> None:
        """Raise ``WriteRefused`` if a reader is about to send *sql* and it does not certainly only read."""
        reader = reader_on(context.root_connection)
        if reader is not None and (objection := self._objection_to(sql, context)) is not None:
            raise refusal(objection, reader)

    def _objection_to(self, sql: str, context: ExecutionContext) -> str | None:
        if (compiled := context.compiled) is None:
            return objection_to_reading(sql)
        # Not the text with its IN lists expanded, which is another one for each length.
        objection = objection_to_reading(compiled.string)
        if objection is None:
            return None
        # SQLAlchemy leaves a column that is called "update" unquoted, because PostgreSQL allows it.
        if compiled not in self._remembered:
            self._remembered[compiled] = self._objection_when_quoted(compiled, objection)
        return self._remembered[compiled]

    def _objection_when_quoted(self, compiled: Compiled, objection: str) -> str | None:
        if compiled.statement is None:
            return objection
        try:
            quoted = str(compiled.statement.compile(dialect=self._quoting))
        except Exception:  # noqa: BLE001  # a statement that cannot be compiled again stays refused
            return objection
        return objection_to_reading(quoted)


def _quoting_everything(dialect: Dialect) -> Dialect:
    """*dialect*, but with quotes around each identifier, so that what stands outside of quotes is no name."""

    class Quoting(dialect.preparer):  # type: ignore[name-defined,misc]  # the class of this dialect's own
        def quote(self, ident: str, force: object = None) -> str:  # noqa: ARG002  # SQLAlchemy's signature
            # A plain word only: quoted_name(..., quote=False) can smuggle anything else in as a name.
            quoted = self.quote_identifier if _PLAIN_WORD.fullmatch(ident) else super().quote
            return str(quoted(ident))

    quoting = copy.copy(dialect)
    quoting.identifier_preparer = Quoting(quoting)
    return quoting
