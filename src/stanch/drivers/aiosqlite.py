"""aiosqlite: savepoints that hold, writers that wait for each other, and no half of a transaction ever stored.

SQLite's own habits are corrected here: BEGIN is emitted by us (SQLAlchemy manual, *SQLite: Transactions with SQLite
and the sqlite3 driver*), IMMEDIATE for all but readers, files are in WAL mode, foreign keys are checked, and a
transaction that SQLite rolled back by itself does not go on as if nothing had happened.

Private names, of aiosqlite's and in this module only: ``Connection._execute``, ``_conn``, ``_running``, ``_thread``,
``_tx``.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, cast

import aiosqlite
from sqlalchemy.pool import NullPool, StaticPool
from sqlalchemy.util import await_only
from typing_extensions import override

from stanch.completion import run_to_completion
from stanch.drivers.base import (
    DRAIN_TIMEOUT,
    READ_ONLY_KEY,
    Attempt,
    Driver,
    Plan,
    commit_refused,
    made_ours,
    reach,
)
from stanch.drivers.options import Text, connect_args_of, engine_options_of
from stanch.settings.kinds import (
    Complaint,
    Function,
    Instance,
    Switch,
    Whole,
    complain,
    judged,
    meant,
    named,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.engine import URL, Connection as SQLAlchemyConnection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import PoolProxiedConnection

    from stanch.settings import Settings
    from stanch.settings.kinds import Kind

_CLOSED: Final = "no active connection"
"""What both SQLAlchemy 2.0 and 2.1 take for a disconnect; aiosqlite's own words only 2.1."""

_READ_ONLY_OPTION: Final = "stanch_read_only"
"""The execution option of a connection whose next transaction only reads."""

_INTERRUPT_INTERVAL: Final = 0.01
"""Seconds between two interrupts for one statement."""

_BUSY_TIMEOUT: Final = 5.0
"""Seconds, where no ``lock_timeout`` is set: without any, two writers fail instead of taking turns."""

_DRIVER_OPTIONS: Final[Mapping[str, Kind]] = {
    "uri": Switch(),
    "check_same_thread": Switch("False"),
    "detect_types": Whole(0, 3, "0"),
    "cached_statements": Whole(0, 10_000, "128"),
}
_URI_OPTIONS: Final = frozenset({"mode", "cache", "immutable", "nolock", "psow", "vfs", "modeof"})
_ARGUMENTS: Final[Mapping[str, Kind]] = {
    **_DRIVER_OPTIONS,
    "async_creator_fn": Function("open_connection"),
    "factory": Instance((type,), "a class", "MyConnection"),
    "iter_chunk_size": Whole(1, 10**6, "64"),
}
_ELSEWHERE: Final[Mapping[str, str]] = {
    "timeout": "Write lock_timeout, in seconds, as a setting of its own.",
    "isolation_level": "Leave it out: BEGIN is emitted by stanch.",
    "autocommit": 'Leave it out: BEGIN is emitted by stanch. Or write isolation_level="AUTOCOMMIT" as a setting.',
}


Request: TypeAlias = "tuple[asyncio.Future[Any] | None, Callable[[], Any]]"
"""What the thread of a connection is to do, and who waits for it."""


