"""What stanch adds to a session: it refuses after its end, refuses two tasks at once, and knows what it wrote.

The behaviour sits in a mixin for SQLAlchemy's *sync* ``Session`` class, which every ``AsyncSession`` drives:
so ``session.begin()``, ``sessionmaker.begin()``, ``run_sync``, lazy loads and a user's own session class all
have it. Private names of SQLAlchemy used here, each a funnel that no public method can pass by:
``Session._autobegin_t`` (any use begins here), ``_execute_internal`` (every statement), ``_flush`` and
``_bulk_save_mappings`` (every ORM write), ``_connection_for_bind`` (the connection is taken here),
``SessionTransaction._connections`` (what is held), its ``_connection_for_bind`` and ``_state`` (has COMMIT
been sent);
``tests/test_contract.py`` holds them.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import re
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Never, cast
from weakref import ref

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionOrigin, SessionTransactionState
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from stanch.accounts import paying
from stanch.callers import place_of_caller
from stanch.completion import came_too_late, run_to_completion
from stanch.errors import (
    CommitRefused,
    CommitUnknown,
    ConnectionCommitRefused,
    NotInstalled,
    SessionClosed,
    SessionOverlap,
    StanchError,
    TransactionAborted,
    WriteRefused,
)
from stanch.guards import Guard, Owner
from stanch.hooks import Frame, Outcome
from stanch.reading import READER_OPTION, objection_to, objection_when_compiled, refusal
from stanch.sqlstate import IN_FAILED_TRANSACTION, sqlstate_of
from stanch.sqltext import is_plain_reading
from stanch.statements import function_called_on
from stanch.unverified import CLEAN_KEY
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession

    from stanch.drivers import Driver
    from stanch.events import Observers
    from stanch.hooks import Runner
    from stanch.meters import Instruments, UnitEnd
    from stanch.settings import Settings

_WRITING_WORDS: Final = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
"""First keywords of text() that certainly write; what else may write is not guessed here."""
_SETTING_WORDS: Final = frozenset({"SET", "RESET", "SHOW"})
"""First keywords that change no row, whatever follows."""


_NO_OPTIONS: Final[Mapping[str, Any]] = {}
_COMMENTS: Final = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)


class Terms(Value):
    """What every session of one ``Database`` is subject to."""

    database: str
    driver: Driver
    settings: Settings
    observers: Observers
    hooks: Runner
    instruments: Instruments
    judges_statements: bool
    """Whether the engine is ours, and looks at each statement that is about to be sent."""
    readers: Engine | None = None
    """The engine of the readers, where they have connections of their own."""


class GuardedSession(Session):
    """The mixin. ``guard`` is set by whoever makes the session; see ``guarded``."""

    terms: ClassVar[Terms]
    guard: Guard

    def __init__(self, *arguments: Any, guard: Guard | None = None, **keywords: Any) -> None:
        # Before a user's own __init__, which may already begin().
        self.guard = guard or self._guard_of_the_users()
        self.guard.account.session = ref(self)
        self.terms.instruments.meter.began(self.guard.account)
        self._bind_of_writers: Any = None
        super().__init__(*arguments, **keywords)

    def _guard_of_the_users(self) -> Guard:
        tracked = self.terms.settings.track_holders
        place = place_of_caller() if tracked else None
        return Guard("a session of your own making", database=self.terms.database, place=place)

    def unsaved(self) -> tuple[str, ...]:
        """Names of what was written, waits to be written or waits for the commit, and is not committed."""
        pending = {type(instance).__name__ for instance in (*self.new, *self.deleted)}
        changed = {type(instance).__name__ for instance in self.dirty if self.is_modified(instance)}
        waiting = [f"on_commit({hook.name})" for hook in self.guard.hooks.waiting(Outcome.COMMITTED)]
        return (*self.guard.wrote, *sorted((pending | changed) - set(self.guard.wrote)), *waiting)

    def has_pending(self) -> bool:
        """Whether a flush would have something to write."""
        return bool(self.new or self.deleted or self.dirty)

    # Every use begins in one of these ---------------------------------------------------------------------

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        self.refuse_after_end()
        return super()._autobegin_t(begin)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """As SQLAlchemy's; a reader, whose statements stand alone, has nothing to begin."""
        if self.guard.reading:
            self._refuse_to_read("begin()" if not nested else "begin_nested()")
        if nested:
            self._autobegin_t()  # or SQLAlchemy would call the root begun by hand, which somebody must commit
        try:
            return super().begin(nested)
        except PendingRollbackError as error:
            self._note_trouble(error)
            raise

    def _execute_internal(self, statement: Any, *arguments: Any, **keywords: Any) -> Any:
        guard = self.guard
        guard.enter()
        try:
            if guard.reading:
                self._judge_reading(statement, keywords.get("execution_options", _NO_OPTIONS))
            elif getattr(statement, "is_dml", False):
                guard.note_write(_table_of(statement))
            elif isinstance(statement, TextClause) and not is_plain_reading(statement.text):
                self._note_text(statement.text)
            result = super()._execute_internal(statement, *arguments, **keywords)
            if keywords.get("execution_options", _NO_OPTIONS).get("stream_results"):
                guard.streams.append(result)
            return result
        except SQLAlchemyError as error:
            self._note_trouble(error)
            raise
        finally:
            if guard.reading and guard.outermost:
                self._end_reading()
            guard.leave()

    def _note_text(self, sql: str) -> None:
        word = _first_word(sql)
        if word in _WRITING_WORDS:
            self.guard.note_write(f"text({word})")
        elif word not in _SETTING_WORDS:
            self.guard.note_doubt(f"text({word})")

    def close_streams(self) -> None:
        """End what still fetches: the connection is about to be somebody else's."""
        streams, self.guard.streams = self.guard.streams, []
        for stream in streams:
            with suppress(Exception):  # a broken connection: then there is nothing left to read
                stream.close()

    def _flush(self, objects: Sequence[object] | None = None) -> None:
        with self._inside():
            if self.guard.reading:
                self._refuse_to_read("flush()")
            self._connect_with_options()
            for name in self._flushed_names():
                self.guard.note_write(name)
            try:
                super()._flush(objects)
            except SQLAlchemyError as error:
                self._note_trouble(error)
                raise

    def _bulk_save_mappings(self, mapper: Any, *arguments: Any, **keywords: Any) -> None:
        with self._inside():
            if self.guard.reading:
                self._refuse_to_read("a bulk write")
            self._connect_with_options()
            self.guard.note_write(getattr(mapper, "class_", mapper).__name__)
            super()._bulk_save_mappings(mapper, *arguments, **keywords)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's; after the end it refuses, where SQLAlchemy's clean session stays silent."""
        self.refuse_after_end()
        # Before SQLAlchemy marks the session as flushing: _flush() would be too late to wait.
        with self._inside():
            super().flush(objects)

    def refresh(self, instance: object, *arguments: Any, **keywords: Any) -> None:
        """As SQLAlchemy's; after the end it says so, where SQLAlchemy blames the object."""
        self.refuse_after_end()
        super().refresh(instance, *arguments, **keywords)

    def commit(self) -> None:
        """As SQLAlchemy's, for one task at a time; then runs what ``on_commit`` was given."""
        with self.ending():
            super().commit()

    def rollback(self) -> None:
        """As SQLAlchemy's, for one task at a time; then runs what ``after_rollback`` was given."""
        with self.ending():
            super().rollback()

    def close(self) -> None:
        """Close for good: any later use raises ``SessionClosed``."""
        dropped: tuple[str, ...] = ()
        try:
            with self.ending():
                dropped = self.unsaved()
                super().close()
        except SessionOverlap:
            raise  # it was not closed
        except BaseException:
            self._end(dropped)
            raise
        self._end(dropped)

    def invalidate(self) -> None:
        """Close for good, and close the connection too instead of returning it."""
        with self._inside():
            try:
                super().invalidate()
            finally:
                self._end(())

    def _end(self, dropped: tuple[str, ...]) -> None:
        if self.guard.end(dropped=dropped):
            self.terms.instruments.meter.closed(self.guard.account)

    @contextmanager
    def ending(self) -> Generator[None]:
        """A transaction may end inside; what has waited for that runs once the running task is outside again."""
        guard = self.guard
        try:
            with guard.visit():
                yield
        finally:
            if guard.hooks and not guard.hooks_wait and guard.inside is None and in_greenlet():
                await_only(run_to_completion(self.run_due()))

    async def run_due(self) -> None:
        """Run the callbacks whose time has come. Never raises what they do."""
        guard = self.guard
        guard.hooks_wait = False
        if guard.hooks:
            await self.terms.hooks.run(guard.hooks.take_due(), holder=guard.holder)

    # The connection ---------------------------------------------------------------------------------------

    def connection(self, *arguments: Any, **keywords: Any) -> Connection:
        """The session's connection. It refuses ``commit()`` and ``rollback()``: the session ends its transaction."""
        if self.guard.reading:
            self._refuse_to_read("connection()")
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
        return [
            connection.connection.driver_connection
            for connection in self._connections()
            if not connection.closed and not connection.invalidated
        ]

    def doubts(self) -> tuple[str, ...]:
        """Names of what was executed in this transaction, and of which only the server knows whether it wrote."""
        if not self.terms.judges_statements:
            return (*self.guard.doubtful, "what was executed")
        called = (function_called_on(connection) for connection in self._connections())
        return (*self.guard.doubtful, *(each for each in called if each is not None))

    def _connections(self) -> Iterable[Connection]:
        transaction = self.get_transaction()
        held = {} if transaction is None else transaction._connections
        return {id(entry[0]): entry[0] for entry in held.values()}.values()

    def vouch_for_reading(self) -> None:
        """Before COMMIT: say where the server itself has refused every write, so that nothing need be asked of it."""
        options, terms = self.guard.connection_options, self.terms
        if not terms.driver.read_only_options.items() <= options.items():
            return
        for connection in self._connections():
            level = options.get("isolation_level") or connection.default_isolation_level
            if level != "SERIALIZABLE":  # there what was read counts only once COMMIT has succeeded
                connection.info[CLEAN_KEY] = True

    # Reading ----------------------------------------------------------------------------------------------

    def start_reading(self) -> None:
        """From now on each statement stands alone: no BEGIN, and its connection goes back once it is read."""
        self.guard.reading = True
        self._bind_of_writers, self.bind = self.bind, self.terms.readers or self.bind
        # What was changed waits for the end of the unit, or for a writer; a read must not write it.
        self.autoflush = False
        self.guard.connection_options = {**self.terms.driver.reader_options, READER_OPTION: self.guard.holder}

    def stop_reading(self) -> None:
        """From the next statement on this is a writer, with the objects it has read so far."""
        self.guard.reading = False
        self.bind = self._bind_of_writers
        self.autoflush = self.terms.settings.autoflush
        self.guard.connection_options = {}

    def _judge_reading(self, statement: Any, options: Mapping[str, Any]) -> None:
        own: Mapping[str, Any] = getattr(statement, "_execution_options", _NO_OPTIONS)
        if any(each.get("stream_results") or each.get("yield_per") for each in (options, own)):
            self._refuse_to_read("stream() or yield_per")
        objection = (
            objection_to(statement)
            if self.terms.judges_statements
            else objection_when_compiled(statement, self.get_bind().dialect)
        )
        if objection is not None:
            self._refuse_to_read(objection)

    def _end_reading(self) -> None:
        """Give the connection back. What was read stays as it is, and what is pending stays pending."""
        transaction = self.get_transaction()
        if transaction is not None:
            transaction.close()

    def _refuse_to_read(self, what: str) -> Never:
        raise refusal(what, self.guard.holder)

    # What went wrong, and who promised --------------------------------------------------------------------

    def begun(self) -> SessionTransaction:
        """The outermost transaction; begins one, in Python only, if there is none."""
        # Not what _autobegin_t() returns: while a flush is under way that is the flush's own part of it.
        return self.get_transaction() or self._autobegin_t()

    def note_end(self, transaction: SessionTransaction, frame: Frame | None) -> None:
        """*transaction*, an outermost one, has ended: tell the meter how, if it ever came to the server."""
        guard, account = self.guard, self.guard.account
        committed, guard.commits = guard.commits, False
        if not transaction._connections:
            return
        outcome: UnitEnd = "read"
        if committed:
            outcome = "committed"
        elif frame is not None and frame.outcome is Outcome.UNKNOWN:
            outcome = "unknown"
        elif guard.wrote or guard.doubtful or (frame is not None and frame.trouble is not None):
            outcome = "rolled back"
            account.rolled_back = True
        if not guard.reading and account.shapes:
            account.shapes = {}
        self.terms.instruments.meter.ended(account, outcome)

    def is_open(self, transaction: SessionTransaction | None) -> bool:
        """Whether *transaction*, the outermost or a savepoint, has not ended yet."""
        # Not `is_active`: after a flush that failed a savepoint is inactive, and still to be rolled back.
        return any(transaction is each for each in self._open_transactions())

    def frame(self) -> Frame:
        """What the innermost transaction or savepoint has gathered; begins one, in Python only, if there is none."""
        return self.guard.hooks.frame(self.get_nested_transaction() or self.begun())

    def open_frame(self) -> Frame | None:
        """The same, where something is begun."""
        return self.frame() if self.in_transaction() else None

    def trouble(self) -> str | None:
        """The first database error of what is open now, and where; what a savepoint has undone does not count."""
        frames = map(self.guard.hooks.find, self._open_transactions())
        return next((frame.trouble for frame in frames if frame is not None and frame.trouble), None)

    def _open_transactions(self) -> Iterator[SessionTransaction]:
        """The innermost savepoint first."""
        each = self.get_nested_transaction() or self.get_transaction()
        while each is not None:
            yield each
            each = each.parent

    def owner(self) -> Owner | None:
        """Who will end the present transaction; None where it was merely begun by a statement."""
        if self.guard.owners:
            return self.guard.owners[-1]
        if self.in_nested_transaction():
            return Owner("session.begin_nested()", is_block=True)
        root = self.get_transaction()
        begun = root is not None and root.origin is SessionTransactionOrigin.BEGIN
        return Owner("session.begin()", is_block=True) if begun else None

    def _note_trouble(self, error: SQLAlchemyError) -> None:
        """Remember the first database error of a transaction; blame it for what fails because of it."""
        transaction = self.get_nested_transaction() or self.get_transaction()
        if transaction is None or isinstance(error, StanchError):
            return
        if _is_consequence(error, transaction):
            if (trouble := self.trouble()) is not None:
                raise TransactionAborted(
                    f"the transaction of {self.guard.holder} was aborted by an earlier error: {trouble}",
                    remedies=[
                        "Do not go on after a database error that was caught: let it end the unit of work.",
                        "Put what may fail into a savepoint: async with atomic(session).",
                    ],
                ) from error
        elif isinstance(error, DBAPIError) and (frame := self.guard.hooks.frame(transaction)).trouble is None:
            state = sqlstate_of(error)
            told = f"{type(error.orig).__name__}{f' ({state})' if state else ''}"
            frame.trouble = f"{told} at {place_of_caller()}"

    # Private ----------------------------------------------------------------------------------------------

    def _inside(self) -> AbstractContextManager[None]:
        return self.guard.visit()

    def _flushed_names(self) -> set[str]:
        return {
            type(instance).__name__
            for instance in (*self.new, *self.deleted, *self.dirty)
            if instance in self.new or instance in self.deleted or self.is_modified(instance)
        }

    def refuse_after_end(self) -> None:
        """Raise ``SessionClosed`` once the session was closed for good."""
        ended = self.guard.ended_at
        if ended is None:
            return
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
        """As SQLAlchemy's, for one task at a time; says which error of before stands against it.

        After the deadline nothing is committed any more.
        """
        with self._ending() as guard:
            session = cast("GuardedSession", self.session)
            if guard.deadline is not None and (session.in_transaction_on_server() or session.has_pending()):
                guard.refuse_overdue()
            if self.parent is None and session.terms.settings.verify_commits:
                session.vouch_for_reading()
            frame = guard.hooks.find(self)
            if frame is not None and frame.doom is not None:
                raise self._refused(frame.doom)
            trouble = session.trouble()
            try:
                if self.nested and frame is not None and frame.trouble is not None and self.is_active:
                    self._ask_whether_aborted()
                super().commit(_to_root)
            except (CommitUnknown, asyncio.CancelledError) as error:
                self._note_outcome(error, frame)
                raise
            except SQLAlchemyError as error:
                if trouble is None or not _is_consequence(error, self):
                    raise
                raise self._refused(f"an earlier error had aborted the transaction: {trouble}") from error

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> None:  # noqa: PYI036  # SQLAlchemy's signature
        """As SQLAlchemy's, which closes a block in silence when a flush has failed in it: nothing of it is stored."""
        session = cast("GuardedSession", self.session)
        lost, trouble = session.is_open(self) and not self.is_active, session.trouble()
        if lost:
            self.rollback()  # closing would leave what was added since to the transaction around a savepoint
        super().__exit__(type_, value, traceback)
        if lost and type_ is None:
            raise self._refused(
                f"an earlier error had aborted the transaction: {trouble or 'a flush failed'}"
            )

    def rollback(self, *arguments: Any, **keywords: Any) -> None:
        """As SQLAlchemy's, for one task at a time."""
        with self._ending():
            super().rollback(*arguments, **keywords)

    def close(self, invalidate: bool = False) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """As SQLAlchemy's, for one task at a time."""
        with self._ending():
            super().close(invalidate)

    def _connection_for_bind(self, *arguments: Any, **keywords: Any) -> Connection:
        guard = cast("GuardedSession", self.session).guard
        guard.refuse_overdue()
        token = paying.set(guard.account)
        try:
            connection = super()._connection_for_bind(*arguments, **keywords)
        finally:
            paying.reset(token)
        # Connecting may have used up the rest, while the alarm has found nothing in hand to sever.
        guard.refuse_overdue()
        return connection

    def _ask_whether_aborted(self) -> None:
        """Raise if a savepoint cannot be released: of a RELEASE that has failed SQLAlchemy does not go back any more.

        Not every error aborts: not one of the driver's own, before anything was sent, and none of SQLite.
        """
        for entry in self._connections.values():
            entry[0].execute(text("SELECT 1"))

    def _note_outcome(self, error: BaseException, frame: Frame | None) -> None:
        """What is known of a COMMIT that did not return, or whose waiter was cancelled: ours runs to its end."""
        guard = cast("GuardedSession", self.session).guard
        if self.parent is None and isinstance(error, asyncio.CancelledError) and came_too_late(error):
            guard.note_commit(frame)
        elif frame is not None and (isinstance(error, CommitUnknown) or self._may_be_stored(error)):
            frame.outcome = Outcome.UNKNOWN

    def _may_be_stored(self, error: BaseException) -> bool:
        if isinstance(error.__cause__, CommitUnknown):
            return True
        # On an engine that is not ours a COMMIT can be cut short.
        ours = cast("GuardedSession", self.session).terms.judges_statements
        return not ours and self.parent is None and self._state is SessionTransactionState.PREPARED

    def _refused(self, why: str) -> CommitRefused:
        what = "the savepoint could not be released" if self.nested else "COMMIT stored nothing"
        return CommitRefused(
            f"{what}: {why}",
            remedies=[
                "Find the error that was caught and not raised again; work after it was lost as well.",
                "Put work that may fail into a savepoint: async with atomic(session).",
            ],
        )

    @contextmanager
    def _ending(self) -> Generator[Guard]:
        session = cast("GuardedSession", self.session)
        with session.ending():
            if self.parent is None and session.guard.streams:
                session.close_streams()
            yield session.guard


