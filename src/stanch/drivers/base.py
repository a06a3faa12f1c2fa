"""What a driver must be able to do for the pool and the engine, and how any of them opens a connection."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from functools import partial
from traceback import clear_frames
from types import new_class
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol
from weakref import WeakKeyDictionary

from stanch.deadlines import in_force, whose, within
from stanch.errors import CommitRefused, DatabaseUnavailable
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from stanch.deadlines import Deadline
    from stanch.settings import Settings

READ_ONLY_KEY: Final = "stanch.read_only"
"""In a pooled connection's ``info``: the next transaction only reads. SQLite's BEGIN takes it out again."""


DRAIN_TIMEOUT: Final = 1.0
"""Seconds for cancelling a statement on the server and reading the rest of its answer.

Long enough for a CancelRequest on a connection of its own, with TLS, to another continent; short enough for whoever
cancelled, who waits for it.
"""

CANCEL_INTERVAL: Final = 0.1
"""Seconds between two CancelRequests for one statement: the first may have come before it had begun."""


class Plan(Value):
    """How to make the engine: for ``create_async_engine(url, connect_args=…, **engine_options)``.

    *url* holds no parameter that might be a secret, so that the engine's ``repr`` may be shown; its driver is
    named. *settings* are those in force for this URL: an in-memory SQLite database has one connection, whatever
    the default. No ``repr``: *connect_args* may hold a password.
    """

    url: URL
    connect_args: dict[str, Any]
    engine_options: dict[str, Any]
    settings: Settings

    __repr__ = object.__repr__


class Driver(Protocol):
    """One database driver, as far as stanch must know it. It holds no state; *connection* is the driver's own.

    ``sever``, ``sever_asking``, ``looks_dead``, ``is_idle``, ``is_unfinished``, ``has_nothing_to_undo`` and
    ``let_stand_alone`` never raise, wait or make a round trip.
    """

    name: ClassVar[str]
    read_only_options: ClassVar[Mapping[str, Any]]
    """SQLAlchemy execution options that make one transaction of a connection read only."""
    reader_options: ClassVar[Mapping[str, Any]]
    """The same for one statement that stands alone and only reads."""

    def plan(self, url: URL, settings: Settings) -> Plan:
        """What *url* and *settings* mean to this driver. Raises `ConfigError` for what it cannot honour."""
        ...

    def adopt(self, connect_args: dict[str, Any], settings: Settings) -> None:
        """Make an existing engine's next connection one of ours: bounded, and aware of a refused COMMIT.

        *connect_args* are those of a ``do_connect`` event and are changed in place. An ``async_creator_fn`` among
        them is still what opens the connection.
        """
        ...

    def sever(self, connection: Any) -> None:
        """Cut *connection* off at once. Whoever waits for it gets the driver's ordinary disconnect error."""
        ...

    def sever_asking(self, connection: Any) -> Callable[[], Awaitable[object]] | None:
        """Sever *connection*, and return what then asks the server to end the statement that ran on it.

        None where nothing ran, or where severing has ended it. The link itself stays open until the returned call has
        ended, also by being cancelled: a pooler in between finds the statement by it.
        """
        self.sever(connection)
        return None

    def looks_dead(self, connection: Any) -> bool:
        """Whether the other side is known to have gone. False is no promise: silence looks like life."""
        ...

    def is_idle(self, connection: Any) -> bool:
        """Whether *connection* is open and neither in an operation nor in a transaction."""
        ...

    def is_unfinished(self, connection: Any) -> bool:
        """Whether *connection* would be idle, but for a transaction that ``clean`` of no statement ends.

        The server begins one for a statement that a driver prepares, until it is told that nothing more follows.
        """
        del connection
        return False

    def has_nothing_to_undo(self, connection: Any) -> bool:
        """Whether *connection* is open and in no transaction, as far as the other side has told.

        Cheaper than ``is_idle``, and less: an operation may be under way.
        """
        return self.is_idle(connection)

    def let_stand_alone(self, adapted: Any) -> Callable[[Any], None] | None:
        """From now on each statement on *adapted*, SQLAlchemy's idle connection, stands alone: AUTOCOMMIT.

        What undoes that, to be called with *adapted* again. Neither sends anything. None if only SQLAlchemy's own way
        is known, by which *adapted* is then as it was.
        """
        del adapted
        return None

    async def clean(self, connection: Any, sql: str) -> None:
        """Execute *sql*, several statements, in one round trip and outside any transaction; *connection* is idle.

        Where a session has no state, there is nothing to do.
        """
        ...

    async def drain(self, connection: Any) -> bool:
        """Whether *connection*, a statement of which was cancelled, is free again: cancelled on the server, read dry.

        True is proof: nothing is under way, and whether a transaction is open is known. Waits at most
        ``DRAIN_TIMEOUT`` seconds, never raises; what is not free by then has been severed. False for a driver that
        cannot tell: then the connection is as the cancellation left it.
        """
        del connection
        return False

    def prepare_engine(self, engine: AsyncEngine, settings: Settings) -> None:
        """Replace, on this engine's dialect, what the driver needs replaced. Opens nothing."""
        ...


