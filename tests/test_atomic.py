"""Atomic blocks: who commits, what an error undoes, and what is said when the database has refused something."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, SAWarning, SQLAlchemyError

from stanch import (
    CommitRefused,
    SavepointGone,
    TransactionAborted,
    UnitConflict,
    WriteRefused,
    atomic,
    release,
    rollback_only,
)
from stanch.sessions import guard_of
from tests.support import cleaned
from tests.support.numbers import Number, Numbers, put

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.support.judge import FreshDatabase

    Opened = Callable[[Numbers], AbstractAsyncContextManager[AsyncSession]]

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database


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
    """On each backend."""
    numbers = Numbers(fresh_database, tmp_path / "numbers.db", str(request.param))
    await numbers.create()
    async with numbers.db:
        yield numbers
        await numbers.assert_clean()


# Owners -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _in_a_transaction(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.transaction() as session:
        yield session


@asynccontextmanager
async def _in_session_begin(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.session() as session, session.begin():
        yield session


@asynccontextmanager
async def _in_sessionmaker_begin(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.session_factory.begin() as session:
        yield session


@asynccontextmanager
async def _in_begin_nested(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.session() as session:
        async with session.begin_nested():
            yield session
        await session.commit()


@asynccontextmanager
async def _in_an_outer_block(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.session() as session, atomic(session):
        yield session


@asynccontextmanager
async def _in_a_savepoint_block(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.transaction() as session, atomic(session):
        yield session


@asynccontextmanager
async def _in_a_joined_block(numbers: Numbers) -> AsyncGenerator[AsyncSession]:
    async with numbers.db.transaction() as session, atomic(session, savepoint=False):
        yield session


OWNERS: dict[str, Opened] = {
    "db.transaction()": _in_a_transaction,
    "session.begin()": _in_session_begin,
    "sessionmaker.begin()": _in_sessionmaker_begin,
    "session.begin_nested()": _in_begin_nested,
    "an outer atomic()": _in_an_outer_block,
    "a savepoint's atomic()": _in_a_savepoint_block,
    "a joined atomic()": _in_a_joined_block,
}

each_owner = pytest.mark.parametrize("opened", OWNERS.values(), ids=OWNERS)


async def test_a_block_with_nobody_outside_commits_at_its_end(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        async with atomic(session) as same:
            assert same is session
            await put(session, 1)
            assert await numbers.stored() == []
        assert await numbers.stored() == [1]
        assert numbers.db.stats().in_use == 0


async def test_a_read_before_the_block_has_promised_nothing(numbers: Numbers) -> None:
    """Where plain session.begin() raises, the block takes the transaction over, and commits it."""
    async with numbers.db.session() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(InvalidRequestError, match="already begun"):
            await session.begin().start()
        async with atomic(session):
            await put(session, 1)
        assert await numbers.stored() == [1]


async def test_a_write_before_the_block_is_committed_with_it(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        session.add(Number(id=1))
        await put(session, 2)
        async with atomic(session):
            await put(session, 3)
        assert await numbers.stored() == [1, 2, 3]


async def test_an_error_in_a_block_that_commits_takes_what_was_begun_before_with_it(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        await put(session, 1)
        with pytest.raises(ZeroDivisionError):
            async with atomic(session):
                await put(session, 2)
                raise ZeroDivisionError
        async with atomic(session):
            await put(session, 3)
    assert await numbers.stored() == [3]


async def test_blocks_one_after_the_other_commit_each_for_itself(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        for number in (1, 2):
            async with atomic(session):
                await put(session, number)
            assert await numbers.stored() == list(range(1, number + 1))


@each_owner
async def test_inside_an_owner_a_block_is_a_savepoint(numbers: Numbers, opened: Opened) -> None:
    async with opened(numbers) as session:
        await put(session, 1)
        async with atomic(session):
            await put(session, 2)
        assert await numbers.stored() == []
        with pytest.raises(ZeroDivisionError):
            async with atomic(session):
                await put(session, 3)
                raise ZeroDivisionError
        await put(session, 4)
    assert await numbers.stored() == [1, 2, 4]


@each_owner
async def test_an_owner_that_fails_undoes_the_blocks_inside(numbers: Numbers, opened: Opened) -> None:
    with pytest.raises(ZeroDivisionError):
        async with opened(numbers) as session:
            async with atomic(session):
                await put(session, 1)
            raise ZeroDivisionError
    assert await numbers.stored() == []


@each_owner
async def test_a_durable_block_refuses_to_be_inside(numbers: Numbers, opened: Opened) -> None:
    async with opened(numbers) as session:
        await put(session, 1)
        with pytest.raises(UnitConflict, match=r"is durable, so its end must be a COMMIT, but it is inside "):
            async with atomic(session, durable=True):
                pytest.fail("it was entered")
        await put(session, 2)
    assert await numbers.stored() == [1, 2]


async def test_a_durable_block_commits_where_nobody_has_promised(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        await session.execute(text("SELECT 1"))
        async with atomic(session, durable=True):
            await put(session, 1)
        assert await numbers.stored() == [1]


async def test_the_refusal_of_a_durable_block_names_both_places(numbers: Numbers) -> None:
    async with numbers.db.session() as session, atomic(session):
        with pytest.raises(UnitConflict) as refused:
            async with atomic(session, durable=True):
                pytest.fail("it was entered")
    assert len(re.findall(r"test_atomic\.py:\d+", str(refused.value))) == 2


async def test_a_block_of_a_reader_is_refused(numbers: Numbers) -> None:
    async with numbers.db.reader() as session:
        with pytest.raises(WriteRefused, match=r"atomic\(\) has nothing to wait for"):
            async with atomic(session):
                pytest.fail("it was entered")
        assert await session.scalar(text("SELECT 1")) == 1


async def test_what_was_written_in_a_block_that_was_undone_is_no_longer_called_unsaved(
    numbers: Numbers,
) -> None:
    async with numbers.db.session() as session:
        await session.execute(text("SELECT 1"))
        async with session.begin_nested():
            with suppress(ZeroDivisionError):
                async with atomic(session):
                    session.add(Number(id=1))
                    await session.flush()
                    raise ZeroDivisionError
        assert guard_of(session).wrote == []
    assert numbers.kinds == []


# Joined without a savepoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [OWNERS["db.transaction()"], OWNERS["session.begin()"]])
async def test_a_joined_block_adds_to_its_owner(numbers: Numbers, opened: Opened) -> None:
    async with opened(numbers) as session:
        async with atomic(session, savepoint=False):
            await put(session, 1)
        assert await numbers.stored() == []
    assert await numbers.stored() == [1]


@pytest.mark.parametrize("name", sorted(OWNERS))
async def test_an_error_in_a_joined_block_dooms_the_commit_although_it_was_caught(
    numbers: Numbers, name: str
) -> None:
    expected = (
        r"ZeroDivisionError left atomic\(\) at .*test_atomic\.py:\d+.*, which had joined without a savepoint"
    )
    with pytest.raises(CommitRefused, match=expected):
        async with OWNERS[name](numbers) as session:
            await put(session, 1)
            with suppress(ZeroDivisionError):
                async with atomic(session, savepoint=False):
                    await put(session, 2)
                    raise ZeroDivisionError
            await put(session, 3)
    assert await numbers.stored() == []


async def test_a_doomed_transaction_is_refused_each_time_it_is_committed(numbers: Numbers) -> None:
    async with numbers.db.transaction() as session:
        with suppress(ZeroDivisionError):
            async with atomic(session, savepoint=False):
                await put(session, 1)
                raise ZeroDivisionError
        for _ in range(2):
            with pytest.raises(CommitRefused):
                await session.commit()
        await session.rollback()
        await put(session, 2)
    assert await numbers.stored() == [2]


async def test_going_back_to_an_outer_savepoint_lifts_the_doom(numbers: Numbers) -> None:
    async with numbers.db.transaction() as session:
        await put(session, 1)
        with pytest.raises(CommitRefused):  # the savepoint cannot be released
            async with atomic(session):
                with suppress(ZeroDivisionError):
                    async with atomic(session, savepoint=False):
                        await put(session, 2)
                        raise ZeroDivisionError
        await put(session, 3)
    assert await numbers.stored() == [1, 3]


async def test_the_doom_of_a_joined_block_reaches_what_it_wrote_after_a_commit_by_hand(
    numbers: Numbers,
) -> None:
    """The commit was the user's own will; what came after it belongs to the block that has failed."""
    with pytest.raises(CommitRefused):
        async with numbers.db.transaction() as session:
            with suppress(ZeroDivisionError):
                async with atomic(session, savepoint=False):
                    await put(session, 1)
                    await session.commit()
                    await put(session, 2)
                    raise ZeroDivisionError
    assert await numbers.stored() == [1]


