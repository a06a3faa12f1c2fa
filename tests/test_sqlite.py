"""What a unit of work means on SQLite: readers do not block, writers take turns, read-only refuses."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import StaticPool

from stanch import Database, atomic
from stanch.fastapi import ReaderDep, SessionDep, install
from tests.support.suspensions import cancelled_at, suspensions


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, seen INTEGER NOT NULL DEFAULT 0)")
        connection.execute("INSERT INTO users VALUES (1, 0)")
    connection.close()
    return path


def truth(file: Path) -> list[tuple[int, int]]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute("SELECT id, seen FROM users ORDER BY id").fetchall()
    finally:
        connection.close()


@pytest.mark.anyio
async def test_a_read_only_transaction_refuses_to_write_and_the_next_one_may(file: Path) -> None:
    async with Database(f"sqlite+aiosqlite:///{file}", pool_size=1, max_overflow=0) as db:
        with pytest.raises(OperationalError, match="readonly"):
            async with db.transaction(read_only=True) as session:
                await session.execute(text("UPDATE users SET seen = 1"))
        async with db.transaction() as session:
            await session.execute(text("UPDATE users SET seen = 2"))

    assert truth(file) == [(1, 2)]


@pytest.mark.anyio
async def test_twenty_requests_that_read_first_and_then_write_take_turns(file: Path) -> None:
    """A transaction that began as a reader could not become a writer: SQLite would refuse it without waiting."""
    db = Database(f"sqlite+aiosqlite:///{file}", pool_size=5, max_overflow=0)
    app = FastAPI()
    install(app, db)

    async def current_user(session: ReaderDep) -> int:
        return int((await session.execute(text("SELECT seen FROM users"))).scalar_one())

    @app.post("/visits")
    async def visit(_user: Annotated[int, Depends(current_user)], session: SessionDep) -> None:
        await session.execute(text("UPDATE users SET seen = seen + 1"))

    async with (
        db,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client,
    ):
        replies = await asyncio.gather(*(client.post("/visits") for _ in range(20)))
        assert db.stats().in_use == 0

    assert {reply.status_code for reply in replies} == {200}
    assert truth(file) == [(1, 20)]


@pytest.mark.anyio
async def test_a_reader_reads_while_a_writer_is_at_work(file: Path) -> None:
    db = Database(f"sqlite+aiosqlite:///{file}", pool_size=2, max_overflow=0, lock_timeout=0.5)
    app = FastAPI()
    install(app, db)

    @app.get("/users")
    async def read(session: ReaderDep) -> int:
        return int((await session.execute(text("SELECT seen FROM users"))).scalar_one())

    async with (
        db,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client,
        db.transaction() as writer,
    ):
        await writer.execute(text("UPDATE users SET seen = 7"))
        reply = await client.get("/users")

    assert (reply.status_code, reply.json()) == (200, 0)
    assert truth(file) == [(1, 7)]


@pytest.mark.anyio
@pytest.mark.parametrize("options", [{}, {"poolclass": StaticPool}], ids=["default", "StaticPool"])
@pytest.mark.parametrize("first", ["good", "bad"])
async def test_two_requests_at_once_in_memory_share_no_transaction(
    first: str, options: dict[str, Any]
) -> None:
    """All of ``:memory:`` is one connection: a 400 leaves nothing there, a 201 keeps its row."""
    db: Database[Any] = Database("sqlite+aiosqlite:///:memory:", **options)
    app = FastAPI()
    install(app, db)
    wrote, go_on = asyncio.Event(), asyncio.Event()

    @app.post("/users/{name}", status_code=201)
    async def add(name: str, session: SessionDep) -> None:
        if name != first:
            await wrote.wait()
        await session.execute(text("INSERT INTO users VALUES (:name)"), {"name": name})
        if name == first:
            wrote.set()
            await go_on.wait()
        if name == "bad":
            raise HTTPException(400)

    async def second(client: httpx.AsyncClient) -> httpx.Response:
        # The second cannot end before the first where they take turns; where they do not, it gets its chance.
        task = asyncio.create_task(client.post(f"/users/{'bad' if first == 'good' else 'good'}"))
        await wrote.wait()
        await asyncio.wait((task,), timeout=0.3)
        go_on.set()
        return await task

    async with (
        asyncio.timeout(10),
        db,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client,
    ):
        async with db.begin() as connection:
            await connection.execute(text("CREATE TABLE users (name TEXT)"))
        replies = await asyncio.gather(client.post(f"/users/{first}"), second(client))
        async with db.connect() as connection:
            names = (await connection.execute(text("SELECT name FROM users"))).scalars().all()

    assert sorted(reply.status_code for reply in replies) == [201, 400]
    assert names == ["good"]


# Cancelled ------------------------------------------------------------------------------------------------

FOR_EVER = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
"""Nobody but an interrupt ends it."""
ROW_BY_ROW = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100000) SELECT x FROM n"


@pytest.fixture
async def memory() -> AsyncIterator[Database[Any]]:
    async with Database("sqlite+aiosqlite:///:memory:") as db:
        async with db.begin() as connection:
            await connection.execute(text("CREATE TABLE users (id INTEGER PRIMARY KEY)"))
            await connection.execute(text("INSERT INTO users VALUES (1)"))
        yield db
        async with db.session() as session:
            assert await session.scalar(text("SELECT min(id) FROM users")) == 1, "the database is still there"
        assert (db.stats().in_use, db.stats().idle) == (0, 1)


async def _in_a_transaction(db: Database[Any]) -> None:
    async with db.transaction() as session:
        await session.execute(text("INSERT INTO users VALUES (2)"))
        await session.execute(text(FOR_EVER))


async def _in_a_reader(db: Database[Any]) -> None:
    async with db.reader() as session:
        await session.execute(text(FOR_EVER))


async def _in_a_write(db: Database[Any]) -> None:
    """SQLite rolls the whole transaction back when a write is interrupted."""
    async with db.transaction() as session:
        await session.execute(text(f"INSERT INTO users {FOR_EVER}"))


@pytest.mark.anyio
@pytest.mark.parametrize("scope", [False, True], ids=["task", "scope"])
@pytest.mark.parametrize("work", [_in_a_transaction, _in_a_reader, _in_a_write])
async def test_a_cancelled_statement_does_not_cost_the_database_in_memory(
    memory: Database[Any], work: Callable[[Database[Any]], Coroutine[Any, Any, None]], scope: bool
) -> None:
    for _ in range(3):
        began = time.monotonic()
        if scope:
            with anyio.move_on_after(0.1) as limit:
                await work(memory)
            assert limit.cancelled_caught
        else:
            task = asyncio.create_task(work(memory))
            await asyncio.wait({task}, timeout=0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert time.monotonic() - began < 10, "it was interrupted, not waited for"
        async with memory.session() as session:
            assert (await session.scalars(text("SELECT id FROM users"))).all() == [1]


@pytest.mark.anyio
async def test_a_request_cut_off_at_any_suspension_does_not_cost_the_database_in_memory(
    memory: Database[Any],
) -> None:
    async def write_and_read() -> None:
        async with memory.transaction() as session:
            await session.execute(text("INSERT INTO users VALUES (2)"))
            await session.execute(text(ROW_BY_ROW))
            raise LookupError

    async def use() -> None:
        with suppress(LookupError):
            await write_and_read()
        async with memory.reader() as session:
            await session.execute(text("SELECT id FROM users"))

    for point in range(1, await suspensions(use()) + 1):
        await cancelled_at(use(), {point})
        assert memory.stats().in_use == 0
        async with memory.transaction() as session:
            assert (await session.scalars(text("SELECT id FROM users"))).all() == [1], point
            await session.execute(text("INSERT INTO users VALUES (3)"))
            await session.execute(text("DELETE FROM users WHERE id = 3"))


@pytest.mark.anyio
async def test_outer_work_in_memory_goes_on_after_a_timeout_in_a_savepoint(memory: Database[Any]) -> None:
    async with memory.transaction() as session:
        await session.execute(text("INSERT INTO users VALUES (2)"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1), atomic(session):
                await session.execute(text("INSERT INTO users VALUES (3)"))
                await session.execute(text(FOR_EVER))
    async with memory.session() as session:
        assert (await session.scalars(text("SELECT id FROM users"))).all() == [1, 2]


@pytest.mark.anyio
async def test_a_file_sees_what_others_wrote_after_a_cancelled_read(file: Path) -> None:
    """A statement left open would keep the connection in the past, and refuse its next transaction."""
    async with Database(f"sqlite+aiosqlite:///{file}", pool_size=1, max_overflow=0) as db:
        for number in range(20):
            with anyio.move_on_after(number / 2000):
                async with db.session() as session:
                    await session.execute(text(ROW_BY_ROW + " UNION ALL SELECT seen FROM users"))
            other = sqlite3.connect(file, isolation_level=None)
            other.execute("UPDATE users SET seen = ?", (number,))
            other.close()
            async with db.transaction() as session:
                assert await session.scalar(text("SELECT seen FROM users")) == number
                await session.execute(text("UPDATE users SET seen = seen"))


@pytest.mark.anyio
async def test_a_statement_that_no_interrupt_ends_costs_the_connection_in_bounded_time(file: Path) -> None:
    stuck = threading.Event()
    async with Database(f"sqlite+aiosqlite:///{file}", pool_size=1, max_overflow=0) as db:
        session = db.session_factory()
        raw = await (await session.connection()).get_raw_connection()
        inner: Any = raw.driver_connection
        await inner.create_function("wait_for_it", 0, lambda: stuck.wait(20))
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT wait_for_it()"))
        assert 1.0 < time.monotonic() - began < 10
        await session.close()
        stuck.set()
        async with db.session() as session:
            assert await session.scalar(text("SELECT 42")) == 42
