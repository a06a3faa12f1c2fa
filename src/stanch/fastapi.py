"""Everything a FastAPI app needs: ``install``, the session dependencies, and replies to database failures."""

from __future__ import annotations

import functools
import inspect
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, TypedDict, TypeVar, Unpack

from fastapi import Depends, FastAPI
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from stanch.asgi import MODES, CommitMode, UnitMiddleware, unit_of
from stanch.database import Database
from stanch.errors import AsyncSessionInSyncEndpoint, ConfigError, StanchError
from stanch.events import logger
from stanch.problems import MEDIA_TYPE, problem_of
from stanch.redaction import redact
from stanch.transactions import ISOLATION_LEVELS, IsolationLevel
from stanch.unit import Mode, Unsaved, Wish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

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
_INTERNAL_ERROR: Final = 1011
"""RFC 6455 section 7.4.1: the server met a condition that kept it from fulfilling the request."""


# Installing -----------------------------------------------------------------------------------------------


def install(
    app: FastAPI,
    *databases: Database[Any],
    commit_mode: CommitMode = "auto",
    unsaved: Unsaved = "warn",
    lifespan: bool = True,
    exception_handlers: bool = True,
    wait: float = 0.0,
) -> None:
    """Put *databases* to work in *app*: lifespan, one middleware, exception handlers. The first is the default one.

    The app's own lifespan runs inside: the databases are open before it starts and drained after it ends. At
    start each database must answer within *wait* seconds (0: at once). With ``commit_mode="manual"`` handlers
    commit for themselves, and *unsaved* says what becomes of writes they left. A second call adds its
    databases; raises ``ConfigError`` once the app has served its first request. ``lifespan=False`` and
    ``exception_handlers=False`` leave these parts to you: ``db.lifespan``, ``add_exception_handlers``.
    """
    if app.middleware_stack is not None:
        raise ConfigError(
            "install: this app has already started, so its middleware can no longer be changed",
            remedies=["Call install(app, db) where the app is made, before it serves anything."],
        )
    middleware = _installed_middleware(app)
    known: list[Database[Any]] = middleware.kwargs["databases"] if middleware else []  # type: ignore[assignment]  # our own list, below
    _judge_databases(databases, known)
    # Made once already now, to judge the words before anything of the app is changed.
    UnitMiddleware(app, databases, commit_mode=commit_mode, unsaved=unsaved)
    if middleware is None:
        # The last of the list is innermost; what add_middleware() adds later stays outside.
        app.user_middleware.append(
            Middleware(UnitMiddleware, databases=list(databases), commit_mode=commit_mode, unsaved=unsaved)
        )
    else:
        known += [database for database in databases if database not in known]
    if lifespan:
        _wrap_lifespan(app, databases, wait)
    if exception_handlers:
        add_exception_handlers(app)


def add_exception_handlers(app: FastAPI) -> None:
    """Answer database failures by SQLSTATE as problem+json, where the app has no handler of its own.

    What is not mapped is raised again, so that the server logs it and debug pages and test clients behave as
    without stanch. On a websocket the socket is closed with 1011.
    """
    handler: Any = _answer  # Starlette's type knows only requests, its machinery also gives websockets
    for kind in (SQLAlchemyError, StanchError, ExceptionGroup):
        app.exception_handlers.setdefault(kind, handler)


# Dependencies ---------------------------------------------------------------------------------------------


class UnitOptions(TypedDict, total=False):
    """What ``@unit`` and ``provide_session`` can ask of a unit of work."""

    commit_mode: CommitMode
    isolation_level: IsolationLevel
    read_only: bool


def unit(**options: Unpack[UnitOptions]) -> Callable[[Endpoint], Endpoint]:
    """Set the unit of work of one endpoint; known before any dependency runs. Put it under the route decorator.

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
    return await _session(connection, "SessionDep", {})


async def get_reader(connection: HTTPConnection) -> AsyncSession:
    """The same session, for reading: a unit that asked for nothing more refuses to end with writes."""
    return await _session(connection, "ReaderDep", {}, mode=Mode.READ)


async def get_database(connection: HTTPConnection) -> Database[AsyncSession]:
    """The default database of the app, for handlers that open units of their own."""
    return unit_of(connection.scope).database(None)


SessionDep = Annotated[AsyncSession, Depends(get_session)]
"""The unit's session. COMMIT happens after the handler has returned and before the reply leaves."""

ReaderDep = Annotated[AsyncSession, Depends(get_reader)]
"""The unit's session for reading; ``SessionDep`` anywhere in the same request makes it a writer."""

DatabaseDep = Annotated[Database[AsyncSession], Depends(get_database)]
"""The default ``Database``."""


@dataclass(frozen=True, slots=True)
class SessionProvider:
    """What ``provide_session`` returns: a dependency, equal to any other made of equal arguments."""

    database: Database[Any] | str | None
    commit_mode: CommitMode | None
    isolation_level: IsolationLevel | None
    read_only: bool

    async def __call__(self, connection: HTTPConnection) -> Any:
        options = UnitOptions()
        if self.commit_mode is not None:
            options["commit_mode"] = self.commit_mode
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        mode = Mode.READ if self.read_only else None
        if self.read_only:
            options["read_only"] = True
        return await _session(connection, "provide_session(...)", options, mode=mode, database=self.database)