async def test_the_first_of_several_errors_is_the_one_that_is_named(numbers: Numbers) -> None:
    with pytest.raises(CommitRefused, match="ZeroDivisionError left"):
        async with numbers.db.transaction() as session:
            for error in (ZeroDivisionError, KeyError):
                with suppress(error):
                    async with atomic(session, savepoint=False):
                        raise error


# Errors of the database -------------------------------------------------------------------------------------


async def _by_flush(session: AsyncSession, number: int) -> None:
    session.add(Number(id=number))
    await session.flush()


async def _by_core(session: AsyncSession, number: int) -> None:
    await session.execute(insert(Number), [{"id": number}])


WAYS: dict[str, Any] = {"flush": _by_flush, "Core": _by_core, "text": put}

each_way = pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)


@each_way
async def test_a_constraint_that_fails_inside_undoes_the_block_alone(numbers: Numbers, write: Any) -> None:
    async with numbers.db.transaction() as session:
        await write(session, 1)
        with pytest.raises(IntegrityError):
            async with atomic(session):
                await write(session, 2)
                await write(session, -1)
        assert await session.scalar(text("SELECT count(*) FROM numbers")) == 1
        await write(session, 3)
        async with atomic(session):
            await write(session, 4)
    assert await numbers.stored() == [1, 3, 4]


