"""Callbacks for the end of a transaction: when they run, in which order, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_session

from stanch import (
    CommitRefused,
    CommitUnknown,
    Database,
    WriteRefused,
    after_rollback,
    atomic,
    on_commit,
    rollback_only,
)
from stanch.events import HookFailed
from stanch.testing import captured_hooks
from tests.support import cleaned
from tests.support.judge import until
from tests.support.numbers import Number, Numbers, put
from tests.support.proxy import FaultProxy, Verdict, at_commit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
    from pathlib import Path

    from tests.support.judge import FreshDatabase

    Work = Callable[[AsyncSession], Awaitable[None]]
    Committing = Callable[[Numbers, Work], Coroutine[Any, Any, None]]

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

SLOW_COMMIT = """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1.2); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON numbers DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait();
"""
"""From now on COMMIT of an insert takes 1.2 seconds, longer than a callback may."""


@pytest.fixture(
    params=[
        "asyncpg",
        pytest.param("psycopg", marks=pytest.mark.psycopg),
        pytest.param("sqlite", marks=pytest.mark.sqlite),
    ]
)
async def numbers(
    fresh_database: FreshDatabase, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncGenerator[Numbers]:
    """On each backend; a callback can write only if nobody holds the one connection of the pool meanwhile."""
    numbers = Numbers(fresh_database, tmp_path / "numbers.db", str(request.param))
    numbers.db = numbers.database(pool_size=1, hook_timeout=1.0)
    await numbers.create()
    async with numbers.db:
        yield numbers
        await numbers.assert_clean()


on_postgres = pytest.mark.parametrize("numbers", ["asyncpg", "psycopg"], indirect=True)


class Diary:
    """What ran, in order; each callback has looked at what was stored, and whether the connection was free."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self.ran: list[Any] = []
        self.saw: list[list[int]] = []

    async def look(self, what: Any) -> None:
        self.ran.append(what)
        assert self._numbers.db.stats().in_use == 0
        self.saw.append(await self._numbers.stored())

    def note(self, what: Any) -> None:
        self.ran.append(what)


@pytest.fixture
def diary(numbers: Numbers) -> Diary:
    return Diary(numbers)


# Every way to commit ----------------------------------------------------------------------------------------


async def _by_transaction(numbers: Numbers, work: Work) -> None:
    async with numbers.db.transaction() as session:
        await work(session)


async def _by_hand(numbers: Numbers, work: Work) -> None:
    async with numbers.db.session() as session:
        await work(session)
        await session.commit()


async def _by_session_begin(numbers: Numbers, work: Work) -> None:
    async with numbers.db.session() as session, session.begin():
        await work(session)


async def _by_sessionmaker_begin(numbers: Numbers, work: Work) -> None:
    async with numbers.db.session_factory.begin() as session:
        await work(session)


async def _by_run_sync(numbers: Numbers, work: Work) -> None:
    async with numbers.db.session() as session:
        await work(session)
        await session.run_sync(lambda each: each.commit())


async def _by_atomic(numbers: Numbers, work: Work) -> None:
    async with numbers.db.session() as session, atomic(session):
        await work(session)


async def _by_run_transaction(numbers: Numbers, work: Work) -> None:
    await numbers.db.run_transaction(work)


async def _by_begun_transaction(numbers: Numbers, work: Work) -> None:
    async with numbers.db.session() as session:
        transaction = await session.begin()
        await work(session)
        await transaction.commit()


WAYS: dict[str, Committing] = {
    "db.transaction()": _by_transaction,
    "session.commit()": _by_hand,
    "session.begin()": _by_session_begin,
    "sessionmaker.begin()": _by_sessionmaker_begin,
    "run_sync": _by_run_sync,
    "atomic()": _by_atomic,
    "run_transaction()": _by_run_transaction,
    "transaction.commit()": _by_begun_transaction,
}

each_way = pytest.mark.parametrize("committing", WAYS.values(), ids=WAYS)


