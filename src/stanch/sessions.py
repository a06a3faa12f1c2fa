"""What stanch adds to a session: it refuses after its end, refuses two tasks at once, and knows what it wrote.

The behaviour sits in a mixin for SQLAlchemy's *sync* ``Session`` class, which every ``AsyncSession`` drives:
so ``session.begin()``, ``sessionmaker.begin()``, ``run_sync``, lazy loads and a user's own session class all
have it. Private names of SQLAlchemy used here, each a funnel that no public method can pass by:
``Session._autobegin_t`` (any use begins here), ``_execute_internal`` (every statement), ``_flush`` and
``_bulk_save_mappings`` (every ORM write), ``_connection_for_bind`` (the connection is taken here),
``SessionTransaction._connections`` (what is held) and its ``_connection_for_bind``;
``tests/test_contract.py`` holds them.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import re
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Never, cast

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from stanch.callers import current_task, whereabouts
from stanch.completion import is_ours
from stanch.deadlines import impose, lift
from stanch.errors import ConnectionCommitRefused, NotInstalled, SessionClosed, SessionOverlap
from stanch.retry import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextvars import Token

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncSession

    from stanch.deadlines import Deadline

_WRITING_WORDS: Final = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
"""First keywords of text() that certainly write; what else may write is not guessed here."""


_NO_OPTIONS: Final[Mapping[str, Any]] = {}
_COMMENTS: Final = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)


class Guard:
    """The facts about one session that SQLAlchemy does not keep: whose it is, who is inside, what it wrote."""

    __slots__ = (
        "_depth",
        "_imposed",
        "_left",
        "_on_end",
        "attempt",
        "barred",
        "connection_options",
        "database",
        "deadline",
        "dropped",
        "ended_at",
        "holder",
        "inside",
        "rollback_only",
        "streams",
        "wrote",
    )

    def __init__(
        self,
        holder: str,
        *,
        database: str = "?",
        on_end: Callable[[Guard, tuple[str, ...]], None] | None = None,
    ) -> None:
        self.holder = holder
        self.database = database
        self._on_end = on_end
        self.connection_options: Mapping[str, Any] = {}
        self.deadline: Deadline | None = None
        """When the unit of work must be over; in force while a task is inside. Set by ``Ending.keep_to()``."""
        self._imposed: Token[Deadline | None] | None = None
        self.attempt = Attempt()
        """Which of several attempts at the same work this is."""
        self.ended_at: datetime | None = None
        self.rollback_only = False
        self.wrote: list[str] = []
        self.dropped: tuple[str, ...] = ()
        """What a close() has dropped uncommitted."""
        self.streams: list[Any] = []
        """Results that are still fetching on the session's connection."""
        self.barred = False
        """Whether nobody may come in until everyone has left: set when waiting for that took too long."""
        self.inside: asyncio.Task[object] | None = None
        self._depth = 0
        self._left: asyncio.Event | None = None

    def enter(self) -> None:
        """The running task comes in; it may come in again. Another task is refused.

        It waits instead while the unit is being settled, of which it cannot know: the start of a stream and the
        first statement of the stream's own task may come at the same moment.
        """
        task = current_task()
        while self._depth and self.inside is not task and is_ours(self.inside) and in_greenlet():
            await_only(self.left())
        if (self._depth or self.barred) and self.inside is not task:
            raise SessionOverlap(
                f"two tasks are inside the session of {self.holder} at once: {whereabouts(self.inside)},"
                f" and {whereabouts(task)}",
                remedies=["Give each task a session of its own: async with db.session() as session."],
            )
        self.inside = task
        self._depth += 1
        if self._depth == 1 and self.deadline is not None:
            self._imposed = impose(self.deadline)

    def leave(self) -> None:
        """The running task goes out again, as often as it came in."""
        self._depth -= 1
        if not self._depth:
            self.inside = None
            if self._imposed is not None:
                imposed, self._imposed = self._imposed, None
                lift(imposed)
            if self._left is not None:
                self._left.set()
                self._left = None

    async def left(self) -> None:
        """Wait until nobody is inside."""
        while self._depth:
            if self._left is None:
                self._left = asyncio.Event()  # one for all who wait
            await self._left.wait()
        self.barred = False

    @contextmanager
    def visit(self) -> Generator[None]:
        """The running task is inside meanwhile."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def end(self, *, dropped: tuple[str, ...]) -> None:
        """The session was closed for good, dropping these uncommitted writes; the owner is told once."""
        if self.ended_at is None:
            self.ended_at = datetime.now(UTC)
            self.dropped = dropped
            if self._on_end is not None:
                self._on_end(self, dropped)

    def refuse_overdue(self) -> None:
        """Raise ``DeadlinePassed`` once there is a deadline and it has passed."""
        if self.deadline is not None and self.deadline.has_passed:
            raise self.deadline.passed(
                f"{self.holder}: {self.deadline} have passed; its session does nothing more"
            )

    def note_write(self, what: str) -> None:
        """Remember that *what* was written and is not committed yet."""
        if what not in self.wrote:
            self.wrote.append(what)


class GuardedSession(Session):
    """The mixin. ``guard`` is set by whoever makes the session; see ``guarded``."""

    guard: Guard

    def __init__(self, *arguments: Any, guard: Guard | None = None, **keywords: Any) -> None:
        # Before a user's own __init__, which may already begin().
        self.guard = guard or Guard("a session of your own making")
        super().__init__(*arguments, **keywords)

    def unsaved(self) -> tuple[str, ...]:
        """Names of what was written, or waits to be written, and is not committed."""
        pending = {type(instance).__name__ for instance in (*self.new, *self.deleted)}
        changed = {type(instance).__name__ for instance in self.dirty if self.is_modified(instance)}
        return (*self.guard.wrote, *sorted((pending | changed) - set(self.guard.wrote)))

    def has_pending(self) -> bool:
        """Whether a flush would have something to write."""
        return bool(self.new or self.deleted or self.dirty)

    # Every use begins in one of these ---------------------------------------------------------------------

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        if self.guard.ended_at is not None:
            self._refuse_after_end()
        return super()._autobegin_t(begin)

    def _execute_internal(self, statement: Any, *arguments: Any, **keywords: Any) -> Any:
        guard = self.guard
        guard.enter()
        try:
            if getattr(statement, "is_dml", False):
                guard.note_write(_table_of(statement))
            elif (
                isinstance(statement, TextClause) and (word := _first_word(statement.text)) in _WRITING_WORDS
            ):
                guard.note_write(f"text({word})")
            result = super()._execute_internal(statement, *arguments, **keywords)
            if keywords.get("execution_options", _NO_OPTIONS).get("stream_results"):
                guard.streams.append(result)
            return result
        finally:
            guard.leave()

    def close_streams(self) -> None:
        """End what still fetches: the connection is about to be somebody else's."""
        streams, self.guard.streams = self.guard.streams, []
        for stream in streams:
            with suppress(Exception):  # a broken connection: then there is nothing left to read
                stream.close()

    def _flush(self, objects: Sequence[object] | None = None) -> None:
        with self._inside():
            self._connect_with_options()
            for name in self._flushed_names():
                self.guard.note_write(name)
            super()._flush(objects)

    def _bulk_save_mappings(self, mapper: Any, *arguments: Any, **keywords: Any) -> None:
        with self._inside():
            self._connect_with_options()
            self.guard.note_write(getattr(mapper, "class_", mapper).__name__)
            super()._bulk_save_mappings(mapper, *arguments, **keywords)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's; after the end it refuses, where SQLAlchemy's clean session stays silent."""
        if self.guard.ended_at is not None:
            self._refuse_after_end()
        # Before SQLAlchemy marks the session as flushing: _flush() would be too late to wait.
        with self._inside():
            super().flush(objects)

    def refresh(self, instance: object, *arguments: Any, **keywords: Any) -> None:
        """As SQLAlchemy's; after the end it says so, where SQLAlchemy blames the object."""
        if self.guard.ended_at is not None:
            self._refuse_after_end()
        super().refresh(instance, *arguments, **keywords)

    def commit(self) -> None:
        """As SQLAlchemy's, for one task at a time."""
        with self._inside():
            super().commit()

    def rollback(self) -> None:
        """As SQLAlchemy's, for one task at a time."""
        with self._inside():
            super().rollback()

    def close(self) -> None:
        """Close for good: any later use raises ``SessionClosed``."""
        with self._inside():
            dropped = self.unsaved()
            try:
                super().close()
            finally:
                self.guard.end(dropped=dropped)

    def invalidate(self) -> None:
        """Close for good, and close the connection too instead of returning it."""
        with self._inside():
            try:
                super().invalidate()
            finally:
                self.guard.end(dropped=())

    # The connection ---------------------------------------------------------------------------------------

    def connection(self, *arguments: Any, **keywords: Any) -> Connection:
        """The session's connection. It refuses ``commit()`` and ``rollback()``: the session ends its transaction."""
        connection = super().connection(*arguments, **keywords)
        if self._is_the_users(connection):
            return connection
        connection.commit = connection.rollback = self._refuse_behind_the_back  # type: ignore[method-assign]  # on this one
        return connection

    def _connection_for_bind(
        self, engine: Any, execution_options: Mapping[str, Any] | None = None, **keywords: Any
    ) -> Connection:
        with self._inside():
            options = {**self.guard.connection_options, **(execution_options or {})}
            if options and self.in_transaction_on_server():
                options = dict(execution_options or {})
            elif options and self.in_nested_transaction() and (root := self.get_transaction()) is not None:
                # SQLAlchemy 2.0 would set them once more on the savepoint, and be refused.
                root._connection_for_bind(engine, options)
                options = {}
            return super()._connection_for_bind(engine, options or None, **keywords)

    def _connect_with_options(self) -> None:
        """For the ways to write that take their connection past ``_connection_for_bind``."""
        if self.guard.connection_options and not self.in_transaction_on_server():
            self._connection_for_bind(self.get_bind())

    def _is_the_users(self, connection: Connection) -> bool:
        """Whether the session was bound to *connection* itself: then the user ends its transaction."""
        transaction = self.get_transaction()
        return transaction is not None and connection in (
            entry[0] for entry in transaction._connections.values() if not entry[3]
        )

    def in_transaction_on_server(self) -> bool:
        """Whether a connection is held; a transaction that was merely begun in Python holds none."""
        transaction = self.get_transaction()
        return transaction is not None and bool(transaction._connections)

    def driver_connections(self) -> list[Any]:
        """The driver's connections that this session holds now."""
        transaction = self.get_transaction()
        held = {} if transaction is None else transaction._connections
        found = {id(entry[0]): entry[0] for entry in held.values()}.values()
        return [
            connection.connection.driver_connection
            for connection in found
            if not connection.closed and not connection.invalidated
        ]

    # Private ----------------------------------------------------------------------------------------------

    def _inside(self) -> AbstractContextManager[None]:
        return self.guard.visit()

    def _flushed_names(self) -> set[str]:
        return {
            type(instance).__name__
            for instance in (*self.new, *self.deleted, *self.dirty)
            if instance in self.new or instance in self.deleted or self.is_modified(instance)
        }

    def _refuse_after_end(self) -> Never:
        ended = cast("datetime", self.guard.ended_at)
        raise SessionClosed(
            f"the session of {self.guard.holder} was used after its end"
            f" (it ended at {ended:%H:%M:%S}.{ended.microsecond // 1000:03d} UTC)",
            remedies=[
                "Open a session of its own where the work goes on: async with db.transaction() as session.",
                "Pass ids to background work, not sessions or loaded objects.",
            ],
        )

    def _refuse_behind_the_back(self) -> Never:
        raise ConnectionCommitRefused(
            f"commit() or rollback() was called on the connection of the session of {self.guard.holder}",
            remedies=[
                "Call it on the session: await session.commit().",
                "For a connection you commit yourself, use async with db.connect() as connection.",
            ],
        )


