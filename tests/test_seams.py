"""Where transactions end: COMMIT is whole, its outcome is named truly, and a silent server ends no wait for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import Integer, TypeDecorator, bindparam, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import Session

from stanch import CommitRefused, CommitUnknown, Database, DeadlinePassed, WriteRefused, classify
from stanch.embedded import EmbeddedPostgres
from stanch.sqlstate import READ_ONLY_TRANSACTION, Kind, sqlstate_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, at_commit, at_statement

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

WRITE = text("INSERT INTO rows VALUES (1)")
PID = text("SELECT pg_backend_pid()")


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@asynccontextmanager
async def proxied(
    judged: FreshDatabase, driver: str, **settings: Any
) -> AsyncGenerator[tuple[FaultProxy, Database[Any]]]:
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        chosen: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, **settings}
        async with Database(url, **chosen) as db:
            yield proxy, db


async def stored(judged: FreshDatabase) -> bool:
    return bool(await judged.fetchval("SELECT count(*) FROM rows"))


# Every way to commit ----------------------------------------------------------------------------------------

Way = Callable[[Database[Any], Callable[[], Awaitable[None]]], Awaitable[None]]
"""Writes a row and commits it in one particular way; the callable is awaited just before the commit."""


async def by_transaction(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.transaction() as session:
        await session.execute(WRITE)
        await before()


async def by_hand(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.session() as session:
        await session.execute(WRITE)
        await before()
        await session.commit()


async def by_session_begin(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.session() as session, session.begin():
        await session.execute(WRITE)
        await before()


async def by_sessionmaker_begin(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.session_factory.begin() as session:
        await session.execute(WRITE)
        await before()


async def by_run_sync(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.session() as session:
        await session.execute(WRITE)
        await before()
        await session.run_sync(Session.commit)


async def by_core_begin(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.begin() as connection:
        await connection.execute(WRITE)
        await before()


async def by_core_commit(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.connect() as connection:
        await connection.execute(WRITE)
        await before()
        await connection.commit()


async def by_engine(db: Database[Any], before: Callable[[], Awaitable[None]]) -> None:
    async with db.engine.begin() as connection:
        await connection.execute(WRITE)
        await before()


WAYS = [
    by_transaction,
    by_hand,
    by_session_begin,
    by_sessionmaker_begin,
    by_run_sync,
    by_core_begin,
    by_core_commit,
    by_engine,
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


async def nothing() -> None:
    """Nothing happens before the commit."""


# The connection is lost at COMMIT ---------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("verdict", [Verdict.CUT, Verdict.CUT_ANSWER], ids=["commit-lost", "answer-lost"])
async def test_connection_cut_after_commit_was_written_is_commit_unknown(
    rows: FreshDatabase, driver: str, way: Way, verdict: Verdict
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        proxy.on_client_message = at_commit(verdict)
        with pytest.raises(CommitUnknown) as caught:
            await way(db, nothing)
        assert proxy.verdicts[verdict] == 1, "the fault did happen"
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is Kind.UNKNOWN_OUTCOME
        assert not failure.retryable
        assert await stored(rows) is (verdict is Verdict.CUT_ANSWER), "either can be behind the same error"
        await assert_nothing_left(rows, db)
        async with db.connect() as connection:
            assert await connection.scalar(text("SELECT 42")) == 42


@every_way
async def test_connection_dead_before_commit_was_written_is_no_unknown(
    rows: FreshDatabase, driver: str, way: Way
) -> None:
    """The server must roll back what it never was asked to commit: the outcome is known."""
    async with Database(rows.url(driver), pool_size=1) as db:

        async def kill() -> None:
            pid = await rows.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()"
            )
            assert await rows.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)

        with pytest.raises(DBAPIError) as caught:
            await way(db, kill)
        assert not isinstance(caught.value, CommitUnknown)
        assert not await stored(rows)
        await assert_nothing_left(rows, db)


async def test_connection_dead_and_not_yet_noticed_is_no_unknown(rows: FreshDatabase, driver: str) -> None:
    """The loop had no turn to see the end of the stream, so the driver alone does not know of it."""
    async with Database(rows.url(driver), pool_size=1) as db:

        async def kill_without_a_turn_of_the_loop() -> None:
            ended = rows.server.sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = 'idle in transaction'"
                f" AND datname = '{rows.name}'"
            )
            assert ended == [("t",)]

        with pytest.raises(DBAPIError) as caught:
            await by_hand(db, kill_without_a_turn_of_the_loop)
        assert not isinstance(caught.value, CommitUnknown)
        assert not await stored(rows)


async def test_commit_that_fails_on_a_living_connection_is_what_it_is(
    fresh_database: FreshDatabase, driver: str
) -> None:
    await fresh_database.execute(
        "CREATE TABLE rows (id int PRIMARY KEY); CREATE TABLE refs"
        " (id int REFERENCES rows DEFERRABLE INITIALLY DEFERRED)"
    )
    async with Database(fresh_database.url(driver), pool_size=1) as db:
        with pytest.raises(IntegrityError) as caught:
            async with db.transaction() as session:
                await session.execute(text("INSERT INTO refs VALUES (7)"))
        assert sqlstate_of(caught.value) == "23503"
        assert (await fresh_database.fetchval("SELECT count(*) FROM refs")) == 0
        await assert_nothing_left(fresh_database, db)


# COMMIT is not cut short ------------------------------------------------------------------------------------


async def slow_commit(judged: FreshDatabase, seconds: float) -> None:
    """A deferred trigger makes COMMIT take so long on the server."""
    await judged.execute(
        f"""
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON rows
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow();
        """
    )


COMMITTING = (
    "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query ILIKE 'commit%'"
    " AND datname = current_database()"
)


@every_way
@pytest.mark.parametrize("how", ["task", "task twice", "scope"])
async def test_cancelled_while_commit_runs_the_row_is_there(
    rows: FreshDatabase, driver: str, way: Way, how: str
) -> None:
    await slow_commit(rows, 0.15)
    scope = anyio.CancelScope()

    async with proxied(rows, driver) as (proxy, db):

        async def work() -> None:
            with scope:
                await way(db, nothing)
                await asyncio.sleep(0)

        task = asyncio.create_task(work())
        await until(rows, COMMITTING)
        if how == "scope":
            scope.cancel()
        else:
            task.cancel()
        if how == "task twice":
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait((task,), timeout=10)
        assert scope.cancelled_caught if how == "scope" else task.cancelled()
        assert await stored(rows), "COMMIT was on its way, and nobody interfered"
        assert proxy.cancel_requests == 0
        await assert_nothing_left(rows, db)
        assert proxy.connections <= 2, "the connection was kept"


async def test_commit_failure_under_cancellation_is_not_lost(rows: FreshDatabase, driver: str) -> None:
    """Cancelled during a COMMIT that then fails: the cancellation is raised, and the failure is its cause."""
    await slow_commit(rows, 0.15)
    async with proxied(rows, driver) as (proxy, db):
        proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
        task = asyncio.create_task(by_transaction(db, nothing))
        await until(rows, COMMITTING)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        chain: list[BaseException] = [caught.value]
        while (link := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(link)
        assert any(isinstance(each, CommitUnknown) for each in chain), chain
        assert proxy.verdicts[Verdict.CUT_ANSWER] == 1
        await assert_nothing_left(rows, db)


async def test_asyncpgs_command_timeout_does_not_cut_a_commit_short(rows: FreshDatabase) -> None:
    """It would send a CancelRequest after the COMMIT, and call what may be stored a timeout."""
    await rows.execute(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON rows DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION dawdle()"
    )
    async with proxied(rows, "asyncpg", connect_args={"command_timeout": 0.2}) as (proxy, db):
        begun = time.monotonic()
        await by_transaction(db, nothing)
        assert time.monotonic() - begun > 0.5, "COMMIT was slow"
        assert proxy.cancel_requests == 0
        assert await stored(rows)


async def test_commit_that_is_never_answered_is_unknown_also_with_a_command_timeout(
    rows: FreshDatabase,
) -> None:
    async with proxied(
        rows, "asyncpg", commit_timeout=0.6, close_timeout=0.3, connect_args={"command_timeout": 0.1}
    ) as (proxy, db):
        proxy.on_client_message = at_commit(Verdict.LOSE_ANSWER)
        begun = time.monotonic()
        with pytest.raises(CommitUnknown):
            await by_transaction(db, nothing)
        assert 0.5 < time.monotonic() - begun < 3
        assert proxy.verdicts[Verdict.LOSE_ANSWER] == 1
        assert await stored(rows), "what is unknown here was stored"


async def test_statement_that_meets_the_command_timeout_costs_no_other_connection(
    rows: FreshDatabase,
) -> None:
    async with proxied(rows, "asyncpg", connect_args={"command_timeout": 0.2}) as (proxy, db):
        async with db.connect() as bystander:
            pid = await bystander.scalar(PID)
            with pytest.raises(DeadlinePassed, match="command_timeout") as caught:
                async with db.session() as session:
                    await session.execute(text("SELECT pg_sleep(20)"))
            failure = classify(caught.value)
            assert failure is not None
            assert failure.kind is Kind.TIMEOUT
        assert proxy.connections - proxy.cancel_requests == 2
        async with db.connect() as first, db.connect() as second:
            assert pid in {await first.scalar(PID), await second.scalar(PID)}
        await assert_nothing_left(rows, db)


# A server that is silent ------------------------------------------------------------------------------------


@every_way
async def test_commit_that_is_never_answered_ends_at_its_deadline_as_unknown(
    rows: FreshDatabase, driver: str, way: Way
) -> None:
    async with proxied(rows, driver, commit_timeout=0.3, close_timeout=0.3) as (proxy, db):
        proxy.on_client_message = at_commit(Verdict.LOSE_ANSWER)
        begun = time.monotonic()
        with pytest.raises(CommitUnknown) as caught:
            await way(db, nothing)
        assert 0.25 < time.monotonic() - begun < 3
        assert isinstance(caught.value.__cause__, DeadlinePassed)
        assert "COMMIT took longer than 0.30 s" in str(caught.value.__cause__)
        assert proxy.verdicts[Verdict.LOSE_ANSWER] == 1
        await assert_nothing_left(rows, db)


async def test_rollback_that_is_never_answered_ends_at_its_deadline(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver, close_timeout=0.3) as (proxy, db):
        proxy.on_client_message = at_statement("rollback", Verdict.LOSE)
        begun = time.monotonic()
        with pytest.raises(LookupError):  # the app's own error is what comes out
            async with db.transaction() as session:
                await session.execute(WRITE)
                raise LookupError
        assert 0.25 < time.monotonic() - begun < 3
        assert proxy.verdicts[Verdict.LOSE] == 1
        proxy.cut()
        await assert_nothing_left(rows, db)
        assert not await stored(rows)


@pytest.fixture(scope="module")
def icy() -> Any:
    """A server of this module's own, to be frozen and thawed."""
    with EmbeddedPostgres() as server:
        server.sql("CREATE TABLE rows (id int PRIMARY KEY)")
        yield server


