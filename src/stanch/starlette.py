"""``install`` for any Starlette app, the unit's session for its handlers, and replies to database failures."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.websockets import WebSocket, WebSocketDisconnect

from stanch.asgi import CommitMode, UnitMiddleware, is_recorded, routes_around, unit_of
from stanch.database import Database
from stanch.errors import ClientGone, ConfigError, StanchError
from stanch.events import logger
from stanch.hangup import HangUp
from stanch.problems import MEDIA_TYPE, problem_of
from stanch.recording import Replayed
from stanch.redaction import redact
from stanch.routes import template_of
from stanch.unit import Mode, Unit, Unsaved, Wish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from starlette.types import ASGIApp

    from stanch.dashboard import Access

__all__ = ["UnitMiddleware", "add_exception_handlers", "install", "reader_of", "session_of"]

_INTERNAL_ERROR: Final = 1011
"""RFC 6455 section 7.4.1: the server met a condition that kept it from fulfilling the request."""


_METHODS: Final = frozenset(
    "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT QUERY WEBSOCKET".split()  # noqa: SIM905  # as words
)
"""Those that are told apart: RFC 9110 section 9, RFC 5789, and what is no method."""


# Installing -----------------------------------------------------------------------------------------------


def install(
    app: Starlette,
    *databases: Database[Any],
    commit_mode: CommitMode | None = None,
    unsaved: Unsaved | None = None,
    request_timeout: float | None = None,
    lifespan: bool = True,
    exception_handlers: bool = True,
    wait: float = 0.0,
    health: str | None = None,
    health_timeout: float = 0.7,
    metrics: str | None = None,
    dashboard: str | None = None,
    dashboard_access: Access | None = None,
) -> None:
    """Put *databases* to work in *app*: lifespan, one middleware, exception handlers. The first is the default one.

    The app's own lifespan runs inside: the databases are open before it starts and drained after it ends. At
    start each database must answer within *wait* seconds (0: at once). With ``commit_mode="manual"`` (else
    ``"auto"``) handlers commit for themselves, and *unsaved* (``"warn"``, ``"raise"`` or ``"ignore"``) says what
    becomes of writes they left. *request_timeout* (seconds; None: no limit) bounds what a request waits for the
    database until its reply leaves, from its arrival on; the reply is then a 503 or 504. A second call adds its
    databases. Raises ``ConfigError`` once the app has served its first request. ``lifespan=False`` and
    ``exception_handlers=False`` leave these parts to you: ``db.lifespan``, ``add_exception_handlers``.

    *health*, *metrics* and *dashboard* are paths at which the app shows how its databases are; None: nowhere. The
    first is for probes: ``/live``, ``/ready`` and ``/startup`` below it, and itself as ``/ready``; *health_timeout*
    (seconds) is the time in which a connection must be had and answer. The second is for Prometheus
    (``stanch[prometheus]``), the third a page for people. The page refuses everyone but whom *dashboard_access* lets
    in: ``"loopback"``, or a function of the request.
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
    UnitMiddleware(
        app,
        databases,
        commit_mode=commit_mode or "auto",
        unsaved=unsaved or "warn",
        request_timeout=request_timeout,
    )
    if middleware is not None:
        _judge_second_words(
            middleware, commit_mode=commit_mode, unsaved=unsaved, request_timeout=request_timeout
        )
    instruments = _instruments(
        app,
        known,  # the list itself: what is added to it, now and by later installs, is shown as well
        health=health,
        health_timeout=health_timeout,
        metrics=metrics,
        dashboard=dashboard,
        dashboard_access=dashboard_access,
    )
    known += [database for database in databases if database not in known]
    if middleware is None:
        # The last of the list is innermost; what add_middleware() adds later stays outside.
        app.user_middleware.append(
            Middleware(
                UnitMiddleware,
                databases=known,
                commit_mode=commit_mode or "auto",
                unsaved=unsaved or "warn",
                request_timeout=request_timeout,
            )
        )
    if lifespan:
        _wrap_lifespan(app, databases, wait)
    if exception_handlers:
        add_exception_handlers(app)
    app.router.routes[:0] = instruments
    if metrics is not None or dashboard is not None:
        for database in known:
            database.measure()