class _LastRequest:
    """Hands one request on for which nobody waits: the loop may be closed before the thread has done it."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put_nowait(self, request: Request) -> None:
        self._queue.put_nowait((None, request[1]))


class _NoThread:
    """In the place of the queue of a thread that has ended: SQLAlchemy puts some requests there by itself."""

    def put_nowait(self, request: Request) -> None:
        future, _ = request
        if future is not None:
            future.set_exception(ValueError(_CLOSED))


class Connection(aiosqlite.Connection):
    """An aiosqlite connection that knows whether it is busy, and whether its transaction is still there."""

    begun = False
    """Between our BEGIN and its COMMIT or ROLLBACK."""
    refuses_writes = False
    """Whether this transaction was begun for reading only."""
    statement_timeout: float | None = None
    asked = 0
    answered = 0
    abandoned: sqlite3.Cursor | None = None
    """Whose statement nobody waits for any more; come to its first row, it would hold on to its snapshot."""

    @override
    async def commit(self) -> None:
        """As aiosqlite; but if SQLite had rolled back by itself, this raises, as any other request does."""
        await super().commit()
        self.begun = False
        await self._allow_writes()

    @override
    async def rollback(self) -> None:
        """As aiosqlite; the transaction is over, whatever became of it."""
        self.begun = False
        if self._running and not self._has_nothing_to_undo():
            await super().rollback()
            await self._allow_writes()

    def _has_nothing_to_undo(self) -> bool:
        # Nor would the pool's reset of an idle connection be out of reach of a cancellation.
        return self.asked == self.answered and not (self.in_transaction or self.refuses_writes)

    @override
    async def close(self) -> None:
        """As aiosqlite; twice is once."""
        self.begun = False
        if self._running:  # after stop(), aiosqlite's close() would wait for a thread that has gone
            await super().close()

    @override
    def stop(self) -> None:
        """As aiosqlite; and whatever is asked for afterwards fails, where it would wait for ever."""
        if self._running:
            self._tx: Any = _LastRequest(self._tx)
            cast("Any", super()).stop()
            self._tx = _NoThread()

    @override
    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._running:
            if getattr(fn, "__name__", "") == "close":
                return None  # a cursor: it went with its connection
            raise ValueError(_CLOSED)
        if self._was_rolled_back():
            # After some errors (disk full, interrupt) SQLite has rolled back; what is executed now would be stored
            # on its own.
            raise commit_refused("SQLite")

        def run() -> Any:
            try:
                return fn(*args, **kwargs)
            finally:
                # Two counters, because only the thread counts this one, and only the loop the other.
                self.answered += 1

        self.asked += 1
        alarm = None
        if self.statement_timeout is not None:
            alarm = asyncio.get_running_loop().call_later(self.statement_timeout, self.interrupt_now)
        try:
            return await self._queued(run)
        except asyncio.CancelledError:
            cursor = getattr(fn, "__self__", None)
            if isinstance(cursor, sqlite3.Cursor):
                self.abandoned = cursor
            raise
        finally:
            if alarm is not None:
                alarm.cancel()

    async def free(self) -> None:
        """Interrupt what nobody waits for any more, until it has ended and its statement is closed."""

        def close() -> None:
            cursor, self.abandoned = self.abandoned, None
            if cursor is not None:
                cursor.close()

        # In the queue of the thread behind all that was asked for: when its turn has come, that has ended.
        closed = asyncio.ensure_future(self._queued(close))
        try:
            while self.asked > self.answered:
                self.interrupt_now()  # again and again: the first may have come before the statement had begun
                await asyncio.wait((closed,), timeout=_INTERRUPT_INTERVAL)
            await closed
        finally:
            closed.cancel()

    async def undo_begin(self) -> None:
        """Roll back what a cancelled BEGIN may have begun all the same."""
        if await DRIVER.drain(self) and self.in_transaction:
            await self.rollback()

    async def _queued(self, run: Callable[[], Any]) -> Any:
        return await cast("Any", super())._execute(run)  # noqa: SLF001  # see the docstring of the module

    async def _allow_writes(self) -> None:
        if self.refuses_writes:
            self.refuses_writes = False
            await _run(self, "query_only = OFF")

    def interrupt_now(self) -> None:
        """End the statement that is running; it raises ``OperationalError`` (``interrupted``)."""
        with suppress(ValueError, sqlite3.ProgrammingError):  # closed already
            self._conn.interrupt()

    def _was_rolled_back(self) -> bool:
        return self.begun and not self.in_transaction


@dataclass(frozen=True, slots=True)
class Opener:
    """What SQLAlchemy calls for each new connection."""

    timeout: float
    lock_timeout: float
    statement_timeout: float | None
    theirs: Callable[..., Awaitable[Any]] | None = None
    """The user's own way to open one; the class of what it gives is exchanged afterwards."""

    async def __call__(self, *args: Any, **parameters: Any) -> Any:
        return await reach(
            [Attempt("SQLite", partial(self._open, *args, **parameters))],
            timeout=self.timeout + self.lock_timeout,  # switching to WAL mode may have to wait for a lock
            refusals=(sqlite3.Error,),
        )

    async def _open(self, *args: Any, **parameters: Any) -> Any:
        # The busy timeout; it holds also while WAL mode is being switched on.
        parameters["timeout"] = self.lock_timeout
        made: Any = (
            self.theirs(*args, **parameters) if self.theirs else aiosqlite.connect(*args, **parameters)
        )
        if isinstance(made, aiosqlite.Connection):
            made = made_ours(made, Connection)
            made._thread.daemon = True  # noqa: SLF001  # else the process would not end while one is open
        connection = made_ours(await made, Connection)
        connection.statement_timeout = self.statement_timeout
        try:
            for pragma in (f"busy_timeout = {round(self.lock_timeout * 1000)}", "foreign_keys = ON"):
                await _run(connection, pragma)
            if _wants_wal(args, parameters) and await _run(connection, "journal_mode") != "wal":
                await _run(connection, "journal_mode = WAL")
        except BaseException:
            connection.stop()
            raise
        return connection


