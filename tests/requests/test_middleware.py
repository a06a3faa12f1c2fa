"""Layers around and inside the unit: user middleware, body limits, mounted apps.

What no layer inside can close is a documented limit, pinned here by a test whose name says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware

from stanch import Database
from stanch.asgi import unit_of
from stanch.errors import UnsavedWrites
from stanch.fastapi import DatabaseDep, SessionDep, get_session, install, provide_session
from tests.requests.shop import (
    IS_NEW_FASTAPI,
    LEAVES_A_STREAM,
    SCHEMA,
    Shop,
    call,
    comes_from,
    doom,
    needs_new_fastapi,
    write_order,
)
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio

IN_COMMIT = """
    SELECT 1 FROM pg_stat_activity
    WHERE wait_event = 'PgSleep' AND datname = current_database() AND query ILIKE 'commit%'
"""
SLOW_COMMIT = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION dawdle();
"""

ParentsDep = Annotated[AsyncSession, Depends(provide_session("main"))]
CallNext = Callable[[Request], Awaitable[Response]]


class PassOn(BaseHTTPMiddleware):
    """Does nothing, but runs the app in a task of its own and hands its body on chunk by chunk."""

    async def dispatch(self, request: Request, call_next: CallNext) -> Response:
        return await call_next(request)


