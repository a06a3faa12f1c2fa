"""Whether another attempt at the same work is worth it, and after how long: pure, the caller sleeps."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stanch.errors import CommitUnknown, DatabaseClosed
from stanch.settings.kinds import Complaint, Seconds, Switch, Whole, complain, judged
from stanch.sqlstate import IDLE_IN_TRANSACTION_TIMEOUT, TRANSACTION_TIMEOUT, classify
from stanch.values import Value

if TYPE_CHECKING:
    from stanch.settings.kinds import Kind

MOST_ATTEMPTS: Final = 100
"""More than any contention needs: who fails that often in a row has another problem."""

_KINDS: Final[dict[str, Kind]] = {
    "attempts": Whole(1, MOST_ATTEMPTS, example="5"),
    "timeout": Seconds(example="10.0", optional=True),
    "base": Seconds(example="0.02"),
    "cap": Seconds(example="2.0"),
    "idempotent": Switch(),
}

_WORK_TOO_SLOW: Final = frozenset({IDLE_IN_TRANSACTION_TIMEOUT, TRANSACTION_TIMEOUT})
"""The server has ended the connection because of the work itself, which would be as slow the next time."""


class Attempt(Value):
    """Which attempt at the same work this is; *maybe_committed*: an earlier one may have stored something."""

    number: int = 1
    maybe_committed: bool = False

    def after(self, error: Exception, *, committed: bool) -> Attempt:
        """The attempt after this one, which *error* ended; *committed*: something was committed by hand in it."""
        unknown = isinstance(error, CommitUnknown)
        return Attempt(self.number + 1, self.maybe_committed or committed or unknown)


class Retry(Value, kw_only=True):
    """How often the same work may be attempted, and how long to wait in between.

    *attempts* counts the first one: 1 never repeats. *timeout* is in seconds, for all attempts and the pauses
    between them; after it none is begun. The pause before the n-th repetition is drawn evenly from 0 to
    ``min(cap, base * 2**n)`` seconds. *idempotent* declares that the work does no harm when it is done twice:
    only then is it attempted again after an unknown commit, or after a commit of its own.

    A wrong value raises ``ConfigError`` at construction.

    >>> Retry(attempts=5, timeout=2.0)
    Retry(attempts=5, timeout=2.0, base=0.02, cap=2.0, idempotent=False)
    """

    attempts: int = 3
    timeout: float | None = None
    base: float = 0.02
    cap: float = 2.0
    idempotent: bool = False

    @override
    def __post_init__(self) -> None:
        complaints: list[Complaint] = []
        for name, kind in _KINDS.items():
            judged(name, kind, getattr(self, name), complaints)
        if not complaints and self.cap < self.base:
            complaints.append(
                Complaint(f"cap={self.cap} is less than base={self.base}", "Leave out cap, or raise it.")
            )
        complain(complaints)

    @classmethod
    def of(cls, retry: Retry | int) -> Retry:
        """*retry* itself, or that many attempts.

        >>> Retry.of(5).attempts
        5
        """
        return retry if isinstance(retry, Retry) else cls(attempts=retry)

    def pause_before(
        self,
        attempt: Attempt,
        error: Exception,
        *,
        remaining: float = math.inf,
        draw: random.Random | None = None,
    ) -> float | None:
        """Seconds to wait before *attempt*, or None: it is not to be made. *error* ended the one before.

        *remaining* is what is left of the deadline, in seconds; an attempt that could only begin after it is not
        made, and not waited for.
        """
        if attempt.number > self.attempts or not may_pass(error):
            return None
        if attempt.maybe_committed and not self.idempotent:
            return None
        pause = backoff(attempt.number - 1, base=self.base, cap=self.cap, draw=draw)
        return pause if pause < remaining else None


def may_pass(error: Exception) -> bool:
    """Whether the same work, done again in another transaction, may fare better.

    So it may after a serialization failure or deadlock (PostgreSQL manual, *Serialization Failure Handling*),
    SQLite's busy, a server that is not there, a connection lost before COMMIT, and an unknown commit. Not with
    a full pool or a closed ``Database``, and not where time ran out: that would make the load worse.

    >>> may_pass(ValueError("mine"))
    False
    """
    if isinstance(error, CommitUnknown):
        return True
    failure = classify(error)
    return (
        failure is not None
        and failure.retryable
        and failure.sqlstate not in _WORK_TOO_SLOW
        and not isinstance(error, DatabaseClosed)
    )


def backoff(
    attempt: int, *, base: float = 0.05, cap: float = 2.0, draw: random.Random | None = None
) -> float:
    """Seconds to wait before *attempt* (1 is the first repetition): exponential, capped, fully jittered.

    Full jitter keeps many clients of a recovering server apart (M. Brooker, *Exponential Backoff And
    Jitter*).

    >>> all(0.0 <= backoff(attempt) <= 2.0 for attempt in range(1, 50))
    True
    """
    ceiling = min(cap, base * 2.0 ** min(attempt, 32))
    return (draw or random).uniform(0.0, ceiling)
