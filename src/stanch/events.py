"""What can happen that somebody should know of, as frozen values, and who is told.

An event's ``str()`` is one sentence for a log; its fields carry the same facts under the project's words.
No field ever holds a parameter value, a literal of a statement or a URL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    place: str = "?"
    now_at: str = ""
    sql_time: float = 0.0
    task: str = ""
    """The name of its task, where somebody has given it one."""

    def __str__(self) -> str:
        return (
            f"database {self.database!r} closed while a connection was still held for {self.held:.2f} s by"
            f" {_told(self)}; it was severed"
        )


class ConnectionLeaked(Event):
    """A connection has been out for longer than ``leak_after``; told once for each, while it is still out.

    *kind* says what its holder does with it: it is ``running SQL``, ``idle in transaction`` (it waits for something
    that is not the database), ``idle``, or ``its task is gone``: then only somebody who was given the session can
    still return it.
    """

    holder: str
    place: str
    """The line that took it, where that is kept."""
    now_at: str
    """Where the holder's task stands now."""
    kind: str
    held: float
    sql_time: float
    task: str = ""
    """The name of its task, where somebody has given it one."""

    def __str__(self) -> str:
        return (
            f"a connection of database {self.database!r} has been out for {self.held:.2f} s, of which SQL"
            f" {self.sql_time:.3f} s ({self.kind}): {_told(self)}"
        )


class LeakReturned(Event):
    """A connection that was told as ``ConnectionLeaked`` or ``StillHeld`` has come back."""

    level: ClassVar[int] = logging.INFO
    holder: str
    place: str
    held: float
    sql_time: float

    def __str__(self) -> str:
        return (
            f"a connection of database {self.database!r} came back after {self.held:.2f} s, of which SQL"
            f" {self.sql_time:.3f} s; it was held by {_told(self)}"
        )


class SessionDropped(Event):
    """A session or connection was dropped unclosed while it held a connection: a certain leak.

    The garbage collector has found that nobody can use it any more. Its connection was cut off, and its place in the
    pool is free again.
    """

    level: ClassVar[int] = logging.ERROR
    holder: str
    place: str
    held: float
    sql_time: float

    def __str__(self) -> str:
        return (
            f"a connection of database {self.database!r} was reclaimed after {self.held:.2f} s: {_told(self)} was"
            " dropped without being closed"
        )


class HeldIdle(Event):
    """A connection was held for long without being used; told once for each *place*, when it came back."""

    holder: str
    place: str
    held: float
    sql_time: float

    def __str__(self) -> str:
        return (
            f"a connection of database {self.database!r} was held for {self.held:.2f} s, of which SQL"
            f" {self.sql_time:.3f} s, by {_told(self)}: give it back before waiting for something else, as"
            " release(session) does"
        )


class SlowStatement(Event):
    """A statement took ``slow_statement`` seconds or longer. *shape* is its text without any value."""

    shape: str
    seconds: float
    place: str
    holder: str

    def __str__(self) -> str:
        return f"a statement took {self.seconds:.3f} s at {self.place}, for {self.holder}: {self.shape}"


class RepeatedStatement(Event):
    """A unit has sent one statement ``repeated_statement`` times in one transaction: perhaps one would do (N+1).

    Told once for each *place* and *shape*, as soon as it has happened.
    """

    shape: str
    times: int
    place: str
    holder: str

    def __str__(self) -> str:
        return (
            f"{self.holder} has sent one statement {self.times} times at {self.place}: load what it needs at once"
            f" (selectinload, IN): {self.shape}"
        )


def _told(event: Any) -> str:
    """Whose connection it was, from where and where that is now, as far as it is known."""
    name = getattr(event, "task", "")
    words = [f"{event.holder} ({name})" if name else event.holder]
    if event.place not in ("?", event.holder):
        words.append(f"taken at {event.place}")
    now_at = getattr(event, "now_at", "")
    if now_at and now_at != event.place:
        words.append(f"now at {now_at}" if ":" in now_at else now_at)
    return ", ".join(words)


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
    """Write *event* to the logger ``stanch``: as a sentence, and as ``facts_of(event)`` for whoever formats records."""
    if logger.isEnabledFor(event.level):
        logger.log(event.level, "%s", event, extra=facts_of(event))


context_providers: Final[list[Callable[[], Mapping[str, object]]]] = []
"""Each is asked, where an event happens, what else belongs into its record: the id of the trace that is under way."""


def facts_of(event: Event) -> dict[str, object]:
    """What *event* says, as plain values: ``stanch_event`` is its kind, the rest its fields, an error by its class.

    >>> facts_of(ConnectionSevered(database="shop", reason="not idle at checkin"))
    {'stanch_event': 'ConnectionSevered', 'database': 'shop', 'reason': 'not idle at checkin'}
    """
    facts: dict[str, object] = {"stanch_event": type(event).__name__}
    for name in event.fields():
        value = getattr(event, name)
        facts[name] = type(value).__name__ if isinstance(value, BaseException) else value
    for provide in context_providers:
        try:
            known = provide()
        except Exception:
            logger.exception("a context provider failed on %s", type(event).__name__)
            continue
        for name, value in known.items():
            facts.setdefault(name, value)
    return facts
