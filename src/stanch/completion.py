"""Runs an operation to its end although the task that waits for it is cancelled, once, twice or again and again.

Two kinds of cancellation reach us. asyncio's is an edge: one ``CancelledError``, later awaits work again.
anyio's (Starlette's task groups, ``BaseHTTPMiddleware``) is a level: every await raises until its scope ends.
A task of our own is out of reach of the first, a shielded scope around the wait keeps the second from
spinning.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

_out_of_reach: Final[WeakSet[asyncio.Task[Any]]] = WeakSet()
"""Tasks that nobody outside this module can name, hence nobody cancels."""


_too_late: Final[WeakSet[asyncio.CancelledError]] = WeakSet()
"""Cancellations that were raised after the work had been stored."""


def note_too_late(cancelled: asyncio.CancelledError) -> None:
    """Remember that *cancelled* came while a COMMIT was on its way, which has succeeded."""
    _too_late.add(cancelled)


def came_too_late(cancelled: asyncio.CancelledError) -> bool:
    """Whether *cancelled* was raised although COMMIT had succeeded."""
    return cancelled in _too_late


def is_out_of_reach() -> bool:
    """Whether the running task is one of ours, so that another shield would buy nothing."""
    return is_ours(asyncio.current_task())


def is_ours(task: asyncio.Task[Any] | None) -> bool:
    """Whether *task* runs an operation of ours: nobody outside knows of it, and it ends in bounded time."""
    return task is not None and task in _out_of_reach


async def run_to_completion(operation: Coroutine[Any, Any, T]) -> T:
    """Await *operation* to its end in a task of its own; a cancellation meanwhile is re-raised afterwards.

    *operation* must end by itself: give it a deadline. If it failed and the wait was cancelled too, the
    cancellation is raised with the failure as its cause.
    """
    if is_out_of_reach():
        return await operation
    task = asyncio.create_task(operation)
    _out_of_reach.add(task)
    cancelled: asyncio.CancelledError | None = None
    with _anyio_shield():
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


def _anyio_shield() -> AbstractContextManager[object]:
    # Where nobody has imported anyio there is no scope to be shielded from, and the core need not import it.
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)
