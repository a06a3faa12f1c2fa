"""What holds where two parts of the transaction layer meet that each hold by themselves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import MetaData, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_object_session
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Database, DeadlinePassed, Retry, after_rollback, atomic, on_commit
from stanch.deadlines import Deadline
from stanch.fastapi import SessionDep, install, provide_session
from stanch.idempotency import IdempotencyKey, idempotency_table
from stanch.transactions import Ending
from tests.support import cleaned
from tests.support.judge import assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, at_commit, at_statement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stanch.events import Event
    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

HELD_COMMIT = """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER held AFTER INSERT ON rows DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION hold();
    SELECT pg_advisory_lock(1)
"""
"""From now on COMMIT of an insert waits until the judge lets go."""
LET_GO = "SELECT pg_advisory_unlock(1)"
HELD = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


ManualDep = Annotated[AsyncSession, Depends(provide_session(commit_mode="manual"))]
SecondDep = Annotated[AsyncSession, Depends(provide_session("second"))]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@pytest.fixture
async def db(rows: FreshDatabase, driver: str) -> AsyncIterator[Database[Any]]:
    made: Database[Any] = Database(rows.url(driver), pool_size=3, max_overflow=0)
    yield made
    await assert_nothing_left(rows, made)
    await made.close()


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def stored(judge: FreshDatabase) -> list[int]:
    return [row["id"] for row in await judge.fetch("SELECT id FROM rows ORDER BY id")]


async def insert(db: Database[Any], number: int) -> None:
    async with db.transaction() as session:
        session.add(Row(id=number))


# Idempotency keys x request_timeout -----------------------------------------------------------------------


async def test_a_reply_is_recorded_also_where_the_app_has_a_request_timeout(
    db: Database[Any], rows: FreshDatabase
) -> None:
    keys = idempotency_table(MetaData())
    async with db.begin() as connection:
        await connection.run_sync(keys.metadata.create_all)
    app = FastAPI()
    install(app, db, request_timeout=5)

    @app.post("/rows", status_code=201, dependencies=[Depends(IdempotencyKey(keys))])
    async def place(session: SessionDep) -> dict[str, int]:  # pyright: ignore[reportUnusedFunction]  # a route
        session.add(Row(id=1))
        return {"id": 1}

    async with client_of(app) as client:
        replies = [await client.post("/rows", headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [(reply.status_code, reply.json()) for reply in replies] == [(201, {"id": 1})] * 2
    assert replies[1].headers["idempotent-replayed"] == "true"
    assert await stored(rows) == [1]


# verify_commits x deadlines -------------------------------------------------------------------------------


async def test_the_deadline_that_ended_a_commit_does_not_end_the_question_for_it(
    rows: FreshDatabase, driver: str
) -> None:
    async with FaultProxy(rows.server.port) as proxy:
        url = proxy.through(rows.url(driver)) + "?sslmode=disable"
        db: Database[Any] = Database(url, verify_commits=True)
        proxy.on_client_message = at_commit(Verdict.LOSE_ANSWER)
        async with db.transaction(timeout=0.5) as session:
            session.add(Row(id=1))
        assert proxy.verdicts[Verdict.LOSE_ANSWER] == 1
        assert await stored(rows) == [1]
        await db.close()


# Callbacks x deadlines ------------------------------------------------------------------------------------


async def test_a_callback_is_not_bound_by_the_deadline_of_the_unit_it_follows(
    db: Database[Any], rows: FreshDatabase
) -> None:
    with pytest.raises(DeadlinePassed):
        async with db.transaction(timeout=0.2) as session:
            after_rollback(session, insert, db, 1)
            await session.execute(text("SELECT 1"))
            await asyncio.sleep(0.3)
    assert await stored(rows) == [1]


async def test_a_callback_is_not_bound_by_the_deadline_of_the_attempts_it_follows(
    db: Database[Any], rows: FreshDatabase
) -> None:
    async def late() -> None:
        await asyncio.sleep(0.4)
        await insert(db, 1)

    async def work(session: AsyncSession) -> None:
        on_commit(session, late)

    await db.run_transaction(work, retry=Retry(timeout=0.3))
    assert await stored(rows) == [1]


# Callbacks x cancellation ---------------------------------------------------------------------------------


async def test_hook_timeout_does_not_cut_a_commit_in_a_callback_short(
    rows: FreshDatabase, driver: str
) -> None:
    await rows.execute(HELD_COMMIT)
    db: Database[Any] = Database(rows.url(driver), hook_timeout=1.0)
    seen: list[Event] = []
    db.observe(seen.append)

    async def let_go_too_late() -> None:
        await until(rows, HELD)
        await asyncio.sleep(1.0)  # what is measured: longer than the callback may take, which began before
        await rows.execute(LET_GO)

    async with asyncio.TaskGroup() as both:
        both.create_task(let_go_too_late())
        async with db.transaction() as session:
            on_commit(session, insert, db, 1)
    assert [type(event).__name__ for event in seen] == ["HookFailed"]
    assert await stored(rows) == [1]
    await assert_nothing_left(rows, db)
    await db.close()


async def test_a_callback_that_takes_too_long_closes_its_sessions(rows: FreshDatabase, driver: str) -> None:
    """A session that is never closed would hold up the draining."""
    async with FaultProxy(rows.server.port) as proxy:
        url = proxy.through(rows.url(driver)) + "?sslmode=disable"
        db: Database[Any] = Database(url, hook_timeout=0.2, close_timeout=0.6, drain_timeout=5)

        async def fails() -> None:
            async with db.transaction() as session:
                session.add(Row(id=1))
                await session.flush()
                proxy.on_client_message = at_statement("ROLLBACK", Verdict.LOSE)
                raise ValueError

        async with db.transaction() as session:
            on_commit(session, fails)
        assert proxy.verdicts[Verdict.LOSE] == 1
        async with asyncio.timeout(1):
            await db.close()


# Callbacks x flushes --------------------------------------------------------------------------------------


async def test_a_callback_given_while_a_flush_is_under_way_waits_for_the_transaction(
    db: Database[Any], rows: FreshDatabase
) -> None:
    """A listener for mapper events is where many an app would give it."""
    said: list[str] = []

    def after_insert(_mapper: object, _connection: object, row: Row) -> None:
        session = async_object_session(row)
        assert session is not None
        on_commit(session, said.append, "committed")
        after_rollback(session, said.append, "rolled back")

    event.listen(Row, "after_insert", after_insert)
    try:
        await insert(db, 1)
    finally:
        event.remove(Row, "after_insert", after_insert)
    assert await stored(rows) == [1]
    assert said == ["committed"]


# Wishes x atomic ------------------------------------------------------------------------------------------


async def test_a_block_in_a_unit_that_was_manual_before_does_not_outlive_an_error(
    db: Database[Any], rows: FreshDatabase
) -> None:
    app = FastAPI()
    install(app, db)

    async def user(session: ManualDep) -> None:
        await session.execute(text("SELECT 1"))

    @app.post("/rows", dependencies=[Depends(user)])
    async def place(session: SessionDep) -> None:  # pyright: ignore[reportUnusedFunction]  # a route
        async with atomic(session):
            session.add(Row(id=1))
        raise ValueError

    async with client_of(app) as client:
        assert (await client.post("/rows")).status_code == 500
    assert await stored(rows) == []


# Cancellation x deadlines ---------------------------------------------------------------------------------


async def test_a_cancellation_that_comes_together_with_the_deadline_is_not_swallowed(
    db: Database[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short = Ending._cut_short  # pyright: ignore[reportPrivateUsage]  # the moment that is meant
    moments: list[None] = []

    def cut_short_and_cancel(ending: Ending, deadline: Deadline) -> None:
        cut_short(ending, deadline)
        task.cancel()
        moments.append(None)

    async def work() -> None:
        async with db.transaction(timeout=0.3) as session:
            await session.execute(text("SELECT pg_sleep(3)"))

    monkeypatch.setattr(Ending, "_cut_short", cut_short_and_cancel)
    # Past the server's own limit, which would end the statement before.
    monkeypatch.setattr("stanch.drivers.base._SERVER_FIRST", -1.0)
    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(moments) == 1


# A commit by hand x cancellation --------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["commit()", "begin()"])
async def test_callbacks_are_told_the_truth_of_a_commit_that_was_cancelled_too_late(
    db: Database[Any], rows: FreshDatabase, begun: bool
) -> None:
    await rows.execute(HELD_COMMIT)
    said: list[str] = []
    seen: list[Event] = []
    db.observe(seen.append)

    async def work(session: AsyncSession) -> None:
        session.add(Row(id=1))
        on_commit(session, said.append, "committed")
        after_rollback(session, said.append, "rolled back")

    async def commit() -> None:
        async with db.session() as session:
            if begun:
                async with session.begin():
                    await work(session)
            else:
                await work(session)
                await session.commit()

    task = asyncio.create_task(commit())
    await until(rows, HELD)
    task.cancel()
    await asyncio.sleep(0)  # it has come while COMMIT is held
    await rows.execute(LET_GO)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stored(rows) == [1]
    assert said == ["committed"]
    assert seen == []  # above all no WorkDropped


# Callbacks x several databases ----------------------------------------------------------------------------


async def test_a_callback_runs_when_no_database_of_the_unit_holds_a_connection(
    rows: FreshDatabase, driver: str
) -> None:
    first: Database[Any] = Database(rows.url(driver), name="first")
    second: Database[Any] = Database(rows.url(driver), name="second")
    held: list[int] = []

    def look() -> None:
        held.append(first.stats().in_use + second.stats().in_use)

    app = FastAPI()
    install(app, first, second)

    @app.post("/rows")
    async def place(session: SessionDep, other: SecondDep) -> None:  # pyright: ignore[reportUnusedFunction]  # a route
        session.add(Row(id=1))
        other.add(Row(id=2))
        on_commit(session, look)
        on_commit(other, look)

    async with client_of(app) as client:
        assert (await client.post("/rows")).status_code == 200
    assert await stored(rows) == [1, 2]
    assert held == [0, 0]
    await first.close()
    await second.close()


# Callbacks x their own session ----------------------------------------------------------------------------


async def test_what_a_callback_writes_with_the_session_it_follows_is_not_dropped_in_silence(
    db: Database[Any], rows: FreshDatabase
) -> None:
    seen: list[Event] = []
    db.observe(seen.append)

    async def write(session: AsyncSession) -> None:
        session.add(Row(id=2))
        await session.flush()

    async with db.transaction() as session:
        session.add(Row(id=1))
        on_commit(session, write, session)
    assert await stored(rows) == [1]
    assert [type(event).__name__ for event in seen] == ["WorkDropped"]