@pytest.fixture
def thawed(icy: EmbeddedPostgres) -> Any:
    icy.sql("TRUNCATE rows")
    yield icy
    icy.thaw()


async def test_frozen_server_ends_no_wait_for_ever(thawed: EmbeddedPostgres, driver: str) -> None:
    """SIGSTOP: sockets stay open, nobody answers. Commit, rollback, close and connect end within their timeouts."""
    db: Database[Any] = Database(
        thawed.url(driver), pool_size=4, max_overflow=1,
        commit_timeout=0.4, close_timeout=0.4, connect_timeout=0.4,
    )  # fmt: skip
    took: dict[str, float] = {}
    frozen = asyncio.Event()
    ready: list[str] = []

    async def committing() -> None:
        async with db.transaction() as session:
            await session.execute(WRITE)
            ready.append("commit")
            await frozen.wait()

    async def rolling_back() -> None:
        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))
            ready.append("rollback")
            await frozen.wait()
            raise LookupError

    async def closing() -> None:
        async with db.connect() as connection:
            await connection.execute(text("SELECT 1"))
            ready.append("close")
            await frozen.wait()

    async def connecting() -> None:
        ready.append("connect")
        await frozen.wait()
        async with db.connect(), db.connect():
            pass

    async def timed(name: str, operation: Callable[[], Awaitable[None]]) -> BaseException | None:
        try:
            await operation()
        except Exception as error:
            return error
        else:
            return None
        finally:
            took[name] = time.monotonic() - begun

    names = {"commit": committing, "rollback": rolling_back, "close": closing, "connect": connecting}
    tasks = {name: asyncio.create_task(timed(name, each)) for name, each in names.items()}
    async with asyncio.timeout(10):
        while len(ready) < len(names):  # noqa: ASYNC110  # four events at once
            await asyncio.sleep(0.01)
    thawed.freeze()
    begun = time.monotonic()
    frozen.set()
    outcomes = dict(zip(tasks, await asyncio.wait_for(asyncio.gather(*tasks.values()), 15), strict=True))
    assert max(took.values()) < 3, took
    assert isinstance(outcomes["commit"], CommitUnknown)
    assert isinstance(outcomes["rollback"], LookupError)
    assert isinstance(outcomes["connect"], Exception)
    assert db.stats().in_use == 0, "every slot came back"
    thawed.thaw()
    async with db.connect() as connection:
        assert await connection.scalar(text("SELECT 42")) == 42
    await db.close()


