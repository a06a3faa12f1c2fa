"""The ``Database``: it opens nothing before its time, opens by count, drains before it ends, and counts truly."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SQLAlchemyError

from stanch import ConfigError, Database, DatabaseClosed, DatabaseUnavailable, Stats
from stanch.embedded import EmbeddedPostgres
from stanch.events import Event, StillHeld
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

PID = text("SELECT pg_backend_pid()")
WRITE = text("INSERT INTO rows VALUES (1)")


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@pytest.fixture
async def db(rows: FreshDatabase, driver: str) -> AsyncIterator[Database[Any]]:
    db: Database[Any] = Database(rows.url(driver), pool_size=3, max_overflow=0, drain_timeout=5)
    yield db
    await db.close()


@pytest.fixture
def free_port() -> int:
    """A port of the loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def nobody_connected(judged: FreshDatabase) -> None:
    """The server needs a moment to end a backend whose client has gone."""
    await until(
        judged,
        "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid())",
    )


async def stored(judged: FreshDatabase) -> int:
    return int(await judged.fetchval("SELECT count(*) FROM rows"))


# Opening ----------------------------------------------------------------------------------------------------


def test_construction_opens_nothing_and_needs_no_loop(driver: str) -> None:
    """A listening socket that counts who comes: nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        db: Database[Any] = Database(f"postgresql+{driver}://u:p@127.0.0.1:{server.getsockname()[1]}/d")
        assert db.engine.url.drivername.startswith("postgresql")
        assert db.stats().size == 0
        assert db.session_factory() is not None
        with pytest.raises(TimeoutError):
            server.accept()


async def test_open_fails_fast_where_nobody_listens(driver: str, free_port: int) -> None:
    db: Database[Any] = Database(f"postgresql+{driver}://u:p@127.0.0.1:{free_port}/d")
    begun = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await db.open()
    assert time.monotonic() - begun < 4.5, "connect_timeout is five seconds"


async def test_open_gives_up_after_its_wait(driver: str, free_port: int) -> None:
    db: Database[Any] = Database(f"postgresql+{driver}://u:p@127.0.0.1:{free_port}/d")
    begun = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await db.open(wait=0.6)
    assert time.monotonic() - begun < 8


async def test_open_waits_for_a_server_that_is_still_starting(driver: str) -> None:
    server = EmbeddedPostgres()
    await asyncio.to_thread(server.start)
    try:
        url = server.url(driver)
        await asyncio.to_thread(server.crash)
        db: Database[Any] = Database(url, connect_timeout=2)
        opening = asyncio.create_task(db.open(wait=30))
        await asyncio.to_thread(server.start)
        assert server.url(driver) == url
        async with asyncio.timeout(30):
            assert await opening is db
        async with db.connect() as connection:
            assert await connection.scalar(text("SELECT 42")) == 42
        await db.close()
    finally:
        await asyncio.to_thread(server.stop)


async def test_open_does_not_wait_for_what_waiting_does_not_mend(rows: FreshDatabase) -> None:
    db: Database[Any] = Database(rows.url("asyncpg").replace(rows.name, "no_such_database"))
    begun = time.monotonic()
    with pytest.raises(SQLAlchemyError):
        await db.open(wait=50)
    assert time.monotonic() - begun < 20


async def test_first_use_opens(db: Database[Any], rows: FreshDatabase) -> None:
    assert "not opened yet" in repr(db)
    async with db.transaction() as session:
        await session.execute(WRITE)
    assert "open" in repr(db)
    assert await stored(rows) == 1


async def test_opening_nests_and_can_be_repeated(db: Database[Any], rows: FreshDatabase) -> None:
    for _ in range(2):
        async with db:
            async with db, db.connect() as connection:
                await connection.execute(text("SELECT 1"))
            async with db.connect() as connection:  # the outer one still holds it open
                await connection.execute(text("SELECT 1"))
        await nobody_connected(rows)
        with pytest.raises(DatabaseClosed):
            async with db.connect():
                pass


async def test_closing_twice_does_nothing(db: Database[Any]) -> None:
    await db.open()
    await db.close()
    await db.close()
    await db.open()
    async with db.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1


async def test_failed_open_can_be_repeated(driver: str, rows: FreshDatabase) -> None:
    async with FaultProxy(rows.server.port) as proxy:
        db: Database[Any] = Database(proxy.through(rows.url(driver)), connect_timeout=2)
        proxy.reset()
        with pytest.raises(SQLAlchemyError):
            await db.open()
        proxy.pass_through()
        async with db, db.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1


async def test_open_cut_by_a_cancel_leaves_nothing_behind(db: Database[Any], rows: FreshDatabase) -> None:
    async with FaultProxy(rows.server.port) as proxy:
        deaf: Database[Any] = Database(proxy.through(rows.url("asyncpg")) + "?sslmode=disable")
        proxy.deafen()
        opening = asyncio.create_task(deaf.open(wait=30))
        async with asyncio.timeout(5):
            while not proxy.connections:  # noqa: ASYNC110  # the proxy has no event for it
                await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert deaf.stats().size == 0


# Closing ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def by_connect(db: Database[Any]) -> AsyncGenerator[Any]:
    async with db.connect() as connection:
        yield connection


@asynccontextmanager
async def by_factory(db: Database[Any]) -> AsyncGenerator[Any]:
    async with db.session_factory() as session:
        yield session


@asynccontextmanager
async def by_engine(db: Database[Any]) -> AsyncGenerator[Any]:
    async with db.engine.connect() as connection:
        yield connection


@asynccontextmanager
async def by_transaction(db: Database[Any]) -> AsyncGenerator[Any]:
    async with db.transaction() as session:
        yield session


WAYS = [by_connect, by_transaction, by_factory, by_engine]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
async def test_close_waits_for_open_work(db: Database[Any], rows: FreshDatabase, way: Any) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    seen: list[int] = []

    async def work() -> None:
        async with way(db) as session:
            await session.execute(text("SELECT 1"))
            begun.set()
            await go_on.wait()
            seen.append(int(await session.scalar(text("SELECT 42"))))

    working = asyncio.create_task(work())
    await begun.wait()
    closing = asyncio.create_task(db.close())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()
    assert "closing" in repr(db)
    with pytest.raises(DatabaseClosed):
        async with db.connect():
            pass
    go_on.set()
    await working
    await closing
    assert seen == [42], "nobody disturbed it"
    await nobody_connected(rows)


@every_way
async def test_close_severs_and_reports_what_is_held_after_the_deadline(
    rows: FreshDatabase, driver: str, way: Any
) -> None:
    db: Database[Any] = Database(rows.url(driver), pool_size=2, drain_timeout=0.2, close_timeout=0.5)
    events: list[Event] = []
    db.observe(events.append)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with way(db) as session:
            await session.execute(text("SELECT 1"))
            begun.set()
            await go_on.wait()
            await session.execute(text("SELECT 1"))

    working = asyncio.create_task(work(), name="a forgotten job")
    await begun.wait()
    started = time.monotonic()
    await db.close()
    assert time.monotonic() - started < 8, "drain_timeout is ten seconds if nobody chooses it"
    assert await rows.fetchval("SELECT 1") == 1
    await nobody_connected(rows)
    held = [each for each in events if isinstance(each, StillHeld)]
    assert len(held) == 1
    told, line = str(held[0]), r"test_database\.py:\d+ in \S+\(\)"
    assert re.search(rf"a forgotten job\)?, taken at {line}, now at \S+ in .*work\(\)", told), told
    go_on.set()
    with pytest.raises((DBAPIError, InvalidRequestError)):
        await working
    assert db.stats().in_use == 0


@every_way
async def test_closed_database_refuses(db: Database[Any], rows: FreshDatabase, way: Any) -> None:
    await db.open()
    await db.close()
    with pytest.raises(DatabaseClosed) as caught:
        async with way(db) as session:
            await session.execute(text("SELECT 1"))
    assert "'main' is closed" in str(caught.value)
    await nobody_connected(rows)


async def test_session_that_never_connected_does_not_keep_it_open(db: Database[Any]) -> None:
    session = db.session_factory()
    await db.open()
    begun = time.monotonic()
    await db.close()
    assert time.monotonic() - begun < 8, "drain_timeout is ten seconds"
    await session.close()


async def test_close_is_not_cut_short_by_a_cancel(db: Database[Any], rows: FreshDatabase) -> None:
    async with db.connect() as connection:
        await connection.execute(text("SELECT 1"))
    closing = asyncio.create_task(db.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert "closed" in repr(db)
    await nobody_connected(rows)
    await db.open()


# What it is -------------------------------------------------------------------------------------------------


async def test_from_env_reads_the_url_and_the_settings(rows: FreshDatabase, driver: str) -> None:
    environ = {
        "DATABASE_URL": rows.url(driver),
        "STANCH_POOL_SIZE": "4",
        "STANCH_POOL_TIMEOUT": "1.5",
        "OTHER": "x",
    }
    db = Database.from_env(environ, name="shop")
    assert (db.name, db.settings.pool_size, db.settings.pool_timeout) == ("shop", 4, 1.5)
    async with db, db.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
    for wrong in ({}, {"DATABASE_URL": rows.url(driver), "STANCH_POOL_SISE": "4"}):
        with pytest.raises(ConfigError):
            Database.from_env(wrong)


def test_environment_is_read_only_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANCH_POOL_SIZE", "77")
    assert Database("sqlite+aiosqlite:///x.db").settings.pool_size != 77


def test_name_is_shown_and_the_url_is_not() -> None:
    db = Database("postgresql+asyncpg://u:hush@127.0.0.1/d", name="billing")
    assert "billing" in repr(db)
    assert "hush" not in repr(db) + str(db.engine) + repr(db.engine.url)


def test_session_class_that_is_none_is_refused() -> None:
    wrong: Any = dict
    with pytest.raises(ConfigError, match="session_class"):
        Database("sqlite+aiosqlite:///x.db", session_class=wrong)


async def test_stats_agree_with_the_server_and_with_sqlalchemy(
    db: Database[Any], rows: FreshDatabase
) -> None:
    assert db.stats() == Stats(pool_size=3, max_overflow=0, in_use=0, idle=0, waiting=0)
    async with db.connect() as one, db.connect() as two:
        for connection in (one, two):
            await connection.execute(text("SELECT 1"))
        assert (db.stats().in_use, db.stats().idle) == (2, 0)
        states = [row["state"] for row in await rows.activity()]
        assert states == ["idle in transaction"] * 2
        assert "in_use 2 idle 0 waiting 0 of 3" in db.engine.sync_engine.pool.status()
    assert (db.stats().in_use, db.stats().idle) == (0, 2)
    assert [row["state"] for row in await rows.activity()] == ["idle"] * 2


# connect() and begin() --------------------------------------------------------------------------------------


async def test_connect_commits_only_by_hand(db: Database[Any], rows: FreshDatabase) -> None:
    async with db.connect() as connection:
        await connection.execute(WRITE)
    assert await stored(rows) == 0
    async with db.connect() as connection:
        await connection.execute(WRITE)
        await connection.commit()
    assert await stored(rows) == 1


async def test_begin_commits_at_the_end_and_rolls_back_on_an_error(
    db: Database[Any], rows: FreshDatabase
) -> None:
    with pytest.raises(LookupError):
        async with db.begin() as connection:
            await connection.execute(WRITE)
            raise LookupError
    assert await stored(rows) == 0
    async with db.begin() as connection:
        await connection.execute(WRITE)
    assert await stored(rows) == 1


@pytest.mark.parametrize("word", ["commit", "rollback"])
@pytest.mark.parametrize("source", ["db", "engine"])
async def test_begin_that_was_ended_by_hand_is_left_at_that(
    db: Database[Any], rows: FreshDatabase, word: str, source: str
) -> None:
    """``AsyncEngine.begin()`` allows it, so ``db.begin()`` does."""
    async with (db if source == "db" else db.engine).begin() as connection:
        await connection.execute(WRITE)
        await getattr(connection, word)()
    assert await stored(rows) == (word == "commit")
    await assert_nothing_left(rows, db)


async def test_savepoints_and_run_sync_work_on_a_connection(db: Database[Any], rows: FreshDatabase) -> None:
    async with db.begin() as connection:
        await connection.execute(WRITE)
        with pytest.raises(DBAPIError):
            async with connection.begin_nested():
                await connection.execute(WRITE)
        assert await connection.run_sync(lambda each: each.scalar(text("SELECT count(*) FROM rows"))) == 1
    assert await stored(rows) == 1


# What it costs ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def counted(judged: FreshDatabase, driver: str) -> AsyncGenerator[tuple[FaultProxy, Database[Any]]]:
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0) as db:
            for _ in range(8):  # psycopg prepares a statement at its sixth execution, which costs one more
                async with db.transaction() as session:
                    await session.execute(text("SELECT 1"))
            proxy.forget()
            yield proxy, db


async def round_trips(proxy: FaultProxy, db: Database[Any], **options: Any) -> int:
    proxy.forget()
    async with db.transaction(**options) as session:
        await session.execute(text("SELECT 1"))
    return proxy.round_trips


async def test_isolation_and_read_only_cost_no_round_trip(rows: FreshDatabase, driver: str) -> None:
    async with counted(rows, driver) as (proxy, db):
        plain = await round_trips(proxy, db)
        assert plain == 3 if driver == "asyncpg" else plain <= 3, "BEGIN, the statement, COMMIT"
        assert await round_trips(proxy, db, isolation_level="SERIALIZABLE") == plain
        assert await round_trips(proxy, db, read_only=True) == plain
        assert await round_trips(proxy, db, isolation_level="REPEATABLE READ", read_only=True) == plain
        assert await round_trips(proxy, db) == plain, "and none afterwards"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "read committed off"),
        ({"isolation_level": "SERIALIZABLE"}, "serializable off"),
        ({"isolation_level": "REPEATABLE READ", "read_only": True}, "repeatable read on"),
        ({"read_only": True}, "read committed on"),
    ],
)
async def test_transaction_is_what_was_asked_for(
    db: Database[Any], options: dict[str, Any], expected: str
) -> None:
    shown = text(
        "SELECT current_setting('transaction_isolation') || ' ' || current_setting('transaction_read_only')"
    )
    async with db.transaction(**options) as session:
        assert await session.scalar(shown) == expected
    async with db.connect() as connection:
        assert await connection.scalar(shown) == "read committed off", "it ended with the transaction"


async def test_unknown_isolation_level_is_refused_before_anything_opens(db: Database[Any]) -> None:
    wrong: Any = "SERIALISABLE"
    with pytest.raises(ConfigError, match="isolation_level"):
        async with db.transaction(isolation_level=wrong):
            pass
    assert db.stats().size == 0
    async with asyncio.timeout(2):
        await db.close()


async def test_session_that_is_not_used_costs_nothing(rows: FreshDatabase, driver: str) -> None:
    async with counted(rows, driver) as (proxy, db):
        async with db.session():
            pass
        async with db.transaction() as session:
            assert session.is_active
        async with db.transaction(isolation_level="SERIALIZABLE", read_only=True):
            assert db.stats().in_use == 0
        async with db.session_factory():
            pass
        assert proxy.round_trips == 0
        await db.engine.dispose()
        proxy.forget()
        async with db.transaction():
            pass
        assert proxy.connections == 0


async def test_checkout_and_return_cost_no_round_trip(rows: FreshDatabase, driver: str) -> None:
    async with counted(rows, driver) as (proxy, db):
        for _ in range(5):
            async with db.connect():
                pass
        assert proxy.round_trips == 0
