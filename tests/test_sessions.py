"""Sessions that cannot leak quietly: closed means closed, one task at a time, and no write is dropped in silence."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import ForeignKey, delete, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.util import await_only

from stanch import (
    CommitRefused,
    ConnectionCommitRefused,
    Database,
    DatabaseUnavailable,
    NotInstalled,
    SessionClosed,
    SessionOverlap,
    rollback_only,
)
from stanch.events import Event, WorkDropped
from stanch.sessions import GuardedSession, guard_of, guarded_session
from tests.support import cleaned
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(default="")
    books: Mapped[list[Book]] = relationship(back_populates="shelf")


class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(default="")
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelves.id"))
    shelf: Mapped[Shelf | None] = relationship(back_populates="books")


@pytest.fixture
async def library(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(
        "CREATE TABLE shelves (id int PRIMARY KEY, label text NOT NULL DEFAULT '');"
        "CREATE TABLE books (id int PRIMARY KEY, title text NOT NULL DEFAULT '', shelf_id int REFERENCES shelves);"
        "INSERT INTO shelves VALUES (1, 'one'); INSERT INTO books VALUES (1, 'old', 1)"
    )
    return fresh_database


@pytest.fixture
async def db(library: FreshDatabase, driver: str) -> AsyncIterator[Database[AsyncSession]]:
    async with Database(library.url(driver), pool_size=3, max_overflow=0, pool_timeout=5) as db:
        yield db
        await assert_nothing_left(library, db)


# After its end ----------------------------------------------------------------------------------------------

Use = Callable[[AsyncSession, Shelf], Awaitable[object]]


async def _stream(session: AsyncSession, _shelf: Shelf) -> object:
    return await session.stream(select(Shelf))


async def _begin(session: AsyncSession, _shelf: Shelf) -> object:
    async with session.begin():
        return None


async def _add(session: AsyncSession, _shelf: Shelf) -> None:
    session.add(Shelf(id=9))
    await session.flush()


USES: dict[str, Use] = {
    "execute": lambda session, _: session.execute(text("SELECT 1")),
    "scalar": lambda session, _: session.scalar(select(Shelf.id)),
    "scalars": lambda session, _: session.scalars(select(Shelf)),
    "get": lambda session, _: session.get(Shelf, 1),
    "get_one": lambda session, _: session.get_one(Shelf, 1),
    "stream": _stream,
    "stream_scalars": lambda session, _: session.stream_scalars(select(Shelf)),
    "refresh": lambda session, shelf: session.refresh(shelf),
    "merge": lambda session, _: session.merge(Shelf(id=1)),
    "delete": lambda session, shelf: session.delete(shelf),
    "add": _add,
    "flush": lambda session, _: session.flush(),
    "commit": lambda session, _: session.commit(),
    "begin": _begin,
    "begin_nested": lambda session, _: session.begin_nested().start(),
    "connection": lambda session, _: session.connection(),
    "run_sync": lambda session, _: session.run_sync(lambda each: each.execute(text("SELECT 1"))),
}


@pytest.mark.parametrize("use", USES)
async def test_use_after_the_end_says_whose_and_when(db: Database[AsyncSession], use: str) -> None:
    async with db.session() as session:
        shelf = await session.get_one(Shelf, 1)
    with pytest.raises(SessionClosed) as caught:
        await USES[use](session, shelf)
    told = str(caught.value)
    assert re.search(r"test_sessions\.py:\d+ in test_use_after_the_end", told), told
    assert re.search(r"ended at \d\d:\d\d:\d\d\.\d{3} UTC", told), told
    assert db.stats().in_use == 0


async def test_lazy_load_after_the_end_opens_nothing(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        shelf = await session.get_one(Shelf, 1)
    with pytest.raises(Exception, match=r"not bound to a Session|after its end"):
        await session.run_sync(lambda _session: shelf.books)
    assert db.stats().in_use == 0


async def test_closing_and_rolling_back_once_more_is_harmless(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        await session.execute(text("SELECT 1"))
    await session.close()
    await session.rollback()
    await session.reset()
    await session.aclose()
    with pytest.raises(SessionClosed):
        await session.execute(text("SELECT 1"))


async def test_reset_in_the_middle_keeps_the_session_alive(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        await session.execute(text("SELECT 1"))
        await session.reset()
        assert db.stats().in_use == 0
        assert await session.scalar(text("SELECT 42")) == 42


@pytest.mark.parametrize("way", ["factory", "sessionmaker.begin", "close by hand", "invalidate"])
async def test_sessions_of_the_factory_are_closed_for_good(db: Database[AsyncSession], way: str) -> None:
    if way == "sessionmaker.begin":
        async with db.session_factory.begin() as session:
            await session.execute(text("SELECT 1"))
    else:
        session = db.session_factory()
        await session.execute(text("SELECT 1"))
        await (session.invalidate() if way == "invalidate" else session.close())
    with pytest.raises(SessionClosed):
        await session.execute(text("SELECT 1"))


# One task at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
async def test_two_tasks_at_once_are_refused(library: FreshDatabase, driver: str, warm: bool) -> None:
    async with Database(library.url(driver), pool_size=3) as db:
        if not warm:
            await db.engine.dispose()
        async with db.session() as session:
            if warm:
                await session.execute(text("SELECT 1"))
            outcomes = await asyncio.gather(
                *(session.execute(text("SELECT 1 FROM pg_sleep(0.1)")) for _ in range(3)),
                return_exceptions=True,
            )
            refused = [each for each in outcomes if isinstance(each, SessionOverlap)]
            assert len(refused) == 2
            told = str(refused[0])
            assert re.search(r"of test_sessions\.py:\d+ in test_two_tasks_at_once_are_refused\(\)", told), (
                told
            )
            assert await session.scalar(text("SELECT 42")) == 42, "the one inside was not disturbed"
        await assert_nothing_left(library, db)


async def _savepoint(session: AsyncSession) -> None:
    async with session.begin_nested():
        await session.execute(text("SELECT 1"))


async def _lazy_load(session: AsyncSession) -> object:
    shelves = [each for each in session.identity_map.values() if isinstance(each, Shelf)]
    return await session.run_sync(lambda _session: shelves[0].books)


async def _add_and_flush(session: AsyncSession) -> None:
    session.add(Shelf(id=6))
    await session.flush()


async def test_two_tasks_cannot_take_two_connections_for_one_session(
    library: FreshDatabase, driver: str
) -> None:
    async with Database(library.url(driver), pool_size=3) as db:
        await db.engine.dispose()
        async with db.session() as session:
            outcomes = await asyncio.gather(*(session.connection() for _ in range(3)), return_exceptions=True)
            assert sum(isinstance(each, SessionOverlap) for each in outcomes) == 2
            assert db.stats().in_use == 1
        await assert_nothing_left(library, db)


INSIDE = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
INTRUSIONS: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "flush": _add_and_flush,
    "refresh": lambda session: session.refresh(next(iter(session.identity_map.values()))),
    "lazy load": _lazy_load,
    "bulk": lambda session: session.run_sync(lambda each: each.bulk_save_objects([Shelf(id=24)])),
    "connection": lambda session: session.connection(),
    "savepoint": _savepoint,
}


@pytest.mark.parametrize("intrusion", INTRUSIONS)
async def test_nobody_intrudes_on_a_running_statement(
    library: FreshDatabase, db: Database[AsyncSession], intrusion: str
) -> None:
    async with db.session() as session:
        shelf = await session.get_one(Shelf, 1)
        running = asyncio.create_task(session.execute(text("SELECT 1 FROM pg_sleep(0.15)")))
        await until(library, INSIDE)
        with pytest.raises(SessionOverlap):
            await INTRUSIONS[intrusion](session)
        assert (await running).scalar() == 1, "whoever was inside was not disturbed"
        assert shelf in session
        session.add(Shelf(id=5))
        await session.commit()
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 5") == 1


async def test_handing_a_session_over_between_tasks_is_legal(db: Database[AsyncSession]) -> None:
    async def one(session: AsyncSession) -> int:
        return int(await session.scalar(text("SELECT 1")) or 0)

    async with db.session() as session:
        for _ in range(3):
            assert await asyncio.wait_for(one(session), 5) == 1  # a task of its own, on Python 3.11
            assert await asyncio.create_task(one(session)) == 1
            async with anyio.create_task_group() as group:
                group.start_soon(one, session)
    async with db.session_factory() as session:  # AsyncSession.__aexit__ closes in a task of its own
        await one(session)
    async with db.session_factory.begin() as session:
        await one(session)


def _flush_and_read(session: Session) -> None:
    session.flush()
    session.execute(text("SELECT 1"))


async def test_commit_hook_may_use_the_session_it_is_called_from(db: Database[AsyncSession]) -> None:
    """Same task, one level deeper: re-entering is legal."""
    async with db.transaction() as session:
        session.add(Shelf(id=7))
        assert await session.scalar(select(Shelf.label).where(Shelf.id == 7)) == "", (
            "autoflush inside execute"
        )
        await session.run_sync(_flush_and_read)


# Behind its back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["commit", "rollback"])
async def test_connection_of_a_session_does_not_end_its_transaction(
    library: FreshDatabase, db: Database[AsyncSession], word: str
) -> None:
    async with db.transaction() as session:
        session.add(Shelf(id=8))
        await session.flush()
        connection = await session.connection()
        with pytest.raises(ConnectionCommitRefused):
            await getattr(connection, word)()
        with pytest.raises(ConnectionCommitRefused):
            await session.run_sync(lambda each: getattr(each.connection(), word)())
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 8") == 1


async def test_connection_that_the_user_brought_stays_the_users(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    """A session bound to a connection of the user's own, as tests do: that connection still commits."""
    async with db.connect() as connection:
        async with db.session_factory(bind=connection) as session:
            await (await session.connection()).execute(text("INSERT INTO shelves VALUES (11, '')"))
            await session.commit()
        await connection.commit()
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 11") == 1


