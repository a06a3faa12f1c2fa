"""asyncpg: connects, sees the COMMIT that the server turned into a rollback, severs, tells whether it is idle.

asyncpg has no public word for "an operation is in progress". Private names, of asyncpg's and in this module only:
``Connection._protocol`` with its ``close_statement``, ``protocol.PreparedStatementState`` (see `_Probe`),
``Connection._top_xact`` and ``_config.command_timeout`` (see `Connection`), ``Connection._get_statement`` with the
``queries_count`` of its protocol (see `_awaits_sync`),
``Connection._cancel_current_command`` (see `_cancel_again`), ``Connection._executemany``,
``connect_utils.TLSUpgradeProto`` with its ``on_data`` (see `_TLSQuestion`), ``connect_utils._cancel`` with
``Connection._addr``, ``_params`` and ``backend_secret`` of its protocol (see ``sever_asking``), and
``Connection._transport``, of asyncio's own kind, with its ``_call_connection_lost`` (see ``sever``).
"""

from __future__ import annotations

import asyncio
import inspect
import select
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

import asyncpg  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it ships no types
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
from stanch.drivers.options import ASYNCPG, engine_options_of, gather, plain_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from stanch.drivers.options import Wishes
    from stanch.settings import Settings

_asyncpg: Final[Any] = asyncpg
_HANGUP: Final[int | None] = getattr(select, "POLLRDHUP", None)
"""Linux's way to see the end of a stream behind data that nobody has read; elsewhere the loop must notice."""

_PARAMETERS: Final = frozenset(inspect.signature(_asyncpg.connect).parameters)
_SQLALCHEMYS: Final = frozenset({"prepared_statement_cache_size", "prepared_statement_name_func"})
OWN: Final = {name: kind for name, kind in ASYNCPG.items() if name in _PARAMETERS | _SQLALCHEMYS}


class _TLSQuestion(_asyncpg.connect_utils.TLSUpgradeProto):  # type: ignore[misc]  # a class of asyncpg is of type Any
    """The question whether the server speaks TLS, whose failure is looked at also when nobody waits for the answer.

    asyncpg asks it for each connect and each CancelRequest. Cancelled in the one turn of the loop when TCP is
    connected and the answer not yet awaited, it leaves a future behind, and asyncio logs "Future exception was never
    retrieved" (asyncpg 0.30 to 0.32). Nothing can be handed in from outside, so its class is exchanged.
    """

    on_data: asyncio.Future[bool]

    def data_received(self, data: bytes) -> None:
        if not self.on_data.done():  # asyncpg before 0.32 does not ask, and fails if nobody waits any more
            _any(super()).data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        _any(super()).connection_lost(exc)
        if not self.on_data.cancelled():
            self.on_data.exception()  # whoever does wait is given it all the same


_asyncpg.connect_utils.TLSUpgradeProto = _TLSQuestion


_NOTHING: Final = "SELECT"
"""The least that ends what an unexecuted statement began; the answer to "" asyncpg (to 0.32) does not understand."""

_prepared: Final[WeakKeyDictionary[Any, int]] = WeakKeyDictionary()
"""How many statements a connection had executed when it last prepared one; its own class has no room for that."""


