"""What a client is told of a database failure: a status by SQLSTATE, a closed body, and nothing it should not know."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from stanch import Database
from stanch.embedded import EmbeddedPostgres
from stanch.fastapi import ReaderDep, SessionDep, install, unit
from tests.requests.shop import IS_NEW_FASTAPI, Order, Shop, call, client_of, write_order
from tests.support.judge import OTHERS, FreshDatabase, assert_nothing_left, until
from tests.support.proxy import FaultProxy, Verdict, at_commit

pytestmark = pytest.mark.anyio

CANARY = "canary-7f3a"
"""A value of the client's, or a secret: it must be in no reply, no log and no error."""

EXCLUSIVE = "CREATE TABLE rooms (booked int4range, EXCLUDE USING gist (booked WITH &&))"


@dataclass(frozen=True)
class Case:
    """A failure that a real server makes, and its reply."""

    sqlstate: str
    status: int
    slug: str
    sql: str
    retry_after: str | None = None
    or_sqlstate: tuple[str, ...] = ()
    """What a driver may say as well: which of the two ends is seen first is a race."""

    def __str__(self) -> str:
        return self.sqlstate


def raised(sqlstate: str, status: int, slug: str, retry_after: str | None = None) -> Case:
    """For a failure that cannot be made to order: the server raises its SQLSTATE."""
    sql = f"DO $$ BEGIN RAISE EXCEPTION '{CANARY}' USING ERRCODE = '{sqlstate}'; END $$"
    return Case(sqlstate, status, slug, sql, retry_after)


CASES = [
    Case("23505", 409, "conflict", f"INSERT INTO p VALUES (1), (1) /* {CANARY} */"),
    Case("23P01", 409, "conflict", f"INSERT INTO rooms VALUES ('[1,9)'), ('[2,3)') /* {CANARY} */"),
    Case("23503", 409, "conflict", f"INSERT INTO orders VALUES (1, '{CANARY}', 404)"),
    Case("23502", 422, "invalid", f"INSERT INTO orders VALUES (1, NULL) /* {CANARY} */"),
    Case("23514", 422, "invalid", f"INSERT INTO orders VALUES (1, '') /* {CANARY} */"),
    Case("22001", 422, "invalid", f"INSERT INTO orders VALUES (1, '{CANARY} and more than twenty')"),
    Case("22003", 422, "invalid", f"INSERT INTO p VALUES (1 + 2147483647) /* {CANARY} */"),
    Case("22P02", 422, "invalid", f"SELECT CAST(CAST('{CANARY}' AS text) AS int)"),
    Case("22007", 422, "invalid", f"SELECT CAST(CAST('{CANARY}' AS text) AS date)"),
    Case("25006", 503, "read-only", "INSERT INTO p VALUES (1)", "2"),
    Case("55P03", 504, "timeout", "LOCK TABLE p NOWAIT"),
    Case("57014", 504, "timeout", f"SELECT pg_sleep(30) /* {CANARY} */"),
    Case(
        "57P01",
        503,
        "unavailable",
        f"SELECT pg_terminate_backend(pg_backend_pid()) /* {CANARY} */",
        "2",
        ("08003", "none"),
    ),
    raised("40001", 503, "contention", "1"),
    raised("40P01", 503, "contention", "1"),
    raised("53300", 503, "unavailable", "2"),
    raised("57P03", 503, "unavailable", "2"),
]