@each_way
async def test_a_constraint_that_fails_in_a_block_that_commits_stores_nothing_of_it(
    numbers: Numbers, write: Any
) -> None:
    async with numbers.db.session() as session:
        with pytest.raises(IntegrityError):
            async with atomic(session):
                await write(session, 1)
                await write(session, -1)
        async with atomic(session):
            await write(session, 2)
    assert await numbers.stored() == [2]


async def test_a_constraint_that_fails_in_the_flush_at_the_end_of_a_block_undoes_the_block(
    numbers: Numbers,
) -> None:
    async with numbers.db.transaction() as session:
        await put(session, 1)
        with pytest.raises(IntegrityError):
            async with atomic(session):
                await put(session, 2)
                session.add(Number(id=-1))
        await put(session, 3)
    assert await numbers.stored() == [1, 3]


BLAME = r"\w+( \(23514\))? at \S+\.py:\d+ in (put|_by_flush|_by_core)\(\)"
"""The first error and where it was, as every later message must say it."""

ABORTS = [
    (backend, write) for backend in ("asyncpg", "psycopg", "sqlite") for write in WAYS.values()
    if backend != "sqlite" or write is _by_flush
]  # fmt: skip
"""After an error PostgreSQL aborts the transaction. SQLite undoes the statement; there only a flush aborts."""

where_it_aborts = pytest.mark.parametrize(("numbers", "write"), ABORTS, indirect=["numbers"])
on_postgres = pytest.mark.parametrize("numbers", ["asyncpg", "psycopg"], indirect=True)


async def _swallow(session: AsyncSession, write: Any) -> None:
    with suppress(IntegrityError):
        await write(session, -1)


