"""What OpenTelemetry is told: true figures by the conventional names, spans with their right parents, never a value."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.semconv.attributes import error_attributes, server_attributes
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from stanch import Database
from stanch.accounts import Account
from stanch.callers import NOWHERE, Place
from stanch.errors import ConfigError, PoolExhausted
from stanch.events import context_providers
from stanch.fastapi import ReaderDep, SessionDep, install
from stanch.ledger import Checkout
from stanch.meters import NOBODY, Meter
from stanch.opentelemetry import SCHEMA_URL, instrument, uninstrument
from tests.requests.shop import SCHEMA, Order, needs_new_fastapi
from tests.support.judge import assert_nothing_left, until
from tests.support.uvicorn_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping

    from opentelemetry.trace import Span

    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

# The convention's texts on pools are not stable yet; their module is private, and has no types.
db_attributes = import_module("opentelemetry.semconv._incubating.attributes.db_attributes")
db_metrics = import_module("opentelemetry.semconv._incubating.metrics.db_metrics")

SECRET = "hunter2"


@dataclass
class Observatory:
    """Providers of one test's own, and what they were told."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)
    sampler: Any = None

    def __post_init__(self) -> None:
        self.tracers = TracerProvider(sampler=self.sampler)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])
        self.tracer = self.tracers.get_tracer("app")

    def watch(self, database: Database[Any]) -> None:
        instrument(database, tracer_provider=self.tracers, meter_provider=self.meters)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def beneath(self, name: str) -> str | None:
        """The name of the span above the one called *name*."""
        parent = self.one(name).parent
        return None if parent is None else self.by_id()[parent.span_id].name

    def by_id(self) -> dict[int, ReadableSpan]:
        return {span.context.span_id: span for span in self.spans if span.context is not None}

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        scopes = [scope for each in data.resource_metrics for scope in each.scope_metrics] if data else []
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> list[Any]:
        metric = self.metrics().get(name)
        return [] if metric is None else list(metric.data.data_points)

    def told(self) -> str:
        """All that was told, as text: where nothing secret may be."""
        words = [span.to_json() for span in self.spans]
        words += [metric.to_json() for metric in self.metrics().values()]
        return "\n".join(words)

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


@pytest.fixture
def seen() -> Iterator[Observatory]:
    observatory = Observatory()
    yield observatory
    observatory.close()


@pytest.fixture
async def db(fresh_database: FreshDatabase, driver: str, seen: Observatory) -> AsyncIterator[Database[Any]]:
    await fresh_database.execute(SCHEMA)
    async with Database(fresh_database.url(driver), pool_size=2, max_overflow=0, pool_timeout=0.2) as db:
        seen.watch(db)
        yield db
        await assert_nothing_left(fresh_database, db)
    uninstrument(db)


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    return span.attributes or MappingProxyType({})


# A hand-fed meter -------------------------------------------------------------------------------------------


class Unbuilt:
    """What ``instrument`` asks of a database, and the meter it gives it."""

    def __init__(self, url: str = "postgresql+asyncpg://app:hunter2@db.example:6432/shop") -> None:
        self.name = "shop"
        self.engine = Database(url).engine
        self.meters: list[Meter] = []

    def meter(self, meter: Meter) -> Callable[[], None]:
        self.meters.append(meter)
        return lambda: self.meters.remove(meter)

    def stats(self) -> Any:
        return Database("postgresql+asyncpg://app@localhost/shop", pool_size=3).stats()


@dataclass
class Hand:
    """Feeds a meter as the pool and the sessions do."""

    meter: Meter

    def unit(self, holder: str = "GET /orders") -> Account:
        account = Account(holder, Place("shop.py", 7, "list_orders"))
        self.meter.began(account)
        return account

    def checkout(self, account: Account | None = None, waited: float = 0.0) -> Checkout:
        self.meter.waited(waited, "served", account)
        checkout = Checkout(None, time.monotonic(), account, Place("shop.py", 9, "list_orders"))
        self.meter.taken(checkout)
        return checkout

    def run(
        self, sql: str, checkout: Checkout | None, error: BaseException | None = None, seconds: float = 0.001
    ) -> None:
        self.meter.executing(checkout)
        self.meter.executed(sql, seconds, checkout, lambda: NOWHERE, error)


