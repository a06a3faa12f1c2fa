"""Waits, bounded, for a database that is still starting."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sqlalchemy import text

from stanch.completion import run_to_completion
from stanch.retry import backoff
from stanch.sqlstate import Kind, classify

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


async def until_it_answers(engine: AsyncEngine, *, wait: float) -> None:
    """Return once *engine* has executed a statement.

    While the server is starting or unreachable, try again for up to *wait* seconds, then raise what stood in the
    way. Any other failure, such as a wrong password, is raised at once: waiting would not mend it.
    """
    give_up_at = time.monotonic() + wait
    attempt = 0
    while True:
        try:
            await _ask(engine)
        except Exception as error:
            attempt += 1
            pause = backoff(attempt)
            failure = classify(error)
            if (
                failure is None
                or failure.kind is not Kind.UNAVAILABLE
                or not failure.retryable
                or time.monotonic() + pause > give_up_at
            ):
                raise
            await asyncio.sleep(pause)
        else:
            return


async def _ask(engine: AsyncEngine) -> None:
    connection = await engine.connect()
    try:
        await connection.execute(text("SELECT 1"))
    finally:
        await run_to_completion(connection.close())