class Connection(asyncpg.Connection):  # type: ignore[misc]  # a class of asyncpg is of type Any
    """An asyncpg connection whose COMMIT raises `stanch.errors.CommitRefused` when the server rolled back.

    PostgreSQL answers COMMIT of an aborted transaction with the command tag ``ROLLBACK`` and no error (PostgreSQL
    manual, *COMMIT*). asyncpg, and with it SQLAlchemy, drops the tag.
    """

    __slots__ = ()

    @override
    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """As asyncpg; but a COMMIT that was none raises, and a BEGIN that fails leaves no transaction.

        Under a deadline BEGIN tells the server of it.
        """
        if query == "COMMIT;":
            # asyncpg's command_timeout would send a CancelRequest after a COMMIT; commit_timeout bounds it.
            timeout = None if _any(self)._config.command_timeout is None else 1e6  # noqa: SLF001  # see the docstring of the module
        begins = query.startswith("BEGIN")  # what asyncpg's Transaction.start() writes
        if begins:
            query += rides_on_begin(self)
        try:
            tag: str = await _any(super()).execute(query, *args, timeout=timeout)
        except BaseException:
            if begins:
                # asyncpg would take the next BEGIN for a savepoint, and SQLAlchemy has nothing to roll back.
                _any(self)._top_xact = None  # noqa: SLF001  # see the docstring of the module
                await run_to_completion(self._undo_begin())
            raise
        if query == "COMMIT;" and tag != "COMMIT":  # what asyncpg's Transaction.commit() writes
            raise commit_refused("the server")
        return tag

    async def _get_statement(self, *args: Any, **options: Any) -> Any:
        """As asyncpg, which prepares without a Sync; until one comes, the server is in a transaction."""
        try:
            return await _any(super())._get_statement(*args, **options)  # noqa: SLF001  # see the docstring of the module
        finally:
            if not self.is_closed():  # asyncpg has no protocol then
                _prepared[self] = _executed(self)

    async def _executemany(self, *args: Any, **options: Any) -> Any:
        """As asyncpg; but a cancellation is heard as well while it is still sending.

        asyncpg (to 0.32) goes on to wait then, for the answer to a Sync that it has not sent. So it is not told; the
        server is, at whose error asyncpg sends that Sync and no more of the rest.
        """
        sending = asyncio.create_task(_any(super())._executemany(*args, **options))  # noqa: SLF001  # see the docstring of the module
        try:
            await asyncio.wait((sending,))
        except asyncio.CancelledError:
            await run_to_completion(_over_in_time(sending, self, patience=0))
            raise
        return await sending

    async def _undo_begin(self) -> None:
        """Roll back what a cancelled BEGIN may have begun on the server all the same."""
        if await _free_in_time(self) and self.is_in_transaction():
            try:
                await _any(super()).execute("ROLLBACK;", timeout=DRAIN_TIMEOUT)
            except Exception:  # noqa: BLE001  # the failure of BEGIN is under way; this one costs the connection
                self.terminate()


def _executed(connection: Any) -> int:
    count: int = connection._protocol.queries_count  # noqa: SLF001  # see the docstring of the module
    return count


def _awaits_sync(connection: Any) -> bool:
    """Whether the last statement that was prepared on *connection* has not been executed, nor any since.

    What the server said last does not tell: it said so before. Where asyncpg has sent a Sync all the same, as after
    an error, the answer is yes too: another one does no harm.
    """
    return _prepared.get(connection) == _executed(connection)


@dataclass(frozen=True, slots=True)
class Opener:
    """What SQLAlchemy calls for each new connection."""

    timeout: float
    theirs: Callable[..., Awaitable[Any]] | None = None
    """The user's own way to open one; the class of what it gives is exchanged afterwards."""
    statement_timeout: float | None = None
    """What the server is told at the start."""

    async def __call__(self, *args: Any, **parameters: Any) -> Any:
        hosts, ports = (_listed(parameters.get(name)) for name in ("host", "port"))
        opened = await reach(
            attempts(partial(self._open, *args), parameters, hosts=hosts, ports=ports),
            timeout=self.timeout,
            refusals=(_asyncpg.PostgresError, _asyncpg.InterfaceError, _asyncpg.InternalClientError),
        )
        return started_with(opened, self.statement_timeout)

    async def _open(self, *args: Any, **parameters: Any) -> Any:
        if self.theirs is not None:
            return made_ours(await self.theirs(*args, **parameters), Connection)
        theirs = parameters.pop("connection_class", _asyncpg.Connection)
        parameters["timeout"] = None  # reach() keeps the time
        return await _asyncpg.connect(*args, connection_class=combined(Connection, theirs), **parameters)


def _listed(value: Any) -> list[Any]:
    return [*cast("list[Any]", value)] if isinstance(value, list | tuple) else [value]


def _any(value: object) -> Any:
    return value


class _Probe:
    """Asks a connection for something that it refuses before it sends anything, and looks at how it refuses.

    ``close_statement`` first makes sure that no operation is in progress and none is being cancelled, and then that
    the statement is not in use; ours always is. Anything but that last refusal means: not free. Costs 3 µs.
    """

    _statement: ClassVar[Any] = None

    @classmethod
    def finds_free(cls, connection: Any) -> bool:
        """Whether nothing is going on in *connection*, which is open."""
        asked = cls._ask(connection)
        try:
            asked.send(None)
        except _asyncpg.InternalClientError:
            return True
        except Exception:  # noqa: BLE001  # in use, closed, or another asyncpg: whatever it is, it is not free
            return False
        else:
            return False  # it waits for a cancelled operation to end
        finally:
            asked.close()

    @classmethod
    async def waits_until_free(cls, connection: Any) -> bool:
        """The same, once the server has answered a cancelled operation; asyncpg cancels it there by itself."""
        try:
            await cls._ask(connection)
        except _asyncpg.InternalClientError:
            return True
        return False

    @classmethod
    def _ask(cls, connection: Any) -> Any:
        protocol = connection._protocol  # noqa: SLF001  # see the docstring of the module
        if cls._statement is None:
            no_custom_codec = False
            cls._statement = _asyncpg.protocol.protocol.PreparedStatementState(
                "", "", protocol, _asyncpg.Record, no_custom_codec
            )
            cls._statement.attach()
        return protocol.close_statement(cls._statement, None)


