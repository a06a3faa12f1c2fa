"""What was true of the server is not true any more: stopped, silent or demoted, it costs a bounded number of errors."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from stanch import Database
from stanch.embedded import EmbeddedPostgres
from stanch.sqlstate import READ_ONLY_TRANSACTION, sqlstate_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

PID = text("SELECT pg_backend_pid()")
WRITE = text("INSERT INTO rows VALUES (:id)")
PING_TIMEOUT = 0.4
"""Seconds for a connect, and for a ping."""


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@pytest.fixture(scope="module")
def fragile() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be restarted."""
    with EmbeddedPostgres() as server:
        yield server


@asynccontextmanager
async def proxied(
    judged: FreshDatabase, driver: str, **settings: Any
) -> AsyncGenerator[tuple[FaultProxy, Database[Any]]]:
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        chosen: dict[str, Any] = {
            "pool_size": 2,
            "max_overflow": 0,
            "connect_timeout": PING_TIMEOUT,
            "close_timeout": PING_TIMEOUT,
            **settings,
        }
        async with Database(url, **chosen) as db:
            yield proxy, db


async def warm(db: Database[Any], number: int) -> set[int]:
    """Open *number* connections, and leave them idle; returns their backends."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(db.connect()) for _ in range(number)]
        return {int(await connection.scalar(PID) or 0) for connection in connections}


async def write(db: Database[Any], number: int) -> None:
    async with db.transaction() as session:
        await session.execute(WRITE, {"id": number})


# The server stops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fast", "crash"])
async def test_an_idle_pool_survives_a_restart_of_the_server(
    fragile: EmbeddedPostgres, driver: str, how: str
) -> None:
    async with Database(fragile.url(driver), pool_size=5, max_overflow=0) as db:
        before = await warm(db, 5)
        if how == "fast":
            await asyncio.to_thread(fragile.restart)
        else:
            await asyncio.to_thread(fragile.crash)
            await asyncio.to_thread(fragile.start)
        after = set[int]()

        async def request() -> None:
            async with db.transaction() as session:
                after.add(int(await session.scalar(PID) or 0))

        await asyncio.gather(*(request() for _ in range(20)))
        assert not before & after


@pytest.mark.parametrize("state", ["57P01", "57P02", "57P03", "08000", "08003", "08006", "08P01"])
async def test_the_servers_last_words_outdate_the_whole_pool(
    rows: FreshDatabase, driver: str, state: str
) -> None:
    """Also while the connection that heard them still looks open."""
    async with Database(rows.url(driver), pool_size=3, max_overflow=0) as db:
        before = await warm(db, 3)
        with pytest.raises(DBAPIError) as caught:
            async with db.transaction() as session:
                await session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}'; END $$"))
        assert sqlstate_of(caught.value) == state
        assert not before & await warm(db, 3)
        await assert_nothing_left(rows, db)


async def test_other_errors_outdate_nothing(rows: FreshDatabase, driver: str) -> None:
    async with Database(rows.url(driver), pool_size=3, max_overflow=0) as db:
        before = await warm(db, 3)
        for state in ("23505", "40001", "57014", "P0001"):
            with pytest.raises(DBAPIError):
                async with db.transaction() as session:
                    await session.execute(
                        text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}'; END $$")
                    )
        assert before == await warm(db, 3)


async def test_one_terminated_backend_costs_one_error_and_no_more(rows: FreshDatabase, driver: str) -> None:
    async with Database(rows.url(driver), pool_size=3, max_overflow=0) as db:
        await warm(db, 3)
        with pytest.raises(DBAPIError):
            async with db.transaction() as session:
                await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(1)"))
        await asyncio.gather(*(write(db, number) for number in range(9)))
        assert await rows.fetchval("SELECT count(*) FROM rows") == 9


# The line falls silent --------------------------------------------------------------------------------------


async def idle_for(seconds: float) -> None:
    """Nothing happens meanwhile: here the length of time itself is what is tested."""
    await asyncio.sleep(seconds)


async def test_a_connection_that_fell_silent_while_idle_is_replaced_without_an_error(
    rows: FreshDatabase, driver: str
) -> None:
    """One ping is lost, the link stays open. The other idle connections are not asked in their turn."""
    async with proxied(rows, driver, ping_after=0.05) as (proxy, db):
        before = await warm(db, 2)
        await idle_for(0.1)
        proxy.forget()
        proxy.on_client_message = lambda _kind, _payload: (
            Verdict.FORWARD if proxy.verdicts[Verdict.LOSE] else Verdict.LOSE
        )
        begun = time.monotonic()
        async with asyncio.timeout(10):
            await write(db, 1)
        took = time.monotonic() - begun
        assert proxy.verdicts[Verdict.LOSE] == 1
        assert PING_TIMEOUT <= took < PING_TIMEOUT + 2
        assert not before & await warm(db, 2)
        await assert_nothing_left(rows, db)
    assert await rows.fetchval("SELECT count(*) FROM rows") == 1


async def test_a_caller_who_has_no_time_for_the_ping_costs_the_others_nothing(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver, ping_after=0.05) as (proxy, db):
        before = await warm(db, 2)
        await idle_for(0.1)
        proxy.forget()
        proxy.on_client_message = lambda _kind, _payload: (
            Verdict.FORWARD if proxy.verdicts[Verdict.LOSE] else Verdict.LOSE
        )
        with pytest.raises(SQLAlchemyError):
            async with db.transaction(timeout=0.1) as session:
                await session.execute(text("SELECT 1"))
        assert proxy.verdicts[Verdict.LOSE] == 1
        assert len(before & await warm(db, 2)) == 1, "only the one that was asked is gone"
        await assert_nothing_left(rows, db)


async def test_a_connection_that_was_reset_while_idle_is_replaced_without_an_error(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        before = await warm(db, 2)
        proxy.cut()
        await asyncio.gather(*(write(db, number) for number in range(8)))
        assert not before & await warm(db, 2)
    assert await rows.fetchval("SELECT count(*) FROM rows") == 8


async def test_only_a_connection_that_was_long_idle_is_pinged_and_only_once(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver, ping_after=0.3) as (proxy, db):

        async def round_trips() -> int:
            proxy.forget()
            async with db.connect():
                pass
            return proxy.round_trips

        await warm(db, 1)
        assert await round_trips() == 0, "a checkout asks nobody"
        await idle_for(0.35)
        assert await round_trips() > 0
        assert await round_trips() == 0, "it has just answered"
    async with proxied(rows, driver, ping_after=-1) as (proxy, db):
        await warm(db, 1)
        await idle_for(0.1)
        proxy.forget()
        async with db.connect():
            pass
        assert proxy.round_trips == 0


async def test_a_ping_that_is_cancelled_gives_the_place_back(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver, ping_after=0.05, pool_size=1) as (proxy, db):
        await warm(db, 1)
        await idle_for(0.1)
        task = asyncio.create_task(write(db, 1))

        def judge(_kind: str, _payload: bytes) -> Verdict:
            task.cancel()
            return Verdict.FORWARD

        proxy.on_client_message = judge
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.on_client_message = lambda _kind, _payload: Verdict.FORWARD
        assert (db.stats().in_use, db.stats().waiting) == (0, 0)
        await write(db, 2)
    assert [row["id"] for row in await rows.fetch("SELECT id FROM rows")] == [2]


# The primary is none any more -------------------------------------------------------------------------------


async def test_a_demoted_primary_costs_at_most_one_error_for_each_connection(
    rows: FreshDatabase, driver: str
) -> None:
    """It answers pings and refuses writes; whoever connects anew reaches the new primary."""
    size = 5
    read_only = f'ALTER DATABASE "{rows.name}" SET default_transaction_read_only ='
    await rows.execute(f"{read_only} on")
    async with Database(rows.url(driver), pool_size=size, max_overflow=0, ping_after=0.05) as db:
        old = await warm(db, size)
        await rows.execute(f"{read_only} off")
        await idle_for(0.1)
        outcomes = await asyncio.gather(*(write(db, number) for number in range(20)), return_exceptions=True)
        errors = [error for error in outcomes if error is not None]
        assert 1 <= len(errors) <= size
        assert {sqlstate_of(error) for error in errors} == {READ_ONLY_TRANSACTION}
        await asyncio.gather(*(write(db, number) for number in range(20, 40)))
        for pid in old:
            await until(rows, "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)
    assert await rows.fetchval("SELECT count(*) FROM rows") == 40 - len(errors)
