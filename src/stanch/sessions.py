"""What stanch adds to a session: it refuses after its end, refuses two tasks at once, and knows what it wrote.

The behaviour sits in a mixin for SQLAlchemy's *sync* ``Session`` class, which every ``AsyncSession`` drives:
so ``session.begin()``, ``sessionmaker.begin()``, ``run_sync``, lazy loads and a user's own session class all
have it. Private names of SQLAlchemy used here, each a funnel that no public method can pass by:
``Session._autobegin_t`` (any use begins here), ``_execute_internal`` (every statement), ``_flush`` and
``_bulk_save_mappings`` (every ORM write), ``_connection_for_bind`` (the connection is taken here); ``_autoflush``,
``_is_clean``, and what that looks at, ``_new``, ``_deleted`` and ``IdentityMap._modified`` (is there anything to
write); ``_transaction`` (is anything begun); ``SessionTransaction._connections`` (what is held), its
``_connection_for_bind`` and ``_state`` (has COMMIT been sent); ``Connection._allow_autobegin`` (does a statement begin
a transaction);
``tests/test_contract.py`` holds them.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Never, cast
from weakref import ref

from sqlalchemy import ColumnElement, event, literal_column, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionOrigin, SessionTransactionState
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from stanch.accounts import paying
from stanch.callers import place_of_caller
from stanch.completion import came_too_late, run_to_completion
from stanch.deadlines import to_tidy_up
from stanch.errors import (
    CommitRefused,
    CommitUnknown,
    ConnectionCommitRefused,
    DeadlinePassed,
    NotInstalled,
    SessionClosed,
    SessionOverlap,
    StanchError,
    TransactionAborted,
    WriteRefused,
)
from stanch.guards import Guard, Owner
from stanch.hooks import Frame, Outcome
from stanch.reading import mark_reader, objection_to, objection_when_compiled, refusal
from stanch.sqlstate import IN_FAILED_TRANSACTION, sqlstate_of
from stanch.sqltext import first_keyword, is_plain_reading, only_locks, suspicion_by_words
from stanch.statements import doubts_on, tell_writes_past_the_session
from stanch.unverified import CLEAN_KEY
from stanch.values import Value
from stanch.watch import Watch, undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy.engine import Connection

    from stanch.drivers import Driver
    from stanch.events import Observers
    from stanch.hooks import Runner
    from stanch.meters import Instruments, UnitEnd
    from stanch.settings import Settings

_TRANSACTION_ID: Final[ColumnElement[Any]] = literal_column("pg_current_xact_id_if_assigned()::text")
"""PostgreSQL gives a transaction its id with the first thing that it writes."""

_NO_OPTIONS: Final[Mapping[str, Any]] = {}


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
    closes_plainly: ClassVar[bool]
    """Whether no class of the user's has its own way to close, which may await."""
    guard: Guard

    def __init__(self, *arguments: Any, guard: Guard | None = None, **keywords: Any) -> None:
        # Before a user's own __init__, which may already begin().
        self.guard = guard or self._guard_of_the_users()
        self.guard.account.session = ref(self)
        self.terms.instruments.meter.began(self.guard.account)
        self._bind_of_writers: Any = None
        self._alone: dict[Engine, tuple[Connection, Callable[[], None] | None]] = {}
        """What the statement that now stands alone runs on, and what undoes that once it has ended.

        One, but for a session class with several engines.
        """
        super().__init__(*arguments, **keywords)

    def _guard_of_the_users(self) -> Guard:
        tracked = self.terms.settings.track_holders
        place = place_of_caller() if tracked else None
        return Guard("a session of your own making", database=self.terms.database, place=place)

    def unsaved(self) -> tuple[str, ...]:
        """Names of what was written, waits to be written or waits for the commit, and is not committed."""
        if not (self.guard.wrote or self.guard.hooks.frames or self.has_pending()):
            return ()
        pending = {type(instance).__name__ for instance in (*self.new, *self.deleted)}
        changed = {type(instance).__name__ for instance in self.dirty if self.is_modified(instance)}
        waiting = [f"on_commit({hook.name})" for hook in self.guard.hooks.waiting(Outcome.COMMITTED)]
        return (*self.guard.wrote, *sorted((pending | changed) - set(self.guard.wrote)), *waiting)

    def has_pending(self) -> bool:
        """Whether a flush would have something to write."""
        return not self._is_clean()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is begun, nothing waits to be written and nobody is inside. Asked often: in one piece."""
        return not (
            self._transaction is not None
            or self.guard.inside is not None
            or self.identity_map._modified
            or self._new
            or self._deleted
        )

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

    def _autoflush(self) -> None:
        # As SQLAlchemy's, but it comes in only where there is something to write: it is asked before each statement.
        if not self._is_clean():
            super()._autoflush()

    def _execute_internal(self, statement: Any, *arguments: Any, **keywords: Any) -> Any:
        guard, failed = self.guard, False
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
            failed = _is_trouble(error)
            self._note_trouble(error)
            raise
        finally:
            try:
                if guard.outermost and (guard.reading or self._alone):
                    self._end_reading(failed=failed)
            finally:  # cancelled while the connection went back
                guard.leave()

    def _note_text(self, sql: str) -> None:
        suspected = suspicion_by_words(sql)
        if suspected is None:
            if only_locks(sql):
                self.guard.note_lock(f"text({first_keyword(sql)})")
        elif suspected.certain:
            self.guard.note_write(f"text({suspected.what})")
        else:
            self.guard.note_doubt(f"text({suspected.what})")

    def _note_past_the_session(self, keyword: str) -> None:
        """Told of each write on a connection that was handed out; what the session itself sends it knows better."""
        if self.guard.inside is None:
            self.guard.note_write(f"connection({keyword})")

    def close_streams(self) -> None:
        """End what still fetches: the connection is about to be somebody else's."""
        streams, self.guard.streams = self.guard.streams, []
        for stream in streams:
            with suppress(Exception):  # a broken connection: then there is nothing left to read
                stream.close()

    def _flush(self, objects: Sequence[object] | None = None) -> None:
        with self.guard:
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
        with self.guard:
            if self.guard.reading:
                self._refuse_to_read("a bulk write")
            self._connect_with_options()
            self.guard.note_write(getattr(mapper, "class_", mapper).__name__)
            super()._bulk_save_mappings(mapper, *arguments, **keywords)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's; after the end it refuses, where SQLAlchemy's clean session stays silent."""
        self.refuse_after_end()
        # Before SQLAlchemy marks the session as flushing: _flush() would be too late to wait.
        with self.guard:
            super().flush(objects)

    def refresh(self, instance: object, *arguments: Any, **keywords: Any) -> None:
        """As SQLAlchemy's; after the end it says so, where SQLAlchemy blames the object."""
        self.refuse_after_end()
        super().refresh(instance, *arguments, **keywords)

    def rollback(self) -> None:
        """As SQLAlchemy's, for one task at a time; then runs what ``after_rollback`` was given."""
        # commit() always comes to GuardedTransaction.commit(); this does not where nothing is begun.
        with self.ending():
            super().rollback()

    def close(self) -> None:
        """Close for good: any later use raises ``SessionClosed``. A cancellation meanwhile is raised afterwards."""
        if self.is_at_rest and not self.guard.hooks:
            super().close()  # drops nothing, and nothing waits for it
            self._end(())
        elif self.in_transaction_on_server() and in_greenlet():
            with self.guard:
                pass  # who may not come in is told so in his own name
            undisturbed(self._close)
        else:
            self._close()

    def _close(self) -> None:
        dropped: tuple[str, ...] = ()
        try:
            with self.ending():
                dropped = self.lost_without_commit()
                super().close()
        except SessionOverlap:
            raise  # it was not closed
        except BaseException:
            self._end(dropped)
            raise
        self._end(dropped)

    def invalidate(self) -> None:
        """Close for good, and close the connection too instead of returning it."""
        with self.guard:
            try:
                super().invalidate()
            finally:
                self._end(())

    def _end(self, dropped: tuple[str, ...]) -> None:
        if self.guard.end(dropped=dropped):
            self.terms.instruments.meter.closed(self.guard.account)

    def ending(self) -> AbstractContextManager[None]:
        """A transaction may end inside; what has waited for that runs once the running task is outside again."""
        return _Ending(self)

    async def run_due(self) -> None:
        """Run the callbacks whose time has come. Never raises what they do."""
        guard = self.guard
        guard.hooks_wait = False
        if guard.hooks.due:
            await self.terms.hooks.run(guard.hooks.take_due(), holder=guard.holder)

    # The connection ---------------------------------------------------------------------------------------

    def connection(self, *arguments: Any, **keywords: Any) -> Connection:
        """The session's connection. It refuses ``commit()`` and ``rollback()``: the session ends its transaction."""
        if self.guard.reading:
            self._refuse_to_read("connection()")
        with self.guard:
            connection = super().connection(*arguments, **keywords)
        if self._is_the_users(connection):
            return connection
        connection.commit = connection.rollback = self._refuse_behind_the_back  # type: ignore[method-assign]  # on this one
        tell_writes_past_the_session(connection, self._note_past_the_session)
        return connection

    def _connection_for_bind(
        self, engine: Any, execution_options: Mapping[str, Any] | None = None, **keywords: Any
    ) -> Connection:
        if self.guard.reading:
            return self._connection_to_read(engine)
        ours = self.guard.connection_options
        if not ours or self.in_transaction_on_server():
            return super()._connection_for_bind(engine, execution_options, **keywords)
        options = {**ours, **(execution_options or {})}
        if self.in_nested_transaction() and (root := self.get_transaction()) is not None:
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
        return bool(self._alone if transaction is None else transaction._connections or self._alone)

    def driver_connections(self) -> list[Any]:
        """The driver's connections that this session holds now."""
        return [
            connection.connection.driver_connection
            for connection in self._connections()
            if not connection.closed and not connection.invalidated
        ]

    def lost_without_commit(self) -> tuple[str, ...]:
        """Names of what an end without COMMIT drops: as ``unsaved()``, and what only the server can know.

        It is asked where there is a doubt, and only then, within ``close_timeout``. What could not be asked, because
        the transaction has failed or its connection is gone, is named as well: nobody can say that nothing was lost.
        """
        try:
            return self.unsaved() or self._confirmed(self._doubts())
        except Exception:  # noqa: BLE001  # an end is under way; it is not for this to change it
            return self._doubts()

    def lost_by_release(self) -> tuple[str, ...]:
        """The same, in case of doubt also locks, and whatever nobody has looked at. Raises if it cannot be known."""
        unseen = () if self.terms.judges_statements else ("what was executed",)
        return self.unsaved() or self._confirmed((*self._doubts(), *self.guard.locks, *unseen))

    def _doubts(self) -> tuple[str, ...]:
        if not self.in_transaction():
            return ()
        seen = (each for connection in self._connections() for each in doubts_on(connection))
        return tuple(dict.fromkeys((*self.guard.doubtful, *seen)))

    def _confirmed(self, doubts: tuple[str, ...]) -> tuple[str, ...]:
        """*doubts*, unless the server says that the transaction has written nothing."""
        if not doubts or not self.in_transaction_on_server():
            return ()
        with self.guard:
            try:
                written = [self._may_have_written(connection) for connection in self._connections()]
            except SQLAlchemyError as error:
                self._note_trouble(error)
                raise
        return doubts if any(written) else ()

    def _may_have_written(self, connection: Connection) -> bool:
        if connection.dialect.name != "postgresql":
            return True
        assigned = Watch(self.terms.driver).run(
            lambda: connection.scalar(select(_TRANSACTION_ID)),
            connection=connection.connection.driver_connection,
            timeout=to_tidy_up(self.terms.settings.close_timeout),
            what="the question what was written",
        )
        return assigned is not None

    def _connections(self) -> Iterable[Connection]:
        transaction = self.get_transaction()
        entries = [*self._alone.values(), *(() if transaction is None else transaction._connections.values())]
        return {id(entry[0]): entry[0] for entry in entries}.values()

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
        self.guard.connection_options = self.terms.driver.reader_options

    def stop_reading(self) -> None:
        """From the next statement on this is a writer, with the objects it has read so far."""
        self.guard.reading = False
        self.bind = self._bind_of_writers
        self.autoflush = self.terms.settings.autoflush
        self.guard.connection_options = {}

    def _judge_reading(self, statement: Any, options: Mapping[str, Any]) -> None:
        own = getattr(statement, "_execution_options", None)
        if (options and _fetches_bit_by_bit(options)) or (own and _fetches_bit_by_bit(own)):
            self._refuse_to_read("stream() or yield_per")
        objection = (
            objection_to(statement)
            if self.terms.judges_statements
            else objection_when_compiled(statement, self.get_bind().dialect)
        )
        if objection is not None:
            self._refuse_to_read(objection)

    def _connection_to_read(self, bind: Any) -> Connection:
        """What the statement that is under way runs on: a connection in no transaction of the session's.

        Only who listens for ``after_begin``, or gives the session execution options, has that of SQLAlchemy.
        """
        if bind in self._alone:
            connection = self._alone[bind][0]
        elif isinstance(bind, Engine):
            self.refuse_after_end()
            connection = _on_account(self.guard, self._take_alone, bind)
        else:  # a connection of the user's own
            connection = super()._connection_for_bind(bind, self.guard.connection_options)
            mark_reader(connection, self.guard.holder)
        if self.dispatch.after_begin or getattr(self, "execution_options", None):
            return super()._connection_for_bind(connection)
        return connection

    def _take_alone(self, engine: Engine) -> Connection:
        connection = engine.connect()
        self._alone[engine] = connection, None
        mark_reader(connection, self.guard.holder)
        adapted = connection.connection.dbapi_connection
        undo = self.terms.driver.let_stand_alone(adapted)
        if undo is not None:
            self._alone[engine] = connection, partial(undo, adapted)
            # Nor a transaction in Python, whose end is as dear as a true one's.
            connection._allow_autobegin = False
        else:
            connection.execution_options(**self.guard.connection_options)
            connection.begin()  # or they could outlive a statement that is cancelled before it has begun anything
        return connection

    def _end_reading(self, *, failed: bool) -> None:
        """Give the connection back. What was read stays as it is, and what is pending stays pending."""
        try:
            if (transaction := self.get_transaction()) is not None:
                transaction.close()
        finally:
            if self._alone:
                self._give_back()
                account = self.guard.account
                account.rolled_back = account.rolled_back or failed
                self.terms.instruments.meter.ended(account, "rolled back" if failed else "read")

    def _give_back(self) -> None:
        """Each of several, whatever becomes of the others."""
        _engine, (connection, undo) = self._alone.popitem()
        try:
            if undo is not None:
                _undo_or_invalidate(undo, connection)
            connection.close()
        except BaseException:
            # Raised behind a ROLLBACK, before the connection has gone back.
            connection.close()
            raise
        finally:
            if self._alone:
                self._give_back()

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
        if guard.reading or not transaction._connections:
            return
        outcome: UnitEnd = "read"
        if committed:
            outcome = "committed"
        elif frame is not None and frame.outcome is Outcome.UNKNOWN:
            outcome = "unknown"
        elif guard.wrote or guard.doubtful or (frame is not None and frame.trouble is not None):
            outcome = "rolled back"
            account.rolled_back = True
        if account.shapes:
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
        if not self.guard.hooks.frames:
            return None
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
        if transaction is None or _is_ours(error):
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
        elif _is_trouble(error) and (frame := self.guard.hooks.frame(transaction)).trouble is None:
            state = sqlstate_of(error)
            kind = error if isinstance(error, StanchError) else getattr(error, "orig", error)
            told = f"{type(kind).__name__}{f' ({state})' if state else ''}"
            frame.trouble = f"{told} at {place_of_caller()}"

    # Private ----------------------------------------------------------------------------------------------

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
        session = cast("GuardedSession", self.session)
        guard = session.guard
        with session.ending():
            self._close_streams()
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
        with cast("GuardedSession", self.session).ending():
            self._close_streams()
            super().rollback(*arguments, **keywords)

    def close(self, invalidate: bool = False) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """As SQLAlchemy's, for one task at a time."""
        if self._state is SessionTransactionState.COMMITTED:
            self._close(invalidate)  # the last step of a commit(), which is inside already
            return
        with cast("GuardedSession", self.session).ending():
            self._close_streams()
            self._close(invalidate)

    def _close(self, invalidate: bool) -> None:  # noqa: FBT001  # as SQLAlchemy's
        try:
            super().close(invalidate)
        except asyncio.CancelledError:
            # It is raised behind a ROLLBACK that has run to its end, before the connection has gone back.
            super().close(invalidate)
            raise

    def _connection_for_bind(self, *arguments: Any, **keywords: Any) -> Connection:
        guard = cast("GuardedSession", self.session).guard
        connect = super()._connection_for_bind
        if arguments[0] not in self._connections:
            return _on_account(guard, connect, *arguments, **keywords)
        guard.refuse_overdue()
        return connect(*arguments, **keywords)

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

    def _close_streams(self) -> None:
        session = cast("GuardedSession", self.session)
        if session.guard.streams and self.parent is None:
            session.close_streams()


