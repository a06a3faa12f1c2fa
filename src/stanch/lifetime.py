"""How long a ``Database`` lives: opened by count, drained before it ends, refused afterwards."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Final

from stanch.errors import DatabaseClosed


class State(Enum):
    """Where a ``Database`` stands."""

    NEW = "not opened yet"  # the first use opens it
    OPEN = "open"
    DRAINING = "closing"
    CLOSED = "closed"


# Python 3.11 finds a member of an enum by a function of its own, at each use.
_OPEN: Final = State.OPEN
_CLOSED: Final = State.CLOSED


class Lifetime:
    """The state of one ``Database``, who has opened it, and how many are at work in it."""

    __slots__ = ("_at_work", "_empty", "_name", "_openers", "state")

    def __init__(self, name: str) -> None:
        self._name = name
        self._openers = 0
        self._at_work = 0
        self._empty: asyncio.Event | None = None
        self.state = State.NEW

    def open(self) -> bool:
        """Count one opener more. True if it is the first, who has the work of opening."""
        if self.state is State.DRAINING:
            self._refuse()
        self._openers += 1
        self.state = State.OPEN
        return self._openers == 1

    def close(self) -> bool:
        """Count one opener less. True if nobody is left, and the caller must drain. Closing twice does nothing."""
        self._openers = max(0, self._openers - 1)
        if self._openers or self.state in {State.DRAINING, State.CLOSED}:
            return False
        self.state = State.DRAINING
        return True

    def closed(self) -> None:
        """The draining is over."""
        self.state = State.CLOSED

    def enter(self) -> None:
        """Somebody begins to work; the first use of a new ``Database`` opens it.

        Raises ``DatabaseClosed`` while draining and afterwards.
        """
        if self.state is not _OPEN:
            if self.state is not State.NEW:
                self._refuse()
            self.state = _OPEN
        self._at_work += 1

    def leave(self) -> None:
        """Somebody has ended the work that ``enter`` counted."""
        self._at_work -= 1
        if not self._at_work and self._empty is not None:
            self._empty.set()

    async def empty(self) -> None:
        """Wait until nobody is at work."""
        while self._at_work:
            self._empty = asyncio.Event()
            await self._empty.wait()

    def refuse_closed(self) -> None:
        """Raises ``DatabaseClosed`` after the draining; until then what has begun may go on."""
        if self.state is _CLOSED:
            self._refuse()

    def _refuse(self) -> None:
        raise DatabaseClosed(
            f"database {self._name!r} is {self.state.value}",
            remedies=["Open it again: async with db, or await db.open()."],
        )
