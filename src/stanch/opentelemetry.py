"""Tells OpenTelemetry what a database measures: metrics of its pool, spans of its units, checkouts and statements.

Names, units and attributes are those of the semantic conventions for database clients (schema 1.36); what they have no
word for begins with ``stanch.``. Of a statement its shape is told, of an error its SQLSTATE or its class: never a
parameter, a literal or the text of an exception.

Every span lies below the one that was current in the task where it happened. Below a span of ours it lies where nothing
was opened in between. A trace that is not sampled costs a look at the current span.
"""

from __future__ import annotations

import time
from collections import deque
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet, ref

from stanch.callers import NOWHERE, current_loop
from stanch.errors import ConfigError
from stanch.events import context_providers
from stanch.measuring import BOUNDS
from stanch.meters import Meter
from stanch.sqlstate import sqlstate_of
from stanch.sqltext import shape_of
from stanch.summaries import summary_of

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import SpanKind, StatusCode
except ImportError as missing:
    raise ImportError(
        f"stanch.opentelemetry needs a package that is not installed ({missing.name}):"
        " pip install 'stanch[opentelemetry]'",
        name=missing.name,
    ) from missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, SpanContext, TracerProvider
    from opentelemetry.util.types import Attributes
    from sqlalchemy import URL

    from stanch.accounts import Account
    from stanch.callers import Place
    from stanch.database import Database
    from stanch.ledger import Checkout, Stats
    from stanch.meters import UnitEnd, WaitEnd

__all__ = ["instrument", "uninstrument"]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.36.0"
_SCOPE: Final = "stanch"

_POOL_NAME: Final = "db.client.connection.pool.name"
_DURATIONS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Seconds; the bounds that the convention recommends for ``db.client.operation.duration``."""
_SHAPES: Final = 500
"""How many shapes of statement are told apart in metrics; of more, generated ones, there could be any number."""
_SYSTEMS: Final = {"postgresql": "postgresql", "sqlite": "sqlite"}
_DEFAULT_PORT: Final = 5432


def instrument(
    database: Database[Any],
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Tell OpenTelemetry what *database* does from now on; without providers the global ones, also if set later.

    A second call changes nothing, ``uninstrument(database)`` ends it. Raises ``ConfigError`` for a second call with
    other providers. Reads no environment and sets no provider; nothing is sent without an SDK.
    """
    providers = (tracer_provider, meter_provider)
    if (known := _instrumented.get(database)) is not None:
        if providers not in ((None, None), known.providers):
            raise ConfigError(
                f"database {database.name!r} already tells other providers of OpenTelemetry",
                remedies=["Take it off first: uninstrument(database)."],
            )
        return
    board = _board_of(meter_provider)
    telemetry = _Telemetry(database, trace.get_tracer(_SCOPE, _version(), tracer_provider, SCHEMA_URL), board)
    board.shown.add(telemetry)
    if _ids_of_the_trace not in context_providers:
        context_providers.append(_ids_of_the_trace)
    _instrumented[database] = _Instrumented(telemetry, providers, database.meter(telemetry))


def uninstrument(database: Database[Any]) -> None:
    """Tell OpenTelemetry nothing more of *database*; spans still open end now. Does nothing where nothing was told."""
    known = _instrumented.pop(database, None)
    if known is not None:
        known.take_off()
        known.telemetry.board.shown.discard(known.telemetry)
        known.telemetry.end_all()
        if not _instrumented:
            context_providers.remove(_ids_of_the_trace)


# Metrics ------------------------------------------------------------------------------------------------------


