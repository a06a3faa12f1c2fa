"""``install(metrics=)``: what Prometheus is told, in its own format, and nothing that is a secret."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse_text
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route

from stanch import Database, measuring
from stanch.accounts import Account
from stanch.callers import NOWHERE
from stanch.errors import ConfigError
from stanch.events import ConnectionSevered
from stanch.fastapi import SessionDep, install
from stanch.ledger import Checkout, Stats
from stanch.measuring import BOUNDS, Holding, Measuring
from stanch.prometheus import MetricsApp, StanchCollector
from tests.requests.shop import Shop
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
parse_openmetrics: Any = import_module("prometheus_client.openmetrics.parser").text_string_to_metric_families

SECRET = "hunter2-of-a-shop"


class Measured:
    """A database as the collector sees it: its measuring, which a test feeds by hand."""

    def __init__(
        self, name: str = "main", stats: Stats | None = None, holders: Iterator[Holding] | None = None
    ) -> None:
        own = stats or Stats(pool_size=3, max_overflow=2, in_use=4, idle=1, waiting=7)
        self.name = name
        self.measuring = Measuring(name, stats=lambda: own, holders=lambda: held)
        held = tuple(holders or ())

    def measure(self) -> Measuring:
        return self.measuring


def collector(*databases: Measured) -> StanchCollector:
    return StanchCollector(*databases)  # type: ignore[arg-type]  # as far as it is used


def samples(exposition: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a text, by its name and its labels but for the pid, read by prometheus_client's own parser."""
    return {
        (
            sample.name,
            tuple(sorted((key, value) for key, value in sample.labels.items() if key != "pid")),
        ): sample.value
        for family in parse_text(exposition)
        for sample in family.samples
    }


def exposed(*databases: Measured) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    registry.register(collector(*databases))
    return samples(generate_latest(registry).decode())


def of_main(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted({"database": "main", **labels}.items()))


# What is told -----------------------------------------------------------------------------------------------


def test_what_the_books_say_is_told_under_the_names_of_opentelemetry() -> None:
    told = exposed(Measured())
    assert told[of_main("db_client_connection_count", pool="main", state="used")] == 4
    assert told[of_main("db_client_connection_count", pool="main", state="idle")] == 1
    assert told[of_main("db_client_connection_max", pool="main")] == 5
    assert told[of_main("db_client_connection_pending_requests", pool="main")] == 7
    assert told[of_main("stanch_longest_held_seconds")] == 0


def test_readers_with_connections_of_their_own_are_told_apart() -> None:
    """And nothing is counted twice: the sum over the pools is what the whole database has."""
    own = Stats(pool_size=3, max_overflow=2, in_use=4, idle=1, waiting=7)
    both = own.with_readers(Stats(pool_size=9, max_overflow=0, in_use=8, idle=1, waiting=2))
    told = exposed(Measured(stats=both))
    assert told[of_main("db_client_connection_count", pool="main", state="used")] == 4
    assert told[of_main("db_client_connection_count", pool="readers", state="used")] == 8
    assert told[of_main("db_client_connection_max", pool="main")] == 5
    assert told[of_main("db_client_connection_max", pool="readers")] == 9
    assert told[of_main("db_client_connection_pending_requests", pool="readers")] == 2


def test_every_wait_and_its_end_is_told() -> None:
    measured = Measured()
    for seconds, end in (
        (0.0, "served"),
        (0.3, "served"),
        (5.0, "timeout"),
        (0.0, "refused"),
        (1.0, "unavailable"),
        (70.0, "cancelled"),
    ):
        measured.measuring.waited(seconds, end, None)  # type: ignore[arg-type]  # they are literals
    told = exposed(measured)
    assert told[of_main("db_client_connection_timeouts_total")] == 1
    ends = {"served": 2, "timeout": 1, "refused": 1, "unavailable": 1, "cancelled": 1}
    assert {end: told[of_main("stanch_waits_total", end=end)] for end in ends} == ends
    buckets = [
        told[of_main("db_client_connection_wait_time_seconds_bucket", le=str(bound))] for bound in BOUNDS
    ]
    assert buckets == [2] * 8 + [2, 3, 4, 4, 5, 5, 5, 5]
    assert told[of_main("db_client_connection_wait_time_seconds_bucket", le="+Inf")] == 6
    assert told[of_main("db_client_connection_wait_time_seconds_count")] == 6
    assert told[of_main("db_client_connection_wait_time_seconds_sum")] == pytest.approx(76.3)