class GuardedTransaction(SessionTransaction):
    """A guarded session's transaction: ``session.begin()`` ends it directly, past ``Session.commit()``."""

    def commit(self, _to_root: bool = False) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """As SQLAlchemy's, for one task at a time; after the deadline nothing is committed any more."""
        with self._visit():
            session = cast("GuardedSession", self.session)
            if session.guard.deadline is not None and (
                session.in_transaction_on_server() or session.has_pending()
            ):
                session.guard.refuse_overdue()
            super().commit(_to_root)

    def rollback(self, *arguments: Any, **keywords: Any) -> None:
        """As SQLAlchemy's, for one task at a time."""
        with self._visit():
            super().rollback(*arguments, **keywords)

    def close(self, invalidate: bool = False) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """As SQLAlchemy's, for one task at a time."""
        with self._visit():
            super().close(invalidate)

    def _connection_for_bind(self, *arguments: Any, **keywords: Any) -> Connection:
        guard = cast("GuardedSession", self.session).guard
        if guard.deadline is None:
            return super()._connection_for_bind(*arguments, **keywords)
        guard.refuse_overdue()
        connection = super()._connection_for_bind(*arguments, **keywords)
        # Connecting may have used up the rest, while the alarm has found nothing in hand to sever.
        guard.refuse_overdue()
        return connection

    @contextmanager
    def _visit(self) -> Generator[None]:
        session = cast("GuardedSession", self.session)
        with session.guard.visit():
            if self.parent is None and session.guard.streams:
                session.close_streams()
            yield


