"""Tells Prometheus what the databases of an app measure: a collector for any registry, and an endpoint.

Names are OpenTelemetry's ``db.client.connection.*`` in Prometheus' form; what it has no name for begins with
``stanch_``. Nothing is counted here: each scrape reads the snapshot of each database. Every series has the label
``database``, and ``pid``: several workers behind one port are scraped one at a time, and their counters must not be
taken for one that jumps. No label holds SQL; a route is its template.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import REGISTRY, CollectorRegistry, make_asgi_app  # pyright: ignore[reportUnknownVariableType]  # its Callable says nothing
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse

from stanch.measuring import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from prometheus_client import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from stanch.database import Database
    from stanch.ledger import Stats
    from stanch.measuring import Distribution, RouteTotals, Snapshot

    Row = tuple[tuple[str, ...], float]
    """The values of a family's own labels, and a figure."""
    Rows = Callable[[Snapshot], Iterable[Row]]

_LABELS: Final = ("database", "pid")


class StanchCollector(Collector):
    """The numbers of *databases*, for a registry of ``prometheus_client``: ``REGISTRY.register(StanchCollector(db))``.

    Begins to measure when it is made. One collector serves all databases of an app: a registry refuses a second one,
    because both would tell the same families. Any thread may collect.
    """

    def __init__(self, *databases: Database[Any]) -> None:
        self._databases: Sequence[Database[Any]] = databases
        for database in databases:
            database.measure()

    @classmethod
    def of(cls, databases: Sequence[Database[Any]]) -> StanchCollector:
        """A collector of whatever *databases* holds at each scrape; what is added later is measured from then on."""
        collector = cls()
        collector._databases = databases
        return collector

    def describe(self) -> Iterator[Metric]:
        """Every family, without a sample."""
        return _Scrape([]).families()

    def collect(self) -> Iterator[Metric]:
        """Every family, as of now."""
        return _Scrape([database.measure().snapshot() for database in self._databases]).families()


class MetricsApp:
    """The ASGI app behind ``install(metrics=)``: stanch's numbers, then the rest of ``prometheus_client``'s registry.

    A process has one place where it is scraped, so what the app itself counts with ``prometheus_client`` is there, too.
    The format is the one asked for: Prometheus' text, or OpenMetrics; gzip; ``?name[]=`` chooses families.
    """

    def __init__(self, databases: Sequence[Database[Any]]) -> None:
        own = CollectorRegistry()
        own.register(StanchCollector.of(databases))
        self._answer: ASGIApp = make_asgi_app(_Together(own, REGISTRY))  # pyright: ignore[reportUnknownMemberType]  # its Callable says nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one scrape."""
        if scope["path_params"].get("rest"):
            await PlainTextResponse("Not Found", 404)(scope, receive, send)
        elif scope["method"] != "GET":
            await PlainTextResponse("Method Not Allowed", 405, {"allow": "GET"})(scope, receive, send)
        else:
            await self._answer(scope, receive, _in_lower_case(send))


def _in_lower_case(send: Send) -> Send:
    """ASGI has names of headers in lower case; ``Content-Encoding`` as it is written there GZipMiddleware overlooks."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [(name.lower(), value) for name, value in message["headers"]]
        await send(message)

    return sending


class _Together(Collector):
    """Two registries as one; a family that both have is the first's."""

    def __init__(self, first: Collector, second: Collector) -> None:
        self._both: tuple[Any, ...] = (first, second)

    def collect(self) -> Iterator[Metric]:
        told = set[str]()
        for registry in self._both:
            for family in registry.collect():
                if family.name not in told:
                    told.add(family.name)
                    yield family

    def restricted_registry(self, names: Iterable[str]) -> _Together:
        first, second = (registry.restricted_registry(names) for registry in self._both)
        return _Together(first, second)


# Families -------------------------------------------------------------------------------------------------

_BOUNDS: Final = (*map(str, BOUNDS), "+Inf")


