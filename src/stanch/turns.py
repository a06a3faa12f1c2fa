"""How a caller waits for its turn: on the event loop it runs on, or as a thread.

All that waits in the pool waits here. A turn can be woken from any thread, also by the garbage collector, before,
while and after it is waited for; no wake is lost. What it is woken for, the ledger says.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Protocol

from sqlalchemy.util import await_only

from stanch.callers import current_loop


class Turn(Protocol):
    """One caller's wait."""

    def wake(self) -> None:
        """End the wait that is under way, or the next one; never waits itself."""
        ...

    def wait(self, timeout: float) -> None:
        """Return once woken, or after *timeout* seconds. Raises what ends the waiting task or thread."""
        ...


class LoopTurn(Turn):
    """Of code that runs under SQLAlchemy's greenlet on an event loop."""

    __slots__ = ("_future", "_is_woken", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None
        self._is_woken = False

    def wake(self) -> None:
        """See `Turn`."""
        if current_loop() is self._loop:
            self._ring()
        else:  # the garbage collector on another thread, where a future of this loop must not be touched
            with suppress(RuntimeError):  # it is closed: nobody waits there any more
                self._loop.call_soon_threadsafe(self._ring)

    def wait(self, timeout: float) -> None:
        """See `Turn`."""
        if self._is_woken:
            self._is_woken = False
            return
        future = self._future = self._loop.create_future()
        alarm = self._loop.call_later(timeout, _resolve, future)
        try:
            await_only(future)
        finally:
            alarm.cancel()
            self._future, self._is_woken = None, False

    def _ring(self) -> None:
        self._is_woken = True
        if self._future is not None:
            _resolve(self._future)


class ThreadTurn(Turn):
    """Of a thread."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def wake(self) -> None:
        """See `Turn`."""
        self._event.set()

    def wait(self, timeout: float) -> None:
        """See `Turn`."""
        self._event.wait(timeout)
        self._event.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
