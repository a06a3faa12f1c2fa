"""A cancelled statement ends on the server, and its connection goes on: on asyncio and anyio, in every place."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from stanch import Database
from stanch.sqlstate import sqlstate_of
from tests.support import cleaned
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, statement_of
from tests.support.suspensions import cancelled_at, suspensions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

PID = text("SELECT pg_backend_pid()")
SLOW = text("SELECT pg_sleep(20)")
WRITE = text("INSERT INTO rows VALUES (:id)")
BOUND = 4.0
"""Seconds within which whoever cancels is told, even by a server that does not answer."""
ASLEEP = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
ACTIVE = f"SELECT pid, wait_event, query FROM {OTHERS} AND state = 'active'"


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@asynccontextmanager
async def one_connection(judged: FreshDatabase, driver: str) -> AsyncGenerator[Database[Any]]:
    async with Database(judged.url(driver), pool_size=1, max_overflow=0) as db:
        yield db


async def pid_of(db: Database[Any]) -> int:
    async with db.connect() as connection:
        return int(await connection.scalar(PID) or 0)


# How it is cancelled ----------------------------------------------------------------------------------------

Cancelled = Callable[["Coroutine[Any, Any, object]", "Coroutine[Any, Any, None]"], Awaitable[None]]
"""Runs work, and cancels it when it is ready for that."""


async def by_task(ready: Coroutine[Any, Any, object], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    await ready
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_task_twice(ready: Coroutine[Any, Any, object], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    await ready
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_scope(ready: Coroutine[Any, Any, object], work: Coroutine[Any, Any, None]) -> None:
    """A level cancellation, as Starlette's: every await of the cleanup is cancelled again."""
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: work)
        await ready
        group.cancel_scope.cancel()


by_every_way = pytest.mark.parametrize(
    "cancelled", [by_task, by_task_twice, by_scope], ids=lambda way: way.__name__
)


# Where it is cancelled --------------------------------------------------------------------------------------

Work = Callable[[Database[Any]], "Coroutine[Any, Any, None]"]


async def in_a_transaction(db: Database[Any]) -> None:
    async with db.transaction() as session:
        await session.execute(WRITE, {"id": 1})
        await session.execute(SLOW)


async def in_the_first_statement(db: Database[Any]) -> None:
    async with db.transaction() as session:
        await session.execute(SLOW)


async def in_a_savepoint(db: Database[Any]) -> None:
    async with db.transaction() as session:
        await session.execute(WRITE, {"id": 1})
        async with session.begin_nested():
            await session.execute(WRITE, {"id": 2})
            await session.execute(SLOW)


async def in_a_session(db: Database[Any]) -> None:
    async with db.session() as session:
        await session.execute(SLOW)


async def in_a_stream(db: Database[Any]) -> None:
    async with db.transaction() as session:
        sleepy = text("SELECT n, CASE WHEN n > 3 THEN pg_sleep(20) END FROM generate_series(1, 9) n")
        async for _ in await session.stream(sleepy, execution_options={"yield_per": 2}):
            pass


async def in_autocommit(db: Database[Any]) -> None:
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(SLOW)


async def in_executemany(db: Database[Any]) -> None:
    async with db.begin() as connection:
        await connection.execute(
            text("INSERT INTO rows SELECT :id FROM pg_sleep(:nap)"),
            [{"id": 1, "nap": 0}, {"id": 2, "nap": 20}],
        )


async def in_executemany_that_is_still_being_sent(db: Database[Any]) -> None:
    """20 MB are more than sockets keep: the driver waits until the server reads on, and it sleeps."""
    row = {"nap": 0, "pad": "x" * 10_000}
    async with db.begin() as connection:
        await connection.execute(
            text("INSERT INTO rows SELECT :id FROM pg_sleep(:nap) WHERE :pad <> ''"),
            [{"id": 1, **row, "nap": 20}, *({"id": number, **row} for number in range(2, 2000))],
        )


