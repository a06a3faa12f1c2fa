"""A statement that was prepared and never executed leaves nothing open behind the next holder's back.

Parse begins a transaction on the server that lasts until the next Sync (PostgreSQL manual, *Message Flow*, "Extended
Query"). asyncpg prepares without a Sync: what comes in between leaves the server with locks and a snapshot, while
its last answer was "idle".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from typing_extensions import override

from stanch import Database
from stanch.events import ConnectionSevered, Event
from tests.support import cleaned
from tests.support.judge import ACTIVITY, FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, at_statement, statement_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

PID = text("SELECT pg_backend_pid()")
READ = text("SELECT id FROM rows WHERE id = CAST(:id AS int)")
LOCKED = "SELECT pid FROM pg_locks WHERE relation = 'rows'::regclass"


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@pytest.fixture
async def db(rows: FreshDatabase, driver: str) -> AsyncIterator[Database[Any]]:
    async with Database(rows.url(driver), pool_size=1, max_overflow=0) as db:
        yield db


async def pid_of(db: Database[Any]) -> int:
    async with db.connect() as connection:
        return int(await connection.scalar(PID) or 0)


async def inner_of(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


async def assert_free(rows: FreshDatabase, db: Database[Any], pid: int) -> None:
    """The server says that *pid*, which is in the pool, is idle, and whoever comes next may begin as it likes."""
    [row] = await rows.fetch(ACTIVITY)
    assert (row["pid"], row["state"], row["xact_start"]) == (pid, "idle", None)
    assert await rows.fetch(LOCKED) == []
    await assert_nothing_left(rows, db)
    async with db.transaction(isolation_level="SERIALIZABLE") as session:
        assert await session.scalar(PID) == pid
        assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"


# Cancelled in the turn of the loop in which the answer to Parse and Describe comes -------------------------------


class Interposed(asyncio.Protocol):
    """Between a transport and asyncpg: cancels *task* right before or after asyncpg has seen its statement described.

    Earlier, asyncpg sends a Sync together with its CancelRequest; in this turn it takes the statement for done.
    """

    def __init__(self, transport: asyncio.Transport, task: asyncio.Task[None], moment: str) -> None:
        self._transport = transport
        self._inner: Any = transport.get_protocol()
        self._task = task
        self._moment = moment
        self.hits = 0
        transport.set_protocol(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @override
    def data_received(self, data: bytes) -> None:
        described = data.startswith(b"1") and b"T" in data
        if described and self._moment == "before":
            self._task.cancel()
        self._inner.data_received(data)
        if described and self._moment == "after":
            self._task.cancel()
        if described:
            self.hits += 1
            self._transport.set_protocol(self._inner)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)


async def read_alone(connection: AsyncConnection) -> None:
    await connection.execute(READ, {"id": 1})


async def read_by_hand(connection: AsyncConnection) -> None:
    """Past SQLAlchemy, whose error handling hears nothing of it."""
    await (await inner_of(connection)).fetch("SELECT id FROM rows WHERE id = $1", 1)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("read", [read_alone, read_by_hand], ids=lambda read: read.__name__)
async def test_cancelled_as_it_was_prepared_a_statement_leaves_no_transaction(
    rows: FreshDatabase, moment: str, read: Any
) -> None:
    async with Database(rows.url("asyncpg"), pool_size=1, max_overflow=0) as db:
        pid = await pid_of(db)

        async def work() -> None:
            async with db.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                task = asyncio.current_task()
                assert task is not None
                interposed.append(Interposed((await inner_of(connection))._transport, task, moment))
                await read(connection)

        interposed: list[Interposed] = []
        task = asyncio.create_task(work())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert interposed[0].hits == 1, "the cancellation did hit its moment"
        await assert_free(rows, db, pid)


async def test_cancelled_while_the_answer_to_parse_is_under_way_a_statement_leaves_no_transaction(
    rows: FreshDatabase, driver: str
) -> None:
    async with FaultProxy(rows.server.port) as proxy:
        url = proxy.through(rows.url(driver)) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0) as db:
            pid = await pid_of(db)
            proxy.delay(0.02)

            async def work() -> None:
                async with db.reader() as session:
                    await session.execute(READ, {"id": 1})

            task = asyncio.create_task(work())

            def judge(kind: str, payload: bytes) -> Verdict:
                if "FROM rows" in (statement_of(kind, payload) or ""):
                    task.cancel()
                return Verdict.FORWARD

            proxy.on_client_message = judge
            with pytest.raises(asyncio.CancelledError):
                await task
            proxy.pass_through()
            await assert_free(rows, db, pid)


async def test_whoever_goes_on_after_such_a_cancellation_finds_no_transaction(rows: FreshDatabase) -> None:
    """The same connection, before it has been returned."""
    async with Database(rows.url("asyncpg"), pool_size=1, max_overflow=0) as db, db.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        task = asyncio.current_task()
        assert task is not None
        interposed = Interposed((await inner_of(connection))._transport, task, "after")
        with pytest.raises(asyncio.CancelledError):
            await read_alone(connection)
        task.uncancel()
        assert interposed.hits == 1
        [row] = await rows.fetch(ACTIVITY)
        assert (row["state"], row["xact_start"]) == ("idle", None)


# Prepared, and then not executed, with nobody cancelled ----------------------------------------------------------


async def test_value_that_the_driver_refuses_leaves_no_transaction(
    rows: FreshDatabase, db: Database[Any], driver: str
) -> None:
    """It does so once it has prepared the statement, and then asyncpg sends nothing."""
    pid = await pid_of(db)
    happened: list[Event] = []
    db.observe(happened.append)
    for _ in range(2):
        with pytest.raises(DBAPIError):
            async with db.reader() as session:
                await session.execute(READ, {"id": "no number"})
        await assert_free(rows, db, pid)
    assert not [event for event in happened if isinstance(event, ConnectionSevered)]


async def test_statement_prepared_by_hand_and_left_leaves_no_transaction(rows: FreshDatabase) -> None:
    async with Database(rows.url("asyncpg"), pool_size=1, max_overflow=0) as db:
        async with db.connect() as connection:
            inner = await inner_of(connection)
            pid = inner.get_server_pid()
            await inner.prepare("SELECT id FROM rows")
        await assert_free(rows, db, pid)


async def test_statement_that_the_server_refuses_leaves_no_transaction(
    rows: FreshDatabase, db: Database[Any]
) -> None:
    pid = await pid_of(db)
    for wrong in (
        "SELECT FROM WHERE",
        "SELECT id FROM nowhere",
        "SELECT 1 / (id - id) FROM generate_series(1, 1) id",
    ):
        with pytest.raises(DBAPIError):
            async with db.reader() as session:
                await session.execute(text(wrong))
        await assert_free(rows, db, pid)


# What cannot be ended --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("go_on", [False, True], ids=["returned", "cancelled"])
async def test_what_cannot_be_ended_in_time_costs_its_connection_once(
    rows: FreshDatabase, go_on: bool
) -> None:
    """A server that does not answer: nobody waits for it for long, and nobody is lent what may be in a transaction."""
    severed: list[ConnectionSevered] = []

    def note(event: Event) -> None:
        if isinstance(event, ConnectionSevered):
            severed.append(event)

    async with FaultProxy(rows.server.port) as proxy:
        url = proxy.through(rows.url("asyncpg")) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0, close_timeout=0.3) as db:
            db.observe(note)
            pid = await pid_of(db)
            proxy.on_client_message = at_statement("SELECT$", Verdict.LOSE)
            async with db.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                if go_on:
                    task = asyncio.current_task()
                    assert task is not None
                    Interposed((await inner_of(connection))._transport, task, "after")
                    with pytest.raises(asyncio.CancelledError):
                        await read_alone(connection)
                    task.uncancel()
                else:
                    with pytest.raises(DBAPIError):
                        await connection.execute(READ, {"id": "no number"})
            assert proxy.verdicts[Verdict.LOSE] == 1
            assert await pid_of(db) != pid
            await assert_nothing_left(rows, db)
            assert len(severed) == (0 if go_on else 1), "SQLAlchemy has told whoever was cancelled"
    await until(rows, "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)


async def test_connection_that_is_lost_while_a_statement_is_prepared_is_what_its_holder_is_told(
    rows: FreshDatabase,
) -> None:
    async with FaultProxy(rows.server.port) as proxy:
        url = proxy.through(rows.url("asyncpg")) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0) as db, db.connect() as connection:
            inner = await inner_of(connection)
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            held = asyncio.Event()

            def judge(kind: str, payload: bytes) -> Verdict:
                if "FROM rows" not in (statement_of(kind, payload) or ""):
                    return Verdict.FORWARD
                held.set()
                return Verdict.LOSE

            proxy.on_client_message = judge
            task = asyncio.create_task(connection.execute(READ, {"id": 1}))
            await held.wait()
            inner.terminate()
            with pytest.raises(DBAPIError) as caught:
                await task
            assert caught.value.connection_invalidated


async def test_end_that_the_server_refuses_costs_the_connection_once(
    rows: FreshDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    severed: list[Event] = []
    async with Database(rows.url("asyncpg"), pool_size=1, max_overflow=0) as db:
        db.observe(lambda event: severed.append(event) if isinstance(event, ConnectionSevered) else None)
        pid = await pid_of(db)
        monkeypatch.setattr("stanch.drivers.asyncpg._NOTHING", "SELECT nothing")
        with pytest.raises(DBAPIError):
            async with db.reader() as session:
                await session.execute(READ, {"id": "no number"})
        assert await pid_of(db) != pid
        assert len(severed) == 1
