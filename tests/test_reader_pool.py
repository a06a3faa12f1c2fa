"""Readers with connections of their own, on which the server refuses what no guard can see: functions that write."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import ConfigError, Database, DatabaseClosed, InsideTransaction, PoolExhausted, WriteRefused
from stanch.fastapi import ReaderDep, SessionDep, install
from tests.requests.shop import client_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stanch.events import Event

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

WRITERS, READERS = 1, 2
TWO: dict[str, Any] = {"reader_pool_size": 2}


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    item: Mapped[str]


@pytest.fixture
async def judged(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("""
        CREATE TABLE orders (id int PRIMARY KEY, item text NOT NULL);
        INSERT INTO orders VALUES (1, 'tea');
        CREATE FUNCTION place_order(int) RETURNS int LANGUAGE sql AS
            $$ INSERT INTO orders VALUES ($1, 'by a function') RETURNING id $$;
    """)
    return fresh_database


def database(judged: FreshDatabase, driver: str, **settings: Any) -> Database[AsyncSession]:
    chosen: dict[str, Any] = {"pool_size": WRITERS, "max_overflow": 0, "reader_pool_size": READERS}
    chosen |= {"pool_timeout": 1.0, **settings}
    return Database(judged.url(driver), **chosen)


@pytest.fixture
async def db(judged: FreshDatabase, driver: str) -> AsyncIterator[Database[AsyncSession]]:
    async with database(judged, driver) as db:
        yield db
        await assert_nothing_left(judged, db)


async def orders(judged: FreshDatabase) -> list[tuple[int, str]]:
    return [(row["id"], row["item"]) for row in await judged.fetch("SELECT * FROM orders ORDER BY id")]


async def test_without_it_a_function_that_writes_is_outside_the_guard(
    judged: FreshDatabase, driver: str
) -> None:
    """What the documentation says, and what the rest of this file is for."""
    async with Database(judged.url(driver)) as plain, plain.reader() as session:
        assert plain.reader_engine is plain.engine
        await session.execute(select(func.place_order(7)))
    assert await orders(judged) == [(1, "tea"), (7, "by a function")]


async def test_a_function_that_writes_is_refused_by_the_server(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async with db.reader() as session:
        order = await session.get_one(Order, 1)
        pids = [row["pid"] for row in await judged.activity()]
        for statement in (select(func.place_order(7)), text("SELECT place_order(7)")):
            with pytest.raises(WriteRefused, match=r"test_reader_pool\.py:\d+.* the server refused"):
                await session.execute(statement)
            assert db.stats().in_use == 0
        assert order.item == "tea"
        assert await session.scalar(text("SHOW default_transaction_read_only")) == "on"
        # It is no sign of a demoted primary: nothing was retired.
        assert [row["pid"] for row in await judged.activity()] == pids
    assert await orders(judged) == [(1, "tea")]


async def test_the_guard_stands_before_the_server(db: Database[AsyncSession], judged: FreshDatabase) -> None:
    async with db.reader() as session:
        for statement in (insert(Order), text("DELETE FROM orders"), text("SET work_mem = '1MB'")):
            with pytest.raises(WriteRefused, match="nothing was sent"):
                await session.execute(statement)
    assert await orders(judged) == [(1, "tea")]


async def test_writers_write_on_connections_of_their_own(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async with db.transaction() as session:
        assert await session.scalar(text("SHOW default_transaction_read_only")) == "off"
        await session.execute(select(func.place_order(7)))
        session.add(Order(id=8, item="cup"))
    async with db.session() as session:
        session.add(Order(id=9, item="pot"))
        await session.commit()
    assert [number for number, _ in await orders(judged)] == [1, 7, 8, 9]


async def test_readers_go_on_while_the_writers_have_all_their_connections(
    db: Database[AsyncSession],
) -> None:
    async with db.transaction() as writer:
        await writer.scalar(select(Order.id))
        async with db.reader() as session:
            assert await session.scalar(select(Order.item)) == "tea"
        with pytest.raises(PoolExhausted, match="Raise pool_size or max_overflow"):
            async with db.transaction() as second:
                await second.scalar(select(Order.id))


async def test_what_is_exhausted_is_named(db: Database[AsyncSession], judged: FreshDatabase) -> None:
    async def sleep() -> None:
        async with db.reader() as session:
            await session.execute(text("SELECT pg_sleep(20)"))

    asleep = [asyncio.create_task(sleep()) for _ in range(READERS)]
    await until(
        judged,
        "SELECT FROM pg_stat_activity WHERE query ~ '^SELECT pg_sleep.20' AND state = 'active'"
        f" HAVING count(*) = {READERS}",
    )
    stats = db.stats()
    assert stats.readers is not None
    assert (stats.in_use, stats.readers.in_use) == (READERS, READERS)
    with pytest.raises(
        PoolExhausted, match=rf"in_use {READERS} of {READERS}.*\n(.*\n)*.*Raise reader_pool_size,"
    ):
        async with db.reader() as session:
            await session.scalar(select(Order.id))
    for task in asleep:
        task.cancel()
    await asyncio.gather(*asleep, return_exceptions=True)


async def test_the_counts_of_both_pools_agree_with_the_server(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async with db.transaction() as writer, db.reader() as reader:
        await writer.scalar(select(Order.id))
        await reader.scalar(select(Order.id))
        stats = db.stats()
        assert stats.readers is not None
        states = sorted(str(row["state"]) for row in await judged.activity())
        assert states == ["idle", "idle in transaction"]
        assert (stats.bound, stats.in_use, stats.idle) == (WRITERS + READERS, 1, 1)
        assert (stats.readers.bound, stats.readers.in_use, stats.readers.idle) == (READERS, 0, 1)


async def test_a_statement_of_a_reader_is_still_one_round_trip(judged: FreshDatabase, driver: str) -> None:
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver))
        async with Database(url, pool_size=1, max_overflow=0, reader_pool_size=1) as db:
            for number in range(8):
                if number == 7:
                    proxy.forget()
                async with db.reader() as session:
                    await session.scalar(select(Order.item))
            assert (proxy.round_trips, proxy.queries, proxy.connections) == (1, [], 0)


async def test_gather_reads_with_the_connections_of_the_readers(db: Database[AsyncSession]) -> None:
    both = asyncio.Barrier(READERS)

    async def meet(session: AsyncSession) -> int:
        await session.scalar(select(Order.id))
        async with asyncio.timeout(5):
            await both.wait()
        return 1

    assert await db.gather(*[meet] * (2 * READERS)) == (1,) * (2 * READERS)


async def test_gathered_transactions_take_turns_on_those_of_the_writers(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    at_work = 0

    async def write(session: AsyncSession) -> None:
        nonlocal at_work
        at_work += 1
        assert at_work <= WRITERS
        await session.execute(text("SELECT pg_sleep(0.4)"))
        await session.execute(text("INSERT INTO orders SELECT count(*) + 1, 'x' FROM orders"))
        at_work -= 1

    await db.gather(*[write] * 4, transaction=True)
    assert [number for number, _ in await orders(judged)] == [1, 2, 3, 4, 5]


async def test_whoever_holds_a_writers_connection_is_refused_a_gather(db: Database[AsyncSession]) -> None:
    async def read(session: AsyncSession) -> object:
        return await session.scalar(select(Order.id))

    async with db.transaction() as session:
        await session.scalar(select(Order.id))
        with pytest.raises(InsideTransaction):
            await db.gather(read, read)


HOW = text("SHOW default_transaction_read_only")


async def first_order(session: ReaderDep) -> Order:
    session.info["reader"] = await session.scalar(HOW)
    return await session.get_one(Order, 1)


async def test_in_a_request_an_upgraded_reader_moves_to_the_writers_connection(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    app = FastAPI()
    install(app, db)
    seen: list[str | None] = []

    @app.post("/orders")
    async def change(order: Annotated[Order, Depends(first_order)], session: SessionDep) -> str:
        seen.extend((session.info["reader"], await session.scalar(HOW)))
        assert order in session
        order.item = "cup"
        return order.item

    @app.get("/orders")
    async def read(session: ReaderDep) -> str:
        return (await session.get_one(Order, 1)).item

    @app.get("/places")
    async def place(session: ReaderDep) -> None:
        await session.execute(select(func.place_order(7)))

    async with client_of(app) as client:
        reply = await client.post("/orders")
        assert (reply.status_code, reply.json(), seen) == (200, "cup", ["on", "off"])
        assert await orders(judged) == [(1, "cup")]
        assert (await client.get("/orders")).json() == "cup"
        assert (await client.get("/places")).status_code == 500
    assert await orders(judged) == [(1, "cup")]


async def test_closing_closes_both(judged: FreshDatabase, driver: str) -> None:
    db = database(judged, driver)
    async with db:
        async with db.reader() as session, db.transaction() as writer:
            await session.scalar(select(Order.id))
            await writer.scalar(select(Order.id))
        assert len(await judged.activity()) == 2
    await until(
        judged,
        "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type ~ '^client')",
    )
    with pytest.raises(DatabaseClosed):
        async with db.reader():
            pass
    async with db, db.reader() as session:  # and it can be opened again
        assert await session.scalar(select(Order.item)) == "tea"


async def test_a_reader_that_is_still_at_work_when_the_drain_is_over_is_severed_and_told(
    judged: FreshDatabase, driver: str
) -> None:
    told: list[Event] = []
    db = database(judged, driver, drain_timeout=0.2)
    db.observe(told.append)
    await db.open()

    async def sleep() -> None:
        async with db.reader() as session:
            await session.execute(text("SELECT pg_sleep(20)"))

    asleep = asyncio.create_task(sleep())
    await until(
        judged, "SELECT FROM pg_stat_activity WHERE query ~ '^SELECT pg_sleep.20' AND state = 'active'"
    )
    async with asyncio.timeout(10):
        await db.close()
        with pytest.raises(Exception, match=r"."):
            await asleep
    assert "StillHeld" in [type(event).__name__ for event in told]
    assert db.stats().in_use == 0


@pytest.mark.parametrize("adopt", [True, False])
async def test_an_engine_that_brings_its_own_connections_cannot_have_it(
    judged: FreshDatabase, driver: str, adopt: bool
) -> None:
    engine = create_async_engine(judged.url(driver))
    with pytest.raises(ConfigError, match="reader_pool_size needs connections that stanch starts itself"):
        Database(engine, adopt=adopt, reader_pool_size=2)
    await engine.dispose()


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("sqlite+aiosqlite:///:memory:", {}, "reader_pool_size is for PostgreSQL"),
        ("sqlite+aiosqlite:///shop.db", {}, "reader_pool_size is for PostgreSQL"),
        ("postgresql+asyncpg://app@localhost/shop", {"pooler": "pgbouncer"}, "sent through PgBouncer"),
        ("postgresql+psycopg://app@localhost/shop", {"pooler": "pgbouncer"}, "sent through PgBouncer"),
        (
            "postgresql+asyncpg://app@localhost/shop?options=-c%20default_transaction_read_only%3Doff",
            {},
            "default_transaction_read_only is given twice",
        ),
        ("postgresql+asyncpg://app@localhost/shop", {"reader_pool_size": 0}, "from 1 to 1000 or None, got 0"),
        ("postgresql+asyncpg://app@localhost/shop", {"reader_pool_size": True}, "from 1 to 1000 or None"),
    ],
)
def test_where_it_cannot_be_kept_it_is_refused_before_anything_opens(
    url: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Database(url, **(TWO | settings))


def test_it_can_come_from_the_environment() -> None:
    environment = {"DATABASE_URL": "postgresql+asyncpg://app@localhost/shop", "STANCH_READER_POOL_SIZE": "3"}
    assert Database.from_env(environment).settings.reader_pool_size == 3


async def test_the_other_options_of_the_connection_are_kept(judged: FreshDatabase, driver: str) -> None:
    async with database(
        judged,
        driver,
        application_name="shop",
        statement_timeout=7,
        connect_args={"server_settings": {"search_path": "public, pg_catalog"}},
    ) as db:
        async with db.reader() as session:
            for name, value in (
                ("application_name", "shop"),
                ("statement_timeout", "7s"),
                ("search_path", "public, pg_catalog"),
                ("default_transaction_read_only", "on"),
            ):
                assert await session.scalar(text(f"SHOW {name}")) == value
        async with db.session() as session:
            assert await session.scalar(text("SHOW default_transaction_read_only")) == "off"
