"""Cuts off a connection whose time is up, and has the server stop what it was doing for it.

PostgreSQL notices a client that has gone only when it has something to say to it (PostgreSQL manual,
``client_connection_check_interval``): a statement whose connection was severed would run on. So a CancelRequest goes
out on a connection of its own (PostgreSQL manual, *Canceling Requests in Progress*), while nobody waits for it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from stanch.callers import current_loop
from stanch.drivers.base import DRAIN_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stanch.drivers import Driver

_committing: Final[set[int]] = set()
"""Ids of the driver's connections on which COMMIT is on its way. Their ids, for not every proxy can be referred to."""

_on_their_way: Final[set[asyncio.Task[None]]] = set()
"""CancelRequests that were not sent yet: nobody else keeps these tasks."""


def stop(driver: Driver, connection: Any) -> bool:
    """Sever *connection* at once, and ask the server to end the statement that runs on it, unless that is COMMIT.

    Never waits and never raises. The request has ``DRAIN_TIMEOUT`` seconds; what it meets is told to nobody, because
    whoever waited for the statement has been told already. A connection that was severed is lent to nobody, so the
    request can hit no other statement. Returns whether one was asked for.
    """
    loop = current_loop()
    if loop is None or id(connection) in _committing:
        driver.sever(connection)
        return False
    request = driver.sever_asking(connection)
    if request is not None:
        task = loop.create_task(_sent(request), name="stanch: stops a statement on the server")
        _on_their_way.add(task)
        task.add_done_callback(_on_their_way.discard)
    return request is not None


class committing:  # noqa: N801  # reads as the verb it is: with committing(connection)
    """COMMIT is on its way on *connection* meanwhile: ``stop()`` severs it, and asks the server for nothing."""

    __slots__ = ("_id",)

    def __init__(self, connection: Any) -> None:
        self._id = id(connection)

    def __enter__(self) -> None:
        _committing.add(self._id)

    def __exit__(self, *_: object) -> None:
        _committing.discard(self._id)


async def all_sent() -> None:
    """Wait until no request of the running loop is on its way; ``DRAIN_TIMEOUT`` seconds at most."""
    loop = asyncio.get_running_loop()
    if under_way := [task for task in _on_their_way if task.get_loop() is loop]:
        await asyncio.wait(under_way)


async def _sent(request: Callable[[], Awaitable[object]]) -> None:
    with suppress(Exception):  # the server has gone, or does not listen: then nothing more can be done
        async with asyncio.timeout(DRAIN_TIMEOUT):
            await request()
