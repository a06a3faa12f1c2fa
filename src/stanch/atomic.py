"""What acts on a session that somebody else has opened: atomic blocks, callbacks for its end, release, roll back."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from stanch.callers import place_of_caller
from stanch.completion import run_to_completion
from stanch.errors import SavepointGone, UnitConflict, UnsavedWrites, WriteRefused
from stanch.guards import Owner
from stanch.hooks import Hook, Outcome
from stanch.sessions import guard_of, guarded_session
from stanch.transactions import Ending

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from sqlalchemy.orm import SessionTransaction

P = ParamSpec("P")
S = TypeVar("S", bound=AsyncSession)

# Blocks ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def atomic(session: S, *, savepoint: bool = True, durable: bool = False) -> AsyncGenerator[S]:
    """A block whose work is stored as a whole or not at all.

    It commits at its end unless somebody outside has promised to: an outer ``atomic``, ``db.transaction()``,
    ``session.begin()`` or a unit of work in auto mode. Then it is a savepoint (PostgreSQL manual, *SAVEPOINT*): an
    error inside undoes the block alone, and the work outside can go on. A transaction that was merely begun by a
    read or a write has no owner, so the block ends it, and what it holds.

    ``savepoint=False`` saves the two round trips where there is an owner: the block only joins, and an error inside
    dooms the transaction around it, whose COMMIT is then refused. ``durable=True`` promises that the end of the
    block is a COMMIT: inside an owner it raises ``UnitConflict``. A reader's session raises ``WriteRefused``.
    """
    place = Owner(f"atomic() at {place_of_caller()}", is_block=True)
    owner = guarded_session(session).owner()
    if owner is None:
        block = _commits(session, place)
    elif durable:
        raise UnitConflict(
            f"{place} is durable, so its end must be a COMMIT, but it is inside {owner}",
            remedies=[
                "Call it where nothing around it has promised to commit.",
                "Leave durable=True out: the block is then a savepoint.",
            ],
        )
    elif savepoint:
        block = _is_savepoint(session, place)
    else:
        block = _joins(session, place)
    async with block:
        yield session


@asynccontextmanager
async def _commits(session: AsyncSession, place: Owner) -> AsyncGenerator[None]:
    guard, ending = guard_of(session), Ending(session)
    _refuse_reader(session, "atomic()")
    transaction = guarded_session(session).begun()
    guard.owners.append(place)
    try:
        try:
            yield
            _refuse_gone(session, transaction, place)
        except BaseException:
            await run_to_completion(ending.roll_back())
            raise
        await run_to_completion(ending.end(commit=not guard.rollback_only))
    finally:
        guard.rollback_only = False  # the mark was for what has ended now
        guard.owners.remove(place)


@asynccontextmanager
async def _is_savepoint(session: AsyncSession, place: Owner) -> AsyncGenerator[None]:
    guard, ending = guard_of(session), Ending(session)
    savepoint = await session.begin_nested()
    guard.owners.append(place)
    try:
        yield
        _refuse_gone(session, savepoint.sync_transaction, place)
        await run_to_completion(ending.release(savepoint))
    except BaseException:
        if guarded_session(session).is_open(savepoint.sync_transaction):
            await run_to_completion(ending.roll_back_to(savepoint))
        raise
    finally:
        guard.owners.remove(place)


@asynccontextmanager
async def _joins(session: AsyncSession, place: Owner) -> AsyncGenerator[None]:
    sync_session = guarded_session(session)
    joined = sync_session.frame()
    try:
        yield
    except BaseException as error:
        doom = f"{type(error).__name__} left {place}, which had joined without a savepoint"
        # What it joined may have been committed by hand inside: then also what it has written since.
        for frame in (joined, sync_session.open_frame()):
            if frame is not None and frame.doom is None:
                frame.doom = doom
        raise


def _refuse_gone(session: AsyncSession, transaction: SessionTransaction | None, place: Owner) -> None:
    if not guarded_session(session).is_open(transaction):
        raise SavepointGone(
            f"the transaction or savepoint of {place} was gone before its block had ended",
            remedies=[
                "Do not call commit(), rollback() or release() inside an atomic block.",
                "If a database error was caught inside: let it leave the block, which then undoes it.",
            ],
        )


# Callbacks ------------------------------------------------------------------------------------------------


def on_commit(
    session: AsyncSession, call: Callable[P, object], /, *arguments: P.args, **keywords: P.kwargs
) -> None:
    """Call *call* with its arguments after the outermost COMMIT, before the reply leaves; sync or async.

    Guarantees: callbacks run in the order they were given, on every way to commit, holding no connection, and may
    open units of their own; they are dropped when their savepoint or transaction rolls back, or when the outcome of
    COMMIT is unknown. What one raises is logged with the place of this call and told as ``HookFailed``; it does not
    stop the others, nor turn the reply into an error. Each has ``hook_timeout`` seconds. They are lost if the
    process dies in between: what must survive that belongs into a table, written in the same transaction.

    Pass ids, not the session or its objects. Raises ``WriteRefused`` on a reader's session, which never commits.
    """
    _refuse_reader(session, "on_commit()")
    _wait_for(Outcome.COMMITTED, session, call, arguments, keywords)


def after_rollback(
    session: AsyncSession, call: Callable[P, object], /, *arguments: P.args, **keywords: P.kwargs
) -> None:
    """Call *call* if what is done now is rolled back: with its savepoint, or with the whole transaction.

    It runs when the outermost transaction has ended, holding no connection; otherwise as ``on_commit``. After a
    commit of unknown outcome it does not run.
    """
    _refuse_reader(session, "after_rollback()")
    _wait_for(Outcome.ROLLED_BACK, session, call, arguments, keywords)


def _wait_for(
    outcome: Outcome,
    session: AsyncSession,
    call: Callable[..., object],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    hook = Hook(call, arguments, keywords, place_of_caller())
    guarded_session(session).frame().gathered.append((outcome, hook))


# Ends -----------------------------------------------------------------------------------------------------


def rollback_only(session: AsyncSession) -> None:
    """Mark the unit of work of *session*: it will roll back at its end, without an error.

    In a request the reply leaves as the handler made it, also a 200; nothing is stored of what was not committed
    by hand before.
    """
    guard_of(session).rollback_only = True


async def release(session: AsyncSession) -> None:
    """End a clean transaction and give the connection back, before work that waits for something else.

    What was read stays usable; the next statement begins a new transaction, which may see newer data. Raises
    ``UnsavedWrites``, naming them, if there are writes that nobody has committed, and ``UnitConflict`` inside an
    ``atomic`` block, ``session.begin()`` or a savepoint. What may have written, a ``text()`` by its words or anything
    by a function that it calls, is not guessed at: the server is asked whether the transaction has an id (PostgreSQL
    manual, *Transaction ID and Snapshot Information Functions*), one round trip.
    """
    sync_session = guarded_session(session)
    sync_session.refuse_after_end()
    owner = sync_session.owner()
    if sync_session.in_nested_transaction() or (owner is not None and owner.is_block):
        raise UnitConflict(
            f"release() was called inside {owner}, whose end is still to come",
            remedies=["Call it outside the block."],
        )
    if writes := await session.run_sync(lambda _session: sync_session.lost_by_release()):
        raise UnsavedWrites(
            f"{sync_session.guard.holder} wants to give its connection back with uncommitted writes"
            f" ({', '.join(writes)})",
            remedies=[
                "Commit them first: await session.commit().",
                "Or wait for the other service before the first write, or in on_commit().",
            ],
        )
    await run_to_completion(Ending(session).roll_back())


def _refuse_reader(session: AsyncSession, what: str) -> None:
    guard = guard_of(session)
    if guard.reading:
        raise WriteRefused(
            f"{guard.holder} asked for a reader, which never commits, so {what} has nothing to wait for",
            remedies=["Ask for SessionDep, or use async with db.transaction()."],
        )
