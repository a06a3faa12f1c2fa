"""What an end without COMMIT drops is told, also where only the server can know of it; and only then is it asked."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import WebSocket  # FastAPI reads them at run time
from sqlalchemy import Column, Integer, MetaData, Table, func, insert, literal_column, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable

from stanch import Database, UnsavedWrites, release
from stanch.events import WorkDropped
from stanch.fastapi import SessionDep, install
from tests.requests.shop import Shop, Told, client_of
from tests.requests.test_websockets import close_code, dialled
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left
from tests.support.proxy import FaultProxy, Verdict
from tests.support.suspensions import cancelled_at, suspensions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

WARMING = 7
"""psycopg prepares a statement at its sixth time."""


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


TABLES = "CREATE TABLE shelves (id int PRIMARY KEY); INSERT INTO shelves VALUES (1);"
FUNCTIONS = """
    CREATE FUNCTION harmless() RETURNS int LANGUAGE sql AS 'SELECT 7';
    CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS 'INSERT INTO shelves VALUES (7) RETURNING id';
"""
MORE = MetaData()
Table("more", MORE, Column("id", Integer))


@pytest.fixture
async def library(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(TABLES + FUNCTIONS)
    return fresh_database


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def db(library: FreshDatabase, driver: str, told: Told) -> AsyncIterator[Database[AsyncSession]]:
    async with Database(library.url(driver), pool_size=1, max_overflow=0, pool_timeout=2) as db:
        db.observe(told)
        yield db
        await assert_nothing_left(library, db)


def dropped(told: Told) -> list[tuple[str, ...]]:
    return [event.writes for event in told.events if isinstance(event, WorkDropped)]


Use = Callable[[AsyncSession], Awaitable[object]]


async def _core(session: AsyncSession) -> None:
    await (await session.connection()).execute(insert(Shelf).values(id=9))


async def _core_many(session: AsyncSession) -> None:
    await (await session.connection()).execute(insert(Shelf), [{"id": 8}, {"id": 9}])


async def _core_text(session: AsyncSession) -> None:
    await (await session.connection()).execute(text("INSERT INTO shelves VALUES (9)"))


async def _driver_sql(session: AsyncSession) -> None:
    await (await session.connection()).exec_driver_sql("UPDATE shelves SET id = 9")


async def _create_all(session: AsyncSession) -> None:
    await (await session.connection()).run_sync(MORE.create_all)


async def _cte(session: AsyncSession) -> None:
    new = insert(Shelf).values(id=9).returning(Shelf.id).cte("new")
    await session.execute(select(new.c.id))


WITH = text("/* -- */ WITH new AS (INSERT INTO shelves VALUES (9) RETURNING id) SELECT * FROM new")
WRITING: dict[str, tuple[Use, str]] = {
    "text WITH INSERT": (lambda session: session.execute(WITH), "text(WITH)"),
    "text DDL": (lambda session: session.execute(text("CREATE TABLE more (id int)")), "text(CREATE)"),
    "text TRUNCATE": (lambda session: session.execute(text("truncate shelves")), "text(TRUNCATE)"),
    "text SELECT INTO": (
        lambda session: session.execute(text("SELECT id INTO more FROM shelves")),
        "text(SELECT)",
    ),
    "DDL": (lambda session: session.execute(CreateTable(MORE.tables["more"])), "CREATE"),
    "insert in a CTE": (_cte, "WITH"),
    "a function": (lambda session: session.execute(select(func.writes())), "writes()"),
    "insert on the connection": (_core, "connection(INSERT)"),
    "many on the connection": (_core_many, "connection(INSERT)"),
    "text on the connection": (_core_text, "connection(INSERT)"),
    "SQL on the connection": (_driver_sql, "connection(UPDATE)"),
    "create_all on the connection": (_create_all, "CREATE"),
}


@pytest.mark.parametrize("what", WRITING)
async def test_a_write_of_which_only_the_server_knows_is_told_when_it_is_dropped(
    db: Database[AsyncSession], library: FreshDatabase, told: Told, what: str
) -> None:
    write, named = WRITING[what]
    async with db.session() as session:
        await write(session)
    assert [writes for writes in dropped(told) if named in writes] == dropped(told) != []
    async with db.session() as session:  # and once it is committed, nothing is
        await write(session)
        await session.commit()
        await session.scalar(select(func.count()).select_from(Shelf))
    assert len(dropped(told)) == 1
    assert await library.fetchval("SELECT array_agg(id) FROM shelves") != [1] or await library.fetchval(
        "SELECT to_regclass('more')"
    )


async def _undone_on_the_session(session: AsyncSession) -> None:
    connection = await session.connection()
    await session.execute(select(Shelf.id))
    savepoint = await session.begin_nested()
    await connection.execute(insert(Shelf).values(id=9))
    await savepoint.rollback()


async def _read_on_the_connection(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.execute(select(Shelf))
    await connection.execute(text("SELECT 'insert'"))


async def _handed_out_and_flushed(session: AsyncSession) -> None:
    await session.connection()
    session.add(Shelf(id=9))
    await session.commit()


NOT_WRITING: dict[str, Use] = {
    "nothing": lambda session: session.execute(text("SELECT 1")),
    "EXPLAIN": lambda session: session.execute(text("EXPLAIN SELECT 1")),
    "a function": lambda session: session.execute(select(func.harmless())),
    "an update of nothing": lambda session: session.execute(
        text("WITH gone AS (DELETE FROM shelves WHERE false RETURNING *) SELECT * FROM gone")
    ),
    "a setting": lambda session: session.execute(text("SET LOCAL work_mem = '1MB'")),
    "a lock": lambda session: session.execute(text("SELECT * FROM shelves FOR UPDATE")),
    "a lock of the ORM": lambda session: session.execute(select(Shelf).with_for_update()),
    "undone": _undone_on_the_session,
    "a read on the connection": _read_on_the_connection,
    "committed beside the connection": _handed_out_and_flushed,
}


@pytest.mark.parametrize("what", NOT_WRITING)
async def test_what_has_written_nothing_is_not_told(
    db: Database[AsyncSession], told: Told, what: str
) -> None:
    async with db.session() as session:
        await NOT_WRITING[what](session)
    assert dropped(told) == []


async def test_the_server_is_asked_once_and_only_in_doubt(library: FreshDatabase, driver: str) -> None:
    """What the end of a session adds to BEGIN and statement: ROLLBACK, and a question where there is a doubt."""
    expected: dict[str, tuple[Use, int]] = {
        "read": (lambda session: session.execute(select(Shelf)), 1),
        "known function": (lambda session: session.execute(select(func.count(Shelf.id))), 1),
        "lock": (lambda session: session.execute(select(Shelf).with_for_update()), 1),
        "savepoint": (_undone_on_the_session, 1),
        "certain": (lambda session: session.execute(insert(Shelf).values(id=9)), 1),
        "certain, by the connection": (_core, 1),
        "read, by the connection": (_read_on_the_connection, 1),
        "doubt": (lambda session: session.execute(text("EXPLAIN SELECT 1")), 2),
        "two doubts": (lambda session: session.execute(select(func.harmless(), func.writes())), 2),
    }
    found: dict[str, int] = {}
    async with (
        FaultProxy(library.server.port) as proxy,
        Database(proxy.through(library.url(driver)), pool_size=1, max_overflow=0) as db,
    ):
        for what, (use, _) in expected.items():
            for number in range(WARMING + 1):
                async with db.session() as session:
                    await use(session)
                    if number == WARMING:
                        proxy.forget()
            found[what] = proxy.round_trips
    assert found == {what: trips for what, (_, trips) in expected.items()}


async def test_release_sees_what_was_written_past_the_session(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        await _core(session)
        with pytest.raises(UnsavedWrites, match=r"\(connection\(INSERT\)\)"):
            await release(session)
        await session.commit()


async def test_a_failed_transaction_tells_what_it_may_have_written(
    db: Database[AsyncSession], told: Told
) -> None:
    """It answers no question, and nobody can say that nothing is lost."""
    async with db.session() as session:
        await session.execute(select(func.writes()))
        with pytest.raises(IntegrityError):
            await session.execute(select(func.writes()))
    assert dropped(told) == [("writes()",)]


async def test_an_error_says_enough(db: Database[AsyncSession], told: Told) -> None:
    with pytest.raises(LookupError):
        async with db.session() as session:
            await session.execute(WITH)
            raise LookupError
    assert dropped(told) == []


async def test_a_silent_server_is_asked_no_longer_than_close_timeout(
    library: FreshDatabase, driver: str, told: Told
) -> None:
    def lose_the_question(kind: str, payload: bytes) -> Verdict:
        return Verdict.LOSE if b"pg_current_xact_id" in payload else Verdict.FORWARD

    async with FaultProxy(library.server.port) as proxy:
        url = proxy.through(library.url(driver)) + "?sslmode=disable"
        async with Database(url, close_timeout=0.3) as db:
            db.observe(told)
            async with db.session() as session:
                await session.execute(WITH)
                proxy.on_client_message = lose_the_question
                began = time.monotonic()
            assert time.monotonic() - began < 4.0, "close_timeout is five seconds if nobody chooses it"
            assert proxy.verdicts[Verdict.LOSE] == 1
            assert dropped(told) == [("text(WITH)",)]
            assert db.stats().in_use == 0


async def test_a_close_that_is_cancelled_while_the_server_is_asked_closes_all_the_same(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async def use() -> None:
        session = db.session_factory()
        try:
            await session.execute(WITH)
        finally:
            await session.close()

    for point in range(1, await suspensions(use()) + 1):
        await cancelled_at(use(), {point})
        await assert_nothing_left(library, db)


async def test_of_an_engine_with_its_own_pool_the_texts_are_asked_for(
    library: FreshDatabase, driver: str, told: Told
) -> None:
    engine = create_async_engine(library.url(driver))
    db: Database[AsyncSession] = Database(engine, adopt=False)
    db.observe(told)
    async with db.session() as session:
        await session.execute(select(Shelf))
    async with db.session() as session:
        await session.execute(WITH)
    assert dropped(told) == [("text(WITH)",)]
    await engine.dispose()


# In units ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def shop(library: FreshDatabase, driver: str) -> AsyncIterator[Shop]:
    shop = Shop(library, driver=driver)
    yield shop
    await shop.assert_clean()
    await shop.db.close()


@pytest.mark.parametrize("write", [WRITING["text WITH INSERT"], WRITING["insert on the connection"]])
@pytest.mark.parametrize("unsaved", ["warn", "raise", "ignore"])
async def test_a_unit_in_manual_mode_tells_what_it_leaves(
    shop: Shop, unsaved: Any, write: tuple[Use, str]
) -> None:
    install(shop.app, shop.db, commit_mode="manual", unsaved=unsaved)
    use, named = write

    @shop.app.post("/")
    async def leave(session: SessionDep) -> None:
        await use(session)

    async with client_of(shop.app) as client:
        reply = await client.post("/")
    assert reply.status_code == (500 if unsaved == "raise" else 200)
    assert dropped(shop.told) == ([(named,)] if unsaved == "warn" else [])


async def test_a_unit_whose_handler_closes_the_session_over_such_a_write_fails(shop: Shop) -> None:
    install(shop.app, shop.db)

    @shop.app.post("/")
    async def close(session: SessionDep) -> None:
        await session.execute(WITH)
        await session.close()

    async with client_of(shop.app) as client:
        assert (await client.post("/")).status_code == 500


async def test_a_websocket_that_waits_with_such_a_write_is_closed(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    install(shop.app, shop.db)

    @shop.app.websocket("/ws")
    async def leave(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            await session.execute(WITH)

    async with dialled(shop) as socket:
        await socket.send("go")
        assert await close_code(socket) == 1011
    assert "waits for its peer with uncommitted writes (text(WITH))" in caplog.text


async def test_a_websocket_that_has_only_asked_a_function_waits_on(shop: Shop) -> None:
    install(shop.app, shop.db)

    @shop.app.websocket("/ws")
    async def ask(socket: WebSocket, session: SessionDep) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            await socket.send_text(str(await session.scalar(select(func.harmless()))))

    async with dialled(shop) as socket:
        for _ in range(2):
            await socket.send("go")
            assert await socket.recv() == "7"


# SQLite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["text DDL", "DDL", "insert on the connection", "create_all on the connection"]
)
async def test_on_sqlite_a_doubt_counts_as_a_write(tmp_path: Path, told: Told, what: str) -> None:
    """There is nobody to ask."""
    write, named = WRITING[what]
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/library.db") as db:
        db.observe(told)
        async with db.begin() as connection:
            await connection.execute(text("CREATE TABLE shelves (id int PRIMARY KEY)"))
        async with db.session() as session:
            await session.execute(select(func.count(Shelf.id), func.abs(literal_column("1"))))
            await session.execute(text("PRAGMA user_version"))
        assert dropped(told) == []
        async with db.session() as session:
            await write(session)
        assert dropped(told) == [(named,)]
