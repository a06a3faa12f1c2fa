"""Every error stanch raises: what happened with figures, what to do about it, and a code to look up.

Each is also the SQLAlchemy error people already catch, and never a builtin ``OSError`` or ``TimeoutError``,
so that an app's own handlers for those stay its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import exc

if TYPE_CHECKING:
    from collections.abc import Sequence


class StanchError(exc.SQLAlchemyError):
    """The base of all errors raised by stanch.

    ``str()`` is the sentence *what* happened, then numbered *remedies*, most likely first, then the line
    ``stanch explain <error_code>``. No text ever holds a password, a parameter value or row content.

    >>> print(StanchError("the door is shut", remedies=["Open it."]))
    the door is shut
      1. Open it.
      stanch explain stanch
    """

    error_code: ClassVar[str] = "stanch"

    def __init__(self, what: str, *, remedies: Sequence[str] = ()) -> None:
        # Past DBAPIError, which wants the statement, the parameters and the driver's error.
        exc.SQLAlchemyError.__init__(self, what)
        self.what = what
        self.remedies = tuple(remedies)

    def __str__(self) -> str:
        numbered = [f"  {number}. {remedy}" for number, remedy in enumerate(self.remedies, 1)]
        return "\n".join([self.what, *numbered, f"  stanch explain {self.error_code}"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.what, self.remedies))


def _rebuild(kind: type[StanchError], what: str, remedies: tuple[str, ...]) -> StanchError:
    return kind(what, remedies=remedies)


class _Operational(StanchError, exc.OperationalError):
    """An ``OperationalError`` that no statement caused: it carries no SQL and no parameters."""

    statement = None
    params = None
    ismulti = None
    hide_parameters = True
    connection_invalidated = True

    def __init__(self, what: str, *, remedies: Sequence[str] = ()) -> None:
        StanchError.__init__(self, what, remedies=remedies)
        self.detail: list[str] = []  # SQLAlchemy's own, filled by add_detail(); never shown here

    @property
    def orig(self) -> BaseException | None:  # type: ignore[override]  # here it is the cause, not an argument
        return self.__cause__


# Settings -------------------------------------------------------------------------------------------------


class ConfigError(StanchError, exc.ArgumentError):
    """A setting is wrong, or two contradict each other. Raised at construction, before anything opens."""

    error_code = "config"


class DriverMissing(ConfigError):
    """The URL names a driver that is not installed. The text says what to install."""

    error_code = "driver-missing"


# The pool and the server ----------------------------------------------------------------------------------


class PoolExhausted(StanchError, exc.TimeoutError):
    """No connection came free within ``pool_timeout``, or before the unit's deadline. Nothing was executed."""

    error_code = "pool-exhausted"


class PoolOverloaded(PoolExhausted):
    """More callers want connections than can be served in time; this one was refused, so that others are. Nothing ran.

    Refused at once, or while it waited; see ``max_waiting``, ``queue_target`` and ``queue_interval``. As every
    ``PoolExhausted`` it becomes 503 with ``Retry-After``.
    """

    error_code = "pool-overloaded"


class DatabaseUnavailable(_Operational):
    """No connection to the server could be made: refused, unreachable, no such host, or not in time."""

    error_code = "unavailable"


class SecondEventLoop(StanchError, exc.InvalidRequestError):
    """A ``Database`` was used on an event loop while its connections belong to another one that is still alive.

    The text says in which thread that loop runs. Connections cannot be shared by loops. Nothing was executed.
    """

    error_code = "second-event-loop"


class DatabaseClosed(StanchError, exc.InvalidRequestError):
    """The ``Database`` is closing or was closed, so it opens no new session or connection."""

    error_code = "database-closed"


# Commits --------------------------------------------------------------------------------------------------


class CommitRefused(StanchError, exc.PendingRollbackError):
    """COMMIT was asked for, but the server rolled back: an earlier error had aborted the transaction.

    PostgreSQL answers COMMIT of an aborted transaction with the command tag ``ROLLBACK`` and no error
    (PostgreSQL manual, *COMMIT*). Nothing of the transaction is stored.
    """

    error_code = "commit-refused"


class TransactionAborted(StanchError, exc.PendingRollbackError):
    """A statement was refused because an earlier database error, caught and not raised again, aborted the transaction.

    The text names that error and the line where it happened. Nothing of the transaction can be stored any more.
    """

    error_code = "transaction-aborted"


