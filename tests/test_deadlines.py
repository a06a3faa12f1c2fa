"""One deadline bounds everything a unit waits for, names itself, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from stanch import (
    CommitRefused,
    CommitUnknown,
    ConfigError,
    Database,
    DatabaseUnavailable,
    DeadlinePassed,
    Failure,
    PoolExhausted,
    classify,
)
from stanch.deadlines import GRACE, Deadline, earlier, in_force, under, within
from stanch.sqlstate import Kind, sqlstate_of
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

TIMEOUT = 0.6
SLACK = 1.0
"""Seconds by which anything may be late here, as DESIGN allows a reply."""

ONE = text("SELECT 1")
WRITE = text("INSERT INTO rows VALUES (1)")
SHOWN = text("SHOW statement_timeout")
ENDED_BY_THE_SERVER = r" was ended by the server: the 0\.60 s of transaction\(timeout=\) were all but over"
ASLEEP = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"


class Base(DeclarativeBase):
    pass


class Slow(Base):
    __tablename__ = "slow"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


@pytest.fixture
async def rows(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute("CREATE TABLE rows (id int PRIMARY KEY)")
    return fresh_database


@asynccontextmanager
async def proxied(
    judged: FreshDatabase, driver: str, *, warm: bool = True, **settings: Any
) -> AsyncGenerator[tuple[FaultProxy, Database[Any]]]:
    """A pool of two behind the proxy, with one idle connection if *warm*; at the end it must be whole again."""
    async with FaultProxy(judged.server.port) as proxy:
        url = proxy.through(judged.url(driver)) + "?sslmode=disable"
        chosen: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, **settings}
        db: Database[Any] = Database(url, **chosen)
        if warm:
            async with db.session() as session:
                await session.execute(ONE)
        proxy.forget()
        yield proxy, db
        proxy.pass_through()
        proxy.on_client_message = lambda _kind, _payload: Verdict.FORWARD
        assert (db.stats().in_use, db.stats().waiting) == (0, 0)
        await db.open(wait=5)  # after an outage it is asked again once a second
        async with AsyncExitStack() as stack:  # the whole pool can be lent, and answers
            for _ in range(db.stats().pool_size):
                session = await stack.enter_async_context(db.session())
                assert await session.scalar(text("SELECT 42")) == 42
        await assert_nothing_left(judged, db)
        await db.close()


def lose_all_but_the_password(kind: str, _payload: bytes) -> Verdict:
    """The server that falls silent after the login."""
    return Verdict.FORWARD if kind == "p" else Verdict.LOSE


class Clock:
    """How long a block took."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def assert_in_time(self, timeout: float = TIMEOUT) -> None:
        assert self.seconds < timeout + SLACK


# The value ------------------------------------------------------------------------------------------------


def test_the_earlier_deadline_holds() -> None:
    soon, late = Deadline(1.0, 1.0, "soon"), Deadline(2.0, 2.0, "late")
    assert earlier(soon, late) is earlier(late, soon) is earlier(None, soon) is earlier(soon, None) is soon
    assert earlier(None, None) is None


def test_a_later_deadline_inside_an_earlier_one_changes_nothing() -> None:
    soon, late = Deadline.after(1.0, "soon"), Deadline.after(60.0, "late")
    with under(soon):
        with under(late), under(None):
            assert in_force() is soon
            assert within(30.0) <= 1.0
        assert within(0.1) == 0.1
    assert in_force() is None
    assert within(30.0) == 30.0


@pytest.mark.parametrize("timeout", [True, 0, -1, float("inf"), float("nan"), "2", b"2", 1e9, object()])
async def test_what_is_no_length_of_time_is_refused(timeout: Any) -> None:
    db = Database("sqlite+aiosqlite:///:memory:")
    for opened in (db.transaction(timeout=timeout), db.session(timeout=timeout)):
        with pytest.raises(ConfigError, match=r"(transaction|session)\(timeout=\) must be seconds"):
            async with opened:
                pytest.fail("opened")
    await db.close()


# Nothing on the wire --------------------------------------------------------------------------------------


