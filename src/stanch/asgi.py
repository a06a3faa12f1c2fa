"""One pure ASGI middleware: it gives each call a unit of work, and settles it as the reply is about to leave.

Starlette keeps the machinery for answering an exception private:
``starlette._exception_handler.wrap_app_handling_exceptions`` and the scope keys
``starlette.exception_handlers`` and ``starlette.max_body_size`` are used in this module only, and
``tests/test_contract.py`` holds them on the oldest and the newest supported version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NoReturn, cast

from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request

from stanch.errors import ConfigError, NotInstalled
from stanch.events import logger
from stanch.unit import Kind, Mode, Unit, Unsaved

if TYPE_CHECKING:
    from stanch.database import Database

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

CommitMode = Literal["auto", "manual"]
MODES: Final = {"auto": Mode.AUTO, "manual": Mode.MANUAL}

_CALL: Final = "stanch"
"""Where the call lives: in the scope, not in a ContextVar, which a socket's reader handle can pin for ever."""

_LAST_WORDS: Final = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})
_ERROR: Final = 400
"""The lowest status that rolls back."""

_NEVER_SUPERSEDED: Final = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


class ReplyAbandoned(BaseException):
    """Raised from every ``send`` of a reply whose commit failed, to unwind whoever is producing it.

    Not an ``Exception``: handlers, ``except Exception`` and a mounted app's catch-all must not answer it. Not
    a cancellation either: task groups swallow that in their children, and background tasks would run.
    """


def unit_of(scope: Scope) -> Unit:
    """The unit of work of an ASGI scope; ``NotInstalled`` where there is none."""
    call = scope.get(_CALL)
    if isinstance(call, _Call):
        return call.unit_in(scope)
    raise NotInstalled(
        "there is no unit of work here, so there is no session to give",
        remedies=[
            "Write install(app, db) where the app is made (stanch.fastapi), or add UnitMiddleware.",
            "Middleware runs outside the unit: use async with db.session() there.",
        ],
    )