# FastAPI 0.115 looks the name up in the globals of the dependency, which an instance has not.
SessionProvider.__call__.__annotations__["connection"] = HTTPConnection


# FastAPI before 0.116 cannot resolve the annotations of a callable object that are written as strings.
SessionProvider.__call__.__annotations__.update(connection=HTTPConnection)


def provide_session(
    database: Database[Any] | str | None = None,
    /,
    *,
    commit_mode: CommitMode | None = None,
    isolation_level: IsolationLevel | None = None,
    read_only: bool = False,
) -> SessionProvider:
    """A session dependency with settings of its own; *database* is one of those installed, or its name.

    ``BillingDep = Annotated[AsyncSession, Depends(provide_session(billing))]``. Equal arguments give equal
    dependencies, so ``dependency_overrides`` and FastAPI's per-request cache work. *read_only* opens a READ
    ONLY transaction and bans writers from the unit.

    >>> provide_session("billing") == provide_session("billing")
    True
    """
    given: dict[str, Any] = {"commit_mode": commit_mode, "isolation_level": isolation_level}
    _judge_options("provide_session", {key: value for key, value in given.items() if value is not None})
    return SessionProvider(database, commit_mode, isolation_level, read_only)


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
    unit = unit_of(scope)
    _refuse_sync_endpoint(scope, source)
    if isinstance(connection, Request):
        unit.connection = connection
    unit.holder = _holder(scope)
    route: UnitOptions = getattr(scope.get("endpoint"), _OPTIONS, None) or UnitOptions()
    word = own.get("commit_mode") or route.get("commit_mode")
    wish = Wish(
        source=source,
        mode=mode if mode is not None else MODES[word] if word else unit.mode,
        isolation_level=own.get("isolation_level") or route.get("isolation_level"),
        read_only=own.get("read_only", False),
    )
    chosen = unit.database(database)
    if route.get("read_only"):
        wish = wish.join(Wish(source="@unit", mode=Mode.READ, read_only=True))
    return await unit.session(chosen, wish)


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


def _is_async(endpoint: Any) -> bool:
    call = inspect.unwrap(endpoint)
    while isinstance(call, functools.partial):
        call = call.func
    if not inspect.isroutine(call):
        call = type(call).__call__
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)


def _holder(scope: Mapping[str, Any]) -> str:
    """The route in words. The template, not the path: what stands in a path may be a secret."""
    template = getattr(scope.get("route"), "path", "?")
    return f"{scope.get('method', 'WEBSOCKET')} {scope.get('root_path', '')}{template}"


# Replies --------------------------------------------------------------------------------------------------


async def _answer(connection: Request | WebSocket, error: Exception) -> Response | None:
    problem = problem_of(error)
    if isinstance(connection, WebSocket):
        await _hang_up(connection)
    if problem is None:
        redact(error)
        raise error
    logger.warning(
        "%s: answered %d (%s) for %s", _holder(connection.scope), problem.status, problem.slug, _told(error)
    )
    if isinstance(connection, WebSocket):
        return None
    return JSONResponse(problem.body, problem.status, problem.headers, MEDIA_TYPE)


async def _hang_up(socket: WebSocket) -> None:
    # Closed already, by either side: the error must not be hidden behind that.
    with suppress(RuntimeError, OSError, WebSocketDisconnect):
        await socket.close(_INTERNAL_ERROR)


def _told(error: Exception) -> str:
    return error.what if isinstance(error, StanchError) else type(error).__name__


# Private --------------------------------------------------------------------------------------------------


def _installed_middleware(app: FastAPI) -> Middleware | None:
    ours: object = UnitMiddleware
    return next((entry for entry in app.user_middleware if entry.cls is ours), None)


def _wrap_lifespan(app: FastAPI, databases: tuple[Database[Any], ...], wait: float) -> None:
    inner: Any = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[Any]:
        async with AsyncExitStack() as stack:
            for database in databases:
                await database.open(wait=wait)
                stack.push_async_callback(database.close)
            yield await stack.enter_async_context(inner(app))

    app.router.lifespan_context = lifespan


def _judge_databases(databases: tuple[object, ...], known: Sequence[Database[Any]]) -> None:
    if not databases:
        raise ConfigError("install: no database given", remedies=["Write install(app, db)."])
    for database in databases:
        if not isinstance(database, Database):
            raise ConfigError(
                f"install: expected a stanch Database, got {type(database).__name__}",
                remedies=["Wrap it: install(app, Database(engine_or_url))."],
            )
    added = [database for database in databases if isinstance(database, Database) and database not in known]
    names = [database.name for database in (*known, *added)]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"install: two databases are called {max(names, key=names.count)!r}",
            remedies=["Name each: Database(url, name='billing')."],
        )


def _judge_options(where: str, options: Mapping[str, Any]) -> None:
    allowed = UnitOptions.__annotations__
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(
                f"{where}: {name} is not an option", remedies=[f"Use one of {', '.join(sorted(allowed))}."]
            )
        if name == "commit_mode" and value not in MODES:
            raise ConfigError(f"{where}: commit_mode {value!r}", remedies=["Use 'auto' or 'manual'."])
        if name == "isolation_level" and value not in ISOLATION_LEVELS:
            raise ConfigError(
                f"{where}: isolation_level {value!r}", remedies=[f"Use one of {', '.join(ISOLATION_LEVELS)}."]
            )