@by_every_way
@pytest.mark.parametrize(
    "work",
    [
        in_a_transaction,
        in_the_first_statement,
        in_a_savepoint,
        in_a_session,
        in_a_stream,
        in_autocommit,
        in_executemany,
        in_executemany_that_is_still_being_sent,
    ],
    ids=lambda work: work.__name__,
)
async def test_cancelled_statement_ends_on_the_server_and_keeps_its_connection(
    rows: FreshDatabase, driver: str, cancelled: Cancelled, work: Work
) -> None:
    async with one_connection(rows, driver) as db:
        before = await pid_of(db)
        for _ in range(2):
            await cancelled(until(rows, ASLEEP), work(db))
            assert await rows.fetch(ACTIVE) == [], "whoever has been told has no statement running any more"
            await assert_nothing_left(rows, db)
            assert await pid_of(db) == before
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0
        async with db.transaction() as session:
            await session.execute(WRITE, {"id": 7})
        assert await rows.fetchval("SELECT count(*) FROM rows") == 1


# Whoever catches it goes on ---------------------------------------------------------------------------------


async def test_outer_work_goes_on_after_a_timeout_in_a_savepoint(rows: FreshDatabase, driver: str) -> None:
    async with one_connection(rows, driver) as db:
        before = await pid_of(db)
        async with db.transaction() as session:
            await session.execute(WRITE, {"id": 1})
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1), session.begin_nested():
                    await session.execute(WRITE, {"id": 2})
                    await session.execute(SLOW)
            async with session.begin_nested():
                await session.execute(WRITE, {"id": 3})
            with suppress(TimeoutError):
                async with session.begin_nested():
                    await session.execute(WRITE, {"id": 4})
                    async with asyncio.timeout(0.1):
                        await session.execute(SLOW)
            await session.execute(WRITE, {"id": 5})
        assert [row["id"] for row in await rows.fetch("SELECT id FROM rows ORDER BY id")] == [1, 3, 5]
        assert await pid_of(db) == before


@pytest.mark.parametrize("nap", ["in a statement", "elsewhere"])
async def test_outer_work_goes_on_after_a_scope_around_a_savepoint(
    rows: FreshDatabase, driver: str, nap: str
) -> None:
    """The scope cancels every await in it: ROLLBACK TO must be carried out all the same, or rows would be kept."""
    async with one_connection(rows, driver) as db:
        before = await pid_of(db)
        async with db.transaction() as session:
            await session.execute(WRITE, {"id": 1})
            with anyio.move_on_after(0.1) as scope:
                async with session.begin_nested():
                    await session.execute(WRITE, {"id": 2})
                    await (session.execute(SLOW) if nap == "in a statement" else anyio.sleep(20))
            assert scope.cancelled_caught
            await session.execute(WRITE, {"id": 3})
        assert [row["id"] for row in await rows.fetch("SELECT id FROM rows ORDER BY id")] == [1, 3]
        assert await pid_of(db) == before


async def test_transaction_of_a_caught_timeout_without_a_savepoint_refuses_to_go_on(
    rows: FreshDatabase, driver: str
) -> None:
    async with one_connection(rows, driver) as db:
        async with db.session() as session:
            await session.execute(WRITE, {"id": 1})
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await session.execute(SLOW)
            with pytest.raises(DBAPIError) as caught:
                await session.execute(WRITE, {"id": 2})
            assert sqlstate_of(caught.value) == "25P02"
            await session.rollback()
            await session.execute(WRITE, {"id": 3})
            await session.commit()
        assert [row["id"] for row in await rows.fetch("SELECT id FROM rows")] == [3]


async def test_reader_in_autocommit_goes_on_after_a_timeout(rows: FreshDatabase, driver: str) -> None:
    async with one_connection(rows, driver) as db, db.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        before = await connection.scalar(PID)
        for _ in range(3):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await connection.execute(SLOW)
            assert await connection.scalar(PID) == before


# At one message of the protocol -----------------------------------------------------------------------------


class Cutter:
    """A database with one connection, and a task that is cancelled when one of its messages reaches the server."""

    def __init__(self, proxy: FaultProxy, db: Database[Any]) -> None:
        self.proxy = proxy
        self.db = db

    async def cut(self, word: str, work: Work) -> BaseException | None:
        """Run *work*; cancel it when its first statement that begins with *word* passes. Returns what came out."""
        task = asyncio.create_task(work(self.db))
        seen: list[str] = []

        def judge(kind: str, payload: bytes) -> Verdict:
            statement = statement_of(kind, payload)
            if statement is not None and statement.startswith(word) and not seen:
                seen.append(statement)
                task.cancel()
            return Verdict.FORWARD

        self.proxy.on_client_message = judge
        await asyncio.wait((task,), timeout=10)
        assert seen, "the cancellation did happen"
        return asyncio.CancelledError() if task.cancelled() else task.exception()