@pytest.fixture
def unbuilt() -> Unbuilt:
    return Unbuilt()


@pytest.fixture
def hand(unbuilt: Unbuilt, seen: Observatory) -> Iterator[Hand]:
    seen.watch(unbuilt)  # type: ignore[arg-type]  # all that it is asked for
    yield Hand(unbuilt.meters[0])
    uninstrument(unbuilt)  # type: ignore[arg-type]  # likewise


async def test_a_span_lies_below_the_one_that_was_current_and_below_ours_where_none_was_between(
    hand: Hand, seen: Observatory
) -> None:
    with seen.tracer.start_as_current_span("GET"):
        account = hand.unit()
        checkout = hand.checkout(account, waited=0.01)
        hand.run("SELECT 1 FROM orders", checkout)
        with seen.tracer.start_as_current_span("compute"):
            hand.run("SELECT 1 FROM users", checkout)
        hand.meter.returned(checkout, 0.1)
        hand.meter.ended(account, "committed")
    hand.meter.closed(account)

    assert {span.name: seen.beneath(span.name) for span in seen.spans} == {
        "GET": None,
        "unit GET /orders": "GET",
        "wait for a connection": "unit GET /orders",
        "connection in use": "unit GET /orders",
        "transaction": "unit GET /orders",
        "SELECT orders": "connection in use",
        "compute": "GET",
        "SELECT users": "compute",
    }


async def test_a_unit_outside_any_trace_is_one_trace(hand: Hand, seen: Observatory) -> None:
    account = hand.unit("shop.py:7 in main()")
    checkout = hand.checkout(account)
    hand.run("SELECT 1 FROM orders", checkout)
    hand.meter.returned(checkout, 0.1)
    hand.meter.closed(account)

    assert len({span.context.trace_id for span in seen.spans if span.context}) == 1
    assert len(seen.spans) == 3


async def test_statements_sent_while_a_connection_is_set_up_begin_no_trace(
    hand: Hand, seen: Observatory
) -> None:
    hand.run("select pg_catalog.version()", None)
    assert not seen.spans
    assert len(seen.points("db.client.operation.duration")) == 1

    with seen.tracer.start_as_current_span("GET"):
        hand.run("select pg_catalog.version()", None)
    assert seen.beneath("select") == "GET"


@pytest.mark.parametrize("end", ["timeout", "refused", "unavailable", "cancelled"])
async def test_a_wait_that_got_no_connection_is_an_error(hand: Hand, seen: Observatory, end: Any) -> None:
    account = hand.unit()
    hand.meter.waited(0.5, end, account)
    hand.meter.closed(account)
    span = seen.one("wait for a connection")

    assert span.status.status_code is StatusCode.ERROR
    assert attributes_of(span)["error.type"] == end
    assert span.end_time is not None
    assert span.start_time is not None
    assert span.end_time - span.start_time == pytest.approx(0.5e9)
    assert [point.value for point in seen.points("db.client.connection.timeouts")] == [1] * (end == "timeout")
    assert not seen.points("db.client.connection.wait_time")


async def test_an_unknown_commit_is_an_error_and_a_rollback_is_none(hand: Hand, seen: Observatory) -> None:
    account = hand.unit()
    for outcome in ("unknown", "rolled back", "read"):
        hand.meter.returned(hand.checkout(account), 0.1)
        hand.meter.ended(account, outcome)
    hand.meter.closed(account)

    assert [
        (attributes_of(span)["stanch.outcome"], span.status.status_code) for span in seen.named("transaction")
    ] == [("unknown", StatusCode.ERROR), ("rolled back", StatusCode.UNSET)]
    assert len({span.start_time for span in seen.named("transaction")}) == 2


