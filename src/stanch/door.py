"""Whether the server may be asked for one more connection now, and by whom: pure, every time is handed in.

While the server takes connections, whoever has room in the pool opens one. Once it has turned somebody away, one at a
time tries, and not before a pause has passed: a thousand callers before a closed door are no help to a server that
starts, and none of them learns more than the first has. The pause is short at first, for most outages are restarts that
are over in a moment, and grows to a second. What the others do meanwhile is the pool's business: they are told, if
nothing is out that could come back to them, or they wait for that.
"""

from __future__ import annotations

import random
from enum import Enum
from typing import TYPE_CHECKING, Final

from stanch.errors import DatabaseUnavailable
from stanch.sqlstate import TOO_MANY_CONNECTIONS, says_server_has_gone, sqlstate_of
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_INTERVAL: Final = 1.0
"""Seconds between two attempts to reach a server that stays away; who asks meanwhile waits so long at most."""

_FIRST_PAUSE: Final = 0.05
"""Seconds before it is asked again the first time, doubled with each attempt up to that interval."""


class State(Enum):
    """What is known of the server."""

    UNKNOWN = "unknown"  # nothing was ever opened: one tries, the others wait for what comes of it
    OPEN = "open"
    FULL = "full"  # it answers, and has no room for another connection
    AWAY = "away"  # it cannot be reached, or takes nobody


class Trouble(Value):
    """Why the server let nobody in: the last failure, to be told to all who asked."""

    what: str
    remedies: Sequence[str]
    sqlstate: str | None
    cause: BaseException | None

    @classmethod
    def of(cls, error: DatabaseUnavailable) -> Trouble:
        """What *error* says."""
        return cls(error.what, error.remedies, sqlstate_of(error), error.__cause__)

    @property
    def is_full(self) -> bool:
        """Whether it is known that only room was lacking."""
        return self.sqlstate == TOO_MANY_CONNECTIONS

    @property
    def is_answer(self) -> bool:
        """Whether it was the server who said no, and not to everybody: then it may still serve those who are out.

        libpq keeps the SQLSTATE of a refusal to itself, so what is no failure of the network may be one.
        """
        if self.sqlstate is None:
            return not isinstance(self.cause, OSError | UnicodeError | None)
        return not says_server_has_gone(self.sqlstate)

    def told(self) -> DatabaseUnavailable:
        """The error for one who asked; each has one of his own, for each adds his own traceback."""
        error = DatabaseUnavailable(self.what, remedies=self.remedies)
        error.__cause__ = self.cause
        return error


class Door:
    """What one pool knows of its server. *who* is whatever the caller tells attempts apart by.

    >>> door = Door(random.Random(1))
    >>> refused = Trouble("refused", (), None, ConnectionRefusedError())
    >>> door.begin("one", 9.0), door.fail("one", refused, now=10.0, others=0)
    (None, False)
    >>> door.lets_try(10.02), door.lets_try(10.05)
    (False, True)
    >>> door.begin("two", 10.05), door.fail("two", refused, now=10.05, others=0)
    (None, True)
    >>> door.lets_try(10.1), door.lets_try(10.15)
    (False, True)
    """

    __slots__ = ("_attempts", "_draw", "_who", "next_try", "state", "trouble")

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random
        self._attempts = 0
        self._who: object = None
        self.state = State.UNKNOWN
        self.trouble: Trouble | None = None
        """The last failure, while it is not open."""
        self.next_try = 0.0
        """When somebody may try again, while it is not open."""

    @property
    def is_open(self) -> bool:
        """Whether everybody may open connections."""
        return self.state is State.OPEN

    @property
    def is_tried(self) -> bool:
        """Whether somebody tries at this moment, while it is not open."""
        return self._who is not None

    def is_tried_by(self, who: object) -> bool:
        """Whether it is *who* that tries."""
        return self._who is who

    def lets_try(self, now: float) -> bool:
        """Whether somebody may try now, although it is not open."""
        return self._who is None and now >= self.next_try

    def begin(self, who: object, now: float) -> None:
        """*who* tries now, while it is not open."""
        self._who = who
        if self.state is State.AWAY:
            # Also one that is given up counts: else callers in a hurry would ask at the first pace for ever.
            self._attempts += 1
            self.next_try = now + self._pause

    def give_up(self, who: object) -> None:
        """If *who* has tried, it was given up for a reason of his own: nothing was learned, another may try."""
        if self._who is who:
            self._who = None

    def make_room(self, now: float) -> None:
        """A connection of ours has ended: a server that was full may have room for another one now."""
        if self.state is State.FULL:
            self.next_try = now

    def succeed(self) -> None:
        """A connection is ready for use."""
        self.state, self.trouble, self._who, self._attempts = State.OPEN, None, None, 0

    def fail(self, who: object, trouble: Trouble, *, now: float, others: int) -> bool:
        """The server turned *who* away. Is it worth waiting, for room, the *others* that are out, or its return?

        For its return as long as it is asked again soon; but by the first failure all are told, for it may last.
        With *others* whatever else it has answered is taken for a lack of room: it serves them, after all.
        """
        self.give_up(who)
        self.trouble = trouble
        if trouble.is_full:
            self._becomes(State.FULL)
            self._attempts += 1
            self.next_try = now + self._draw.uniform(self._pause / 2, self._pause)
            return True
        if others and trouble.is_answer:
            self._becomes(State.FULL)
            self.next_try = now + PROBE_INTERVAL
            return True
        was_known = self.state is State.AWAY
        self._becomes(State.AWAY)
        self.next_try = now + self._pause
        return was_known and self._pause < PROBE_INTERVAL

    @property
    def _pause(self) -> float:
        return min(PROBE_INTERVAL, _FIRST_PAUSE * 2.0 ** min(self._attempts, 16))

    def _becomes(self, state: State) -> None:
        if state is not self.state:
            self.state, self._attempts = state, 0