async def _free_in_time(connection: Any) -> bool:
    """Whether *connection* is free within ``DRAIN_TIMEOUT`` seconds; if not, it is terminated."""
    asked = asyncio.create_task(_Probe.waits_until_free(connection))
    # asyncpg has sent a CancelRequest itself.
    if await _over_in_time(asked, connection, patience=CANCEL_INTERVAL):
        with suppress(Exception):  # lost, or another asyncpg: whatever it is, it is not free
            if asked.result():
                return True
        connection.terminate()
    return False


async def _over_in_time(operation: asyncio.Task[Any], connection: Any, *, patience: float) -> bool:
    """Whether *operation* is over within ``DRAIN_TIMEOUT`` seconds, well or not; if not, *connection* is terminated.

    The server is asked to cancel it after *patience* seconds, and then again and again.
    """
    operation.add_done_callback(_look_at)
    with suppress(Exception):  # too late, or the server cannot be asked
        async with asyncio.timeout(DRAIN_TIMEOUT):
            while not (await asyncio.wait((operation,), timeout=patience))[0]:
                await _cancel_again(connection)
                patience = CANCEL_INTERVAL
            return True
    operation.cancel()
    connection.terminate()
    return False


def _look_at(operation: asyncio.Task[Any]) -> None:
    """Look at how *operation* has ended, so that asyncio does not say that nobody has."""
    if not operation.cancelled():
        operation.exception()


async def _cancel_again(connection: Any) -> None:
    """Send another CancelRequest: asyncpg's own may have overtaken its statement and found nothing to cancel."""
    sent = asyncio.get_running_loop().create_future()
    connection._cancel_current_command(sent)  # noqa: SLF001  # see the docstring of the module
    # Whatever is said on this connection next, it must not meet a cancellation that was for this statement.
    await sent