class _Ending:
    """See ``GuardedSession.ending()``. A class: entered some three times in each unit."""

    __slots__ = ("_session",)

    def __init__(self, session: GuardedSession) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._session.guard.enter()

    def __exit__(self, *_exception: object) -> None:
        session = self._session
        guard = session.guard
        try:
            if session._alone and guard.outermost:
                session._end_reading(failed=False)  # a listener's, around which is no statement
        finally:
            guard.leave()
        if guard.hooks.due and not guard.hooks_wait and guard.inside is None and in_greenlet():
            await_only(run_to_completion(session.run_due()))


def _is_trouble(error: SQLAlchemyError) -> bool:
    """Whether *error* comes from the database, not from us."""
    return isinstance(error, DBAPIError) and not _is_ours(error)


def _is_ours(error: SQLAlchemyError) -> bool:
    return isinstance(error, StanchError) and not isinstance(error, DeadlinePassed)


def _on_account(
    guard: Guard, connect: Callable[..., Connection], *arguments: Any, **keywords: Any
) -> Connection:
    """What *connect* gives, on the account and within the deadline of *guard*."""
    if guard.deadline is not None:
        guard.refuse_overdue()
    token = paying.set(guard.account)
    try:
        connection = connect(*arguments, **keywords)
    finally:
        paying.reset(token)
    if guard.deadline is not None:
        # Connecting may have used up the rest, while the alarm has found nothing in hand to sever.
        guard.refuse_overdue()
    return connection