def assert_is_problem(answer: Any, status: int, slug: str, retry_after: str | None) -> None:
    """RFC 9457, and nothing but what we put there."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == {"type", "title", "status"}
    assert (body["type"], body["status"]) == (f"urn:stanch:problem:{slug}", status)
    assert answer.headers.get("retry-after") == retry_after
    for secret in (CANARY, "INSERT", "SELECT", "orders", "127.0.0.1", "localhost", "psycopg", "asyncpg"):
        assert secret not in answer.text


# By SQLSTATE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_database_failure_is_a_problem_by_its_sqlstate(
    each_shop: Shop, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    await each_shop.judge.execute(EXCLUSIVE)
    states: list[str] = []

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 77)
        if case.sqlstate == "25006":
            await session.rollback()
            await session.execute(text("SET TRANSACTION READ ONLY"))
        if case.sqlstate == "57014":
            await session.execute(text("SET LOCAL statement_timeout = 50"))
        try:
            await session.execute(text(case.sql.replace(":", r"\:")))
        except DBAPIError as error:
            states.append(getattr(error.orig, "sqlstate", None) or "none")
            raise
        return {"ok": True}

    with caplog.at_level(logging.DEBUG, logger="stanch"):
        if case.sqlstate == "55P03":
            async with each_shop.db.begin() as rival:
                await rival.execute(text("LOCK TABLE p"))
                answer = await each_shop.post("/orders")
        else:
            answer = await each_shop.post("/orders")
    assert states in [[state] for state in (case.sqlstate, *case.or_sqlstate)], "the fault did not happen"
    assert_is_problem(answer, case.status, case.slug, case.retry_after)
    assert CANARY not in caplog.text
    assert await each_shop.orders() == []


async def test_a_failure_at_commit_is_the_same_problem(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        await session.execute(text("INSERT INTO child VALUES (1, 404)"))
        return {"ok": True}

    assert_is_problem(await each_shop.post("/orders"), 409, "conflict", None)


async def test_two_serializable_units_that_cannot_both_be_are_one_success_and_one_retry(
    each_shop: Shop,
) -> None:
    """A real write skew: each reads what the other writes. One must be told so at COMMIT, or before."""
    both_have_read = asyncio.Barrier(2)

    @each_shop.app.post("/orders/{number}", status_code=201)
    @unit(isolation_level="SERIALIZABLE")
    async def place(number: int, session: SessionDep) -> dict[str, bool]:
        await session.execute(text("SELECT count(*) FROM orders"))
        await both_have_read.wait()
        await write_order(session, number)
        return {"ok": True}

    answers = await asyncio.gather(each_shop.post("/orders/1"), each_shop.post("/orders/2"))
    assert sorted(answer.status_code for answer in answers) == [201, 503]
    loser = next(answer for answer in answers if answer.status_code == 503)
    assert_is_problem(loser, 503, "contention", "1")
    assert len(await each_shop.orders()) == 1


# The pool and the network -----------------------------------------------------------------------------------


async def test_a_full_pool_is_a_503(each_shop: Shop) -> None:
    app = FastAPI()
    db = each_shop.database(pool_size=1, pool_timeout=0.1)
    install(app, db)

    @app.get("/")
    async def read(session: ReaderDep) -> dict[str, bool]:
        await session.execute(text("SELECT 1"))
        return {"ok": True}

    async with db.begin() as connection, each_shop.client(app) as client:
        await connection.execute(text("SELECT 1"))
        assert_is_problem(await client.get("/"), 503, "busy", "1")
    await db.close()


@pytest.mark.parametrize("scheme", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.psycopg)])
async def test_a_server_that_refuses_is_a_503_and_no_oserror_of_anybodys(scheme: str) -> None:
    calls: list[str] = []
    app = FastAPI()
    db = Database(f"postgresql+{scheme}://app:{CANARY}@127.0.0.1:1/shop", connect_timeout=2)
    install(app, db)

    @app.exception_handler(OSError)
    async def mine(_request: Request, error: Exception) -> Response:
        calls.append(type(error).__name__)
        return PlainTextResponse("mine", 507)

    @app.get("/")
    async def read(session: ReaderDep) -> None:
        await session.execute(text("SELECT 1"))

    async with client_of(app) as client:
        assert_is_problem(await client.get("/"), 503, "unavailable", "2")
    assert calls == []
    await db.close()


async def test_a_server_that_crashes_between_two_requests_is_a_503_and_then_a_200(driver: str) -> None:
    with EmbeddedPostgres() as server:
        app = FastAPI()
        db = Database(server.url(driver), pool_size=2, max_overflow=0, connect_timeout=2)
        install(app, db)

        @app.get("/")
        async def read(session: ReaderDep) -> dict[str, bool]:
            await session.execute(text("SELECT 1"))
            return {"ok": True}

        async with client_of(app) as client:
            assert (await client.get("/")).status_code == 200
            await asyncio.to_thread(server.crash)
            assert_is_problem(await client.get("/"), 503, "unavailable", "2")
            await asyncio.to_thread(server.start)
            assert (await client.get("/")).status_code == 200
        await db.close()


async def test_a_connection_lost_during_commit_is_told_as_unknown(each_shop: Shop) -> None:
    """The server has committed and the answer is lost: a 503 of its own type, and no invitation to repeat it."""
    async with FaultProxy(each_shop.judge.server.port) as proxy:
        app = FastAPI()
        db = Database(proxy.through(each_shop.judge.url(each_shop.driver)), pool_size=2, max_overflow=0)
        install(app, db)

        @app.post("/orders", status_code=201)
        async def place(session: SessionDep) -> dict[str, bool]:
            await write_order(session, 1)
            return {"ok": True}

        proxy.on_client_message = at_commit(Verdict.CUT_ANSWER)
        async with each_shop.client(app) as client:
            assert_is_problem(await client.post("/orders"), 503, "commit-outcome-unknown", None)
        assert proxy.verdicts[Verdict.CUT_ANSWER] == 1
        await db.close()
    assert await each_shop.orders() == [1]


async def test_a_backend_that_is_killed_before_commit_stores_nothing_and_says_so(each_shop: Shop) -> None:
    @each_shop.app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        killed = await each_shop.judge.fetchval(
            f"SELECT count(pg_terminate_backend(pid, 5000)) FROM {OTHERS}"
        )
        assert killed == 1
        return {"ok": True}

    answer = await each_shop.post("/orders")
    assert answer.status_code == 503
    assert await each_shop.orders() == []


async def test_a_path_value_of_a_mounted_app_is_in_no_log_line(
    bare_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenant's token may stand in the mount's own path, which the inner app has as its root path."""
    inner = FastAPI()
    install(inner, bare_shop.db)

    @inner.post("/orders")
    async def place(session: SessionDep) -> None:
        await _violate(session)

    @inner.post("/lost")
    async def lose(session: SessionDep) -> None:
        await write_order(session, 1)
        await session.close()

    bare_shop.app.mount("/tenants/{token}", inner)
    with caplog.at_level(logging.INFO):
        answers = [
            (await bare_shop.post(f"/tenants/{CANARY}/{path}")).status_code for path in ("orders", "lost")
        ]
    assert answers == [409, 500]
    lines = [record.getMessage() for record in caplog.records if record.name == "stanch"]
    assert any("POST /orders" in line for line in lines), lines
    assert any("POST /lost" in line for line in lines), lines
    assert not [line for line in lines if CANARY in line]
    assert not [event for event in bare_shop.told.events if CANARY in str(event)]


