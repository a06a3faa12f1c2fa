"""Several things at once, each in a session of its own: bounded by the pool, cancelled together, nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import time
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from stanch import ConfigError, Database, InsideTransaction, WriteRefused
from stanch.sessions import guard_of
from tests.support import cleaned
from tests.support.judge import assert_nothing_left, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

POOL = 3


@pytest.fixture
async def judged(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@pytest.fixture
async def db(judged: FreshDatabase, driver: str) -> AsyncIterator[Database[AsyncSession]]:
    """A pool that is warm: asyncpg grumbles about a future of its own when its connect is cancelled."""
    db = Database(judged.url(driver), pool_size=POOL, max_overflow=0, pool_timeout=1.0, drain_timeout=5)
    try:
        async with contextlib.AsyncExitStack() as held:
            for _ in range(POOL):
                await held.enter_async_context(db.connect())
        yield db
        await assert_nothing_left(judged, db)
    finally:
        await db.close()


def reading(value: int) -> Callable[[AsyncSession], Awaitable[int]]:
    async def read(session: AsyncSession) -> int:
        return int(await session.scalar(text("SELECT CAST(:value AS int)"), {"value": value}) or 0)

    return read


def writing(value: int) -> Callable[[AsyncSession], Awaitable[int]]:
    async def write(session: AsyncSession) -> int:
        await session.execute(text("INSERT INTO rows VALUES (:value)"), {"value": value})
        return value

    return write


async def asleep(session: AsyncSession) -> None:
    await session.execute(text("SELECT pg_sleep(20)"))


async def stored(judged: FreshDatabase) -> list[int]:
    return [row["id"] for row in await judged.fetch("SELECT id FROM rows ORDER BY id")]


async def test_answers_come_in_the_order_of_the_functions(db: Database[AsyncSession]) -> None:
    """The first is the last to end."""
    others_ended = asyncio.Event()

    async def slow(session: AsyncSession) -> str:
        async with asyncio.timeout(5):
            await others_ended.wait()
        return str(await session.scalar(text("SELECT 'slow'")))

    async def quick(session: AsyncSession) -> int:
        value = await reading(7)(session)
        others_ended.set()
        return value

    assert await db.gather(slow, quick) == ("slow", 7)
    assert await db.gather() == ()
    assert await db.gather(reading(1)) == (1,)
    assert await db.gather(*map(reading, range(10))) == tuple(range(10))


async def test_they_run_at_the_same_time_each_on_a_connection_of_its_own(db: Database[AsyncSession]) -> None:
    together = asyncio.Barrier(POOL)

    async def meet(session: AsyncSession) -> int:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        async with asyncio.timeout(5):
            await together.wait()
        return int(pid or 0)

    pids = await db.gather(meet, meet, meet)
    assert len(set(pids)) == POOL


async def test_a_complaint_about_a_part_names_it_and_who_gathered(db: Database[AsyncSession]) -> None:
    async def whose(session: AsyncSession) -> str:
        return guard_of(session).holder

    holders = await db.gather(whose, whose)
    assert set(holders) == {holders[0]}
    assert re.fullmatch(r"\S+whose\(\) from test_gather\.py:\d+ in test_a_complaint\w+\(\)", holders[0])


async def test_more_functions_than_connections_take_turns_and_do_not_wait_in_the_pools_queue(
    db: Database[AsyncSession],
) -> None:
    """Together they take longer than pool_timeout: whoever waited in the pool's queue would be refused."""
    waiting: list[int] = []
    at_work = 0
    most = 0

    async def work(session: AsyncSession) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await session.execute(text("SELECT pg_sleep(0.2)"))
        waiting.append(db.stats().waiting)
        at_work -= 1

    await db.gather(*[work] * (POOL * 8))
    assert most == POOL
    assert set(waiting) == {0}


async def test_two_gathers_at_once_share_the_pool_without_a_deadlock(db: Database[AsyncSession]) -> None:
    async def all_of(count: int) -> tuple[int, ...]:
        return await db.gather(*map(reading, range(count)))

    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(all_of(5) for _ in range(4)))
    assert answers == [(0, 1, 2, 3, 4)] * 4