def second_link(descriptor: int) -> socket.socket:
    """Another descriptor of the same socket: closing the first does not end the connection."""
    return socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)


async def asked_over(link: socket.socket, ask: Callable[[], Awaitable[object]]) -> None:
    """*ask*, and only then let go of *link*."""
    with link:
        await ask()


class Attempt(Value):
    """One server to try, and its name for the operator; a name holds host and port, nothing else."""

    where: str
    open: Callable[[], Awaitable[Any]]


def attempts(
    open_one: Callable[..., Awaitable[Any]],
    parameters: Mapping[str, Any],
    *,
    hosts: Sequence[Any] = (),
    ports: Sequence[Any] = (),
) -> list[Attempt]:
    """An attempt by ``open_one(**parameters)`` for each of several *hosts*, or the one there is.

    One at a time, so that a server that stays silent cannot use up the time of the others, and so that
    ``target_session_attrs`` means the same on every driver.
    """
    if len(hosts) < 2:
        each = [dict(parameters)]
    else:
        ports = ports if len(ports) > 1 else [*(ports or [None])] * len(hosts)
        each = [{**parameters, "host": host, "port": port} for host, port in zip(hosts, ports, strict=True)]
        if parameters.get("target_session_attrs") == "prefer-standby":
            each = [{**one, "target_session_attrs": attrs} for attrs in ("standby", "any") for one in each]
    return [Attempt(_where(one), partial(open_one, **one)) for one in each]


async def reach(attempts: Sequence[Attempt], *, timeout: float, refusals: tuple[type[Exception], ...]) -> Any:
    """The connection of the first of *attempts* that works, all of them together within *timeout* seconds.

    Or less, under a deadline.

    Each gets its share of the time that is left. Raises `DatabaseUnavailable`, whose cause is the last failure: an
    ``OSError`` or one of the driver's *refusals*. When it is cancelled, no socket is left open.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + within(timeout)
    troubles: tuple[type[Exception], ...] = (OSError, UnicodeError, *refusals)  # UnicodeError: no host name
    failures: list[tuple[str, Exception]] = []
    for number, attempt in enumerate(attempts):
        share = (deadline - clock()) / (len(attempts) - number)
        try:
            async with asyncio.timeout(share):
                return await _without_remains(attempt)
        except troubles as error:
            failures.append((attempt.where, error))
    raise unavailable(failures, timeout) from failures[-1][1]


async def _without_remains(attempt: Attempt) -> Any:
    try:
        return await attempt.open()
    except BaseException as error:
        # The frames of the traceback own the half-open socket (psycopg's is closed when its generator dies) and
        # the password, and an error may be kept for long.
        clear_frames(error.__traceback__)
        raise


_COMBINED: Final[dict[tuple[type[Any], type[Any]], type[Any]]] = {}


def combined(ours: type[Any], theirs: type[Any]) -> type[Any]:
    """*theirs* with *ours* before it: what it adds, it adds to a user's own connection class, too."""
    if issubclass(theirs, ours):
        return theirs
    if issubclass(ours, theirs):
        return ours
    key = ours, theirs
    if key not in _COMBINED:
        _COMBINED[key] = new_class(theirs.__name__, key, exec_body=lambda body: body.update(__slots__=()))
    return _COMBINED[key]


def made_ours(connection: Any, ours: type[Any]) -> Any:
    """*connection*, which somebody else has opened, from now on of the class *ours* as well.

    Python allows it between classes of one layout, and *ours* adds no slot. What is no connection of this driver
    (a proxy) stays as it is, and what *ours* promises does not hold for it.
    """
    with suppress(TypeError):
        connection.__class__ = combined(ours, connection.__class__)
    return connection


