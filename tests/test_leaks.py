"""What does not come back is told once, with its place and its kind; what nobody can return any more is reclaimed."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.util import await_only, greenlet_spawn

from stanch import Database, PoolExhausted
from stanch.events import (
    ConnectionLeaked,
    Event,
    HeldIdle,
    LeakReturned,
    RepeatedStatement,
    SessionDropped,
    SlowStatement,
)
from tests.support import cleaned

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

ONE = text("SELECT 1")
AFTER = 0.3
"""``leak_after`` here."""
BOUND = AFTER + 2
"""Seconds by which a leak must have been told."""


class Told:
    """The events of one database, and a way to wait for them."""

    def __init__(self, db: Database[Any]) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()
        db.observe(self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    def of(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    async def first(self, *kinds: type[Event], within: float = BOUND) -> Any:
        async with asyncio.timeout(within):
            while not self.of(*kinds):
                self._news.clear()
                await self._news.wait()
        return self.of(*kinds)[0]


def make(judged: FreshDatabase, driver: str, **settings: Any) -> tuple[Database[Any], Told]:
    chosen: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "leak_after": AFTER, **settings}
    db = Database(judged.url(driver), **chosen)
    return db, Told(db)


def is_watched(db: Database[Any]) -> bool:
    """Whether a timer looks at what is out."""
    pool: Any = db.engine.sync_engine.pool
    return pool._sweep is not None and pool._sweep._timer is not None


async def until_true(condition: Callable[[], bool], *, timeout: float = BOUND) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0.005)


# Out for too long -------------------------------------------------------------------------------------------


async def test_a_holder_that_waits_for_something_else_is_told_while_it_waits(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver)
    async with db:
        async with db.session() as session:
            await session.execute(ONE)
            leak = await told.first(ConnectionLeaked)
            assert db.stats().in_use == 1
        returned = await told.first(LeakReturned)
    here = r"test_leaks\.py:\d+ in test_a_holder_that_waits\w+\(\)"
    assert leak.kind == "idle in transaction"
    assert re.fullmatch(here, leak.place)
    assert re.fullmatch(r"test_leaks\.py:\d+ in .*", leak.now_at)
    assert AFTER <= leak.held < BOUND
    assert 0 < leak.sql_time < leak.held
    assert (returned.holder, returned.place) == (leak.holder, leak.place)
    assert returned.held >= leak.held
    assert len(told.of(ConnectionLeaked)) == len(told.of(LeakReturned)) == 1


async def test_a_holder_that_runs_sql_is_told_as_such(fresh_database: FreshDatabase, driver: str) -> None:
    db, told = make(fresh_database, driver)
    async with db, db.session() as session:
        running = asyncio.create_task(session.execute(text("SELECT pg_sleep(30)")))
        leak = await told.first(ConnectionLeaked)
        running.cancel()
        await asyncio.wait([running])
    assert leak.kind == "running SQL"
    assert leak.sql_time >= 0.5 * leak.held


async def test_a_connection_outside_any_transaction_is_told_as_idle(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver)
    async with db, db.connect():
        leak = await told.first(ConnectionLeaked)
    assert leak.kind == "idle"


async def test_a_connection_whose_task_is_gone_is_told_but_left_to_whoever_has_it(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Somebody can reach it, and may yet use it."""
    db, told = make(fresh_database, driver)
    async with db:

        async def take() -> AsyncSession:
            session: AsyncSession = db.session_factory()
            await session.execute(ONE)
            return session

        session = await asyncio.create_task(take())
        leak = await told.first(ConnectionLeaked)
        assert db.stats().in_use == 1
        assert await session.scalar(ONE) == 1
        await session.close()
    assert leak.kind == leak.now_at == "its task is gone"
    assert not told.of(SessionDropped)