async def test_frozen_server_fails_a_ping_in_time(thawed: EmbeddedPostgres, driver: str) -> None:
    async with Database(
        thawed.url(driver),
        pool_size=1,
        max_overflow=0,
        pool_pre_ping=True,
        connect_timeout=0.4,
        close_timeout=0.4,
    ) as db:
        async with db.connect() as connection:
            await connection.execute(text("SELECT 1"))
        thawed.freeze()
        begun = time.monotonic()
        with pytest.raises(DBAPIError):
            async with db.connect() as connection:
                pass
        assert time.monotonic() - begun < 3
        assert db.stats().in_use == 0
        thawed.thaw()
        async with db.connect() as connection:
            assert await connection.scalar(text("SELECT 42")) == 42


# The server rolls back and calls it done --------------------------------------------------------------------


async def swallow(statement: Awaitable[object]) -> None:
    with suppress(DBAPIError):
        await statement


FAILS = text("SELECT 1 / 0")


async def silent_orm(db: Database[Any]) -> None:
    async with db.transaction() as session:
        await session.execute(WRITE)
        await swallow(session.execute(FAILS))


async def silent_by_hand(db: Database[Any]) -> None:
    async with db.session() as session:
        await session.execute(WRITE)
        await swallow(session.execute(FAILS))
        await session.commit()