@pytest.fixture
async def cutter(rows: FreshDatabase, driver: str) -> AsyncIterator[Cutter]:
    async with FaultProxy(rows.server.port) as proxy:
        proxy.delay(0.02)
        url = proxy.through(rows.url(driver)) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0) as db:
            yield Cutter(proxy, db)


def go_on() -> None:
    """As asyncio.timeout does with its own cancellation."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


async def test_cancelled_begin_leaves_no_transaction_behind(rows: FreshDatabase, cutter: Cutter) -> None:
    """Neither on the server nor in the driver, which would take the next BEGIN for a savepoint and never commit."""
    db = cutter.db
    before = await pid_of(db)
    cutter.proxy.forget()
    assert isinstance(await cutter.cut("BEGIN", in_a_transaction), asyncio.CancelledError)
    await assert_nothing_left(rows, db)
    async with db.transaction() as session:
        await session.execute(WRITE, {"id": 2})
    assert [row["id"] for row in await rows.fetch("SELECT id FROM rows")] == [2]
    assert await pid_of(db) == before
    assert not [query for query in cutter.proxy.queries if query.startswith("SAVEPOINT")]


async def test_session_goes_on_after_a_cancelled_begin(rows: FreshDatabase, cutter: Cutter) -> None:
    async def work(db: Database[Any]) -> None:
        async with db.session() as session:
            with pytest.raises(asyncio.CancelledError):
                await session.execute(SLOW)
            go_on()
            await session.rollback()
            await session.execute(WRITE, {"id": 2})
            await session.commit()

    assert await cutter.cut("BEGIN", work) is None
    assert [row["id"] for row in await rows.fetch("SELECT id FROM rows")] == [2]


async def test_cancelled_release_of_a_savepoint_stores_nothing(rows: FreshDatabase, cutter: Cutter) -> None:
    """The block was cancelled, but the server may have kept its work: so the transaction is lost as a whole."""

    async def work(db: Database[Any]) -> None:
        async with db.transaction() as session:
            await session.execute(WRITE, {"id": 1})
            with pytest.raises(asyncio.CancelledError):
                async with session.begin_nested():
                    await session.execute(WRITE, {"id": 2})
            go_on()
            await session.execute(WRITE, {"id": 3})

    error = await cutter.cut("RELEASE", work)
    assert isinstance(error, DBAPIError | InvalidRequestError)
    await assert_nothing_left(rows, cutter.db)
    assert await rows.fetchval("SELECT count(*) FROM rows") == 0


@pytest.mark.parametrize("word", ["COMMIT", "ROLLBACK"])
async def test_cancelled_end_of_a_transaction_keeps_its_connection(
    rows: FreshDatabase, cutter: Cutter, word: str
) -> None:
    """It has run to its end, out of reach, and the driver says that nothing is left of it."""

    async def work(db: Database[Any]) -> None:
        async with db.session() as session:
            await session.execute(WRITE, {"id": 1})
            await (session.commit() if word == "COMMIT" else session.rollback())

    before = await pid_of(cutter.db)
    assert isinstance(await cutter.cut(word, work), asyncio.CancelledError)
    await assert_nothing_left(rows, cutter.db)
    assert await rows.fetchval("SELECT count(*) FROM rows") == (word == "COMMIT")
    assert await pid_of(cutter.db) == before


# What is set for one transaction ----------------------------------------------------------------------------


async def as_a_reader(db: Database[Any]) -> None:
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.scalar(PID)


async def as_a_serious_reader(db: Database[Any]) -> None:
    async with db.transaction(isolation_level="SERIALIZABLE", read_only=True) as session:
        await session.scalar(PID)


@pytest.mark.parametrize("work", [as_a_reader, as_a_serious_reader], ids=lambda work: work.__name__)
async def test_cancelled_while_it_was_set_up_a_connection_is_not_lent_as_it_was_set_up(
    rows: FreshDatabase, driver: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy takes back only what it has set completely: with AUTOCOMMIT left on, a rollback stores."""
    # psycopg 3.3 yields to a busy loop after it has set something; here it always does.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", -1, raising=False)
    async with one_connection(rows, driver) as db:
        await work(db)
        points = await suspensions(work(db))
        for point in range(1, points + 1):
            error, _ = await cancelled_at(work(db), {point})
            assert error is None or isinstance(error, asyncio.CancelledError), f"at {point}: {error!r}"
            with pytest.raises(LookupError):
                async with db.transaction() as session:
                    shown = await session.scalar(text("SHOW transaction_isolation"))
                    assert shown == "read committed", f"at {point} of {points}"
                    await session.execute(WRITE, {"id": point})
                    raise LookupError
            assert await rows.fetchval("SELECT count(*) FROM rows") == 0, f"at {point} of {points}"


