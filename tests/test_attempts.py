"""Work is done again as a whole where that may help, and never where it might then be stored twice."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import re
import socket
import sqlite3
import time
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from stanch import (
    Attempt,
    CommitRefused,
    CommitUnknown,
    ConfigError,
    Database,
    DatabaseClosed,
    DatabaseUnavailable,
    InsideTransaction,
    Kind,
    PoolExhausted,
    Retry,
    attempt_of,
    classify,
    rollback_only,
)
from stanch.deadlines import Deadline, in_force, under
from stanch.events import AttemptFailed, Event
from stanch.ledger import Ledger
from stanch.retry import MOST_ATTEMPTS
from stanch.sessions import guard_of
from tests.support import cleaned
from tests.support.judge import assert_nothing_left
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

ACCOUNTS = 10
OPENING = 100
SCHEMA = f"""
    CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL);
    INSERT INTO accounts SELECT id, {OPENING} FROM generate_series(1, {ACCOUNTS}) id;
    CREATE TABLE entries (key text PRIMARY KEY);
    CREATE TABLE shifts (team int, doctor int, on_call bool NOT NULL DEFAULT true, PRIMARY KEY (team, doctor));
"""

ENTER = text("INSERT INTO entries VALUES (:key)")
ENTER_ONCE = text("INSERT INTO entries VALUES (:key) ON CONFLICT DO NOTHING")
FAIL_WITH = "DO $$ BEGIN RAISE EXCEPTION 'planted' USING ERRCODE = '{state}'; END $$"

QUICK = Retry(attempts=3, base=0.001, cap=0.002)


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entries"
    key: Mapped[str] = mapped_column(primary_key=True)


@pytest.fixture
async def judged(fresh_database: FreshDatabase) -> FreshDatabase:
    await fresh_database.execute(SCHEMA)
    return fresh_database


@pytest.fixture
async def db(judged: FreshDatabase, driver: str) -> AsyncIterator[Database[AsyncSession]]:
    async with watched(judged, judged.url(driver)) as db:
        yield db


@asynccontextmanager
async def watched(judged: FreshDatabase, url: str, **settings: Any) -> AsyncGenerator[Database[AsyncSession]]:
    chosen: dict[str, Any] = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 10.0, "drain_timeout": 5}
    db = Database(url, **(chosen | settings))
    try:
        yield db
        await assert_nothing_left(judged, db)
    finally:
        await db.close()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jitter always draws zero."""

    def lower_bound(least: float, _most: float) -> float:
        return least

    monkeypatch.setattr(random, "uniform", lower_bound)


