"""A reader holds a connection only while a statement runs, says nothing but the statement, and refuses to write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    Connection,
    ForeignKey,
    Sequence,
    delete,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
    union,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    defer,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    undefer,
)
from sqlalchemy.schema import CreateTable

from stanch import Database, WriteRefused, after_rollback, atomic, on_commit
from stanch.sessions import guarded_session
from stanch.unit import Kind, Mode, Unit, Wish
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stanch.drivers import Driver

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

WARMING = 7
"""psycopg prepares a statement at its sixth time; asyncpg asks once for each type it does not know."""


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label: Mapped[str]
    books: Mapped[list[Book]] = relationship(back_populates="shelf", order_by="Book.id")


class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str]
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelves.id"))
    shelf: Mapped[Shelf | None] = relationship(back_populates="books")


SCHEMA = """
    CREATE TABLE shelves (id int PRIMARY KEY, label text NOT NULL);
    CREATE TABLE books (id int PRIMARY KEY, title text NOT NULL, shelf_id int REFERENCES shelves);
    INSERT INTO shelves VALUES (1, 'one'), (2, 'two');
    INSERT INTO books VALUES (1, 'a', 1), (2, 'b', 1), (3, 'c', 2);
"""


@pytest.fixture
async def library(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(SCHEMA)
    return fresh_database


@pytest.fixture
async def db(library: FreshDatabase, driver: str) -> AsyncIterator[Database[AsyncSession]]:
    """One connection only: whoever needs a second one at the same time waits in vain."""
    async with Database(library.url(driver), pool_size=1, max_overflow=0, pool_timeout=2) as db:
        yield db
        await assert_nothing_left(library, db)
    assert await stored(library) == STORED


@pytest.fixture
async def shelf_of_sqlite(tmp_path: Path) -> AsyncIterator[Database[AsyncSession]]:
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/library.db", pool_size=1, max_overflow=0) as db:
        async with db.begin() as connection:
            for statement in SCHEMA.strip().split(";")[:-1]:
                await connection.execute(text(statement))
        yield db
        assert db.stats().in_use == 0


STORED = [(1, "one", ("a", "b")), (2, "two", ("c",))]


async def stored(library: FreshDatabase) -> list[tuple[int, str, tuple[str, ...]]]:
    rows = await library.fetch(
        "SELECT s.id, s.label, array_agg(b.title ORDER BY b.id) FROM shelves s JOIN books b ON s.id = shelf_id"
        " GROUP BY s.id ORDER BY s.id"
    )
    return [(row[0], row[1], tuple(row[2])) for row in rows]


async def assert_holds_nothing(db: Database[Any], library: FreshDatabase) -> None:
    """The one connection is back in the pool, and still the one."""
    stats = db.stats()
    assert (stats.in_use, stats.idle) == (0, 1)
    assert [row["state"] for row in await library.activity()] == ["idle"]


# Every way to read ----------------------------------------------------------------------------------------

Read = Callable[[AsyncSession], Awaitable[object]]


@dataclass(frozen=True)
class Reading:
    read: Read
    gives: object
    round_trips: int = 1


async def _titles(session: AsyncSession) -> list[str]:
    return [book.title for book in await session.scalars(select(Book).order_by(Book.id))]


async def _partitions(session: AsyncSession) -> list[list[int]]:
    result = await session.scalars(select(Book.id).order_by(Book.id))
    return [list(part) for part in result.partitions(2)]


async def _identity(session: AsyncSession) -> bool:
    one = await session.get_one(Shelf, 1)
    return one is await session.get(Shelf, 1) is await session.scalar(select(Shelf).where(Shelf.id == 1))


async def _refreshed(session: AsyncSession) -> str:
    shelf = await session.get_one(Shelf, 1)
    await session.refresh(shelf)
    return shelf.label


async def _refreshed_with_books(session: AsyncSession) -> int:
    shelf = await session.get_one(Shelf, 1)
    await session.refresh(shelf, ["label", "books"])
    return len(shelf.books)


async def _populated(session: AsyncSession) -> str:
    await session.get_one(Shelf, 1)
    again = select(Shelf).execution_options(populate_existing=True).order_by(Shelf.id)
    return (await session.scalars(again)).first().label  # type: ignore[union-attr]  # there are two


async def _selected_in(session: AsyncSession) -> list[int]:
    shelves = await session.scalars(select(Shelf).options(selectinload(Shelf.books)).order_by(Shelf.id))
    return [len(shelf.books) for shelf in shelves]


async def _joined(session: AsyncSession) -> list[int]:
    shelves = await session.scalars(select(Shelf).options(joinedload(Shelf.books)).order_by(Shelf.id))
    return [len(shelf.books) for shelf in shelves.unique()]


async def _lazily(session: AsyncSession) -> list[str]:
    shelf = await session.get_one(Shelf, 1)
    return [book.title for book in await shelf.awaitable_attrs.books]


async def _back_and_forth(session: AsyncSession) -> str:
    """The shelf of a book is in the identity map by then."""
    shelf = await session.get_one(Shelf, 2)
    book = (await shelf.awaitable_attrs.books)[0]
    assert await book.awaitable_attrs.shelf is shelf
    return str(book.title)


async def _in_sync(session: AsyncSession) -> list[str]:
    return await session.run_sync(lambda sync: [book.title for book in sync.get_one(Shelf, 1).books])


async def _deferred(session: AsyncSession) -> str:
    book = await session.get_one(Book, 3, options=[defer(Book.title)])
    return str(await book.awaitable_attrs.title)


async def _undeferred(session: AsyncSession) -> str:
    return str((await session.get_one(Book, 3, options=[undefer(Book.title)])).title)


async def _all(session: AsyncSession) -> list[int]:
    return list((await session.execute(select(Book.id).order_by(Book.id))).scalars().all())


async def _by_text(session: AsyncSession) -> str:
    statement = select(Book).from_statement(text("SELECT * FROM books WHERE id = :id"))
    return str((await session.scalars(statement, {"id": 2})).one().title)


READINGS: dict[str, Reading] = {
    "execute": Reading(_all, [1, 2, 3]),
    "scalar": Reading(lambda session: session.scalar(select(func.count()).select_from(Book)), 3),
    "scalars": Reading(_titles, ["a", "b", "c"]),
    "function": Reading(lambda session: session.scalar(func.abs(-3)), 3),
    "text": Reading(lambda session: session.scalar(text("SELECT max(id) FROM books")), 3),
    "from_statement": Reading(_by_text, "b"),
    "union": Reading(lambda session: session.scalar(union(select(Book.id)).order_by("id")), 1),
    "partitions": Reading(_partitions, [[1, 2], [3]]),
    "get": Reading(lambda session: session.get(Shelf, 404), None),
    "identity map": Reading(_identity, True, 2),
    "refresh": Reading(_refreshed, "one", 2),
    "refresh of a relationship": Reading(_refreshed_with_books, 2, 3),
    "populate_existing": Reading(_populated, "one", 2),
    "selectinload": Reading(_selected_in, [2, 1], 2),
    "joinedload": Reading(_joined, [2, 1]),
    "awaitable_attrs": Reading(_lazily, ["a", "b"], 2),
    "there and back": Reading(_back_and_forth, "c", 2),
    "run_sync": Reading(_in_sync, ["a", "b"], 2),
    "a deferred column": Reading(_deferred, "c", 2),
    "an undeferred column": Reading(_undeferred, "c"),
}


@pytest.mark.parametrize("how", READINGS)
async def test_each_way_to_read_gives_the_connection_back(
    db: Database[AsyncSession], library: FreshDatabase, how: str
) -> None:
    reading = READINGS[how]
    async with db.reader() as session:
        assert await reading.read(session) == reading.gives
        await assert_holds_nothing(db, library)
        assert not session.in_transaction()
        assert await reading.read(session) == reading.gives


async def test_each_statement_is_one_round_trip_and_an_unused_reader_none(
    library: FreshDatabase, driver: str
) -> None:
    """Counted on the wire, on a warm connection: no BEGIN, no ROLLBACK, nothing at the checkout and the return."""
    found: dict[str, int] = {}
    async with FaultProxy(library.server.port) as proxy:
        url = proxy.through(library.url(driver))
        async with Database(url, pool_size=1, max_overflow=0) as db:

            async def round_trips(read: Read) -> int:
                for number in range(WARMING + 1):
                    if number == WARMING:
                        proxy.forget()
                    async with db.reader() as session:
                        await read(session)
                assert proxy.connections == 0
                assert proxy.queries == []  # BEGIN and its like would come as such
                return proxy.round_trips

            for how, reading in READINGS.items():
                found[how] = await round_trips(reading.read)
            assert await round_trips(lambda _session: asyncio.sleep(0)) == 0
    assert found == {how: reading.round_trips for how, reading in READINGS.items()}


@pytest.mark.parametrize("how", [how for how in READINGS if how != "function"])
async def test_on_sqlite_each_way_to_read_gives_the_connection_back(
    shelf_of_sqlite: Database[AsyncSession], how: str
) -> None:
    reading = READINGS[how]
    async with shelf_of_sqlite.reader() as session:
        assert await reading.read(session) == reading.gives
        assert shelf_of_sqlite.stats().in_use == 0
        assert not session.in_transaction()
    async with shelf_of_sqlite.transaction() as session:
        session.add(Shelf(id=9, label="nine"))  # the connection has not stayed a reader's


async def test_the_result_of_a_reader_is_read_after_its_connection_has_gone(
    db: Database[AsyncSession],
) -> None:
    async with db.reader() as session:
        result = await session.execute(select(Book).order_by(Book.id))
        assert db.stats().in_use == 0
        assert (await session.scalars(select(Shelf))).all()
        assert [book.title for book in result.scalars()] == ["a", "b", "c"]


async def test_two_readers_of_one_task_share_one_connection(db: Database[AsyncSession]) -> None:
    async with db.reader() as one, db.reader() as other, db.transaction() as writer:
        for session in (one, other, one, writer):
            assert await session.scalar(select(func.count()).select_from(Book)) == 3
            if session is not writer:
                assert db.stats().in_use == 0
    assert db.stats().size == 1


async def test_a_reader_sees_each_time_what_was_committed_by_then(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.reader() as session:
        shelf = await session.get_one(Shelf, 1)
        await library.execute("UPDATE shelves SET label = 'new'")
        assert await session.scalar(select(Shelf.label).where(Shelf.id == 1)) == "new"
        assert shelf.label == "one"  # an object is what it was until it is refreshed
        await session.refresh(shelf)
        assert shelf.label == "new"
    await library.execute("UPDATE shelves SET label = 'one' WHERE id = 1")
    await library.execute("UPDATE shelves SET label = 'two' WHERE id = 2")


async def test_a_snapshot_sees_one_state_where_a_reader_sees_two(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    count = select(func.count()).select_from(Book)
    seen: dict[str, list[int]] = {}
    for how, opened in (
        ("reader", db.reader()),
        ("snapshot", db.transaction(read_only=True, isolation_level="REPEATABLE READ")),
    ):
        async with opened as session:
            seen[how] = [await session.scalar(count) or 0]
            await library.execute("INSERT INTO books VALUES (4, 'd', 2)")
            seen[how].append(await session.scalar(count) or 0)
        await library.execute("DELETE FROM books WHERE id = 4")
    assert seen == {"reader": [3, 4], "snapshot": [3, 3]}


async def test_a_snapshot_is_guarded_by_the_server(db: Database[AsyncSession]) -> None:
    with pytest.raises(WriteRefused, match="the server refused"):
        async with db.transaction(read_only=True, isolation_level="REPEATABLE READ") as session:
            await session.execute(update(Book).values(title="x"))


# What comes after a reader, on the connection that it had ---------------------------------------------------


async def _read_well(session: AsyncSession, _library: FreshDatabase) -> None:
    assert await _titles(session) == ["a", "b", "c"]


async def _fail(session: AsyncSession, _library: FreshDatabase) -> None:
    with pytest.raises(DBAPIError):
        await session.scalar(text("SELECT * FROM nowhere"))


async def _be_refused(session: AsyncSession, _library: FreshDatabase) -> None:
    with pytest.raises(WriteRefused):
        await session.execute(select(Book).with_for_update())


async def _be_cancelled(session: AsyncSession, library: FreshDatabase) -> None:
    task = asyncio.create_task(_sleep(session))
    await until(library, "SELECT FROM pg_stat_activity WHERE query ~ 'pg_sleep' AND state = 'active'")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _sleep(session: AsyncSession) -> None:
    await session.scalar(text("SELECT pg_sleep(30)"))


@pytest.mark.parametrize("level", [None, "SERIALIZABLE", "AUTOCOMMIT"])
@pytest.mark.parametrize("read", [_read_well, _fail, _be_refused, _be_cancelled])
async def test_whoever_comes_next_begins_a_transaction_as_if_no_reader_had_been_there(
    library: FreshDatabase,
    driver: str,
    level: Any,
    read: Callable[[AsyncSession, FreshDatabase], Awaitable[None]],
) -> None:
    async with Database(library.url(driver), pool_size=1, max_overflow=0, isolation_level=level) as db:
        async with db.connect() as connection:
            before = await _way_of(connection)
        async with db.reader() as session:
            await read(session, library)
            async with db.connect() as connection:
                assert await _way_of(connection) == before
            await read(session, library)
        async with db.connect() as connection:
            assert await _way_of(connection) == before
        assert before == (
            (level or "READ COMMITTED").lower().replace("autocommit", "read committed"),
            level != "AUTOCOMMIT",
        )


async def _way_of(connection: AsyncConnection) -> tuple[object, bool]:
    """The isolation level, and whether the two statements have been in one transaction."""
    level = await connection.scalar(text("SHOW transaction_isolation"))
    begun = await connection.scalar(text("SELECT now()"))
    return level, begun == await connection.scalar(text("SELECT now()"))


class Telling(Session):
    """A sync session class of the user's, with a listener that says something as each transaction begins."""