async def _run(connection: aiosqlite.Connection, pragma: str) -> object:
    async with connection.execute(f"PRAGMA {pragma}") as cursor:
        row = await cursor.fetchone()
    return row[0] if row else None


def _wants_wal(args: tuple[Any, ...], parameters: Mapping[str, Any]) -> bool:
    name = str(args[0] if args else parameters.get("database", ""))
    return bool(name) and not re.search(
        r"^:memory:|^file::memory:|[?&](mode=(ro|memory)|immutable=(1|on|true|yes))", name
    )


class AiosqliteDriver(Driver):
    """See `stanch.drivers.base.Driver`."""

    name: ClassVar[str] = "aiosqlite"
    read_only_options: ClassVar[Mapping[str, Any]] = {_READ_ONLY_OPTION: True}
    reader_options: ClassVar[Mapping[str, Any]] = read_only_options

    @override
    def plan(self, url: URL, settings: Settings) -> Plan:
        complaints = [*_judged_query(url), *_contradictions(url, settings)]
        connect_args: dict[str, Any] = {}
        for name, value in connect_args_of(settings).items():
            if isinstance(name, str) and name in _ARGUMENTS:
                connect_args[name] = judged(f"connect_args: {name}", _ARGUMENTS[name], value, complaints)
            else:
                complaints.append(_unknown(name, _ARGUMENTS, "connect_args"))
        complain(complaints)
        if _in_memory(url):
            # A further connection would be another database, and closing the one there is would be its end.
            settings = settings.replaced(pool_size=1, max_overflow=0, pool_recycle=-1)
        connect_args["async_creator_fn"] = _opener(settings, connect_args.get("async_creator_fn"))
        options = engine_options_of(settings)
        if options.get("isolation_level") == "SERIALIZABLE":
            del options["isolation_level"]  # what SQLite always is
        return Plan(url.set(drivername=f"sqlite+{self.name}"), connect_args, options, settings)

    @override
    def adopt(self, connect_args: dict[str, Any], settings: Settings) -> None:
        theirs = connect_args.get("async_creator_fn")
        if not isinstance(theirs, Opener):
            connect_args["async_creator_fn"] = _opener(settings, theirs)

    @override
    def sever(self, connection: Any) -> None:
        with suppress(Exception):  # closed already
            connection._conn.interrupt()  # noqa: SLF001  # see the docstring of the module
        with suppress(Exception):
            connection.stop()  # closes behind what is queued; nothing new is accepted

    @override
    def looks_dead(self, connection: Any) -> bool:
        try:
            alive = connection._thread.is_alive() and connection._running  # noqa: SLF001  # see the docstring of the module
            return not (alive and connection._conn)  # noqa: SLF001  # likewise
        except ValueError:  # closed
            return True

    @override
    def is_idle(self, connection: Any) -> bool:
        if self.looks_dead(connection) or connection.in_transaction:
            return False
        return getattr(connection, "asked", 0) == getattr(connection, "answered", 0)

    @override
    async def drain(self, connection: Any) -> bool:
        if not isinstance(connection, Connection):
            return False
        with suppress(Exception):  # too late, or closed meanwhile
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await connection.free()
            return not self.looks_dead(connection)
        self.sever(connection)
        return False

    @override
    async def clean(self, connection: Any, sql: str) -> None:
        pass  # SQLite has no server in whose session anything could stay

    @override
    def prepare_engine(self, engine: AsyncEngine, settings: Settings) -> None:
        dialect = engine.sync_engine.dialect
        # On the instance, not by a "begin" listener: that would cost every statement of the engine.
        dialect.do_begin = partial(_begin, writes=not _reads_only(engine.url))  # type: ignore[method-assign]  # as said
        dialect.set_connection_execution_options = partial(  # type: ignore[method-assign]  # likewise
            _set_options, dialect.set_connection_execution_options
        )
        dialect.reset_isolation_level = partial(_reset, dialect.reset_isolation_level)  # type: ignore[method-assign]  # likewise


