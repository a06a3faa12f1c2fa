"""What can happen that somebody should know of, as frozen values, and who is told.

An event's ``str()`` is one sentence for a log; its fields carry the same facts under the project's words.
No field ever holds SQL, a parameter value or a URL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar, Final

from stanch.values import Value

logger: Final = logging.getLogger("stanch")


class Event(Value):
    """Something that happened to the database called *database*."""

    level: ClassVar[int] = logging.WARNING
    database: str


class WorkDropped(Event):
    """A session ended with writes that nobody had committed; they were rolled back."""

    holder: str
    writes: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.holder} ended with uncommitted writes ({', '.join(self.writes)}); they were rolled back"
        )


class ConnectionSevered(Event):
    """A connection was cut off instead of being reused or waited for."""

    reason: str

    def __str__(self) -> str:
        return f"a connection of database {self.database!r} was severed: {self.reason}"


class SessionStateSet(Event):
    """A unit left state in the server's session; the connection was closed, so that nobody else meets it.

    Told once for each *place*, a line of the user's code, and kind of state.
    """

    what: str
    place: str

    def __str__(self) -> str:
        return (
            f"{self.what} at {self.place} outlives its transaction; the connection of database"
            f" {self.database!r} was closed instead of being reused"
        )


class StillHeld(Event):
    """``close()`` stopped waiting for this holder and severed its connection."""

    holder: str
    held: float

    def __str__(self) -> str:
        return (
            f"database {self.database!r} closed while a connection was still held"
            f" for {self.held:.2f} s by {self.holder}; it was severed"
        )


class TeardownFailed(Event):
    """Ending a session failed after its outcome had already been decided and told."""

    level: ClassVar[int] = logging.ERROR
    holder: str
    error: BaseException

    def __str__(self) -> str:
        return f"ending the session of {self.holder} failed: {type(self.error).__name__}"


class HookFailed(Event):
    """A callback of ``on_commit`` or ``after_rollback`` raised, or took too long; the reply stays as it was."""

    level: ClassVar[int] = logging.ERROR
    holder: str
    hook: str
    place: str
    error: BaseException

    def __str__(self) -> str:
        return (
            f"{self.hook}, which {self.holder} gave to run after its transaction (at {self.place}),"
            f" failed: {type(self.error).__name__}"
        )


class AttemptFailed(Event):
    """Work rolled back and will be done again, after *pause* seconds; *attempt* counts from 1."""

    level: ClassVar[int] = logging.INFO
    work: str
    attempt: int
    reason: str
    pause: float

    def __str__(self) -> str:
        return f"attempt {self.attempt} at {self.work} failed ({self.reason}); again in {self.pause:.3f} s"


class CommitSettled(Event):
    """A connection was lost during COMMIT, and ``verify_commits`` asked: *verdict* is committed, aborted or unknown."""

    verdict: str
    reason: str
    waited: float

    def __str__(self) -> str:
        return (
            f"a connection of database {self.database!r} was lost during COMMIT; after {self.waited:.2f} s"
            f" the verdict is {self.verdict}: {self.reason}"
        )


class CommitsUnverified(Event):
    """``verify_commits`` is on, but has nothing to go by; told once. A lost COMMIT is unknown, as without it."""

    reason: str

    def __str__(self) -> str:
        return f"commits of database {self.database!r} cannot be verified: {self.reason}"


Observer = Callable[[Event], None]


class Observers:
    """Everyone who is told, in the order they came; the log is the first.

    An observer only looks: what it raises is logged and goes no further.

    >>> seen = []
    >>> observers = Observers()
    >>> observers.add(seen.append)
    >>> observers.tell(ConnectionSevered(database="shop", reason="not idle at checkin"))
    >>> print(seen[0])
    a connection of database 'shop' was severed: not idle at checkin
    """

    __slots__ = ("_observers",)

    def __init__(self) -> None:
        self._observers: list[Observer] = [log]

    def add(self, observer: Observer) -> None:
        """Tell *observer* as well from now on."""
        self._observers.append(observer)

    def tell(self, event: Event) -> None:
        """Tell everyone of *event*."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                logger.exception("an observer failed on %s", type(event).__name__)


def log(event: Event) -> None:
    """Write *event* to the logger ``stanch``."""
    logger.log(event.level, "%s", event)