def add_endpoints(app: FastAPI, ran: list[str]) -> None:
    """``/orders`` commits, ``/doomed`` and ``/doomed-stream`` fail at COMMIT, ``/late`` fails at the body's."""

    @app.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    @app.post("/doomed", status_code=201)
    async def doomed(session: SessionDep, tasks: BackgroundTasks) -> dict[str, bool]:
        tasks.add_task(ran.append, "background task of a dead reply")
        await doom(session)
        return {"ok": True}

    @app.post("/doomed-stream", status_code=201)
    async def doomed_stream(session: SessionDep, tasks: BackgroundTasks) -> StreamingResponse:
        tasks.add_task(ran.append, "background task of a dead reply")
        await doom(session)
        return StreamingResponse(_chunks("ok"), background=tasks)

    @app.post("/late", status_code=201)
    async def late(session: SessionDep, tasks: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "ok"
            await doom(session)

        tasks.add_task(ran.append, "background task of a dead reply")
        return StreamingResponse(body(), background=tasks)


# BaseHTTPMiddleware ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["outside", pytest.param("inside a mounted app", marks=LEAVES_A_STREAM)])
@pytest.mark.parametrize("path", ["/doomed", "/doomed-stream"])
async def test_a_failed_commit_under_base_http_middleware_is_one_reply(
    each_shop: Shop, where: str, path: str
) -> None:
    ran: list[str] = []
    if where == "outside":
        each_shop.app.add_middleware(PassOn)
        add_endpoints(each_shop.app, ran)
    else:
        sub = FastAPI()
        sub.add_middleware(PassOn)
        sub.add_exception_handler(IntegrityError, _conflict)
        add_endpoints(sub, ran)
        each_shop.app.mount("/sub", sub)
        path = f"/sub{path}"
    reply = await call(each_shop.app, path)
    assert (reply.starts, reply.is_complete, reply.error) == ([409], True, None)
    assert b"ok" not in reply.body
    assert (await each_shop.children(), ran) == (0, [])


async def test_a_late_failed_commit_under_base_http_middleware_is_a_broken_reply(
    each_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """That middleware ends a stream as complete whatever happened in it, and loses the error on the way."""
    ran: list[str] = []
    each_shop.app.add_middleware(PassOn)
    add_endpoints(each_shop.app, ran)
    async with serve(each_shop.app) as url, httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            await client.post("/late")
    assert (await each_shop.children(), ran) == (0, [])
    assert "POST /late: the reply was broken off, its commit failed: IntegrityError" in caplog.text


async def test_limit_a_stream_that_raises_under_base_http_middleware_looks_complete(shop: Shop) -> None:
    """Documented: Starlette's own. The body's error reaches the log, the client sees a whole reply."""
    shop.app.add_middleware(PassOn)

    @shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            await write_order(session, 1)
            yield "first"
            raise ZeroDivisionError("mine")

        return StreamingResponse(body())

    reply = await call(shop.app, "/orders")
    assert (reply.starts, reply.is_complete) == ([200], IS_NEW_FASTAPI)  # the oldest one breaks it off
    assert comes_from(reply.error, ZeroDivisionError)
    assert await shop.orders() == []


async def test_a_reply_under_base_http_middleware_is_committed_before_it_leaves(each_shop: Shop) -> None:
    seen: list[list[int]] = []
    each_shop.app.add_middleware(PassOn)
    add_endpoints(each_shop.app, [])

    async def look(message: Any) -> None:
        seen.append(await each_shop.orders())

    assert (await call(each_shop.app, "/orders", on_message=look)).starts == [201]
    assert seen[0] == [1]


async def test_middleware_is_outside_the_unit_and_is_told_what_to_use(shop: Shop) -> None:
    @shop.app.middleware("http")
    async def authenticate(request: Request, call_next: CallNext) -> Response:
        await get_session(request)
        return await call_next(request)

    reply = await call(shop.app, "/", method="GET")
    assert type(reply.error).__name__ == "NotInstalled"
    assert "async with db.session()" in str(reply.error)


async def test_middleware_uses_a_session_of_its_own(shop: Shop) -> None:
    @shop.app.middleware("http")
    async def audit(request: Request, call_next: CallNext) -> Response:
        async with shop.db.transaction() as session:
            await write_order(session, 2)
        return await call_next(request)

    add_endpoints(shop.app, [])
    assert (await shop.post("/doomed")).status_code == 409
    assert await shop.orders() == [2]


# Middleware of the libraries --------------------------------------------------------------------------------


async def test_a_failed_commit_has_the_cors_headers_of_the_app(shop: Shop) -> None:
    shop.app.add_middleware(CORSMiddleware, allow_origins=["http://friend"])
    add_endpoints(shop.app, [])
    answer = await shop.post("/doomed", headers={"origin": "http://friend"})
    assert answer.status_code == 409
    assert answer.headers["access-control-allow-origin"] == "http://friend"


@pytest.mark.parametrize("path", ["/doomed", "/doomed-stream"])
async def test_a_failed_commit_under_gzip_is_one_reply(shop: Shop, path: str) -> None:
    ran: list[str] = []
    shop.app.add_middleware(GZipMiddleware, minimum_size=1)
    add_endpoints(shop.app, ran)
    answer = await shop.post(path, headers={"accept-encoding": "gzip"})
    assert (answer.status_code, answer.json()["status"], ran) == (409, 409, [])
    assert await shop.children() == 0


async def test_limit_gzip_holds_the_start_back_so_a_stream_that_fails_at_once_is_a_500_after_its_commit(
    shop: Shop,
) -> None:
    """Documented: the start has passed us and was committed; a layer outside had not let it out yet."""
    shop.app.add_middleware(GZipMiddleware, minimum_size=1)

    @shop.app.post("/orders")
    async def export(session: SessionDep) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            for chunk in [1 / 0]:
                yield f"{chunk}"

        await write_order(session, 1)
        return StreamingResponse(body())

    reply = await call(shop.app, "/orders", headers={"accept-encoding": "gzip"})
    assert reply.starts == [500]
    assert await shop.orders() == [1]


# Body limits ----------------------------------------------------------------------------------------------


@needs_new_fastapi("max_body_size")
@pytest.mark.parametrize("where", ["app", "route"])
async def test_a_body_that_is_too_large_stores_nothing_although_nobody_read_it(
    bare_shop: Shop, where: str
) -> None:
    """The limiter of the app stands outside us and puts a 413 in the place of a reply that was a 201."""
    limit: dict[str, Any] = {"max_body_size": 10}
    app = FastAPI(**(limit if where == "app" else {}))
    install(app, bare_shop.db)

    @app.post("/orders", status_code=201, **(limit if where == "route" else {}))
    async def place(session: SessionDep) -> dict[str, bool]:
        await write_order(session, 1)
        return {"ok": True}

    reply = await call(app, "/orders", body=b"x" * 11, headers={"content-length": "11"})
    assert reply.starts == [413]
    assert await bare_shop.orders() == []


@needs_new_fastapi("max_body_size")
async def test_a_body_at_the_limit_is_committed(bare_shop: Shop) -> None:
    limit: dict[str, Any] = {"max_body_size": 10}
    app = FastAPI(**limit)
    install(app, bare_shop.db)
    add_endpoints(app, [])
    reply = await call(app, "/orders", body=b"x" * 10, headers={"content-length": "10"})
    assert reply.starts == [201]
    assert await bare_shop.orders() == [1]


# Limits ---------------------------------------------------------------------------------------------------


async def test_limit_a_status_swapped_outside_comes_after_the_commit(shop: Shop) -> None:
    """Documented: a layer outside may answer 403 in the place of a reply that was committed."""

    @shop.app.middleware("http")
    async def forbid(request: Request, call_next: CallNext) -> Response:
        await call_next(request)
        return PlainTextResponse("no", 403)

    add_endpoints(shop.app, [])
    assert (await call(shop.app, "/orders")).starts == [403]
    assert await shop.orders() == [1]


async def test_limit_a_timeout_outside_during_commit_is_a_504_and_the_row_is_there(each_shop: Shop) -> None:
    """Documented: from the moment COMMIT is written nobody can take it back; a 504 says *unknown*, not *failed*."""
    await each_shop.judge.execute(SLOW_COMMIT)
    running: list[asyncio.Task[Any]] = []

    class Impatient:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await self.app(scope, receive, send)
                return
            task = asyncio.create_task(self.app(scope, receive, send))
            running.append(task)
            await until(each_shop.judge, IN_COMMIT)
            task.cancel()
            await asyncio.wait([task])
            await PlainTextResponse("too slow", 504)(scope, receive, send)

    each_shop.app.add_middleware(Impatient)
    add_endpoints(each_shop.app, [])
    reply = await call(each_shop.app, "/orders")
    assert reply.starts == [504]
    assert running[0].cancelled()
    assert await each_shop.orders() == [1]


# Mounted apps ---------------------------------------------------------------------------------------------


async def test_a_mounted_app_uses_the_unit_of_its_parent(each_shop: Shop) -> None:
    sub = FastAPI()
    add_endpoints(sub, [])
    each_shop.app.mount("/sub", sub)
    assert (await call(each_shop.app, "/sub/orders")).starts == [201]
    assert await each_shop.orders() == [1]


@pytest.mark.parametrize("path", ["/sub/doomed", "/sub/doomed-stream"])
async def test_a_failed_commit_in_a_mounted_app_without_handlers_is_its_own_500(
    each_shop: Shop, path: str
) -> None:
    """Its ServerErrorMiddleware lies inside us and has unwound; the reply is the one it would have made."""
    ran: list[str] = []
    sub = FastAPI()
    add_endpoints(sub, ran)
    each_shop.app.mount("/sub", sub)
    reply = await call(each_shop.app, path)
    assert (reply.starts, reply.body, ran) == ([500], b"Internal Server Error", [])
    assert await each_shop.children() == 0


async def test_the_catch_all_handler_of_a_mounted_app_runs_once(each_shop: Shop) -> None:
    calls: list[str] = []
    sub = FastAPI()

    @sub.exception_handler(Exception)
    async def everything(_request: Request, error: Exception) -> Response:
        calls.append(type(error).__name__)
        return PlainTextResponse("sorry", 500)

    add_endpoints(sub, [])
    each_shop.app.mount("/sub", sub)
    reply = await call(each_shop.app, "/sub/doomed")
    assert (reply.starts, reply.body, calls) == ([500], b"sorry", ["IntegrityError"])


async def test_a_failed_commit_in_a_mounted_app_is_answered_by_its_own_handlers(each_shop: Shop) -> None:
    sub = FastAPI()
    sub.add_exception_handler(IntegrityError, _conflict)
    add_endpoints(sub, [])
    each_shop.app.mount("/sub", sub)
    reply = await call(each_shop.app, "/sub/doomed")
    assert (reply.starts, reply.body, reply.error) == ([409], b"mine", None)


async def test_a_mounted_app_with_an_install_of_its_own_settles_and_answers_itself(each_shop: Shop) -> None:
    """Then its own middleware sees the reply to the failed commit, as its CORS headers show."""
    ran: list[str] = []
    sub = FastAPI()
    install(sub, each_shop.db)
    sub.add_middleware(CORSMiddleware, allow_origins=["http://friend"])
    add_endpoints(sub, ran)
    each_shop.app.mount("/sub", sub)
    reply = await call(each_shop.app, "/sub/doomed", headers={"origin": "http://friend"})
    assert (reply.starts, reply.error, ran) == ([409], None, [])
    headers = dict(reply.messages[0]["headers"])
    assert headers[b"access-control-allow-origin"] == b"http://friend"
    assert (await call(each_shop.app, "/sub/orders")).starts == [201]
    assert await each_shop.orders() == [1]


async def test_limit_without_an_install_of_its_own_a_mounted_apps_cors_misses_the_failed_commit(
    shop: Shop,
) -> None:
    sub = FastAPI()
    sub.add_exception_handler(IntegrityError, _conflict)
    sub.add_middleware(CORSMiddleware, allow_origins=["http://friend"])
    add_endpoints(sub, [])
    shop.app.mount("/sub", sub)
    reply = await call(shop.app, "/sub/doomed", headers={"origin": "http://friend"})
    assert reply.starts == [409]
    assert b"access-control-allow-origin" not in dict(reply.messages[0]["headers"])


async def test_in_nested_installs_the_innermost_settles_and_the_outermost_closes(shop: Shop) -> None:
    used_after: list[bool] = []
    sub = FastAPI()
    install(sub, shop.db)
    sessions: list[AsyncSession] = []

    @sub.post("/orders", status_code=201)
    async def place(session: SessionDep) -> dict[str, bool]:
        sessions.append(session)
        await write_order(session, 1)
        return {"ok": True}

    async def between(scope: Any, receive: Any, send: Any) -> None:
        await sub(scope, receive, send)
        if scope["type"] == "http":
            used_after.append(unit_of(scope).used)
            assert await shop.orders() == [1]
            await write_order(sessions[0], 2)

    shop.app.mount("/sub", between)
    assert (await call(shop.app, "/sub/orders")).starts == [201]
    assert used_after == [True]
    assert await shop.orders() == [1, 2]


async def test_a_mounted_app_with_a_database_of_its_own_writes_there(shop: Shop) -> None:
    """Not to its parent's, which it does not know; by name it reaches that too."""
    judge = await FreshDatabase.create(shop.judge.server)
    await judge.execute(SCHEMA)
    own = Database(judge.url("asyncpg"), name="own")
    sub = FastAPI()
    install(sub, own)

    @sub.post("/orders")
    async def place(
        session: SessionDep,
        db: DatabaseDep,
        parents: ParentsDep,
    ) -> str:
        await write_order(session, 1)
        await write_order(parents, 2)
        return db.name

    shop.app.mount("/sub", sub)
    try:
        assert (await shop.post("/sub/orders")).json() == "own"
        stored = [row["id"] for row in await judge.fetch("SELECT id FROM orders")]
        assert (stored, await shop.orders()) == ([1], [2])
        await assert_nothing_left(judge, own)
    finally:
        await own.close()
        await judge.drop()


async def test_a_manual_app_mounted_in_an_auto_app_stays_manual(shop: Shop) -> None:
    sub = FastAPI()
    install(sub, shop.db, commit_mode="manual", unsaved="raise")
    add_endpoints(sub, [])
    add_endpoints(shop.app, [])
    shop.app.mount("/sub", sub)
    reply = await call(shop.app, "/sub/orders")
    assert reply.starts == [500]
    # the parent's handlers come too late, and say so
    assert isinstance(reply.error, RuntimeError)
    assert isinstance(reply.error.__cause__, UnsavedWrites)
    assert await shop.orders() == []
    assert (await call(shop.app, "/orders")).starts == [201]
    assert await shop.orders() == [1]


async def _conflict(_request: Request, _error: Exception) -> Response:
    return PlainTextResponse("mine", 409)


async def _chunks(*texts: str) -> AsyncIterator[str]:
    for chunk in texts:
        yield chunk
