"""A unit of work, cancelled at every point where it can be: all of it is stored or nothing, and nothing is left behind.

Exhaustive, not sampled: the unit is run once to count its suspension points, then once for each point and once for
each pair of points.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import Database
from stanch.fastapi import SessionDep, install
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left
from tests.support.suspensions import cancelled_at, suspensions, watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("forgetful_driver")]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database
forgetful_driver = cleaned.forgetful_driver

WRITE = text("INSERT INTO pairs VALUES (:id, :half)")
NONCE = text("SELECT CAST(:nonce AS int)")
PING_AFTER = 0.001
IDLE_FOR_LONG = 2 * PING_AFTER
SERIES = text("SELECT n FROM generate_series(1, 5) n")


class Base(DeclarativeBase):
    pass


class Half(Base):
    __tablename__ = "pairs"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    half: Mapped[str] = mapped_column(primary_key=True)


@pytest.fixture
async def pairs(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE pairs (id int, half text, PRIMARY KEY (id, half))")
    return fresh_database


async def endpoint(number: int, session: SessionDep) -> None:
    await session.execute(WRITE, {"id": number, "half": "first"})
    await session.execute(WRITE, {"id": number, "half": "second"})


class Units:
    """Units of work with a number each, and what the database must say of them afterwards."""

    def __init__(self, judged: FreshDatabase, driver: str, shape: str = "plain") -> None:
        self.judged = judged
        self.url = judged.url(driver)  # TLS is asked for: there are so many points more
        self.work = getattr(self, shape)
        self.pinged_first = shape == "pinged"
        self.number = 0
        self.outcomes: dict[int, str] = {}
        self.counts = Counter[str]()
        self.db = self.open()

    def open(self) -> Database[Any]:
        ping_after = PING_AFTER if self.pinged_first else 30.0
        self.db = Database(self.url, pool_size=2, max_overflow=0, pool_timeout=5, ping_after=ping_after)
        self.app = FastAPI()
        install(self.app, self.db)
        self.app.post("/{number}", status_code=201)(endpoint)
        return self.db

    async def unit(self, number: int) -> None:
        self.outcomes[number] = "cut"
        self.outcomes[number] = await self.work(number)

    async def plain(self, number: int) -> str:
        async with self.db.transaction() as session:
            await session.execute(WRITE, {"id": number, "half": "first"})
            await session.execute(WRITE, {"id": number, "half": "second"})
        return "done"

    pinged = plain
    """A checkout after ``rest()`` makes a round trip first."""

    async def raising(self, number: int) -> str:
        try:
            async with self.db.transaction() as session:
                await session.execute(WRITE, {"id": number, "half": "first"})
                await session.execute(WRITE, {"id": number, "half": "second"})
                raise LookupError("the app's own")
        except LookupError:
            return "raised"

    async def savepoint(self, number: int) -> str:
        async with self.db.transaction() as session:
            await session.execute(WRITE, {"id": number, "half": "first"})
            async with session.begin_nested():
                await session.execute(WRITE, {"id": number, "half": "second"})
        return "done"

    async def orm(self, number: int) -> str:
        async with self.db.transaction() as session:
            session.add(Half(id=number, half="first"))
            await session.flush()
            session.add(Half(id=number, half="second"))
            loaded = await session.get(Half, (number, "first"), populate_existing=True)
            assert loaded is not None
        return "done"

    async def stream(self, number: int) -> str:
        async with self.db.transaction() as session:
            await session.execute(WRITE, {"id": number, "half": "first"})
            seen = [row.n async for row in await session.stream(SERIES, execution_options={"yield_per": 2})]
            assert seen == [1, 2, 3, 4, 5]
            await session.execute(WRITE, {"id": number, "half": "second"})
        return "done"

    async def reading(self, number: int) -> str:
        """As a reader does: no transaction, each statement on its own."""
        async with self.db.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            for nonce in (number, -number):
                assert await connection.scalar(NONCE, {"nonce": nonce}) == nonce
        return "read"

    async def request(self, number: int) -> str:
        """Through the app: it is done when the reply has left."""
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                self.outcomes[number] = "done" if message["status"] == 201 else "raised"

        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": f"/{number}",
            "raw_path": f"/{number}".encode(),
            "query_string": b"",
            "headers": [],
        }
        await self.app(scope, receive, cast("Any", send))
        assert statuses == [201]
        return "done"

    def next(self) -> Coroutine[Any, Any, None]:
        self.number += 1
        return self.unit(self.number)

    async def rest(self) -> None:
        """Until every connection has been idle for long enough to be pinged, where that is the shape."""
        if self.pinged_first:
            await asyncio.sleep(IDLE_FOR_LONG)

    async def look(self) -> None:
        """After each cut: nothing out, and a canary gets its own answer over every connection, which then rests."""
        stats = self.db.stats()
        assert (stats.in_use, stats.waiting) == (0, 0)
        async with self.db.connect() as one, self.db.connect() as two:
            for connection, nonce in ((one, self.number), (two, -self.number)):
                assert await connection.scalar(NONCE, {"nonce": nonce}) == nonce
        await self.rest()

    async def judge(self) -> None:
        """At the end, from the database: no half pair, what ended well is there, what raised is not."""
        await assert_nothing_left(self.judged, self.db)
        stored = {
            row["id"]: row["n"]
            for row in await self.judged.fetch("SELECT id, count(*) AS n FROM pairs GROUP BY id")
        }
        assert set(stored.values()) <= {2}, "a half-written pair"
        for number, outcome in self.outcomes.items():
            self.counts[outcome + (", stored" if number in stored else "")] += 1
            if outcome == "done":
                assert number in stored
            elif outcome in {"raised", "read"} or self.work == self.raising:
                assert number not in stored


@pytest.fixture(params=["plain", "raising", "savepoint", "orm", "stream", "reading", "request", "pinged"])
async def units(request: pytest.FixtureRequest, pairs: FreshDatabase, driver: str) -> AsyncIterator[Units]:
    units = Units(pairs, driver, request.param)
    yield units
    await units.db.close()


async def once_warm(units: Units) -> int:
    """How often a unit on a warm pool suspends its task."""
    await units.next()
    await units.rest()
    return await suspensions(units.next())


async def test_the_ping_of_a_checkout_can_be_cut(pairs: FreshDatabase, driver: str) -> None:
    """It is among the points of a unit that is pinged."""
    points: dict[str, int] = {}
    for shape in ("plain", "pinged"):
        units = Units(pairs, driver, shape)
        points[shape] = await once_warm(units)
        await units.db.close()
        await pairs.execute("TRUNCATE pairs")
    assert points["pinged"] > points["plain"]


async def test_cancel_at_every_point_of_a_warm_unit(units: Units) -> None:
    points = await once_warm(units)
    assert points >= 3
    for point in range(1, points + 1):
        await units.look()
        error, reached = await cancelled_at(units.next(), {point})
        assert reached == 1
        assert isinstance(error, asyncio.CancelledError), f"at {point} of {points}: {error!r}"
        await units.look()
    await units.judge()
    assert units.counts["cut"] > 0, "some were cut before COMMIT"


async def test_cancel_at_every_pair_of_points_of_a_warm_unit(units: Units) -> None:
    points = await once_warm(units)
    both = 0
    for first, second in combinations(range(1, points + 2), 2):
        error, reached = await cancelled_at(units.next(), {first, second})
        both += reached == 2
        assert error is None or isinstance(error, asyncio.CancelledError), f"at {first}, {second}: {error!r}"
        await units.look()
    await units.judge()
    assert both >= points - 1, "the second cancel came while the first was still being cleaned up after"


async def test_cancel_at_every_point_of_a_cold_unit(units: Units) -> None:
    await units.next()
    await units.db.close()
    units.open()
    points = await suspensions(units.next())
    await units.db.close()
    for point in range(1, points + 1):
        units.open()
        error, reached = await cancelled_at(units.next(), {point})
        assert error is None or isinstance(error, asyncio.CancelledError), (
            f"at {point} of {points}: {error!r}"
        )
        assert reached <= 1
        await units.look()
        await units.db.close()
    await units.judge()
    assert units.counts["cut"] > 5


@pytest.mark.long
async def test_cancel_at_every_pair_of_points_of_a_cold_unit(pairs: FreshDatabase, driver: str) -> None:
    units = Units(pairs, driver)
    points = await suspensions(units.next())
    await units.db.close()
    for first, second in combinations(range(1, points + 1), 2):
        units.open()
        error, _ = await cancelled_at(units.next(), {first, second})
        assert error is None or isinstance(error, asyncio.CancelledError), f"at {first}, {second}: {error!r}"
        await units.look()
        await units.db.close()
    await units.judge()


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
async def test_anyio_scope_cancelled_at_every_point(units: Units, cold: bool) -> None:
    """A level cancellation: every await of the cleanup raises, unless it is shielded."""
    await units.next()
    if cold:
        await units.db.close()
        units.open()
    await units.rest()
    points = await suspensions(units.next())
    caught = 0
    for point in range(1, points + 1):
        if cold:
            await units.db.close()
            units.open()
        with anyio.CancelScope() as scope:

            def at(number: int, point: int = point, scope: anyio.CancelScope = scope) -> None:
                if number == point:
                    scope.cancel()

            async with asyncio.timeout(20):
                await watched(units.next(), at)
        caught += scope.cancelled_caught
        await units.look()
    await units.judge()
    assert caught > 0


async def test_scope_and_task_cancelled_at_every_pair(pairs: FreshDatabase, driver: str) -> None:
    units = Units(pairs, driver)
    points = await once_warm(units)

    async def scoped(point: int) -> None:
        with anyio.CancelScope() as scope:
            await watched(units.next(), lambda number: scope.cancel() if number == point else None)

    for first in range(1, points + 1):
        for second in range(1, points + 2):
            error, _ = await cancelled_at(scoped(first), {second})
            assert error is None or isinstance(error, asyncio.CancelledError), f"{first}, {second}: {error!r}"
            await units.look()
    await units.judge()
    await units.db.close()


async def test_cancel_waits_for_the_pool_at_every_point(pairs: FreshDatabase, driver: str) -> None:
    """The pool is empty when the unit asks: it is cut as a waiter, or just as its turn comes."""
    units = Units(pairs, driver)
    await units.next()
    for point in (1, 2, 3):
        async with units.db.connect(), units.db.connect() as last:
            units.number += 1
            task = asyncio.create_task(cancelled_at(units.unit(units.number), {point}))
            while not units.db.stats().waiting and not task.done():  # noqa: ASYNC110  # the pool has no event for it
                await asyncio.sleep(0)
            await last.close()
            error, _ = await task
            assert isinstance(error, asyncio.CancelledError)
        await units.look()
    await units.judge()
    await units.db.close()