async def test_a_unit_is_called_as_its_holder_was_at_last(hand: Hand, seen: Observatory) -> None:
    account = hand.unit("request")
    account.holder = "GET /orders"
    hand.meter.closed(account)

    assert attributes_of(seen.one("unit GET /orders"))["stanch.holder"] == "GET /orders"


class Lock(SpanProcessor):
    """Holds a lock that cannot be taken twice, as the SDK's own do while they export."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        assert self.lock.acquire(timeout=1), "it would wait for itself for ever"
        self.lock.release()


async def test_a_return_by_the_garbage_collector_asks_nothing_of_the_sdk_at_that_moment(
    hand: Hand, seen: Observatory
) -> None:
    lock = Lock()
    seen.tracers.add_span_processor(lock)
    checkout = hand.checkout()
    with lock.lock:
        hand.meter.returned(checkout, 0.1)
    assert not seen.named("connection in use")

    await asyncio.sleep(0)  # a turn of the loop, not a time

    assert attributes_of(seen.one("connection in use"))["stanch.held"] == 0.1
    assert seen.points("db.client.connection.use_time")[0].sum == pytest.approx(0.1)


async def test_a_return_on_a_thread_without_a_loop_is_told_at_the_next_look(
    hand: Hand, seen: Observatory
) -> None:
    await asyncio.to_thread(hand.meter.returned, hand.checkout(), 0.1)
    await asyncio.sleep(0)
    assert not seen.named("connection in use")

    assert seen.points("db.client.connection.use_time")[0].count == 1
    assert len(seen.named("connection in use")) == 1


async def test_taking_it_off_ends_what_is_open_and_tells_nothing_more(
    hand: Hand, unbuilt: Unbuilt, seen: Observatory
) -> None:
    account = hand.unit()
    checkout = hand.checkout(account)
    uninstrument(unbuilt)  # type: ignore[arg-type]  # all that it is asked for
    uninstrument(unbuilt)  # type: ignore[arg-type]  # likewise

    assert not unbuilt.meters
    assert {span.name for span in seen.spans} == {"unit GET /orders", "connection in use"}
    assert not seen.points("db.client.connection.count")
    hand.meter.returned(checkout, 0.1)
    hand.meter.closed(account)
    assert len(seen.spans) == 2


async def test_nothing_is_kept_of_a_unit_that_nobody_closes(hand: Hand) -> None:
    tables: list[Any] = [getattr(hand.meter, name) for name in ("_units", "_checkouts")]
    account = hand.unit()
    checkout = hand.checkout(account)
    assert [len(table) for table in tables] == [1, 1]

    del account, checkout
    gc.collect()

    assert [len(table) for table in tables] == [0, 0]


async def test_a_statement_lasts_as_long_in_its_span_as_in_the_histogram_that_points_to_it(
    hand: Hand, seen: Observatory
) -> None:
    account = hand.unit()
    hand.run("SELECT 1 FROM orders", hand.checkout(account), seconds=0.25)
    hand.meter.closed(account)
    span = seen.one("SELECT orders")
    (point,) = seen.points("db.client.operation.duration")

    assert span.end_time is not None
    assert span.start_time is not None
    assert (span.end_time - span.start_time) / 1e9 == point.sum == 0.25
    assert [seen.by_id()[exemplar.span_id] for exemplar in point.exemplars] == [span]
    assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


async def test_generated_statements_do_not_multiply_the_metrics(hand: Hand, seen: Observatory) -> None:
    for number in range(700):
        hand.run(f"SELECT * FROM report_{number}", None)

    points = seen.points("db.client.operation.duration")
    assert len(points) == 501
    assert sum(point.count for point in points) == 700


async def test_server_is_named_without_its_password(hand: Hand, seen: Observatory) -> None:
    account = hand.unit()
    hand.run("SELECT 'hunter2' FROM orders WHERE id = 17 AND x = $1", hand.checkout(account))
    hand.meter.closed(account)
    span = seen.one("SELECT orders")

    assert span.kind is SpanKind.CLIENT
    assert dict(attributes_of(span)) == {
        db_attributes.DB_SYSTEM_NAME: "postgresql",
        db_attributes.DB_NAMESPACE: "shop",
        db_attributes.DB_OPERATION_NAME: "SELECT",
        db_attributes.DB_QUERY_SUMMARY: "SELECT orders",
        db_attributes.DB_QUERY_TEXT: "SELECT ? FROM orders WHERE id = ? AND x = ?",
        server_attributes.SERVER_ADDRESS: "db.example",
        server_attributes.SERVER_PORT: 6432,
    }
    assert SECRET not in seen.told()


async def test_the_usual_port_is_not_told_and_a_file_has_no_address(seen: Observatory) -> None:
    for url in ("postgresql+asyncpg://app@db.example:5432/shop", f"sqlite+aiosqlite:///{SECRET}.db"):
        unbuilt: Any = Unbuilt(url)
        seen.watch(unbuilt)
        Hand(unbuilt.meters[0]).run("SELECT 1", None)
        uninstrument(unbuilt)

    of_server, of_file = (point.attributes for point in seen.points("db.client.operation.duration"))
    assert {"db.namespace", "server.address"} == set(of_server) - set(of_file)
    assert of_file["db.system.name"] == "sqlite"


# Sampling ---------------------------------------------------------------------------------------------------


class Asked(ParentBased):
    """Counts how often the sampler is asked."""

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self.times = 0

    def should_sample(self, *arguments: Any, **keywords: Any) -> Any:
        self.times += 1
        return super().should_sample(*arguments, **keywords)


async def test_in_a_trace_that_is_not_sampled_the_sdk_is_not_even_asked(unbuilt: Unbuilt) -> None:
    sampler = Asked(ALWAYS_OFF)
    seen = Observatory(sampler=sampler)
    seen.watch(unbuilt)  # type: ignore[arg-type]  # all that it is asked for
    hand = Hand(unbuilt.meters[0])

    def request() -> None:
        account = hand.unit()
        checkout = hand.checkout(account, waited=0.1)
        hand.run("SELECT 1 FROM orders", checkout)
        hand.meter.returned(checkout, 0.1)
        hand.meter.ended(account, "committed")
        hand.meter.closed(account)

    with seen.tracer.start_as_current_span("GET"):
        request()
    assert sampler.times == 1

    request()  # one question for the unit decides for all that is in it
    assert sampler.times == 2
    assert not seen.spans
    assert seen.points("db.client.operation.duration")[0].count == 2
    uninstrument(unbuilt)  # type: ignore[arg-type]  # likewise
    seen.close()


# On a real database -----------------------------------------------------------------------------------------


async def test_spans_of_a_transaction(db: Database[Any], seen: Observatory) -> None:
    with seen.tracer.start_as_current_span("job"):
        async with db.transaction() as session:
            session.add(Order(id=1, item=SECRET))
            await session.flush()
            await session.scalar(text(f"SELECT id FROM orders WHERE item = '{SECRET}'"))

    unit = next(span for span in seen.spans if span.name.startswith("unit "))
    assert {span.name: seen.beneath(span.name) for span in seen.spans if span.name != "select"} == {
        "job": None,
        unit.name: "job",
        "connection in use": unit.name,
        "transaction": unit.name,
        "INSERT orders": "connection in use",
        "SELECT orders": "connection in use",
    }
    assert attributes_of(unit)["code.function.name"].endswith("test_spans_of_a_transaction")
    assert attributes_of(unit)["stanch.statements"] == 2
    assert attributes_of(seen.one("transaction"))["stanch.outcome"] == "committed"
    used = attributes_of(seen.one("connection in use"))
    assert 0 < used["stanch.sql_time"] <= used["stanch.held"]
    assert all(span.status.status_code is StatusCode.UNSET for span in seen.spans)
    assert SECRET not in seen.told()


async def test_units_inside_each_other_keep_their_own(db: Database[Any], seen: Observatory) -> None:
    async with db.transaction() as outer:
        await outer.execute(text("SELECT 1 AS outer_one"))
        async with db.transaction() as inner:
            await inner.execute(text("SELECT 1 AS inner_one"))
        await outer.execute(text("SELECT 1 AS outer_two"))

    assert len({span.context.trace_id for span in seen.spans if span.context}) == 2
    by_id = seen.by_id()
    traces: dict[str, Any] = {}
    for span in seen.spans:
        shape = str(attributes_of(span).get("db.query.text", ""))
        if shape.endswith(("_one", "_two")):
            assert span.parent is not None
            assert by_id[span.parent.span_id].name == "connection in use"
            traces[shape.rpartition(" ")[2]] = span.parent.trace_id
    assert traces["outer_one"] == traces["outer_two"] != traces["inner_one"]


async def test_an_error_is_told_by_its_sqlstate_and_without_its_text(
    db: Database[Any], seen: Observatory
) -> None:
    with pytest.raises(IntegrityError):
        async with db.transaction() as session:
            session.add(Order(id=1, item=SECRET, user_id=424242424))
            await session.flush()

    span = seen.one("INSERT orders")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes_of(span)["error.type"] == attributes_of(span)["db.response.status_code"] == "23503"
    assert not span.events
    assert span.status.description is None
    assert attributes_of(seen.one("transaction"))["stanch.outcome"] == "rolled back"
    failed = [
        point for point in seen.points("db.client.operation.duration") if "error.type" in point.attributes
    ]
    assert [(point.count, point.attributes["error.type"]) for point in failed] == [(1, "23503")]
    assert SECRET not in seen.told()
    assert "424242424" not in seen.told()


async def test_a_cancelled_statement_ends_its_spans(
    db: Database[Any], seen: Observatory, fresh_database: FreshDatabase
) -> None:
    async def sleep() -> None:
        async with db.transaction() as session:
            await session.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(sleep())
    await until(
        fresh_database,
        "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
    )
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)

    (statement,) = [
        span for span in seen.spans if "pg_sleep" in str(attributes_of(span).get("db.query.text"))
    ]
    assert statement.status.status_code is StatusCode.ERROR
    assert "error.type" in attributes_of(statement)
    assert len(seen.named("connection in use")) == 1
    assert len([span for span in seen.spans if span.name.startswith("unit ")]) == 1
    everyone = seen.by_id()
    assert all(span.parent is None or span.parent.span_id in everyone for span in seen.spans)


async def test_who_waits_in_vain_and_who_waits_well(db: Database[Any], seen: Observatory) -> None:
    async with db.transaction() as one, db.transaction() as two:
        await one.execute(text("SELECT 1"))
        await two.execute(text("SELECT 1"))
        with pytest.raises(PoolExhausted):
            async with db.transaction() as three:
                await three.execute(text("SELECT 1"))

    (wait,) = [span for span in seen.named("wait for a connection") if not span.status.is_ok]
    assert attributes_of(wait)["error.type"] == "timeout"
    assert wait.end_time is not None
    assert wait.start_time is not None
    assert wait.end_time - wait.start_time >= 0.2e9
    assert [point.value for point in seen.points("db.client.connection.timeouts")] == [1]
    assert seen.points("db.client.connection.wait_time")[0].count == 2


async def test_gauges_are_the_pools_own_counts(
    fresh_database: FreshDatabase, driver: str, seen: Observatory
) -> None:
    def value(name: str, **attributes: str) -> int:
        (point,) = [
            point
            for point in seen.points(f"db.client.connection.{name}")
            if attributes.items()
            <= {key.rpartition(".")[2]: of for key, of in point.attributes.items()}.items()
        ]
        return int(point.value if hasattr(point, "value") else point.count)

    def counts() -> tuple[int, ...]:
        idle, used = value("count", state="idle"), value("count", state="used")
        return (idle, used, value("pending_requests"), value("max"))

    db = Database(fresh_database.url(driver), pool_size=1, max_overflow=1)
    seen.watch(db)
    async with db, db.connect() as one:
        await one.execute(text("SELECT 1"))
        assert counts() == (0, 1, 0, 2)
        async with db.connect() as two:
            assert counts() == (0, 2, 0, 2)
            async with asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(db.engine.connect().start())
                while not db.stats().waiting:  # noqa: ASYNC110  # its task has not come that far
                    await asyncio.sleep(0)
                assert counts() == (0, 2, 1, 2)
                await two.close()
            await (await waiting).close()
        assert counts() == (1, 1, 0, 2)
        await asyncio.sleep(0)
        assert value("create_time") == 2
        assert value("use_time") == value("wait_time") - 1
    uninstrument(db)


async def test_an_exporter_does_not_build_the_engine(seen: Observatory) -> None:
    db = Database("postgresql+asyncpg://app@localhost/shop")
    seen.watch(db)

    assert not seen.points("db.client.connection.count")
    assert "_equipped" not in vars(db)
    uninstrument(db)


async def test_readers_have_no_transaction(db: Database[Any], seen: Observatory) -> None:
    async with db.reader() as session:
        await session.execute(text("SELECT 1 FROM orders"))
        await session.execute(text("SELECT 2 FROM users"))

    assert seen.beneath("SELECT orders") == seen.beneath("SELECT users") == "connection in use"
    assert len(seen.named("connection in use")) == 2
    assert not seen.named("transaction")


async def test_log_records_of_events_carry_the_trace(
    db: Database[Any], seen: Observatory, caplog: pytest.LogCaptureFixture
) -> None:
    def ids(span: Span | ReadableSpan) -> tuple[str, str]:
        context = span.get_span_context()
        assert context is not None
        return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)

    async def drop_work() -> None:
        async with db.session() as session:
            session.add(Order(id=1, item="lamp"))
            await session.flush()

    with caplog.at_level(logging.INFO, "stanch"):
        with seen.tracer.start_as_current_span("job") as job:
            await drop_work()
        await drop_work()

    first, second = (vars(record) for record in caplog.records if "uncommitted" in record.message)
    assert (first["trace_id"], first["span_id"]) == ids(job)
    alone = [span for span in seen.spans if span.name.startswith("unit ") and span.parent is None]
    assert (second["trace_id"], second["span_id"]) == ids(alone[0])


async def test_a_slow_statement_in_the_log_leads_to_its_trace(
    fresh_database: FreshDatabase, seen: Observatory, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(fresh_database.url(), slow_statement=0.01) as db:
        seen.watch(db)
        with seen.tracer.start_as_current_span("job") as job:
            async with db.reader() as session:
                await session.execute(text(f"SELECT pg_sleep(0.05), '{SECRET}'"))
        uninstrument(db)

    (record,) = [each for each in caplog.records if "pg_sleep" in vars(each).get("shape", "")]
    assert vars(record)["trace_id"] == trace.format_trace_id(job.get_span_context().trace_id)
    assert SECRET not in str(vars(record))


async def test_when_nothing_is_instrumented_no_record_is_looked_up(seen: Observatory) -> None:
    before = list(context_providers)
    db = Database("postgresql+asyncpg://app@localhost/shop")
    seen.watch(db)
    assert len(context_providers) == len(before) + 1

    uninstrument(db)
    assert context_providers == before


# Over HTTP --------------------------------------------------------------------------------------------------


def traced(app: Any, tracer: trace.Tracer) -> Any:
    """*app*, each request in a span, as the instrumentation of any ASGI server does it."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with tracer.start_as_current_span(f"{scope['method']} {scope['path']}", kind=SpanKind.SERVER):
            await app(scope, receive, send)

    return call


