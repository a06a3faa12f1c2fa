"""The proxy loses exactly what it is told to lose, on both drivers, and counts what went by."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tests.support.judge import FreshDatabase, assert_nothing_left, raw_connect, until
from tests.support.proxy import FaultProxy, Mode, Verdict, at_commit, at_statement, statement_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from stanch.embedded import EmbeddedPostgres

pytestmark = pytest.mark.anyio

MOMENT = 0.3
"""Seconds in which a healthy loopback connection has answered many times over."""

PATIENCE = 10.0
"""Seconds until something must have happened."""

SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
STARTUP = b"\0\0\0\x17\0\3\0\0user\0postgres\0\0"

DISCONNECTS = (OSError, DBAPIError, asyncio.IncompleteReadError)


@pytest.fixture
async def proxy(postgres: EmbeddedPostgres, anyio_backend: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
async def engine(
    proxy: FaultProxy, fresh_database: FreshDatabase, driver: str, anyio_backend: str
) -> AsyncIterator[AsyncEngine]:
    """Through the proxy, with a table ``t``; each connection is new."""
    await fresh_database.execute("CREATE TABLE t (n int)")
    engine = create_async_engine(proxy.through(fresh_database.url(driver)), poolclass=NullPool)
    yield engine
    proxy.pass_through()
    await engine.dispose()


async def unanswered(waiting: Awaitable[Any]) -> asyncio.Future[Any]:
    """The task that waits, after a moment in which it got no answer."""
    task = asyncio.ensure_future(waiting)
    await asyncio.wait({task}, timeout=MOMENT)
    assert not task.done(), "it was answered"
    return task


async def insert(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO t VALUES (1)"))


async def rows(database: FreshDatabase) -> int:
    return int(await database.fetchval("SELECT count(*) FROM t"))


# Modes ----------------------------------------------------------------------------------------------------


async def test_it_hands_everything_on(
    engine: AsyncEngine, proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    big = "x" * 1_000_000
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT length(:big)"), {"big": big}) == len(big)
        assert await connection.scalar(text("SELECT repeat('y', 1000000)")) == "y" * 1_000_000
        assert proxy.open_connections == 1
    await insert(engine)
    assert await rows(fresh_database) == 1
    assert proxy.connections == 2
    assert [query.strip(";").upper() for query in proxy.queries].count("COMMIT") == 1
    assert set(proxy.verdicts) == {Verdict.FORWARD}
    assert repr(proxy).startswith("<FaultProxy pass, ")
    await until(
        fresh_database,
        "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend')",
    )


async def test_a_black_hole_holds_everything_back_until_it_closes(
    engine: AsyncEngine, proxy: FaultProxy
) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        with proxy.blackholed():
            assert proxy.mode is Mode.BLACKHOLE
            old = await unanswered(connection.scalar(text("SELECT 2")))
            new = await unanswered(engine.connect().start())
        assert await asyncio.wait_for(old, PATIENCE) == 2
        await (await asyncio.wait_for(new, PATIENCE)).close()


async def test_the_server_does_not_hear_of_a_client_that_leaves_in_a_black_hole(
    proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    client = await raw_connect(proxy.through(fresh_database.url(None)))
    proxy.blackhole()
    pid = client.get_server_pid()
    client.terminate()
    await asyncio.sleep(MOMENT)
    assert len(await fresh_database.activity()) == 1
    proxy.pass_through()
    gone = "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"
    await until(fresh_database, gone, pid)


@pytest.mark.parametrize("greeting", [SSL_REQUEST, STARTUP], ids=["handshake", "login"])
@pytest.mark.parametrize("farewell", [b"", b"X\0\0\0\4"], ids=["silent", "polite"])
async def test_a_link_whose_client_hangs_up_in_a_black_hole_stands_until_it_closes(
    proxy: FaultProxy, greeting: bytes, farewell: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(greeting)
    assert await asyncio.wait_for(reader.readexactly(1), PATIENCE) in (b"N", b"R")
    with proxy.blackholed():
        writer.write(farewell)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await asyncio.sleep(MOMENT)
        assert proxy.open_connections == 1
    async with asyncio.timeout(PATIENCE):
        while proxy.open_connections:  # noqa: ASYNC110  # the server's end is in another process
            await asyncio.sleep(0.01)


async def test_a_deaf_proxy_serves_old_connections_and_answers_no_new_one(
    engine: AsyncEngine, proxy: FaultProxy
) -> None:
    async with engine.connect() as connection:
        proxy.deafen()
        assert await connection.scalar(text("SELECT 1")) == 1
        new = await unanswered(engine.connect().start())
        assert proxy.connections == 2
        assert await connection.scalar(text("SELECT 2")) == 2
        proxy.pass_through()
        await (await asyncio.wait_for(new, PATIENCE)).close()


async def test_a_reset_ends_old_and_new_connections_at_once(
    engine: AsyncEngine, proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    connection = await engine.connect()
    await connection.execute(text("INSERT INTO t VALUES (1)"))
    proxy.reset()
    with pytest.raises(DISCONNECTS):
        await asyncio.wait_for(connection.execute(text("SELECT 1")), PATIENCE)
    await connection.close()
    with pytest.raises(DISCONNECTS):
        await asyncio.wait_for(engine.connect().start(), PATIENCE)
    proxy.pass_through()
    await insert(engine)
    assert await rows(fresh_database) == 1
    await assert_nothing_left(fresh_database)


async def test_a_cut_ends_old_connections_only(engine: AsyncEngine, proxy: FaultProxy) -> None:
    connection = await engine.connect()
    await connection.execute(text("SELECT 1"))
    proxy.cut()
    with pytest.raises(DISCONNECTS):
        await asyncio.wait_for(connection.execute(text("SELECT 1")), PATIENCE)
    await connection.close()
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 2")) == 2


async def test_a_delay_makes_a_round_trip_that_much_longer(engine: AsyncEngine, proxy: FaultProxy) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))  # asyncpg prepares it here
        proxy.delay(MOMENT)
        trips, begun = proxy.round_trips, time.monotonic()
        assert await connection.scalar(text("SELECT 1")) == 1
        took = time.monotonic() - begun
        assert proxy.round_trips == trips + 1
        assert MOMENT <= took < MOMENT + PATIENCE
        proxy.pass_through()


async def test_a_server_that_cannot_be_reached_resets_the_client(
    proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    async with FaultProxy(upstream_port=1) as nowhere:
        with pytest.raises(OSError, match=r"reset|closed"):
            await raw_connect(nowhere.through(fresh_database.url(None)))
        assert nowhere.connections >= 1


# One message ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "stored"),
    [(Verdict.CUT, 0), (Verdict.CUT_ANSWER, 1), (Verdict.LOSE, 0), (Verdict.LOSE_ANSWER, 1)],
    ids=lambda value: value.name.lower() if isinstance(value, Verdict) else "",
)
async def test_a_commit_is_lost_on_the_way_there_or_on_the_way_back(
    engine: AsyncEngine, proxy: FaultProxy, fresh_database: FreshDatabase, verdict: Verdict, stored: int
) -> None:
    """Four ways to leave a client in doubt; the judge knows which it was."""
    await insert(engine)
    await fresh_database.execute("DELETE FROM t")
    proxy.on_client_message = at_commit(verdict)
    if verdict in (Verdict.CUT, Verdict.CUT_ANSWER):
        with pytest.raises(DISCONNECTS):
            await asyncio.wait_for(insert(engine), PATIENCE)
    else:
        waiting = await unanswered(insert(engine))
        assert await rows(fresh_database) == stored
        assert [row["state"] for row in await fresh_database.activity()] == [
            "idle" if stored else "idle in transaction"
        ]
        proxy.cut()
        with pytest.raises(DISCONNECTS):
            await asyncio.wait_for(waiting, PATIENCE)
    assert proxy.verdicts[verdict] == 1
    await assert_nothing_left(fresh_database)
    assert await rows(fresh_database) == stored
    await insert(engine)
    assert await rows(fresh_database) == stored + 1, "one fault was ordered, the next commit is fine"


async def test_any_statement_can_be_hit_and_more_than_once(engine: AsyncEngine, proxy: FaultProxy) -> None:
    proxy.on_client_message = at_statement("insert into t", Verdict.CUT, times=2)
    for _ in range(2):
        with pytest.raises(DISCONNECTS):
            await insert(engine)
    await insert(engine)
    assert proxy.verdicts[Verdict.CUT] == 2
    assert sum("INSERT INTO t" in statement for statement in [*proxy.queries, *proxy.parsed]) == 3


async def test_a_hook_that_fails_cuts_the_link_and_is_raised_at_the_end(postgres: EmbeddedPostgres) -> None:
    def stumble(kind: str, payload: bytes) -> Verdict:
        assert statement_of(kind, payload) != "SELECT 1", "the hook's own mistake"
        return Verdict.FORWARD

    with pytest.raises(AssertionError, match="the hook's own mistake"):
        async with FaultProxy(postgres.port) as proxy:
            proxy.on_client_message = stumble
            client = await raw_connect(proxy.through(postgres.url(None)))
            with contextlib.suppress(*DISCONNECTS, Exception):
                await client.execute("SELECT 1")
            assert client.is_closed()


# Counters -------------------------------------------------------------------------------------------------


async def test_round_trips_of_asyncpg_are_counted_as_it_waits_for_them(
    proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    client = await raw_connect(proxy.through(fresh_database.url(None)))
    assert proxy.round_trips == 0, "logging in is no round trip"
    await client.execute("BEGIN")
    assert proxy.round_trips == 1
    await client.fetch("SELECT $1::int", 1)
    assert proxy.round_trips == 3, "prepare, then execute"
    await client.fetch("SELECT $1::int", 2)
    assert proxy.round_trips == 4
    with pytest.raises(Exception, match="division by zero"):
        await client.fetch("SELECT 1 / $1::int", 0)
    assert proxy.round_trips == 6
    await client.execute("ROLLBACK; SELECT 1; SELECT 2")
    assert proxy.round_trips == 7
    await client.close()
    assert proxy.round_trips == 7
    assert proxy.queries == ["BEGIN", "ROLLBACK; SELECT 1; SELECT 2"]
    assert proxy.parsed == ["SELECT $1::int", "SELECT 1 / $1::int"]
    proxy.forget()
    assert (proxy.round_trips, proxy.connections, proxy.queries) == (0, 0, [])


@pytest.mark.psycopg
async def test_round_trips_of_psycopg_are_counted_as_it_waits_for_them(
    proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    url = proxy.through(fresh_database.url(None))
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as client:
        await client.execute("CREATE TABLE c (n int)")
        assert proxy.round_trips == 1
        await client.execute("SELECT %s::int", [1])
        assert proxy.round_trips == 2
        async with client.transaction():
            await client.execute("SELECT 3")
        assert proxy.round_trips == 5, "BEGIN, SELECT, COMMIT"
        async with client.pipeline():
            for n in range(20):
                await client.execute("INSERT INTO c VALUES (%s)", [n])
        assert 6 <= proxy.round_trips <= 7, "a pipeline does not wait between its statements"
        trips = proxy.round_trips
        async with client.cursor() as cursor, cursor.copy("COPY c FROM STDIN") as copy:
            await copy.write("1\n2\n")
        assert proxy.round_trips == trips + 2, "may I send? all arrived"
    assert await fresh_database.fetchval("SELECT count(*) FROM c") == 22


async def test_a_cancel_request_passes_and_is_counted(
    proxy: FaultProxy, fresh_database: FreshDatabase
) -> None:
    client = await raw_connect(proxy.through(fresh_database.url(None)))
    sleeping = asyncio.ensure_future(client.execute("SELECT pg_sleep(60)"))
    await until(fresh_database, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    assert await asyncio.wait_for(client.fetchval("SELECT 1"), PATIENCE) == 1
    assert proxy.cancel_requests == 1
    assert proxy.connections == 2
    await client.close()


async def test_a_url_is_led_through_the_proxy(proxy: FaultProxy) -> None:
    assert proxy.through("postgresql+asyncpg://me:p%40ss@db.example:5432/shop?ssl=disable") == (
        f"postgresql+asyncpg://me:p%40ss@127.0.0.1:{proxy.port}/shop?ssl=disable"
    )
    assert proxy.through("postgresql://localhost/shop") == f"postgresql://127.0.0.1:{proxy.port}/shop"
