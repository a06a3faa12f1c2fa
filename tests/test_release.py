"""release(): a clean transaction ends and its connection goes back; a dirty one says what is at stake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from sqlalchemy import ColumnElement, ForeignKey, delete, func, insert, literal_column, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from stanch import (
    Database,
    NotInstalled,
    SessionClosed,
    TransactionAborted,
    UnitConflict,
    UnsavedWrites,
    atomic,
    on_commit,
    release,
    rollback_only,
)
from stanch.fastapi import ReaderDep, SessionDep, install
from tests.requests.shop import client_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sqlalchemy import Executable

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

WARMING = 7
"""psycopg prepares a statement at its sixth time."""


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label: Mapped[str]
    books: Mapped[list[Book]] = relationship()


class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelves.id"))


TABLES = """
    CREATE TABLE shelves (id int PRIMARY KEY, label text NOT NULL);
    CREATE TABLE books (id int PRIMARY KEY, shelf_id int REFERENCES shelves);
    INSERT INTO shelves VALUES (1, 'one');
    INSERT INTO books VALUES (1, 1);
"""
FUNCTIONS = """
    CREATE FUNCTION harmless() RETURNS int LANGUAGE sql AS 'SELECT 7';
    CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS $$ INSERT INTO shelves VALUES (7, 'x') RETURNING id $$;