@where_it_aborts
@pytest.mark.parametrize("name", OWNERS)
async def test_after_a_caught_error_the_next_statement_says_where_it_was(
    numbers: Numbers, write: Any, name: str
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with OWNERS[name](numbers) as session:
            await _swallow(session, write)
            for _ in range(2):
                with pytest.raises(TransactionAborted) as aborted:
                    await put(session, 1)
                assert re.search(BLAME, str(aborted.value))
            raise ZeroDivisionError


@where_it_aborts
async def test_after_a_caught_error_a_rollback_makes_the_session_whole(numbers: Numbers, write: Any) -> None:
    async with numbers.db.session() as session:
        await _swallow(session, write)
        await session.rollback()
        await put(session, 2)
        await session.commit()
    assert await numbers.stored() == [2]


@where_it_aborts
@pytest.mark.parametrize("name", OWNERS)
async def test_after_a_caught_error_commit_is_refused_and_says_where_it_was(
    numbers: Numbers, write: Any, name: str
) -> None:
    """Also where SQLAlchemy would pass over it in silence: at the end of a begin() block whose flush has failed."""
    with pytest.raises(CommitRefused) as refused:
        async with OWNERS[name](numbers) as session:
            await put(session, 1)
            await _swallow(session, write)
    assert re.search(BLAME, str(refused.value))
    assert await numbers.stored() == []


@where_it_aborts
async def test_work_that_waits_for_the_flush_at_the_end_does_not_change_what_is_said(
    numbers: Numbers, write: Any
) -> None:
    with (
        pytest.raises(CommitRefused) as refused,
        pytest.warns(SAWarning, match="will be discarded") if write is _by_flush else nullcontext(),
    ):
        async with numbers.db.transaction() as session:
            await _swallow(session, write)
            session.add(Number(id=1))
    assert re.search(BLAME, str(refused.value))


@where_it_aborts
async def test_what_is_added_after_a_caught_error_is_undone_with_its_savepoint(
    numbers: Numbers, write: Any
) -> None:
    with pytest.warns(SAWarning, match="will be discarded") if write is _by_flush else nullcontext():
        async with numbers.db.transaction() as session:
            await put(session, 1)
            with suppress(ZeroDivisionError):
                async with session.begin_nested():
                    await _swallow(session, write)
                    session.add(Number(id=2))
                    raise ZeroDivisionError
            await put(session, 3)
    assert await numbers.stored() == [1, 3]


@where_it_aborts
async def test_after_a_caught_error_a_savepoint_is_refused_and_says_where_it_was(
    numbers: Numbers, write: Any
) -> None:
    """Also what is first said inside a savepoint that began too late to help."""
    with pytest.raises(TransactionAborted) as aborted:
        async with numbers.db.transaction() as session:
            await _swallow(session, write)
            async with atomic(session):
                await put(session, 1)
    assert re.search(BLAME, str(aborted.value))


@where_it_aborts
async def test_an_error_caught_inside_a_block_is_named_by_the_end_of_the_block(
    numbers: Numbers, write: Any
) -> None:
    """The block cannot be released; without it the outer work goes on."""
    async with numbers.db.transaction() as session:
        await put(session, 1)
        with pytest.raises(SQLAlchemyError) as refused:
            async with atomic(session):
                await put(session, 2)
                await _swallow(session, write)
        assert re.search(BLAME, str(refused.value))
        assert not isinstance(refused.value, IntegrityError)
        await put(session, 3)
    assert await numbers.stored() == [1, 3]


@pytest.mark.parametrize("numbers", ["sqlite"], indirect=True)
async def test_sqlite_goes_on_after_a_statement_that_failed(numbers: Numbers) -> None:
    """As SQLite does by itself: the statement is undone, the transaction is not."""
    async with numbers.db.transaction() as session:
        await put(session, 1)
        await _swallow(session, put)
        await put(session, 2)
    assert await numbers.stored() == [1, 2]


# Ended inside -----------------------------------------------------------------------------------------------


async def test_commit_inside_a_savepoint_block_is_told_at_its_end(numbers: Numbers) -> None:
    with pytest.raises(SavepointGone, match=r"test_atomic\.py:\d+"):
        async with numbers.db.transaction() as session, atomic(session):
            await put(session, 1)
            await session.commit()
            await put(session, 2)
    assert await numbers.stored() == [1]


async def test_rollback_inside_a_savepoint_block_is_told_at_its_end(numbers: Numbers) -> None:
    with pytest.raises(SavepointGone, match=r"test_atomic\.py:\d+"):
        async with numbers.db.transaction() as session, atomic(session):
            await put(session, 1)
            await session.rollback()
            await put(session, 2)
    assert await numbers.stored() == []


@pytest.mark.parametrize("ended", ["commit", "rollback"])
async def test_a_block_that_commits_tells_as_well_that_it_was_ended_inside(
    numbers: Numbers, ended: str
) -> None:
    """Half of it is not the whole of it: what came after does not pass for the block's work."""
    async with numbers.db.session() as session:
        with pytest.raises(SavepointGone, match=r"test_atomic\.py:\d+"):
            async with atomic(session):
                await put(session, 1)
                await getattr(session, ended)()
                await put(session, 2)
    assert await numbers.stored() == ([1] if ended == "commit" else [])


async def test_session_begin_inside_a_block_that_commits_is_refused(numbers: Numbers) -> None:
    """It would commit in the middle of the block, which promises all or nothing."""
    async with numbers.db.session() as session:
        with pytest.raises(InvalidRequestError, match="already begun"):
            async with atomic(session), session.begin():
                pytest.fail("it was entered")
    assert await numbers.stored() == []


async def test_the_users_own_error_comes_out_although_the_savepoint_has_gone(numbers: Numbers) -> None:
    with pytest.raises(ZeroDivisionError):
        async with numbers.db.transaction() as session, atomic(session):
            await put(session, 1)
            await session.rollback()
            raise ZeroDivisionError
    assert await numbers.stored() == []


@pytest.mark.parametrize("name", ["an outer atomic()", "a savepoint's atomic()", "session.begin_nested()"])
async def test_release_inside_a_block_is_refused(numbers: Numbers, name: str) -> None:
    async with OWNERS[name](numbers) as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(UnitConflict, match=r"release\(\) was called inside"):
            await release(session)
        await put(session, 1)
    assert await numbers.stored() == [1]


# Roll back only ---------------------------------------------------------------------------------------------


async def test_a_block_marked_rollback_only_stores_nothing_and_raises_nothing(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        async with atomic(session):
            await put(session, 1)
            rollback_only(session)
        async with atomic(session):
            await put(session, 2)
    assert await numbers.stored() == [2]


async def test_a_mark_made_before_the_block_holds_for_the_block_that_takes_over(numbers: Numbers) -> None:
    async with numbers.db.session() as session:
        await put(session, 1)
        rollback_only(session)
        async with atomic(session):
            await put(session, 2)
        assert await numbers.stored() == []


async def test_a_mark_inside_a_savepoint_block_is_for_the_whole(numbers: Numbers) -> None:
    async with numbers.db.transaction() as session:
        await put(session, 1)
        async with atomic(session):
            await put(session, 2)
            rollback_only(session)
        await put(session, 3)
    assert await numbers.stored() == []


async def test_the_mark_of_a_block_that_failed_ends_with_it(numbers: Numbers) -> None:
    """Otherwise the next block on the session would store nothing, and say nothing."""
    async with numbers.db.session() as session:
        with pytest.raises(ZeroDivisionError):
            async with atomic(session):
                await put(session, 1)
                rollback_only(session)
                raise ZeroDivisionError
        async with atomic(session):
            await put(session, 2)
    assert await numbers.stored() == [2]


# Cancelled --------------------------------------------------------------------------------------------------


async def _wait_inside(numbers: Numbers, opened: Opened | None, entered: asyncio.Event) -> None:
    async with (opened or _in_an_outer_block)(numbers) as session, atomic(session):
        await put(session, 1)
        entered.set()
        await asyncio.Event().wait()


@each_owner
async def test_a_task_cancelled_inside_a_block_leaves_nothing(numbers: Numbers, opened: Opened) -> None:
    entered = asyncio.Event()
    task = asyncio.create_task(_wait_inside(numbers, opened, entered))
    async with asyncio.timeout(5):
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await numbers.stored() == []
    assert numbers.db.stats().in_use == 0


@each_owner
async def test_a_scope_cancelled_inside_a_block_leaves_nothing(numbers: Numbers, opened: Opened) -> None:
    """The cancellation of anyio comes again at every await, also at those of the clean-up."""
    with anyio.CancelScope() as scope, anyio.fail_after(5):
        async with opened(numbers) as session, atomic(session):
            await put(session, 1)
            scope.cancel()
            await anyio.sleep(1)
    assert scope.cancelled_caught
    assert await numbers.stored() == []
    assert numbers.db.stats().in_use == 0


async def test_a_cancelled_block_can_be_survived_by_the_work_outside(numbers: Numbers) -> None:
    async with numbers.db.transaction() as session:
        await put(session, 1)
        with anyio.CancelScope() as scope:
            async with atomic(session):
                await put(session, 2)
                scope.cancel()
                await anyio.sleep(1)
        assert scope.cancelled_caught
        await put(session, 3)
    assert await numbers.stored() == [1, 3]


@on_postgres
async def test_a_statement_cancelled_inside_a_block_leaves_nothing(numbers: Numbers) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), numbers.db.transaction() as session, atomic(session):
            await put(session, 1)
            await session.execute(text("SELECT pg_sleep(5)"))
    assert await numbers.stored() == []


@on_postgres
async def test_an_error_of_the_network_inside_a_block_leaves_nothing(numbers: Numbers) -> None:
    with pytest.raises(DBAPIError):
        async with numbers.db.transaction() as session, atomic(session):
            await put(session, 1)
            await numbers.judge.fetch(cleaned.SEND_AWAY)
            await put(session, 2)
    assert await numbers.stored() == []
