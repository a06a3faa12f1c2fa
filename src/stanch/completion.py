"""Runs an operation to its end although the task that waits for it is cancelled, once, twice or again and again.

Two kinds of cancellation reach us. asyncio's is an edge: one ``CancelledError``, later awaits work again.
anyio's (Starlette's task groups, ``BaseHTTPMiddleware``) is a level: every await raises until its scope ends.
A task of our own, which refuses what whoever waits for it passes on, is out of reach of the first; a shielded
scope around the wait keeps the second from spinning. Whether any scope is open around a task anyio tells nobody:
its private ``_backends._asyncio._task_states`` is used in this module only, and ``tests/test_contract.py`` holds it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class OutOfReach(asyncio.Task[T]):
    """A task that nobody outside knows of, and that no cancellation of the one *waiting* for it ends."""

    __slots__ = ("_told", "_waiting")

    def __init__(
        self,
        operation: Coroutine[Any, Any, T],
        waiting: asyncio.Task[Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(operation, loop=loop)
        self._waiting = waiting
        self._told = waiting.cancelling()

    def cancel(self, msg: Any | None = None) -> bool:
        """Refuse what the waiting task passes on, which asyncio then raises there once this one has ended.

        Anything else comes from a loop that cancels every task because it is dying, and is obeyed.
        """
        told, self._told = self._told, self._waiting.cancelling()
        # Of a cancellation that came before the wait began, the waiting task tells as it begins to wait.
        if self._told > told or asyncio.current_task(self.get_loop()) is self._waiting:
            return False
        return super().cancel(msg)


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
    return isinstance(asyncio.current_task(), OutOfReach)


def is_ours(task: asyncio.Task[Any] | None) -> bool:
    """Whether *task* runs an operation of ours: nobody outside knows of it, and it ends in bounded time."""
    return isinstance(task, OutOfReach)


async def run_to_completion(operation: Coroutine[Any, Any, T]) -> T:
    """Await *operation* to its end in a task of its own; a cancellation meanwhile is re-raised afterwards.

    *operation* must end by itself: give it a deadline. If it failed and the wait was cancelled too, the
    cancellation is raised with the failure as its cause.
    """
    loop = asyncio.get_running_loop()
    waiting = asyncio.current_task(loop)
    if isinstance(waiting, OutOfReach):
        return await operation
    assert waiting is not None
    task = OutOfReach(operation, waiting, loop)
    try:
        if not _is_in_a_scope(waiting):
            return await task
        with sys.modules["anyio"].CancelScope(shield=True):
            return await task
    except asyncio.CancelledError as cancelled:
        raise cancelled from (None if task.cancelled() else task.exception())


def _is_in_a_scope(task: asyncio.Task[Any]) -> bool:
    """Whether anyio may cancel *task*, again and again; a scope costs as much as a task does."""
    # Where nobody has imported anyio there is no scope to be shielded from, and the core need not import it.
    anyio = sys.modules.get("anyio._backends._asyncio")
    if anyio is None:
        return False
    state = cast("Any", anyio)._task_states.get(task)  # noqa: SLF001  # see above
    return state is not None and state.cancel_scope is not None