def shop(db: Database[Any], **options: Any) -> FastAPI:
    app = FastAPI(**options)
    install(app, db, lifespan=False)

    @app.post("/orders/{number}", status_code=201)
    async def place_order(number: int, session: SessionDep) -> None:
        session.add(Order(id=number, item="lamp"))
        await session.flush()
        await asyncio.sleep(0)
        await session.execute(text(f"SELECT {number} AS probe FROM orders"))

    @app.get("/orders")
    async def list_orders(session: ReaderDep) -> StreamingResponse:
        async def lines() -> AsyncGenerator[str]:
            for row in await session.execute(text("SELECT id FROM orders")):
                yield f"{row.id}\n"

        return StreamingResponse(lines())

    return app


async def test_fifty_requests_at_once_have_each_their_own_tree(
    db: Database[Any], seen: Observatory, fresh_database: FreshDatabase
) -> None:
    async with Database(db.engine.url, pool_size=8, pool_timeout=20, name="wide") as wide:
        seen.watch(wide)
        app = traced(shop(wide, **({"telemetry": {"tracing": False}} if HAS_TELEMETRY else {})), seen.tracer)
        async with serve(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            replies = await asyncio.gather(*(client.post(f"/orders/{number}") for number in range(50)))
        uninstrument(wide)
    assert [reply.status_code for reply in replies] == [201] * 50

    by_id = seen.by_id()
    trees: dict[int, Counter[tuple[str, str]]] = {}
    for span in seen.spans:
        above = "" if span.parent is None else by_id[span.parent.span_id].name
        if span.context is not None and not span.name.startswith(("select", "show", "wait")):
            trees.setdefault(span.context.trace_id, Counter())[span.name, above] += 1
    assert len(trees) == 50
    for tree in trees.values():
        (root,) = [name for name, above in tree if not above]
        assert root.startswith("POST /orders/")
        assert tree == {
            (root, ""): 1,
            ("unit POST /orders/{number}", root): 1,
            ("connection in use", "unit POST /orders/{number}"): 1,
            ("transaction", "unit POST /orders/{number}"): 1,
            ("INSERT orders", "connection in use"): 1,
            ("SELECT orders", "connection in use"): 1,
        }
    durations = {
        point.attributes.get("db.query.summary"): point.count
        for point in seen.points("db.client.operation.duration")
    }
    assert durations["INSERT orders"] == durations["SELECT orders"] == 50


HAS_TELEMETRY = "telemetry" in FastAPI.__init__.__annotations__


async def test_a_stream_is_told_in_the_trace_of_its_request(db: Database[Any], seen: Observatory) -> None:
    async with db.transaction() as session:
        session.add(Order(id=1, item="lamp"))
    app = traced(shop(db, **({"telemetry": {"tracing": False}} if HAS_TELEMETRY else {})), seen.tracer)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/orders")).text == "1\n"

    request = seen.one("GET /orders")
    assert request.context is not None
    trace_of_it = [
        span for span in seen.spans if span.context and span.context.trace_id == request.context.trace_id
    ]
    assert {"SELECT orders", "connection in use", "unit GET /orders"} <= {span.name for span in trace_of_it}


@needs_new_fastapi("telemetry of its own")
async def test_a_unit_belongs_to_the_request_and_not_to_the_solving_of_its_dependencies(
    db: Database[Any], seen: Observatory
) -> None:
    app = shop(db, telemetry={"tracer_provider": seen.tracers, "metrics": False, "logs": False})
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/orders/1")).status_code == 201

    assert seen.one("fastapi.dependencies").name  # the name that is looked for
    assert seen.beneath("unit POST /orders/{number}") == "POST /orders/{number}"
    assert seen.beneath("connection in use") == "fastapi.endpoint"
    assert seen.beneath("SELECT orders") == "connection in use"


# Instrumenting ----------------------------------------------------------------------------------------------


async def test_instrumenting_twice_changes_nothing_and_other_providers_are_refused(seen: Observatory) -> None:
    db = Database("postgresql+asyncpg://app@localhost/shop")
    seen.watch(db)
    seen.watch(db)
    instrument(db)
    with pytest.raises(ConfigError, match="other providers"):
        instrument(db, meter_provider=MeterProvider())
    assert len(db._instruments._meters) == 1

    uninstrument(db)
    assert db._instruments.meter is NOBODY
    instrument(db)
    uninstrument(db)


async def test_several_databases_are_told_apart_on_one_provider(
    fresh_database: FreshDatabase, seen: Observatory
) -> None:
    async with (
        Database(fresh_database.url(), name="orders") as orders,
        Database(fresh_database.url(), name="stock") as stock,
    ):
        for db in (orders, stock):
            seen.watch(db)
            async with db.connect() as connection:
                await connection.execute(text("SELECT 1"))
        pools = {
            point.attributes["db.client.connection.pool.name"]
            for point in seen.points("db.client.connection.max")
        }
        assert pools == {"orders", "stock"}
        uninstrument(orders)
        assert len(seen.points("db.client.connection.max")) == 1
        uninstrument(stock)


async def test_what_is_not_instrumented_meets_no_meter(fresh_database: FreshDatabase) -> None:
    async with Database(fresh_database.url()) as db:
        async with db.transaction() as session:
            await session.execute(text("SELECT 1"))
        assert db._instruments.meter is NOBODY


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )


