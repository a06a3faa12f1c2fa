"""psycopg 3: connects, sees the COMMIT that the server turns into a rollback, severs, tells whether it is idle.

Beside psycopg's documented classes it stands on ``psycopg.waiting.wait_async`` (see `Connection.wait`), and on
``waiting.wait_conn_async`` and ``generators.cancel``, by which psycopg's own ``cancel_safe()`` works (see ``_cancel``).
Private names of psycopg's, in this module only: ``AsyncConnection._exec_command``, by which it sends BEGIN,
``_pipeline``, in which BEGIN may not be two statements, with the ``level`` and the ``_exit_gen`` of it (see
`Connection.wait`), and ``_autocommit``, which says whether it sends any.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import select
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import psycopg
from psycopg import errors, generators, pq, waiting
from typing_extensions import override

from stanch.completion import run_to_completion
from stanch.drivers.base import (
    CANCEL_INTERVAL,
    DRAIN_TIMEOUT,
    Driver,
    Plan,
    asked_over,
    attempts,
    combined,
    commit_refused,
    made_ours,
    reach,
    rides_on_begin,
    second_link,
    started_with,
)
from stanch.drivers.options import PSYCOPG, as_libpq_options, engine_options_of, gather, plain_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from psycopg.abc import RV, PQGen, PQGenConn
    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import PoolProxiedConnection

    from stanch.settings import Settings

_LIBPQ: Final = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())
_WAKE_INTERVAL: Final[Any] = (
    None if inspect.signature(waiting.wait_async).parameters["interval"].default is None else 0.1
)
"""Seconds between two looks for something other than the socket; psycopg's own figure.

