"""psycopg 3: connects, sees the COMMIT that the server turns into a rollback, severs, tells whether it is idle.

Private names of psycopg's, in this module only: ``AsyncConnection._exec_command``, by which it sends BEGIN, and
``_pipeline``, in which BEGIN may not be two statements.
"""

from __future__ import annotations

import math
import select
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import psycopg
from psycopg import errors, generators, pq
from typing_extensions import override

from stanch.drivers.base import (
    Driver,
    Plan,
    attempts,
    commit_refused,
    made_ours,
    reach,
    rides_on_begin,
    started_with,
)
from stanch.drivers.options import PSYCOPG, as_libpq_options, engine_options_of, gather, plain_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from stanch.settings import Settings

_LIBPQ: Final = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())
_PSYCOPGS: Final = frozenset({"cursor_factory", "prepare_threshold", "row_factory"})
OWN: Final = {name: kind for name, kind in PSYCOPG.items() if name in _LIBPQ | _PSYCOPGS}


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
            return made_ours(await self.theirs(*args, **parameters), Connection)
        # psycopg rounds up to 2 s and waits so long for each address; reach() keeps the time.
        parameters["connect_timeout"] = math.ceil(self.timeout) + 1
        return await Connection.connect(*args, **parameters)


class PsycopgDriver(Driver):
    """See `stanch.drivers.base.Driver`."""

    name: ClassVar[str] = "psycopg"
    read_only_options: ClassVar[Mapping[str, Any]] = {"postgresql_readonly": True}

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
            socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as second,
        ):
            second.shutdown(socket.SHUT_RDWR)
        with suppress(Exception):
            if not connection.lock.locked():  # nobody waits for it: psycopg would miss the close() and warn
                connection.pgconn.finish()

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
    def prepare_engine(self, engine: AsyncEngine, settings: Settings) -> None:
        # SQLAlchemy's psycopg cannot end a connection without awaiting, so one that the garbage collector found would
        # stay open, in its transaction. Ours can.
        dialect = engine.sync_engine.dialect
        dialect.has_terminate = True
        dialect.do_terminate = self._terminate  # type: ignore[method-assign]  # on this instance only

    def _terminate(self, dbapi_connection: DBAPIConnection) -> None:
        self.sever(dbapi_connection.driver_connection)


def _readable(descriptor: int) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([descriptor], [], [], 0)[0])  # Windows


DRIVER: Final = PsycopgDriver()
