"""The pool on a real PostgreSQL: fair, bounded, honest about what it holds, and never handing on what is not idle."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
import re
import select
import signal
import threading
import time
import weakref
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool, QueuePool, StaticPool
from sqlalchemy.util import await_only, greenlet_spawn

from stanch import (
    ConfigError,
    Database,
    DatabaseClosed,
    DatabaseUnavailable,
    DeadlinePassed,
    PoolExhausted,
    SecondEventLoop,
    Stats,
    classify,
)
from stanch.embedded import EmbeddedPostgres
from stanch.events import ConnectionSevered, Event
from stanch.ledger import Ledger
from stanch.meters import Meter
from stanch.pool import Pool
from stanch.sqlstate import Kind
from tests.support import cleaned
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, raw_connect, until
from tests.support.proxy import FaultProxy, Verdict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from stanch.ledger import Checkout

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database
forgetful_driver = cleaned.forgetful_driver

PID = text("SELECT pg_backend_pid()")
NOBODY_ELSE = """
    SELECT 1 WHERE NOT EXISTS (
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
    )
"""


def make(judged: FreshDatabase, driver: str, **settings: Any) -> Database[Any]:
    chosen: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, **settings}
    return Database(judged.url(driver), **chosen)


async def pid_of(db: Database[Any]) -> int:
    async with db.connect() as connection:
        return int(await connection.scalar(PID) or 0)


async def until_true(condition: Callable[[], bool], *, timeout: float = 5.0) -> None:
    """Wait for a condition of this process's own; fails after *timeout* seconds."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0.005)