@pytest.fixture
def longest_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jitter always draws its upper bound."""

    def upper_bound(_least: float, most: float) -> float:
        return most

    monkeypatch.setattr(random, "uniform", upper_bound)


class Calls:
    """Work that enters a row, then does what it was told; it remembers its attempts, and its sessions by id."""

    def __init__(self, then: Callable[[AsyncSession], Awaitable[Any]], *, enter: Any = ENTER) -> None:
        self.then = then
        self.enter = enter
        self.seen: list[Attempt] = []
        self.sessions: list[AsyncSession] = []
        self.began: list[float] = []

    async def __call__(self, session: AsyncSession, key: str = "a") -> str:
        self.began.append(time.monotonic())
        self.seen.append(attempt_of(session))
        self.sessions.append(session)
        await session.execute(self.enter, {"key": key})
        await self.then(session)
        return key

    @property
    def count(self) -> int:
        return len(self.seen)


def failing(state: str, *, until: int = 99) -> Callable[[AsyncSession], Awaitable[None]]:
    """The server raises *state* in every attempt before the one numbered *until*."""

    async def fail(session: AsyncSession) -> None:
        if attempt_of(session).number < until:
            await session.execute(text(FAIL_WITH.format(state=state)))

    return fail


async def nothing(_session: AsyncSession) -> None:
    pass


async def entries(judged: FreshDatabase) -> list[str]:
    return [row["key"] for row in await judged.fetch("SELECT key FROM entries ORDER BY key")]


# What is done again -----------------------------------------------------------------------------------------


async def test_work_that_succeeds_is_done_once_and_its_answer_returned(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    work = Calls(nothing)
    assert await db.run_transaction(work, "b") == "b"
    assert work.seen == [Attempt(1, maybe_committed=False)]
    assert await entries(judged) == ["b"]


async def test_each_attempt_is_the_whole_work_in_a_session_of_its_own(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    work = Calls(failing("40001", until=3))
    assert await db.run_transaction(work, retry=QUICK) == "a"
    assert [attempt.number for attempt in work.seen] == [1, 2, 3]
    assert len({id(session) for session in work.sessions}) == 3
    assert {guard_of(session).ended_at is not None for session in work.sessions} == {True}
    assert await entries(judged) == ["a"]


@pytest.mark.parametrize("state", ["40001", "40P01", "57P01", "57P03", "53300", "08006"])
async def test_conflicts_and_lost_connections_are_done_again(
    db: Database[AsyncSession], judged: FreshDatabase, state: str
) -> None:
    work = Calls(failing(state, until=2))
    assert await db.run_transaction(work, retry=QUICK) == "a"
    assert work.count == 2
    assert await entries(judged) == ["a"]


@pytest.mark.parametrize(
    "state",
    [
        "23505",
        "23503",
        "23502",
        "22001",
        "22012",
        "42P01",
        "42601",
        "57014",
        "55P03",
        "25006",
        "25P03",
        "25P04",
    ],
)
async def test_what_another_attempt_cannot_mend_is_raised_at_once(
    db: Database[AsyncSession], judged: FreshDatabase, state: str
) -> None:
    work = Calls(failing(state))
    with pytest.raises(DBAPIError) as raised:
        await db.run_transaction(work, retry=QUICK)
    failure = classify(raised.value)
    assert failure is not None
    assert failure.sqlstate == state
    assert not hasattr(raised.value, "__notes__")
    assert work.count == 1
    assert await entries(judged) == []


async def test_an_error_of_the_works_own_is_raised_at_once(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async def fail(_session: AsyncSession) -> None:
        raise LookupError("mine")

    work = Calls(fail)
    with pytest.raises(LookupError, match="mine"):
        await db.run_transaction(work, retry=QUICK)
    assert work.count == 1
    assert await entries(judged) == []


async def test_a_swallowed_conflict_is_refused_at_commit_and_not_repeated(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async def swallow(session: AsyncSession) -> None:
        with pytest.raises(DBAPIError):
            await failing("40001")(session)

    work = Calls(swallow)
    with pytest.raises(CommitRefused):
        await db.run_transaction(work, retry=QUICK)
    assert work.count == 1
    assert await entries(judged) == []


async def test_a_conflict_that_shows_only_at_commit_is_done_again(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    """Two doctors go off call, each seeing the other on call: both have done all their work when one is refused."""
    await judged.execute("INSERT INTO shifts SELECT 1, doctor FROM generate_series(1, 2) doctor")
    both_done = asyncio.Barrier(2)
    done: list[int] = []

    async def go_off_call(session: AsyncSession, doctor: int) -> bool:
        others = await session.scalar(
            text("SELECT count(*) FROM shifts WHERE team = 1 AND on_call AND doctor <> :me"), {"me": doctor}
        )
        if others:
            await session.execute(
                text("UPDATE shifts SET on_call = false WHERE doctor = :me"), {"me": doctor}
            )
        done.append(doctor)
        if attempt_of(session).number == 1:
            async with asyncio.timeout(10):
                await both_done.wait()
        return bool(others)

    allowed = await asyncio.gather(
        *(
            db.run_transaction(go_off_call, doctor, retry=QUICK, isolation_level="SERIALIZABLE")
            for doctor in (1, 2)
        )
    )
    assert sorted(allowed) == [False, True]
    assert len(done) == 3
    assert await judged.fetchval("SELECT count(*) FROM shifts WHERE on_call") == 1


async def test_a_connection_that_is_killed_in_mid_transaction_costs_one_more_attempt(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    killed: list[int] = []

    async def be_killed(session: AsyncSession) -> None:
        if attempt_of(session).number == 1:
            killed.append(await session.scalar(text("SELECT pg_backend_pid()")))
            assert await judged.fetchval("SELECT pg_terminate_backend($1, 5000)", killed[0])
        await session.execute(text("SELECT 1"))

    work = Calls(be_killed)
    assert await db.run_transaction(work, retry=QUICK) == "a"
    assert (work.count, len(killed)) == (2, 1)
    assert work.seen[1] == Attempt(2, maybe_committed=False)
    assert await entries(judged) == ["a"]


async def test_a_connection_that_died_before_commit_was_sent_costs_one_more_attempt(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    """The work has ended well; that the connection is gone shows as COMMIT is about to be written."""

    async def be_cut(session: AsyncSession) -> None:
        if attempt_of(session).number == 1:
            connection = await session.connection()
            raw = await connection.get_raw_connection()
            db.driver.sever(raw.driver_connection)

    work = Calls(be_cut)
    assert await db.run_transaction(work, retry=QUICK) == "a"
    assert work.count == 2
    assert await entries(judged) == ["a"]


async def test_a_server_that_is_not_there_is_asked_again(driver: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        db = Database(f"postgresql+{driver}://u:p@127.0.0.1:{nobody.getsockname()[1]}/d")
        work = Calls(nothing)
        with pytest.raises(DatabaseUnavailable) as raised:
            await db.run_transaction(work, retry=QUICK)
        await db.close()
    assert work.count == 3
    assert raised.value.__notes__ == [
        "attempt 1 of 3: DatabaseUnavailable",
        "attempt 2 of 3: DatabaseUnavailable",
    ]


async def test_a_full_pool_is_not_asked_again(judged: FreshDatabase, driver: str) -> None:
    async with watched(judged, judged.url(driver), pool_size=1, pool_timeout=0.05) as db:
        taken, enough = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with db.connect():
                taken.set()
                await enough.wait()

        holder = asyncio.create_task(hold())
        await taken.wait()
        work = Calls(nothing)
        with pytest.raises(PoolExhausted):
            await db.run_transaction(work, retry=QUICK)
        enough.set()
        await holder
    assert work.count == 1


async def test_a_closed_database_is_not_asked_again(judged: FreshDatabase, driver: str) -> None:
    told: list[Event] = []
    db = Database(judged.url(driver))
    db.observe(told.append)
    await db.open()
    await db.close()
    work = Calls(nothing)
    with pytest.raises(DatabaseClosed):
        await db.run_transaction(work, retry=QUICK)
    assert (work.count, told) == (0, [])


async def test_a_busy_sqlite_file_is_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    writer = sqlite3.connect(file, isolation_level=None)
    writer.execute("CREATE TABLE entries (key text PRIMARY KEY)")
    writer.execute("BEGIN IMMEDIATE")
    db = Database(f"sqlite+aiosqlite:///{file}", lock_timeout=0.02)

    def make_way(event: Event) -> None:
        if isinstance(event, AttemptFailed):
            writer.execute("ROLLBACK")

    db.observe(make_way)
    work = Calls(nothing)
    assert await db.run_transaction(work, retry=QUICK) == "a"
    await db.close()
    assert work.count == 2
    assert writer.execute("SELECT key FROM entries").fetchall() == [("a",)]
    writer.close()


# What might be stored ---------------------------------------------------------------------------------------


@asynccontextmanager
async def losing_the_answer(
    judged: FreshDatabase, driver: str
) -> AsyncGenerator[tuple[Database[AsyncSession], FaultProxy]]:
    """The answer to the first COMMIT that the work's own transaction sends is lost; the server has committed."""
    async with (
        FaultProxy(judged.server.port) as proxy,
        watched(judged, proxy.through(judged.url(driver))) as db,
    ):
        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))  # what a driver asks of a new connection is over
        proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
        yield db, proxy
        assert proxy.verdicts[Verdict.CUT_ANSWER] == 1


