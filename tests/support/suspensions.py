"""Cuts a coroutine at a suspension point of one's choice: exhaustive where a random cancel only samples."""

from __future__ import annotations

import asyncio
import types
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Generator

T = TypeVar("T")


@types.coroutine
def watched(operation: Coroutine[Any, Any, T], at: Callable[[int], None]) -> Generator[Any, Any, T]:
    """*operation*, with a call of ``at(number)`` each time it has suspended; the first number is 1."""
    number = 0
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            awaited = operation.send(value) if error is None else operation.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        number += 1
        at(number)
        try:
            value, error = (yield awaited), None
        except BaseException as thrown:
            error = thrown


async def suspensions(operation: Coroutine[Any, Any, object]) -> int:
    """How often *operation* suspends the task that awaits it, undisturbed."""
    seen = [0]
    await watched(operation, seen.append)
    return seen[-1]


async def cancelled_at(
    operation: Coroutine[Any, Any, object], points: Collection[int], *, timeout: float = 20.0
) -> tuple[BaseException | None, int]:
    """Run *operation* in a task that is cancelled at each of the suspension *points*.

    Returns what came out of it (None: it ended well) and how many of the points were reached.
    """
    reached = 0

    def at(number: int) -> None:
        nonlocal reached
        if number in points:
            reached += 1
            task.cancel()

    async def run() -> None:
        await watched(operation, at)

    task = asyncio.create_task(run())
    done, _ = await asyncio.wait((task,), timeout=timeout)
    if not done:
        task.cancel()
        raise AssertionError(f"cancelled at {sorted(points)}, it did not end within {timeout} s")
    if task.cancelled():
        return asyncio.CancelledError(), reached
    return task.exception(), reached
