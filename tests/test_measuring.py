"""Law 9: the numbers are true. They agree with SQLAlchemy's events, with the server, and with what was done."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from stanch import Database, DatabaseUnavailable, PoolExhausted, PoolOverloaded
from stanch.accounts import Account
from stanch.callers import NOWHERE
from stanch.events import ConnectionLeaked, ConnectionSevered
from stanch.ledger import Checkout
from stanch.measuring import BOUNDS, NO_ROUTE, OTHERS, Distribution, Measuring, Snapshot
from stanch.meters import Meter
from tests.support import cleaned

if TYPE_CHECKING:
    from collections.abc import Callable

    from stanch.ledger import Stats
    from stanch.meters import UnitEnd
    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

BACKENDS = """
    SELECT state, count(*) FROM pg_stat_activity
    WHERE datname = $1 AND backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY state
"""


class Truth(Meter):
    """What SQLAlchemy says has happened, by its own events; and the ends of transactions as the meter is told."""

    def __init__(self, db: Database[Any]) -> None:
        self.counts: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        engine = db.engine.sync_engine
        for target, name in [
            (engine, "commit"),
            (engine, "before_cursor_execute"),
            (engine, "handle_error"),
            (engine.pool, "checkout"),
            (engine.pool, "checkin"),
            (engine.pool, "connect"),
        ]:
            event.listen(target, name, self._counting(name))
        db.meter(self)

    def _counting(self, name: str) -> Any:
        def count(*_arguments: Any, **_keywords: Any) -> None:
            self.counts[name] += 1

        return count

    def began(self, account: Account) -> None:
        self.ends["begun"] += 1

    def ended(self, account: Account, outcome: UnitEnd) -> None:
        self.ends[outcome] += 1

    def closed(self, account: Account) -> None:
        self.ends["closed"] += 1


@pytest.mark.parametrize("seed", range(3))
async def test_numbers_agree_with_what_was_done_under_errors_and_cancels(
    fresh_database: FreshDatabase, driver: str, seed: int
) -> None:
    await fresh_database.execute("CREATE TABLE entries (id int PRIMARY KEY)")
    dice = random.Random(seed)  # a seed to find the same again
    db = Database(fresh_database.url(driver), pool_size=3, max_overflow=1, pool_timeout=0.1)
    measuring = db.measure()
    done: Counter[str] = Counter()

    async def unit(number: int) -> None:
        match dice.randrange(6):
            case 0:
                async with db.reader() as session:
                    for _ in range(3):
                        await session.execute(text("SELECT 1"))
            case 1:
                async with db.transaction() as session:
                    await session.execute(text("INSERT INTO entries VALUES (:n)"), {"n": number})
            case 2:
                async with db.session() as session:
                    await session.execute(text("INSERT INTO entries VALUES (:n)"), {"n": number})
            case 3:
                async with db.transaction() as session:
                    await session.execute(text("SELECT 1 / 0"))
            case 4:
                async with db.transaction() as session:
                    await session.execute(text("SELECT pg_sleep(0.2)"))
            case _:
                async with db.connect() as connection:
                    await connection.execute(text("SELECT pg_sleep(0.02)"))

    async def work(number: int) -> None:
        try:
            await unit(number)
        except PoolOverloaded:
            done["refused"] += 1
        except PoolExhausted:
            done["exhausted"] += 1
        except DBAPIError:
            done["failed"] += 1
        except asyncio.CancelledError:
            done["cancelled"] += 1

    async with db:
        truth = Truth(db)
        connected = measuring.snapshot()  # it has connected once, to see that the database answers
        tasks: list[asyncio.Task[None]] = []
        for number in range(150):
            tasks.append(asyncio.create_task(work(number)))
            if dice.random() < 0.3:
                await asyncio.sleep(0.01)
            if dice.random() < 0.2:
                dice.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        taken = measuring.snapshot()

    assert done["failed"], "the faults must have happened"
    assert done["exhausted"], "the faults must have happened"
    assert taken.stats.in_use == taken.stats.waiting == 0
    assert taken.holders == ()

    def since(read: Callable[[Snapshot], float]) -> float:
        return read(taken) - read(connected)

    def end_of(end: str) -> float:
        return since(lambda shot: shot.wait_ends[end])

    def total(name: str) -> float:
        return since(lambda shot: sum(getattr(route, name) for route in shot.routes))

    counts = truth.counts
    assert counts["checkout"] <= counts["checkin"]  # also told of what was never handed out
    assert since(lambda shot: shot.uses.count) == counts["checkout"]
    assert since(lambda shot: shot.creates.count) == counts["connect"]
    sent = since(lambda shot: sum(row.count for row in shot.statements))
    assert sent == counts["before_cursor_execute"]
    failed = since(lambda shot: sum(row.errors for row in shot.statements))
    assert done["failed"] <= failed <= counts["handle_error"]
    assert sum(map(end_of, taken.wait_ends)) == since(lambda shot: shot.waits.count)
    # Who was cancelled in the very moment was refused all the same.
    assert done["exhausted"] <= end_of("timeout") <= done["exhausted"] + done["cancelled"]
    assert end_of("served") >= counts["checkout"]
    assert done["refused"] <= end_of("refused") <= done["refused"] + done["cancelled"]
    assert truth.ends["committed"] == counts["commit"] >= len(await fresh_database.fetch("TABLE entries")) > 0
    assert truth.ends["unknown"] == 0
    assert total("units") == truth.ends["begun"] == truth.ends["closed"]
    assert total("rolled_back") == truth.ends["rolled back"] > 0
    assert total("statements") == sent
    assert total("held") == pytest.approx(since(lambda shot: shot.uses.total))
    assert total("waited") == pytest.approx(since(lambda shot: shot.waits.total))
    assert 0 < total("sql_time") <= total("held")


async def test_who_waits_for_a_server_that_is_away_has_not_run_out_of_time(driver: str) -> None:
    """An alert on timeouts would else send somebody looking for who holds the connections: nobody does."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    db = Database(f"postgresql+{driver}://app@127.0.0.1:{port}/shop", pool_size=2, max_overflow=0)
    measuring = db.measure()

    async def ask() -> None:
        with pytest.raises(DatabaseUnavailable):
            async with db.session() as session:
                await session.execute(text("SELECT 1"))

    await asyncio.gather(*(ask() for _ in range(6)))
    await db.close()
    ends = measuring.snapshot().wait_ends
    assert 0 < ends["unavailable"] <= 6
    assert sum(ends.values()) == ends["unavailable"]
    assert measuring.totals()[2] == ends["unavailable"], "they were not served"