async def test_an_unknown_commit_is_never_done_again(judged: FreshDatabase, driver: str) -> None:
    async with losing_the_answer(judged, driver) as (db, _):
        work = Calls(nothing)
        with pytest.raises(CommitUnknown):
            await db.run_transaction(work, retry=QUICK)
    assert work.count == 1
    assert await entries(judged) == ["a"]


async def test_after_an_unknown_commit_idempotent_work_is_done_again_and_told(
    judged: FreshDatabase, driver: str
) -> None:
    async with losing_the_answer(judged, driver) as (db, _):
        work = Calls(nothing, enter=ENTER_ONCE)
        retry = Retry(base=0.001, idempotent=True)
        assert await db.run_transaction(work, retry=retry) == "a"
    assert work.seen == [Attempt(1, maybe_committed=False), Attempt(2, maybe_committed=True)]
    assert await entries(judged) == ["a"]


async def test_a_later_failure_does_not_make_an_unknown_commit_known(
    judged: FreshDatabase, driver: str
) -> None:
    """The row is there. To say "conflict" would be as wrong as to say "failed"."""
    async with losing_the_answer(judged, driver) as (db, _):
        work = Calls(nothing, enter=ENTER)
        with pytest.raises(CommitUnknown) as raised:
            await db.run_transaction(work, retry=Retry(base=0.001, idempotent=True))
    assert work.count == 2
    first, second = raised.value.__notes__
    assert first.startswith("attempt 1 of 3: CommitUnknown")
    assert second == "attempt 2 of 3: IntegrityError, SQLSTATE 23505"
    assert await entries(judged) == ["a"]


