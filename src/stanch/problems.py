"""What a database failure means to an HTTP client: RFC 9457 problem details, without SQL, values or host names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, cast

from stanch.errors import (
    ClientGone,
    IdempotencyInProgress,
    IdempotencyKeyInvalid,
    IdempotencyKeyReused,
    PartialCommit,
)
from stanch.sqlstate import Kind, classify

MEDIA_TYPE: Final = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Problem:
    """A reply to a failure. *retry_after* is in seconds; None where repeating the request is no remedy."""

    status: int
    slug: str
    title: str
    retry_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The members of RFC 9457 section 3.1; nothing in them comes from the failure's own text."""
        return {"type": f"urn:stanch:problem:{self.slug}", "title": self.title, "status": self.status}

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After`` (RFC 9110 section 10.2.3), where there is one."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


_PROBLEMS: Final = {
    Kind.CONFLICT: Problem(409, "conflict", "The request conflicts with what is already stored."),
    Kind.INVALID: Problem(422, "invalid", "A value is missing or out of bounds."),
    Kind.CONTENTION: Problem(503, "contention", "Another request was in the way. Try again.", retry_after=1),
    Kind.TIMEOUT: Problem(504, "timeout", "The database took too long."),
    Kind.POOL_FULL: Problem(503, "busy", "The service is busy. Try again.", retry_after=1),
    Kind.UNAVAILABLE: Problem(503, "unavailable", "The database is not available. Try again.", retry_after=2),
    Kind.READ_ONLY: Problem(503, "read-only", "The database accepts no writes at the moment.", retry_after=2),
    Kind.UNKNOWN_OUTCOME: Problem(
        503,
        "commit-outcome-unknown",
        "Outcome unknown: the work may or may not be stored. Look before repeating it.",
    ),
}
_OWN: Final[dict[type[BaseException], Problem]] = {
    PartialCommit: Problem(500, "partial-commit", "A part of the work is stored, another part failed."),
    IdempotencyKeyInvalid: Problem(
        400, "idempotency-key", "The header Idempotency-Key must hold one key of 1 to 255 visible characters."
    ),
    IdempotencyInProgress: Problem(
        409, "idempotency-in-progress", "A request with this key is still being worked on.", retry_after=1
    ),
    IdempotencyKeyReused: Problem(
        422, "idempotency-reused", "This Idempotency-Key belongs to another request."
    ),
    # nginx's status for it; nobody is there to read it, but the access log should not say 200 or 500
    ClientGone: Problem(499, "client-gone", "The client has hung up."),
}
_REPEATABLE: Final = replace(
    _PROBLEMS[Kind.UNKNOWN_OUTCOME],
    title="Outcome unknown: the work may or may not be stored. Repeat the request with the same key.",
    retry_after=1,
)


def problem_of(error: BaseException, *, repeatable: bool = False) -> Problem | None:
    """The reply to *error*, or None where it is not for us to answer.

    *repeatable*: the client has sent a key that makes repeating harmless, also when the outcome is unknown. The
    failures of a task group are answered if all of them are the database's: then as the first of them.

    >>> from stanch.errors import PoolExhausted
    >>> problem_of(PoolExhausted("full")).status
    503
    >>> problem_of(ValueError()) is None
    True
    """
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        problems = [problem_of(part, repeatable=repeatable) for part in group.exceptions]
        return problems[0] if all(problems) else None
    if (own := _OWN.get(type(error))) is not None:
        return own
    failure = classify(error)
    if repeatable and failure is not None and failure.kind is Kind.UNKNOWN_OUTCOME:
        return _REPEATABLE
    return None if failure is None else _PROBLEMS.get(failure.kind)