class _Scrape:
    """The families of one moment."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def families(self) -> Iterator[Metric]:
        yield self._gauge(
            "db_client_connection_count",
            "Connections by state: used is checked out, idle is open and in the pool.",
            lambda each: [
                ((pool, state), figure)
                for pool, stats in _pools(each.stats)
                for state, figure in (("idle", stats.idle), ("used", stats.in_use))
            ],
            "pool",
            "state",
        )
        yield self._gauge(
            "db_client_connection_max",
            "Connections that may be open at once: pool_size + max_overflow.",
            lambda each: [((pool,), stats.bound) for pool, stats in _pools(each.stats)],
            "pool",
        )
        yield self._gauge(
            "db_client_connection_pending_requests",
            "Callers that wait for a connection.",
            lambda each: [((pool,), stats.waiting) for pool, stats in _pools(each.stats)],
            "pool",
        )
        yield self._counter(
            "db_client_connection_timeouts",
            "Waits for a connection that ended in none, because their time was over.",
            lambda each: [((), each.wait_ends["timeout"])],
        )
        yield self._histogram(
            "db_client_connection_create_time", "What opening a connection took.", lambda each: each.creates
        )
        yield self._histogram(
            "db_client_connection_wait_time",
            "What callers waited for a connection; those served at once count as 0.",
            lambda each: each.waits,
        )
        yield self._histogram(
            "db_client_connection_use_time",
            "From checkout to checkin of a connection.",
            lambda each: each.uses,
        )
        yield self._counter(
            "stanch_waits",
            "Waits for a connection by their end: served, timeout, refused (early), unavailable, cancelled.",
            lambda each: [((end,), count) for end, count in each.wait_ends.items()],
            "end",
        )
        yield self._gauge(
            "stanch_longest_held_seconds",
            "For how long the connection that has been out longest is out now; 0 if none is.",
            lambda each: [((), max((holding.held for holding in each.holders), default=0.0))],
        )
        yield self._counter(
            "stanch_transactions",
            "Transactions by their end: committed, rolled_back, read (statements that stood alone), unknown.",
            lambda each: [((end.replace(" ", "_"),), count) for end, count in each.unit_ends.items()],
            "end",
        )
        yield self._counter(
            "stanch_events",
            "Events by class, as they are told to db.observe() and to the log.",
            lambda each: [((kind,), count) for kind, count in sorted(each.event_counts.items())],
            "event",
        )
        # All shapes together: a label with SQL in it would be a label with any number of values.
        yield self._counter(
            "stanch_statements",
            "Statements executed.",
            lambda each: [((), sum(shape.count for shape in each.statements))],
        )
        yield self._counter(
            "stanch_statement_errors",
            "Statements that failed.",
            lambda each: [((), sum(shape.errors for shape in each.statements))],
        )
        yield self._counter(
            "stanch_statement_time_seconds",
            "Time in which statements ran.",
            lambda each: [((), sum(shape.total for shape in each.statements))],
        )
        yield self._route("units", "Units of work, by route.", lambda row: row.units)
        yield self._route("statements", "Statements executed, by route.", lambda row: row.statements)
        yield self._route(
            "sql_time_seconds", "Time in which statements ran, by route.", lambda row: row.sql_time
        )
        yield self._route(
            "wait_time_seconds", "Time waited for a connection, by route.", lambda row: row.waited
        )
        yield self._route(
            "held_seconds", "Time with a connection checked out, by route.", lambda row: row.held
        )
        yield self._route(
            "rolled_back", "Units of work that rolled back, by route.", lambda row: row.rolled_back
        )
        yield self._route(
            "repeated",
            "Units of work in which one shape of statement came suspiciously often, by route.",
            lambda row: row.repeated,
        )

    def _gauge(self, name: str, about: str, rows: Rows, *labels: str) -> Metric:
        return self._filled(GaugeMetricFamily, name, about, rows, labels)

    def _counter(self, name: str, about: str, rows: Rows, *labels: str) -> Metric:
        return self._filled(CounterMetricFamily, name, about, rows, labels)

    def _route(self, name: str, about: str, of: Callable[[RouteTotals], float]) -> Metric:
        def rows(snapshot: Snapshot) -> Iterable[Row]:
            return [((row.route,), of(row)) for row in snapshot.routes]

        return self._counter(f"stanch_route_{name}", about, rows, "route")

    def _histogram(self, name: str, about: str, of: Callable[[Snapshot], Distribution]) -> Metric:
        family = HistogramMetricFamily(name, about, labels=_LABELS, unit="seconds")
        for snapshot in self._snapshots:
            distribution = of(snapshot)
            cumulated = zip(_BOUNDS, accumulate(distribution.buckets), strict=True)
            family.add_metric(_values(snapshot), [*cumulated], distribution.total)
        return family

    def _filled(
        self, kind: Callable[..., Any], name: str, about: str, rows: Rows, labels: tuple[str, ...]
    ) -> Metric:
        unit = "seconds" if name.endswith("_seconds") else ""
        family: Any = kind(name, about, labels=(*_LABELS, *labels), unit=unit)
        for snapshot in self._snapshots:
            for values, figure in rows(snapshot):
                family.add_metric((*_values(snapshot), *values), figure)
        filled: Metric = family
        return filled


def _values(snapshot: Snapshot) -> tuple[str, str]:
    return snapshot.database, str(snapshot.pid)


def _pools(stats: Stats) -> Iterator[tuple[str, Stats]]:
    """The pools of one database by name; ``readers`` only where they have connections of their own."""
    yield "main", stats.own
    if stats.readers is not None:
        yield "readers", stats.readers