@each_way
async def test_callbacks_run_in_order_after_the_commit_holding_nothing(
    numbers: Numbers, diary: Diary, committing: Committing
) -> None:
    async def work(session: AsyncSession) -> None:
        on_commit(session, diary.note, "first")
        await put(session, 1)
        on_commit(session, diary.look, "second")
        await put(session, 2)
        on_commit(session, diary.note, what="third")
        on_commit(session, diary.look, "fourth")
        assert diary.ran == []

    await committing(numbers, work)
    assert diary.ran == ["first", "second", "third", "fourth"]
    assert diary.saw == [[1, 2], [1, 2]]
    assert numbers.told == []


@each_way
async def test_a_callback_may_open_units_of_its_own(numbers: Numbers, committing: Committing) -> None:
    """The pool has one connection."""

    async def receipt(number: int) -> None:
        async with numbers.db.transaction() as own:
            await put(own, number)

    async def work(session: AsyncSession) -> None:
        await put(session, 1)
        on_commit(session, receipt, 2)

    await committing(numbers, work)
    assert await numbers.stored() == [1, 2]
    assert numbers.told == []


@each_way
async def test_callbacks_of_savepoints_wait_for_the_outermost_commit(
    numbers: Numbers, diary: Diary, committing: Committing
) -> None:
    async def work(session: AsyncSession) -> None:
        on_commit(session, diary.look, "outside")
        async with session.begin_nested():
            await put(session, 1)
            on_commit(session, diary.look, "inside")
            async with atomic(session):
                on_commit(session, diary.look, "deep inside")
        on_commit(session, diary.look, "outside again")
        assert diary.ran == []

    await committing(numbers, work)
    assert diary.ran == ["outside", "inside", "deep inside", "outside again"]
    assert diary.saw == [[1]] * 4


@each_way
async def test_a_rolled_back_savepoint_drops_its_callbacks_and_tells_those_that_wait_for_it(
    numbers: Numbers, diary: Diary, committing: Committing
) -> None:
    """They run at the end of the outermost transaction, which holds the connection until then."""

    async def work(session: AsyncSession) -> None:
        await put(session, 1)
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                await put(session, 2)
                on_commit(session, diary.look, "dropped")
                async with atomic(session):
                    on_commit(session, diary.look, "dropped with the outer one")
                    after_rollback(session, diary.look, "undone with the outer one")
                after_rollback(session, diary.look, "undone")
                raise ZeroDivisionError
        on_commit(session, diary.look, "stored")
        after_rollback(session, diary.look, "never")
        assert diary.ran == []

    await committing(numbers, work)
    assert diary.ran == ["undone with the outer one", "undone", "stored"]
    assert diary.saw == [[1]] * 3


@each_way
async def test_a_rollback_drops_callbacks_and_runs_those_that_wait_for_it(
    numbers: Numbers, diary: Diary, committing: Committing
) -> None:
    async def work(session: AsyncSession) -> None:
        await put(session, 1)
        on_commit(session, diary.look, "dropped")
        after_rollback(session, diary.look, "undone")
        async with session.begin_nested():
            after_rollback(session, diary.look, "undone as well")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await committing(numbers, work)
    assert diary.ran == ["undone", "undone as well"]
    assert diary.saw == [[], []]


@each_way
async def test_a_callback_that_was_given_with_nothing_begun_runs_at_the_commit(
    numbers: Numbers, diary: Diary, committing: Committing
) -> None:
    async def work(session: AsyncSession) -> None:
        on_commit(session, diary.look, "ran")

    await committing(numbers, work)
    assert diary.ran == ["ran"]


async def test_a_commit_that_the_server_refuses_runs_what_waits_for_a_rollback(
    numbers: Numbers, diary: Diary
) -> None:
    with pytest.raises(CommitRefused):
        async with numbers.db.transaction() as session:
            on_commit(session, diary.look, "dropped")
            after_rollback(session, diary.look, "undone")
            session.add(Number(id=-1))
            with suppress(DBAPIError):
                await session.flush()
    assert diary.ran == ["undone"]


async def test_a_failing_flush_at_commit_runs_what_waits_for_a_rollback(
    numbers: Numbers, diary: Diary
) -> None:
    with pytest.raises(DBAPIError):
        async with numbers.db.transaction() as session:
            on_commit(session, diary.look, "dropped")
            after_rollback(session, diary.look, "undone")
            session.add(Number(id=-1))
    assert diary.ran == ["undone"]