async def test_pooled_connection_is_whole_again_for_the_next_holder(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        await session.connection()
    async with db.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await connection.commit()
        await connection.rollback()


# Session classes --------------------------------------------------------------------------------------------


class AuditedSync(Session):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.begun_at_birth = self.begin()

    def audit(self) -> str:
        return "audited"


class Audited(AsyncSession):
    sync_session_class = AuditedSync

    async def audit(self) -> str:
        return await self.run_sync(lambda each: each.audit())  # type: ignore[attr-defined]  # our own sync class


async def test_session_class_of_the_user_keeps_its_methods_and_is_guarded(
    library: FreshDatabase, driver: str
) -> None:
    async with Database(library.url(driver), session_class=Audited) as db:
        async with db.session() as session:
            assert isinstance(session, Audited)
            assert isinstance(session.sync_session, AuditedSync)
            assert isinstance(session.sync_session, GuardedSession)
            assert await session.audit() == "audited"
        with pytest.raises(SessionClosed):
            await session.execute(text("SELECT 1"))


class Farewell(Session):
    def close(self) -> None:
        super().close()
        self.info["farewells"].append(await_only(asyncio.sleep(0, "sync")))


class Farewelling(AsyncSession):
    sync_session_class = Farewell

    async def close(self) -> None:
        await super().close()
        self.info["farewells"].append(await asyncio.sleep(0, "async"))


async def test_a_session_class_of_the_user_closes_in_its_own_way(library: FreshDatabase, driver: str) -> None:
    """It may await something, although a session that holds nothing is closed without awaiting anything."""
    farewells: list[str] = []
    async with Database(library.url(driver), session_class=Farewelling) as db:
        for opened in (db.session(), db.reader(), db.transaction()):
            async with opened as session:
                session.info["farewells"] = farewells
            assert farewells == ["sync", "async"]
            farewells.clear()


async def test_session_of_sqlmodel_keeps_exec_and_is_guarded(library: FreshDatabase, driver: str) -> None:
    from sqlmodel import Field, SQLModel, select as sqlmodel_select
    from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

    class Rack(SQLModel, table=True):
        __tablename__ = "shelves"  # pyright: ignore[reportAssignmentType]  # SQLModel's own way to say it
        __table_args__ = {"extend_existing": True}  # likewise
        id: int | None = Field(default=None, primary_key=True)
        label: str = ""

    async with Database(library.url(driver), session_class=SQLModelSession) as db:
        async with db.transaction() as session:
            session.add(Rack(id=3, label="three"))
        async with db.session() as session:
            racks = (await session.exec(sqlmodel_select(Rack).order_by("id"))).all()
            assert [rack.label for rack in racks] == ["one", "three"]
        with pytest.raises(SessionClosed):
            await session.exec(sqlmodel_select(Rack))
        await assert_nothing_left(library, db)


async def test_foreign_session_is_not_ours(library: FreshDatabase, driver: str) -> None:
    engine = create_async_engine(library.url(driver))
    async with async_sessionmaker(engine)() as session:
        with pytest.raises(NotInstalled):
            guard_of(session)
        with pytest.raises(NotInstalled):
            rollback_only(session)
    await engine.dispose()


# Writes -----------------------------------------------------------------------------------------------------

Write = Callable[[AsyncSession], Awaitable[object]]


async def _new(session: AsyncSession) -> None:
    session.add(Shelf(id=20))


async def _changed(session: AsyncSession) -> None:
    (await session.get_one(Shelf, 1)).label = "changed"


async def _deleted(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Book, 1))


