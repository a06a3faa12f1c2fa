"""A reader's connection sends nothing that writes, however the statement was built; the database tells the truth."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    delete,
    exists,
    func,
    insert,
    lambda_stmt,
    literal_column,
    make_url,
    null,
    select,
    text,
    union,
    update,
    values,
)
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.schema import CreateTable, DropTable
from sqlalchemy.sql import column, quoted_name

from stanch import Database, WriteRefused
from stanch.reading import mark_reader, objection_to, objection_when_compiled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.support.judge import FreshDatabase


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    lock: Mapped[str | None]
    books: Mapped[list[Book]] = relationship(back_populates="shelf")


class Book(Base):
    """Its columns are called like the words that write, which SQLAlchemy sends without quotes."""

    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("shelf.id"))
    update: Mapped[str]
    delete: Mapped[str | None]
    set: Mapped[int | None]
    shelf: Mapped[Shelf] = relationship(back_populates="books")


BOOK: Any = Book.__table__
DIALECT = make_url("postgresql+asyncpg://").get_dialect()()
INSERTED = insert(BOOK).values(id=7, shelf_id=1, update="x").returning(BOOK.c.id)

WRITING: dict[str, Callable[[], Any]] = {
    "insert": lambda: INSERTED,
    "update": lambda: update(Book).values(update="y"),
    "delete": lambda: delete(Book),
    "drop table": lambda: DropTable(BOOK),
    "create table": lambda: CreateTable(Table("new", MetaData(), Column("id", Integer))),
    "insert in a cte": lambda: select(INSERTED.cte("x")),
    "insert in a cte of a cte": lambda: select(select(INSERTED.cte("x")).cte("y")),
    "insert in an added cte": lambda: select(Book).add_cte(INSERTED.cte("x")),
    "insert in a union": lambda: union(select(literal_column("1")), select(INSERTED.cte("x"))),
    "insert in a scalar subquery": lambda: select(
        select(INSERTED.cte("x").c.id).scalar_subquery().label("one")
    ),
    "insert in exists": lambda: select(Book).where(
        exists(select(delete(BOOK).returning(BOOK.c.id).cte("x")))
    ),
    "from an insert": lambda: select(Book).from_statement(insert(Book).values(id=7).returning(Book)),
    "for update": lambda: select(Book).with_for_update(),
    "for share of a subquery": lambda: select(select(BOOK).with_for_update(read=True).subquery()),
    "for no key update of a cte": lambda: select(select(BOOK).with_for_update(key_share=True).cte("x")),
    "a sequence": lambda: Sequence("s"),
    "the next value of a sequence": lambda: select(Sequence("s").next_value()),
    "a sequence in where": lambda: select(Book).where(Book.id == Sequence("s").next_value()),
    "nextval": lambda: func.nextval("s"),
    "nextval of a schema": lambda: select(func.pg_catalog.nextval("s")),
    "nextval in quotes": lambda: select(getattr(func, "nextval")("s")),  # noqa: B009  # as it is built from a name
    "set_config": lambda: select(func.set_config("role", "x", False)),
    "advisory lock": lambda: select(func.pg_advisory_lock(1)),
    "a smuggled name": lambda: select(column(quoted_name("nextval('s')", quote=False), Integer)),
    "a smuggled column": lambda: select(literal_column("nextval('s')", Integer)),
    "a smuggled operator": lambda: select(literal_column("1", Integer).op("+ nextval('s') +")(1)),
    "a text in where": lambda: select(Book).where(text("nextval('s') > 0")),
    "a prefix": lambda: select(Book).prefix_with("nextval('s'),"),
    "a suffix": lambda: select(Book).suffix_with("FOR UPDATE"),
    "a hint": lambda: select(Book).with_statement_hint("FOR UPDATE"),
    "a text": lambda: text("INSERT INTO shelf VALUES (9)"),
    "a text in disguise": lambda: text("/* x */ WITH x AS (DELETE FROM book RETURNING *) SELECT * FROM x"),
    "two statements": lambda: text("SELECT 1; DROP TABLE book"),
    "a text with columns": lambda: text("DELETE FROM book RETURNING id").columns(column("id", Integer)),
    "objects from a text": lambda: select(Book).from_statement(text("DELETE FROM book RETURNING *")),
    "a lambda": lambda: lambda_stmt(lambda: delete(Book)),
}

READING: dict[str, Callable[[], Any]] = {
    "objects": lambda: select(Book),
    "columns called like words": lambda: select(Book.update, Book.delete, Book.set).where(Book.update == "x"),
    "a label called like a word": lambda: select(Book.id.label("update"), Book.id.label("FOR UPDATE")),
    "an alias called like a word": lambda: select(BOOK.alias("lock")),
    "a cte called like a word": lambda: select(select(Book.update).cte("insert")),
    "a join": lambda: select(Shelf.lock, Book).join(Book),
    "a union": lambda: union(select(Book.id), select(Shelf.id)),
    "a values": lambda: select(values(column("set", Integer), name="set").data([(1,), (2,)])),
    "exists": lambda: select(exists().where(Book.update == "x")),
    "a function": lambda: func.count(Book.update),
    "a value that looks like SQL": lambda: select(Book).where(Book.update == "'; DELETE FROM book; --"),
    "an inline value that looks like SQL": lambda: select(Book).where(
        Book.update == literal_column("'insert into'", String)
    ),
    "a text": lambda: text("SELECT 'insert into', id FROM book WHERE id = :id").bindparams(id=1),
    "a text with columns": lambda: text("SELECT id FROM book").columns(column("id", Integer)),
    "objects from a text": lambda: select(Book).from_statement(text("SELECT * FROM book")),
    "an in list": lambda: select(Book).where(Book.id.in_([1, 2, 3])),
    "a lambda": lambda: lambda_stmt(lambda: select(Book)),
    "nothing": lambda: select(null()),
}


@asynccontextmanager
async def library(judged: FreshDatabase, driver: str) -> AsyncGenerator[Database[AsyncSession]]:
    async with Database(judged.url(driver), pool_size=1, max_overflow=0) as db:
        async with db.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await judged.execute(
            "CREATE SEQUENCE s; INSERT INTO shelf VALUES (1), (2);"
            " INSERT INTO book (id, shelf_id, update) VALUES (1, 1, 'a'), (2, 2, 'b')"
        )
        yield db


async def unharmed(judged: FreshDatabase) -> None:
    rows = await judged.fetch(
        "SELECT (SELECT count(*) FROM book), (SELECT count(*) FROM shelf), (SELECT is_called FROM s),"
        " (SELECT string_agg(update, '') FROM book), (SELECT count(*) FROM pg_class WHERE relname = 'new'),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')"
    )
    assert tuple(rows[0].values()) == (2, 2, False, "ab", 0, 0)


@asynccontextmanager
async def reader(db: Database[AsyncSession]) -> AsyncGenerator[AsyncSession]:
    """A plain session on a reader's connection, which commits each statement by itself."""
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        mark_reader(await connection.run_sync(lambda sync: sync), "a test")
        async with AsyncSession(connection) as session:
            yield session


