"""At a deadline the statement ends on the server, too: a CancelRequest of its own, for which nobody waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from stanch import CommitUnknown, Database, DeadlinePassed
from stanch.drivers.base import DRAIN_TIMEOUT
from stanch.fastapi import ReaderDep, install
from tests.requests.shop import client_of
from tests.support import cleaned
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, until
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from stanch.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database
forgetful_driver = cleaned.forgetful_driver

TIMEOUT = 0.4
LONG = 60
"""Seconds that a statement takes if nobody ends it."""
SOON = 2.0
"""Seconds within which the server has ended it; its own limit is ten times as long."""
SLOW = text(f"SELECT pg_sleep({LONG})")
WRITE = text("INSERT INTO rows VALUES (1)")
ASLEEP = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
AWAKE = f"SELECT 1 WHERE NOT EXISTS (SELECT FROM {OTHERS} AND state <> 'idle')"
NOBODY_ELSE = f"SELECT 1 WHERE NOT EXISTS (SELECT FROM {OTHERS})"
SLOW_COMMIT = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(2); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON rows
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION dawdle();
"""


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@asynccontextmanager
async def proxied(
    judged: FreshDatabase, driver: str, **settings: Any
) -> AsyncGenerator[tuple[FaultProxy, Database[Any]]]:
    """One warm connection behind the proxy."""
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0, **settings) as db:
            proxy.forget()
            yield proxy, db
            proxy.pass_through()


def requests() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("stanch: stops")]


# Where a statement runs -------------------------------------------------------------------------------------

Use = Callable[[Database[Any]], Awaitable[None]]


async def of_a_reader(db: Database[Any]) -> None:
    """There is no BEGIN that could tell the server of the deadline."""
    async with db.reader(timeout=TIMEOUT) as session:
        await session.execute(SLOW)


async def late_in_a_transaction(db: Database[Any]) -> None:
    """The limit that rode on BEGIN holds for each statement anew."""
    async with db.transaction(timeout=TIMEOUT) as session:
        await session.execute(WRITE)
        await asyncio.sleep(TIMEOUT / 2)
        await session.execute(SLOW)


async def without_the_servers_limit(db: Database[Any]) -> None:
    async with db.transaction(timeout=TIMEOUT) as session:
        await session.execute(text("SET LOCAL statement_timeout = 0"))
        await session.execute(SLOW)


async def on_its_connection(db: Database[Any]) -> None:
    async with db.session(timeout=TIMEOUT) as session:
        connection = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await connection.execute(SLOW)


async def in_a_stream(db: Database[Any]) -> None:
    async with db.transaction(timeout=TIMEOUT) as session:
        await session.execute(text("SET LOCAL statement_timeout = 0"))
        sleepy = text(f"SELECT n, CASE WHEN n > 3 THEN pg_sleep({LONG}) END FROM generate_series(1, 9) n")
        async for _ in await session.stream(sleepy, execution_options={"yield_per": 2}):
            pass


@pytest.mark.parametrize(
    "use",
    [of_a_reader, late_in_a_transaction, without_the_servers_limit, on_its_connection, in_a_stream],
    ids=lambda use: use.__name__,
)
async def test_at_the_deadline_the_statement_ends_on_the_server(
    rows: FreshDatabase, driver: str, use: Use
) -> None:
    async with Database(rows.url(driver), pool_size=1, max_overflow=0) as db:
        running = asyncio.ensure_future(use(db))
        await until(rows, ASLEEP)
        with pytest.raises(DeadlinePassed, match=r"the 0\.40 s of .* passed while a statement was running"):
            await running
        await until(rows, AWAKE, timeout=SOON)
        await assert_nothing_left(rows, db)
        async with db.session() as session:
            assert await session.scalar(text("SELECT 42")) == 42
    assert await rows.fetchval("SELECT count(*) FROM rows") == 0


async def test_a_request_that_reads_leaves_no_statement_behind(rows: FreshDatabase, driver: str) -> None:
    async with Database(rows.url(driver), pool_size=1, max_overflow=0) as db:
        app = FastAPI()
        install(app, db, request_timeout=TIMEOUT)

        @app.get("/")
        async def read(session: ReaderDep) -> None:
            await session.execute(SLOW)

        async with client_of(app) as client:
            assert (await client.get("/")).status_code == 504
        await until(rows, AWAKE, timeout=SOON)