async def test_what_the_work_itself_says_after_an_unknown_commit_is_its_answer(
    judged: FreshDatabase, driver: str
) -> None:
    async def look(session: AsyncSession) -> None:
        if attempt_of(session).maybe_committed:
            raise LookupError("it is there")

    async with losing_the_answer(judged, driver) as (db, _):
        with pytest.raises(LookupError, match="it is there"):
            await db.run_transaction(Calls(look, enter=ENTER_ONCE), retry=Retry(base=0.001, idempotent=True))


@pytest.mark.parametrize("idempotent", [False, True])
async def test_an_attempt_that_has_committed_by_hand_is_done_again_only_if_that_does_no_harm(
    db: Database[AsyncSession], judged: FreshDatabase, idempotent: bool
) -> None:
    async def commit_then_fail(session: AsyncSession) -> None:
        await session.commit()
        await failing("40001", until=2)(session)

    work = Calls(commit_then_fail, enter=ENTER_ONCE)
    once = db.run_transaction(work, retry=Retry(base=0.001, idempotent=idempotent))
    if idempotent:
        assert await once == "a"
        assert work.seen == [Attempt(1, maybe_committed=False), Attempt(2, maybe_committed=True)]
    else:
        with pytest.raises(DBAPIError):
            await once
        assert work.count == 1
    assert await entries(judged) == ["a"]


