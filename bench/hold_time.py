"""One read and then 50 ms elsewhere, pool 10, 100 clients: requests per second by ReaderDep and by hand.

    make bench            # both drivers; ends with 1 if ReaderDep is below 4.5 times

Both apps run in this process, in alternating slices, so that what else the machine does meets both. By hand 200 a
second cannot be exceeded, for a connection is held during the call; what ReaderDep reaches is a matter of the
processor, so a busy machine shows less.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator  # noqa: TC003  # FastAPI evaluates annotations at run time
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import Depends, FastAPI
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Database
from stanch.embedded import EmbeddedPostgres
from stanch.fastapi import ReaderDep, install

if TYPE_CHECKING:
    from stanch.asgi import ASGIApp, Message

POOL: Final = 10
CLIENTS: Final = 100
ELSEWHERE: Final = 0.05
"""Seconds that the call of another service takes, for which the handler waits after its read."""
SLICE: Final = 1.5
"""Seconds that one app is driven before the other has its turn: what else the machine does meets both."""
SLICES: Final = 3
GAIN: Final = 4.5


class Base(DeclarativeBase):
    """The models."""


class Order(Base):
    """One row is read of it, again and again."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


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
    """The same handler on stanch."""
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


async def compare(server: EmbeddedPostgres, driver: str) -> float:
    """How many times the requests per second of the pattern by hand ReaderDep serves."""
    url = server.url(driver)
    engine = create_async_engine(url, pool_size=POOL, max_overflow=0, pool_timeout=30)
    db = Database(url, pool_size=POOL, max_overflow=0, pool_timeout=30)
    async with db.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Order).values(id=1, item="tea"))
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
    await engine.dispose()
    await db.close()
    rate = {name: requests[name] / seconds[name] for name in apps}
    gain = rate["ReaderDep"] / rate["by hand"]
    print(
        f"{driver:8} by hand {rate['by hand']:6.0f}/s   ReaderDep {rate['ReaderDep']:6.0f}/s   {gain:.2f} times"
    )
    return gain


def main() -> int:
    """Compare on both drivers; 1 if one of them falls short."""
    with EmbeddedPostgres() as server:
        gains = [asyncio.run(compare(server, driver)) for driver in ("asyncpg", "psycopg")]
    return int(min(gains) < GAIN)


if __name__ == "__main__":
    sys.exit(main())
