"""The SQLSTATEs stanch acts on, by name, and what a database failure means.

Classification goes by SQLSTATE (PostgreSQL manual, appendix A), never by message text: the same failure has
another class in every driver. asyncpg raises a bare ``DBAPIError`` for 40001 and a raw ``OSError`` when
refused.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from sqlalchemy import exc

from stanch import errors
from stanch.values import Value


class Kind(Enum):
    """What a failure means to whoever must answer for it."""

    CONFLICT = "conflict"  # unique, exclusion or foreign key
    INVALID = "invalid"  # not null, check, too long, out of range
    CONTENTION = "contention"  # serialization failure or deadlock: the same work may succeed next time
    TIMEOUT = "timeout"  # a lock or statement timeout of the server
    POOL_FULL = "pool full"
    UNAVAILABLE = "unavailable"  # refused, starting up, shutting down, gone, too many connections
    READ_ONLY = "read only"  # a demoted primary
    UNKNOWN_OUTCOME = "unknown outcome"  # lost during COMMIT
    PROGRAMMING = "programming"  # nothing a client or a retry could mend


class Failure(Value):
    """A database failure, told the same for every driver.

    *retryable*: the whole unit of work may be run again. *disconnect*: the connection is of no more use.
    *constraint* is the name of the violated constraint, a schema word; it is not for replies.
    """

    kind: Kind
    sqlstate: str | None = None
    constraint: str | None = None
    retryable: bool = False
    disconnect: bool = False


INVALID_PARAMETER_VALUE: Final = "22023"
IN_FAILED_TRANSACTION: Final = "25P02"
READ_ONLY_TRANSACTION: Final = "25006"
SERIALIZATION_FAILURE: Final = "40001"
DEADLOCK_DETECTED: Final = "40P01"
LOCK_NOT_AVAILABLE: Final = "55P03"
QUERY_CANCELED: Final = "57014"
IDLE_IN_TRANSACTION_TIMEOUT: Final = "25P03"
TRANSACTION_TIMEOUT: Final = "25P04"
TOO_MANY_CONNECTIONS: Final = "53300"

_CONFLICTS: Final = frozenset({"23503", "23505", "23P01"})
_INVALID: Final = frozenset({"23502", "23514", "22001", "22003", "22007", "22008", "22021", "22P02"})
_CONTENTION: Final = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED})
_TIMEOUTS: Final = frozenset({LOCK_NOT_AVAILABLE, QUERY_CANCELED})
_GONE: Final = frozenset(
    {
        "57P01",
        "57P02",
        "57P03",
        "57P05",
        TOO_MANY_CONNECTIONS,
        IDLE_IN_TRANSACTION_TIMEOUT,
        TRANSACTION_TIMEOUT,
    }
)
"""Terminated by an administrator, by a crash, starting up, idle too long, too many connections."""
_SHUT_OUT: Final = frozenset({TOO_MANY_CONNECTIONS, "57P03"})
"""Of those: refused before there was a connection."""

_GOING: Final = frozenset({"57P01", "57P02", "57P03"})
"""Of those: what a server says to everybody when it stops, crashes or starts."""

_SQLITE_CONFLICTS: Final = frozenset(
    {"SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_FOREIGNKEY"}
)
_SQLITE_INVALID: Final = frozenset({"SQLITE_CONSTRAINT_NOTNULL", "SQLITE_CONSTRAINT_CHECK", "SQLITE_TOOBIG"})


def classify(error: BaseException) -> Failure | None:
    """What *error* means, or None when it is not the database's.

    >>> classify(ValueError("mine")) is None
    True
    >>> classify(errors.PoolExhausted("full")).kind
    <Kind.POOL_FULL: 'pool full'>
    """
    match error:
        case errors.CommitUnknown():
            return Failure(Kind.UNKNOWN_OUTCOME, disconnect=True)
        case errors.CommitLost():
            return Failure(Kind.UNAVAILABLE, retryable=True, disconnect=True)
        case exc.TimeoutError():
            return Failure(Kind.POOL_FULL)
        case errors.WriteRefused():
            return None  # a fault of the program, also where the server is its cause
        case errors.DatabaseUnavailable() | errors.DatabaseClosed():
            state = sqlstate_of(error)  # a wrong password or database name is not mended by trying again
            may_come_back = state is None or state in _GONE or says_server_has_gone(state)
            return Failure(Kind.UNAVAILABLE, state, retryable=may_come_back, disconnect=True)
        case errors.DeadlinePassed() if error.connection_invalidated:
            return Failure(Kind.TIMEOUT, disconnect=True)
        case exc.DBAPIError():
            return _of_driver(error, error.orig, lost=bool(error.connection_invalidated))
        case _ if sqlstate_of(error) is not None:
            # A driver's own error: not every path of SQLAlchemy wraps them.
            return _of_driver(error, error, lost=False)
        case _:
            return None


def sqlstate_of(error: BaseException | None) -> str | None:
    """The SQLSTATE an error of any supported driver carries, or None.

    >>> sqlstate_of(ValueError()) is None
    True
    """
    for candidate in (error, getattr(error, "orig", None), getattr(error, "__cause__", None)):
        for attribute in ("sqlstate", "pgcode"):
            state = getattr(candidate, attribute, None)
            if isinstance(state, str):
                return state
    return None


def says_server_has_gone(state: str | None) -> bool:
    """Whether *state* speaks of the server rather than of one statement: no connection to it is of use any more.

    Class 08 is *Connection Exception*; the others are what a server says that stops, has crashed or is starting.

    >>> says_server_has_gone("57P01"), says_server_has_gone("08006"), says_server_has_gone("23505")
    (True, True, False)
    """
    return state is not None and (state in _GOING or state.startswith("08"))


def _of_driver(error: BaseException, original: BaseException | None, *, lost: bool) -> Failure:
    state = sqlstate_of(error) or sqlstate_of(original)
    constraint = _constraint_of(original)
    if state is None:
        return _without_sqlstate(original, lost=lost)
    if state in _CONFLICTS:
        return Failure(Kind.CONFLICT, state, constraint)
    if state in _INVALID:
        return Failure(Kind.INVALID, state, constraint)
    if state in _CONTENTION:
        return Failure(Kind.CONTENTION, state, retryable=True)
    if state in _TIMEOUTS:
        return Failure(Kind.TIMEOUT, state)
    if state == READ_ONLY_TRANSACTION:
        return Failure(Kind.READ_ONLY, state, disconnect=True)
    if state in _GONE or state.startswith("08"):
        return Failure(Kind.UNAVAILABLE, state, retryable=True, disconnect=state not in _SHUT_OUT)
    if lost:
        return Failure(Kind.UNAVAILABLE, state, retryable=True, disconnect=True)
    return Failure(Kind.PROGRAMMING, state, constraint)


def _without_sqlstate(original: BaseException | None, *, lost: bool) -> Failure:
    name = getattr(original, "sqlite_errorname", None)
    if name is None and original is not None:
        name = getattr(original.__cause__, "sqlite_errorname", None)
    if name in _SQLITE_CONFLICTS:
        return Failure(Kind.CONFLICT)
    if name in _SQLITE_INVALID:
        return Failure(Kind.INVALID)
    if isinstance(name, str) and name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Failure(Kind.CONTENTION, retryable=True)
    if lost:
        return Failure(Kind.UNAVAILABLE, retryable=True, disconnect=True)
    return Failure(Kind.PROGRAMMING)


def _constraint_of(error: BaseException | None) -> str | None:
    for candidate in (error, getattr(error, "__cause__", None)):
        for holder in (candidate, getattr(candidate, "diag", None)):
            name = getattr(holder, "constraint_name", None)
            if isinstance(name, str):
                return name
    return None
