"""One absolute deadline, and the name of whoever set it: a timeout is turned into it once and travels down.

Nothing here waits or cancels. Whoever waits asks ``within()`` how long he may, and whoever opens a unit of work
says ``under()`` which deadline holds inside.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from stanch.errors import DeadlinePassed
from stanch.settings.kinds import Complaint, Seconds, complain, judged

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextvars import Token

_LENGTH: Final = Seconds("2.0", optional=True)

_EARLY: Final = 0.001
"""Seconds by which a wait may end before its deadline: an event loop rounds."""

GRACE: Final = 0.25
"""Seconds that tidying up gets although the deadline has passed: a ROLLBACK to a living server takes one."""


class Deadline(NamedTuple):
    """A moment, *at* (monotonic seconds), that *timeout* seconds were given to reach; *source* says by whom.

    >>> Deadline(at=0.0, timeout=2.0, source="transaction(timeout=2.0)").remaining()
    0.0
    """

    at: float
    timeout: float
    source: str

    @classmethod
    def after(cls, timeout: float, source: str) -> Deadline:
        """The deadline *timeout* seconds from now."""
        return cls(time.monotonic() + timeout, timeout, source)

    @classmethod
    def given(cls, timeout: object, source: str) -> Deadline | None:
        """The deadline that a user's *timeout* means from now on, or None; ``ConfigError`` for what is no length."""
        if timeout is None:
            return None
        length = judged_length(source, timeout)
        assert length is not None
        return cls.after(length, source)

    def remaining(self) -> float:
        """Seconds that are left; 0.0 once it has passed."""
        return max(0.0, self.at - time.monotonic())

    @property
    def has_passed(self) -> bool:
        """Whether nothing is left of it."""
        return self.remaining() < _EARLY

    def __str__(self) -> str:
        return f"the {self.timeout:.2f} s of {self.source}"

    def passed(self, what: str) -> DeadlinePassed:
        """The error of whoever was kept from going on: *what* was under way, and what became of it."""
        return DeadlinePassed(
            what,
            remedies=[
                "See what the server is doing: select * from pg_stat_activity where state <> 'idle'.",
                f"Raise {self.source} only if the work truly needs longer.",
            ],
        )


def judged_length(name: str, timeout: object) -> float | None:
    """*timeout* in seconds as a float, or None; ``ConfigError``, naming *name*, for what is no length of time.

    >>> judged_length("request_timeout", 2)
    2.0
    >>> judged_length("timeout", True)
    Traceback (most recent call last):
    stanch.errors.ConfigError: timeout must be seconds, as an int or float from 0.001 to 86400, or None, got True
      1. Write timeout=2.0.
      stanch explain config
    """
    complaints: list[Complaint] = []
    length: float | None = judged(name, _LENGTH, timeout, complaints)
    complain(complaints)
    return length


def earlier(one: Deadline | None, other: Deadline | None) -> Deadline | None:
    """Whichever of the two passes first; a missing one never does."""
    if one is None or other is None:
        return one or other
    return one if one.at <= other.at else other


class Allowance:
    """The deadline of one call of the app: it holds for all that is done in it, until the reply has left."""

    __slots__ = ("deadline",)

    def __init__(self, deadline: Deadline) -> None:
        self.deadline: Deadline | None = deadline


_in_force: Final[ContextVar[Deadline | None]] = ContextVar("stanch deadline", default=None)
_of_the_call: Final[ContextVar[Allowance | None]] = ContextVar("stanch deadline of the call", default=None)


def in_force() -> Deadline | None:
    """The deadline of whatever is being done now, or None."""
    call = _of_the_call.get()
    return _in_force.get() if call is None else earlier(_in_force.get(), call.deadline)


def within(timeout: float) -> float:
    """How long a wait may take that is allowed *timeout* seconds by itself: that, or less under a deadline."""
    deadline = in_force()
    return timeout if deadline is None else min(timeout, deadline.remaining())


def to_tidy_up(timeout: float) -> float:
    """As ``within()``, for what must be done all the same (ROLLBACK, close): *timeout* at most, ``GRACE`` at least."""
    deadline = in_force()
    return timeout if deadline is None else min(timeout, max(deadline.remaining(), GRACE))


def whose(setting: str, timeout: float) -> str:
    """After a wait of ``within(timeout)``, in words: whether *setting* or the deadline has ended it.

    >>> whose("connect_timeout", 5.0)
    'connect_timeout 5.00 s'
    """
    deadline = in_force()
    return str(deadline) if deadline is not None and deadline.has_passed else f"{setting} {timeout:.2f} s"


def impose(deadline: Deadline) -> Token[Deadline | None]:
    """Put *deadline* in force, unless an earlier one is, until ``lift()``; for what is too hot for ``under()``."""
    return _in_force.set(earlier(_in_force.get(), deadline))


def lift(token: Token[Deadline | None]) -> None:
    """Undo ``impose()``."""
    _in_force.reset(token)


@contextmanager
def under(deadline: Deadline | None) -> Generator[None]:
    """*deadline* is in force inside the block; None changes nothing."""
    if deadline is None:
        yield
        return
    token = impose(deadline)
    try:
        yield
    finally:
        lift(token)


@contextmanager
def only_under(deadline: Deadline | None) -> Generator[None]:
    """*deadline* alone is in force inside the block, or none: for what the deadline outside has no say in."""
    token, call = _in_force.set(deadline), _of_the_call.set(None)
    try:
        yield
    finally:
        _of_the_call.reset(call)
        lift(token)


@contextmanager
def allowed(allowance: Allowance) -> Generator[None]:
    """*allowance* holds for all that is done in the block, and in tasks that begin in it."""
    token = _of_the_call.set(allowance)
    try:
        yield
    finally:
        _of_the_call.reset(token)


# What was cut off -----------------------------------------------------------------------------------------

_reasons: Final[WeakKeyDictionary[Any, tuple[Deadline, str]]] = WeakKeyDictionary()
"""Why a driver's connection was severed: whoever waited for it gets a disconnect error that tells nothing of it."""


def give_reason(connection: object, deadline: Deadline, what: str) -> None:
    """Remember that the driver's *connection* is severed because *deadline* has passed, and *what* that ended."""
    _reasons[connection] = deadline, what


def reason_of(connection: object) -> DeadlinePassed | None:
    """The error for whoever finds *connection* severed, if a deadline has done it."""
    found = _reasons.get(connection)
    return None if found is None else found[0].passed(found[1])
