"""Keeps the connection of a cancelled statement: ended on the server, read to its end, and proved to be free.

SQLAlchemy throws away every connection on which a task is cancelled, and under anyio it leaves the statement
running on the server. A ``handle_error`` listener is told before that happens, costs nothing as long as nothing
goes wrong, and may say that the connection lives (SQLAlchemy manual, *Core Events*, ``handle_error``).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.util import await_only

from stanch.completion import run_to_completion

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.interfaces import ExceptionContext

    from stanch.drivers import Driver


def keep_cancelled_connections(engine: Engine, *, driver: Driver) -> None:
    """Let a cancelled statement of *engine* cost no connection if *driver* can prove that it has ended.

    What can still happen to the transaction is the ordinary thing: it is rolled back, or back to a savepoint. The
    wait for the server is bounded and out of reach of any further cancellation; what is not free by then is severed.
    """

    def handle_error(context: ExceptionContext) -> None:
        connection = context.connection
        if (
            not isinstance(context.original_exception, asyncio.CancelledError)
            or connection is None
            or connection.closed
            or connection.invalidated
        ):
            return
        inner = connection.connection.driver_connection
        if _is_an_end(context):
            # It ran to its end out of reach of the cancellation, but it may have failed besides.
            context.is_disconnect = not driver.is_idle(inner)
        elif _is_undone_by_rollback(context) and _drained(driver, inner):
            context.is_disconnect = False

    event.listen(engine, "handle_error", handle_error)


def _is_an_end(context: ExceptionContext) -> bool:
    """Whether it was COMMIT or ROLLBACK: only these come without a statement and belong to none."""
    return context.statement is None and context.execution_context is None


def _is_undone_by_rollback(context: ExceptionContext) -> bool:
    """Whether what the cancelled statement may have done goes with its transaction or savepoint."""
    # RELEASE may have succeeded: the savepoint's work would be stored although its block was cancelled.
    return not (context.statement or "").startswith("RELEASE ")


def _drained(driver: Driver, inner: Any) -> bool:
    free = False

    async def drain() -> None:
        nonlocal free
        free = await driver.drain(inner)

    # Another cancellation meanwhile: the first one is under way already, and tells the same.
    with suppress(asyncio.CancelledError):
        await_only(run_to_completion(drain()))
    return free