class AsyncpgDriver(Driver):
    """See `stanch.drivers.base.Driver`."""

    name: ClassVar[str] = "asyncpg"
    read_only_options: ClassVar[Mapping[str, Any]] = {"postgresql_readonly": True}
    reader_options: ClassVar[Mapping[str, Any]] = {"isolation_level": "AUTOCOMMIT"}

    @override
    def plan(self, url: URL, settings: Settings) -> Plan:
        wishes = gather(url, settings, driver=self.name, own=OWN)
        connect_args = {**wishes.plain, **wishes.own, **_tls(wishes)}
        if wishes.server:
            connect_args["server_settings"] = dict(wishes.server)
        if settings.pooler is not None:
            connect_args |= _without_names(connect_args)
        connect_args["async_creator_fn"] = Opener(
            wishes.timeout, connect_args.get("async_creator_fn"), wishes.statement_timeout
        )
        options = engine_options_of(settings)
        if options.get("isolation_level") == "READ UNCOMMITTED":
            # The same to PostgreSQL; SQLAlchemy's asyncpg dialect does not know the other.
            options["isolation_level"] = "READ COMMITTED"
        return Plan(plain_url(url, self.name), connect_args, options, settings)

    @override
    def adopt(self, connect_args: dict[str, Any], settings: Settings) -> None:
        theirs = connect_args.get("async_creator_fn")
        if not isinstance(theirs, Opener):
            connect_args["async_creator_fn"] = Opener(settings.connect_timeout, theirs)

    @override
    def sever(self, connection: Any) -> None:
        try:
            connection.terminate()
            # asyncpg 0.30 leaves it open if close() is under way, which then waits for ever.
            connection._transport.abort()  # noqa: SLF001  # see the docstring of the module
        except Exception:  # noqa: BLE001  # its loop is closed: what the loop would have called is called here
            with suppress(Exception):
                connection._transport._call_connection_lost(None)  # noqa: SLF001  # see the docstring of the module

    @override
    def sever_asking(self, connection: Any) -> Callable[[], Awaitable[object]] | None:
        request = None
        with suppress(Exception):  # no running loop, a proxy, or another asyncpg: then severing must do
            if not (connection.is_closed() or _Probe.finds_free(connection)):
                protocol = connection._protocol  # noqa: SLF001  # see the docstring of the module
                ask = partial(
                    _asyncpg.connect_utils._cancel,  # noqa: SLF001  # likewise
                    loop=asyncio.get_running_loop(),
                    addr=connection._addr,  # noqa: SLF001  # likewise
                    params=connection._params,  # noqa: SLF001  # likewise
                    backend_pid=protocol.backend_pid,
                    backend_secret=protocol.backend_secret,
                )
                link = second_link(connection._transport.get_extra_info("socket").fileno())  # noqa: SLF001  # likewise
                request = partial(asked_over, link, ask)
                connection._transport.abort()  # noqa: SLF001  # first, or terminate() would still say goodbye over the link
        self.sever(connection)
        return request

    @override
    def looks_dead(self, connection: Any) -> bool:
        return bool(connection.is_closed()) or _hung_up(connection)

    @override
    def is_idle(self, connection: Any) -> bool:
        return self._stands_free(connection) and not _awaits_sync(connection)

    @override
    def is_unfinished(self, connection: Any) -> bool:
        return self._stands_free(connection) and _awaits_sync(connection)

    def _stands_free(self, connection: Any) -> bool:
        return self.has_nothing_to_undo(connection) and _Probe.finds_free(connection)

    @override
    def has_nothing_to_undo(self, connection: Any) -> bool:
        return not (connection.is_closed() or connection.is_in_transaction())

    @override
    def let_stand_alone(self, adapted: Any) -> Callable[[Any], None] | None:
        if adapted.isolation_level is not None:
            return None  # it is the user's own, and SQLAlchemy knows what to go back to
        adapted.set_isolation_level("autocommit")
        return _with_begin

    @override
    async def clean(self, connection: Any, sql: str) -> None:
        await connection.execute(sql or _NOTHING)

    @override
    async def drain(self, connection: Any) -> bool:
        if not await _free_in_time(connection):
            return False
        if self.is_unfinished(connection):
            try:
                await connection.execute(_NOTHING, timeout=DRAIN_TIMEOUT)
            except Exception:  # noqa: BLE001  # whatever it is: in which state the server is nobody knows
                connection.terminate()
                return False
        return True

    @override
    def prepare_engine(self, engine: AsyncEngine, settings: Settings) -> None:
        pass


def _with_begin(adapted: Any) -> None:
    """Undo ``let_stand_alone``: a transaction has the level that the server begins one with."""
    adapted.set_isolation_level(None)


def _hung_up(connection: Any) -> bool:
    """Whether the server has closed its side, although the event loop had no turn yet to notice. Costs 2 µs."""
    if _HANGUP is None:
        return False
    poll = select.poll()
    try:
        poll.register(connection._transport.get_extra_info("socket"), _HANGUP)  # noqa: SLF001  # as above
        return bool(poll.poll(0))
    except (OSError, ValueError, TypeError, AttributeError):  # closed, or a transport without a socket
        return False


def _tls(wishes: Wishes) -> dict[str, Any]:
    """In asyncpg's words: it takes ``sslmode`` as ``ssl``, and the files only in a DSN."""
    files = dict(wishes.tls)
    mode = files.pop("sslmode", None)
    # libpq's word for the authorities the system trusts; it verifies all.
    if files.get("sslrootcert") == "system":
        return {"ssl": True}
    given = {"ssl": mode} if mode is not None else {}
    return {**given, "dsn": "postgresql://?" + urlencode(files)} if files else given


def _without_names(connect_args: Mapping[str, Any]) -> dict[str, Any]:
    """No statement that outlives its transaction: the next one may run on another server connection.

    The unnamed statement, unlike one with a name of its own, also leaves nothing behind on the server.
    """
    return {
        "statement_cache_size": connect_args.get("statement_cache_size", 0),
        "prepared_statement_cache_size": connect_args.get("prepared_statement_cache_size", 0),
        "prepared_statement_name_func": connect_args.get("prepared_statement_name_func", str),  # str() is ""
    }


DRIVER: Final = AsyncpgDriver()
