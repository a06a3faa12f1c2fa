"""A shop under load: a slow route, one that repeats itself, and one that forgets to give its session back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI, Request
from sqlalchemy import text

from stanch import Database
from stanch.fastapi import ReaderDep, SessionDep, install
from tests.dashboard.fed import PATH
from tests.support.judge import FreshDatabase, assert_nothing_left

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncSession


async def read_order(number: int, session: ReaderDep) -> int:
    literal = f"SELECT id FROM orders WHERE id = {number}"  # as careless code writes it
    found = await session.execute(text(literal))
    return int(found.scalar_one())


async def place_order(session: SessionDep) -> None:
    await session.execute(text("INSERT INTO orders DEFAULT VALUES"))
    await session.execute(text("SELECT pg_sleep(0.02)"))


async def build_report(session: SessionDep) -> None:
    await session.execute(text("SELECT count(*), pg_sleep(0.2) FROM orders"))
    await asyncio.sleep(0.6)  # a slow service, asked while a connection is held


async def show_basket(session: SessionDep) -> None:
    for number in range(1, 15):
        await session.execute(text("SELECT id FROM orders WHERE id = :id"), {"id": number})


async def export_orders(request: Request) -> None:
    shop: Shop = request.app.state.shop
    session = await shop.forgotten.enter_async_context(shop.db.session())
    await session.execute(text("SELECT id FROM orders"))  # the line that takes it, and it is never given back


LEAKING_LINE = next(
    number
    for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
    if line.endswith("# the line that takes it, and it is never given back")
)


class Shop:
    def __init__(self, db: Database[AsyncSession]) -> None:
        self.db = db
        self.forgotten = AsyncExitStack()
        self.app = FastAPI()
        self.app.state.shop = self
        self.app.get("/orders/{number}")(read_order)
        self.app.post("/orders")(place_order)
        self.app.get("/report")(build_report)
        self.app.get("/basket")(show_basket)
        self.app.get("/export")(export_orders)
        install(self.app, db, dashboard=PATH, dashboard_access="loopback")


@asynccontextmanager
async def open_shop(
    judge: FreshDatabase, driver: str, *, leak_after: float, pool_size: int = 5
) -> AsyncGenerator[Shop]:
    await judge.execute(
        "CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY);"
        "INSERT INTO orders SELECT FROM generate_series(1, 20)"
    )
    shop = Shop(Database(judge.url(driver), pool_size=pool_size, max_overflow=1, leak_after=leak_after))
    try:
        yield shop
        await shop.forgotten.aclose()
        await assert_nothing_left(judge, shop.db)
    finally:
        await shop.db.close()


@asynccontextmanager
async def customers(number: int, url: str) -> AsyncGenerator[None]:
    """So many of them, who buy until the block ends."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        tasks = [asyncio.create_task(_buy(client, first)) for first in range(number)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task


async def _buy(client: httpx.AsyncClient, first: int) -> None:
    for number in range(first, 100_000):
        await client.get(f"/orders/{1 + number % 9}")
        await client.post("/orders")
        if number % 12 == 0:
            await client.get("/basket")
        if number % 40 == 3:
            await client.get("/report")
        await asyncio.sleep(0.02 + 0.03 * (1 + number // 20 % 3))