class AsyncTelling(AsyncSession):
    sync_session_class = Telling


async def test_who_listens_for_the_begin_of_a_transaction_hears_of_each_statement_of_a_reader(
    library: FreshDatabase, driver: str
) -> None:
    said = "SELECT 'begun'"
    told: list[object] = []

    @event.listens_for(Telling, "after_begin", propagate=True)
    def begun(_session: Session, _transaction: object, connection: Connection) -> None:
        told.append(connection.scalar(text(said)))

    async with Database(library.url(driver), session_class=AsyncTelling, pool_size=1, max_overflow=0) as db:
        async with db.reader() as session:
            shelf = (await session.scalars(select(Shelf).options(selectinload(Shelf.books)).limit(1))).one()
            assert len(shelf.books) == 2
            assert told == ["begun"] * len(told)
            await assert_holds_nothing(db, library)
            before = len(told)
            await _titles(session)
            assert len(told) == before + 1
            await assert_holds_nothing(db, library)
            said = "DELETE FROM books"
            with pytest.raises(WriteRefused):
                await _titles(session)
            await assert_holds_nothing(db, library)
            said = "SELECT 'begun'"
        async with db.connect() as connection:
            assert await _way_of(connection) == ("read committed", True)
    assert await stored(library) == STORED


# What goes wrong ------------------------------------------------------------------------------------------