None where psycopg (3.2.3) can do without: there it is a ``wait_for``, which in Python 3.11 swallows a cancellation that
comes together with the answer.
"""
_PSYCOPGS: Final = frozenset({"cursor_factory", "prepare_threshold", "row_factory"})
OWN: Final = {name: kind for name, kind in PSYCOPG.items() if name in _LIBPQ | _PSYCOPGS}

_BETWEEN_OPERATIONS: Final = frozenset(
    {pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR}
)


class Connection(psycopg.AsyncConnection[Any]):
    """A psycopg connection whose COMMIT raises `stanch.errors.CommitRefused` when the server rolls back.

    PostgreSQL answers COMMIT of an aborted transaction with the command tag ``ROLLBACK`` and no error (PostgreSQL
    manual, *COMMIT*). libpq knows beforehand that the transaction is aborted.
    """

    @override
    async def commit(self) -> None:
        """As psycopg; but a COMMIT that was none raises."""
        aborted = self.pgconn.transaction_status == pq.TransactionStatus.INERROR
        await super().commit()  # also then: it ends the transaction, and the connection stays usable
        if aborted:
            raise commit_refused("the server")

    @override
    async def set_autocommit(self, value: bool) -> None:
        """As psycopg; see `_all_or_none`."""
        await self._all_or_none(super().set_autocommit(value))

    @override
    async def set_isolation_level(self, value: psycopg.IsolationLevel | None) -> None:
        """As psycopg; see `_all_or_none`."""
        await self._all_or_none(super().set_isolation_level(value))

    @override
    async def set_read_only(self, value: bool | None) -> None:
        """As psycopg; see `_all_or_none`."""
        await self._all_or_none(super().set_read_only(value))

    @override
    async def set_deferrable(self, value: bool | None) -> None:
        """As psycopg; see `_all_or_none`."""
        await self._all_or_none(super().set_deferrable(value))

    async def _all_or_none(self, setting: Awaitable[None]) -> None:
        """Await *setting*; cancelled, it costs the connection.

        It is set by then, but SQLAlchemy takes back only what it has seen set: the next holder would inherit it.
        """
        try:
            await setting
        except asyncio.CancelledError:
            self.pgconn.finish()
            raise

    @override
    async def wait(
        self, gen: PQGen[RV], interval: float = _WAKE_INTERVAL, timeout: float | None = None
    ) -> RV:
        """As psycopg; but what is cancelled is ended on the server and read to its end, in bounded time, always.

        psycopg does so in the cancelled task itself, where anyio cancels that as well, and before 3.3 without a bound.
        """
        limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}  # psycopg 3.2 knows none
        if self._pipeline is not None and self._pipeline.level == 0:
            # To enter a pipeline waits for nothing. psycopg 3.3 may yield to the loop all the same, and does not
            # leave the pipeline if it is cancelled there.
            try:
                next(gen)
            except StopIteration as over:
                entered: RV = over.value
                return entered
            gen = _resumed(gen)  # another task's, then, which came in between
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval, **limit)
        except asyncio.CancelledError:
            if self._is_busy:
                await run_to_completion(self._end(gen))
            raise

    @property
    def _is_busy(self) -> bool:
        """Whether an answer is to come; or would never come, because the Sync of a pipeline has not been sent."""
        return (
            self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE
            or self.pgconn.pipeline_status != pq.PipelineStatus.OFF
        )

    async def _end(self, gen: PQGen[Any]) -> None:
        """Cancel what *gen* waits for and read the rest; what has not ended in time is cut off."""
        with suppress(Exception):  # ended by the cancellation, as is wished; or lost, or too late
            async with asyncio.timeout(DRAIN_TIMEOUT):
                with suppress(psycopg.Error):
                    await self._cancelled(gen)
                pipeline: Any = self._pipeline
                if pipeline is not None:
                    # Who is cancelled again and again never comes to send the Sync himself, and a server that met
                    # an error passes over all that comes before one, the ROLLBACK as well.
                    rest = pipeline._exit_gen()  # noqa: SLF001  # see the docstring of the module
                    await waiting.wait_async(rest, self.pgconn.socket, _WAKE_INTERVAL)
        if self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            self.pgconn.finish()

    async def _cancelled(self, gen: PQGen[Any]) -> None:
        """Ask the server to end what *gen* waits for until it has, or *gen* is over."""
        while self.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            with suppress(psycopg.Error):  # one request that fails is not the last
                await self.cancel_safe(timeout=DRAIN_TIMEOUT)
            with suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_INTERVAL):
                    await waiting.wait_async(_resumed(gen), self.pgconn.socket, _WAKE_INTERVAL)
                    return

    def _exec_command(self, command: Any, *arguments: Any, **keywords: Any) -> Any:
        """As psycopg, which sends BEGIN in this way; under a deadline the server is told of it at once."""
        more = b""
        if isinstance(command, bytes) and command.startswith(b"BEGIN") and self._pipeline is None:
            more = rides_on_begin(self).encode()
        if not more:
            return (yield from super()._exec_command(command, *arguments, **keywords))
        # psycopg itself refuses two results; to its caller the answer to BEGIN is none.
        self.pgconn.send_query(command + b";" + more)
        for result in (yield from generators.execute(self.pgconn)):
            if result.status != pq.ExecStatus.COMMAND_OK:
                raise errors.error_from_result(result)
        return None


class ServerCursor(psycopg.AsyncServerCursor[Any]):
    """A psycopg server cursor whose ``close()`` is whole: done twice, the second would break the transaction."""

    @override
    async def close(self) -> None:
        """As psycopg; a cancellation meanwhile is raised afterwards, and the wait is bounded."""
        if not self.closed:
            await run_to_completion(self._close_in_time())

    async def _close_in_time(self) -> None:
        async with asyncio.timeout(DRAIN_TIMEOUT):
            await super().close()


@dataclass(frozen=True, slots=True)
class Opener:
    """What SQLAlchemy calls for each new connection."""

    timeout: float
    theirs: Callable[..., Awaitable[Any]] | None = None
    """The user's own way to open one; the class of what it gives is exchanged afterwards."""
    statement_timeout: float | None = None
    """What the server is told at the start."""

    async def __call__(self, *args: Any, **parameters: Any) -> Any:
        hosts, ports = (str(parameters.get(name) or "").split(",") for name in ("host", "port"))
        if "hostaddr" in parameters or parameters.get("load_balance_hosts") == "random":
            hosts = []  # psycopg's own business, then
        opened = await reach(
            attempts(partial(self._open, *args), parameters, hosts=hosts, ports=ports),
            timeout=self.timeout,
            refusals=(psycopg.Error,),
        )
        return started_with(opened, self.statement_timeout)

    async def _open(self, *args: Any, **parameters: Any) -> Any:
        if self.theirs is not None:
            connection = made_ours(await self.theirs(*args, **parameters), Connection)
        else:
            # psycopg rounds up to 2 s and waits so long for each address; reach() keeps the time.
            parameters["connect_timeout"] = math.ceil(self.timeout) + 1
            connection = await Connection.connect(*args, **parameters)
        connection.server_cursor_factory = combined(ServerCursor, connection.server_cursor_factory)
        return connection