async def _flushed(session: AsyncSession) -> None:
    session.add(Shelf(id=21))
    await session.flush()


async def _bulk(session: AsyncSession) -> None:
    await session.run_sync(lambda each: each.bulk_save_objects([Shelf(id=24)]))


WRITES: dict[str, tuple[str, Write]] = {
    "new": ("Shelf", _new),
    "changed": ("Shelf", _changed),
    "deleted": ("Book", _deleted),
    "flushed": ("Shelf", _flushed),
    "insert": ("shelves", lambda session: session.execute(insert(Shelf).values(id=22))),
    "insert many": ("shelves", lambda session: session.execute(insert(Shelf), [{"id": 22}, {"id": 23}])),
    "update": ("shelves", lambda session: session.execute(update(Shelf).values(label="x"))),
    "delete": ("books", lambda session: session.execute(delete(Book))),
    "returning": ("shelves", lambda session: session.scalar(insert(Shelf).values(id=22).returning(Shelf.id))),
    "text": ("INSERT", lambda session: session.execute(text("INSERT INTO shelves VALUES (22)"))),
    "text, lower": ("UPDATE", lambda session: session.execute(text("  update shelves set label = ''"))),
    "text, lines": (
        "UPDATE",
        lambda session: session.execute(text("\n  UPDATE\n    shelves\n  SET label = ''")),
    ),
    "text, tab": ("DELETE", lambda session: session.execute(text("DELETE\tFROM books"))),
    "text, comment": ("DELETE", lambda session: session.execute(text("-- all\n/* of */ DELETE FROM books"))),
    "bulk": ("Shelf", _bulk),
}