"""


@pytest.fixture
async def library(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(TABLES + FUNCTIONS)
    return fresh_database


@pytest.fixture
async def db(library: FreshDatabase, driver: str) -> AsyncIterator[Database[AsyncSession]]:
    async with Database(library.url(driver), pool_size=1, max_overflow=0, pool_timeout=2) as db:
        yield db
        await assert_nothing_left(library, db)


async def shelves(library: FreshDatabase) -> list[int]:
    return [row["id"] for row in await library.fetch("SELECT id FROM shelves ORDER BY id")]


async def assert_released(db: Database[AsyncSession], library: FreshDatabase) -> None:
    stats = db.stats()
    assert (stats.in_use, stats.idle) == (0, 1)
    assert [row["state"] for row in await library.activity()] == ["idle"]


Use = Callable[[AsyncSession], Awaitable[object]]


# Clean ----------------------------------------------------------------------------------------------------


async def test_what_was_read_stays_usable_and_the_next_statement_begins_anew(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.transaction() as session:
        shelf = await session.get_one(Shelf, 1)
        assert db.stats().in_use == 1
        await release(session)
        await assert_released(db, library)
        assert not session.in_transaction()
        assert shelf.label == "one"
        await library.execute("UPDATE shelves SET label = 'newer'")
        assert [book.id for book in await shelf.awaitable_attrs.books] == [1]
        await session.refresh(shelf)
        assert shelf.label == "newer"
        shelf.label = "newest"
    assert await library.fetchval("SELECT label FROM shelves") == "newest"


async def test_releasing_what_holds_nothing_is_harmless(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.session() as session:
        await release(session)
        await session.scalar(select(Shelf.id))
        await release(session)
        await release(session)
        await assert_released(db, library)


async def test_a_reader_has_nothing_to_release(db: Database[AsyncSession], library: FreshDatabase) -> None:
    async with db.reader() as session:
        shelf = await session.get_one(Shelf, 1)
        await release(session)
        assert shelf.label == "one"
        await assert_released(db, library)


async def test_the_options_of_the_transaction_hold_for_the_next_one(db: Database[AsyncSession]) -> None:
    async with db.transaction(isolation_level="SERIALIZABLE", read_only=True) as session:
        for _ in range(2):
            assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
            assert await session.scalar(text("SHOW transaction_read_only")) == "on"
            await release(session)


async def test_after_a_commit_by_hand_it_is_clean(db: Database[AsyncSession], library: FreshDatabase) -> None:
    async with db.session() as session:
        session.add(Shelf(id=5, label="x"))
        await session.commit()
        await session.scalar(select(Shelf.id))
        await release(session)
        await assert_released(db, library)
    assert await shelves(library) == [1, 5]


async def test_a_stream_that_was_left_open_is_ended(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.session() as session:
        result = await session.stream(text("SELECT * FROM generate_series(1, 10000)"))
        await result.fetchone()
        await release(session)
        await assert_released(db, library)
        assert await session.scalar(select(Shelf.id)) == 1


# Dirty ----------------------------------------------------------------------------------------------------


async def _flush(session: AsyncSession) -> None:
    session.add(Shelf(id=9, label="x"))
    await session.flush()


async def _pending(session: AsyncSession) -> None:
    session.add(Shelf(id=9, label="x"))


async def _changed(session: AsyncSession) -> None:
    (await session.get_one(Shelf, 1)).label = "x"


async def _deleted(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Book, 1))


async def _hook(session: AsyncSession) -> None:
    await session.scalar(select(Shelf.id))
    on_commit(session, print, "committed")


async def _bulk(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.bulk_save_objects([Shelf(id=9, label="x")]))


DIRTY: dict[str, tuple[Use, str]] = {
    "flush": (_flush, "Shelf"),
    "a pending object": (_pending, "Shelf"),
    "a changed object": (_changed, "Shelf"),
    "a deleted object": (_deleted, "Book"),
    "insert": (lambda session: session.execute(insert(Shelf).values(id=9, label="x")), "shelves"),
    "insert in an executemany": (
        lambda session: session.execute(insert(Shelf), [{"id": 8, "label": "x"}, {"id": 9, "label": "x"}]),
        "shelves",
    ),
    "update": (lambda session: session.execute(update(Shelf).values(label="x")), "shelves"),
    "delete": (lambda session: session.execute(delete(Book)), "books"),
    "bulk": (_bulk, "Shelf"),
    "text INSERT": (
        lambda session: session.execute(text("INSERT INTO shelves VALUES (9, 'x')")),
        r"text\(INSERT\)",
    ),
    "a hook that waits": (_hook, r"on_commit\(print\)"),
}
DOUBTFUL_AND_DIRTY: dict[str, tuple[Use, str]] = {
    "WITH INSERT": (
        lambda session: session.execute(
            text("WITH new AS (INSERT INTO shelves VALUES (9, 'x') RETURNING id) SELECT * FROM new")
        ),
        r"text\(WITH\)",
    ),
    "DDL": (lambda session: session.execute(text("CREATE TABLE more ()")), r"text\(CREATE\)"),
    "a lock": (lambda session: session.execute(text("SELECT * FROM shelves FOR UPDATE")), r"text\(SELECT\)"),
}


@pytest.mark.parametrize("what", [*DIRTY, *DOUBTFUL_AND_DIRTY])
async def test_uncommitted_writes_are_named_and_kept(
    db: Database[AsyncSession], library: FreshDatabase, what: str
) -> None:
    write, named = {**DIRTY, **DOUBTFUL_AND_DIRTY}[what]
    async with db.session() as session:
        await write(session)
        held = db.stats().in_use
        with pytest.raises(UnsavedWrites, match=rf"test_release\.py:\d+.*\({named}\)"):
            await release(session)
        assert db.stats().in_use == held
        await session.commit()  # nothing of it was lost
        await release(session)
        await assert_released(db, library)


async def test_a_write_that_a_savepoint_has_undone_does_not_count(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.session() as session:
        await session.scalar(select(Shelf.id))
        with pytest.raises(LookupError):
            async with session.begin_nested():
                await session.execute(insert(Shelf).values(id=9, label="x"))
                raise LookupError
        await release(session)
        await assert_released(db, library)
    assert await shelves(library) == [1]


async def test_a_write_of_a_savepoint_that_was_released_counts(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.session() as session:
        async with session.begin_nested():
            await session.execute(insert(Shelf).values(id=9, label="x"))
        with pytest.raises(UnsavedWrites, match="shelves"):
            await release(session)
        await session.commit()
    assert await shelves(library) == [1, 9]


# Of doubt -------------------------------------------------------------------------------------------------


HARMLESS: dict[str, str] = {
    "a function that reads": "SELECT harmless()",
    "a function whose words are refused to a reader": "SELECT nextval('numbers')",
    "EXPLAIN": "EXPLAIN SELECT 1",
    "DO": "DO $$ BEGIN PERFORM 1; END $$",
    "an update of nothing": "WITH gone AS (DELETE FROM books WHERE false RETURNING *) SELECT * FROM gone",
}
"""None of them gets a transaction id; the second takes one from nobody, for a sequence is not rolled back."""


@pytest.mark.parametrize("what", [what for what in HARMLESS if "nextval" not in HARMLESS[what]])
async def test_a_text_of_doubt_that_has_not_written_is_released(
    db: Database[AsyncSession], library: FreshDatabase, what: str
) -> None:
    async with db.session() as session:
        await session.execute(text(HARMLESS[what]))
        await release(session)
        await assert_released(db, library)


async def test_the_server_is_asked_once_and_only_in_doubt(library: FreshDatabase, driver: str) -> None:
    """What release() adds to BEGIN, statement, ROLLBACK."""
    expected: dict[Executable, int] = {
        select(Shelf).order_by(Shelf.id): 1,
        text("SELECT max(id) FROM shelves"): 1,
        text("EXPLAIN SELECT 1"): 2,
        text("SELECT harmless()"): 2,
        select(func.harmless()): 2,
    }
    found: dict[Executable, int] = {}
    async with FaultProxy(library.server.port) as proxy:
        url = proxy.through(library.url(driver))
        async with Database(url, pool_size=1, max_overflow=0) as db:
            for statement in expected:
                for number in range(WARMING + 1):
                    async with db.session() as session:
                        await session.execute(statement)
                        if number == WARMING:
                            proxy.forget()
                        await release(session)
                        found[statement] = proxy.round_trips
    assert found == expected


async def test_a_function_that_writes_is_found_out(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    """By its words it only reads; it must not be lost in silence."""
    column: ColumnElement[int] = literal_column("writes()")
    statements: list[Any] = [text("SELECT writes()"), select(func.writes()), func.writes(), select(column)]
    for statement in statements:
        await library.execute("DELETE FROM shelves WHERE id = 7")
        async with db.session() as session:
            await session.execute(statement)
            with pytest.raises(UnsavedWrites, match=r"\(writes\(\)\)"):
                await release(session)
            await session.commit()
            await session.scalar(select(Shelf.id))
            await release(session)
            await assert_released(db, library)
        assert await shelves(library) == [1, 7]


async def test_of_an_engine_with_its_own_pool_the_server_is_always_asked(
    library: FreshDatabase, driver: str
) -> None:
    """There nobody looks at what is sent."""
    engine = create_async_engine(library.url(driver))
    async with Database(engine, adopt=False).session() as session:
        await session.execute(select(func.harmless()))
        await release(session)
        await session.execute(select(func.writes()))
        with pytest.raises(UnsavedWrites, match="what was executed"):
            await release(session)
    await engine.dispose()
    assert await shelves(library) == [1]


# Inside somebody's block ----------------------------------------------------------------------------------


async def test_inside_a_block_it_is_refused(db: Database[AsyncSession], library: FreshDatabase) -> None:
    async with db.session() as session:
        async with session.begin():
            await session.scalar(select(Shelf.id))
            with pytest.raises(UnitConflict, match=r"session\.begin\(\)"):
                await release(session)
        async with atomic(session):
            await session.scalar(select(Shelf.id))
            with pytest.raises(UnitConflict, match=r"atomic\(\) at test_release\.py:\d+"):
                await release(session)
        await session.scalar(select(Shelf.id))
        async with session.begin_nested():
            with pytest.raises(UnitConflict, match=r"begin_nested\(\)"):
                await release(session)
        await release(session)
        await assert_released(db, library)


async def test_after_the_end_it_says_so(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        await session.scalar(select(Shelf.id))
    with pytest.raises(SessionClosed):
        await release(session)


async def test_a_session_of_nobodys_is_refused(library: FreshDatabase, driver: str) -> None:
    engine = create_async_engine(library.url(driver))
    async with AsyncSession(engine) as session:
        with pytest.raises(NotInstalled):
            await release(session)
    await engine.dispose()


async def test_a_transaction_that_has_failed_can_be_released(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.session() as session:
        with pytest.raises(DBAPIError):
            await session.execute(select(1 / (Shelf.id - Shelf.id)))
        await release(session)
        await assert_released(db, library)
        assert await session.scalar(select(Shelf.id)) == 1


async def test_a_doubt_before_a_failure_is_told(db: Database[AsyncSession], library: FreshDatabase) -> None:
    """A transaction that has failed answers nothing; what it may have written is not dropped in silence."""
    async with db.session() as session:
        await session.execute(text("SELECT writes()"))
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT nothing_like_it()"))
        with pytest.raises(TransactionAborted, match=r"at test_release\.py:\d+"):
            await release(session)
        await session.rollback()
        await release(session)
        await assert_released(db, library)


async def test_rollback_only_outlives_a_release(db: Database[AsyncSession], library: FreshDatabase) -> None:
    async with db.transaction() as session:
        rollback_only(session)
        await session.scalar(select(Shelf.id))
        await release(session)
        await session.execute(insert(Shelf).values(id=9, label="x"))
    assert await shelves(library) == [1]


# Over HTTP ------------------------------------------------------------------------------------------------


async def test_in_a_request_the_connection_is_back_during_the_slow_work_and_the_end_commits(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    app = FastAPI()
    install(app, db)
    seen: list[int] = []

    @app.post("/charge")
    async def charge(session: SessionDep) -> dict[str, str]:
        shelf = await session.get_one(Shelf, 1)
        await release(session)
        seen.append(db.stats().in_use)
        async with db.transaction() as other:  # there is but one connection
            await other.execute(insert(Shelf).values(id=2, label="other"))
        shelf.label = "paid"
        return {"label": shelf.label}

    @app.post("/too-late")
    async def too_late(session: SessionDep) -> None:
        await session.execute(insert(Shelf).values(id=3, label="lost"))
        await release(session)

    @app.get("/read")
    async def read(session: ReaderDep) -> str:
        label = (await session.get_one(Shelf, 1)).label
        await release(session)
        return label

    async with client_of(app) as client:
        reply = await client.post("/charge")
        assert (reply.status_code, reply.json()) == (200, {"label": "paid"})
        assert seen == [0]
        assert await library.fetchval("SELECT label FROM shelves WHERE id = 1") == "paid"
        assert (await client.post("/too-late")).status_code == 500
        assert await shelves(library) == [1, 2]
        assert (await client.get("/read")).json() == "paid"
    await until(library, "SELECT 1")


# SQLite ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def on_sqlite(tmp_path: Path) -> AsyncIterator[Database[AsyncSession]]:
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/library.db", pool_size=2, max_overflow=0) as db:
        async with db.begin() as connection:
            for statement in TABLES.strip().split(";")[:-1]:
                await connection.execute(text(statement))
        yield db
        assert db.stats().in_use == 0


async def test_on_sqlite_a_released_session_lets_others_write(on_sqlite: Database[AsyncSession]) -> None:
    """A transaction that may write holds SQLite's only lock."""
    async with on_sqlite.transaction() as session:
        shelf = await session.get_one(Shelf, 1)
        await release(session)
        assert on_sqlite.stats().in_use == 0
        async with on_sqlite.transaction() as other:
            other.add(Shelf(id=2, label="two"))
        assert shelf.label == "one"
        assert len((await session.scalars(select(Shelf))).all()) == 2


@pytest.mark.parametrize("what", DIRTY)
async def test_on_sqlite_uncommitted_writes_are_named(on_sqlite: Database[AsyncSession], what: str) -> None:
    write, named = DIRTY[what]
    async with on_sqlite.session() as session:
        await write(session)
        with pytest.raises(UnsavedWrites, match=rf"\({named}\)"):
            await release(session)
        await session.commit()


async def test_on_sqlite_a_doubt_counts_as_a_write(on_sqlite: Database[AsyncSession]) -> None:
    """There is nobody to ask."""
    async with on_sqlite.session() as session:
        await session.execute(text("CREATE TABLE more (id int)"))
        with pytest.raises(UnsavedWrites, match=r"text\(CREATE\)"):
            await release(session)
        await session.commit()