async def silent_session_begin(db: Database[Any]) -> None:
    async with db.session() as session, session.begin():
        await session.execute(WRITE)
        await swallow(session.execute(FAILS))


async def silent_core(db: Database[Any]) -> None:
    async with db.begin() as connection:
        await connection.execute(WRITE)
        await swallow(connection.execute(FAILS))


async def silent_core_commit(db: Database[Any]) -> None:
    async with db.connect() as connection:
        await connection.execute(WRITE)
        await swallow(connection.execute(FAILS))
        await connection.commit()


async def silent_after_a_savepoint(db: Database[Any]) -> None:
    async with db.transaction() as session:
        async with session.begin_nested():
            await session.execute(WRITE)
        await swallow(session.execute(FAILS))


async def silent_raw_driver(db: Database[Any]) -> None:
    """SQLAlchemy does not even know that a statement failed."""
    async with db.begin() as connection:
        await connection.execute(WRITE)
        raw: Any = (await connection.get_raw_connection()).driver_connection
        with suppress(Exception):
            await raw.execute("SELECT 1 / 0")


@pytest.mark.parametrize(
    "silent",
    [silent_orm, silent_by_hand, silent_session_begin, silent_core, silent_core_commit,
     silent_after_a_savepoint, silent_raw_driver],
    ids=lambda way: way.__name__,
)  # fmt: skip
async def test_commit_answered_by_rollback_is_refused(
    rows: FreshDatabase, driver: str, silent: Callable[[Database[Any]], Awaitable[None]]
) -> None:
    async with proxied(rows, driver, pool_size=1) as (proxy, db):
        with pytest.raises(CommitRefused):
            await silent(db)
        assert "COMMIT" in {query.strip(";").upper() for query in proxy.queries}, "the server was asked"
        assert not await stored(rows)
        await assert_nothing_left(rows, db)
        async with db.transaction() as session:
            await session.execute(WRITE)
        assert await stored(rows)
        assert proxy.connections == 1, "the connection is as good as before"