def _set_options(
    set_options: Callable[[SQLAlchemyConnection, Mapping[str, Any]], None],
    connection: SQLAlchemyConnection,
    options: Mapping[str, Any],
) -> None:
    """Hand "only reads" on to `_begin`, which sees the pooled connection but not its execution options."""
    if options.get(_READ_ONLY_OPTION):
        connection.connection.info[READ_ONLY_KEY] = True
    set_options(connection, options)


def _reset(reset: Callable[[DBAPIConnection], None], adapted: DBAPIConnection) -> None:
    """Undo AUTOCOMMIT at the return of a connection; on a dead one it raises, and SQLAlchemy's pool loses the slot."""
    if not DRIVER.looks_dead(adapted.driver_connection):
        reset(adapted)


def _begin(proxied: PoolProxiedConnection | DBAPIConnection, *, writes: bool) -> None:
    """BEGIN, unless the connection is in AUTOCOMMIT: SQLAlchemy calls this there, too."""
    info: dict[Any, Any] = getattr(proxied, "info", {})
    refuses_writes = info.pop(READ_ONLY_KEY, False)
    adapted: Any = getattr(proxied, "dbapi_connection", proxied)
    connection: Any = adapted.driver_connection
    # A dead one is asked all the same: BEGIN raises what SQLAlchemy knows.
    if not DRIVER.looks_dead(connection):
        if connection.in_transaction:  # a listener of the user's has begun
            connection.begun = True
            return
        if connection.isolation_level is None:
            return
    try:
        _say_begin(
            adapted,
            "BEGIN IMMEDIATE" if writes and not refuses_writes else "BEGIN",
            refuses_writes=refuses_writes,
        )
    except asyncio.CancelledError:
        if isinstance(connection, Connection):
            with suppress(asyncio.CancelledError):  # the first one is under way
                await_only(run_to_completion(connection.undo_begin()))
        raise


def _say_begin(adapted: Any, begin: str, *, refuses_writes: bool) -> None:
    connection = adapted.driver_connection
    cursor = adapted.cursor()
    # Who writes says so at once and waits in line. A transaction that read first cannot become a writer later: SQLite
    # refuses it without waiting if anybody wrote meanwhile (SQLite manual, *Transaction*).
    cursor.execute(begin)
    connection.begun = True
    if refuses_writes:
        connection.refuses_writes = True
        cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _opener(settings: Settings, theirs: Callable[..., Awaitable[Any]] | None) -> Opener:
    return Opener(
        settings.connect_timeout, settings.lock_timeout or _BUSY_TIMEOUT, settings.statement_timeout, theirs
    )


