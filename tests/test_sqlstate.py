"""The same failure means the same on every driver: real errors of real servers, classified."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from stanch import CommitUnknown, Database, DatabaseClosed, DatabaseUnavailable, DeadlinePassed, PoolExhausted
from stanch.retry import backoff
from stanch.sqlstate import Failure, Kind, classify, sqlstate_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

Provoke = Callable[[Database[Any]], Awaitable[object]]


async def failure_of(provoke: Awaitable[object]) -> Failure:
    """What an operation that must fail meant; constraints aside."""
    try:
        await provoke
    except SQLAlchemyError as error:
        failure = classify(error)
        assert failure is not None
        return failure
    raise AssertionError("it did not fail")


def statements(*each: str, isolation_level: Any = None) -> Provoke:
    async def provoke(db: Database[Any]) -> None:
        async with db.transaction(isolation_level=isolation_level) as session:
            for statement in each:
                await session.execute(text(statement))

    return provoke


async def deadlock(db: Database[Any]) -> None:
    async def cross(first: int, second: int, met: asyncio.Barrier) -> None:
        async with db.transaction() as session:
            await session.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
            await session.execute(text(f"UPDATE things SET size = 2 WHERE id = {first}"))
            await met.wait()
            await session.execute(text(f"UPDATE things SET size = 2 WHERE id = {second}"))

    met = asyncio.Barrier(2)
    outcomes = await asyncio.gather(cross(1, 2, met), cross(2, 1, met), return_exceptions=True)
    failures = [each for each in outcomes if isinstance(each, BaseException)]
    assert len(failures) == 1
    raise failures[0]


async def serialization(db: Database[Any]) -> None:
    async with db.transaction(isolation_level="REPEATABLE READ") as session:
        await session.execute(text("SELECT * FROM things"))
        async with db.transaction() as other:
            await other.execute(text("UPDATE things SET size = 3 WHERE id = 1"))
        await session.execute(text("UPDATE things SET size = 4 WHERE id = 1"))


async def lock(db: Database[Any]) -> None:
    async with db.transaction() as holder:
        await holder.execute(text("LOCK TABLE things"))
        await statements("SET LOCAL lock_timeout = '20ms'", "SELECT * FROM things")(db)


async def terminated(db: Database[Any]) -> None:
    async with db.transaction() as session:
        victim = await session.scalar(text("SELECT pg_backend_pid()"))
        async with db.connect() as other:
            await other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": victim})
        await session.execute(text("SELECT 1"))


async def idle_too_long(db: Database[Any]) -> None:
    async with db.transaction() as session:
        victim = await session.scalar(text("SELECT pg_backend_pid()"))
        await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '20ms'"))
        async with db.connect() as other, asyncio.timeout(5):
            while await other.scalar(
                text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": victim}
            ):
                await other.rollback()  # a transaction sees one snapshot of the activity
        await session.execute(text("SELECT 1"))


CASES: dict[str, tuple[Provoke, Failure]] = {
    "unique": (statements("INSERT INTO things VALUES (1)"), Failure(Kind.CONFLICT, "23505", "things_pkey")),
    "foreign key": (
        statements("INSERT INTO refs VALUES (9)"),
        Failure(Kind.CONFLICT, "23503", "refs_id_fkey"),
    ),
    "deferred": (
        statements("INSERT INTO later VALUES (9)"),
        Failure(Kind.CONFLICT, "23503", "later_id_fkey"),
    ),
    "exclusion": (
        statements("INSERT INTO apart VALUES (1), (1)"),
        Failure(Kind.CONFLICT, "23P01", "apart_id_excl"),
    ),
    "not null": (statements("INSERT INTO things VALUES (3, NULL)"), Failure(Kind.INVALID, "23502")),
    "check": (
        statements("INSERT INTO things VALUES (3, -1)"),
        Failure(Kind.INVALID, "23514", "things_size_check"),
    ),
    "too long": (statements("INSERT INTO short VALUES ('abcd')"), Failure(Kind.INVALID, "22001")),
    "out of range": (statements("SELECT 2147483647 + 1"), Failure(Kind.INVALID, "22003")),
    "no date": (statements("SELECT CAST('tomorrowish' AS date)"), Failure(Kind.INVALID, "22007")),
    "no such day": (statements("SELECT CAST('2026-02-30' AS date)"), Failure(Kind.INVALID, "22008")),
    "no number": (statements("SELECT CAST('x' AS int)"), Failure(Kind.INVALID, "22P02")),
    "serialization": (serialization, Failure(Kind.CONTENTION, "40001", retryable=True)),
    "deadlock": (deadlock, Failure(Kind.CONTENTION, "40P01", retryable=True)),
    "lock timeout": (lock, Failure(Kind.TIMEOUT, "55P03")),
    "statement timeout": (
        statements("SET LOCAL statement_timeout = '20ms'", "SELECT pg_sleep(5)"),
        Failure(Kind.TIMEOUT, "57014"),
    ),
    "read only": (
        statements("SET TRANSACTION READ ONLY", "INSERT INTO things VALUES (3)"),
        Failure(Kind.READ_ONLY, "25006", disconnect=True),
    ),
    "syntax": (statements("SELEC 1"), Failure(Kind.PROGRAMMING, "42601")),
    "no table": (statements("SELECT * FROM nowhere"), Failure(Kind.PROGRAMMING, "42P01")),
    "no right": (
        statements("SET LOCAL ROLE pg_monitor", "SELECT pg_read_file('x')"),
        Failure(Kind.PROGRAMMING, "42501"),
    ),
    "division": (statements("SELECT 1 / 0"), Failure(Kind.PROGRAMMING, "22012")),
}


@pytest.fixture
async def things(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(
        """
        CREATE TABLE things (id int PRIMARY KEY, size int NOT NULL DEFAULT 1 CHECK (size > 0));
        INSERT INTO things VALUES (1), (2);
        CREATE TABLE refs (id int REFERENCES things);
        CREATE TABLE later (id int REFERENCES things DEFERRABLE INITIALLY DEFERRED);
        CREATE TABLE apart (id int, EXCLUDE USING btree (id WITH =));
        CREATE TABLE short (name varchar(3));
        """
    )
    return fresh_database


@pytest.fixture
async def db(things: FreshDatabase, driver: str) -> AsyncIterator[Database[Any]]:
    async with Database(things.url(driver), pool_size=3, max_overflow=0) as db:
        yield db


@pytest.mark.parametrize("case", CASES)
async def test_failure_means_the_same_on_both_drivers(db: Database[Any], case: str) -> None:
    provoke, expected = CASES[case]
    assert await failure_of(provoke(db)) == expected


@pytest.mark.parametrize("provoke", [terminated, idle_too_long])
async def test_lost_connection_is_unavailable_and_worth_a_retry(db: Database[Any], provoke: Provoke) -> None:
    """Told by asyncpg without a SQLSTATE, psycopg with the one the server sent last."""
    failure = await failure_of(provoke(db))
    assert failure.replaced(sqlstate=None) == Failure(Kind.UNAVAILABLE, retryable=True, disconnect=True)


async def test_raw_error_of_the_driver_is_classified_too(db: Database[Any]) -> None:
    """Not every path of SQLAlchemy wraps them."""
    async with db.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        with pytest.raises(Exception) as caught:  # noqa: PT011  # asyncpg's or psycopg's own
            await raw.execute("INSERT INTO things VALUES (1)")
    assert not isinstance(caught.value, SQLAlchemyError)
    assert classify(caught.value) == Failure(Kind.CONFLICT, "23505", "things_pkey")


async def test_connection_lost_while_it_is_opened_is_worth_a_retry() -> None:
    """The SQLSTATE that asyncpg gives it, of class 08 (*Connection Exception*), is no word of the server's."""
    error = DatabaseUnavailable("lost")
    error.__cause__ = type("Lost", (Exception,), {"sqlstate": "08003"})()
    assert classify(error) == Failure(Kind.UNAVAILABLE, "08003", retryable=True, disconnect=True)