async def test_a_statement_that_fails_gives_its_connection_back(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.reader() as session:
        book = await session.get_one(Book, 1)
        with pytest.raises(DBAPIError, match="22012"):
            await session.scalar(text("SELECT 1 / (SELECT 0)"))
        await assert_holds_nothing(db, library)
        with pytest.raises(DBAPIError):
            await session.scalar(text("SELECT * FROM nowhere"))
        await assert_holds_nothing(db, library)
        assert book.title == "a"
        assert await _titles(session) == ["a", "b", "c"]


async def test_a_cancelled_statement_gives_its_connection_back(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.reader() as session:
        book = await session.get_one(Book, 1)
        await _be_cancelled(session, library)
        await assert_nothing_left(library, db)
        assert book.title == "a"
        assert await _titles(session) == ["a", "b", "c"]


async def test_an_error_of_the_block_is_what_comes_out(db: Database[AsyncSession]) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with db.reader() as session:
            shelf = await session.get_one(Shelf, 1)
            shelf.label = "changed"
            raise LookupError("mine")


# What is refused ------------------------------------------------------------------------------------------


async def _stream(session: AsyncSession) -> None:
    await session.stream(select(Book))


async def _begin(session: AsyncSession) -> None:
    async with session.begin():
        raise AssertionError("begun")


async def _begin_nested(session: AsyncSession) -> None:
    async with session.begin_nested():
        raise AssertionError("begun")


async def _begin_in_sync(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.begin())


async def _atomic(session: AsyncSession) -> None:
    async with atomic(session):
        raise AssertionError("begun")


async def _flush(session: AsyncSession) -> None:
    session.add(Shelf(id=9, label="nine"))
    try:
        await session.flush()
    finally:
        session.expunge_all()


async def _change_and_flush(session: AsyncSession) -> None:
    shelf = await session.get_one(Shelf, 1)
    shelf.label = "changed"
    try:
        await session.flush()
    finally:
        session.expunge_all()


async def _commit_a_change(session: AsyncSession) -> None:
    session.add(Shelf(id=9, label="nine"))
    try:
        await session.commit()
    finally:
        session.expunge_all()


async def _delete(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Book, 1))
    try:
        await session.flush()
    finally:
        session.expunge_all()


async def _merge_and_flush(session: AsyncSession) -> None:
    await session.merge(Shelf(id=1, label="merged"))
    try:
        await session.flush()
    finally:
        session.expunge_all()


async def _hook(session: AsyncSession) -> None:
    on_commit(session, print, "committed")


async def _rollback_hook(session: AsyncSession) -> None:
    after_rollback(session, print, "rolled back")


ROWS: list[dict[str, object]] = [{"id": 8, "label": "x"}, {"id": 9, "label": "y"}]

WRITES: dict[str, Read] = {
    "stream()": _stream,
    "stream_scalars()": lambda session: session.stream_scalars(select(Book)),
    "yield_per": lambda session: session.execute(select(Book).execution_options(yield_per=1)),
    "yield_per as an option": lambda session: session.execute(
        select(Book), execution_options={"yield_per": 1}
    ),
    "stream_results": lambda session: session.execute(select(Book).execution_options(stream_results=True)),
    "connection()": lambda session: session.connection(),
    "begin()": _begin,
    "begin() in sync": _begin_in_sync,
    "begin_nested()": _begin_nested,
    "atomic()": _atomic,
    "flush()": _flush,
    "flush() of a change": _change_and_flush,
    "commit() of a new object": _commit_a_change,
    "delete()": _delete,
    "merge()": _merge_and_flush,
    "bulk_insert_mappings": lambda session: session.run_sync(
        lambda sync: sync.bulk_insert_mappings(Shelf, ROWS)
    ),
    "bulk_save_objects": lambda session: session.run_sync(
        lambda sync: sync.bulk_save_objects([Shelf(id=8, label="x")])
    ),
    "bulk_update_mappings": lambda session: session.run_sync(
        lambda sync: sync.bulk_update_mappings(Shelf, [{"id": 1, "label": "x"}])
    ),
    "insert": lambda session: session.execute(insert(Shelf).values(id=9, label="x")),
    "insert of several": lambda session: session.execute(insert(Shelf), ROWS),
    "insert returning": lambda session: session.scalars(
        insert(Shelf).values(id=9, label="x").returning(Shelf)
    ),
    "update": lambda session: session.execute(update(Shelf).values(label="x")),
    "delete": lambda session: session.execute(delete(Book)),
    "DDL": lambda session: session.execute(CreateTable(Shelf.__table__)),  # type: ignore[arg-type]  # it is a Table
    "a sequence": lambda session: session.scalar(Sequence("numbers")),
    "with_for_update": lambda session: session.execute(select(Book).with_for_update()),
    "get(with_for_update=)": lambda session: session.get(Book, 1, with_for_update=True),
    "a lock in a subquery": lambda session: session.execute(
        select(select(Book).with_for_update(read=True).subquery())
    ),
    "an INSERT in a CTE": lambda session: session.execute(
        select(insert(Shelf).values(id=9, label="x").returning(Shelf.id).cte())
    ),
    "nextval": lambda session: session.scalar(func.nextval("numbers")),
    "a literal column": lambda session: session.scalar(select(literal_column("nextval('numbers')"))),
    "text INSERT": lambda session: session.execute(text("INSERT INTO shelves VALUES (9, 'x')")),
    "text WITH INSERT": lambda session: session.execute(
        text("WITH new AS (INSERT INTO shelves VALUES (9, 'x') RETURNING *) SELECT * FROM new")
    ),
    "text SET": lambda session: session.execute(text("SET work_mem = '4MB'")),
    "text SELECT INTO": lambda session: session.execute(text("SELECT * INTO copied FROM books")),
    "text FOR SHARE": lambda session: session.execute(text("SELECT * FROM books FOR SHARE")),
    "text CALL": lambda session: session.execute(text("CALL something()")),
    "two statements": lambda session: session.execute(text("SELECT 1; DELETE FROM books")),
    "on_commit()": _hook,
    "after_rollback()": _rollback_hook,
}


@pytest.mark.parametrize("what", WRITES)
async def test_what_may_write_or_hold_a_connection_is_refused(
    db: Database[AsyncSession], library: FreshDatabase, what: str
) -> None:
    async with db.reader() as session:
        shelf = await session.get_one(Shelf, 2)
        with pytest.raises(WriteRefused) as caught:
            await WRITES[what](session)
        told = str(caught.value)
        assert "db.transaction(" in told, told
        assert "test_readers.py" in told, told
        await assert_holds_nothing(db, library)
        assert shelf.label == "two"
        assert await _titles(session) == ["a", "b", "c"]
    # What the connection is used for next is not disturbed.
    async with db.transaction() as session:
        assert await _titles(session) == ["a", "b", "c"]


ONLY_POSTGRES = {
    "text SET",
    "text CALL",
    "text SELECT INTO",
    "text FOR SHARE",
    "a lock in a subquery",
    "with_for_update",
    "get(with_for_update=)",
    "nextval",
    "an INSERT in a CTE",
    "text WITH INSERT",
    "a literal column",
    "a sequence",
}


@pytest.mark.parametrize("what", [what for what in WRITES if what not in ONLY_POSTGRES])
async def test_on_sqlite_it_is_refused_as_well(shelf_of_sqlite: Database[AsyncSession], what: str) -> None:
    async with shelf_of_sqlite.reader() as session:
        with pytest.raises(WriteRefused):
            await WRITES[what](session)
        assert shelf_of_sqlite.stats().in_use == 0
        assert await _titles(session) == ["a", "b", "c"]


async def test_what_is_pending_is_not_flushed_by_a_read_and_makes_the_end_refuse(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    with pytest.raises(WriteRefused, match=r"has written \(Book, Shelf\)|has written \(Shelf, Book\)"):
        async with db.reader() as session:
            shelf = await session.get_one(Shelf, 1)
            shelf.label = "changed"
            session.add(Book(id=9, title="new", shelf_id=1))
            assert await _titles(session) == ["a", "b", "c"]
            await assert_holds_nothing(db, library)
            assert shelf in session.dirty


async def test_committing_and_rolling_back_a_reader_is_harmless(db: Database[AsyncSession]) -> None:
    async with db.reader() as session:
        await session.commit()
        book = await session.get_one(Book, 1)
        await session.commit()
        assert book.title == "a"
        await session.rollback()
        assert await book.awaitable_attrs.title == "a"
        assert await _titles(session) == ["a", "b", "c"]
        assert db.stats().in_use == 0


async def test_a_connection_that_cannot_go_back_to_transactions_is_lent_to_nobody(
    library: FreshDatabase, db: Database[AsyncSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    def undo(_adapted: object) -> None:
        raise ZeroDivisionError

    def let_stand_alone(own: Driver, adapted: object) -> Callable[[object], None] | None:
        return its_own(own, adapted) and undo

    async with db.reader() as session:
        driver = type(guarded_session(session).terms.driver)
        its_own = driver.let_stand_alone
        monkeypatch.setattr(driver, "let_stand_alone", let_stand_alone)
        with pytest.raises(ZeroDivisionError):
            await _titles(session)
    monkeypatch.undo()
    assert db.stats().in_use == 0
    async with db.session() as session:
        await session.execute(delete(Book))
        await session.rollback()
    assert await stored(library) == STORED


@pytest.mark.parametrize("moment", ["before_commit", "after_soft_rollback"])
async def test_what_a_listener_reads_at_the_end_of_a_transaction_gives_its_connection_back(
    library: FreshDatabase, db: Database[AsyncSession], moment: str
) -> None:
    told: list[object] = []

    def read(session: Session, *_: object) -> None:
        told.append(session.scalar(text("SELECT 'read'")))

    async with db.reader() as session:
        event.listen(session.sync_session, moment, read)
        guarded_session(session).begun()  # as a change of an object does
        await (session.commit() if moment == "before_commit" else session.rollback())
        assert told == ["read"]
        await assert_holds_nothing(db, library)


async def test_a_reader_that_waits_for_its_connection_becomes_a_writer_after_its_statement(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    unit = Unit([db], kind=Kind.REQUEST)
    session = await unit.session(db, Wish("a reader", Mode.READ))
    async with db.connect():
        reading = asyncio.create_task(session.scalar(text("SELECT 1")))
        async with asyncio.timeout(10):
            while not db.stats().waiting:  # noqa: ASYNC110  # the pool tells nobody
                await asyncio.sleep(0)
        upgrading = asyncio.create_task(unit.session(db, Wish("a writer", Mode.AUTO)))
        await asyncio.sleep(0)  # it has its turn
        assert not upgrading.done()
    assert await reading == 1
    assert await upgrading is session
    await assert_holds_nothing(db, library)
    await unit.close(well=True)


async def test_with_expire_on_commit_a_read_does_not_expire_what_was_read(
    library: FreshDatabase, driver: str
) -> None:
    db = Database(library.url(driver), pool_size=1, max_overflow=0, expire_on_commit=True)
    async with db, db.reader() as session:
        shelf = await session.get_one(Shelf, 1)
        await _titles(session)
        assert shelf.label == "one"
        await session.commit()
        assert await shelf.awaitable_attrs.label == "one"
        await assert_holds_nothing(db, library)


async def test_a_reader_of_an_engine_with_its_own_pool_reads_and_refuses(
    library: FreshDatabase, driver: str
) -> None:
    engine = create_async_engine(library.url(driver), pool_size=1, max_overflow=0, pool_timeout=2)
    beside = Database(engine, adopt=False)
    async with beside.reader() as session:
        for reading in READINGS.values():
            assert await reading.read(session) == reading.gives
            await assert_holds_nothing(beside, library)
        for what, write in WRITES.items():
            with pytest.raises(WriteRefused):
                await write(session)
                raise AssertionError(what)
            await assert_holds_nothing(beside, library)
        assert await _titles(session) == ["a", "b", "c"]
    async with beside.transaction() as session:
        assert await session.scalar(text("SELECT pg_current_xact_id_if_assigned()::text")) is None
        await session.execute(
            text("CREATE TEMP TABLE proof () ON COMMIT DROP")
        )  # writes again, in a transaction
        assert await session.scalar(text("SELECT pg_current_xact_id_if_assigned()::text")) is not None
    await engine.dispose()
    assert await stored(library) == STORED


class Shouting(AsyncSession):
    async def shout(self) -> str:
        return str(await self.scalar(text("SELECT upper('read')")))


async def test_a_session_class_of_the_users_reads_as_well(library: FreshDatabase, driver: str) -> None:
    async with Database(library.url(driver), session_class=Shouting) as db, db.reader() as session:
        assert await session.shout() == "READ"
        await assert_holds_nothing(db, library)
        with pytest.raises(WriteRefused):
            await session.execute(delete(Book))


async def test_sqlmodels_exec_reads_as_well(library: FreshDatabase, driver: str) -> None:
    sqlmodel = pytest.importorskip("sqlmodel")
    from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

    async with Database(library.url(driver), session_class=SQLModelSession) as db, db.reader() as session:
        execute: Any = session.exec  # typed for SQLModel's own select() alone
        assert (await execute(sqlmodel.select(func.count()).select_from(Book))).all() == [3]
        await assert_holds_nothing(db, library)
        with pytest.raises(WriteRefused):
            await session.exec(delete(Book))


async def test_a_reader_that_becomes_a_writer_keeps_its_objects(
    db: Database[AsyncSession], library: FreshDatabase
) -> None:
    async with db.session() as session:
        sync = guarded_session(session)
        sync.start_reading()
        shelf = await session.get_one(Shelf, 1)
        shelf.label = "changed"
        sync.stop_reading()
        assert shelf is await session.get_one(Shelf, 1)
        await session.scalar(select(func.count()).select_from(Book))  # flushes, as a writer's read does
        assert (await library.activity())[0]["state"] == "idle in transaction"
        await session.commit()
        assert (await stored(library))[0][1] == "changed"
    await library.execute("UPDATE shelves SET label = 'one' WHERE id = 1")