def test_uses_and_creates_are_told_in_seconds() -> None:
    measured = Measured()
    measured.measuring.opened(0.02)
    measured.measuring.returned(Checkout(None, 0.0), 0.2)
    told = exposed(measured)
    assert told[of_main("db_client_connection_create_time_seconds_sum")] == pytest.approx(0.02)
    assert told[of_main("db_client_connection_use_time_seconds_sum")] == pytest.approx(0.2)
    assert told[of_main("db_client_connection_use_time_seconds_bucket", le="0.1")] == 0
    assert told[of_main("db_client_connection_use_time_seconds_bucket", le="0.25")] == 1


def test_each_route_is_told_what_it_costs() -> None:
    measured = Measured()
    for number in range(3):
        account = Account("GET /orders/{id}")
        account.statements, account.sql_time, account.waited, account.held = 12, 0.25, 0.5, 1.0
        account.rolled_back = number == 0
        account.repeated = bool(number)
        measured.measuring.closed(account)
    told = exposed(measured)
    costs = {"units": 3, "statements": 36, "rolled_back": 1, "repeated": 2} | {
        "sql_time_seconds": 0.75, "wait_time_seconds": 1.5, "held_seconds": 3.0,
    }  # fmt: skip
    assert {
        name: told[of_main(f"stanch_route_{name}_total", route="GET /orders/{id}")] for name in costs
    } == costs


def test_ends_of_transactions_and_events_are_told_and_begin_at_zero() -> None:
    """A counter that appears with 1 has never risen, as far as ``increase()`` can see."""
    measured = Measured()
    before = exposed(measured)
    assert before[of_main("stanch_transactions_total", end="unknown")] == 0
    assert before[of_main("stanch_events_total", event="ConnectionSevered")] == 0
    measured.measuring.ended(Account("x"), "unknown")
    measured.measuring.ended(Account("x"), "rolled back")
    measured.measuring.note(ConnectionSevered(database="main", reason="it was not idle"))
    told = exposed(measured)
    assert told[of_main("stanch_transactions_total", end="unknown")] == 1
    assert told[of_main("stanch_transactions_total", end="rolled_back")] == 1
    assert told[of_main("stanch_events_total", event="ConnectionSevered")] == 1


def test_statements_are_told_all_together_and_their_text_never() -> None:
    measured = Measured()
    for error in (None, None, ValueError(SECRET)):
        measured.measuring.executed(
            f"SELECT * FROM users WHERE password = '{SECRET}'",
            0.5,
            None,
            lambda: NOWHERE,
            error,
        )
    registry = CollectorRegistry()
    registry.register(collector(measured))
    exposition = generate_latest(registry).decode()
    told = samples(exposition)
    assert told[of_main("stanch_statements_total")] == 3
    assert told[of_main("stanch_statement_errors_total")] == 1
    assert told[of_main("stanch_statement_time_seconds_total")] == pytest.approx(1.5)
    assert SECRET not in exposition
    assert "SELECT" not in exposition


def test_who_holds_longest_is_told_as_a_figure() -> None:
    def holding(held: float) -> Holding:
        return Holding("GET /report", f"{SECRET}.py:1", "?", held, 0.0, 1, "running SQL")

    told = exposed(Measured(holders=iter([holding(61.5), holding(0.25)])))
    assert told[of_main("stanch_longest_held_seconds")] == 61.5


def test_every_series_names_its_database_and_its_process() -> None:
    families = [*collector(Measured(), Measured("billing")).collect()]
    labels = [sample.labels for family in families for sample in family.samples]
    assert {label["database"] for label in labels} == {"main", "billing"}
    assert {label["pid"] for label in labels} == {str(os.getpid())}


# As a collector of a registry -------------------------------------------------------------------------------