async def test_a_timeout_costs_no_round_trip_and_tells_the_server(rows: FreshDatabase, driver: str) -> None:
    """BEGIN, the statement, COMMIT: as without; and what rode on BEGIN is gone with the transaction."""
    async with proxied(rows, driver) as (proxy, db):
        counted: list[int] = []
        shown: list[str] = []
        limit = ""
        for timeout in (None, 2.0, None):
            for _ in range(7):  # the driver has prepared the statement by then
                proxy.forget()
                async with db.transaction(timeout=timeout) as session:
                    limit = str(await session.scalar(SHOWN))
            shown.append(limit)
            counted.append(proxy.round_trips)
        assert proxy.connections == 0
    assert counted[0] == counted[1] == counted[2]
    assert shown[0] == shown[2] == "30s", "as the connection was started"
    assert shown[1].endswith("ms")
    assert 1500 < int(shown[1][:-2]) < 2000


@pytest.mark.parametrize("limit", ["1s", "1000", ""])
async def test_a_shorter_statement_timeout_stays(rows: FreshDatabase, driver: str, limit: str) -> None:
    """However it was said: as a setting, or in the URL, in words of PostgreSQL's."""
    said = f"?options=-c%20statement_timeout={limit}" if limit else ""
    chosen: dict[str, Any] = {} if limit else {"statement_timeout": 1.0}
    async with Database(rows.url(driver) + said, **chosen) as db:
        async with db.transaction(timeout=10) as session:
            assert await session.scalar(SHOWN) == "1s"
        async with db.transaction(timeout=0.5) as session:
            assert await session.scalar(SHOWN) != "1s"


async def test_without_statement_timeout_the_server_is_told_all_the_same(
    rows: FreshDatabase, driver: str
) -> None:
    async with Database(rows.url(driver), statement_timeout=None) as db:
        async with db.transaction(timeout=2) as session:
            assert str(await session.scalar(SHOWN)).endswith("ms")
        async with db.transaction() as session:
            assert await session.scalar(SHOWN) == "0"


@pytest.mark.parametrize(
    "options", [{}, {"isolation_level": "SERIALIZABLE"}, {"read_only": True}], ids=["plain", "level", "read"]
)
async def test_what_else_rides_on_begin_stays(
    rows: FreshDatabase, driver: str, options: dict[str, Any]
) -> None:
    async with Database(rows.url(driver)) as db, db.transaction(timeout=2, **options) as session:
        assert str(await session.scalar(SHOWN)).endswith("ms")
        level = await session.scalar(text("SHOW transaction_isolation"))
        assert level == options.get("isolation_level", "read committed").lower()
        read_only = await session.scalar(text("SHOW transaction_read_only"))
        assert read_only == ("on" if "read_only" in options else "off")


