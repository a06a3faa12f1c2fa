"""One pure ASGI middleware: it gives each call a unit of work, and settles it as the reply is about to leave.

Starlette keeps the machinery for answering an exception private:
``starlette._exception_handler.wrap_app_handling_exceptions`` and the scope keys
``starlette.exception_handlers`` and ``starlette.max_body_size`` are used in this module only, and
``tests/test_contract.py`` holds them on the oldest and the newest supported version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NoReturn, Protocol, cast

from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request

from stanch.completion import run_to_completion
from stanch.deadlines import Allowance, Deadline, allowed, earlier, judged_length
from stanch.errors import ConfigError, NotInstalled, UnitConflict
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
    if isinstance(call, Call):
        return call.unit_in(scope)
    raise NotInstalled(
        "there is no unit of work here, so there is no session to give",
        remedies=[
            "Write install(app, db) where the app is made (stanch.fastapi), or add UnitMiddleware.",
            "Middleware runs outside the unit: use async with db.session() there.",
        ],
    )


def routes_around(scope: Mapping[str, Any]) -> Sequence[Any]:
    """The routes of the outermost app that has a unit of work for *scope*; none where they cannot be seen."""
    call = scope.get(_CALL)
    if not isinstance(call, Call):
        return ()
    while call.outer is not None:
        call = call.outer
    app: Any = call.middleware.inside
    while app is not None and not hasattr(app, "routes"):
        app = getattr(app, "app", None)
    return () if app is None else cast("Sequence[Any]", app.routes)


class Recorder(Protocol):
    """What holds a reply back until it is whole, and stores it as a part of the work it answers for."""

    def released(self, message: Message) -> Sequence[Message]:
        """The messages that may leave now that *message* has come; an exception fails the reply."""
        ...

    async def before_settling(self, *, success: bool) -> None:
        """Write what the COMMIT shall hold besides the work; an exception fails the reply."""
        ...


def record(scope: Scope, recorder: Recorder) -> None:
    """Let *recorder* stand between the app and the settling of this request's unit.

    Raises ``NotInstalled`` where there is no unit, ``UnitConflict`` if another recorder stands there already or
    the reply has begun.
    """
    unit_of(scope)
    exchange = scope[_CALL]
    recordable = isinstance(exchange, Exchange) and not isinstance(exchange, RecordedExchange)
    if not recordable or exchange.start is not None:
        raise UnitConflict(
            "this reply cannot be recorded: it has begun, is recorded already, or is no HTTP reply",
            remedies=["Ask for one Idempotency-Key on a route, before it answers."],
        )
    exchange.recorder = recorder
    exchange.__class__ = RecordedExchange


def is_recorded(scope: Scope) -> bool:
    """Whether the client has sent a key under which the reply is recorded, so that repeating does no harm."""
    return isinstance(scope.get(_CALL), RecordedExchange)


class UnitMiddleware:
    """Gives each HTTP request and websocket a unit of work over *databases*.

    Guarantees: a status below 400 leaves only after every COMMIT has succeeded; a COMMIT that fails becomes
    the reply, through the app's own exception handlers; exactly one reply is sent; every session is closed
    when the call ends, also when it is cancelled. Must be the innermost middleware: what stands inside it is
    settled, what stands outside cannot ask for the unit's session and can still change a reply that was
    committed. With *request_timeout* (seconds) the reply to a request is on its way that long after the request has
    arrived here, as far as it waits for the database: see ``Database.transaction(timeout=)`` for what happens then.
    It does not bind websockets, nor what a stream or a background task does after the start of the reply.
    """

    def __init__(
        self,
        app: ASGIApp,
        databases: Iterable[Database[Any]],
        *,
        commit_mode: CommitMode = "auto",
        unsaved: Unsaved = "warn",
        request_timeout: float | None = None,
    ) -> None:
        self.app = self.inside = app
        self.databases = list(databases)
        self.unsaved: Unsaved = _judge("unsaved", unsaved, ("warn", "raise", "ignore"))
        self.mode = MODES[_judge("commit_mode", commit_mode, tuple(MODES))]
        self.request_timeout = judged_length("request_timeout", request_timeout)
        if request_timeout is not None:
            self.app = _bounded(app)
        self.exchange: type[Exchange] = Exchange if request_timeout is None else TimedExchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call of the app inside; anything but HTTP and websockets passes untouched."""
        # A call without a session pays for every frame and every store here, hence so few of either.
        if scope["type"] != "http":
            await self._serve_other(scope, receive, send)
            return
        exchange = self.exchange()
        exchange.middleware = self
        exchange.unit = exchange.start = exchange.latest = exchange.failure = None
        exchange.over = exchange.doomed = False
        exchange.outer = scope.get(_CALL)
        scope[_CALL] = exchange
        app_outside = scope.get("app")

        def settling_send(message: Message) -> Awaitable[None]:
            if exchange.unit is not None:
                return exchange.pass_on(message, send)
            if "status" in message:
                exchange.start = message
            else:
                exchange.latest = message
            return send(message)

        try:
            await self.app(scope, receive, settling_send)
        except BaseException as error:
            failure = exchange.failure_now()
            if failure is None or isinstance(error, _NEVER_SUPERSEDED):
                await exchange.close(well=False)
                raise
            _remember(error, beside=failure)
        if exchange.failure_now() is not None:
            if exchange.start is not None:
                await exchange.break_off(send)  # type: ignore[unreachable]  # set meanwhile
            await exchange.answer_instead(scope, receive, settling_send, app_outside)
        elif exchange.unit is not None:
            await exchange.close(well=exchange.is_complete())  # type: ignore[unreachable]  # made meanwhile
        exchange.over = True

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            conversation = Conversation()
            conversation.middleware, conversation.outer = self, scope.get(_CALL)
            conversation.unit, conversation.over = None, False
            scope[_CALL] = conversation
            await conversation.run(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Call:
    """One call of the app, and its unit of work: made when somebody asks for it, gone when the call is over.

    Does not hold the scope: the scope holds the call, and a cycle would wait for the garbage collector.
    """

    __slots__ = ("middleware", "outer", "over", "unit")
    kind: ClassVar[Kind]
    middleware: UnitMiddleware
    outer: Call | None
    """The call around this one, where a mounted app has middleware of its own."""
    unit: Unit | None
    over: bool

    def unit_in(self, scope: Scope) -> Unit:
        """The unit of this call; ``NotInstalled`` once the call is over, when nobody would close a session."""
        if self.over and self.outer is not None:
            return self.outer.unit_in(scope)
        if self.over:
            raise NotInstalled(
                "this call of the app is over, and its unit of work with it",
                remedies=[
                    "Work that outlives a request opens a unit of its own: async with db.transaction()."
                ],
            )
        if self.unit is None:
            self.unit = self._make_unit(scope)
        return self.unit

    def _make_unit(self, scope: Scope) -> Unit:
        middleware = self.middleware
        if self.outer is None:
            unit = Unit(middleware.databases, kind=self.kind)
        else:
            # A mounted app with middleware of its own: the innermost settles, the outermost closes.
            unit = self.outer.unit_in(scope)
            unit.adopt(middleware.databases)
        unit.mode, unit.unsaved = middleware.mode, middleware.unsaved
        unit.deadline = earlier(unit.deadline, self.deadline())
        return unit

    def deadline(self) -> Deadline | None:
        """When the reply must be on its way."""
        return None

    async def close(self, *, well: bool) -> None:
        """End the call; the outermost closes the unit, which commits what was done since the reply if all is *well*."""
        self.over = True
        unit, self.unit = self.unit, None
        if unit is not None and self.outer is None:
            unit.connection = None
            await unit.close(well=well)


class Exchange(Call):
    """One HTTP request and its reply: the unit is settled where the reply passes."""

    __slots__ = ("arrived", "doomed", "failure", "latest", "recorder", "start")
    kind = Kind.REQUEST
    arrived: float
    """When the request came, where the app has a ``request_timeout``."""
    start: Message | None
    """The start of the reply, if it has left."""
    latest: Message | None
    """The last that has left of what came after the start."""
    doomed: bool
    """Whether a limiter outside will put its own reply in the place of this one."""
    failure: Exception | None
    """What made a commit fail; until it is answered nothing leaves."""
    recorder: Recorder
    """Set where the reply is recorded, and only there."""

    def pass_on(self, message: Message, send: Send) -> Awaitable[None]:
        """Forward *message*, and settle before it where there is something to settle."""
        assert self.unit is not None
        if self.failure is not None or not self.unit.quiet:
            return self.settle_and_send(message, send)
        # A reader holds nothing by now: its reply leaves as one without a session does.
        self._note(message)
        return send(message)

    async def settle_and_send(self, message: Message, send: Send) -> None:
        """Forward *message*; settle before the start of the reply, and before its last message."""
        if self.failure is not None:
            # State, not the exception, is the truth: whatever swallowed it, nothing of the dead reply leaves.
            raise ReplyAbandoned from self.failure
        if "status" in message:
            await self._settle(message)
        elif _is_last(message):
            await self._settle(self.start)
        self._note(message)
        # Outside the settling: an OSError of the client's socket is not the database's.
        await send(message)

    def _note(self, message: Message) -> None:
        if "status" in message:
            assert self.unit is not None
            self.unit.answered()
            self.start = message
        else:
            self.latest = message

    async def _settle(self, start: Message | None) -> None:
        assert self.unit is not None
        try:
            await self.unit.settle(commit=self._succeeds(start))
        except Exception as failure:
            self.failure = failure
            raise ReplyAbandoned from failure

    def _succeeds(self, start: Message | None) -> bool:
        return start is not None and start["status"] < _ERROR and not self.doomed

    def is_complete(self) -> bool:
        """Whether the last message of the reply has left."""
        return self.latest is not None and _is_last(self.latest)

    def _make_unit(self, scope: Scope) -> Unit:
        self.doomed = _is_too_large(scope)
        return super()._make_unit(scope)

    async def answer_instead(self, scope: Scope, receive: Receive, send: Send, app_outside: object) -> None:
        """Let the app's own handlers answer the failure, once; unhandled, it leaves here for the server's."""
        failure = self.failure_now()
        assert failure is not None

        async def fail(_scope: Scope, _receive: Receive, _send: Send) -> NoReturn:
            raise failure

        # The connection that a dependency received has the body cached; a fresh one would wait for it forever.
        connection = self.unit_in(scope).connection or Request(scope, receive)
        answer: ASGIApp = wrap_app_handling_exceptions(fail, connection)
        if scope.get("app") is not app_outside:
            answer = _with_server_errors(answer, scope["app"])
        self.failure = None
        try:
            await answer(scope, receive, send)
        except BaseException as error:
            if self.failure_now() is None or isinstance(error, _NEVER_SUPERSEDED):
                await self.close(well=False)
                raise
        # Here too state is the truth: a second failure that a handler swallowed was answered by nobody.
        second = self.failure_now()
        await self.close(well=second is None and self.is_complete())
        if second is not None:
            raise failure from second

    async def break_off(self, send: Send) -> None:
        """End a reply whose start has left without its last message, the only honest way now; raises the failure."""
        failure = self.failure_now()
        assert failure is not None
        # Starlette's BaseHTTPMiddleware frames a reply anew, and ends it as if complete whatever is raised here. A
        # message it does not know stops it, but then it forgets our error. Servers refuse such a message.
        assert self.unit is not None
        logger.error(
            "%s: the reply was broken off, its commit failed: %s", self.unit.holder, type(failure).__name__
        )
        with suppress(Exception):
            await send({"type": "stanch.broken_off"})
        await self.close(well=False)
        raise failure

    def failure_now(self) -> Exception | None:
        """What made a commit fail."""
        return self.failure  # not narrowed to None: send() may have set it meanwhile


class TimedExchange(Exchange):
    """The same, where the app has a ``request_timeout``; without one a call pays nothing for the clock."""

    __slots__ = ()

    def __init__(self) -> None:
        self.arrived = time.monotonic()

    def deadline(self) -> Deadline | None:
        """That long after the request came."""
        timeout = self.middleware.request_timeout
        assert timeout is not None
        return Deadline(self.arrived + timeout, timeout, "request_timeout")


class RecordedExchange(Exchange):
    """An exchange whose reply is recorded. A class of its own, so that no other exchange pays for it."""

    __slots__ = ()

    def pass_on(self, message: Message, send: Send) -> Awaitable[None]:
        """Forward *message* once the recorder has had it, also where there is nothing to settle."""
        return self.settle_and_send(message, send)

    async def settle_and_send(self, message: Message, send: Send) -> None:
        """As the base's, once the recorder releases the message."""
        for ready in self._released(message):
            await super().settle_and_send(ready, send)

    def _released(self, message: Message) -> Sequence[Message]:
        if self.failure is not None:
            return (message,)
        try:
            return self.recorder.released(message)
        except Exception as failure:
            self.failure = failure
            raise ReplyAbandoned from failure

    async def _settle(self, start: Message | None) -> None:
        # In one piece: a cancellation between the record and the COMMIT would waste the work.
        await run_to_completion(self._record_and_settle(start))

    async def _record_and_settle(self, start: Message | None) -> None:
        try:
            await self.recorder.before_settling(success=self._succeeds(start))
        except Exception as failure:
            self.failure = failure
            raise ReplyAbandoned from failure
        await super()._settle(start)


class Conversation(Call):
    """One websocket: while it waits for its peer it holds no connection and has nothing uncommitted."""

    __slots__ = ()
    kind = Kind.WEBSOCKET

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with a ``receive`` that holds nothing; close the unit."""

        async def receive_holding_nothing() -> Message:
            if self.unit is not None:
                await self.unit.pause()
            return await receive()

        well = False
        try:
            await self.middleware.app(scope, receive_holding_nothing, send)
            well = True
        finally:
            await self.close(well=well)


def _bounded(app: ASGIApp) -> ASGIApp:
    """*app*, whose ``request_timeout`` also holds for the units that a handler opens by itself."""

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope.get(_CALL)
        if not isinstance(exchange, Exchange):  # a websocket
            await app(scope, receive, send)
            return
        deadline = exchange.deadline()
        assert deadline is not None
        allowance = Allowance(deadline)

        async def send_and_lift(message: Message) -> None:
            await send(message)
            if "status" in message:
                allowance.deadline = None  # streams and background tasks have all the time they need

        with allowed(allowance):
            await app(scope, receive, send_and_lift)

    return bounded


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