async def test_who_is_turned_out_at_the_end_of_a_unit_leaves_no_statement_behind(
    rows: FreshDatabase, driver: str
) -> None:
    """Not a deadline, but close_timeout: a task is still inside when the block ends."""
    async with Database(rows.url(driver), pool_size=1, max_overflow=0, close_timeout=0.2) as db:
        async with db.session() as session:
            inside = asyncio.ensure_future(session.execute(SLOW))
            await until(rows, ASLEEP)
        with pytest.raises(DBAPIError):
            await inside
        await until(rows, AWAKE, timeout=SOON)


async def test_what_close_severs_is_stopped_before_close_returns(rows: FreshDatabase, driver: str) -> None:
    """Afterwards there may be no event loop any more."""
    db = Database(rows.url(driver), drain_timeout=0.1, close_timeout=0.2)
    async with db:

        async def hold() -> None:
            async with db.session() as session:
                await session.execute(SLOW)

        holder = asyncio.create_task(hold())
        await until(rows, ASLEEP)
    assert requests() == []
    with pytest.raises(DBAPIError):
        await holder
    await until(rows, NOBODY_ELSE, timeout=SOON)


# What is left alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [False, True], ids=["at the end", "by hand"])
async def test_a_commit_under_way_is_severed_and_never_cancelled(
    rows: FreshDatabase, driver: str, by_hand: bool
) -> None:
    await rows.execute(SLOW_COMMIT)
    async with proxied(rows, driver) as (proxy, db):
        with pytest.raises(CommitUnknown):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(text("SET LOCAL statement_timeout = 0"))
                await session.execute(WRITE)
                if by_hand:
                    await session.commit()
        assert requests() == []
        await until(rows, "SELECT * FROM rows")
        assert proxy.cancel_requests == 0


async def test_a_commit_that_nobody_answers_is_never_cancelled(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver) as (proxy, db):
        proxy.on_client_message = at_commit(Verdict.LOSE_ANSWER)
        with pytest.raises(CommitUnknown):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
        assert (requests(), proxy.cancel_requests) == ([], 0)
    assert await rows.fetchval("SELECT count(*) FROM rows") == 1


async def test_a_transaction_in_which_nothing_runs_is_severed_without_a_request(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        with pytest.raises(DeadlinePassed):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
                await asyncio.sleep(TIMEOUT * 1.2)
                await assert_nothing_left(rows)
        assert (requests(), proxy.cancel_requests) == ([], 0)


@pytest.mark.usefixtures("forgetful_driver")
async def test_nobody_waits_for_a_request_that_is_not_taken(rows: FreshDatabase, driver: str) -> None:
    """The server is silent: the unit ends at its deadline, the request a little later, by itself."""
    async with proxied(rows, driver) as (proxy, db):
        began = time.monotonic()
        with proxy.blackholed():
            with pytest.raises(DeadlinePassed):
                await of_a_reader(db)
            assert time.monotonic() - began < TIMEOUT + SOON
            assert db.stats().in_use == 0
            [request] = requests()
            await asyncio.wait({request}, timeout=DRAIN_TIMEOUT + SOON)
            assert request.done()
            assert request.exception() is None


async def test_a_request_is_sent_once_for_each_statement(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver) as (proxy, db):
        for number in range(1, 4):
            with pytest.raises(DeadlinePassed):
                await of_a_reader(db)
            await until(rows, AWAKE, timeout=SOON)
            assert proxy.cancel_requests == number


@pytest.mark.needs("pgbouncer")
async def test_behind_pgbouncer_the_statement_ends_as_well(
    rows: FreshDatabase, driver: str, postgres: EmbeddedPostgres
) -> None:
    """It knows whose statement a request means only as long as the client's own link stands."""
    with PgBouncer(postgres) as pooler:
        async with Database(pooler.url(driver, rows.name), pooler="pgbouncer") as db:
            running = asyncio.ensure_future(of_a_reader(db))
            await until(rows, ASLEEP)
            with pytest.raises(DeadlinePassed):
                await running
            await until(rows, AWAKE, timeout=SOON)


@pytest.mark.psycopg
async def test_a_libpq_that_can_only_block_does_so_in_a_thread(
    rows: FreshDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before version 17."""
    import psycopg

    async with Database(rows.url("psycopg"), pool_size=1, max_overflow=0) as db:
        monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)
        with pytest.raises(DeadlinePassed):
            await of_a_reader(db)
        await until(rows, AWAKE, timeout=SOON)
