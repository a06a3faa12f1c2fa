"""Everything a FastAPI app needs: the session dependencies, ``@unit``, and ``install`` from ``stanch.starlette``."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, Final, TypedDict, TypeVar, Unpack
from weakref import WeakSet

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import HTTPConnection

from stanch.asgi import MODES, CommitMode, UnitMiddleware, unit_of
from stanch.database import Database
from stanch.deadlines import Deadline, earlier, judged_length
from stanch.errors import AsyncSessionInSyncEndpoint, ConfigError
from stanch.starlette import add_exception_handlers, attend, install, stop_reading_on_hang_up
from stanch.transactions import ISOLATION_LEVELS, IsolationLevel
from stanch.unit import Mode, Wish

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "DatabaseDep",
    "ReaderDep",
    "SessionDep",
    "UnitMiddleware",
    "add_exception_handlers",
    "get_database",
    "get_reader",
    "get_session",
    "install",
    "provide_session",
    "unit",
]

Endpoint = TypeVar("Endpoint", bound="Callable[..., Any]")

_OPTIONS: Final = "__stanch_unit__"
_READ: Final = Mode.READ

# Dependencies ---------------------------------------------------------------------------------------------


class UnitOptions(TypedDict, total=False):
    """What ``@unit`` can ask of a unit of work, and ``provide_session`` of its session."""

    commit_mode: CommitMode
    isolation_level: IsolationLevel
    read_only: bool
    timeout: float | None
    cancel_on_disconnect: bool
    """``@unit`` only: when the client hangs up, stop reading (``ClientGone``), unless something was written."""


_NO_OPTIONS: Final = UnitOptions()


def unit(**options: Unpack[UnitOptions]) -> Callable[[Endpoint], Endpoint]:
    """Set the unit of work of one endpoint; known before any dependency runs. Put it under the route decorator.

    *timeout* (seconds, from the moment the session is asked for) bounds what the unit waits for the database until the
    reply leaves; of several, and of ``request_timeout``, the one that ends first holds.

    *cancel_on_disconnect* is for routes that read: when the client hangs up, the running statement (or the wait for a
    connection) is cancelled and the next is refused, both with ``ClientGone``. From the first write on, and once the
    reply is about to leave, a hang-up changes nothing. The whole body is read before the first session is given.

    >>> @unit(commit_mode="manual")
    ... async def place_order() -> None: ...
    """
    _judge_options("@unit", options)

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _OPTIONS, options)
        return endpoint

    return mark


async def get_session(connection: HTTPConnection) -> AsyncSession:
    """The unit's session, committed as a reply below 400 is about to leave, rolled back otherwise.

    The key for ``dependency_overrides``. Holds no connection until its first statement.
    """
    return await _session(connection, "SessionDep", _NO_OPTIONS)


async def get_reader(connection: HTTPConnection) -> AsyncSession:
    """The same session, for reading: each statement stands alone, and holds a connection only while it runs.

    A unit that asked for nothing more refuses what could write, and to end with changed objects (``WriteRefused``).
    """
    return await _session(connection, "ReaderDep", _NO_OPTIONS, mode=_READ)


async def get_database(connection: HTTPConnection) -> Database[AsyncSession]:
    """The default database of the app, for handlers that open units of their own."""
    return unit_of(connection.scope).database(None)


SessionDep = Annotated[AsyncSession, Depends(get_session)]
"""The unit's session. COMMIT happens after the handler has returned and before the reply leaves."""

ReaderDep = Annotated[AsyncSession, Depends(get_reader)]
"""The unit's session for reading, without BEGIN; ``SessionDep`` anywhere in the same request makes it a writer."""

DatabaseDep = Annotated[Database[AsyncSession], Depends(get_database)]
"""The default ``Database``."""


@dataclass(frozen=True, slots=True)
class SessionProvider:
    """What ``provide_session`` returns: a dependency, equal to any other made of equal arguments."""

    database: Database[Any] | str | None
    commit_mode: CommitMode | None
    isolation_level: IsolationLevel | None
    read_only: bool
    timeout: float | None = None

    async def __call__(self, connection: HTTPConnection) -> Any:
        options = UnitOptions()
        if self.commit_mode is not None:
            options["commit_mode"] = self.commit_mode
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        mode = Mode.READ if self.read_only else None
        if self.read_only:
            options["read_only"] = True
        if self.timeout is not None:
            options["timeout"] = self.timeout
        return await _session(connection, "provide_session(...)", options, mode=mode, database=self.database)


# FastAPI before 0.116 cannot resolve the annotations of a callable object that are written as strings.
SessionProvider.__call__.__annotations__.update(connection=HTTPConnection)