def test_without_the_package_the_error_names_the_extra() -> None:
    done = python("import sys; sys.modules['opentelemetry'] = None; import stanch.opentelemetry")
    assert "ImportError: stanch.opentelemetry needs" in done.stderr
    assert "pip install 'stanch[opentelemetry]'" in done.stderr


def test_stanch_alone_does_not_load_it() -> None:
    done = python(
        "import sys, stanch, stanch.database; print([name for name in sys.modules if 'telemetry' in name])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_global_providers_may_be_set_later() -> None:
    code = """
import asyncio
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from stanch import Database
from stanch.opentelemetry import instrument

one, two = (Database("sqlite+aiosqlite:///:memory:", name=name) for name in ("one", "two"))
instrument(one)
reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
metrics.set_meter_provider(MeterProvider([reader]))
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
instrument(two, meter_provider=metrics.get_meter_provider())

async def main():
    for db in one, two:
        async with db, db.transaction() as session:
            await session.execute(text("SELECT 1 FROM sqlite_master"))

asyncio.run(main())
print(sorted({span.name for span in exporter.get_finished_spans() if span.name.startswith("SELECT s")}))
for each in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
    if each.name == "db.client.connection.max":
        print(sorted(point.attributes["db.client.connection.pool.name"] for point in each.data.data_points))
"""
    done = python(code)
    assert done.stdout == "['SELECT sqlite_master']\n['one', 'two']\n", done.stderr


# Contract ---------------------------------------------------------------------------------------------------


async def test_names_and_units_are_those_of_the_semantic_conventions(hand: Hand, seen: Observatory) -> None:
    conventional = Observatory()
    meter = conventional.meters.get_meter("conventional")
    wanted: dict[str, str] = {}
    for name, create in vars(db_metrics).items():
        if name.startswith(("create_db_client_connection_", "create_db_client_operation_duration")):
            instrument_ = create(meter)
            wanted[instrument_.name] = instrument_.unit
    conventional.close()

    account = hand.unit()
    hand.meter.opened(0.01)
    checkout = hand.checkout(account)
    hand.run("SELECT 1", checkout)
    hand.meter.returned(checkout, 0.1)
    hand.meter.waited(1.0, "timeout", None)
    told = {name: metric.unit for name, metric in seen.metrics().items()}

    minimum = "db.client.connection.idle."
    assert told == {name: unit for name, unit in wanted.items() if not name.startswith(minimum)}
    hand.meter.closed(account)


async def test_attributes_are_those_of_the_semantic_conventions(hand: Hand, seen: Observatory) -> None:
    account = hand.unit()
    checkout = hand.checkout(account)
    hand.run("SELECT 1 FROM orders", checkout, ValueError(SECRET))
    hand.meter.returned(checkout, 0.1)
    hand.meter.closed(account)
    known = {
        value
        for module in (db_attributes, error_attributes, server_attributes)
        for name, value in vars(module).items()
        if name.isupper()
    } | {"code.file.path", "code.line.number", "code.function.name"}

    told = {key for span in seen.spans for key in attributes_of(span)}
    told |= {
        key
        for metric in seen.metrics().values()
        for point in metric.data.data_points
        for key in point.attributes
    }

    assert {key for key in told if not key.startswith("stanch.")} <= known
    assert attributes_of(seen.one("SELECT orders"))[error_attributes.ERROR_TYPE] == "ValueError"
    assert SECRET not in seen.told()
    assert SCHEMA_URL in {schema.value for schema in Schemas}