def _is_consequence(error: SQLAlchemyError, transaction: SessionTransaction) -> bool:
    """Whether *error* only says that an earlier one has aborted *transaction*."""
    # SQLAlchemy has several words for it: inside a block of session.begin() it speaks of a closed transaction.
    by_session = isinstance(error, InvalidRequestError) and not transaction.is_active
    return by_session or sqlstate_of(error) == IN_FAILED_TRANSACTION


def guarded(session_class: type[AsyncSession], terms: Terms) -> type[GuardedSession]:
    """The guarded form of the sync class that *session_class* drives; a user's own class keeps its methods."""
    base = session_class.sync_session_class
    bases = (base,) if issubclass(base, GuardedSession) else (GuardedSession, base)
    return type(f"Guarded{base.__name__}", bases, {"terms": terms})


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


def refuse_changes(session: AsyncSession) -> None:
    """At the end of a unit that asked for a reader: raise ``WriteRefused`` if it leaves something to be written."""
    sync_session = guarded_session(session)
    if writes := sync_session.unsaved():
        raise WriteRefused(
            f"{sync_session.guard.holder} asked for a reader, but has written ({', '.join(writes)})",
            remedies=[
                "Where something is written, ask for SessionDep instead of ReaderDep, or use db.transaction()."
            ],
        )