async def test_rollback_only_is_a_rollback_to_callbacks(numbers: Numbers, diary: Diary) -> None:
    async with numbers.db.transaction() as session:
        await put(session, 1)
        on_commit(session, diary.look, "dropped")
        after_rollback(session, diary.look, "undone")
        rollback_only(session)
    assert (diary.ran, diary.saw) == (["undone"], [[]])


async def test_each_transaction_of_a_session_has_callbacks_of_its_own(numbers: Numbers, diary: Diary) -> None:
    async with numbers.db.session() as session:
        on_commit(session, diary.look, 1)
        await session.commit()
        on_commit(session, diary.look, 2)
        after_rollback(session, diary.look, 3)
        await session.rollback()
        on_commit(session, diary.look, 4)
        await session.commit()
    assert diary.ran == [1, 3, 4]


async def test_a_session_that_ends_uncommitted_tells_which_callbacks_were_dropped(
    numbers: Numbers, diary: Diary
) -> None:
    async with numbers.db.session() as session:
        on_commit(session, diary.look, "never")
        after_rollback(session, diary.look, "undone")
    assert diary.ran == ["undone"]
    assert ["on_commit(Diary.look)" in str(told) for told in numbers.told] == [True]


async def test_a_reader_takes_no_callbacks(numbers: Numbers) -> None:
    async with numbers.db.reader() as session:
        for give in (on_commit, after_rollback):
            with pytest.raises(WriteRefused, match="has nothing to wait for"):
                give(session, print)


async def test_a_callback_given_by_a_flush_listener_belongs_to_the_transaction(
    numbers: Numbers, diary: Diary
) -> None:
    """While a flush is under way SQLAlchemy has a transaction of the flush's own, which never commits."""

    def listener(session: Any, _context: object) -> None:
        found = async_session(session)
        assert found is not None
        on_commit(found, diary.look, "flushed")

    async with numbers.db.session() as session:
        event.listen(session.sync_session, "after_flush", listener)
        session.add(Number(id=1))
        await session.commit()
    assert (diary.ran, diary.saw) == (["flushed"], [[1]])


# Lost and cancelled -----------------------------------------------------------------------------------------


@on_postgres
async def test_a_commit_of_unknown_outcome_runs_neither_kind(numbers: Numbers, diary: Diary) -> None:
    """What a savepoint has undone before is undone either way."""
    async with FaultProxy(numbers.judge.server.port) as proxy:
        url = proxy.through(numbers.judge.url(numbers.backend)) + "?sslmode=disable"
        async with Database(url, pool_size=1, max_overflow=0) as db:
            proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
            with pytest.raises(CommitUnknown):
                async with db.transaction() as session:
                    await put(session, 1)
                    on_commit(session, diary.note, "dropped")
                    after_rollback(session, diary.note, "dropped too")
                    with suppress(ZeroDivisionError):
                        async with atomic(session):
                            on_commit(session, diary.note, "dropped as well")
                            after_rollback(session, diary.note, "undone")
                            raise ZeroDivisionError
        assert proxy.verdicts[Verdict.CUT_ANSWER] == 1
    assert diary.ran == ["undone"]
    assert await numbers.stored() == [1]


@on_postgres
@pytest.mark.parametrize(
    "committing", [_by_hand, _by_session_begin, _by_run_sync, _by_transaction, _by_atomic]
)
async def test_a_commit_whose_waiter_is_cancelled_has_still_committed(
    numbers: Numbers, diary: Diary, committing: Committing
) -> None:
    await numbers.judge.execute(SLOW_COMMIT)

    async def work(session: AsyncSession) -> None:
        await put(session, 1)
        on_commit(session, diary.look, "stored")
        after_rollback(session, diary.look, "never")

    task = asyncio.create_task(committing(numbers, work))
    await until(
        numbers.judge, "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query ILIKE 'commit%'"
    )
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await numbers.stored() == [1]
    assert (diary.ran, diary.saw) == (["stored"], [[1]])