async def test_refused_connection_is_unavailable(things: FreshDatabase, driver: str, free_port: int) -> None:
    url = things.url(driver).replace(str(things.server.port), str(free_port))
    db: Database[Any] = Database(url, connect_timeout=2)
    with pytest.raises(DatabaseUnavailable) as caught:
        async with db.connect():
            pass
    assert not isinstance(caught.value, OSError), "the app's own handlers for OSError stay its own"
    assert str(free_port) in str(caught.value)
    failure = classify(caught.value)
    assert failure is not None
    assert (failure.kind, failure.retryable) == (Kind.UNAVAILABLE, True)


@pytest.fixture
def free_port() -> int:
    """A port of the loopback where nobody listens."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_wrong_password_is_not_worth_a_retry(things: FreshDatabase) -> None:
    """Only asyncpg can tell: libpq keeps the SQLSTATE of a refused connection to itself."""
    url = things.url("asyncpg")
    password = url.split("://")[1].split("@")[0].split(":")[1]
    db: Database[Any] = Database(url.replace(password, "wrong"), connect_timeout=5)
    failure = await failure_of(db.open(wait=20))
    assert (failure.kind, failure.sqlstate, failure.retryable) == (Kind.UNAVAILABLE, "28P01", False)


def test_own_errors_have_their_kinds() -> None:
    expected = {
        PoolExhausted("full"): Kind.POOL_FULL,
        DatabaseUnavailable("gone"): Kind.UNAVAILABLE,
        DatabaseClosed("closed"): Kind.UNAVAILABLE,
        DeadlinePassed("late"): Kind.TIMEOUT,
        CommitUnknown("who knows"): Kind.UNKNOWN_OUTCOME,
    }
    for error, kind in expected.items():
        failure = classify(error)
        assert failure is not None
        assert failure.kind is kind
    assert classify(ValueError("mine")) is None
    assert classify(OSError("mine")) is None
    assert classify(TimeoutError("mine")) is None


@pytest.mark.sqlite
async def test_sqlite_failures_mean_the_same(tmp_path: Path) -> None:
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/things.db", lock_timeout=0.05) as db:
        await statements(
            "CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT UNIQUE,"
            " size INT NOT NULL DEFAULT 1 CHECK (size > 0))",
            "CREATE TABLE refs (id INT REFERENCES things)",
            "INSERT INTO things VALUES (1, 'one', 1)",
        )(db)
        expected = {
            "INSERT INTO things VALUES (1, 'two', 1)": Kind.CONFLICT,
            "INSERT INTO things VALUES (2, 'one', 1)": Kind.CONFLICT,
            "INSERT INTO refs VALUES (9)": Kind.CONFLICT,
            "INSERT INTO things VALUES (2, 'two', NULL)": Kind.INVALID,
            "INSERT INTO things VALUES (2, 'two', -1)": Kind.INVALID,
            "SELEC 1": Kind.PROGRAMMING,
            "SELECT * FROM nowhere": Kind.PROGRAMMING,
        }
        found = {statement: (await failure_of(statements(statement)(db))).kind for statement in expected}
        assert found == expected
        async with db.transaction() as holder:
            await holder.execute(text("INSERT INTO things VALUES (5, 'five', 1)"))
            busy = await failure_of(statements("INSERT INTO things VALUES (6, 'six', 1)")(db))
        assert busy == Failure(Kind.CONTENTION, retryable=True)


async def test_state_is_found_however_deep_the_driver_hides_it(db: Database[Any]) -> None:
    with pytest.raises(DBAPIError) as caught:
        await statements("SELECT 1 / 0")(db)
    assert sqlstate_of(caught.value) == sqlstate_of(caught.value.orig) == "22012"
    assert sqlstate_of(None) is None


def test_backoff_grows_is_capped_and_jitters() -> None:
    import random

    draws = [[backoff(attempt, draw=random.Random(seed)) for seed in range(200)] for attempt in (1, 4, 40)]
    assert all(0 <= each <= 2.0 for each in draws[2])
    assert max(draws[0]) <= 0.1 < max(draws[1]) <= 0.8 < max(draws[2])
    assert min(draws[2]) < 0.2, "full jitter: also at once"
    assert backoff(10**9) <= 2.0