# Wherever it waits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["once", "again and again"])
async def test_executemany_that_is_cancelled_wherever_it_waits_keeps_its_connection(
    rows: FreshDatabase, driver: str, times: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To psycopg it is a pipeline: without the Sync at its end, a server that met an error answers nothing more."""
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", -1, raising=False)  # it always yields

    async def work(db: Database[Any]) -> None:
        with suppress(LookupError):
            async with db.begin() as connection:
                await connection.execute(WRITE, [{"id": number} for number in range(3)])
                raise LookupError

    async with one_connection(rows, driver) as db:
        await work(db)
        before = await pid_of(db)
        points = await suspensions(work(db))
        for point in range(1, points + 1):
            began = time.monotonic()
            cuts = {point} if times == "once" else range(point, points + 100)
            error, _ = await cancelled_at(work(db), cuts)
            assert error is None or isinstance(error, asyncio.CancelledError), f"at {point}: {error!r}"
            assert time.monotonic() - began < BOUND, f"at {point} of {points}"
            assert await pid_of(db) == before, f"at {point} of {points}"
        await assert_nothing_left(rows, db)
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0


# A CancelRequest is only a request ---------------------------------------------------------------------------


class DoorSlammer(FaultProxy):
    """Closes the next new connections at once: those that carry a CancelRequest, once all others stand."""

    slams = 0

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.slams:
            self.slams -= 1
            writer.close()
        else:
            super()._accept(reader, writer)


@by_every_way
@pytest.mark.parametrize(
    "work",
    [in_a_transaction, in_executemany_that_is_still_being_sent],
    ids=lambda work: work.__name__,
)
async def test_cancel_request_that_had_no_effect_is_sent_again(
    rows: FreshDatabase, driver: str, cancelled: Cancelled, work: Work
) -> None:
    """As one that overtakes its statement: the server works on, and nobody else would ever stop it."""
    async with DoorSlammer(rows.server.port) as proxy:
        url = proxy.through(rows.url(driver)) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0) as db:
            before = await pid_of(db)
            proxy.slams = 2
            await cancelled(until(rows, ASLEEP), work(db))
            assert proxy.slams == 0
            assert await rows.fetch(ACTIVE) == []
            assert await pid_of(db) == before
            await assert_nothing_left(rows, db)


# What cannot be proved --------------------------------------------------------------------------------------


@by_every_way
@pytest.mark.parametrize(
    "work",
    [in_the_first_statement, in_executemany_that_is_still_being_sent],
    ids=lambda work: work.__name__,
)
async def test_backend_that_ignores_the_cancel_costs_its_connection_in_bounded_time(
    rows: FreshDatabase, driver: str, cancelled: Cancelled, work: Work
) -> None:
    async with one_connection(rows, driver) as db:
        before = await pid_of(db)

        async def frozen() -> None:
            await until(rows, ASLEEP)
            os.kill(before, signal.SIGSTOP)

        try:
            begun = time.monotonic()
            await cancelled(frozen(), work(db))
            took = time.monotonic() - begun
            assert took < BOUND
            assert (db.stats().in_use, db.stats().waiting) == (0, 0)
            assert await pid_of(db) != before
        finally:
            os.kill(before, signal.SIGCONT)
        await until(rows, "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", before)