class UnitMiddleware:
    """Gives each HTTP request and websocket a unit of work over *databases*.

    Guarantees: a status below 400 leaves only after every COMMIT has succeeded; a COMMIT that fails becomes
    the reply, through the app's own exception handlers; exactly one reply is sent; every session is closed
    when the call ends, also when it is cancelled. Must be the innermost middleware: what stands inside it is
    settled, what stands outside cannot ask for the unit's session and can still change a reply that was
    committed.
    """

    def __init__(
        self,
        app: ASGIApp,
        databases: Iterable[Database[Any]],
        *,
        commit_mode: CommitMode = "auto",
        unsaved: Unsaved = "warn",
    ) -> None:
        self.app = app
        self.databases = list(databases)
        self.unsaved: Unsaved = _judge("unsaved", unsaved, ("warn", "raise", "ignore"))
        self.mode = MODES[_judge("commit_mode", commit_mode, tuple(MODES))]

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one call of the app inside; anything but HTTP and websockets passes untouched."""
        # No coroutine of its own, here and in Exchange.send: a call without a session pays for one in all.
        kind = scope["type"]
        if kind == "http":
            return Exchange(self, scope.get(_CALL), send).run(scope, receive)
        if kind == "websocket":
            return Conversation(self, scope.get(_CALL), send).run(scope, receive)
        return self.app(scope, receive, send)


class _Call:
    """One call of the app, and its unit of work: made when somebody asks for it, gone when the call is over.

    Does not hold the scope: the scope holds the call, and a cycle would wait for the garbage collector.
    """

    kind: ClassVar[Kind]
    # Defaults of the class instead of stores of each instance: this is the part that a call without a session pays.
    _unit: Unit | None = None
    _over = False

    def __init__(self, middleware: UnitMiddleware, outer: _Call | None, send: Send) -> None:
        self._middleware = middleware
        self._outer = outer
        self._send = send

    def unit_in(self, scope: Scope) -> Unit:
        """The unit of this call; ``NotInstalled`` once the call is over, when nobody would close a session."""
        if self._over and self._outer is not None:
            return self._outer.unit_in(scope)
        if self._over:
            raise NotInstalled(
                "this call of the app is over, and its unit of work with it",
                remedies=[
                    "Work that outlives a request opens a unit of its own: async with db.transaction()."
                ],
            )
        if self._unit is None:
            self._unit = self._make_unit(scope)
        return self._unit

    def _make_unit(self, scope: Scope) -> Unit:
        middleware = self._middleware
        if self._outer is None:
            unit = Unit(middleware.databases, kind=self.kind)
        else:
            # A mounted app with middleware of its own: the innermost settles, the outermost closes.
            unit = self._outer.unit_in(scope)
            unit.adopt(middleware.databases)
        unit.mode, unit.unsaved = middleware.mode, middleware.unsaved
        return unit

    async def _close(self, *, well: bool) -> None:
        self._over = True
        unit, self._unit = self._unit, None
        if unit is not None and self._outer is None:
            unit.connection = None
            await unit.close(well=well)


class Exchange(_Call):
    """One HTTP request and its reply: the unit is settled where the reply passes."""

    kind = Kind.REQUEST
    _status: int | None = None
    """The status that has left."""
    _complete = False
    """Whether the last message of the reply has left."""
    _doomed = False
    """Whether a limiter outside will put its own reply in the place of this one."""
    _failure: Exception | None = None
    """What made a commit fail; until it is answered nothing leaves."""

    async def run(self, scope: Scope, receive: Receive) -> None:
        """Run the app with a ``send`` that settles; answer in its place if a commit failed; close the unit."""
        scope[_CALL] = self
        app_outside = scope.get("app")
        try:
            await self._middleware.app(scope, receive, self.send)
        except BaseException as error:
            if self._failure is None or isinstance(error, _NEVER_SUPERSEDED):
                await self._close(well=False)
                raise
            _remember(error, beside=self._failure)
        if self._failure is not None:
            await self._answer_instead(self._failure, scope, receive, app_outside)
        elif self._unit is not None:
            await self._close(well=self._complete)
        self._over = True

    def send(self, message: Message) -> Awaitable[None]:
        """Forward *message*; settle before the start of the reply, and before its last message."""
        if self._unit is not None:
            return self._settle_and_send(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not message.get("more_body", False):
            self._complete = message["type"] in _LAST_WORDS
        return self._send(message)

    async def _settle_and_send(self, message: Message) -> None:
        if self._failure is not None:
            # State, not the exception, is the truth: whatever swallowed it, nothing of the dead reply leaves.
            raise ReplyAbandoned from self._failure
        if message["type"] == "http.response.start":
            await self._settle(message["status"])
            self._status = message["status"]
        elif _is_last(message):
            await self._settle(self._status)
            self._complete = True
        # Outside the settling: an OSError of the client's socket is not the database's.
        await self._send(message)

    async def _settle(self, status: int | None) -> None:
        assert self._unit is not None
        try:
            await self._unit.settle(commit=status is not None and status < _ERROR and not self._doomed)
        except Exception as failure:
            self._failure = failure
            raise ReplyAbandoned from failure

    def _make_unit(self, scope: Scope) -> Unit:
        self._doomed = _is_too_large(scope)
        return super()._make_unit(scope)

    async def _answer_instead(
        self, failure: Exception, scope: Scope, receive: Receive, app_outside: object
    ) -> None:
        """Let the app's own handlers answer *failure*, once; unhandled, it leaves here for the server's."""
        if self._status is not None:
            # The start has left: a reply that breaks off is the only honest one now.
            await self._break_off(failure)
            await self._close(well=False)
            raise failure

        async def fail(_scope: Scope, _receive: Receive, _send: Send) -> NoReturn:
            raise failure

        # The connection that a dependency received has the body cached; a fresh one would wait for it forever.
        connection = self.unit_in(scope).connection or Request(scope, receive)
        answer: ASGIApp = wrap_app_handling_exceptions(fail, connection)
        if scope.get("app") is not app_outside:
            answer = _with_server_errors(answer, scope["app"])
        self._failure = None
        try:
            await answer(scope, receive, self.send)
        except BaseException as error:
            if self._failure_now() is None or isinstance(error, _NEVER_SUPERSEDED):
                await self._close(well=False)
                raise
        # Here too state is the truth: a second failure that a handler swallowed was answered by nobody.
        second = self._failure_now()
        await self._close(well=second is None and self._complete)
        if second is not None:
            raise failure from second

    async def _break_off(self, failure: Exception) -> None:
        # Starlette's BaseHTTPMiddleware frames a reply anew, and ends it as if complete whatever is raised here. A
        # message it does not know stops it, but then it forgets our error. Servers refuse such a message.
        assert self._unit is not None
        logger.error(
            "%s: the reply was broken off, its commit failed: %s", self._unit.holder, type(failure).__name__
        )
        with suppress(Exception):
            await self._send({"type": "stanch.broken_off"})

    def _failure_now(self) -> Exception | None:
        return self._failure  # not narrowed to None: send() may have set it meanwhile


class Conversation(_Call):
    """One websocket: while it waits for its peer it holds no connection and has nothing uncommitted."""

    kind = Kind.WEBSOCKET

    async def run(self, scope: Scope, receive: Receive) -> None:
        """Run the app with a ``receive`` that holds nothing; close the unit."""
        scope[_CALL] = self

        async def receive_holding_nothing() -> Message:
            if self._unit is not None:
                await self._unit.pause()
            return await receive()

        well = False
        try:
            await self._middleware.app(scope, receive_holding_nothing, self._send)
            well = True
        finally:
            await self._close(well=well)


def _is_last(message: Message) -> bool:
    return message["type"] in _LAST_WORDS and not message.get("more_body", False)


def _is_too_large(scope: Scope) -> bool:
    # Starlette's body limiter stands outside us and will put a 413 in the place of this reply.
    limit = scope.get("starlette.max_body_size")
    if limit is None:
        return False
    length: bytes = dict(scope["headers"]).get(b"content-length", b"0")
    return length.isdigit() and int(length) > int(limit)


def _with_server_errors(answer: ASGIApp, app: Any) -> ASGIApp:
    # A mounted app's own ServerErrorMiddleware lies inside us and has unwound already.
    handler = app.exception_handlers.get(500) or app.exception_handlers.get(Exception)
    return ServerErrorMiddleware(answer, handler=handler, debug=app.debug)


def _remember(error: BaseException, *, beside: Exception) -> None:
    """Keep what else went wrong while the dead reply unwound, unless it is only the unwinding itself."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        for part in group.exceptions:
            _remember(part, beside=beside)
    elif not isinstance(error, ReplyAbandoned):
        beside.add_note(f"while the reply was being abandoned, {type(error).__name__} was raised as well")


def _judge(setting: str, value: Any, allowed: Sequence[str]) -> Any:
    if value in allowed:
        return value
    raise ConfigError(f"{setting}: got {value!r}", remedies=[f"Use one of {', '.join(map(repr, allowed))}."])