def _in_memory(url: URL) -> bool:
    name = url.database or ":memory:"
    return name.startswith((":memory:", "file::memory:")) or url.query.get("mode") == "memory"


def _reads_only(url: URL) -> bool:
    return url.query.get("mode") == "ro" or str(url.query.get("immutable", "0")).lower() in {
        "1",
        "true",
        "yes",
        "on",
    }


def _judged_query(url: URL) -> list[Complaint]:
    complaints: list[Complaint] = []
    uri = str(url.query.get("uri", "")).lower() in {"true", "1", "yes", "on"}
    for name, value in url.query.items():
        kind = _DRIVER_OPTIONS.get(name) or (Text("ro") if name in _URI_OPTIONS else None)
        if kind is None:
            complaints.append(_unknown(name, [*_DRIVER_OPTIONS, *_URI_OPTIONS], "url"))
            continue
        try:
            read(kind, value if isinstance(value, str) else "")
        except ValueError:
            complaints.append(
                Complaint(f"url: {name} must be {kind}", f"Write {name} once, with such a value.")
            )
        if name in _URI_OPTIONS and not uri:
            said = f"url: {name} has no effect without uri=true"
            complaints.append(Complaint(said, f"Write sqlite+aiosqlite:///file:shop.db?{name}=…&uri=true."))
    parts = [part for part in ("username", "password", "host", "port") if getattr(url, part) is not None]
    return complaints + [
        Complaint(f"url: SQLite has no {part}", "Write sqlite+aiosqlite:///shop.db.") for part in parts
    ]


def _contradictions(url: URL, settings: Settings) -> list[Complaint]:
    complaints: list[Complaint] = []
    if settings.pooler is not None:
        complaints.append(Complaint("pooler is for PostgreSQL, and this is SQLite", "Leave pooler out."))
    if settings.reader_pool_size is not None:
        said = "reader_pool_size is for PostgreSQL: SQLite refuses a reader's writes on every connection"
        complaints.append(Complaint(said, "Leave reader_pool_size out."))
    if settings.isolation_level not in {None, "SERIALIZABLE", "READ UNCOMMITTED", "AUTOCOMMIT"}:
        said = f"isolation_level={settings.isolation_level!r} is unknown to SQLite"
        complaints.append(Complaint(said, "Leave it out: SQLite is always SERIALIZABLE."))
    if not _in_memory(url):
        if settings.poolclass is StaticPool:
            said = "poolclass=StaticPool is for SQLite :memory: only"
            complaints.append(Complaint(said, "Leave poolclass out."))
        return complaints
    if settings.poolclass is NullPool:
        said = "poolclass=NullPool would make a new, empty database each time: this one is in memory"
        complaints.append(Complaint(said, "Leave poolclass out, or name a file."))
    for name, most in (("pool_size", 1), ("max_overflow", 0)):
        if name in settings.given and getattr(settings, name) > most:
            said = f"{name}={getattr(settings, name)}, but a database in memory is one connection"
            complaints.append(Complaint(said, f"Leave {name} out, or name a file."))
    return complaints


def _unknown(name: object, known: Mapping[str, Any] | list[str], where: str) -> Complaint:
    if isinstance(name, str) and name in _ELSEWHERE:
        return Complaint(f"{where}: {name} is not an option here", _ELSEWHERE[name])
    return Complaint(
        f"{where}: {named(name)} is not an option of SQLite{meant(str(name), known)}",
        "Leave it out: what PostgreSQL's drivers know, SQLite does not.",
    )


DRIVER: Final = AiosqliteDriver()