# Not ours to answer -----------------------------------------------------------------------------------------


async def test_an_oserror_of_the_app_stays_its_own(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await write_order(session, 1)
        raise FileNotFoundError("mine")

    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [500]
    assert isinstance(reply.error, FileNotFoundError)
    assert await each_shop.orders() == []


async def test_what_is_not_mapped_is_raised_to_the_server_without_its_values(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        await session.execute(text("SELECT * FROM no_such_table WHERE item = :item"), {"item": CANARY})

    reply = await call(each_shop.app, "/orders")
    assert (reply.starts, reply.body) == ([500], b"Internal Server Error")
    assert isinstance(reply.error, ProgrammingError)
    assert "no_such_table" in str(reply.error)
    assert CANARY not in str(reply.error)
    assert CANARY not in repr(reply.error)


async def test_an_error_that_has_nothing_to_do_with_a_database_is_left_alone(shop: Shop) -> None:
    @shop.app.get("/")
    async def broken() -> None:
        raise ExceptionGroup("mine", [ValueError(1)])

    reply = await call(shop.app, "/", method="GET")
    assert reply.starts == [500]
    assert isinstance(reply.error, ExceptionGroup)


# Task groups ------------------------------------------------------------------------------------------------


async def test_a_database_failure_in_a_task_group_is_the_same_problem(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        async with asyncio.TaskGroup() as group:
            group.create_task(write_order(session, 1))
        return {"ok": True}

    @each_shop.app.post("/nested")
    async def nested(session: SessionDep) -> dict[str, bool]:
        async def inner() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(_violate(session))

        async with asyncio.TaskGroup() as group:
            group.create_task(inner())
        return {"ok": True}

    for path in ("/orders", "/nested"):
        assert_is_problem(await each_shop.post(path), 409, "conflict", None)
    assert await each_shop.orders() == []


async def test_a_group_with_an_error_of_the_apps_own_is_left_to_the_app(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> None:
        ready = asyncio.Event()

        async def mine() -> None:
            with suppress(asyncio.CancelledError):
                ready.set()
                await asyncio.Event().wait()
            raise ZeroDivisionError("mine")

        async with asyncio.TaskGroup() as group:
            group.create_task(mine())
            await ready.wait()
            await _violate(session)

    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [500]
    group = reply.error
    assert isinstance(group, ExceptionGroup)
    parts = cast("ExceptionGroup[Exception]", group).exceptions
    assert {type(error).__name__ for error in parts} == {"IntegrityError", "ZeroDivisionError"}


# A handler that swallows its own timeout --------------------------------------------------------------------


async def test_a_handler_that_answers_504_to_its_own_timeout_stores_nothing(each_shop: Shop) -> None:
    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> JSONResponse:
        await write_order(session, 1)
        try:
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT pg_sleep(5)"))
        except TimeoutError:
            return JSONResponse({"slow": True}, 504)
        return JSONResponse({"ok": True})

    assert (await each_shop.post("/orders")).status_code == 504
    assert await each_shop.orders() == []
    await _nobody_sleeps(each_shop.judge)


async def test_a_handler_that_answers_200_to_its_own_timeout_never_lies(each_shop: Shop) -> None:
    """What it wrote before was in the transaction that the timeout cost: a 200 would be a lie."""

    @each_shop.app.post("/orders")
    async def place(session: SessionDep) -> JSONResponse:
        await write_order(session, 1)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT pg_sleep(5)"))
        return JSONResponse({"ok": True})

    reply = await call(each_shop.app, "/orders")
    stored = await each_shop.orders()
    assert len(reply.starts) == 1
    assert stored == ([1] if reply.starts[0] < 400 else [])
    await _nobody_sleeps(each_shop.judge)


async def test_after_such_timeouts_the_pool_is_as_good_as_new(each_shop: Shop) -> None:
    all_connected = asyncio.Barrier(5)

    @each_shop.app.get("/warm")
    async def warm(session: ReaderDep) -> None:
        await session.execute(text("SELECT 1"))
        await all_connected.wait()

    @each_shop.app.get("/slow")
    async def slow(session: ReaderDep) -> JSONResponse:
        try:
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT pg_sleep(5)"))
        except TimeoutError:
            return JSONResponse({"slow": True}, 504)
        return JSONResponse({"ok": True})

    @each_shop.app.post("/orders/{number}", status_code=201)
    async def place(number: int, session: SessionDep) -> dict[str, bool]:
        session.add(Order(id=number, item="tea"))
        return {"ok": True}

    await asyncio.gather(*(each_shop.get("/warm") for _ in range(5)))
    answers = await asyncio.gather(*(each_shop.get("/slow") for _ in range(10)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(504) >= 5
    # psycopg 3.2 on Python 3.11 can lose a cancellation that arrives together with an answer (asyncio.wait_for)
    assert set(statuses) == {504} or not IS_NEW_FASTAPI
    placed = await asyncio.gather(*(each_shop.post(f"/orders/{number}") for number in range(10)))
    assert [answer.status_code for answer in placed] == [201] * 10
    assert await each_shop.orders() == list(range(10))
    await assert_nothing_left(each_shop.judge, each_shop.db)


async def test_the_body_says_the_same_whatever_the_failure_said(each_shop: Shop) -> None:
    """Two conflicts of different tables, constraints and values: not a byte of difference."""

    @each_shop.app.post("/one")
    async def one(session: SessionDep) -> None:
        await session.execute(text("INSERT INTO p VALUES (1), (1)"))

    @each_shop.app.post("/other")
    async def other(session: SessionDep) -> None:
        await session.execute(text("INSERT INTO orders VALUES (:id, :item, 404)"), {"id": 1, "item": CANARY})

    bodies = {(await each_shop.post(path)).content for path in ("/one", "/other")}
    assert len(bodies) == 1
    assert json.loads(bodies.pop())["status"] == 409


async def _violate(session: Any) -> None:
    await session.execute(text("INSERT INTO p VALUES (1), (1)"))


async def _nobody_sleeps(judge: FreshDatabase) -> None:
    await until(
        judge,
        "SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event = 'PgSleep')",
    )