def _undo_or_invalidate(undo: Callable[[], None], connection: Connection) -> None:
    try:
        undo()
    except BaseException:
        connection.invalidate()  # whoever had it next would store each statement at once
        raise


def _fetches_bit_by_bit(options: Mapping[str, Any]) -> bool:
    return bool(options.get("stream_results") or options.get("yield_per"))


def _is_consequence(error: SQLAlchemyError, transaction: SessionTransaction) -> bool:
    """Whether *error* only says that an earlier one has aborted *transaction*."""
    # SQLAlchemy has several words for it: inside a block of session.begin() it speaks of a closed transaction.
    by_session = isinstance(error, InvalidRequestError) and not transaction.is_active
    return by_session or sqlstate_of(error) == IN_FAILED_TRANSACTION


def guarded(session_class: type[AsyncSession], terms: Terms) -> type[GuardedSession]:
    """The guarded form of the sync class that *session_class* drives; a user's own class keeps its methods."""
    base = session_class.sync_session_class
    bases = (base,) if issubclass(base, GuardedSession) else (GuardedSession, base)
    plainly = session_class.close is AsyncSession.close and base.close in (
        Session.close,
        GuardedSession.close,
    )
    return type(f"Guarded{base.__name__}", bases, {"terms": terms, "closes_plainly": plainly})


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