async def test_error_inside_a_savepoint_does_not_refuse_the_rest(rows: FreshDatabase, driver: str) -> None:
    async with Database(rows.url(driver), pool_size=1) as db:
        async with db.transaction() as session:
            await session.execute(WRITE)
            with suppress(DBAPIError):
                async with session.begin_nested():
                    await session.execute(FAILS)
        assert await stored(rows)


async def test_autocommit_is_left_alone(rows: FreshDatabase, driver: str) -> None:
    async with Database(rows.url(driver), pool_size=1, isolation_level="AUTOCOMMIT") as db:
        async with db.connect() as connection:
            await swallow(connection.execute(FAILS))
            await connection.execute(WRITE)
            await connection.commit()
        assert await stored(rows)
        await assert_nothing_left(rows, db)


# A primary that no longer is one ----------------------------------------------------------------------------


async def demote(judged: FreshDatabase, *, read_only: bool) -> None:
    """As seen by new transactions: the database stays up, answers pings and refuses writes."""
    word = "on" if read_only else "off"
    await judged.execute(f'ALTER DATABASE "{judged.name}" SET default_transaction_read_only = {word}')


async def test_write_refused_by_a_demoted_primary_drops_the_pool(rows: FreshDatabase, driver: str) -> None:
    await demote(rows, read_only=True)
    async with Database(rows.url(driver), pool_size=2, max_overflow=0) as db:
        async with db.connect() as one, db.connect() as two:
            old = {int(await each.scalar(PID) or 0) for each in (one, two)}
        await demote(rows, read_only=False)  # "a new primary": whoever connects anew gets there
        with pytest.raises(DBAPIError) as caught:
            await by_transaction(db, nothing)
        assert sqlstate_of(caught.value) == READ_ONLY_TRANSACTION
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is Kind.READ_ONLY
        await by_transaction(db, nothing)
        assert await stored(rows)
        for pid in old:
            await until(rows, "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)


async def test_write_in_our_own_read_only_transaction_costs_no_connection(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        for _ in range(3):
            with pytest.raises(WriteRefused) as caught:
                async with db.transaction(read_only=True) as session:
                    await session.execute(WRITE)
            assert sqlstate_of(caught.value) == READ_ONLY_TRANSACTION
        assert proxy.connections == 1
        await by_transaction(db, nothing)
        assert proxy.connections == 1, "READ ONLY ended with its transaction"
        assert await stored(rows)


# What is the app's own --------------------------------------------------------------------------------------


class Sealed(TypeDecorator[int]):
    """Encrypts what it stores, if it finds its key."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: object) -> int | None:
        raise FileNotFoundError(2, "no key file")


async def test_oserror_of_a_bind_processor_stays_the_apps_own_and_outdates_nothing(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        seal = text("INSERT INTO rows VALUES (:id)").bindparams(bindparam("id", type_=Sealed()))
        async with db.connect() as bystander:
            await bystander.execute(PID)
            with pytest.raises(StatementError) as caught:
                async with db.transaction() as session:
                    await session.execute(PID)
                    await session.execute(seal, {"id": 1})
        assert isinstance(caught.value.orig, FileNotFoundError)
        assert not isinstance(caught.value, DBAPIError)
        assert classify(caught.value) is None
        assert db.stats().idle == 2
        async with db.connect() as first, db.connect() as second:
            await first.execute(PID)
            await second.execute(PID)
        assert proxy.connections == 2, "both live on"
        assert not await stored(rows)


# What it costs ----------------------------------------------------------------------------------------------


async def test_no_listener_slows_every_statement_down(rows: FreshDatabase, driver: str) -> None:
    """``engine._has_events`` makes SQLAlchemy look for listeners around each statement."""
    async with Database(rows.url(driver)) as db:
        await by_transaction(db, nothing)
        engine: Any = db.engine.sync_engine
        assert engine._has_events is False
        event.listen(engine, "before_cursor_execute", lambda *_args: None)
        assert engine._has_events, "this is how it would look"


async def test_transaction_is_begin_statement_commit_and_nothing_else(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))
        proxy.forget()
        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))
        ends = [query for query in proxy.queries if not query.lstrip().upper().startswith("SELECT")]
        assert [query.split(";")[0].split()[0].upper() for query in ends] == ["BEGIN", "COMMIT"], (
            proxy.queries
        )
