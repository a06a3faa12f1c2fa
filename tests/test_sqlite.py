"""What a unit of work means on SQLite: readers do not block, writers take turns, read-only refuses."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import StaticPool

from stanch import Database
from stanch.fastapi import ReaderDep, SessionDep, install


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