async def test_they_only_read_unless_they_are_transactions(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    with pytest.raises(WriteRefused, match=r"writing\(?.*write\(\) from test_gather\.py:\d+"):
        await db.gather(writing(1), reading(2))
    assert await stored(judged) == []
    assert await db.gather(writing(1), writing(2), transaction=True) == (1, 2)
    assert await stored(judged) == [1, 2]


async def test_each_transaction_stands_alone(db: Database[AsyncSession], judged: FreshDatabase) -> None:
    """What has committed stays when another part fails."""
    await judged.execute("INSERT INTO rows VALUES (2)")

    async def late(session: AsyncSession) -> int:
        await until(judged, "SELECT FROM rows WHERE id = 1")
        return await writing(2)(session)

    with pytest.raises(IntegrityError):
        await db.gather(writing(1), late, transaction=True)
    assert await stored(judged) == [1, 2]


async def test_the_first_error_is_raised_itself_and_cancels_the_rest(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    cancelled: list[str] = []

    async def wait(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO rows VALUES (1)"))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("wait")
            raise

    async def fail(_session: AsyncSession) -> None:
        await until(judged, "SELECT FROM pg_stat_activity WHERE query ~ '^INSERT' AND state ~ '^idle in'")
        raise LookupError("mine")

    async with asyncio.timeout(10):
        with pytest.raises(LookupError, match="mine") as raised:
            await db.gather(wait, fail, asleep, transaction=True)
    assert cancelled == ["wait"]
    assert raised.value.__context__ is None
    assert db.stats().in_use == 0
    assert await stored(judged) == []


async def test_an_error_raised_while_others_are_cancelled_is_a_note_of_the_first(
    db: Database[AsyncSession],
) -> None:
    inside = asyncio.Event()

    async def fail_first(_session: AsyncSession) -> None:
        await inside.wait()
        raise LookupError("first")

    async def fail_on_the_way_out(_session: AsyncSession) -> None:
        inside.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("second")

    with pytest.raises(LookupError, match="first") as raised:
        await db.gather(fail_on_the_way_out, fail_first)
    assert raised.value.__notes__ == ["another part of the gather() ended in KeyError"]


async def test_a_cancelled_gather_takes_all_with_it(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    task = asyncio.create_task(db.gather(asleep, asleep, asleep, asleep))
    await until(judged, f"SELECT FROM pg_stat_activity WHERE query ~ 'pg_sleep.20' HAVING count(*) >= {POOL}")
    task.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert db.stats().in_use == 0
    assert await db.gather(reading(1), reading(2)) == (1, 2)


async def test_in_a_cancelled_scope_of_anyios_it_waits_for_the_parts_without_spinning(
    db: Database[AsyncSession],
) -> None:
    tidied_up: list[float] = []

    async def tidy_up_slowly(session: AsyncSession) -> None:
        await reading(1)(session)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)  # what is measured: the time that a frozen server might take
            tidied_up.append(time.process_time())

    began = time.process_time()
    with anyio.move_on_after(0.1) as scope:
        await db.gather(tidy_up_slowly, tidy_up_slowly)
    assert scope.cancelled_caught
    assert len(tidied_up) == 2
    assert time.process_time() - began < 0.15
    assert db.stats().in_use == 0


async def test_an_error_leaves_no_cycle_behind(db: Database[AsyncSession]) -> None:
    class Mine(Exception):  # a plain one that can be referred to weakly
        pass

    async def fail(_session: AsyncSession) -> None:
        raise Mine

    async def gone() -> weakref.ref[Mine]:
        try:
            await db.gather(fail, reading(1))
        except Mine as error:
            return weakref.ref(error)
        raise AssertionError("unreachable")

    gc.disable()
    try:
        assert (await gone())() is None
    finally:
        gc.enable()


async def test_a_task_that_holds_a_connection_is_refused(db: Database[AsyncSession]) -> None:
    async with db.transaction() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(InsideTransaction, match=r"gather\(\) was called by a task that holds"):
            await db.gather(reading(1), reading(2))


async def test_a_part_that_gathers_again_is_refused_before_it_can_wait_for_itself(
    db: Database[AsyncSession],
) -> None:
    async def again(session: AsyncSession) -> object:
        await reading(1)(session)
        return await db.gather(reading(1), reading(2))

    async with asyncio.timeout(10):
        with pytest.raises(InsideTransaction):
            await db.gather(*[again] * POOL, transaction=True)
        # Readers hold nothing between two reads, so they have nothing to wait with.
        assert await db.gather(*[again] * POOL) == ((1, 2),) * POOL


async def coroutine(_session: object) -> int:
    return 1


def sync(_session: object) -> int:
    return 1


@pytest.mark.parametrize("make", [lambda: coroutine(None), lambda: 5, lambda: sync])
async def test_what_is_no_async_function_is_refused(
    db: Database[AsyncSession], make: Callable[[], Any]
) -> None:
    with pytest.raises(ConfigError, match="expected an async function"):
        await db.gather(reading(1), make())


async def test_on_an_engine_with_a_pool_of_its_own_its_bound_holds(
    judged: FreshDatabase, driver: str
) -> None:
    engine = create_async_engine(judged.url(driver), pool_size=1, max_overflow=1, pool_timeout=1.0)
    beside = Database(engine, adopt=False)
    both = asyncio.Barrier(2)

    async def meet(session: AsyncSession) -> None:
        await reading(1)(session)
        async with asyncio.timeout(5):
            await both.wait()

    await beside.gather(meet, meet)
    assert await beside.gather(*map(reading, range(6))) == (0, 1, 2, 3, 4, 5)
    await engine.dispose()


async def test_in_memory_sqlite_gathers_one_by_one() -> None:
    """Its only connection is the bound."""
    async with Database("sqlite+aiosqlite:///:memory:") as db:

        async def read(session: AsyncSession) -> int:
            return int(await session.scalar(text("SELECT 1")) or 0)

        assert await db.gather(read, read, read) == (1, 1, 1)