@pytest.mark.parametrize("seed", range(3))
async def test_stats_agree_with_the_server_at_every_quiet_point(
    fresh_database: FreshDatabase, driver: str, seed: int
) -> None:
    dice = random.Random(seed)  # a seed to find the same again
    db = Database(fresh_database.url(driver), pool_size=4, max_overflow=3, reader_pool_size=2)
    async with db:
        for _ in range(8):
            holding = dice.randrange(8)
            go_on, quiet = asyncio.Event(), asyncio.Barrier(holding + 1)

            async def hold(quiet: asyncio.Barrier = quiet, go_on: asyncio.Event = go_on) -> None:
                async with db.session() as session:
                    await session.execute(text("SELECT 1"))
                    await quiet.wait()
                    await go_on.wait()
                    if dice.random() < 0.2:
                        await session.invalidate()

            async def bother() -> None:
                async with db.connect() as connection:
                    await connection.execute(text("SELECT pg_sleep(1)"))

            bothering = [asyncio.create_task(bother()) for _ in range(dice.randrange(3))]
            reading = [asyncio.create_task(read_once(db)) for _ in range(dice.randrange(4))]
            holders = [asyncio.create_task(hold()) for _ in range(holding)]
            for task in bothering:
                await asyncio.sleep(dice.random() / 50)
                task.cancel()
            await asyncio.gather(*bothering, *reading, return_exceptions=True)
            await quiet.wait()
            stats = db.stats()
            assert stats.in_use == holding == len(db.holdings())
            await agrees(fresh_database, stats)
            go_on.set()
            await asyncio.gather(*holders)
        assert db.stats().in_use == 0
        await agrees(fresh_database, db.stats())


