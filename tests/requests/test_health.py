"""``install(health=)``: what probes are told while all is well and while it is not, and how little asking takes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from stanch import Database
from stanch.embedded import EmbeddedPostgres
from stanch.errors import ConfigError
from stanch.fastapi import install
from stanch.health import HealthApp
from tests.support import cleaned
from tests.support.judge import FreshDatabase, assert_nothing_left
from tests.support.proxy import FaultProxy
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio

fresh_database, module_database = cleaned.fresh_database, cleaned.module_database

BUDGET = 0.3
"""Seconds that a probe has where it is to use them up; it may do so anywhere, on a machine with much else to do."""
AMPLE = 20.0
"""Seconds that a probe has where it is not."""
SLACK = 2.0
"""Seconds that such a machine may add to an answer that should come within a budget; what ignores it takes 30."""


@pytest.fixture(scope="module")
def fragile() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be stopped and frozen."""
    with EmbeddedPostgres() as server:
        yield server


def database(url: str, **settings: Any) -> Database[Any]:
    chosen: dict[str, Any] = {
        "pool_size": 2,
        "max_overflow": 0,
        "pool_timeout": 5.0,
        "connect_timeout": 10.0,
        "close_timeout": 1.0,
    }
    return Database(url, **{**chosen, **settings})