async def test_a_released_savepoint_is_no_commit(db: Database[AsyncSession], judged: FreshDatabase) -> None:
    async def nest_then_fail(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.execute(ENTER, {"key": "nested"})
        await failing("40001", until=2)(session)

    work = Calls(nest_then_fail)
    assert await db.run_transaction(work, retry=QUICK) == "a"
    assert work.count == 2
    assert await entries(judged) == ["a", "nested"]


# How often, and for how long --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(("retry", "attempts"), [(1, 1), (5, 5), (Retry(attempts=2), 2)])
async def test_retry_counts_all_attempts(
    db: Database[AsyncSession], retry: Retry | int, attempts: int
) -> None:
    work = Calls(failing("40001"))
    with pytest.raises(DBAPIError):
        await db.run_transaction(work, retry=retry)
    assert work.count == attempts


async def test_the_last_error_is_raised_itself_with_the_earlier_ones_as_notes(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    states = ["40001", "40P01", "23505"]

    async def fail(session: AsyncSession) -> None:
        await session.execute(text(FAIL_WITH.format(state=states[attempt_of(session).number - 1])))

    with pytest.raises(IntegrityError) as raised:
        await db.run_transaction(Calls(fail), "hunter2", retry=QUICK)
    notes = raised.value.__notes__
    assert [note.partition(",")[2] for note in notes] == [" SQLSTATE 40001", " SQLSTATE 40P01"]
    assert [note.partition(":")[0] for note in notes] == ["attempt 1 of 3", "attempt 2 of 3"]
    assert "hunter2" not in "".join(notes)
    assert await entries(judged) == []


async def test_the_unmended_conflict_keeps_its_meaning(db: Database[AsyncSession]) -> None:
    with pytest.raises(DBAPIError) as raised:
        await db.run_transaction(Calls(failing("40001")), retry=QUICK)
    failure = classify(raised.value)
    assert failure is not None
    assert failure.kind is Kind.CONTENTION


@pytest.mark.usefixtures("longest_pauses")
async def test_attempts_are_paused_between_and_observers_are_told(db: Database[AsyncSession]) -> None:
    told: list[Event] = []
    db.observe(told.append)
    work = Calls(failing("40001"))
    with pytest.raises(DBAPIError):
        await db.run_transaction(work, retry=Retry(attempts=4, base=0.02, cap=0.06))
    failed = [event for event in told if isinstance(event, AttemptFailed)]
    assert [event.pause for event in failed] == [0.04, 0.06, 0.06]
    assert [event.attempt for event in failed] == [1, 2, 3]
    gaps = [later - earlier for earlier, later in pairwise(work.began)]
    assert all(gap >= event.pause for gap, event in zip(gaps, failed, strict=True))
    assert "SQLSTATE 40001" in str(failed[0])


@pytest.mark.usefixtures("longest_pauses")
async def test_no_attempt_begins_after_the_deadline_and_nobody_waits_for_it(
    db: Database[AsyncSession],
) -> None:
    work = Calls(failing("40001"))
    began = time.monotonic()
    with pytest.raises(DBAPIError) as raised:
        await db.run_transaction(work, retry=Retry(attempts=100, timeout=0.3, base=0.05, cap=0.05))
    assert time.monotonic() - began < 4, "a hundred pauses take five seconds"
    # Counted by the pauses, all of which have their full length: a machine that is slow makes fewer attempts.
    assert 1 <= work.count <= 6
    assert len(raised.value.__notes__) == work.count - 1


@pytest.mark.usefixtures("longest_pauses")
async def test_a_pause_that_would_outlast_the_deadline_is_not_begun(db: Database[AsyncSession]) -> None:
    work = Calls(failing("40001"))
    async with asyncio.timeout(2):
        with pytest.raises(DBAPIError):
            await db.run_transaction(work, retry=Retry(timeout=5, base=10, cap=10))
    assert work.count == 1


async def test_the_sessions_are_told_the_deadline_of_all_attempts(db: Database[AsyncSession]) -> None:
    seen: list[Deadline | None] = []

    async def look(session: AsyncSession) -> None:
        seen.extend((guard_of(session).deadline, in_force()))

    await db.run_transaction(look, retry=Retry(timeout=5.0))
    assert seen[0] is not None
    assert seen[0] is seen[1]
    assert seen[0].timeout == 5.0
    with under(Deadline.after(1.0, "the request")):
        await db.run_transaction(look, retry=Retry(timeout=5.0))
    assert seen[2] is not None
    assert seen[2].source == "the request"
    await db.run_transaction(look)
    assert seen[4:] == [None, None]


@pytest.mark.usefixtures("longest_pauses")
async def test_a_cancellation_in_a_pause_ends_it_at_once(db: Database[AsyncSession]) -> None:
    pausing = asyncio.Event()
    db.observe(lambda event: pausing.set() if isinstance(event, AttemptFailed) else None)
    work = Calls(failing("40001"))
    task = asyncio.create_task(db.run_transaction(work, retry=Retry(base=30, cap=30)))
    async with asyncio.timeout(5):
        await pausing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert work.count == 1


async def test_a_cancellation_in_the_work_ends_it_at_once(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    inside = asyncio.Event()

    async def wait(_session: AsyncSession) -> None:
        inside.set()
        await asyncio.Event().wait()

    work = Calls(wait)
    task = asyncio.create_task(db.run_transaction(work, retry=QUICK))
    async with asyncio.timeout(5):
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert work.count == 1
    assert await entries(judged) == []


async def test_rollback_only_gives_the_answer_and_stores_nothing(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async def mark(session: AsyncSession) -> None:
        rollback_only(session)

    assert await db.run_transaction(Calls(mark)) == "a"
    assert await entries(judged) == []


async def test_a_complaint_about_the_work_names_it_and_who_called(db: Database[AsyncSession]) -> None:
    async def whose(session: AsyncSession) -> str:
        await failing("40001", until=2)(session)
        return guard_of(session).holder

    holder = await db.run_transaction(whose, retry=QUICK)
    assert re.fullmatch(r"\S+whose\(\) from test_attempts\.py:\d+ in test_a_complaint\w+\(\)", holder)
    assert (await asyncio.create_task(db.run_transaction(whose, retry=QUICK))).endswith("whose()")


async def test_the_isolation_level_is_that_of_each_attempt(db: Database[AsyncSession]) -> None:
    async def level(session: AsyncSession) -> str:
        await failing("40001", until=2)(session)
        return str(await session.scalar(text("SHOW transaction_isolation")))

    assert await db.run_transaction(level, retry=QUICK, isolation_level="SERIALIZABLE") == "serializable"
    assert await db.run_transaction(level, retry=QUICK) == "read committed"


# Inside a transaction ---------------------------------------------------------------------------------------


async def test_a_task_that_holds_a_connection_is_refused(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    work = Calls(nothing)
    async with db.session() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(InsideTransaction, match=r"test_attempts\.py:\d+") as refused:
            await db.run_transaction(work)
        assert "release(session)" in str(refused.value)
        await session.commit()
        await db.run_transaction(work, "after the commit")
    async with db.connect():
        with pytest.raises(InsideTransaction):
            await db.run_transaction(work)
    assert await entries(judged) == ["after the commit"]


async def test_work_inside_other_work_is_refused_whether_or_not_that_holds_a_connection_yet(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    inner = Calls(nothing)

    async def outer(_session: AsyncSession) -> str:
        return await db.run_transaction(inner)

    with pytest.raises(InsideTransaction, match="another run_transaction"):
        await db.run_transaction(outer)
    assert inner.count == 0
    assert await db.run_transaction(inner) == "a"
    assert await entries(judged) == ["a"]


async def test_the_books_know_what_a_task_has_held_for_longest() -> None:
    moments = iter(range(10))
    ledger = Ledger[object](pool_size=5, max_overflow=0, clock=lambda: next(moments))
    ledger.open_up(new=object)
    mine = asyncio.current_task()
    assert ledger.held_by(mine) is None
    _others, first, _second = (ledger.take(task, new=object) for task in (None, mine, mine))
    held = ledger.held_by(mine)
    assert held is not None
    assert (held.task, held.since) == (mine, 1)
    assert first is not None
    ledger.give_back(first, usable=True)
    assert (held := ledger.held_by(mine)) is not None
    assert held.since == 2


async def test_other_tasks_and_other_databases_are_not_inside(
    db: Database[AsyncSession], judged: FreshDatabase, driver: str
) -> None:
    async with watched(judged, judged.url(driver)) as other, db.transaction() as session:
        await session.execute(text("SELECT 1"))
        assert await other.run_transaction(Calls(nothing), "other database") == "other database"
        async with asyncio.TaskGroup() as group:
            group.create_task(db.run_transaction(Calls(nothing), "other task"))

        async def elsewhere(_session: AsyncSession) -> str:
            return await other.run_transaction(Calls(nothing), "other work")

        async with asyncio.TaskGroup() as group:
            group.create_task(db.run_transaction(elsewhere))
    assert await entries(judged) == ["other database", "other task", "other work"]


async def test_with_an_engine_whose_pool_is_not_ours_only_nested_work_is_refused(
    judged: FreshDatabase, driver: str
) -> None:
    async with watched(judged, judged.url(driver)) as owner:
        beside = Database(owner.engine, adopt=False)

        async def outer(_session: AsyncSession) -> str:
            return await beside.run_transaction(Calls(nothing))

        with pytest.raises(InsideTransaction):
            await beside.run_transaction(outer)
        assert await beside.run_transaction(Calls(nothing)) == "a"


# Services ---------------------------------------------------------------------------------------------------


async def test_a_transactional_function_is_called_without_its_session(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    numbers: list[int] = []

    @db.transactional(retry=QUICK)
    async def enter(session: AsyncSession, key: str, *, again: int = 1) -> str:
        """Enters."""
        numbers.append(attempt_of(session).number)
        await session.execute(ENTER, {"key": key})
        await failing("40001", until=again)(session)
        return key * 2

    assert await enter("a", again=2) == "aa"
    assert await enter("b") == "bb"
    assert numbers == [1, 2, 1]
    assert (enter.__name__, enter.__doc__) == ("enter", "Enters.")
    assert list(inspect.signature(enter).parameters) == ["key", "again"]
    assert inspect.iscoroutinefunction(enter)
    assert await entries(judged) == ["a", "b"]


async def test_a_partial_function_and_a_lambda_are_work_too(db: Database[AsyncSession]) -> None:
    async def add(session: AsyncSession, a: int, *, b: int) -> int:
        return a + b + int(await session.scalar(text("SELECT 1")) or 0)

    assert await db.run_transaction(functools.partial(add, b=3), 1) == 5
    assert await db.run_transaction(lambda session: add(session, 1, b=2)) == 4


# What is refused at once ------------------------------------------------------------------------------------


def sync_work(_session: AsyncSession) -> int:
    return 1


async def async_work(_session: AsyncSession) -> int:
    return 1


async def generating_work(_session: AsyncSession) -> AsyncGenerator[int]:
    yield 1


@pytest.mark.parametrize("work", [None, 5, "work", sync_work, generating_work])
async def test_what_is_no_async_function_is_refused(db: Database[AsyncSession], work: Any) -> None:
    with pytest.raises(ConfigError, match="expected an async function"):
        await db.run_transaction(work)
    assert db.stats().size == 0


async def test_a_coroutine_is_refused_and_does_not_complain_of_never_being_awaited(
    db: Database[AsyncSession], judged: FreshDatabase
) -> None:
    async with db.session() as session:
        work: Any = async_work(session)
        with pytest.raises(ConfigError, match=r"the coroutine of async_work\(\)"):
            await db.run_transaction(work)


async def no_session(*, key: str) -> str:
    return key


@pytest.mark.parametrize("function", [None, sync_work, generating_work, no_session])
def test_a_function_that_cannot_be_transactional_is_refused_when_it_is_decorated(function: Any) -> None:
    db = Database("sqlite+aiosqlite://")
    with pytest.raises(ConfigError, match="transactional"):
        db.transactional()(function)


@pytest.mark.parametrize(
    "options",
    [
        *({"attempts": wrong} for wrong in (0, -1, True, 2.0, "3", None, MOST_ATTEMPTS + 1, float("nan"))),
        *({"timeout": wrong} for wrong in (0, -1, True, "3", float("nan"), float("inf"))),
        *({"base": wrong} for wrong in (0, -1, True, None, float("nan"))),
        *({"cap": wrong} for wrong in (0, None, float("inf"))),
        *({"idempotent": wrong} for wrong in (1, None, "false")),
        {"base": 0.5, "cap": 0.1},
    ],
    ids=str,
)
def test_a_retry_is_judged_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        Retry(**options)
    assert next(iter(options)) in refused.value.what
    assert refused.value.remedies


@pytest.mark.parametrize("retry", [0, True, None, "5", 2.5])
async def test_a_number_of_attempts_is_judged_before_anything_runs(
    db: Database[AsyncSession], retry: Any
) -> None:
    work = Calls(nothing)
    with pytest.raises(ConfigError, match="attempts"):
        await db.run_transaction(work, retry=retry)
    with pytest.raises(ConfigError, match="attempts"):
        db.transactional(retry=retry)
    assert work.count == 0


def test_a_misspelt_isolation_level_is_refused_when_the_service_is_defined() -> None:
    db = Database("sqlite+aiosqlite://")
    with pytest.raises(ConfigError, match="isolation_level"):
        db.transactional(isolation_level="SERIALISABLE")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]  # the subject


# The decision, without a database ---------------------------------------------------------------------------

CONFLICT = DBAPIError("", None, type("Conflict", (Exception,), {"sqlstate": "40001"})())


def test_pauses_grow_to_their_cap_and_are_drawn_anew_each_time() -> None:
    retry = Retry(attempts=MOST_ATTEMPTS, base=0.1, cap=0.8)
    draws = [
        [retry.pause_before(Attempt(number), CONFLICT, draw=random.Random(seed)) or 0.0 for seed in range(50)]
        for number in range(2, MOST_ATTEMPTS + 1)
    ]
    ceilings = [0.2, 0.4, *([0.8] * (len(draws) - 2))]
    for drawn, ceiling in zip(draws, ceilings, strict=True):
        assert ceiling * 0.9 < max(drawn) <= ceiling
        assert 0 <= min(drawn) < ceiling * 0.1
        assert len(set(drawn)) == 50


def test_what_may_be_stored_is_attempted_again_only_if_it_is_idempotent() -> None:
    after = Attempt().after(CommitUnknown("lost"), committed=False)
    assert after == Attempt(2, maybe_committed=True)
    assert after.after(CONFLICT, committed=False) == Attempt(3, maybe_committed=True)
    assert Retry().pause_before(after, CommitUnknown("lost")) is None
    assert Retry(idempotent=True).pause_before(after, CommitUnknown("lost")) is not None
    assert Attempt().after(CONFLICT, committed=True) == Attempt(2, maybe_committed=True)


# Under contention -------------------------------------------------------------------------------------------

TRANSFERS = 200
AT_ONCE = 20


async def transfer(session: AsyncSession, source: int, target: int, key: str) -> None:
    balances = {
        row.id: row.balance
        for row in await session.execute(
            text("SELECT id, balance FROM accounts WHERE id IN (:source, :target)"),
            {"source": source, "target": target},
        )
    }
    set_balance = text("UPDATE accounts SET balance = :balance WHERE id = :id")
    await session.execute(set_balance, {"id": source, "balance": balances[source] - 1})
    await session.execute(set_balance, {"id": target, "balance": balances[target] + 1})
    session.add(Entry(key=key))


@pytest.mark.slow
async def test_two_hundred_transfers_are_acknowledged_or_clearly_refused_and_the_sum_is_exact(
    judged: FreshDatabase, driver: str
) -> None:
    """Each sets balances it has read before: what is lost or done twice changes the sum."""
    chance = random.Random(7)
    async with watched(judged, judged.url(driver), pool_size=AT_ONCE) as db:
        conflicts: list[Event] = []
        db.observe(conflicts.append)
        acknowledged: list[str] = []
        refused: list[BaseException] = []
        queue = [
            (source, target, f"t{number}")
            for number in range(TRANSFERS)
            for source, target in [chance.sample(range(1, ACCOUNTS + 1), 2)]
        ]

        async def one_by_one() -> None:
            while queue:
                source, target, key = queue.pop()
                try:
                    await db.run_transaction(
                        transfer, source, target, key, retry=Retry(attempts=8), isolation_level="SERIALIZABLE"
                    )
                except Exception as error:
                    refused.append(error)
                else:
                    acknowledged.append(key)

        await asyncio.gather(*(one_by_one() for _ in range(AT_ONCE)))
    print(f"{driver}: {len(acknowledged)} acknowledged, {len(refused)} refused, {len(conflicts)} conflicts")
    assert len(acknowledged) + len(refused) == TRANSFERS
    assert len(acknowledged) > TRANSFERS * 0.75
    assert len(conflicts) > TRANSFERS // 10, "there was no contention"
    assert all((failure := classify(error)) and failure.kind is Kind.CONTENTION for error in refused)
    assert await entries(judged) == sorted(acknowledged)
    assert await judged.fetchval("SELECT sum(balance) FROM accounts") == ACCOUNTS * OPENING


PAIRS = 40


@pytest.mark.slow
async def test_forty_pairs_that_lock_two_rows_in_two_orders_all_succeed(
    judged: FreshDatabase, driver: str
) -> None:
    await judged.execute(
        f"ALTER DATABASE \"{judged.name}\" SET deadlock_timeout = '20ms';"
        "TRUNCATE accounts;"
        f"INSERT INTO accounts SELECT id, 0 FROM generate_series(1, {2 * PAIRS}) id"
    )
    async with watched(judged, judged.url(driver), pool_size=10) as db:
        deadlocks: list[Event] = []
        db.observe(deadlocks.append)

        async def add(session: AsyncSession, first: int, second: int, both: asyncio.Barrier) -> None:
            for place, row in enumerate((first, second)):
                if place == 1 and attempt_of(session).number == 1:
                    async with asyncio.timeout(10):
                        await both.wait()
                await session.execute(
                    text("UPDATE accounts SET balance = balance + 1 WHERE id = :id"), {"id": row}
                )

        async def pair(number: int) -> None:
            one, other, both = 2 * number + 1, 2 * number + 2, asyncio.Barrier(2)
            async with asyncio.TaskGroup() as group:
                group.create_task(db.run_transaction(add, one, other, both, retry=5))
                group.create_task(db.run_transaction(add, other, one, both, retry=5))

        for batch in range(0, PAIRS, 5):
            await asyncio.gather(*(pair(number) for number in range(batch, batch + 5)))
    states = [event.reason for event in deadlocks if isinstance(event, AttemptFailed)]
    print(f"{driver}: {PAIRS} pairs, {len(states)} deadlocks")
    assert len(states) >= PAIRS, "the pairs did not meet"
    assert all(reason.endswith("40P01") for reason in states)
    assert await judged.fetchval("SELECT count(*) FROM accounts WHERE balance = 2") == 2 * PAIRS


async def test_objects_of_the_answer_stay_usable(db: Database[AsyncSession]) -> None:
    async def load(session: AsyncSession) -> Entry:
        session.add(Entry(key="x"))
        await session.flush()
        return (await session.scalars(select(Entry))).one()

    assert (await db.run_transaction(load)).key == "x"