def provide_session(
    database: Database[Any] | str | None = None,
    /,
    *,
    commit_mode: CommitMode | None = None,
    isolation_level: IsolationLevel | None = None,
    read_only: bool = False,
    timeout: float | None = None,
) -> SessionProvider:
    """A session dependency with settings of its own; *database* is one of those installed, or its name.

    ``BillingDep = Annotated[AsyncSession, Depends(provide_session(billing))]``. Equal arguments give equal
    dependencies, so ``dependency_overrides`` and FastAPI's per-request cache work. *read_only* opens a READ
    ONLY transaction and bans writers from the unit. *timeout* is that of ``@unit``.

    >>> provide_session("billing") == provide_session("billing")
    True
    """
    given: dict[str, Any] = {
        "commit_mode": commit_mode,
        "isolation_level": isolation_level,
        "timeout": timeout,
    }
    _judge_options("provide_session", {key: value for key, value in given.items() if value is not None})
    return SessionProvider(database, commit_mode, isolation_level, read_only, timeout)


_SESSION_GIVERS: Final[list[object]] = [get_session, get_reader]


def gives_session(dependency: object) -> bool:
    """Whether *dependency* hands a session to whoever asks for it directly."""
    return isinstance(dependency, SessionProvider) or any(dependency is giver for giver in _SESSION_GIVERS)


def session_giver(dependency: Endpoint) -> Endpoint:
    """Count *dependency* among those; for edges that wrap ours under another type."""
    _SESSION_GIVERS.append(dependency)
    return dependency


async def _session(
    connection: HTTPConnection,
    source: str,
    own: UnitOptions,
    *,
    mode: Mode | None = None,
    database: Database[Any] | str | None = None,
) -> AsyncSession:
    scope = connection.scope
    unit = attend(connection)
    _refuse_sync_endpoint(scope, source)
    route: UnitOptions = getattr(scope.get("endpoint"), _OPTIONS, _NO_OPTIONS)
    if not own and not route:
        return await unit.session(unit.database(database), Wish(source, unit.mode if mode is None else mode))
    word = own.get("commit_mode") or route.get("commit_mode")
    wish = Wish(
        source=source,
        mode=mode if mode is not None else MODES[word] if word else unit.mode,
        isolation_level=own.get("isolation_level") or route.get("isolation_level"),
        read_only=own.get("read_only", False),
        deadline=earlier(
            Deadline.given(own.get("timeout"), "provide_session(timeout=)"),
            Deadline.given(route.get("timeout"), "@unit(timeout=)"),
        ),
    )
    chosen = unit.database(database)
    if route.get("read_only"):
        wish = wish.join(Wish(source="@unit", mode=Mode.READ, read_only=True))
    session = await unit.session(chosen, wish)
    if route.get("cancel_on_disconnect"):
        await stop_reading_on_hang_up(connection, session)
    return session


def _refuse_sync_endpoint(scope: Mapping[str, Any], source: str) -> None:
    dependant = getattr(scope.get("route"), "dependant", None)
    endpoint = getattr(dependant, "call", None)
    if dependant is None or endpoint is None or _is_async(endpoint):
        return
    if any(gives_session(parameter.call) for parameter in dependant.dependencies):
        raise AsyncSessionInSyncEndpoint(
            f"{endpoint.__name__}() is a plain def, but asks for {source}, an AsyncSession:"
            " un-awaited calls would store nothing and answer 200",
            remedies=[f"Write async def {endpoint.__name__}(...), and await what the session does."],
        )


_known_as_async: Final[WeakSet[FunctionType]] = WeakSet()
"""Endpoints that were looked at before: what unwraps a function to see whether it is async is dear."""


def _is_async(endpoint: Any) -> bool:
    if not isinstance(endpoint, FunctionType):
        return _looks_async(endpoint)
    if endpoint in _known_as_async:
        return True
    is_async = _looks_async(endpoint)
    if is_async:
        _known_as_async.add(endpoint)
    return is_async


def _looks_async(endpoint: Any) -> bool:
    call = inspect.unwrap(endpoint)
    while isinstance(call, functools.partial):
        call = call.func
    if not inspect.isroutine(call):
        call = type(call).__call__
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)


def _judge_options(where: str, options: Mapping[str, Any]) -> None:
    allowed = UnitOptions.__annotations__
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(
                f"{where}: {name} is not an option", remedies=[f"Use one of {', '.join(sorted(allowed))}."]
            )
        if name == "timeout":
            judged_length(f"{where}: timeout", value)
        if name == "commit_mode" and value not in MODES:
            raise ConfigError(f"{where}: commit_mode {value!r}", remedies=["Use 'auto' or 'manual'."])
        if name == "cancel_on_disconnect" and not isinstance(value, bool):
            raise ConfigError(f"{where}: cancel_on_disconnect {value!r}", remedies=["Use True or False."])
        if name == "isolation_level" and value not in ISOLATION_LEVELS:
            raise ConfigError(
                f"{where}: isolation_level {value!r}", remedies=[f"Use one of {', '.join(ISOLATION_LEVELS)}."]
            )