@pytest.mark.parametrize("kind", WRITES)
async def test_dropped_write_is_told_once_with_its_place(
    library: FreshDatabase, db: Database[AsyncSession], kind: str
) -> None:
    name, write = WRITES[kind]
    events: list[Event] = []
    db.observe(events.append)
    before = await library.fetchval("SELECT count(*) FROM shelves")
    async with db.session() as session:
        await write(session)
        assert any(name in each for each in guarded_session(session).unsaved()), guarded_session(
            session
        ).unsaved()
    dropped = [each for each in events if isinstance(each, WorkDropped)]
    assert len(dropped) == len(events) == 1
    assert re.search(r"test_sessions\.py:\d+ in test_dropped_write_is_told_once", str(dropped[0]))
    assert any(name in each for each in dropped[0].writes)
    assert await library.fetchval("SELECT count(*) FROM shelves") == before


@pytest.mark.parametrize("kind", WRITES)
async def test_saved_write_is_no_longer_unsaved(
    library: FreshDatabase, db: Database[AsyncSession], kind: str
) -> None:
    events: list[Event] = []
    db.observe(events.append)
    async with db.session() as session:
        await WRITES[kind][1](session)
        await session.commit()
        assert guarded_session(session).unsaved() == ()
    async with db.session() as session:
        await WRITES["insert"][1](session) if kind not in {
            "insert",
            "insert many",
            "returning",
            "text",
        } else None
        await session.rollback()
        assert guarded_session(session).unsaved() == ()
    assert events == []


@pytest.mark.parametrize(
    "statement", [select(Shelf), text("SELECT 'INSERT'"), text("SHOW work_mem"), text("SELECT 1 FOR UPDATE")]
)
async def test_reading_is_no_write(db: Database[AsyncSession], statement: Any) -> None:
    events: list[Event] = []
    db.observe(events.append)
    async with db.session() as session:
        await session.execute(statement)
        shelf = await session.get_one(Shelf, 1)
        shelf.label = shelf.label  # set, and not changed
        assert guarded_session(session).unsaved() == ()
    assert events == []