_statement_timeouts: Final[WeakKeyDictionary[Any, float]] = WeakKeyDictionary()
"""The ``statement_timeout`` in seconds that a connection was started with."""

_SERVER_FIRST: Final = 0.1
"""Seconds by which the server, if it is alive, ends a statement before the deadline does: that keeps the connection."""


def started_with(connection: Any, statement_timeout: float | None) -> Any:
    """*connection*, of which is remembered that every statement of it may take *statement_timeout* seconds."""
    if statement_timeout is not None:
        with suppress(TypeError):  # a proxy that takes no weak reference
            _statement_timeouts[connection] = statement_timeout
    return connection


def rides_on_begin(connection: Any) -> str:
    """What to send together with BEGIN: under a deadline, the ``statement_timeout`` of this transaction.

    The deadline cannot be lengthened by that: each statement also ends when the connection is severed. It makes the
    server stop working for nobody. ``SET LOCAL`` ends with the transaction (PostgreSQL manual, *SET*).
    """
    deadline = in_force()
    if deadline is None:
        return ""
    left = deadline.remaining()
    limit = left - min(_SERVER_FIRST, left / 10)
    if limit >= _statement_timeouts.get(connection, limit + 1):
        return ""
    milliseconds = max(1, int(limit * 1000))
    with suppress(TypeError):  # a proxy that takes no weak reference
        _limits[connection] = deadline, time.monotonic() + milliseconds / 1000
    return f" SET LOCAL statement_timeout = {milliseconds:d};"


_limits: Final[WeakKeyDictionary[Any, tuple[Deadline, float]]] = WeakKeyDictionary()
"""The deadline that rode on the BEGIN of a connection's transaction, and the moment before which it ends nothing."""


def transaction_ended(connection: Any) -> None:
    """What rode on the BEGIN of *connection* has ended with its transaction."""
    if _limits:
        with suppress(TypeError):
            _limits.pop(connection, None)


def deadline_that_ended_a_statement(connection: Any) -> Deadline | None:
    """Whose limit it was, if the server has just ended a statement of *connection* because of its time.

    By the clock, since by its SQLSTATE it could be anybody's: each statement has the whole limit, so the first of a
    transaction cannot be ended by it any earlier.
    """
    try:
        deadline, due = _limits.get(connection, (None, 0.0))
    except TypeError:
        return None
    return deadline if time.monotonic() >= due else None


def unavailable(failures: Sequence[tuple[str, Exception]], timeout: float) -> DatabaseUnavailable:
    """What to tell the operator; nothing of it is for a reply."""
    told = "; ".join(f"{where} {_reason(error)}" for where, error in failures)
    return DatabaseUnavailable(
        f"no connection to the database ({whose('connect_timeout', timeout)}): {told}",
        remedies=[
            "See whether the server runs and listens there: pg_isready -h <host> -p <port>.",
            "If it answers, its log says whom it turned away and why; the driver's own error is the cause of this one.",
            "If it is only slow to accept, raise connect_timeout.",
        ],
    )


def commit_refused(by: str) -> CommitRefused:
    """The error for a COMMIT that stored nothing although no error came back."""
    return CommitRefused(
        f"COMMIT stored nothing: {by} had rolled the transaction back after an earlier error",
        remedies=[
            "Find the error that was caught and not raised again; work after it was lost as well.",
            "Put work that may fail into a savepoint: async with atomic(session).",
        ],
    )


def _reason(error: Exception) -> str:
    sqlstate = getattr(error, "sqlstate", None)
    match error:
        case TimeoutError():
            return "did not answer in time"
        case ConnectionRefusedError():
            return "refused the connection"
        case socket.gaierror() | UnicodeError():
            return "is not a host name that is known here"
        case OSError():
            return f"could not be reached ({type(error).__name__})"
        case _ if isinstance(sqlstate, str):
            return f"turned the connection away (SQLSTATE {sqlstate})"
        case _:
            return f"did not take the connection ({type(error).__name__})"


def _where(parameters: Mapping[str, Any]) -> str:
    host, port = parameters.get("host") or "the default server", parameters.get("port")
    return f"{host}:{port}" if port else str(host)
