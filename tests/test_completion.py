"""What is to be completed is completed, whoever cancels, however often; and the cancel is not forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from stanch.completion import is_out_of_reach, run_to_completion

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

tenant: ContextVar[str] = ContextVar("tenant")


class Work:
    """An operation that begins, waits for the test's permission, and ends or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.ended = False
        self._failure = failure

    async def __call__(self) -> str:
        self.begun.set()
        await self.may_end.wait()
        self.ended = True
        if self._failure is not None:
            raise self._failure
        return "done"


async def a_few_turns() -> None:
    """Let everything that is ready run: each turn of the loop is one sleep(0)."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_result_is_handed_through() -> None:
    work = Work()
    work.may_end.set()
    assert await run_to_completion(work()) == "done"


async def test_failure_is_handed_through() -> None:
    work = Work(ValueError("mine"))
    work.may_end.set()
    with pytest.raises(ValueError, match="mine"):
        await run_to_completion(work())


@pytest.mark.parametrize("cancels", [1, 2, 7])
async def test_cancel_waits_for_the_end_and_is_then_raised(cancels: int) -> None:
    work = Work()
    task = asyncio.create_task(run_to_completion(work()))
    await work.begun.wait()
    for _ in range(cancels):
        task.cancel()
        await a_few_turns()
        assert not task.done(), "the operation has not ended yet"
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended
    assert task.cancelling() == cancels, "no cancel was accounted away"


async def test_cancel_before_the_first_step_still_completes() -> None:
    work = Work()
    work.may_end.set()

    async def outer() -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()  # arrives at the first await, which is inside
        await run_to_completion(work())

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(outer())
    assert work.ended


async def test_failure_is_the_cause_of_the_cancellation() -> None:
    failure = ValueError("mine")
    work = Work(failure)
    task = asyncio.create_task(run_to_completion(work()))
    await work.begun.wait()
    task.cancel()
    await a_few_turns()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    chain: list[BaseException] = [caught.value]
    while (link := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(link)
    assert failure in chain


async def test_timeout_becomes_timeout_error_after_the_end() -> None:
    work = Work()
    async with asyncio.timeout(5):
        helpers: list[asyncio.Task[None]] = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                helpers.append(asyncio.create_task(_end_after_the_cancel(work, limit)))
                await run_to_completion(work())
        await helpers[0]
    assert work.ended
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0, "the timeout took its own cancel back"


async def _end_after_the_cancel(work: Work, limit: asyncio.Timeout) -> None:
    await work.begun.wait()
    limit.reschedule(asyncio.get_running_loop().time())
    while not limit.expired():  # noqa: ASYNC110  # a timeout has no event
        await asyncio.sleep(0)
    await a_few_turns()
    assert not work.ended
    work.may_end.set()


async def test_real_cancel_beside_a_timeout_is_not_taken_for_the_timeout() -> None:
    work = Work()

    async def outer() -> None:
        async with asyncio.timeout(None) as limit:
            waiting = asyncio.create_task(_end_after_the_cancel(work, limit))
            await run_to_completion(work())
        await waiting

    task = asyncio.create_task(outer())
    await work.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended


async def test_anyio_scope_neither_cuts_the_operation_nor_spins() -> None:
    work = Work()
    turns = Counter[str]()
    loop: Any = asyncio.get_running_loop()
    run_once: Callable[[], None] = loop._run_once

    def counted() -> None:
        turns["loop"] += 1
        run_once()

    loop._run_once = counted
    ended_inside = False
    try:
        with anyio.CancelScope() as scope:
            loop.call_later(0.05, work.may_end.set)
            loop.call_soon(scope.cancel)
            await run_to_completion(work())
            ended_inside = work.ended
            await asyncio.sleep(0)  # a level cancellation is delivered at any await that is not shielded
    finally:
        del loop._run_once
    assert ended_inside
    assert scope.cancelled_caught
    assert 0 < turns["loop"] < 50, "a level cancellation that is not shielded off spins in a tight loop"


async def test_anyio_cancel_is_delivered_at_the_next_await_after_the_end() -> None:
    work = Work()
    reached: list[str] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        work.may_end.set()
        assert await run_to_completion(work()) == "done"
        reached.append("after the operation")
        await asyncio.sleep(0)
        reached.append("after the next await")
    assert reached == ["after the operation"]


async def test_anyio_scope_and_task_cancel_together() -> None:
    work = Work()

    async def outer() -> None:
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await run_to_completion(work())

    task = asyncio.create_task(outer())
    await work.begun.wait()
    task.cancel()
    await a_few_turns()
    assert not task.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended


async def test_scope_that_was_not_cancelled_is_left_alone() -> None:
    work = Work()
    work.may_end.set()
    with anyio.CancelScope() as scope:
        await run_to_completion(work())
        await asyncio.sleep(0)
    assert not scope.cancelled_caught


async def test_nested_completion_needs_no_second_task() -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    async def inner() -> None:
        tasks.append(asyncio.current_task())

    async def middle() -> None:
        tasks.append(asyncio.current_task())
        assert is_out_of_reach()
        await run_to_completion(inner())

    assert not is_out_of_reach()
    await run_to_completion(middle())
    assert tasks[0] is tasks[1]
    assert tasks[0] is not asyncio.current_task()


async def test_operation_sees_the_context_variables_of_the_caller() -> None:
    async def look() -> str:
        return tenant.get()

    tenant.set("acme")
    assert await run_to_completion(look()) == "acme"


def test_operation_cancelled_by_the_dying_loop_ends_the_wait() -> None:
    """asyncio.run() cancels every task when it is interrupted, also the one that is out of reach."""

    async def main() -> None:
        work = Work()
        task = asyncio.create_task(run_to_completion(work()))
        await work.begun.wait()
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()
        await asyncio.wait((task,), timeout=5)
        assert task.cancelled()

    asyncio.run(main())


def test_whatever_is_under_way_when_a_loop_ends_is_cancelled_with_it() -> None:
    """asyncio.run() cancels what is left in no order, while no task runs: also who waits, and what is waited for."""
    works: list[Work] = []
    waiting: list[asyncio.Task[str]] = []

    async def main() -> None:
        for _ in range(20):
            works.append(Work())
            waiting.append(asyncio.create_task(run_to_completion(works[-1]())))
            await works[-1].begun.wait()

    asyncio.run(main())
    assert all(task.cancelled() for task in waiting)
    assert not any(work.ended for work in works)


async def test_a_task_that_was_cancelled_before_is_out_of_reach_of_the_next_one() -> None:
    """Its count of cancellations is not zero then, as in a task that went on after one."""
    work = Work()

    async def outer() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await run_to_completion(work())
        return "never"

    task = asyncio.create_task(outer())
    await a_few_turns()
    task.cancel()
    await work.begun.wait()
    task.cancel()
    await a_few_turns()
    assert not task.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended
    assert task.cancelling() == 2