@pytest.mark.parametrize("committing", [_by_hand, _by_session_begin, _by_transaction])
@pytest.mark.parametrize("by", ["task", "scope"])
async def test_callbacks_run_to_their_end_although_their_waiter_is_cancelled(
    numbers: Numbers, diary: Diary, by: str, committing: Committing
) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        started.set()
        await go_on.wait()
        await diary.look("first")

    async def work(session: AsyncSession) -> None:
        await put(session, 1)
        on_commit(session, slow)
        on_commit(session, diary.look, "second")

    async def unit() -> None:
        await committing(numbers, work)

    if by == "task":
        task = asyncio.create_task(unit())
        await started.wait()
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(unit)
            await started.wait()
            group.cancel_scope.cancel()
            go_on.set()
    assert diary.ran == ["first", "second"]


# Failing ----------------------------------------------------------------------------------------------------


class Failures:
    """Callbacks that fail, one way each."""

    def at_once(self) -> None:
        raise ZeroDivisionError("at once")

    async def later(self) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError("later")

    async def too_slow(self) -> None:
        await asyncio.Event().wait()

    async def cancelled(self) -> None:
        raise asyncio.CancelledError

    async def cancels_itself(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    def wrong_arguments(self, _missing: object) -> None: ...


WRONG: dict[str, type[BaseException]] = {
    "at_once": ZeroDivisionError,
    "later": ZeroDivisionError,
    "too_slow": TimeoutError,
    "cancelled": asyncio.CancelledError,
    "cancels_itself": asyncio.CancelledError,
    "wrong_arguments": TypeError,
}


@pytest.mark.parametrize("how", WRONG)
async def test_a_failing_callback_is_told_with_its_place_and_the_others_run(
    numbers: Numbers, diary: Diary, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(5), numbers.db.transaction() as session:
        await put(session, 1)
        on_commit(session, diary.look, "before")
        on_commit(session, getattr(Failures(), how))
        on_commit(session, diary.look, "after")
    assert diary.ran == ["before", "after"]
    assert await numbers.stored() == [1]
    (told,) = numbers.told
    assert isinstance(told, HookFailed)
    assert (told.hook, type(told.error)) == (f"Failures.{how}", WRONG[how])
    place = re.escape(told.place)
    assert re.match(r"test_hooks\.py:\d+ in test_a_failing_callback", told.place)
    assert re.search(rf"Failures\.{how}, which .* \(at {place}\), failed: {WRONG[how].__name__}", caplog.text)


async def test_an_argument_is_not_told(numbers: Numbers, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_secret: str) -> None:
        raise ValueError("of " + "hunter2")

    async with numbers.db.transaction() as session:
        on_commit(session, fail, "hunter2")
    assert [type(told) for told in numbers.told] == [HookFailed]
    assert "hunter2" not in caplog.text + str(numbers.told[0])


@on_postgres
async def test_the_timeout_of_a_callback_does_not_cut_short_its_own_commit(numbers: Numbers) -> None:
    """From the moment COMMIT is written nothing cancels it: else nobody knew what is stored."""
    await numbers.judge.execute(SLOW_COMMIT)

    async def write() -> None:
        async with numbers.db.transaction() as own:
            await put(own, 1)

    async with numbers.db.transaction() as session:
        on_commit(session, write)
    assert await numbers.stored() == [1]
    assert [(type(told), getattr(told, "hook", "")[-5:]) for told in numbers.told] == [(HookFailed, "write")]
    assert isinstance(numbers.told[0], HookFailed)
    assert isinstance(numbers.told[0].error, TimeoutError)


@on_postgres
async def test_a_callback_that_is_too_slow_in_a_unit_of_its_own_leaves_nothing(numbers: Numbers) -> None:
    async def write() -> None:
        async with numbers.db.transaction() as own:
            await put(own, 1)
            await own.execute(text("SELECT pg_sleep(5)"))

    async with asyncio.timeout(4), numbers.db.transaction() as session:
        on_commit(session, write)
    assert await numbers.stored() == []
    # Its statement may also be long enough to be told as slow.
    assert [kind for kind in numbers.kinds if kind != "SlowStatement"] == ["HookFailed"]
    await numbers.assert_clean()


@pytest.mark.parametrize("give", [on_commit, after_rollback])
async def test_the_deadline_of_the_unit_is_not_that_of_its_callbacks(
    numbers: Numbers, diary: Diary, give: Any
) -> None:
    async def write() -> None:
        await asyncio.sleep(0.15)
        async with numbers.db.transaction() as own:
            await put(own, 2)
        await diary.look("written")

    with suppress(ZeroDivisionError):
        async with numbers.db.transaction(timeout=0.1) as session:
            await put(session, 1)
            give(session, write)
            if give is after_rollback:
                raise ZeroDivisionError
    assert diary.saw == [[1, 2] if give is on_commit else [2]]
    assert numbers.told == []


# Nested -----------------------------------------------------------------------------------------------------


async def test_callbacks_of_a_callbacks_own_unit_run_before_the_next_one(
    numbers: Numbers, diary: Diary
) -> None:
    async def unit(name: str, *then: Any) -> None:
        async with numbers.db.transaction() as own:
            for each in then:
                on_commit(own, each)
            on_commit(own, diary.look, name)

    async with numbers.db.transaction() as session:
        on_commit(session, unit, "outer", partial(unit, "inner"))
        on_commit(session, diary.look, "next")
    assert diary.ran == ["inner", "outer", "next"]
    assert numbers.told == []


async def test_ten_levels_of_callbacks_within_callbacks_need_one_connection(numbers: Numbers) -> None:
    async def unit(level: int) -> None:
        async with numbers.db.transaction() as own:
            await put(own, level)
            if level < 10:
                on_commit(own, unit, level + 1)

    await unit(1)
    assert await numbers.stored() == list(range(1, 11))
    assert numbers.told == []


async def test_a_callback_that_gives_another_to_the_session_it_came_from_is_not_lost_in_silence(
    numbers: Numbers, diary: Diary
) -> None:
    """It waits for the next commit of that session: here there is one."""
    async with numbers.db.session() as session:
        on_commit(session, lambda: on_commit(session, diary.look, "second"))
        await session.commit()
        assert diary.ran == []
        await session.commit()
        assert diary.ran == ["second"]


async def test_captured_callbacks_are_those_that_would_have_run(numbers: Numbers, diary: Diary) -> None:
    with captured_hooks(numbers.db) as hooks:
        async with numbers.db.transaction() as session:
            on_commit(session, diary.look, "first")
            after_rollback(session, diary.look, "never")
            with suppress(ZeroDivisionError):
                async with atomic(session):
                    on_commit(session, diary.look, "never")
                    after_rollback(session, diary.look, "second")
                    raise ZeroDivisionError
            on_commit(session, diary.look, "third")
    assert [hook.arguments for hook in hooks] == [("first",), ("second",), ("third",)]
    assert diary.ran == []


# Whose thread of control ------------------------------------------------------------------------------------


@asynccontextmanager
async def _unit(numbers: Numbers, diary: Diary, name: str) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.transaction() as session:
        on_commit(session, diary.look, name)
        yield session


async def test_a_callback_is_not_refused_a_connection_because_others_wait(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """What it follows from is stored, and nobody could try it again."""
    done: list[int] = []
    async with Database(fresh_database.url(driver), pool_size=1, max_overflow=0, max_waiting=1) as db:

        async def use(go_on: asyncio.Event) -> None:
            async with db.session() as session:
                await session.execute(text("SELECT 1"))
                await go_on.wait()

        async def follow_up() -> None:
            go_on = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for figure in ("in_use", "waiting"):
                    group.create_task(use(go_on))
                    while not getattr(db.stats(), figure):  # noqa: ASYNC110  # no event tells of it
                        await asyncio.sleep(0)
                asyncio.get_running_loop().call_later(0.05, go_on.set)
                async with db.transaction() as session:
                    done.append(await session.scalar(text("SELECT 42")) or 0)

        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))
            on_commit(session, follow_up)
    assert done == [42]


async def test_a_callback_is_awaited_before_the_block_that_committed_goes_on(
    numbers: Numbers, diary: Diary
) -> None:
    async with _unit(numbers, diary, "one"):
        pass
    assert diary.ran == ["one"]
    async with numbers.db.session() as session:
        async with atomic(session):
            on_commit(session, diary.look, "two")
        assert diary.ran == ["one", "two"]