def _resumed(gen: PQGen[RV]) -> PQGen[RV]:
    """*gen*, which waits already, to be waited for once more.

    ``wait_async()`` would send it None first, of which psycopg 3.2 can make no number.
    """
    try:
        wanted = gen.send(waiting.Ready.NONE)
        while True:
            wanted = gen.send((yield wanted))
    except StopIteration as over:
        result: RV = over.value
        return result


def _asking(pgconn: pq.abc.PGconn) -> Callable[[], Awaitable[None]]:
    """What sends a CancelRequest for *pgconn*, also once that has been finished."""
    if psycopg.capabilities.has_cancel_safe():
        return partial(_cancel, pgconn.cancel_conn())
    return partial(_cancel_in_a_thread, pgconn.get_cancel())


async def _cancel(cancelling: pq.abc.PGcancelConn) -> None:
    def request() -> PQGenConn[None]:
        cancelling.start()
        yield from generators.cancel(cancelling)

    try:
        await waiting.wait_conn_async(request(), _WAKE_INTERVAL)
    finally:
        cancelling.finish()


async def _cancel_in_a_thread(cancelling: pq.abc.PGcancel) -> None:
    """For a libpq before 17, which can only block. Not in the loop's own threads, for whose end asyncio would wait."""

    def request() -> None:
        with suppress(psycopg.Error):
            cancelling.cancel()

    threading.Thread(target=request, name="stanch: stops a statement on the server", daemon=True).start()