async def test_write_of_a_block_that_raised_is_not_called_dropped(db: Database[AsyncSession]) -> None:
    """The error says it all."""
    events: list[Event] = []
    db.observe(events.append)
    with pytest.raises(LookupError):
        async with db.session() as session:
            session.add(Shelf(id=30))
            raise LookupError
    assert events == []


# Ends -------------------------------------------------------------------------------------------------------


async def test_rollback_only_stores_nothing_and_raises_nothing(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    events: list[Event] = []
    db.observe(events.append)
    async with db.transaction() as session:
        session.add(Shelf(id=40))
        await session.flush()
        rollback_only(session)
        session.add(Shelf(id=41))
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id >= 40") == 0
    assert events == []


async def test_what_was_only_read_keeps_its_state_after_the_end(db: Database[AsyncSession]) -> None:
    async with db.session() as session:
        shelf = await session.get_one(Shelf, 1)
    assert shelf.label == "one"
    async with db.transaction() as session:
        shelf = await session.get_one(Shelf, 1)
    assert shelf.label == "one"


async def test_error_of_the_block_is_what_comes_out(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with db.transaction() as session:
            session.add(Shelf(id=50))
            await session.flush()
            await library.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM {OTHERS}")
            raise LookupError("mine")
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 50") == 0


async def test_failed_flush_that_was_swallowed_is_not_committed(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is SQLAlchemy's affair; that there is one is ours
        async with db.transaction() as session:
            await session.execute(insert(Shelf).values(id=60))
            session.add(Shelf(id=1))
            with suppress(DBAPIError):
                await session.flush()
    assert not isinstance(caught.value, AssertionError)
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 60") == 0


async def test_closing_while_another_task_is_inside_waits_for_it(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    async with db.transaction() as session:
        await session.execute(insert(Shelf).values(id=70))
        straggler = asyncio.create_task(session.execute(text("SELECT 1 FROM pg_sleep(0.2)")))
        await until(library, INSIDE)
    assert straggler.done(), "settling under a running statement would poison the connection"
    assert (await straggler).scalar() == 1
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 70") == 1


@pytest.mark.parametrize("how", ["task twice", "scope"])
async def test_cancelled_while_it_waits_for_a_straggler_it_still_closes(
    library: FreshDatabase, db: Database[AsyncSession], how: str
) -> None:
    stragglers: list[asyncio.Task[Any]] = []
    scope = anyio.CancelScope()
    at_its_end = asyncio.Event()

    async def work() -> None:
        with scope:
            async with db.transaction() as session:
                await session.execute(insert(Shelf).values(id=72))
                stragglers.append(asyncio.create_task(session.execute(text("SELECT 1 FROM pg_sleep(0.3)"))))
                await until(library, INSIDE)
                at_its_end.set()
            await asyncio.sleep(0)

    task = asyncio.create_task(work())
    await at_its_end.wait()
    for _ in range(2):
        scope.cancel() if how == "scope" else task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done(), "its end is out of reach"
    await asyncio.wait((task,), timeout=5)
    assert scope.cancelled_caught if how == "scope" else task.cancelled()
    assert (await stragglers[0]).scalar() == 1
    assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 72") == 1
    await assert_nothing_left(library, db)
    begun = asyncio.get_running_loop().time()
    await db.close()
    assert asyncio.get_running_loop().time() - begun < 8, "the session is off the books"
    await db.open()


async def test_closing_severs_a_straggler_after_the_timeout(library: FreshDatabase, driver: str) -> None:
    stragglers: list[asyncio.Task[Any]] = []
    async with Database(library.url(driver), close_timeout=0.2) as db:
        with pytest.raises(LookupError):
            async with db.transaction() as session:
                await session.execute(insert(Shelf).values(id=71))
                stragglers.append(asyncio.create_task(session.execute(text("SELECT 1 FROM pg_sleep(30)"))))
                await until(library, INSIDE)
                raise LookupError
        with pytest.raises((DBAPIError, OSError)):
            await stragglers[0]
        assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 71") == 0
        assert db.stats().in_use == 0
        await assert_nothing_left(library, db)


async def test_a_task_that_comes_straight_back_in_cannot_keep_a_unit_from_ending(
    library: FreshDatabase, driver: str
) -> None:
    """It is sent out by the severing, rolls back and comes in again before anybody else had a turn."""
    enough = asyncio.Event()
    met: list[BaseException] = []

    async def hang_on(session: AsyncSession) -> None:
        while not enough.is_set():
            try:
                await session.execute(text("SELECT 1"))
            except Exception as error:
                met.append(error)
                await session.rollback()

    async def work(db: Database[AsyncSession]) -> None:
        async with db.transaction() as session:
            stragglers.append(asyncio.create_task(hang_on(session)))
            await asyncio.sleep(0.1)

    stragglers: list[asyncio.Task[None]] = []
    async with Database(library.url(driver), close_timeout=0.3, commit_timeout=0.5, drain_timeout=1) as db:
        task = asyncio.create_task(work(db))
        done, _ = await asyncio.wait((task,), timeout=5)
        enough.set()
        async with asyncio.timeout(5):
            await asyncio.gather(task, *stragglers, return_exceptions=True)
        assert done, "the unit was kept from ending"
        assert met, "it was sent out"
        await assert_nothing_left(library, db)


async def test_a_listener_that_waits_before_the_commit_does_not_keep_a_unit_from_ending(
    library: FreshDatabase, driver: str
) -> None:
    async with Database(
        library.url(driver), commit_timeout=0.4, close_timeout=0.4, statement_timeout=None, lock_timeout=None
    ) as db:

        def wait_for_the_other(session: Session) -> None:
            session.execute(text("INSERT INTO shelves VALUES (80)"))

        async def work() -> None:
            async with db.transaction() as session:
                event.listen(session.sync_session, "before_commit", wait_for_the_other)
                await session.execute(text("SELECT 1"))

        async with db.connect() as blocker:
            await blocker.execute(text("INSERT INTO shelves VALUES (80)"))
            task = asyncio.create_task(work())
            done, _ = await asyncio.wait((task,), timeout=5)
            await blocker.rollback()
            await asyncio.wait((task,), timeout=5)
        assert done, "the listener was waited for"
        assert isinstance(task.exception(), (DBAPIError, DatabaseUnavailable))
        assert await library.fetchval("SELECT count(*) FROM shelves WHERE id = 80") == 0
        await assert_nothing_left(library, db)


async def test_isolation_and_read_only_reach_every_kind_of_first_statement(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    shown = text(
        "SELECT current_setting('transaction_isolation') || ' ' || current_setting('transaction_read_only')"
    )

    async def by_flush(session: AsyncSession) -> None:
        session.add(Shelf(id=80))
        await session.flush()

    async def by_bulk(session: AsyncSession) -> None:
        await session.run_sync(lambda each: each.bulk_save_objects([Shelf(id=81)]))

    async def by_connection(session: AsyncSession) -> None:
        await session.connection()

    async def by_savepoint(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.execute(text("SELECT 1"))

    async def by_get(session: AsyncSession) -> None:
        await session.get(Shelf, 1)

    async def by_stream(session: AsyncSession) -> None:
        async for _ in await session.stream(select(Shelf)):
            pass

    for first in (by_flush, by_bulk, by_connection, by_savepoint, by_get, by_stream):
        async with db.transaction(isolation_level="SERIALIZABLE") as session:
            await first(session)
            assert await session.scalar(shown) == "serializable off", first.__name__
    for first in (by_connection, by_savepoint, by_get, by_stream):
        async with db.transaction(read_only=True) as session:
            await first(session)
            assert await session.scalar(shown) == "read committed on", first.__name__
    async with db.session() as session:
        assert await session.scalar(shown) == "read committed off", "nothing stays on the pooled connection"


async def test_commit_in_the_middle_begins_the_next_transaction_with_the_same_options(
    db: Database[AsyncSession],
) -> None:
    async with db.transaction(isolation_level="SERIALIZABLE") as session:
        for _ in range(2):
            assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
            await session.commit()


async def test_refused_commit_leaves_the_session_usable(
    library: FreshDatabase, db: Database[AsyncSession]
) -> None:
    async with db.session() as session:
        await session.execute(insert(Shelf).values(id=90))
        with suppress(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))
        with pytest.raises(CommitRefused):
            await session.commit()
        await session.rollback()
        await session.execute(insert(Shelf).values(id=91))
        await session.commit()
    assert [row["id"] for row in await library.fetch("SELECT id FROM shelves WHERE id >= 90")] == [91]