def test_a_registry_refuses_a_second_collector_without_collecting_anything() -> None:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector(Measured()))
    with pytest.raises(ValueError, match="db_client_connection_count"):
        registry.register(collector(Measured("billing")))


def test_what_is_described_is_what_is_collected() -> None:
    its = collector(Measured())
    assert [family.name for family in its.describe()] == [family.name for family in its.collect()]
    assert all(not family.samples for family in its.describe())


def test_another_thread_may_collect_while_routes_and_statements_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """``start_http_server`` of prometheus_client answers on threads of its own: here one comes at each step."""
    measured = Measured()

    def work(number: int) -> None:
        measured.measuring.closed(Account(f"GET /{number}"))
        measured.measuring.executed(f"SELECT {'a' * number} x", 0.1, None, lambda: NOWHERE, None)

    work(1)
    numbers, totals = count(2), getattr(measuring, "_totals")  # noqa: B009  # a private name, for once

    def totals_while_work_goes_on(*arguments: Any) -> Any:
        work(next(numbers))
        return totals(*arguments)

    monkeypatch.setattr(measuring, "_totals", totals_while_work_goes_on)
    told = exposed(measured)
    assert told[of_main("stanch_route_units_total", route="GET /1")] == 1
    assert next(numbers) >= 4


# The endpoint -----------------------------------------------------------------------------------------------


def endpoint(*databases: Measured) -> httpx.AsyncClient:
    metrics = MetricsApp(databases)  # type: ignore[arg-type]  # as far as it is used
    app = Starlette(routes=[Route(path, metrics) for path in ("/metrics", "/metrics/{rest:path}")])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")


async def test_the_text_is_the_one_that_prometheus_client_reads() -> None:
    async with endpoint(Measured()) as client:
        reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert samples(reply.text)[of_main("db_client_connection_max", pool="main")] == 5


async def test_openmetrics_is_spoken_with_those_who_ask_for_it() -> None:
    async with endpoint(Measured()) as client:
        reply = await client.get("/metrics", headers={"accept": OPENMETRICS})
    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(reply.text)}
    assert families["db_client_connection_wait_time_seconds"].unit == "seconds"
    assert families["db_client_connection_wait_time_seconds"].type == "histogram"
    assert families["db_client_connection_timeouts"].type == "counter"


async def test_what_the_app_counts_itself_is_told_after_it() -> None:
    """One process has one place where it is scraped."""
    orders = Counter("shop_orders", "Orders.")
    try:
        orders.inc(3)
        async with endpoint(Measured()) as client:
            told = samples((await client.get("/metrics")).text)
            chosen = samples(
                (await client.get("/metrics?name[]=shop_orders_total&name[]=stanch_waits_total")).text
            )
        assert told[("shop_orders_total", ())] == 3
        assert {name for name, _ in chosen} == {"shop_orders_total", "stanch_waits_total"}
    finally:
        REGISTRY.unregister(orders)


async def test_who_has_registered_a_collector_as_well_is_told_everything_once() -> None:
    its = collector(Measured())
    REGISTRY.register(its)
    try:
        async with endpoint(Measured()) as client:
            exposition = (await client.get("/metrics")).text
        assert exposition.count("# TYPE db_client_connection_max gauge") == 1
        assert exposition.count("db_client_connection_max{") == 1
    finally:
        REGISTRY.unregister(its)


async def test_only_get_and_only_the_path_itself() -> None:
    async with endpoint(Measured()) as client:
        refused = await client.post("/metrics")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
        assert (await client.get("/metrics/anything")).status_code == 404