class _Board:
    """The instruments of one meter provider, and the databases that are shown on them."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self.shown: WeakSet[_Telemetry] = WeakSet()
        meter = metrics.get_meter(_SCOPE, _version(), provider, SCHEMA_URL)
        # Observed by callbacks that ask the pool's own books: whoever counts along is wrong sooner or later.
        meter.create_observable_up_down_counter(
            "db.client.connection.count",
            [self._observe(_counts)],
            unit="{connection}",
            description="Connections that are idle in the pool, and those that are in use.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.max",
            [self._observe(lambda stats: [(stats.bound, {})])],
            unit="{connection}",
            description="How many connections may be open at once.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.pending_requests",
            [self._observe(lambda stats: [(stats.waiting, {})])],
            unit="{request}",
            description="Callers that wait for a connection.",
        )
        self.timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            unit="{timeout}",
            description="Waits for a connection that ended without one at pool_timeout or a deadline.",
        )
        lengths = {
            "create_time": "Time it took to open a connection and make it ready for use.",
            "wait_time": "Time that callers waited for the connection they got.",
            "use_time": "Time from the checkout of a connection to its return.",
        }
        self.create_time, self.wait_time, self.use_time = (
            meter.create_histogram(
                f"db.client.connection.{name}",
                unit="s",
                description=told,
                explicit_bucket_boundaries_advisory=BOUNDS,
            )
            for name, told in lengths.items()
        )
        self.duration = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Time that statements took, as their sender saw it.",
            explicit_bucket_boundaries_advisory=_DURATIONS,
        )

    def _observe(
        self, numbers: Callable[[Stats], Iterable[tuple[int, dict[str, str]]]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for telemetry in [*self.shown]:
                telemetry.tell_late()
                if (stats := telemetry.stats()) is not None:
                    for number, attributes in numbers(stats):
                        yield metrics.Observation(number, {**telemetry.pool, **attributes})

        return observe


def _counts(stats: Stats) -> Iterable[tuple[int, dict[str, str]]]:
    return [
        (stats.idle, {"db.client.connection.state": "idle"}),
        (stats.in_use, {"db.client.connection.state": "used"}),
    ]


def _board_of(provider: MeterProvider | None) -> _Board:
    # Instruments that are observed must be made once: a second one of that name is dropped in silence.
    owner: object = metrics if provider in (None, metrics.get_meter_provider()) else provider
    board = _boards.get(owner)
    if board is None:
        board = _boards[owner] = _Board(None if owner is metrics else provider)
    return board


_boards: Final[WeakKeyDictionary[object, _Board]] = WeakKeyDictionary()


# Spans --------------------------------------------------------------------------------------------------------


class _Open:
    """A span of ours that has not ended, and the one below which it began."""

    __slots__ = ("__weakref__", "begun", "home", "span")

    def __init__(self, span: Span, home: Span) -> None:
        self.span = span
        self.home = home.get_span_context()
        self.begun: int | None = None
        """Of a unit: when its transaction took its first connection; wall clock, nanoseconds."""


class _Statement:
    """What is said of one shape of statement."""

    __slots__ = ("attributes", "dimensions", "name")

    def __init__(self, name: str, attributes: dict[str, Any], dimensions: dict[str, Any]) -> None:
        self.name = name
        self.attributes = attributes
        self.dimensions = dimensions
        """Of metrics."""


class _Telemetry(Meter):
    """The meter of one database."""

    __slots__ = (
        "__weakref__",
        "_checkouts",
        "_database",
        "_late",
        "_server",
        "_statements",
        "_tracer",
        "_units",
        "_used",
        "board",
        "pool",
    )

    def __init__(self, database: Database[Any], tracer: trace.Tracer, board: _Board) -> None:
        self.board = board
        self.pool: Mapping[str, str] = {_POOL_NAME: database.name}
        self._database = ref(database)
        self._tracer = tracer
        self._used = False
        """Whether the engine exists; before that there is nothing to observe, and an exporter must not build it."""
        self._server: dict[str, Any] | None = None
        self._statements: dict[str, _Statement] = {}
        self._units: WeakKeyDictionary[Account, _Open] = WeakKeyDictionary()
        self._checkouts: WeakKeyDictionary[Checkout, _Open] = WeakKeyDictionary()
        self._late: deque[tuple[Checkout, float, int]] = deque()

    def stats(self) -> Stats | None:
        """The counts of this moment, if there are any."""
        database = self._database()
        return database.stats() if database is not None and self._used else None

    # The pool -----------------------------------------------------------------------------------------------

    def opened(self, seconds: float) -> None:
        self.board.create_time.record(seconds, self.pool)

    def waited(self, seconds: float, end: WaitEnd, account: Account | None) -> None:
        self._used = True
        if end == "served":
            self.board.wait_time.record(seconds, self.pool)
            if not seconds:
                return
        elif end == "timeout":
            self.board.timeouts.add(1, self.pool)
        inside = None if account is None else self._units.get(account)
        if (parent := _parent(inside)) is None:
            return
        now = time.time_ns()
        span = self._start("wait for a connection", parent, now - int(seconds * 1e9), {"stanch.end": end})
        if end != "served":
            _fail(span, end)
        span.end(now)

    def taken(self, checkout: Checkout) -> None:
        self.tell_late()
        unit = None if checkout.account is None else self._units.get(checkout.account)
        now = time.time_ns()
        if unit is not None and unit.begun is None:
            unit.begun = now
        if (parent := _parent(unit)) is not None:
            span = self._start("connection in use", parent, now, _told_place(checkout.place))
            self._checkouts[checkout] = _Open(span, trace.get_current_span())

    def returned(self, checkout: Checkout, held: float) -> None:
        # The garbage collector may be the one who returns it, in the middle of anything on this thread, also inside a
        # lock of the SDK's, which must not be asked anything now.
        self._late.append((checkout, held, time.time_ns()))
        loop = current_loop()
        if loop is not None:
            loop.call_soon(self.tell_late)

    def tell_late(self) -> None:
        """Tell of the returns since the last time."""
        while self._late:
            try:
                checkout, held, at = self._late.popleft()
            except IndexError:  # another thread was faster
                return
            self.board.use_time.record(held, self.pool)
            opened = self._checkouts.pop(checkout, None)
            if opened is not None:
                opened.span.set_attributes(
                    {
                        "stanch.held": held,
                        "stanch.sql_time": checkout.sql_time,
                        "stanch.statements": checkout.statements,
                    }
                )
                opened.span.end(at)

    # Statements ---------------------------------------------------------------------------------------------

    def executed(
        self,
        statement: str,
        seconds: float,
        checkout: Checkout | None,
        place: Callable[[], Place],
        error: BaseException | None,
    ) -> None:
        said = self._said_of(statement)
        failure = {} if error is None else _failure(error)
        inside = None if checkout is None else self._checkouts.get(checkout) or self._unit_of(checkout)
        parent = _parent(inside)
        # What is sent while a connection is set up, by nobody, is no trace of its own.
        if parent is None or (checkout is None and not parent.get_span_context().is_valid):
            self.board.duration.record(seconds, said.dimensions | failure)
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            said.name,
            trace.set_span_in_context(parent),
            SpanKind.CLIENT,
            said.attributes,
            start_time=now - int(seconds * 1e9),
        )
        if span.is_recording():
            span.set_attributes(_told_place(place()))
            if error is not None:
                span.set_status(StatusCode.ERROR)
                span.set_attributes(failure)
        self.board.duration.record(seconds, said.dimensions | failure, trace.set_span_in_context(span))
        span.end(now)

    def _unit_of(self, checkout: Checkout) -> _Open | None:
        return None if checkout.account is None else self._units.get(checkout.account)

    def _said_of(self, statement: str) -> _Statement:
        shape = shape_of(statement)
        said = self._statements.get(shape)
        if said is not None:
            return said
        server = self._server = self._server or self._told_server()
        summary = summary_of(shape)
        what: dict[str, Any] = {"db.query.summary": summary.text} if summary.text else {}
        if summary.operation is not None:
            what["db.operation.name"] = summary.operation
        attributes = {**server, **what, "db.query.text": shape}
        if len(self._statements) >= _SHAPES:
            return _Statement(summary.operation or server["db.system.name"], attributes, server)
        said = _Statement(summary.text or server["db.system.name"], attributes, {**server, **what})
        return self._statements.setdefault(shape, said)

    def _told_server(self) -> dict[str, Any]:
        database = self._database()
        assert database is not None, "it has just executed a statement"
        engine = database.engine
        name = engine.dialect.name
        told: dict[str, Any] = {"db.system.name": _SYSTEMS.get(name, "other_sql")}
        return told if name == "sqlite" else told | _told_address(engine.url)

    # Units --------------------------------------------------------------------------------------------------

    def began(self, account: Account) -> None:
        home = _outlasting(trace.get_current_span())
        if _is_sampled_out(home):
            return
        unit = self._units[account] = _Open(self._start(_name_of(account), home, None, {}), home)
        _latest.set(ref(unit))

    def ended(self, account: Account, outcome: UnitEnd) -> None:
        self.tell_late()
        unit = self._units.get(account)
        if unit is None or unit.begun is None:
            return
        begun, unit.begun = unit.begun, None
        if outcome != "read" and unit.span.is_recording():
            span = self._start("transaction", unit.span, begun, {"stanch.outcome": outcome})
            if outcome == "unknown":
                _fail(span, "unknown outcome")
            span.end()

    def closed(self, account: Account) -> None:
        self.tell_late()
        unit = self._units.pop(account, None)
        if unit is None:
            return
        if unit.span.is_recording():
            unit.span.update_name(_name_of(account))
            unit.span.set_attributes(
                {
                    **_told_place(account.place or NOWHERE),
                    "stanch.holder": account.holder,
                    "stanch.held": account.held,
                    "stanch.waited": account.waited,
                    "stanch.sql_time": account.sql_time,
                    "stanch.statements": account.statements,
                    "stanch.rolled_back": account.rolled_back,
                }
            )
        unit.span.end()

    def end_all(self) -> None:
        """End what is open, where nobody will tell any more that it has ended."""
        self.tell_late()
        for table in (self._checkouts, self._units):
            for entry in [*table.values()]:
                entry.span.end()
            table.clear()

    def _start(self, name: str, parent: Span, at: int | None, attributes: Attributes) -> Span:
        return self._tracer.start_span(
            name,
            trace.set_span_in_context(parent),
            attributes={**self.pool, **(attributes or {})},
            start_time=at,
        )


def _parent(inside: _Open | None) -> Span | None:
    """The span below which what happens now belongs, where *inside* is the innermost of ours; None: it is not sampled.

    Between the two a span of the user's may have been opened, which then is the nearer one.
    """
    current = trace.get_current_span()
    if inside is not None and current.get_span_context() == inside.home:
        return inside.span if inside.span.is_recording() else None
    return None if _is_sampled_out(current) else current


def _is_sampled_out(span: Span) -> bool:
    context = span.get_span_context()
    return context.is_valid and not context.trace_flags.sampled


def _outlasting(current: Span) -> Span:
    """The span below which a unit belongs: not FastAPI's own for the solving of dependencies, which is over by then."""
    parent: SpanContext | None = getattr(current, "parent", None)
    if parent is None or getattr(current, "name", None) != "fastapi.dependencies":
        return current
    return trace.NonRecordingSpan(parent)