class CommitUnknown(_Operational):
    """The connection was lost while COMMIT was on its way: the work is stored or it is not; nobody here knows.

    Never retried by stanch, unless the work was declared idempotent. Ask the database whether it is there before doing
    it again.
    """

    error_code = "commit-unknown"


class CommitLost(_Operational):
    """The connection was lost during COMMIT, and it is known that the server rolled back: nothing is stored.

    Only with ``verify_commits``; without it a lost COMMIT is ``CommitUnknown``. The work may be done again.
    """

    error_code = "commit-lost"


class PartialCommit(StanchError):
    """A unit over several databases: some had committed when a later one failed.

    ``committed`` and ``failed`` are the names of the databases. There is no two-phase commit.
    """

    error_code = "partial-commit"
    committed: tuple[str, ...] = ()
    failed: str = ""


# Sessions and units ---------------------------------------------------------------------------------------


class SessionClosed(StanchError, exc.InvalidRequestError):
    """The session was used after its unit of work had ended."""

    error_code = "session-closed"


class SessionOverlap(StanchError, exc.InvalidRequestError):
    """Two tasks were inside one session at the same time."""

    error_code = "session-overlap"


class ConnectionCommitRefused(StanchError, exc.InvalidRequestError):
    """``commit()`` or ``rollback()`` was called on a session's connection, behind the session's back."""

    error_code = "connection-commit"


class SavepointGone(StanchError, exc.InvalidRequestError):
    """An ``atomic`` block came to its end without its savepoint: it had been ended inside, or by a caught error."""

    error_code = "savepoint-gone"


class WriteRefused(StanchError, exc.InvalidRequestError):
    """A reader was asked to execute a write, or ended with writes; nothing of it was stored."""

    error_code = "write-refused"


class SessionStateRefused(StanchError, exc.InvalidRequestError):
    """A statement would leave session state behind, where PgBouncer would hand it to whoever comes next."""

    error_code = "session-state"


class UnsavedWrites(StanchError, exc.InvalidRequestError):
    """Writes that nobody had committed stood in the way of an end: of a unit, of ``release()``, of a websocket's wait.

    Where a unit ended they were rolled back; otherwise nothing has changed.
    """

    error_code = "unsaved-writes"


class UnitConflict(StanchError, exc.InvalidRequestError):
    """Two places of one unit ask for things that exclude each other, or ask too late.

    So it is with ``atomic(durable=True)`` inside, and ``release()`` where an outer block will end the transaction.
    """

    error_code = "unit-conflict"


class InsideTransaction(StanchError, exc.InvalidRequestError):
    """Work that needs a transaction of its own was asked for by a task that already has one open."""

    error_code = "inside-transaction"


class NotInstalled(StanchError, exc.InvalidRequestError):
    """A session was asked for where no unit of work is: ``install(app, db)`` is missing, or it is middleware."""

    error_code = "not-installed"


class AsyncSessionInSyncEndpoint(StanchError, exc.InvalidRequestError):
    """A ``def`` endpoint asks for an ``AsyncSession``; un-awaited, it would store nothing and answer 200."""

    error_code = "sync-endpoint"


class DeadlinePassed(_Operational):
    """The deadline of a unit of work, or of one step of it, has passed, and what ran was ended.

    By the server, which had been told, and then the connection is kept (``connection_invalidated`` is False); else by
    severing the connection.
    """

    error_code = "deadline"


# Idempotency keys and clients that leave -------------------------------------------------------------------


class IdempotencyKeyInvalid(StanchError, exc.InvalidRequestError):
    """The ``Idempotency-Key`` of a request is missing where it is required, or is not a key. Nothing was done."""

    error_code = "idempotency-key"


class IdempotencyKeyReused(StanchError, exc.InvalidRequestError):
    """Another request than this one has used this key before. Nothing was done."""

    error_code = "idempotency-reused"


class IdempotencyInProgress(StanchError, exc.InvalidRequestError):
    """A request with this key is being worked on at this moment. Nothing was done by this one."""

    error_code = "idempotency-in-progress"


class ReplyNotRecordable(StanchError, exc.InvalidRequestError):
    """A reply is too large, or has no end that could be waited for, so no record of it can be kept."""

    error_code = "reply-not-recordable"


class ClientGone(StanchError, exc.InvalidRequestError):
    """The client hung up, on a route that stops its queries then. The query was cancelled, or not begun."""

    error_code = "client-gone"