def guarded(session_class: type[AsyncSession]) -> type[GuardedSession]:
    """The guarded form of the sync class that *session_class* drives; a user's own class keeps its methods."""
    base = session_class.sync_session_class
    if issubclass(base, GuardedSession):
        return base
    if base is Session:
        return GuardedSession
    return type(f"Guarded{base.__name__}", (GuardedSession, base), {})


def guard_of(session: AsyncSession) -> Guard:
    """The guard of a session that a ``Database`` made; ``NotInstalled`` for any other."""
    return guarded_session(session).guard


def guarded_session(session: AsyncSession) -> GuardedSession:
    """The sync session under *session*, for code of stanch; ``NotInstalled`` if no ``Database`` made it."""
    sync_session = session.sync_session
    if isinstance(sync_session, GuardedSession):
        return sync_session
    raise NotInstalled(
        "this session was not made by a stanch Database, so nothing is known about it",
        remedies=["Take it from SessionDep, db.session(), db.transaction() or db.session_factory."],
    )


def _first_word(sql: str) -> str:
    words = _COMMENTS.sub(" ", sql).replace("(", " ").split(maxsplit=1)
    return words[0].upper() if words else ""


def _table_of(statement: Any) -> str:
    return str(getattr(getattr(statement, "table", None), "name", "DML"))


@event.listens_for(GuardedSession, "after_transaction_end", propagate=True)
def _forget_writes(session: Session, transaction: SessionTransaction) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    # A class-level session event costs the engine nothing. Only the root's end settles what was written.
    if transaction.parent is None and isinstance(session, GuardedSession):
        session.guard.wrote.clear()


@event.listens_for(GuardedSession, "after_transaction_create", propagate=True)
def _guard_transaction(_session: Session, transaction: SessionTransaction) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    # The earliest moment: SQLAlchemy has no public place to name the class of its transactions.
    transaction.__class__ = GuardedTransaction