def _table_of(statement: Any) -> str:
    return str(getattr(getattr(statement, "table", None), "name", "DML"))


# Class-level session events cost the engine nothing.


@event.listens_for(GuardedSession, "after_commit", propagate=True)
def _note_commit(session: Session) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    # Also told for a savepoint that is released, and then the connection is still out: only noted here.
    own = cast("GuardedSession", session)
    savepoint, hooks = session.get_nested_transaction(), own.guard.hooks
    if hooks.frames and (frame := hooks.find(savepoint or session.get_transaction())) is not None:
        frame.outcome = Outcome.COMMITTED
    if savepoint is None and own.in_transaction_on_server():
        own.guard.committed = own.guard.commits = True


@event.listens_for(GuardedSession, "after_transaction_end", propagate=True)
def _end_frame(session: Session, transaction: SessionTransaction) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    own = cast("GuardedSession", session)
    guard = own.guard
    parent = transaction.parent
    frame = guard.hooks.ended(transaction, parent=parent) if guard.hooks.frames else None
    if parent is None:
        own.note_end(transaction, frame)
        guard.forget_writes()
    elif transaction.nested and frame is not None and frame.outcome is not Outcome.COMMITTED:
        del guard.wrote[frame.written_before :]


@event.listens_for(GuardedSession, "after_transaction_create", propagate=True)
def _guard_transaction(session: Session, transaction: SessionTransaction) -> None:  # pyright: ignore[reportUnusedFunction]  # registered
    # The earliest moment: SQLAlchemy has no public place to name the class of its transactions.
    transaction.__class__ = GuardedTransaction
    if transaction.nested:
        guard = cast("GuardedSession", session).guard
        guard.hooks.frame(transaction).written_before = len(guard.wrote)