async def read_once(db: Database[Any]) -> None:
    async with db.reader() as session:
        await session.execute(text("SELECT 1"))


async def agrees(judged: FreshDatabase, stats: Stats) -> None:
    """The server counts as *stats* does; it may take a moment to notice who has gone."""
    async with asyncio.timeout(5):
        while True:
            backends = {row["state"]: row["count"] for row in await judged.fetch(BACKENDS, judged.name)}
            seen = backends.get("idle in transaction", 0), backends.get("idle", 0)
            if seen == (stats.in_use, stats.idle) and sum(backends.values()) == stats.size:
                return
            await asyncio.sleep(0.01)


async def test_a_snapshot_is_json_whole(fresh_database: FreshDatabase, driver: str) -> None:
    db = Database(fresh_database.url(driver), reader_pool_size=1)
    measuring = db.measure()
    async with db, db.session() as session:
        await session.execute(text("SELECT 1"))
        measuring.note(
            ConnectionLeaked(
                database="main",
                holder="GET /",
                place="a.py:1 in a()",
                now_at="",
                kind="idle",
                held=1.0,
                sql_time=0.0,
            )
        )
        snapshot = measuring.snapshot()
        told = json.loads(json.dumps(snapshot.as_dict()))
    assert told["stats"]["in_use"] == 1
    assert told["stats"]["readers"]["bound"] == 1
    assert told["holders"][0]["state"] == "in use, no SQL running"
    assert told["waits"]["count"] == snapshot.waits.count > 0
    assert told["leaks"][0]["returned"] is False
    assert set(told) == set(snapshot.fields())


def test_a_distribution_tells_its_quantiles() -> None:
    nothing = Distribution(0, 0.0, (0,) * (len(BOUNDS) + 1))
    assert nothing.quantile(0.5) is None
    beyond = Distribution(1, 99.0, (0,) * len(BOUNDS) + (1,))
    assert beyond.quantile(0.99) == BOUNDS[-1]


async def test_the_same_object_measures_at_every_call() -> None:
    db = Database("sqlite+aiosqlite:///:memory:")
    assert db.measure() is db.measure()


def test_whatever_comes_the_memory_has_a_bound() -> None:
    def nobody() -> Any:
        raise AssertionError("not asked")

    measuring = Measuring("main", stats=nobody, holders=nobody)
    for number in range(2000):
        account = Account(f"GET /{number}")
        measuring.executed(f"SELECT a{number}", 0.1, Checkout(None, 0.0, account), lambda: NOWHERE, None)
        measuring.closed(account)
        measuring.note(ConnectionSevered(database="main", reason=str(number)))
        measuring.note(
            ConnectionLeaked(
                database="main", holder=str(number), place="", now_at="", kind="idle", held=1.0, sql_time=0.0
            )
        )
    for table in (measuring._routes, measuring._statements):
        assert len(table) <= 501
        assert OTHERS in table
    assert sum(route.units for route in measuring._routes.values()) == 2000
    assert sum(totals.count for totals in measuring._statements.values()) == 2000
    assert len(measuring.events) == 500
    assert measuring.events[-1][0] == 4000
    assert len(measuring._leaks) == 50


async def test_what_no_unit_asked_for_is_measured_all_the_same(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db = Database(fresh_database.url(driver))
    measuring = db.measure()
    async with db:
        before = measuring.snapshot()
        async with db.connect() as connection:
            await connection.execute(text("SELECT 1"))
        after = measuring.snapshot()
    assert after.uses.count == before.uses.count + 1
    (route,) = after.routes
    assert route.route == NO_ROUTE
    assert route.held > 0
    assert route.statements == 1 + sum(each.statements for each in before.routes)