@pytest.mark.anyio
async def test_a_reader_sends_nothing_that_writes_however_it_was_built(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with library(fresh_database, driver) as db:
        for make in [*WRITING.values(), *WRITING.values()]:  # the second time from SQLAlchemy's cache
            async with reader(db) as session:
                with pytest.raises(WriteRefused, match="a test may only read"):
                    await session.scalar(make())
                assert await session.scalar(select(literal_column("1"))) == 1
        await unharmed(fresh_database)


@pytest.mark.anyio
async def test_a_reader_may_execute_whatever_only_reads(fresh_database: FreshDatabase, driver: str) -> None:
    async with library(fresh_database, driver) as db, reader(db) as session:
        for make in READING.values():
            assert objection_to(make()) is None
            (await session.execute(make())).all()
            session.expire_all()
        shelf = await session.get(Shelf, 1)
        assert shelf is not None
        assert [book.update for book in await shelf.awaitable_attrs.books] == ["a"]  # a lazy load
        await session.refresh(shelf)
        await unharmed(fresh_database)
        assert not db.engine.sync_engine._has_events  # pyright: ignore[reportPrivateUsage]  # what the seam is for


@pytest.mark.anyio
async def test_a_driver_level_statement_and_a_flush_of_a_reader_are_judged_too(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with library(fresh_database, driver) as db:
        async with reader(db) as session:
            connection = await session.connection()
            with pytest.raises(WriteRefused, match="DELETE"):
                await connection.exec_driver_sql("DELETE FROM book")
            await connection.execution_options(no_parameters=True)
            with pytest.raises(WriteRefused, match="a second statement"):
                await connection.exec_driver_sql("SELECT 1; DELETE FROM book")
        async with reader(db) as session:
            session.add_all([Shelf(id=8), Shelf(id=9)])
            with pytest.raises(WriteRefused, match="INSERT"):
                await session.flush()
        await unharmed(fresh_database)


@pytest.mark.anyio
async def test_who_is_no_reader_is_left_alone(fresh_database: FreshDatabase, driver: str) -> None:
    async with library(fresh_database, driver) as db:
        async with reader(db) as session:
            await session.execute(select(Book))
        async with db.transaction() as session:  # on the same connection
            await session.execute(delete(Book))
    assert await fresh_database.fetchval("SELECT count(*) FROM book") == 0


@pytest.mark.parametrize(
    ("statement", "objection"),
    [
        (INSERTED, "Insert"),
        (Sequence("s"), "Sequence"),
        (DropTable(BOOK), "DropTable"),
        (text("select 1; select 2"), "a second statement after ;"),
        (select(Book).from_statement(text("delete from book")), "DELETE"),
        (text("delete from book").columns(column("id")), "DELETE"),
        (select(Book).from_statement(update(Book).returning(Book)), "Update"),
        (lambda_stmt(lambda: delete(Book)), "StatementLambdaElement"),
        ("select 1", "str"),
    ],
)
def test_the_kind_alone_is_judged_before_a_connection_is_taken(statement: Any, objection: str) -> None:
    assert objection_to(statement) == objection


@pytest.mark.parametrize("kind", WRITING)
def test_a_statement_for_an_engine_that_is_not_ours_is_compiled_to_be_judged(kind: str) -> None:
    assert objection_when_compiled(WRITING[kind](), DIALECT) is not None


@pytest.mark.parametrize("kind", READING)
def test_what_only_reads_passes_there_too(kind: str) -> None:
    assert objection_when_compiled(READING[kind](), DIALECT) is None


# A random statement ---------------------------------------------------------------------------------------


def harmless(draw: random.Random, depth: int) -> Any:
    """A random select() of one integer column, nested to *depth*."""
    inner = select(Book.id) if depth == 0 else harmless(draw, depth - 1)
    match draw.randrange(7):
        case 0:
            return select(inner.cte(draw.choice(["update", "x", "into"]) + str(depth)))
        case 1:
            return select(inner.subquery(draw.choice(["delete", "set"])))
        case 2:
            return select(Shelf.id.label("for update")).where(exists(inner))
        case 3:
            return select(union(inner, select(Shelf.id)).subquery())
        case 4:
            return select(Book.id).where(Book.id.in_(inner), Book.update != "nextval('s')")
        case 5:
            return select(func.coalesce(inner.limit(1).scalar_subquery(), literal_column("0")).label("share"))
        case _:
            return inner


def harmful(draw: random.Random) -> Any:
    match draw.randrange(5):
        case 0:
            return select(INSERTED.cte("bad"))
        case 1:
            return select(func.nextval("s"))
        case 2:
            return select(Book.id).with_for_update()
        case 3:
            return select(literal_column("pg_advisory_lock(3)", Integer))
        case _:
            return select(delete(BOOK).returning(BOOK.c.id).cte("bad"))


@pytest.mark.anyio
async def test_a_write_in_a_random_statement_is_found_and_none_is_made_up(
    fresh_database: FreshDatabase, driver: str
) -> None:
    draw = random.Random(7)
    refused = accepted = 0
    async with library(fresh_database, driver) as db, reader(db) as session:
        for _ in range(300):
            statement = harmless(draw, draw.randint(0, 3))
            if draw.random() < 0.5:
                bad = harmful(draw).subquery() if draw.random() < 0.5 else harmful(draw).cte()
                statement = union(statement, select(bad))
                with pytest.raises(WriteRefused):
                    await session.execute(statement)
                refused += 1
            else:
                (await session.execute(statement)).all()
                accepted += 1
        await unharmed(fresh_database)
    assert min(refused, accepted) > 100