def _fail(span: Span, kind: str) -> None:
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", kind)


def _failure(error: BaseException) -> dict[str, str]:
    """What may be said of *error*: the code the server gave, or the class of what happened; not its text."""
    code = sqlstate_of(error) or _sqlite_code(error)
    if code is not None:
        return {"db.response.status_code": code, "error.type": code}
    original: object = getattr(error, "orig", None) or error
    kind = type(original)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return {"error.type": f"{module}{kind.__qualname__}"}


def _sqlite_code(error: BaseException) -> str | None:
    for candidate in (error, getattr(error, "orig", None), error.__cause__):
        if isinstance(name := getattr(candidate, "sqlite_errorname", None), str):
            return name
    return None


def _told_place(place: Place) -> dict[str, Any]:
    if place is NOWHERE:
        return {}
    return {
        "code.file.path": place.file,
        "code.line.number": place.line,
        "code.function.name": place.function,
    }


def _told_address(url: URL) -> dict[str, Any]:
    """Where the server is, as far as the settings say so with one word."""
    told: dict[str, Any] = {}
    if url.database:
        told["db.namespace"] = url.database
    if url.host:
        told["server.address"] = url.host
        if url.port is not None and url.port != _DEFAULT_PORT:
            told["server.port"] = url.port
    return told


def _name_of(account: Account) -> str:
    return f"unit {account.holder}"


def _version() -> str:
    return version("stanch")


# Logs ---------------------------------------------------------------------------------------------------------

_latest: Final[ContextVar[ref[_Open] | None]] = ContextVar("stanch unit", default=None)
"""The unit that was opened last in this context. A weak reference: what a context keeps may be kept for ever."""


def _ids_of_the_trace() -> Mapping[str, str]:
    """What leads from a log record to the trace it belongs to."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid and (latest := _latest.get()) is not None and (unit := latest()) is not None:
        context = unit.span.get_span_context()
    if not context.is_valid:
        return {}
    return {
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
    }


# Who is instrumented -----------------------------------------------------------------------------------------


class _Instrumented:
    __slots__ = ("providers", "take_off", "telemetry")

    def __init__(
        self,
        telemetry: _Telemetry,
        providers: tuple[TracerProvider | None, MeterProvider | None],
        take_off: Callable[[], None],
    ) -> None:
        self.telemetry = telemetry
        self.providers = providers
        self.take_off = take_off


_instrumented: Final[WeakKeyDictionary[Database[Any], _Instrumented]] = WeakKeyDictionary()
