"""Law 5 in figures: who gives the connection back before a slow call serves more with the same pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, Any, Final

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from stanch import Database
from stanch.fastapi import ReaderDep, install
from tests.requests.shop import Order
from tests.support.judge import assert_nothing_left

if TYPE_CHECKING:
    from tests.requests.shop import ASGIApp, Message
    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

POOL: Final = 10
CLIENTS: Final = 100
ELSEWHERE: Final = 0.05
"""Seconds that the call of another service takes, for which the handler waits after its read."""
SLICE: Final = 1.5
"""Seconds that one app is driven before the other has its turn: what else the machine does meets both."""
SLICES: Final = 3
GAIN: Final = 4.5

READ: Final = select(Order).where(Order.id == 1)


async def read_and_wait(session: AsyncSession) -> dict[str, str]:
    """The same handler in both apps."""
    order = (await session.scalars(READ)).one()
    await asyncio.sleep(ELSEWHERE)
    return {"item": order.item}


async def _never() -> AsyncSession:
    raise AssertionError("overridden")


def by_hand(factory: async_sessionmaker[AsyncSession]) -> FastAPI:
    """As in the article: a yield dependency, its session closed at the end."""
    app = FastAPI()

    async def get_db() -> AsyncGenerator[AsyncSession]:
        async with factory() as session:
            yield session

    @app.get("/orders/1")
    async def read(session: Annotated[AsyncSession, Depends(_never)]) -> dict[str, str]:
        return await read_and_wait(session)

    app.dependency_overrides[_never] = get_db
    return app


def by_reader(db: Database[Any]) -> FastAPI:
    app = FastAPI()
    install(app, db)

    @app.get("/orders/1")
    async def read(session: ReaderDep) -> dict[str, str]:
        return await read_and_wait(session)

    return app


SCOPE: Final = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": "/orders/1",
    "raw_path": b"/orders/1",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"shop")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 80),
}


async def _request(app: ASGIApp) -> int:
    """One request without a socket: what a server costs, it costs both, and only blurs the difference."""
    status = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await app({**SCOPE, "state": {}}, receive, send)
    return status


async def _drive(app: ASGIApp, seconds: float) -> tuple[int, float]:
    """How many requests were answered, all with 200, and in which time."""
    began = time.perf_counter()
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.perf_counter() - began < seconds:
            assert await _request(app) == 200
            answered += 1

    async with asyncio.timeout(seconds + 15), asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client())
    return answered, time.perf_counter() - began


@pytest.mark.long
async def test_a_slow_call_after_a_read_does_not_cost_a_connection(
    fresh_database: FreshDatabase, driver: str
) -> None:
    await fresh_database.execute(
        "CREATE TABLE users (id int PRIMARY KEY); CREATE TABLE orders (id int PRIMARY KEY, item text, user_id int);"
        "INSERT INTO orders VALUES (1, 'tea', NULL)"
    )
    engine = create_async_engine(fresh_database.url(driver), pool_size=POOL, max_overflow=0, pool_timeout=30)
    db = Database(fresh_database.url(driver), pool_size=POOL, max_overflow=0, pool_timeout=30)
    apps: dict[str, ASGIApp] = {
        "by hand": by_hand(async_sessionmaker(engine, expire_on_commit=False)),
        "ReaderDep": by_reader(db),
    }
    requests = dict.fromkeys(apps, 0)
    seconds = dict.fromkeys(apps, 0.0)
    for app in apps.values():  # warm: connections, prepared statements, compiled caches
        await _drive(app, 0.3)
    for _ in range(SLICES):
        for name, app in apps.items():
            answered, took = await _drive(app, SLICE)
            requests[name] += answered
            seconds[name] += took
    per_second = {name: requests[name] / seconds[name] for name in apps}
    gain = per_second["ReaderDep"] / per_second["by hand"]
    print(f"{driver}: {per_second}, {gain:.2f} times")
    await assert_nothing_left(fresh_database, db)
    await engine.dispose()
    await db.close()
    # Nobody can do more than this by hand: a connection is held for as long as the call takes.
    assert per_second["by hand"] <= POOL / ELSEWHERE
    assert gain >= GAIN, per_second