class PsycopgDriver(Driver):
    """See `stanch.drivers.base.Driver`."""

    name: ClassVar[str] = "psycopg"
    read_only_options: ClassVar[Mapping[str, Any]] = {"postgresql_readonly": True}
    reader_options: ClassVar[Mapping[str, Any]] = {"isolation_level": "AUTOCOMMIT"}

    @override
    def plan(self, url: URL, settings: Settings) -> Plan:
        wishes = gather(url, settings, driver=self.name, own=OWN)
        connect_args: dict[str, Any] = {**wishes.plain, **wishes.own, **wishes.tls}
        server = dict(wishes.server)
        if "application_name" in server:
            connect_args["application_name"] = server.pop("application_name")
        if server:
            connect_args["options"] = as_libpq_options(server)
        if settings.pooler is not None:
            connect_args.setdefault("prepare_threshold", None)  # no statement that outlives its transaction
        connect_args["async_creator_fn"] = Opener(
            wishes.timeout, connect_args.get("async_creator_fn"), wishes.statement_timeout
        )
        return Plan(plain_url(url, self.name), connect_args, engine_options_of(settings), settings)

    @override
    def adopt(self, connect_args: dict[str, Any], settings: Settings) -> None:
        theirs = connect_args.get("async_creator_fn")
        if not isinstance(theirs, Opener):
            connect_args["async_creator_fn"] = Opener(settings.connect_timeout, theirs)

    @override
    def sever(self, connection: Any) -> None:
        # Not close(): it would free libpq's connection under whoever waits for it. A second descriptor of the same
        # socket is shut down instead, so that the waiter reads the end of the stream and cleans up itself.
        with (
            suppress(Exception),  # closed already
            second_link(connection.fileno()) as second,
        ):
            second.shutdown(socket.SHUT_RDWR)
        with suppress(Exception):
            if not connection.lock.locked():  # nobody waits for it: psycopg would miss the close() and warn
                connection.pgconn.finish()

    @override
    def sever_asking(self, connection: Any) -> Callable[[], Awaitable[object]] | None:
        with suppress(Exception):  # closed meanwhile, or a proxy: then severing must do
            pgconn: pq.abc.PGconn = connection.pgconn
            if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                # Taken now: whoever waits finishes the connection when it reads the end of the stream.
                ask = _asking(pgconn)
                with second_link(pgconn.socket) as second:
                    second.shutdown(
                        socket.SHUT_RD
                    )  # the waiter reads that end; the server does not see one yet
                return partial(asked_over, second_link(pgconn.socket), ask)
        self.sever(connection)
        return None

    @override
    def looks_dead(self, connection: Any) -> bool:
        try:
            pgconn: pq.abc.PGconn = connection.pgconn
            if pgconn.status != pq.ConnStatus.OK:
                return True
            if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                return False  # whoever waits for the answer reads it, and the end as well
            # What can be read otherwise is a notification, a parameter change, or the end.
            while _readable(pgconn.socket):
                pgconn.consume_input()
        except psycopg.Error:
            return True
        return False

    @override
    def is_idle(self, connection: Any) -> bool:
        pgconn: pq.abc.PGconn = connection.pgconn
        return (
            pgconn.transaction_status == pq.TransactionStatus.IDLE
            and pgconn.pipeline_status == pq.PipelineStatus.OFF
            and not connection.lock.locked()
        )

    @override
    def has_nothing_to_undo(self, connection: Any) -> bool:
        return bool(connection.pgconn.transaction_status == pq.TransactionStatus.IDLE)

    @override
    def let_stand_alone(self, adapted: Any) -> Callable[[Any], None] | None:
        connection = adapted.driver_connection
        # What set_autocommit() does of an idle connection, after it has waited for a lock that nobody holds.
        if connection._autocommit or connection._pipeline is not None or not self.is_idle(connection):  # noqa: SLF001  # see the docstring of the module
            return None
        connection._autocommit = True  # noqa: SLF001  # likewise
        return _with_begin

    @override
    async def clean(self, connection: Any, sql: str) -> None:
        autocommit = connection.autocommit
        await connection.set_autocommit(True)  # else psycopg would send BEGIN first
        try:
            await connection.execute(sql, prepare=False)
        finally:
            await connection.set_autocommit(autocommit)

    @override
    async def drain(self, connection: Any) -> bool:
        # Connection.wait() has done it, or has finished the connection.
        state = connection.pgconn.transaction_status
        free = state in _BETWEEN_OPERATIONS and not connection.lock.locked()
        if not free:
            self.sever(connection)
        return free

    @override
    def prepare_engine(self, engine: AsyncEngine, settings: Settings) -> None:
        # SQLAlchemy's psycopg cannot end a connection without awaiting, so one that the garbage collector found would
        # stay open, in its transaction. Ours can.
        dialect = engine.sync_engine.dialect
        dialect.has_terminate = True
        dialect.do_terminate = self._terminate  # type: ignore[method-assign]  # on this instance only
        roll_back = dialect.do_rollback

        # psycopg sends nothing either where there is nothing to undo; but it takes a lock, and a turn of the greenlet.
        def do_rollback(dbapi_connection: PoolProxiedConnection) -> None:
            if not self.has_nothing_to_undo(dbapi_connection.driver_connection):
                roll_back(dbapi_connection)

        dialect.do_rollback = do_rollback  # type: ignore[method-assign]  # likewise

    def _terminate(self, dbapi_connection: DBAPIConnection) -> None:
        self.sever(dbapi_connection.driver_connection)


def _with_begin(adapted: Any) -> None:
    """Undo ``let_stand_alone``. What may be open or under way is the pool's to judge, which comes next."""
    adapted.driver_connection._autocommit = False  # noqa: SLF001  # see the docstring of the module


def _readable(descriptor: int) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([descriptor], [], [], 0)[0])  # Windows


DRIVER: Final = PsycopgDriver()