def add_exception_handlers(app: Starlette) -> None:
    """Answer database failures by SQLSTATE as problem+json, where the app has no handler of its own.

    What is not mapped is raised again, so that the server logs it and debug pages and test clients behave as
    without stanch. On a websocket the socket is closed with 1011.
    """
    handler: Any = _answer  # Starlette's type knows only requests, its machinery also gives websockets
    for kind in (SQLAlchemyError, StanchError, ExceptionGroup):
        app.exception_handlers.setdefault(kind, handler)
    app.exception_handlers.setdefault(Replayed, _make_way)


# Sessions -------------------------------------------------------------------------------------------------


async def session_of(connection: HTTPConnection, database: Database[Any] | str | None = None) -> AsyncSession:
    """The session of this request's (or websocket's) unit, committed as a reply below 400 is about to leave.

    The same session at every call; it holds no connection until its first statement. *database* is one of those
    installed, or its name; the first is the default. Raises ``NotInstalled`` where there is no unit.
    """
    unit = attend(connection)
    return await unit.session(unit.database(database), Wish(source="session_of()", mode=unit.mode))


async def reader_of(connection: HTTPConnection, database: Database[Any] | str | None = None) -> AsyncSession:
    """The same session, for reading: each statement stands alone, and holds a connection only while it runs.

    A unit that asked for nothing more refuses what could write, and to end with changed objects (``WriteRefused``).
    """
    unit = attend(connection)
    return await unit.session(unit.database(database), Wish(source="reader_of()", mode=Mode.READ))


def attend(connection: HTTPConnection) -> Unit:
    """The unit of *connection*, told who asks: its route, and the request that has the body cached."""
    unit = unit_of(connection.scope)
    # The type first: HTTPConnection is an abstract base class, to ask for an instance of which is dear.
    if type(connection) is Request or isinstance(connection, Request):
        unit.connection = connection
    unit.holder = _holder(connection.scope)
    return unit


async def stop_reading_on_hang_up(connection: HTTPConnection, session: AsyncSession) -> None:
    """Have *session* stop reading when the client of *connection* leaves; on a websocket nothing is watched.

    Reads the whole body first, which the request keeps: whoever waits for the end of the line would else take it.
    Raises ``ClientGone`` if the client has left before its request was complete.
    """
    if not isinstance(connection, Request):
        return
    unit = attend(connection)
    if unit.line is None:
        try:
            with suppress(RuntimeError):  # FastAPI has read it already, as a form
                await connection.body()
        except ClientDisconnect:
            raise ClientGone(
                f"the client of {unit.holder} has left before its request was complete"
            ) from None
        unit.line = HangUp(connection.receive)
    assert isinstance(unit.line, HangUp)
    unit.line.stop_reading(session)


def _holder(scope: Mapping[str, Any]) -> str:
    """The route in words. The template, not the path: what stands in a path may be a secret."""
    method = scope.get("method", "WEBSOCKET")
    # Of any word a client sends as its method a route for all methods would else make a holder, and a time series.
    return f"{method if method in _METHODS else 'OTHER'} {template_of(scope, partial(routes_around, scope))}"


# Replies --------------------------------------------------------------------------------------------------


async def _answer(connection: Request | WebSocket, error: Exception) -> Response | None:
    problem = problem_of(error, repeatable=is_recorded(connection.scope))
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


async def _make_way(_request: Request, _replayed: Exception) -> Response:
    # The app's own handler for HTTPException need not know of replays. The recorded reply takes this one's place.
    return Response()


async def _hang_up(socket: WebSocket) -> None:
    # Closed already, by either side: the error must not be hidden behind that.
    with suppress(RuntimeError, OSError, WebSocketDisconnect):
        await socket.close(_INTERNAL_ERROR)


def _told(error: Exception) -> str:
    return error.what if isinstance(error, StanchError) else type(error).__name__