async def test_a_leak_is_told_once_and_its_return_even_after_it_was_measured(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver)
    measuring = db.measure()
    async with db:
        async with db.session() as session:
            await session.execute(ONE)
            await told.first(ConnectionLeaked)
            (leak,) = measuring.snapshot().leaks
            assert not leak.returned
            await asyncio.sleep(2 * AFTER)  # time for several looks
        (leak,) = measuring.snapshot().leaks
    assert leak.returned
    assert leak.kind == "idle in transaction"
    assert leak.held >= 2 * AFTER
    assert len(told.of(ConnectionLeaked)) == 1


async def test_what_comes_back_in_time_is_no_leak(fresh_database: FreshDatabase, driver: str) -> None:
    db, told = make(fresh_database, driver)
    async with db:
        deadline = time.monotonic() + 3 * AFTER
        while time.monotonic() < deadline:
            async with db.session() as session:
                await session.execute(ONE)
    assert not told.of(ConnectionLeaked, LeakReturned)


async def test_nobody_watches_while_nothing_is_out_or_where_nobody_asked(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, _told = make(fresh_database, driver)
    async with db:
        async with db.connect():
            assert is_watched(db)
        await until_true(lambda: not is_watched(db))
        async with db.connect():
            assert is_watched(db)
    unwatched, told = make(fresh_database, driver, leak_after=None)
    async with unwatched, unwatched.connect():
        await asyncio.sleep(2 * AFTER)  # what never comes cannot be waited for
        assert not told.of(ConnectionLeaked)


async def test_one_timer_looks_at_all_of_them(fresh_database: FreshDatabase, driver: str) -> None:
    db, told = make(fresh_database, driver, pool_size=20)
    async with db:

        async def hold() -> None:
            async with db.session() as session:
                await session.execute(ONE)
                await told.first(ConnectionLeaked)

        before = len(asyncio.all_tasks())
        holding = [asyncio.create_task(hold()) for _ in range(20)]
        await until_true(lambda: db.stats().in_use == 20)
        assert is_watched(db)
        await asyncio.gather(*holding)
        assert len(asyncio.all_tasks()) == before
        await until_true(lambda: len(told.of(LeakReturned)) == len(told.of(ConnectionLeaked)))


async def test_a_blocked_loop_is_not_blamed_on_those_who_had_no_turn(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver)
    async with db:
        async with db.session() as session:
            await session.execute(ONE)
            await asyncio.sleep(AFTER / 8)  # a look is due while the loop is blocked
            time.sleep(2 * AFTER)  # noqa: ASYNC251  # that is the point
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await until_true(lambda: not is_watched(db))
    assert not told.of(ConnectionLeaked)


async def test_a_loop_that_is_blocked_again_and_again_hides_no_leak(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver)
    async with db, db.session() as session:
        await session.execute(ONE)
        deadline = time.monotonic() + 4 * BOUND
        while not told.of(ConnectionLeaked):
            assert time.monotonic() < deadline
            time.sleep(AFTER)  # noqa: ASYNC251  # that is the point
            await asyncio.sleep(0)


# Lost for certain -------------------------------------------------------------------------------------------


async def drop(db: Database[Any]) -> None:
    """Leave a session unclosed, in a circle with its transaction, as a forgotten ``await session.close()`` does."""
    session = db.session_factory()
    await session.execute(ONE)


@pytest.mark.abandons_connections
async def test_a_session_that_was_dropped_unclosed_is_reclaimed_and_named(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Long before ``leak_after``, and although the garbage collector would not have come by itself."""
    db, told = make(fresh_database, driver, pool_size=1, leak_after=60.0)
    measuring = db.measure()
    gc.disable()
    try:
        async with db:
            await drop(db)
            dropped = await told.first(SessionDropped, within=4)
            assert db.stats().in_use == 0
            async with db.session() as session:
                assert await session.scalar(ONE) == 1
    finally:
        gc.enable()
    assert re.fullmatch(r"test_leaks\.py:\d+ in drop\(\)", dropped.place)
    assert dropped.holder == "a session of your own making"
    assert dropped.held < 10
    (leak,) = measuring.snapshot().leaks
    assert (leak.kind, leak.returned, leak.place) == ("dropped unclosed", True, dropped.place)
    assert not told.of(ConnectionLeaked, LeakReturned)


@pytest.mark.abandons_connections
async def test_a_connection_that_was_dropped_by_a_task_that_is_gone_is_reclaimed_and_named(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver, pool_size=1, leak_after=60.0)

    async def forget() -> None:
        connection = await db.engine.connect()
        await connection.execute(ONE)

    gc.disable()
    try:
        async with db:
            await asyncio.create_task(forget(), name="the nightly report")
            dropped = await told.first(SessionDropped, within=4)
            assert db.stats().in_use == 0
    finally:
        gc.enable()
    assert dropped.holder == "the nightly report"
    assert re.fullmatch(r"test_leaks\.py:\d+ in .*forget\(\)", dropped.place)


@pytest.mark.abandons_connections
async def test_a_dropped_session_was_a_leak_until_it_was_reclaimed(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """One that is kept for long, and then dropped: told once, and its end too."""
    db, told = make(fresh_database, driver)
    measuring = db.measure()
    async with db:
        session = db.session_factory()
        await session.execute(ONE)
        await told.first(ConnectionLeaked)
        del session
        await told.first(SessionDropped, within=4)
    (leak,) = measuring.snapshot().leaks
    assert (leak.returned, leak.kind) == (True, "dropped unclosed"), "it did not come back, it was fetched"
    assert not told.of(LeakReturned)


async def look_often(db: Database[Any], told: Told, *, times: int = 5) -> None:
    """Until the sweep has looked *times* times at what is out."""
    pool: Any = db.engine.sync_engine.pool
    sweep = pool._sweep
    for _ in range(times):
        timer = sweep._timer
        await until_true(lambda timer=timer: sweep._timer is not timer)  # type: ignore[misc]  # bound at once
    assert not told.of(SessionDropped)


async def test_a_session_handed_to_another_task_is_its_to_use(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver, leak_after=0.2)
    sessions: asyncio.Queue[AsyncSession] = asyncio.Queue()

    async def take() -> None:
        session = db.session_factory()
        await session.execute(ONE)
        sessions.put_nowait(session)

    async with db:
        await asyncio.create_task(take())
        await look_often(db, told)
        session = sessions.get_nowait()
        assert await session.scalar(ONE) == 1
        await session.close()


async def test_a_statement_in_a_task_of_its_own_leaves_its_session_to_the_other(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """``asyncio.wait_for`` before Python 3.12."""
    db, told = make(fresh_database, driver, leak_after=0.2)
    async with db, db.session() as session:
        await asyncio.create_task(session.execute(ONE))
        await look_often(db, told)
        assert [held.state for held in db.holdings()] == ["in use, no SQL running"]
        assert await session.scalar(ONE) == 1
    assert {leak.kind for leak in told.of(ConnectionLeaked)} == {"idle in transaction"}


async def test_a_stream_that_is_read_after_its_session_was_dropped_is_not_taken_away(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver, leak_after=0.2)
    numbers = text("SELECT generate_series(1, 3000)")

    async def rows() -> Any:
        session = db.session_factory()
        return (await session.stream(numbers.execution_options(yield_per=10))).scalars(), session.sync_session

    async with db:
        stream, sync_session = await asyncio.create_task(rows())
        iterator = aiter(stream)
        assert await anext(iterator) == 1
        await look_often(db, told)
        assert [number async for number in iterator] == [*range(2, 3001)]
        await greenlet_spawn(sync_session.close)


async def test_what_is_looked_for_in_vain_is_looked_for_once(
    fresh_database: FreshDatabase, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collecting all garbage stops everybody: not more often than there is somebody new to suspect."""
    db, told = make(fresh_database, driver, leak_after=0.2)
    collections = 0
    collect = gc.collect

    def counted() -> int:
        nonlocal collections
        collections += 1
        return collect()

    monkeypatch.setattr("stanch.tracking.gc.collect", counted)
    monkeypatch.setattr("stanch.tracking._COLLECTING_SHARE", 1e9)  # as often as it likes
    async with db:
        session = db.session_factory()
        sync_session = session.sync_session
        await session.execute(ONE)
        del session
        await look_often(db, told, times=8)
        await greenlet_spawn(sync_session.close)
    assert collections == 1


# Held without use -------------------------------------------------------------------------------------------


async def test_a_connection_held_without_use_is_told_once_for_its_line(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver, leak_after=None, held_idle_after=0.5)
    async with db:
        for _ in range(2):
            async with db.session() as session:
                await session.execute(ONE)
                await asyncio.sleep(0.51)  # the holder waits for something else
        async with db.session() as session:
            await session.execute(text("SELECT pg_sleep(0.6)"))
    (idle,) = told.of(HeldIdle)
    assert re.fullmatch(r"test_leaks\.py:\d+ in test_a_connection_held\w+\(\)", idle.place)
    assert idle.held - idle.sql_time >= 0.5
    assert "release(session)" in str(idle)


async def test_opening_a_connection_is_not_held_against_whoever_needed_it(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """The server was slow, and no line of the user's waited for anything else."""
    db, told = make(fresh_database, driver, leak_after=None, held_idle_after=0.3)
    measuring = db.measure()

    def dawdle(*_connection: object) -> None:
        await_only(asyncio.sleep(0.4))

    event.listen(db.engine.sync_engine, "connect", dawdle)
    async with db, db.session() as session:
        await session.execute(ONE)
        await session.commit()
    assert told.of(HeldIdle) == []
    numbers = measuring.snapshot()
    assert numbers.creates.total >= 0.4
    assert numbers.uses.total < 0.4


# Statements -------------------------------------------------------------------------------------------------


async def test_a_slow_statement_is_told_by_its_shape_and_never_its_values(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver, slow_statement=0.1)
    secret = "5ecre7"
    async with db, db.session() as session:
        await session.execute(text(f"SELECT pg_sleep(0.1), '{secret}', :value"), {"value": secret})
        await session.execute(ONE)
    (slow,) = told.of(SlowStatement)
    assert slow.seconds >= 0.1
    assert slow.shape.startswith("SELECT pg_sleep(?), ?, ")
    assert re.fullmatch(r"test_leaks\.py:\d+ in test_a_slow\w+\(\)", slow.place)
    assert secret not in str(slow) + repr(slow)


async def test_a_statement_repeated_in_one_unit_is_told_once_with_its_line(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, told = make(fresh_database, driver, repeated_statement=5)
    measuring = db.measure()
    statement = text("SELECT CAST(:value AS int)")

    async def one_by_one(session: AsyncSession, times: int) -> None:
        for value in range(times):
            await session.execute(statement, {"value": value})

    async with db:
        for times in (4, 5, 12):
            async with db.session() as session:
                await one_by_one(session, times)
        async with db.reader() as session:  # its statements stand alone, and are one unit all the same
            await one_by_one(session, 6)
        async with db.session() as session:  # a transaction for each
            for value in range(8):
                await session.execute(statement, {"value": value})
                await session.commit()
    (repeated,) = told.of(RepeatedStatement)
    assert repeated.times == 5
    assert re.fullmatch(r"test_leaks\.py:\d+ in .*one_by_one\(\)", repeated.place)
    assert sum(route.repeated for route in measuring.snapshot().routes) == 3


async def test_exhaustion_by_leaks_can_be_read_from_the_error(
    fresh_database: FreshDatabase, driver: str
) -> None:
    db, _told = make(fresh_database, driver, pool_size=1, pool_timeout=0.2)
    async with db:

        async def take() -> AsyncSession:
            session: AsyncSession = db.session_factory()
            await session.execute(ONE)
            return session

        session = await asyncio.create_task(take())
        with pytest.raises(
            PoolExhausted, match=r"in .*take\(\), .*its task is gone\n  1\. .* is gone\. Close"
        ):
            async with db.connect():
                pass
        await session.close()