async def gone(judged: FreshDatabase, pid: int) -> None:
    """Wait until the server has no backend *pid* any more."""
    await until(judged, "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)


# Taking turns -----------------------------------------------------------------------------------------------


class Turns:
    """Who had how many turns, and who was passed over.

    Both connections are opened before: who opens one waits for his own connect, not in the queue. A law of the queue
    is counted in turns, because a machine that stalls one connection is not unfair, and stalls whom it likes.
    """

    def __init__(self, db: Database[Any], loops: int) -> None:
        self.db = db
        self.of = [0] * loops
        self.overtaken: list[tuple[int, list[int]]] = []
        """Who waited, and the turns that others began meanwhile, where one of them had two."""
        self.kept_waiting = 0
        """How often somebody waited while a connection lay idle."""

    async def open_all(self) -> None:
        async with AsyncExitStack() as stack:
            for _ in range(self.db.stats().pool_size):
                await stack.enter_async_context(self.db.connect())

    async def take(self, number: int, session: AsyncSession) -> None:
        before = self.of.copy()
        await session.connection()
        meanwhile = [now - then for now, then in zip(self.of, before, strict=True)]
        if max(meanwhile) > 1:
            self.overtaken.append((number, meanwhile))
        self.of[number] += 1
        stats = self.db.stats()
        self.kept_waiting += bool(stats.idle and stats.waiting)


@pytest.mark.parametrize("explicit_close", [True, False])
async def test_six_loops_on_a_pool_of_two_all_get_turns(
    fresh_database: FreshDatabase, driver: str, explicit_close: bool
) -> None:
    """SQLAlchemy 2.1's own queue serves two of them and starves four."""

    async def loop(number: int, turns: Turns) -> None:
        while sum(turns.of) < 240:
            session = turns.db.session_factory()
            if explicit_close:
                await turns.take(number, session)
                await session.execute(text("SELECT 1"))
                await session.close()
            else:
                async with session:
                    await turns.take(number, session)
                    await session.execute(text("SELECT 1"))

    async with make(fresh_database, driver) as db:
        turns = Turns(db, 6)
        await turns.open_all()
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(loop(number, turns))
        assert db.stats().in_use == 0
        assert len(await fresh_database.activity()) <= 2
    assert min(turns.of) > 0, turns.of
    assert turns.overtaken == [], "one had two turns while another waited for his"
    assert turns.kept_waiting == 0


async def test_six_loops_and_a_web_request_on_a_pool_of_two_wait_their_turn_and_no_longer(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Turns, not seconds: a busy machine is slow to all. Of SQLAlchemy's six loops four got one turn."""
    turns_during_a_wait: list[int] = []
    places: list[int] = []
    over = False

    async def loop(number: int, turns: Turns) -> None:
        while not over:
            async with turns.db.session() as session:
                await turns.take(number, session)
                await session.execute(text("SELECT 1"))

    async def web(turns: Turns) -> None:
        nonlocal over
        for _ in range(40):
            await asyncio.sleep(0.005)  # as a request that comes now and then
            before, place = sum(turns.of), turns.db.stats().waiting + 1
            async with turns.db.session() as session:
                await turns.take(6, session)
                turns_during_a_wait.append(sum(turns.of) - 1 - before)
                places.append(place)
        while min(turns.of[:6]) < 100:  # noqa: ASYNC110  # the loops report to nobody
            await asyncio.sleep(0.005)
        over = True

    async with make(fresh_database, driver, pool_timeout=20) as db:
        turns = Turns(db, 7)
        await turns.open_all()
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(loop(number, turns))
            group.create_task(web(turns))
    print(
        f"{driver}: {turns.of}; web request: turns that others began while it waited"
        f" {max(turns_during_a_wait)} at most, its place {max(places)} at most"
    )
    assert turns.overtaken == [], "one had two turns while another waited for his"
    assert turns.kept_waiting == 0
    assert max(places) > 2, "it did wait"
    # those before it, and those two who had been given their turn when it came and had not begun it
    assert all(got <= place + 1 for got, place in zip(turns_during_a_wait, places, strict=True))


async def test_waiters_are_served_in_the_order_they_came(fresh_database: FreshDatabase, driver: str) -> None:
    served: list[int] = []

    async def ask(number: int, db: Database[Any]) -> None:
        async with db.connect() as connection:
            served.append(number)
            await connection.execute(text("SELECT 1"))

    async with make(fresh_database, driver, pool_size=1) as db:
        async with asyncio.TaskGroup() as group, db.connect():  # the connection comes back first
            for number in range(8):
                group.create_task(ask(number, db))
                await until_true(lambda wanted=number + 1: db.stats().waiting == wanted)  # type: ignore[misc]  # mypy cannot infer a lambda's default
        assert served == list(range(8))
        assert db.stats() == Stats(pool_size=1, max_overflow=0, in_use=0, idle=1, waiting=0)


async def test_bound_holds_on_the_server_under_a_crowd(fresh_database: FreshDatabase, driver: str) -> None:
    """Counted by the server inside every statement, not by the pool."""
    count_backends = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'crowd'"
    )
    seen: list[int] = []

    async def ask(db: Database[Any]) -> None:
        async with db.connect() as connection:
            seen.append(int(await connection.scalar(count_backends) or 0))

    async with make(fresh_database, driver, pool_size=3, application_name="crowd") as db:
        await asyncio.gather(*(ask(db) for _ in range(60)))
        assert db.stats() == Stats(pool_size=3, max_overflow=0, in_use=0, idle=3, waiting=0)
    assert len(seen) == 60
    assert max(seen) == 3


async def test_failed_connect_passes_its_right_on(fresh_database: FreshDatabase, driver: str) -> None:
    """Pool of one, two ask, the first connect fails: the second must not wait for a wake-up that never comes."""
    attempts = 0

    def refuse_the_first(*_args: Any) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ConnectionRefusedError("planted")

    db = make(fresh_database, driver, pool_size=1, pool_timeout=10)
    event.listen(db.engine.sync_engine, "do_connect", refuse_the_first)
    begun = time.monotonic()
    outcomes = await asyncio.gather(pid_of(db), pid_of(db), return_exceptions=True)
    assert time.monotonic() - begun < 5, "nobody waited for pool_timeout"
    assert attempts == 2
    assert isinstance(outcomes[0], Exception)
    assert isinstance(outcomes[1], int)
    assert db.stats() == Stats(pool_size=1, max_overflow=0, in_use=0, idle=1, waiting=0)
    await db.close()


# Giving up --------------------------------------------------------------------------------------------------


async def _cancel_by_task(asked: Callable[[], Awaitable[None]], after: float) -> None:
    task = asyncio.ensure_future(asked())
    asyncio.get_running_loop().call_later(after, task.cancel)
    await asyncio.gather(task, return_exceptions=True)


async def _cancel_by_scope(asked: Callable[[], Awaitable[None]], after: float) -> None:
    with anyio.move_on_after(after):
        await asked()


@pytest.mark.usefixtures("forgetful_driver")
@pytest.mark.parametrize("cancel", [_cancel_by_task, _cancel_by_scope], ids=["asyncio", "anyio"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_cancelled_waiters_give_their_places_back(
    fresh_database: FreshDatabase,
    driver: str,
    seed: int,
    cancel: Callable[[Callable[[], Awaitable[None]], float], Awaitable[None]],
) -> None:
    chance = random.Random(seed)
    done = wrong = 0

    async with Database(fresh_database.url(driver), pool_size=2, max_overflow=0, pool_timeout=20) as db:
        begun = time.monotonic()
        await db.engine.dispose()
        await pid_of(db)
        patience = time.monotonic() - begun  # what a unit takes that must connect; longer on a busy machine

        async def ask() -> None:
            nonlocal done, wrong
            nonce = chance.randrange(10**9)
            async with db.connect() as connection:
                got = await connection.scalar(text("SELECT CAST(:n AS int)"), {"n": nonce})
            done += 1
            wrong += got != nonce

        async def client() -> None:
            for _ in range(15):
                await cancel(ask, chance.expovariate(1 / patience))

        async with asyncio.timeout(40):
            await asyncio.gather(*(client() for _ in range(6)))
        assert 0 < done < 90, "some were cancelled and some were not"
        assert wrong == 0
        await assert_nothing_left(fresh_database, db)
        # the full size can still be lent, at once
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(db.connect())
            assert db.stats().in_use == 2


async def test_waiter_cancelled_in_the_moment_of_its_turn_passes_it_on(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=1) as db:
        async with AsyncExitStack() as holding:
            await holding.enter_async_context(db.connect())
            first, second = (asyncio.create_task(pid_of(db)) for _ in range(2))
            await until_true(lambda: db.stats().waiting == 2)
        # The turn was given to the first within aclose(), and nothing has run since: it has not seen it yet.
        first.cancel()
        async with asyncio.timeout(2):
            assert await second > 0
        await asyncio.gather(first, return_exceptions=True)
        assert db.stats() == Stats(pool_size=1, max_overflow=0, in_use=0, idle=1, waiting=0)


# PoolExhausted ----------------------------------------------------------------------------------------------


async def test_pool_exhausted_names_the_holders_and_the_figures(
    fresh_database: FreshDatabase, driver: str
) -> None:
    parked = asyncio.Event()
    release = asyncio.Event()

    async def park_in_user_code() -> None:
        await release.wait()

    async def report_of_the_month(db: Database[Any]) -> None:
        async with db.connect():
            parked.set()
            await park_in_user_code()

    async with make(fresh_database, driver, pool_size=1, pool_timeout=0.2) as db:
        holder = asyncio.create_task(report_of_the_month(db), name="GET /report")
        await parked.wait()
        begun = time.monotonic()
        with pytest.raises(PoolExhausted) as caught:
            await pid_of(db)
        assert 0.15 < time.monotonic() - begun < 2
        told = str(caught.value)
        release.set()
        await holder
    assert "within 0.20 s" in told
    assert "in_use 1 of 1" in told
    assert "GET /report" in told
    assert re.search(r"test_pool\.py:\d+ in .*park_in_user_code\(\)", told), told
    password = fresh_database.url("asyncpg").split(":")[2].split("@")[0]
    assert password not in told
    assert "postgresql" not in told


async def test_holder_is_named_also_below_code_of_a_library(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """A request's task begins in the server's code; the line that matters is further in."""
    parked = asyncio.Event()
    release = asyncio.Event()

    async def handler(db: Database[Any]) -> None:
        async with db.connect():
            parked.set()
            await release.wait()

    library: dict[str, Any] = {}
    source = "async def served(handler):\n    await handler\n"
    exec(compile(source, "/usr/lib/site-packages/server.py", "exec"), library)
    served: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]] = library["served"]

    async with make(fresh_database, driver, pool_size=1, pool_timeout=0.1) as db:
        holder = asyncio.create_task(served(handler(db)), name="a request")
        await parked.wait()
        with pytest.raises(PoolExhausted) as caught:
            await pid_of(db)
        release.set()
        await holder
    assert re.search(r"test_pool\.py:\d+ in .*handler\(\)", str(caught.value)), str(caught.value)


# Losing connections -----------------------------------------------------------------------------------------


async def test_dead_idle_connections_are_replaced_without_an_error(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=3) as db:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(db.connect())
        assert db.stats().idle == 3
        killed = await fresh_database.fetch(
            f"SELECT pg_terminate_backend(pid, 5000) AS dead, pid FROM {OTHERS}"
        )
        assert [row["dead"] for row in killed] == [True, True, True]
        async with AsyncExitStack() as stack:
            fresh = [await stack.enter_async_context(db.connect()) for _ in range(3)]
            pids = {int(await connection.scalar(PID) or 0) for connection in fresh}
        assert len(pids) == 3
        assert not pids & {row["pid"] for row in killed}


async def test_error_of_a_lost_connection_outdates_the_others(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """One connection noticed the restart in use: those that were opened before it are not handed out again."""
    async with make(fresh_database, driver) as db:
        async with db.connect() as one, db.connect() as other:
            victim = int(await one.scalar(PID) or 0)
            bystander = int(await other.scalar(PID) or 0)
            await fresh_database.fetchval("SELECT pg_terminate_backend($1, 5000)", victim)
            with pytest.raises(DBAPIError):
                await one.execute(text("SELECT 1"))
        await gone(fresh_database, bystander)
        assert await pid_of(db) not in {victim, bystander}


async def test_connection_is_recycled_by_age(
    fresh_database: FreshDatabase, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(fresh_database, driver, pool_size=1, pool_recycle=60) as db:
        first = await pid_of(db)
        assert await pid_of(db) == first
        now = time.monotonic
        monkeypatch.setattr("stanch.pool.time.monotonic", lambda: now() + 53)
        assert await pid_of(db) == first
        monkeypatch.setattr("stanch.pool.time.monotonic", lambda: now() + 61)
        assert await pid_of(db) != first
        await gone(fresh_database, first)


async def test_connections_opened_in_one_rush_are_not_recycled_in_one(
    fresh_database: FreshDatabase, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each within the last tenth of pool_recycle, at a moment of its own."""

    async def pids(db: Database[Any]) -> set[int]:
        async with AsyncExitStack() as stack:
            all_of_them = [await stack.enter_async_context(db.connect()) for _ in range(8)]
            return {int(await connection.scalar(PID) or 0) for connection in all_of_them}

    # No pings: one that failed would replace all of them, for a reason of its own.
    async with make(fresh_database, driver, pool_size=8, pool_recycle=1000, ping_after=-1) as db:
        first = await pids(db)
        now = time.monotonic
        kept: list[int] = []
        for age in (899, 933, 966, 1001):
            monkeypatch.setattr("stanch.pool.time.monotonic", lambda age=age: now() + age)
            kept.append(len(first & await pids(db)))
    assert kept[0] == 8
    assert kept[-1] == 0
    assert kept == sorted(kept, reverse=True)
    assert any(0 < number < 8 for number in kept), kept


@pytest.mark.parametrize("hours", [-2, +2])
async def test_wall_clock_that_jumps_changes_nothing(
    fresh_database: FreshDatabase, driver: str, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy compares wall clock times: an invalidation before a jump back costs a reconnect at each checkout."""
    async with make(fresh_database, driver, pool_size=1, pool_recycle=600) as db:
        victim = await pid_of(db)
        async with db.connect() as connection:
            await fresh_database.fetchval("SELECT pg_terminate_backend($1, 5000)", victim)
            with pytest.raises(DBAPIError):
                await connection.execute(text("SELECT 1"))
        wall = time.time
        monkeypatch.setattr("time.time", lambda: wall() + hours * 3600)
        assert len({await pid_of(db) for _ in range(5)}) == 1


# What is returned -------------------------------------------------------------------------------------------


async def raw(connection: AsyncConnection) -> Any:
    """The driver's own connection."""
    return (await connection.get_raw_connection()).driver_connection


async def test_connection_returned_in_a_transaction_is_severed(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """BEGIN behind SQLAlchemy's back, and no ROLLBACK at return: only the driver knows."""
    events: list[Event] = []
    engine = create_async_engine(
        fresh_database.url(driver), isolation_level="AUTOCOMMIT", pool_size=1, pool_reset_on_return=None
    )
    async with Database(engine) as db:
        db.observe(events.append)
        pid = await pid_of(db)
        proxied = await db.engine.raw_connection()
        theirs: Any = proxied.driver_connection
        await theirs.execute("BEGIN")
        await theirs.execute("CREATE TABLE half (id int)")
        await greenlet_spawn(proxied.close)
        assert await pid_of(db) != pid
        await gone(fresh_database, pid)
        assert await fresh_database.fetchval("SELECT to_regclass('half')") is None
    assert [type(each) for each in events] == [ConnectionSevered]


async def test_connection_returned_in_an_operation_is_severed(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Its answer would be read by whoever comes next."""
    strays: list[asyncio.Future[Any]] = []
    async with make(fresh_database, driver, pool_size=1, close_timeout=0.5) as db:
        pid = await pid_of(db)
        with pytest.raises((DBAPIError, DeadlinePassed)):  # its ROLLBACK cannot be sent
            async with db.connect() as connection:
                assert await connection.scalar(PID) == pid
                theirs: Any = await raw(connection)
                strays.append(asyncio.ensure_future(theirs.execute("SELECT 666 FROM pg_sleep(30)")))
                await until(
                    fresh_database, "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND state = 'active'", pid
                )
        assert db.stats().in_use == 0
        async with db.connect() as connection:
            assert await connection.scalar(text("SELECT 42")) == 42
            assert await connection.scalar(PID) != pid
        strays[0].cancel()
        await asyncio.gather(*strays, return_exceptions=True)


@pytest.mark.abandons_connections
async def test_unclosed_connection_gives_its_place_back_when_collected(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=1, pool_timeout=5) as db:
        connection: AsyncConnection | None = await db.engine.connect()
        assert connection is not None
        pid = int(await connection.scalar(PID) or 0)
        waiting = asyncio.create_task(pid_of(db))
        await until_true(lambda: db.stats().waiting == 1)
        connection = None
        gc.collect()
        async with asyncio.timeout(3):
            assert await waiting != pid
        await gone(fresh_database, pid)
        await assert_nothing_left(fresh_database, db)


@pytest.mark.abandons_connections
async def test_unclosed_connection_collected_on_another_thread_wakes_the_waiter(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=1, pool_timeout=5) as db:
        hold: list[AsyncConnection] = [await db.engine.connect()]
        waiting = asyncio.create_task(pid_of(db))
        await until_true(lambda: db.stats().waiting == 1)

        def collect() -> None:
            time.sleep(0.1)  # until the loop sleeps: only a thread-safe call wakes it up again
            hold.clear()
            gc.collect()

        thread = threading.Thread(target=collect)
        thread.start()
        begun = time.monotonic()
        assert await waiting > 0
        assert time.monotonic() - begun < 2, "the waiter was woken, and did not wait for its alarm"
        await asyncio.to_thread(thread.join)
        await assert_nothing_left(fresh_database, db)


# dispose() --------------------------------------------------------------------------------------------------


@pytest.mark.abandons_connections
async def test_the_garbage_collector_comes_in_the_middle_of_a_hand_over_and_the_books_agree(
    fresh_database: FreshDatabase, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the thread that holds the lock: there may then be no waiter left for what was just to be handed over."""
    serve_next: Callable[..., None] = Ledger[Any]._serve_next
    garbage: list[AsyncConnection] = []

    def collect_first(ledger: Ledger[Any], *arguments: Any, **keywords: Any) -> None:
        garbage.clear()
        gc.collect()
        serve_next(ledger, *arguments, **keywords)

    async with make(fresh_database, driver) as db:
        kept = await db.engine.connect()
        garbage.append(await db.engine.connect())
        waiter = asyncio.create_task(pid_of(db))
        await until_true(lambda: db.stats().waiting == 1)
        monkeypatch.setattr(Ledger, "_serve_next", collect_first)
        await kept.close()
        pid = await waiter
        await until_true(lambda: db.stats().in_use == 0)
        assert (db.stats().idle, db.stats().waiting) == (1, 0)
        await until(
            fresh_database,
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
            " AND pid <> pg_backend_pid() HAVING array_agg(pid) = ARRAY[$1::int]",
            pid,
        )


@pytest.mark.abandons_connections
async def test_what_the_garbage_collector_returns_in_a_greenlet_is_not_waited_for(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Nearly all code of SQLAlchemy's runs in one, and none of it expects that others run in the middle of it."""
    others: list[bool] = []
    async with make(fresh_database, driver) as db:
        garbage = [await db.engine.connect()]
        pid = int(await garbage[0].scalar(PID) or 0)

        def collect() -> None:
            asyncio.get_running_loop().call_soon(others.append, True)
            garbage.clear()
            gc.collect()
            assert not others, "others ran while it was returned"

        await greenlet_spawn(collect)
        await until_true(lambda: db.stats().in_use == 0)
        await gone(fresh_database, pid)


@pytest.mark.abandons_connections
async def test_no_meter_is_told_of_a_return_in_the_middle_of_what_it_does(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """What a meter tells may be kept under a lock of its own, as OpenTelemetry does."""
    garbage: list[AsyncConnection] = []
    lock = threading.Lock()
    told: list[bool] = []

    class Collecting(Meter):
        def taken(self, checkout: Checkout) -> None:
            with lock:
                garbage.clear()
                gc.collect()

        def returned(self, checkout: Checkout, held: float) -> None:
            told.append(lock.locked())

    async with make(fresh_database, driver) as db:
        garbage.append(await db.engine.connect())
        db.meter(Collecting())
        await pid_of(db)
        await until_true(lambda: len(told) == 2)
        assert told == [False, False]


@pytest.mark.parametrize("step", ["opened", "waited", "taken", "returned"])
async def test_a_meter_that_raises_costs_no_slot(
    fresh_database: FreshDatabase, driver: str, step: str
) -> None:
    def fail(*_facts: object) -> None:
        raise RuntimeError("no meter should")

    async with make(fresh_database, driver, pool_size=1) as db:
        await db.engine.dispose()
        meter = type("Failing", (Meter,), {step: fail})()
        take_off = db.meter(meter)
        with pytest.raises(RuntimeError, match="no meter should"):
            await pid_of(db)
        take_off()
        assert db.stats().in_use == 0
        assert await pid_of(db)


async def test_dispose_while_some_are_out_and_some_wait(fresh_database: FreshDatabase, driver: str) -> None:
    async with make(fresh_database, driver, pool_size=2, pool_timeout=10) as db:
        async with db.connect() as one, db.connect() as two:
            old = {int(await each.scalar(PID) or 0) for each in (one, two)}
            waiting = [asyncio.create_task(pid_of(db)) for _ in range(2)]
            await until_true(lambda: db.stats().waiting == 2)
            await db.engine.dispose()
            assert db.stats() == Stats(pool_size=2, max_overflow=0, in_use=2, idle=0, waiting=2)
            assert await one.scalar(text("SELECT 1")) == 1, "what is out goes on"
        new = set(await asyncio.gather(*waiting))
        assert not new & old, "what was out is closed at its return"
        for pid in old:
            await gone(fresh_database, pid)
        assert len(await fresh_database.activity()) <= 2
        await assert_nothing_left(fresh_database, db)


async def test_dispose_closes_what_is_idle(fresh_database: FreshDatabase, driver: str) -> None:
    async with make(fresh_database, driver) as db:
        pid = await pid_of(db)
        await db.engine.dispose()
        await gone(fresh_database, pid)
        assert db.stats().size == 0
        assert await pid_of(db) != pid


async def test_dispose_forgets_no_connection_that_came_back_meanwhile(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Closing takes turns of the loop; what is opened and returned in them stays on the books."""
    closing, go_on = asyncio.Event(), asyncio.Event()

    def close_slowly(*_arguments: object) -> None:
        closing.set()
        await_only(go_on.wait())

    async with make(fresh_database, driver) as db:
        first = await pid_of(db)
        event.listen(db.engine.sync_engine.pool, "close", close_slowly)
        disposing = asyncio.create_task(db.engine.dispose())
        await closing.wait()
        pid = await pid_of(db)
        go_on.set()
        await disposing
        await gone(fresh_database, first)
        assert db.stats().idle == 1
        assert [row["pid"] for row in await fresh_database.activity()] == [pid]
        assert await pid_of(db) == pid


async def test_dispose_without_closing_forgets_the_parents_connections(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """``dispose(close=False)`` is what a forked child calls: it must not touch its parent's sockets."""
    async with make(fresh_database, driver, pool_size=1) as db:
        pool: Any = db.engine.sync_engine.pool
        async with db.connect() as connection:
            pid = int(await connection.scalar(PID) or 0)
            parents = await raw(connection)
        await db.engine.dispose(close=False)
        assert db.stats().size == 0
        assert db.engine.sync_engine.pool is pool
        assert await fresh_database.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid) == 1
        await parents.close()


# Event loops ------------------------------------------------------------------------------------------------


@pytest.mark.abandons_connections
def test_next_loop_begins_anew_and_the_connections_of_the_closed_one_are_dropped(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, max_overflow=0)
    pids = [asyncio.run(pid_of(db)) for _ in range(3)]
    assert len(set(pids)) == 3
    assert db.stats().size == 0, "nobody can use a connection of a closed loop"

    async def close() -> None:
        await db.close()

    asyncio.run(close())
    deadline = time.monotonic() + 5
    while not {(str(pid),) for pid in pids}.isdisjoint(postgres.sql("SELECT pid FROM pg_stat_activity")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.abandons_connections
def test_database_of_a_closed_loop_can_be_closed_in_another(
    postgres: EmbeddedPostgres, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As TestClient does: one loop for each test, the database closed in the last."""
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, max_overflow=0)
    pid = asyncio.run(pid_of(db))
    asyncio.run(db.close())
    deadline = time.monotonic() + 5
    while (str(pid),) in postgres.sql("SELECT pid FROM pg_stat_activity") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (str(pid),) not in postgres.sql("SELECT pid FROM pg_stat_activity")
    assert db.stats().size == 0
    assert not [record for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}]


@pytest.mark.abandons_connections
def test_second_living_loop_is_refused_by_name_and_may_go_on_once_the_first_is_closed(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, max_overflow=0)
    is_open, may_end = threading.Event(), threading.Event()
    outcomes: list[object] = []

    async def first() -> None:
        async with db.connect() as connection:
            is_open.set()
            await asyncio.to_thread(may_end.wait, 10)
            outcomes.append(await connection.scalar(text("SELECT 1")))

    thread = threading.Thread(target=lambda: asyncio.run(first()), name="the first loop's")
    thread.start()
    assert is_open.wait(10)
    with pytest.raises(SecondEventLoop):
        asyncio.run(pid_of(db))
    with pytest.raises(SecondEventLoop) as refused:
        asyncio.run(pid_of(db))
    told = str(refused.value)
    assert '"the first loop\'s"' in told, told
    assert "in_use 1, idle 0" in told, told
    assert db.stats().in_use == 1, "the first goes on"
    may_end.set()
    thread.join(10)
    assert outcomes == [1]
    assert asyncio.run(pid_of(db)) > 0
    asyncio.run(db.close())


@pytest.mark.abandons_connections
def test_what_a_closed_loop_has_left_can_be_closed_in_another_although_somebody_waited_for_it(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    # Who waited is still at work there, and never ends: the close waits for him as long as it may.
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, max_overflow=0, drain_timeout=0.2)
    left: list[Any] = []

    async def leave() -> None:
        left.append(await db.engine.connect())
        left.append(asyncio.ensure_future(pid_of(db)))
        await until_true(lambda: db.stats().waiting == 1)

    async def close() -> None:
        await pid_of(db)
        await left[0].close()
        await db.close()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    left[1]._log_destroy_pending = False
    asyncio.run(close())


def test_loop_that_left_nothing_open_is_not_in_the_way_of_another(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    """SQLAlchemy's own advice for a second loop is to dispose of the engine in the first."""
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, max_overflow=0)

    async def use_and_dispose() -> int:
        pid = await pid_of(db)
        await db.engine.dispose()
        return pid

    with asyncio.Runner() as one, asyncio.Runner() as other:
        pids = {runner.run(use_and_dispose()) for runner in (one, other, one)}
        assert len(pids) == 3
        other.run(db.close())


def _gone_from(server: EmbeddedPostgres, pid: int) -> bool:
    deadline = time.monotonic() + 5
    while (str(pid),) in server.sql("SELECT pid FROM pg_stat_activity"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.abandons_connections
def test_close_severs_what_a_closed_loop_still_held(postgres: EmbeddedPostgres, driver: str) -> None:
    """Nobody can return it: a return awaits, and that loop runs no more."""
    db: Database[Any] = Database(postgres.url(driver), drain_timeout=0.2, close_timeout=0.5)
    session = db.session_factory()

    async def hold() -> int:
        return int(await session.scalar(PID) or 0)

    pid = asyncio.run(hold())
    assert (str(pid),) in postgres.sql("SELECT pid FROM pg_stat_activity")
    begun = time.monotonic()
    asyncio.run(db.close())
    assert time.monotonic() - begun < 3
    assert _gone_from(postgres, pid)
    assert db.stats().size == 0


@pytest.mark.abandons_connections
def test_close_severs_what_another_running_loop_holds_and_its_holder_hears_of_it(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    """Its sockets belong to that loop's thread: touched from here, its holder would sleep on."""
    db: Database[Any] = Database(postgres.url(driver), drain_timeout=0.2, close_timeout=0.5)
    asyncio.run(pid_of(db))  # SQLAlchemy's very first connect takes a lock that two loops cannot share
    pids: list[int] = []
    outcome: list[BaseException | None] = []

    async def sleep() -> None:
        async with db.session() as session:
            pids.append(int(await session.scalar(PID) or 0))
            await session.execute(text("SELECT pg_sleep(20)"))

    def run() -> None:
        try:
            asyncio.run(sleep(), debug=True)  # debug: a call from a foreign thread raises
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 5
    while not postgres.sql("SELECT pid FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(20)'"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    begun = time.monotonic()
    asyncio.run(db.close(), debug=True)
    assert time.monotonic() - begun < 3
    thread.join(5)
    assert not thread.is_alive(), "its holder was never told"
    assert isinstance(outcome[0], DBAPIError | OSError), outcome
    postgres.sql(f"SELECT pg_cancel_backend({pids[0]})")  # a severed backend notices when its sleep is over
    assert _gone_from(postgres, pids[0])


async def test_who_still_waits_when_the_database_is_closed_opens_nothing_behind_it(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db = make(fresh_database, driver, pool_size=1, drain_timeout=0.2)
    closed = asyncio.Event()

    async def hold() -> None:
        async with db.session() as session:
            await session.execute(PID)
            await closed.wait()

    async def wait() -> None:
        async with db.session() as session:
            await session.execute(PID)

    await db.open()
    holder = asyncio.create_task(hold())
    await until_true(lambda: db.stats().in_use == 1)
    waiter = asyncio.create_task(wait())
    await until_true(lambda: db.stats().waiting == 1)
    await db.close()
    closed.set()
    await holder
    with pytest.raises(DatabaseClosed):
        await waiter
    assert (db.stats().size, db.stats().waiting) == (0, 0)
    await until(fresh_database, NOBODY_ELSE)
    async with db:
        assert await pid_of(db)


async def test_dispose_that_is_cancelled_leaves_nothing_open(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, pool_size=3) as db:
        async with db.connect(), db.connect(), db.connect():
            pass
        disposing = asyncio.create_task(db.engine.dispose())
        await asyncio.sleep(0)
        disposing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await disposing
        assert db.stats().size == 0
        await until(fresh_database, NOBODY_ELSE)
        assert await pid_of(db)


# Forks ------------------------------------------------------------------------------------------------------


def _by_os_fork(work: Callable[[], None]) -> None:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 10
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child did not end")
        time.sleep(0.01)


def _by_multiprocessing(work: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(10)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child did not end")


@pytest.mark.abandons_connections
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # since Python 3.12
@pytest.mark.parametrize("fork", [_by_os_fork, _by_multiprocessing], ids=["os.fork", "multiprocessing"])
@pytest.mark.parametrize("held", [False, True], ids=["idle", "in use"])
def test_a_forked_child_neither_uses_severs_nor_closes_its_parents_connections(
    postgres: EmbeddedPostgres, driver: str, fork: Callable[[Callable[[], None]], None], held: bool
) -> None:
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, drain_timeout=0.3, close_timeout=0.5)
    reader, writer = os.pipe()

    async def use_and_close() -> int:
        async with db:
            return await pid_of(db)

    def child() -> None:
        try:
            told = str(asyncio.run(use_and_close()))
            gc.collect()
        except BaseException as error:
            told = repr(error)
        os.write(writer, told.encode())

    with asyncio.Runner() as runner:

        async def before() -> tuple[Any, int]:
            if not held:
                return None, await pid_of(db)
            session = db.session_factory()
            return session, int(await session.scalar(PID) or 0)

        async def after(session: Any) -> int:
            async with asyncio.timeout(4):
                if session is None:
                    return await pid_of(db)
                pid = int(await session.scalar(PID) or 0)
                await session.commit()
                await session.close()
                return pid

        session, pid = runner.run(before())
        fork(child)
        assert select.select([reader], [], [], 0)[0], "the child has told nothing"
        told = os.read(reader, 1000).decode()
        assert told.isdigit(), told
        assert int(told) != pid
        assert _gone_from(postgres, int(told)), "what the child has opened it has closed"
        assert (str(pid),) in postgres.sql("SELECT pid FROM pg_stat_activity")
        assert runner.run(after(session)) == pid
        assert db.stats().in_use == 0
        runner.run(db.close())
    assert _gone_from(postgres, pid)
    os.close(reader)
    os.close(writer)


@pytest.mark.abandons_connections
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # since Python 3.12
def test_what_a_forked_child_collects_of_its_parents_is_left_alone(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    db: Database[Any] = Database(postgres.url(driver), pool_size=1, max_overflow=0)
    held: list[AsyncConnection] = []

    async def hold() -> int:
        held.append(await db.engine.connect())
        return int(await held[0].scalar(PID) or 0)

    async def use_and_close() -> int:
        pid = int(await held[0].scalar(PID) or 0)
        await held.pop().close()
        await db.close()
        return pid

    def child() -> None:
        held.clear()
        gc.collect()

    with asyncio.Runner() as runner:
        pid = runner.run(hold())
        _by_os_fork(child)
        assert runner.run(use_and_close()) == pid


def test_a_pool_that_nobody_uses_any_more_is_collected(postgres: EmbeddedPostgres, driver: str) -> None:
    """What a fork must begin anew is remembered, and kept alive by nobody."""
    db: Database[Any] = Database(postgres.url(driver))
    pool = weakref.ref(db.engine.sync_engine.pool)
    del db
    gc.collect()
    assert pool() is None


# Kinds of pool ----------------------------------------------------------------------------------------------


async def test_null_pool_keeps_nothing_and_is_bounded_all_the_same(
    fresh_database: FreshDatabase, driver: str
) -> None:
    async with make(fresh_database, driver, poolclass=NullPool, pool_size=2, pool_timeout=0.1) as db:
        async with db.connect() as one, db.connect():
            pid = int(await one.scalar(PID) or 0)
            with pytest.raises(PoolExhausted):
                await pid_of(db)
        assert db.stats() == Stats(pool_size=2, max_overflow=0, in_use=0, idle=0, waiting=0)
        await gone(fresh_database, pid)


async def test_overflow_is_closed_and_the_pool_size_kept(fresh_database: FreshDatabase, driver: str) -> None:
    async with make(fresh_database, driver, pool_size=1, max_overflow=2) as db:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(db.connect())
            assert db.stats() == Stats(pool_size=1, max_overflow=2, in_use=3, idle=0, waiting=0)
        assert db.stats() == Stats(pool_size=1, max_overflow=2, in_use=0, idle=1, waiting=0)
        await until(
            fresh_database,
            "SELECT 1 WHERE 1 = (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid())",
        )


# An engine that is there already ----------------------------------------------------------------------------


def an_engine(judged: FreshDatabase, driver: str, **options: Any) -> AsyncEngine:
    return create_async_engine(judged.url(driver), **options)


def _hear(heard: list[str], name: str, *_arguments: object) -> None:
    heard.append(name)


async def test_existing_engine_keeps_its_size_and_its_listeners(
    fresh_database: FreshDatabase, driver: str
) -> None:
    engine = an_engine(fresh_database, driver, pool_size=3, max_overflow=4, pool_timeout=1.5, pool_recycle=77)
    heard: list[str] = []
    for name in ("connect", "checkout", "checkin"):
        event.listen(engine.sync_engine, name, partial(_hear, heard, name))
    event.listen(engine.sync_engine.pool, "close", lambda *_args: heard.append("close"))
    async with Database(engine) as db:
        assert db.engine is engine
        assert isinstance(engine.sync_engine.pool, Pool)
        assert (db.settings.pool_size, db.settings.max_overflow) == (3, 4)
        assert (db.settings.pool_timeout, db.settings.pool_recycle) == (1.5, 77)
        heard.clear()
        await pid_of(db)
        assert heard == ["checkout", "checkin"]
    assert heard[-1] == "close"


async def test_existing_engine_is_taken_after_use_but_not_while_in_use(
    fresh_database: FreshDatabase, driver: str
) -> None:
    engine = an_engine(fresh_database, driver)
    async with engine.connect() as connection:
        pid = int(await connection.scalar(PID) or 0)
        with pytest.raises(ConfigError, match="1 of its connections are checked out"):
            Database(engine)
    async with Database(engine) as db:
        ours = await pid_of(db)
    for each in (pid, ours):
        await gone(fresh_database, each)


async def test_engine_belongs_to_one_database(fresh_database: FreshDatabase, driver: str) -> None:
    engine = an_engine(fresh_database, driver)
    async with Database(engine):
        with pytest.raises(ConfigError, match="already belongs"):
            Database(engine)


async def test_engine_that_is_not_adopted_keeps_its_pool(fresh_database: FreshDatabase, driver: str) -> None:
    engine = an_engine(fresh_database, driver, pool_size=2)
    before = engine.sync_engine.pool
    db = Database(engine, adopt=False)
    assert engine.sync_engine.pool is before
    async with db.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
        assert db.stats().in_use == 1
        assert not db.stats().adopted
    async with db.transaction() as session:
        await session.execute(text("CREATE TABLE kept (id int)"))
    assert await fresh_database.fetchval("SELECT to_regclass('kept')::text") == "kept"
    await engine.dispose()


async def test_existing_engine_whose_pool_lends_one_connection_to_all_is_refused(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Two units would share one transaction: an error's row would be stored with somebody else's commit."""
    engine = an_engine(fresh_database, driver, poolclass=StaticPool)
    with pytest.raises(ConfigError, match="StaticPool"):
        Database(engine)
    await engine.dispose()


async def test_existing_engine_with_another_pool_class(fresh_database: FreshDatabase, driver: str) -> None:
    engine = an_engine(fresh_database, driver, poolclass=NullPool)
    db = Database(engine)
    assert await pid_of(db) > 0
    assert not isinstance(engine.sync_engine.pool, QueuePool)
    await db.close()
    await engine.dispose()


async def test_a_checkin_listener_that_raises_costs_no_slot(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """SQLAlchemy runs the listeners before the record reaches the pool."""
    async with Database(fresh_database.url(driver), pool_size=1, max_overflow=0, pool_timeout=2.0) as db:
        raised = 0

        def fail(_connection: object, _record: object) -> None:
            nonlocal raised
            raised += 1
            if raised <= 3:
                raise RuntimeError("a listener of the user's")

        event.listen(db.engine.sync_engine, "checkin", fail)
        for _ in range(5):
            async with db.session() as session:
                await session.execute(text("SELECT 1"))
            assert db.stats().in_use == 0
        assert raised == 5


# A server that falls silent ---------------------------------------------------------------------------------


async def test_the_first_connect_to_a_server_that_falls_silent_after_the_login_ends_in_time(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """The driver has connected; what SQLAlchemy asks of its first connection is answered by nobody."""

    def lose_all_but_the_password(kind: str, _payload: bytes) -> Verdict:
        return Verdict.FORWARD if kind == "p" else Verdict.LOSE

    async with FaultProxy(fresh_database.server.port) as proxy:
        proxy.on_client_message = lose_all_but_the_password
        url = proxy.through(fresh_database.url(driver)) + "?sslmode=disable"
        patience: dict[str, Any] = dict.fromkeys(
            ("connect_timeout", "pool_timeout", "close_timeout", "drain_timeout"), 0.4
        )
        db: Database[Any] = Database(url, **patience)
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(db.open()), asyncio.create_task(pid_of(db))]
        done, pending = await asyncio.wait(tasks, timeout=5)
        proxy.cut()
        if pending:
            await asyncio.wait(pending, timeout=5)
        assert not pending, f"{len(done)} of 2 ended in time"
        assert proxy.verdicts[Verdict.LOSE] >= 1
        failures = [classify(error) for task in tasks if (error := task.exception()) is not None]
        assert len(failures) == 2
        assert [failure and failure.kind for failure in failures] == [Kind.UNAVAILABLE] * 2
        assert db.stats().in_use == 0
        proxy.on_client_message = lambda _kind, _payload: Verdict.FORWARD
        await db.open(wait=5)
        assert await pid_of(db) > 0, "the server speaks again"
        await db.close()


# A server that has no room ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[EmbeddedPostgres]:
    """A server that takes four connections."""
    settings: dict[str, str | int] = {
        "max_connections": 4,
        "superuser_reserved_connections": 0,
        "reserved_connections": 0,
        "max_wal_senders": 0,
        "autovacuum": "off",
    }
    with EmbeddedPostgres(settings=settings) as server:
        yield server


async def test_thirty_callers_share_what_room_the_server_has_and_none_fails(
    driver: str, narrow: EmbeddedPostgres
) -> None:
    """The pool may have ten connections, the server has room for four: SQLAlchemy fails whoever asks for a fifth."""
    db: Database[Any] = Database(narrow.url(driver), pool_size=10, max_overflow=0, pool_timeout=20)
    most = 0

    async def work() -> int:
        nonlocal most
        async with db.connect() as connection:
            most = max(most, db.stats().in_use)
            return int(await connection.scalar(text("SELECT 42 FROM pg_sleep(0.02)")) or 0)

    assert await asyncio.gather(*(work() for _ in range(30))) == [42] * 30
    assert most >= 4, "there was no room for more"
    assert db.stats().in_use == db.stats().waiting == 0
    await db.close()


async def test_who_finds_no_room_waits_for_it_within_pool_timeout(
    driver: str, narrow: EmbeddedPostgres
) -> None:
    """With one of its own out; whoever has the others gives them back, or does not."""
    others = [await raw_connect(narrow.url(None)) for _ in range(3)]
    db: Database[Any] = Database(narrow.url(driver), pool_size=2, max_overflow=0, pool_timeout=3)
    async with db.connect():
        waiting = asyncio.create_task(pid_of(db))
        await until_true(lambda: db.stats().waiting == 1)
        await others.pop().close()
        assert await waiting > 0
    await db.engine.dispose()
    others += [await raw_connect(narrow.url(None)) for _ in range(4 - len(others))]
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises((PoolExhausted, DatabaseUnavailable)) as caught:
            await pid_of(db)
        if driver == "psycopg":  # libpq keeps the SQLSTATE of a refused connection to itself
            assert time.monotonic() - begun < 2
            continue
        assert 2.9 < time.monotonic() - begun < 8
        assert isinstance(caught.value, PoolExhausted)
        told = str(caught.value)
        assert (
            "within 3.00 s (in_use 0 of 2, waiting 1); the server has no room for another connection" in told
        )
        assert "53300" in told
    waiting = asyncio.create_task(pid_of(db))
    await asyncio.sleep(0)
    for other in others:
        await other.close()
    if driver == "asyncpg":
        assert await waiting > 0
    else:
        await asyncio.wait([waiting])
        await db.open(wait=5)
    await db.close()