async def test_a_living_server_ends_the_statement_first_and_the_connection_is_kept(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        clock = Clock()
        with pytest.raises(
            DeadlinePassed, match=r"test_deadlines\.py:\d+ in test_\w+\(\)" + ENDED_BY_THE_SERVER
        ) as caught:
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(text("SELECT pg_sleep(20)"))
        clock.assert_in_time()
        assert classify(caught.value) == Failure(Kind.TIMEOUT, "57014", disconnect=False)
        assert sqlstate_of(caught.value.__cause__) == "57014"
        async with db.session() as session:
            await session.execute(ONE)
        assert proxy.connections == 0, "no new connection was needed"


async def test_the_deadline_is_named_where_the_server_ends_the_flush_of_a_unit(
    rows: FreshDatabase, driver: str
) -> None:
    """Nobody's line is on the stack then."""
    await rows.execute("""
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(20); RETURN NULL; END';
        CREATE TABLE slow (id int PRIMARY KEY);
        CREATE TRIGGER slowly AFTER INSERT ON slow FOR EACH ROW EXECUTE FUNCTION dawdle();
    """)
    async with proxied(rows, driver) as (proxy, db):
        with pytest.raises(DeadlinePassed, match="^a statement" + ENDED_BY_THE_SERVER):
            async with db.transaction(timeout=TIMEOUT) as session:
                session.add(Slow(id=1))
        assert proxy.connections == 0
    assert await rows.fetchval("SELECT count(*) FROM slow") == 0


async def test_a_statement_that_somebody_else_cancels_is_not_the_deadlines(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (_, db):
        with pytest.raises(DBAPIError) as caught:
            async with db.transaction(timeout=20) as session:
                running = asyncio.ensure_future(session.execute(text("SELECT pg_sleep(20)")))
                [sleeper] = await until(rows, ASLEEP.replace("SELECT 1", "SELECT pid"))
                await rows.execute(f"SELECT pg_cancel_backend({sleeper['pid']})")
                await running
        assert not isinstance(caught.value, DeadlinePassed)
        assert sqlstate_of(caught.value) == "57014"


async def test_a_limit_of_its_own_is_not_the_deadlines(rows: FreshDatabase, driver: str) -> None:
    """A shorter statement_timeout, and one of an earlier unit on the same connection."""
    async with proxied(rows, driver, statement_timeout=TIMEOUT, pool_size=1) as (proxy, db):
        async with db.transaction(
            timeout=TIMEOUT / 2
        ) as session:  # its limit rode on BEGIN, and ended with it
            await session.execute(ONE)
        for opened in (db.transaction(timeout=20), db.session(), db.reader()):
            with pytest.raises(DBAPIError) as caught:
                async with opened as session:
                    await session.execute(text("SELECT pg_sleep(20)"))
            assert not isinstance(caught.value, DeadlinePassed)
            assert sqlstate_of(caught.value) == "57014"
        assert proxy.connections == 0


async def test_a_swallowed_deadline_is_what_its_commit_is_refused_for(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (_, db):
        with pytest.raises(CommitRefused, match=r"DeadlinePassed \(57014\) at test_deadlines\.py:\d+"):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
                with suppress(DeadlinePassed):
                    await session.execute(text("SELECT pg_sleep(20)"))
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0


# The black hole, at every state of the protocol -----------------------------------------------------------


async def test_black_hole_before_the_connection_is_accepted(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver, warm=False) as (proxy, db):
        proxy.blackhole()
        clock = Clock()
        with pytest.raises(DatabaseUnavailable, match=r"the 0\.60 s of transaction\(timeout=\)"):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
        clock.assert_in_time()
        assert proxy.connections == 1
        assert db.stats().in_use == 0


async def test_black_hole_while_the_first_connection_is_initialised(rows: FreshDatabase, driver: str) -> None:
    """Login went well; what SQLAlchemy asks of its first connection is never answered."""
    async with proxied(rows, driver, warm=False) as (proxy, db):
        proxy.on_client_message = lose_all_but_the_password
        clock = Clock()
        with pytest.raises(DatabaseUnavailable, match=r"the 0\.60 s of transaction\(timeout=\)"):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
        clock.assert_in_time()
        assert proxy.verdicts[Verdict.LOSE] >= 1
        assert db.stats().in_use == 0


async def test_black_hole_on_an_idle_connection(rows: FreshDatabase, driver: str) -> None:
    """BEGIN is sent, and nobody answers."""
    async with proxied(rows, driver) as (proxy, db):
        with proxy.blackholed():
            clock = Clock()
            with pytest.raises(DeadlinePassed, match="passed while a statement was running"):
                async with db.transaction(timeout=TIMEOUT) as session:
                    await session.execute(WRITE)
            clock.assert_in_time()
            assert db.stats().in_use == 0
        assert proxy.connections <= 1, "at most the request to stop the statement"


async def test_black_hole_at_the_ping(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver, pool_pre_ping=True) as (proxy, db):
        with proxy.blackholed():
            clock = Clock()
            with pytest.raises((DeadlinePassed, DatabaseUnavailable)):
                async with db.transaction(timeout=TIMEOUT) as session:
                    await session.execute(WRITE)
            clock.assert_in_time()
            assert db.stats().in_use == 0


@pytest.mark.parametrize("by", ["session", "connection", "stream"])
async def test_black_hole_in_the_middle_of_a_statement(rows: FreshDatabase, driver: str, by: str) -> None:
    """Also for Core on the session's connection, and for rows that are fetched one by one."""
    clock = Clock()
    async with proxied(rows, driver) as (proxy, db):
        with pytest.raises(DeadlinePassed) as caught:  # the hole must close before the proxy
            async with db.transaction(timeout=TIMEOUT) as session:
                connection = await session.connection()
                match by:
                    case "session":
                        statement = session.execute(text("SELECT pg_sleep(20)"))
                    case "connection":
                        statement = connection.execute(text("SELECT pg_sleep(20)"))
                    case _:
                        rows_of = text("SELECT pg_sleep(n * 20) FROM generate_series(0, 9) n")
                        statement = _read_all(session, rows_of)
                running = asyncio.create_task(statement)
                await until(rows, ASLEEP)
                clock = Clock()
                with proxy.blackholed():
                    await asyncio.wait({running}, timeout=TIMEOUT + SLACK)
                    assert running.done(), "nobody ended it"
                await running
        clock.assert_in_time()
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is Kind.TIMEOUT
        assert "the 0.60 s of transaction(timeout=) passed" in caught.value.what
        assert "test_deadlines.py" in caught.value.what, "says whose"


async def _read_all(session: Any, statement: Any) -> None:
    async for _ in await session.stream(statement):
        pass


@pytest.mark.parametrize("verdict", [Verdict.LOSE, Verdict.LOSE_ANSWER], ids=["commit-lost", "answer-lost"])
async def test_black_hole_at_commit_is_unknown_in_time(
    rows: FreshDatabase, driver: str, verdict: Verdict
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        proxy.on_client_message = at_commit(verdict)
        clock = Clock()
        with pytest.raises(CommitUnknown):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
        clock.assert_in_time()
        assert proxy.verdicts[verdict] == 1
        assert await rows.fetchval("SELECT count(*) FROM rows") == (verdict is Verdict.LOSE_ANSWER)


async def test_black_hole_at_a_commit_by_hand_is_unknown_in_time(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver) as (proxy, db):
        proxy.on_client_message = at_commit(Verdict.LOSE_ANSWER)
        clock = Clock()
        with pytest.raises(CommitUnknown):
            async with db.session(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
                await session.commit()
        clock.assert_in_time()
        assert await rows.fetchval("SELECT count(*) FROM rows") == 1


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
async def test_black_hole_at_the_rollback_of_what_was_read(
    rows: FreshDatabase, driver: str, late: bool
) -> None:
    """A ROLLBACK gets what is left, and a moment at least; not the 5 s of close_timeout."""
    async with proxied(rows, driver) as (proxy, db):
        with proxy.blackholed():
            proxy.pass_through()
            async with db.session(timeout=TIMEOUT) as session:
                await session.execute(ONE)
                proxy.blackhole()
                if late:
                    await asyncio.sleep(TIMEOUT * 0.9)
                clock = Clock()
            clock.assert_in_time(GRACE if late else TIMEOUT)
            assert db.stats().in_use == 0


async def test_black_hole_at_the_close_of_a_connection(rows: FreshDatabase, driver: str) -> None:
    """What the pool does not keep is closed politely, on the time of whoever returns it."""

    def lose_the_goodbye(kind: str, _payload: bytes) -> Verdict:
        return Verdict.LOSE if kind == "X" else Verdict.FORWARD

    async with proxied(rows, driver, poolclass=NullPool) as (proxy, db):
        proxy.on_client_message = lose_the_goodbye
        clock = Clock()
        async with db.transaction(timeout=TIMEOUT) as session:
            await session.execute(WRITE)
        clock.assert_in_time()
        assert proxy.verdicts[Verdict.LOSE] == 1
        assert await rows.fetchval("SELECT count(*) FROM rows") == 1


async def test_a_deadline_in_force_bounds_the_commit_of_a_bare_connection(
    rows: FreshDatabase, driver: str
) -> None:
    """No session, hence no alarm: COMMIT keeps its own time."""
    async with proxied(rows, driver) as (proxy, db):
        proxy.on_client_message = at_commit(Verdict.LOSE)
        clock = Clock()
        with pytest.raises(CommitUnknown), under(Deadline.after(TIMEOUT, "test")):
            async with db.begin() as connection:
                await connection.execute(WRITE)
        clock.assert_in_time()
        assert proxy.verdicts[Verdict.LOSE] == 1


async def test_a_commit_that_comes_too_late_is_not_begun(rows: FreshDatabase, driver: str) -> None:
    """Its listener has used up the rest, and the loop had no turn to sever: nothing is stored, and that is known."""

    def dawdle(*_arguments: Any) -> None:
        time.sleep(TIMEOUT)

    async with proxied(rows, driver) as (proxy, db):
        with pytest.raises(DeadlinePassed, match="had passed before COMMIT was begun"):
            async with db.transaction(timeout=TIMEOUT) as session:
                event.listen(session.sync_session, "before_commit", dawdle)
                await session.execute(WRITE)
        assert [query for query in proxy.queries if "COMMIT" in query] == []
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0


async def test_a_listener_before_a_commit_is_bounded_too(rows: FreshDatabase, driver: str) -> None:
    """The COMMIT bounds itself; what a listener waits for before it would else be waited for without end."""
    async with Database(rows.url(driver), commit_timeout=TIMEOUT, close_timeout=TIMEOUT) as db:
        clock = Clock()
        with pytest.raises(SQLAlchemyError):
            async with db.transaction() as session:

                def sleep(each: Any) -> None:
                    each.execute(text("SELECT pg_sleep(60)"))

                event.listen(session.sync_session, "before_commit", sleep)
                await session.execute(WRITE)
        clock.assert_in_time(2 * TIMEOUT)
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0


async def test_a_connection_that_is_ready_too_late_is_not_used(rows: FreshDatabase, driver: str) -> None:
    """The deadline passes while a listener still prepares it, when the session has nothing in hand to sever."""
    async with proxied(rows, driver, warm=False) as (_, db):
        prepared: list[float] = []

        def prepare(*_arguments: Any) -> None:
            if not prepared:
                prepared.append(await_only(asyncio.sleep(TIMEOUT * 1.2, TIMEOUT)))

        event.listen(db.engine.sync_engine, "connect", prepare)
        clock = Clock()
        with pytest.raises(DeadlinePassed, match="its session does nothing more"):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
        clock.assert_in_time()
        assert prepared
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0


# Waiting for a connection ---------------------------------------------------------------------------------


async def test_waiting_for_a_connection_ends_at_the_deadline_and_names_it(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver, pool_size=1) as (_, db), db.session() as holder:
        await holder.execute(ONE)
        clock = Clock()
        with pytest.raises(
            PoolExhausted,
            match=r"came free within the 0\.60 s of transaction\(timeout=\) \(in_use 1 of 1",
        ):
            async with db.transaction(timeout=TIMEOUT) as session:
                await session.execute(WRITE)
        clock.assert_in_time()
        assert db.stats().waiting == 0


async def test_a_pool_timeout_that_is_shorter_is_named_itself(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver, pool_size=1, pool_timeout=0.2) as (_, db), db.session() as holder:
        await holder.execute(ONE)
        with pytest.raises(PoolExhausted, match=r"within 0\.20 s"):
            async with db.transaction(timeout=20) as session:
                await session.execute(WRITE)


# The first connection -------------------------------------------------------------------------------------


async def test_those_who_wait_for_the_first_connection_wait_no_longer_than_pool_timeout(
    rows: FreshDatabase, driver: str
) -> None:
    """One of a crowd opens it, on a server that falls silent after the login; SQLAlchemy's mutex kept all of them."""
    async with proxied(
        rows, driver, warm=False, pool_timeout=0.3, connect_timeout=1.2, close_timeout=0.2
    ) as (proxy, db):
        proxy.on_client_message = lose_all_but_the_password
        took: list[float] = []

        async def ask() -> None:
            clock = Clock()
            with pytest.raises(DatabaseUnavailable):
                async with db.session() as session:
                    await session.execute(ONE)
            took.append(clock.seconds)

        await asyncio.gather(*(ask() for _ in range(20)))
        assert proxy.connections == 1, "the others did not even try"
        assert sorted(took)[-2] < 0.3 + SLACK
        assert max(took) > 2.2, "the one who opened it had its own, longer limit"


async def test_the_right_to_open_the_first_connection_passes_on_when_it_fails(
    rows: FreshDatabase, driver: str
) -> None:
    """Each tries in turn, within its own deadline, until one succeeds; then there is room for all at once."""
    async with proxied(rows, driver, warm=False, pool_size=3, pool_timeout=20) as (proxy, db):
        proxy.deafen()

        async def give_up_first() -> None:
            async with db.transaction(timeout=0.2) as session:
                await session.execute(ONE)

        together = asyncio.Barrier(3)

        async def meet() -> None:
            async with db.session() as session:
                await session.execute(ONE)
                await together.wait()

        hasty = asyncio.create_task(give_up_first())
        await asyncio.sleep(0)
        patient = [asyncio.create_task(meet()) for _ in range(3)]
        clock = Clock()
        with pytest.raises(DatabaseUnavailable):
            await hasty
        assert proxy.connections == 1
        proxy.pass_through()
        await asyncio.wait_for(asyncio.gather(*patient), 10)
        clock.assert_in_time(2.0)


async def test_a_hundred_who_ask_a_dead_server_end_within_their_own_deadlines(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver, warm=False) as (proxy, db):
        proxy.deafen()
        took: list[float] = []

        async def ask() -> None:
            clock = Clock()
            with pytest.raises(DatabaseUnavailable):
                async with db.transaction(timeout=TIMEOUT) as session:
                    await session.execute(ONE)
            took.append(clock.seconds)

        await asyncio.gather(*(ask() for _ in range(100)))
        assert len(took) == 100
        assert max(took) < TIMEOUT + SLACK
        assert (db.stats().in_use, db.stats().waiting) == (0, 0)


# Afterwards -----------------------------------------------------------------------------------------------


async def test_after_the_deadline_every_use_raises_at_once_and_nothing_is_committed(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        with pytest.raises(DeadlinePassed, match="its session does nothing more"):
            async with db.transaction(timeout=0.2) as session:
                await session.execute(WRITE)
                await asyncio.sleep(0.3)
                proxy.forget()
                clock = Clock()
                for use in (
                    session.execute(ONE),
                    session.scalar(ONE),
                    session.connection(),
                    session.commit(),
                ):
                    with pytest.raises(DeadlinePassed):
                        await use
                assert clock.seconds < SLACK
        assert proxy.round_trips == 0
        assert await rows.fetchval("SELECT count(*) FROM rows") == 0


async def test_an_open_transaction_is_cut_off_at_the_deadline_though_nobody_uses_it(
    rows: FreshDatabase, driver: str
) -> None:
    """Its locks are gone on the server while the block still waits for something else."""
    async with proxied(rows, driver) as (_, db):
        with pytest.raises(DeadlinePassed, match="have passed"):
            async with db.transaction(timeout=0.2) as session:
                await session.execute(WRITE)
                await asyncio.sleep(0.3)
                await assert_nothing_left(rows)


async def test_work_committed_by_hand_before_the_deadline_stays_a_success(
    rows: FreshDatabase, driver: str
) -> None:
    async with proxied(rows, driver) as (proxy, db):
        async with db.transaction(timeout=0.3) as session:
            await session.execute(WRITE)
            await session.commit()
            await asyncio.sleep(0.4)
        assert proxy.connections == 0, "and its connection was not touched"
        assert await rows.fetchval("SELECT count(*) FROM rows") == 1


async def test_two_units_of_one_task_have_a_deadline_each(rows: FreshDatabase, driver: str) -> None:
    async with proxied(rows, driver) as (_, db):
        async with db.transaction(timeout=0.2):
            async with db.transaction(timeout=20) as other:
                await asyncio.sleep(0.3)
                await other.execute(WRITE)
            assert in_force() is None
        assert await rows.fetchval("SELECT count(*) FROM rows") == 1