@asynccontextmanager
async def served(*databases: Database[Any], **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """An app with nothing but its health, on a real server."""
    app = FastAPI()
    chosen: dict[str, Any] = {"health": "/health", "health_timeout": BUDGET, **options}
    install(app, *databases, **chosen)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


@asynccontextmanager
async def holding(db: Database[Any], number: int) -> AsyncGenerator[AsyncExitStack]:
    """*number* connections of *db* are out in the block, or until the stack is closed."""
    async with AsyncExitStack() as stack:
        for _ in range(number):
            await stack.enter_async_context(db.connect())
        yield stack


async def until_ready(client: httpx.AsyncClient, path: str = "/health/ready") -> None:
    """Ask until it is: a probe may miss its budget by the machine's fault."""
    async with asyncio.timeout(20):
        while (await client.get(path)).status_code != 200:  # noqa: ASYNC110  # nobody but the probe can tell
            await asyncio.sleep(0.05)


async def undisturbed(ask: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
    """The reply to a probe during which the loop did not stand still: nothing is handed on by a loop that does."""
    for _ in range(20):
        worst = 0.0

        async def watch() -> None:
            nonlocal worst
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                worst = max(worst, time.monotonic() - before)

        watching = asyncio.create_task(watch())
        reply = await ask()
        watching.cancel()
        await asyncio.wait([watching])
        if worst < BUDGET / 3:
            return reply
    raise AssertionError("the loop never ran for the length of a probe")


def only(reply: httpx.Response) -> dict[str, Any]:
    """What a reply says of its only database."""
    (finding,) = reply.json()["databases"]
    found: dict[str, Any] = finding
    return found


# All is well ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/health/", "/health/ready", "/health/startup"])
async def test_an_app_whose_database_answers_is_ready(
    fresh_database: FreshDatabase, driver: str, path: str
) -> None:
    db = database(fresh_database.url(driver))
    async with served(db, health_timeout=AMPLE) as client:
        began = time.monotonic()
        reply = await client.get(path)
        took = time.monotonic() - began
        assert (reply.status_code, reply.json()["status"]) == (200, "pass")
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["cache-control"] == "no-store"
        found = only(reply)
        assert 0 < found.pop("waited") <= took
        assert found == {
            "database": "main",
            "status": "pass",
            "in_use": 0,
            "idle": 1,
            "bound": 2,
            "waiting": 0,
        }
        await assert_nothing_left(fresh_database, db)


async def test_liveness_asks_no_database(fresh_database: FreshDatabase) -> None:
    app, db = FastAPI(), database(fresh_database.url())
    install(app, db, health="/health", lifespan=False)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        reply = await client.get("/health/live")
        assert (reply.status_code, reply.json()) == (200, {"status": "pass"})
        assert reply.headers["cache-control"] == "no-store"
    assert repr(db) == "<Database 'main', not opened yet>"
    assert await fresh_database.activity() == []


async def test_start_up_is_over_once_the_database_has_answered_and_stays_so(
    fragile: EmbeddedPostgres,
) -> None:
    """Also without a lifespan, where nobody has opened it: a probe that waits for the first request waits for ever."""
    app, db = FastAPI(), database(fragile.url())
    install(app, db, health="/health", health_timeout=BUDGET, lifespan=False)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        await asyncio.to_thread(fragile.crash)
        try:
            before = await client.get("/health/startup")
        finally:
            await asyncio.to_thread(fragile.start)
        assert (before.status_code, only(before)["reason"]) == (503, "unavailable")
        # Nobody asks a server that is away more than once a second, so that it is not met by a crowd.
        await until_ready(client, "/health/startup")
        await asyncio.to_thread(fragile.crash)
        try:
            assert (await client.get("/health/startup")).json() == {"status": "pass"}
            assert (await client.get("/health/ready")).status_code == 503
        finally:
            await asyncio.to_thread(fragile.start)
    await db.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_only_get_and_head(fresh_database: FreshDatabase, method: str) -> None:
    async with served(database(fresh_database.url()), health_timeout=AMPLE) as client:
        reply = await client.request(method, "/health/ready")
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD")
        head = await client.head("/health/ready")
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("path", ["/health/alive", "/health/live/", "/health/ready/main", "/healthy"])
async def test_a_path_that_is_none_of_these_is_not_found(fresh_database: FreshDatabase, path: str) -> None:
    async with served(database(fresh_database.url())) as client:
        assert (await client.get(path)).status_code == 404


async def test_no_route_of_the_app_hides_the_probes_and_no_documentation_names_them() -> None:
    app, db = FastAPI(), Database("sqlite+aiosqlite:///:memory:")

    @app.get("/{anything:path}")
    async def everything(anything: str) -> str:
        return anything

    install(app, db, health="/health", health_timeout=AMPLE)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        assert (await client.get("/health/live")).json() == {"status": "pass"}
        assert (await client.get("/health/ready")).json()["status"] == "pass"
        assert (await client.get("/other")).json() == "other"
        assert not [path for path in app.openapi()["paths"] if path.startswith("/health")]
    await db.close()


# The server -------------------------------------------------------------------------------------------------


async def test_a_stopped_server_makes_it_not_ready_and_a_started_one_ready_again(
    fragile: EmbeddedPostgres, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = database(fragile.url(driver))
    async with served(db, health_timeout=AMPLE) as client:
        await asyncio.to_thread(fragile.crash)
        try:
            replies = [await client.get("/health/ready") for _ in range(2)]
            alive = await client.get("/health/live")
        finally:
            await asyncio.to_thread(fragile.start)
        assert [(reply.status_code, reply.headers["retry-after"]) for reply in replies] == [(503, "1")] * 2
        assert only(replies[-1])["reason"] == "unavailable"
        assert alive.status_code == 200
        await until_ready(client)
    told = [record.message for record in caplog.records if record.message.startswith("health: ")]
    assert len(told) == 2, told
    assert told[0].startswith(
        "health: database 'main' is not ready: unavailable: no connection to the database"
    )
    assert told[1] == "health: database 'main' is ready again"


async def test_a_frozen_server_makes_it_not_ready_within_the_budget(
    fragile: EmbeddedPostgres, driver: str
) -> None:
    """SIGSTOP: sockets stay open and nobody answers."""
    db = database(fragile.url(driver))
    async with served(db) as client:
        await until_ready(client)
        fragile.freeze()
        try:
            began = time.monotonic()
            reply = await client.get("/health/ready")
            took = time.monotonic() - began
            alive = await client.get("/health/live")
        finally:
            fragile.thaw()
        assert reply.status_code == 503
        assert only(reply)["reason"] in {"deadline", "unavailable"}
        assert only(reply)["waited"] >= BUDGET - 0.01
        assert took < BUDGET + SLACK
        assert alive.status_code == 200
        await until_ready(client)


async def test_a_server_that_turns_us_away_is_told_by_its_sqlstate_and_nothing_more(
    fresh_database: FreshDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    app, db = FastAPI(), database(fresh_database.url() + "_missing_hunter2")
    install(app, db, health="/health", health_timeout=AMPLE, lifespan=False)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        reply = await client.get("/health/ready")
        assert (reply.status_code, only(reply)["sqlstate"]) == (503, "3D000")
        assert "hunter2" not in reply.text + caplog.text
    await db.close()


# The pool ---------------------------------------------------------------------------------------------------


async def test_a_starved_pool_is_not_ready_and_the_log_says_who_holds(
    fresh_database: FreshDatabase, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By leaks, or by holders who wait for something else: nobody is given a connection, however long he waits."""
    db = database(fresh_database.url(driver))
    async with served(db) as client:
        async with holding(db, 2):
            reply = await client.get("/health/ready")
        found = only(reply)
        assert reply.status_code == 503
        assert found.pop("waited") >= BUDGET - 0.01
        assert found == {
            "database": "main", "status": "fail", "reason": "pool-exhausted",
            "in_use": 2, "idle": 0, "bound": 2, "waiting": 0,
        }  # fmt: skip
        assert "test_health.py" not in reply.text
        await until_ready(client)
    (told,) = [record.message for record in caplog.records if "is not ready" in record.message]
    assert "pool-exhausted: no connection came free within" in told
    assert "health_timeout" in told
    assert "held" in told


async def test_a_pool_that_is_full_and_hands_connections_on_is_ready_with_a_warning(
    fresh_database: FreshDatabase, driver: str
) -> None:
    """Taking a pod away for its load makes the load of the others worse."""
    db = database(fresh_database.url(driver))
    over = asyncio.Event()

    async def visit() -> None:
        while not over.is_set():
            async with db.connect():
                await asyncio.sleep(BUDGET / 3)

    async with served(db) as client, asyncio.TaskGroup() as visitors:
        # The queue is longer than a probe has time for, and moves.
        for _ in range(2 * 3 * 3):
            visitors.create_task(visit())
        async with asyncio.timeout(20):
            while db.stats().waiting < 10:  # noqa: ASYNC110  # of tasks that have just begun
                await asyncio.sleep(0)
        replies = [await undisturbed(partial(client.get, "/health/ready")) for _ in range(3)]
        over.set()
    assert [reply.status_code for reply in replies] == [200] * 3
    assert {only(reply)["status"] for reply in replies} == {"warn"}
    assert {only(reply)["reason"] for reply in replies} == {"pool-busy"}
    await assert_nothing_left(fresh_database)


async def test_probes_at_once_share_one_connection(fresh_database: FreshDatabase, driver: str) -> None:
    async with FaultProxy(fresh_database.server.port) as proxy:
        db = database(proxy.through(fresh_database.url(driver)) + "?sslmode=disable", pool_size=10)
        async with served(db, health_timeout=AMPLE) as client:
            proxy.delay(0.2)
            probes = [asyncio.create_task(client.get("/health/ready")) for _ in range(20)]
            most = 0
            while not all(probe.done() for probe in probes):
                stats = db.stats()
                most = max(most, stats.in_use + stats.waiting)
                await asyncio.sleep(0.005)
            assert {(await probe).status_code for probe in probes} == {200}
            assert most == 1
            proxy.pass_through()


async def test_a_probe_whose_asker_hangs_up_still_answers_the_others(fresh_database: FreshDatabase) -> None:
    """And whoever asks first lends the others nothing of his: not his deadline, not his cancellation."""
    db = database(fresh_database.url())
    health = HealthApp([db], timeout=AMPLE)
    async with db, holding(db, 2) as held:
        first, second = (asyncio.create_task(_ask(health)) for _ in range(2))
        async with asyncio.timeout(20):
            while db.stats().waiting != 1:  # noqa: ASYNC110  # of a task that has just begun
                await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        await held.aclose()
        assert (await second)["status"] == "pass"
        await assert_nothing_left(fresh_database, db)


async def test_a_probe_does_not_keep_to_the_request_timeout_of_who_asks(
    fresh_database: FreshDatabase,
) -> None:
    db, past_that_of_the_request = database(fresh_database.url()), 0.4
    async with served(db, health_timeout=5.0, request_timeout=0.2) as client, holding(db, 2) as held:
        probe = asyncio.create_task(client.get("/health/ready"))
        await asyncio.sleep(past_that_of_the_request)
        assert not probe.done()
        await held.aclose()
        assert (await probe).status_code == 200


async def test_a_request_gets_its_turn_between_two_probes(fresh_database: FreshDatabase) -> None:
    """A pool of one, and probes without a pause: each holds the connection for one statement only."""
    db = database(fresh_database.url(), pool_size=1)
    over = asyncio.Event()

    async def probe(client: httpx.AsyncClient) -> None:
        while not over.is_set():
            assert (await client.get("/health/ready")).status_code == 200

    async with served(db, health_timeout=AMPLE) as client, asyncio.TaskGroup() as probes:
        for _ in range(5):
            probes.create_task(probe(client))
        for _ in range(20):
            async with asyncio.timeout(20), db.connect() as connection:
                await connection.execute(text("SELECT 1"))
        over.set()
    await assert_nothing_left(fresh_database)


async def test_readers_with_connections_of_their_own_are_asked_as_well(fresh_database: FreshDatabase) -> None:
    db = database(fresh_database.url(), reader_pool_size=1)
    async with served(db) as client:
        await until_ready(client)
        async with db.reader_engine.connect():
            assert only(await client.get("/health/ready"))["reason"] == "pool-exhausted"
        async with holding(db, 2), asyncio.timeout(20):
            # on a busy machine the readers alone, who are asked first, may use up the budget
            while (reply := await client.get("/health/ready")).status_code == 503:
                if only(reply)["reason"] == "pool-exhausted":
                    break
                assert only(reply)["reason"] == "deadline"
            assert reply.status_code == 503
        await until_ready(client)


async def test_readers_who_starve_are_not_helped_by_writers_who_do_not(fresh_database: FreshDatabase) -> None:
    """Each pool is asked by itself whether it still hands connections on."""
    db = database(fresh_database.url(), reader_pool_size=1)
    over = asyncio.Event()

    async def write() -> None:
        while not over.is_set():
            async with db.connect():
                await asyncio.sleep(0.01)

    async with served(db) as client, db.reader_engine.connect(), asyncio.TaskGroup() as writers:
        writers.create_task(write())
        reply = await client.get("/health/ready")
        over.set()
    assert (reply.status_code, only(reply)["reason"]) == (503, "pool-exhausted")


async def test_a_pool_that_is_not_ours_is_asked_within_the_budget_too(fresh_database: FreshDatabase) -> None:
    """It waits for 30 s, and knows no deadline of ours."""
    engine = create_async_engine(
        fresh_database.url(), poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0
    )
    db = Database(engine, adopt=False)
    async with served(db) as client:
        await until_ready(client)
        async with engine.connect():
            began = time.monotonic()
            reply = await client.get("/health/ready")
            assert time.monotonic() - began < BUDGET + SLACK
            assert (reply.status_code, only(reply)["reason"]) == (503, "deadline")
        await until_ready(client)


# Several databases, and their lives -------------------------------------------------------------------------


async def test_each_of_several_databases_is_told_and_the_worst_decides(
    fresh_database: FreshDatabase, fragile: EmbeddedPostgres
) -> None:
    main, billing = database(fresh_database.url()), database(fragile.url(), name="billing")
    async with served(main, billing, health_timeout=AMPLE) as client:
        await asyncio.to_thread(fragile.crash)
        try:
            reply = await client.get("/health")
        finally:
            await asyncio.to_thread(fragile.start)
    assert (reply.status_code, reply.json()["status"]) == (503, "fail")
    assert [(each["database"], each["status"]) for each in reply.json()["databases"]] == [
        ("main", "pass"),
        ("billing", "fail"),
    ]


async def test_a_database_that_a_later_install_adds_is_asked_as_well(fresh_database: FreshDatabase) -> None:
    app, main = FastAPI(), database(fresh_database.url())
    install(app, main, health="/health")
    install(app, database(fresh_database.url(), name="billing"))
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        named = [each["database"] for each in (await client.get("/health")).json()["databases"]]
    assert named == ["main", "billing"]


async def test_while_it_drains_and_afterwards_it_is_not_ready_and_lives(
    fresh_database: FreshDatabase,
) -> None:
    app, db = FastAPI(), database(fresh_database.url(), drain_timeout=5.0)
    install(app, db, health="/health", health_timeout=BUDGET, lifespan=False)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        await db.open()
        async with holding(db, 1):
            closing = asyncio.create_task(db.close())
            await asyncio.sleep(0)
            draining = await client.get("/health/ready")
            alive = await client.get("/health/live")
        await closing
        closed = await client.get("/health/ready")
        assert [(reply.status_code, only(reply)["reason"]) for reply in (draining, closed)] == [
            (503, "database-closing"),
            (503, "database-closed"),
        ]
        assert alive.status_code == 200
        await db.open()
        await until_ready(client)
        await db.close()


async def test_a_test_client_asks_from_loops_of_its_own(fresh_database: FreshDatabase) -> None:
    """The answer of a probe that another loop began is of no use in this one."""
    app, db = FastAPI(), database(fresh_database.url())
    install(app, db, health="/health", health_timeout=AMPLE)

    def ask() -> list[int]:
        with TestClient(app) as client:
            return [client.get("/health/ready").status_code for _ in range(2)]

    for _ in range(2):
        assert await asyncio.to_thread(ask) == [200, 200]


async def test_a_probe_on_another_loop_is_no_answer_here(fresh_database: FreshDatabase) -> None:
    db = database(fresh_database.url())
    health = HealthApp([db], timeout=AMPLE)
    async with db, holding(db, 2) as held:
        here = asyncio.create_task(_ask(health))
        async with asyncio.timeout(20):
            while db.stats().waiting != 1:  # noqa: ASYNC110  # of a task that has just begun
                await asyncio.sleep(0)
        elsewhere = await asyncio.to_thread(lambda: asyncio.run(_ask(health)))
        assert [each["database"] for each in elsewhere["databases"]] == ["main"]
        assert not here.done()
        await held.aclose()
        assert (await here)["status"] == "pass"


# Judged where it is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, "1", None, True, float("nan")])
def test_a_budget_that_is_no_length_of_time_is_refused_and_the_app_is_as_it_was(timeout: Any) -> None:
    app = FastAPI()
    routes = [*app.router.routes]
    with pytest.raises(ConfigError, match="health_timeout must be seconds") as refused:
        install(app, Database("sqlite+aiosqlite:///:memory:"), health="/health", health_timeout=timeout)
    assert refused.value.remedies
    assert app.router.routes == routes
    assert not app.user_middleware


@pytest.mark.parametrize("path", ["health", "/health/", "/", "", "//health", "/{probe}", "/health?", "/a b"])
def test_a_path_that_is_none_is_refused_and_the_app_is_as_it_was(path: str) -> None:
    app = FastAPI()
    with pytest.raises(ConfigError, match="health must be a path that begins with a slash"):
        install(app, Database("sqlite+aiosqlite:///:memory:"), health=path)
    assert not app.user_middleware


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"health": "/ops/health"}, {"metrics": "/ops/health"}),
        ({"health": "/ops"}, {"dashboard": "/ops/page"}),
        ({"metrics": "/ops/metrics"}, {"dashboard": "/ops"}),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_two_instruments_at_one_place_are_refused_and_the_app_is_as_it_was(
    first: dict[str, str], second: dict[str, str], at_once: bool
) -> None:
    """One would answer for the other, and a page that lets nobody in would hide the one that is meant."""
    app, db, wishes = FastAPI(), Database("sqlite+aiosqlite:///:memory:"), cast("dict[str, Any]", first)
    if not at_once:
        install(app, db, **wishes)
        wishes = {}
    routes, lifespan = [*app.router.routes], app.router.lifespan_context
    with pytest.raises(ConfigError, match="would hide each other"):
        install(app, db, **wishes, **cast("dict[str, Any]", second))
    assert app.router.routes == routes
    assert app.router.lifespan_context is lifespan


async def _ask(health: HealthApp) -> dict[str, Any]:
    """One probe without a client in between."""
    body = b""

    async def send(message: Any) -> None:
        nonlocal body
        body += message.get("body", b"")

    async def receive() -> Any:
        raise AssertionError("a probe has no body to read")

    await health({"type": "http", "method": "GET", "path_params": {"rest": "ready"}}, receive, send)
    answer: dict[str, Any] = json.loads(body)
    return answer
