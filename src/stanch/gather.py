"""Reads or writes several things at the same time, each in a session of its own, without outgrowing the pool."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession

from stanch.attempts import awaited, holder_of, judge_function, refuse_inside
from stanch.callers import place_of_caller
from stanch.completion import run_to_completion
from stanch.sessions import guard_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from stanch.attempts import Host
    from stanch.callers import Place
    from stanch.ledger import Stats

S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")

Part: TypeAlias = "Callable[[S], Awaitable[T]]"
"""One of several things to do: an async function of a session."""


class Gathering(Generic[S]):
    """The ``gather`` of a ``Database``; a base of it, so that its overloads stand beside what they do."""

    @overload
    async def gather(
        self, one: Part[S, T1], two: Part[S, T2], /, *, transaction: bool = ...
    ) -> tuple[T1, T2]: ...

    @overload
    async def gather(
        self, one: Part[S, T1], two: Part[S, T2], three: Part[S, T3], /, *, transaction: bool = ...
    ) -> tuple[T1, T2, T3]: ...

    @overload
    async def gather(
        self,
        one: Part[S, T1],
        two: Part[S, T2],
        three: Part[S, T3],
        four: Part[S, T4],
        /,
        *,
        transaction: bool = ...,
    ) -> tuple[T1, T2, T3, T4]: ...

    @overload
    async def gather(
        self,
        one: Part[S, T1],
        two: Part[S, T2],
        three: Part[S, T3],
        four: Part[S, T4],
        five: Part[S, T5],
        /,
        *,
        transaction: bool = ...,
    ) -> tuple[T1, T2, T3, T4, T5]: ...

    @overload
    async def gather(
        self,
        one: Part[S, T1],
        two: Part[S, T2],
        three: Part[S, T3],
        four: Part[S, T4],
        five: Part[S, T5],
        six: Part[S, T6],
        /,
        *,
        transaction: bool = ...,
    ) -> tuple[T1, T2, T3, T4, T5, T6]: ...

    @overload
    async def gather(self, *parts: Part[S, T], transaction: bool = ...) -> tuple[T, ...]: ...

    async def gather(self, *parts: Part[S, Any], transaction: bool = False) -> tuple[Any, ...]:
        """What each of *parts* returns, in their order; they run at the same time, each with a session of its own.

        ``rows, n = await db.gather(load_rows, count_rows)``. The sessions only read; with *transaction* each is
        a ``db.transaction()`` and commits when its part has succeeded, whatever becomes of the others. Each sees
        the database for itself: nothing uncommitted of anybody, and no common snapshot.

        No more of them run at once than the pool has connections; the rest wait for their turn, not in the
        pool's queue. The first error cancels the others, waits until they have given everything back, and is
        raised itself; others that were raised meanwhile are its notes.

        Raises ``ConfigError`` for a coroutine in the place of a function, and ``InsideTransaction`` if the calling
        task holds a connection of this database: it would wait for others while holding its own.
        """
        host = cast("Host[S]", self)
        for part in parts:
            judge_function("gather()", part)
        refuse_inside(host, "gather()")
        if not parts:
            return ()
        opened = host.transaction if transaction else host.reader
        return await _at_once(
            parts, opened, most=_bound(host.stats(), writing=transaction), place=place_of_caller()
        )


async def _at_once(
    parts: tuple[Part[S, T], ...],
    opened: Callable[[], AbstractAsyncContextManager[S]],
    *,
    most: int,
    place: Place,
) -> tuple[T, ...]:
    turns = asyncio.Semaphore(most)
    errors: list[BaseException] = []

    async def run(part: Part[S, T]) -> T:
        try:
            async with turns, opened() as session:
                guard_of(session).holder = holder_of(part, place)
                return await awaited(part, session)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            errors.append(error)
            raise

    # Not a TaskGroup: in a cancelled scope of anyio's it would spin until the last of them has tidied up.
    tasks = [asyncio.create_task(run(part)) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await run_to_completion(_call_off(tasks))
    if errors:
        tasks.clear()  # they hold the error, whose traceback holds this frame
        raise _first_of(errors)
    return tuple(task.result() for task in tasks)


async def _call_off(tasks: list[asyncio.Task[T]]) -> None:
    """Cancel whoever is still at work, and wait until all have given back what they had."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _first_of(errors: list[BaseException]) -> BaseException:
    """The error that was raised first, with a note of each other one; the list is empty afterwards."""
    first = errors.pop(0)
    while errors:
        first.add_note(f"another part of the gather() ended in {type(errors.pop(0)).__name__}")
    return first


def _bound(stats: Stats, *, writing: bool) -> int:
    """How many of them can have a connection at once."""
    readers = stats.bound if stats.readers is None else stats.readers.bound
    return max(1, stats.bound - readers if writing and stats.readers is not None else readers)