def _first_word(sql: str) -> str:
    words = _COMMENTS.sub(" ", sql).replace("(", " ").split(maxsplit=1)
    return words[0].upper() if words else ""


def _table_of(statement: Any) -> str:
    return str(getattr(getattr(statement, "table", None), "name", "DML"))


# Class-level session events cost the engine nothing.


@event.listens_for(GuardedSession, "after_commit", propagate=True)
def _note_commit(session: Session) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    # Also told for a savepoint that is released, and then the connection is still out: only noted here.
    own = cast("GuardedSession", session)
    savepoint = session.get_nested_transaction()
    frame = own.guard.hooks.find(savepoint or session.get_transaction())
    if frame is not None:
        frame.outcome = Outcome.COMMITTED
    if savepoint is None and own.in_transaction_on_server():
        own.guard.committed = own.guard.commits = True


@event.listens_for(GuardedSession, "after_transaction_end", propagate=True)
def _end_frame(session: Session, transaction: SessionTransaction) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    own = cast("GuardedSession", session)
    guard = own.guard
    frame = guard.hooks.ended(transaction, parent=transaction.parent)
    if transaction.parent is None:
        own.note_end(transaction, frame)
        guard.wrote.clear()
        guard.doubtful.clear()
    elif transaction.nested and frame is not None and frame.outcome is not Outcome.COMMITTED:
        del guard.wrote[frame.written_before :]


@event.listens_for(GuardedSession, "after_transaction_create", propagate=True)
def _guard_transaction(session: Session, transaction: SessionTransaction) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    # The earliest moment: SQLAlchemy has no public place to name the class of its transactions.
    transaction.__class__ = GuardedTransaction
    if transaction.nested:
        guard = cast("GuardedSession", session).guard
        guard.hooks.frame(transaction).written_before = len(guard.wrote)