# Private --------------------------------------------------------------------------------------------------


def _instruments(
    app: Starlette,
    databases: Sequence[Database[Any]],
    *,
    health: str | None,
    health_timeout: float,
    metrics: str | None,
    dashboard: str | None,
    dashboard_access: Access | None,
) -> list[BaseRoute]:
    routes: list[BaseRoute] = [route for route in app.router.routes if isinstance(route, _Instrument)]
    known = len(routes)
    if health is not None:
        from stanch.health import HealthApp  # noqa: PLC0415  # for those who ask

        routes += _at("health", health, HealthApp(databases, timeout=health_timeout), routes)
    if metrics is not None:
        routes += _at("metrics", metrics, _metrics_app(databases), routes)
    if dashboard is not None:
        from stanch.dashboard import DashboardApp  # noqa: PLC0415  # for those who ask

        page = DashboardApp(databases, access=dashboard_access)
        routes += _at("dashboard", dashboard, page, routes)
        _wrap_lifespan_with(app, page.lifespan)
    elif dashboard_access is not None:
        raise ConfigError(
            "install: dashboard_access lets people in, but there is no dashboard",
            remedies=['Write dashboard="/_stanch" as well.'],
        )
    return routes[known:]


def _metrics_app(databases: Sequence[Database[Any]]) -> ASGIApp:
    try:
        from stanch.prometheus import MetricsApp  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise ConfigError(
            "install: metrics needs the package prometheus-client, which is not installed",
            remedies=["pip install 'stanch[prometheus]'"],
        ) from None
    return MetricsApp(databases)


class _Instrument(Route):
    """Where health, metrics or the page are."""


def _at(setting: str, path: str, endpoint: ASGIApp, ours: Sequence[BaseRoute]) -> list[BaseRoute]:
    """Answers at *path* and below it, before any route of the app, and outside its documentation."""
    if re.fullmatch(r"(/[^/{}?#\s]+)+", path) is None:
        raise ConfigError(
            f"install: {setting} must be a path that begins with a slash and does not end with one, without {{}}?#",
            remedies=[f'Write {setting}="/{setting}".'],
        )
    for other in (route.path for route in ours if isinstance(route, _Instrument)):
        if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/"):
            raise ConfigError(
                f"install: {setting} at {path} and what is at {other.partition('/{')[0]} would hide each other",
                remedies=[
                    "Give each a path of its own. One of each is enough: it shows the databases of later installs, too."
                ],
            )
    return [_Instrument(where, endpoint, include_in_schema=False) for where in (path, path + "/{rest:path}")]


def _installed_middleware(app: Starlette) -> Middleware | None:
    ours: object = UnitMiddleware
    return next((entry for entry in app.user_middleware if entry.cls is ours), None)


def _judge_second_words(middleware: Middleware, **words: object) -> None:
    for name, word in words.items():
        if word is not None and word != middleware.kwargs[name]:
            raise ConfigError(
                f"install: {name}={word!r}, but this app was installed with {name}={middleware.kwargs[name]!r}",
                remedies=[
                    "One app has one mode; a single database can differ: provide_session(commit_mode=...)."
                ],
            )


def _wrap_lifespan(app: Starlette, databases: tuple[Database[Any], ...], wait: float) -> None:
    inner: Any = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any]:
        async with AsyncExitStack() as stack:
            for database in databases:
                await database.open(wait=wait)
                stack.push_async_callback(database.close)
            yield await stack.enter_async_context(inner(app))

    app.router.lifespan_context = lifespan


def _wrap_lifespan_with(app: Starlette, around: Callable[[], AbstractAsyncContextManager[None]]) -> None:
    inner: Any = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any]:
        async with around(), inner(app) as state:
            yield state

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
    added = cast("tuple[Database[Any], ...]", databases)
    names = [database.name for database in (*known, *(each for each in added if each not in known))]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"install: two databases are called {max(names, key=names.count)!r}",
            remedies=["Name each: Database(url, name='billing')."],
        )