async def test_what_is_compressed_once_is_not_compressed_again() -> None:
    """Names of headers are in lower case, as ASGI has them and GZipMiddleware looks for them."""
    metrics = MetricsApp([Measured()])  # type: ignore[list-item]  # as far as it is used
    app = Starlette(routes=[Route("/metrics", metrics)], middleware=[Middleware(GZipMiddleware)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        reply = await client.get("/metrics", headers={"accept-encoding": "gzip"})
        assert reply.headers.get_list("content-encoding", split_commas=True) == ["gzip"]
        assert "db_client_connection_count" in reply.text


# Installed --------------------------------------------------------------------------------------------------


async def test_what_requests_on_a_real_database_cost_is_told(bare_shop: Shop, driver: str) -> None:
    """Scraped over a socket, in OpenMetrics; what is in use and idle agrees with the server's own word."""
    db = (
        bare_shop.db
        if driver == bare_shop.driver
        else Database(bare_shop.judge.url(driver), pool_size=5, max_overflow=0)
    )
    install(bare_shop.app, db, metrics="/metrics")

    @bare_shop.app.post("/orders/{number}", status_code=201)
    async def place(number: int, session: SessionDep) -> None:
        await session.execute(
            text(f"INSERT INTO orders (id, item) VALUES (:id, '{SECRET}'::varchar(20))"), {"id": number}
        )
        await session.execute(text("SELECT 1"))
        if number == 3:
            raise HTTPException(409, SECRET)

    async with serve(bare_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        for number, status in ((1, 201), (2, 201), (3, 409)):
            assert (await client.post(f"/orders/{number}")).status_code == status
        async with db.connect() as connection:
            await connection.execute(text("SELECT 1"))
            exposition = (await client.get("/metrics", headers={"accept": OPENMETRICS})).text
            connections = len(await bare_shop.judge.activity())
    told = {
        (
            sample.name,
            tuple(sorted((key, value) for key, value in sample.labels.items() if key != "pid")),
        ): sample.value
        for family in parse_openmetrics(exposition)
        for sample in family.samples
    }
    route = "POST /orders/{number}"
    assert {
        name: told[of_main(f"stanch_route_{name}_total", route=route)]
        for name in ("units", "statements", "rolled_back", "repeated")
    } == {"units": 3, "statements": 6, "rolled_back": 1, "repeated": 0}
    for name in ("sql_time_seconds", "held_seconds"):
        assert 0 < told[of_main(f"stanch_route_{name}_total", route=route)] < 30
    ends = {
        end: told[of_main("stanch_transactions_total", end=end)]
        for end in ("committed", "rolled_back", "unknown")
    }
    assert ends == {"committed": 2, "rolled_back": 1, "unknown": 0}
    assert told[of_main("db_client_connection_create_time_seconds_count")] == connections == 1
    assert told[of_main("db_client_connection_count", pool="main", state="used")] == 1
    assert told[of_main("db_client_connection_count", pool="main", state="idle")] == 0
    assert told[of_main("db_client_connection_max", pool="main")] == 5
    assert told[of_main("stanch_longest_held_seconds")] > 0
    assert told[of_main("db_client_connection_use_time_seconds_count")] >= 3
    assert told[of_main("stanch_waits_total", end="served")] >= 4
    assert told[of_main("stanch_statements_total")] >= 6
    for secret in (SECRET, bare_shop.judge.name, str(bare_shop.judge.server.port), "INSERT", "orders (id"):
        assert secret not in exposition


@pytest.mark.parametrize("path", ["metrics", "/metrics/", "/", ""])
async def test_a_path_that_is_none_is_refused_and_the_app_is_as_it_was(path: str) -> None:
    app = FastAPI()
    routes = [*app.router.routes]
    with pytest.raises(ConfigError, match="metrics must be a path that begins with a slash"):
        install(app, Database("postgresql+asyncpg://app@localhost/shop"), metrics=path)
    assert app.router.routes == routes
    assert not app.user_middleware


def test_without_prometheus_client_install_says_what_to_install() -> None:
    code = textwrap.dedent("""
        import sys
        sys.modules["prometheus_client"] = None
        from fastapi import FastAPI, HTTPException
        from stanch import Database, measuring
        from stanch.errors import ConfigError
        from stanch.fastapi import SessionDep, install
        app = FastAPI()
        try:
            install(app, Database("postgresql+asyncpg://app@localhost/shop"), metrics="/metrics")
        except ConfigError as error:
            print(error, len(app.user_middleware))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True
    )
    assert "metrics needs the package prometheus-client, which is not installed" in done.stdout
    assert "pip install 'stanch[prometheus]'" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(" 0")
